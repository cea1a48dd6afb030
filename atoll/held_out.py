"""The payments on which candidates of federated rounds are measured: files that only the coordinator's machine has.

Each model has its own, beside the ledger: `held_out-MODEL.npz`, or else `held_out.npz` if its rows fit the model. The
arrays are `features` float32[n, F], `fraud` bool[n], and `slice` str[n] (kinds, each judged by itself too).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edge_runtime.onnx_model import open_model
from fl_coordinator.promotion import Evaluate, Evaluation
from model_delta.errors import Malformed
from model_delta.manifest import Manifest
from monitoring.quality import average_precision

ANY_MODEL = "held_out.npz"
LATENCY_ROWS = 200

Floats = npt.NDArray[np.float32]
Rows = tuple[Floats, npt.NDArray[np.bool_], npt.NDArray[np.str_]]


def write_rows(path: Path, features: Floats, fraud: npt.NDArray[np.bool_], kind: npt.NDArray[np.str_]) -> None:
    """Write a file that `evaluation_in` reads. Raises OSError."""
    np.savez(path, features=features, fraud=fraud, slice=kind)


def evaluation_in(folder: Path) -> Evaluate:
    """Measures a version on the held-out payments in `folder`; read at each use, so that a new file counts at once.

    Without a file for its model every candidate measures the same, so that only size and latency gate it. What is
    returned raises Malformed for a file that is none, or a model's own whose rows do not fit it.
    """

    def evaluate(manifest: Manifest, file: bytes) -> Evaluation:
        model, given = open_model(manifest, file), manifest.inputs[0]
        width = given.shape[-1]
        found = _rows_of(folder, manifest.model, width)
        precision, slices, frauds = 0.0, {}, {}
        if found is None:
            rows = np.zeros((LATENCY_ROWS, max(width, 1)), dtype=np.float32)
        else:
            rows, fraud, kind = found
            scores = model.run({given.name: rows})["score"].reshape(-1)
            precision = average_precision(scores, fraud)
            for name in np.unique(kind):
                mine = kind == name
                slices[str(name)] = average_precision(scores[mine], fraud[mine])
                frauds[str(name)] = int(fraud[mine].sum())
        return Evaluation(
            average_precision=precision,
            slices=slices,
            slice_frauds=frauds,
            latency_p95_us=_latency_p95_us(lambda row: model.run({given.name: row}), rows[:LATENCY_ROWS]),
            size_bytes=len(file),
        )

    return evaluate


def _rows_of(folder: Path, model: str, width: int) -> Rows | None:
    own = _read(folder / f"held_out-{model}.npz")
    if own is None:
        shared = _read(folder / ANY_MODEL)
        return shared if shared is not None and shared[0].shape[1] == width else None
    if own[0].shape[1] != width:
        raise Malformed(
            f"{folder / f'held_out-{model}.npz'}: expected {width} features a row, as model {model} takes them, found "
            f"{own[0].shape[1]}; write it anew or remove it"
        )
    return own


def _read(path: Path) -> Rows | None:
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            features, fraud, kind = arrays["features"], arrays["fraud"], arrays["slice"]
        sound = features.ndim == 2 and len(features) == len(fraud) == len(kind) > 0 and np.isfinite(features).all()
    except Exception:  # of what is damaged: zlib's, tokenize's, RuntimeError, MemoryError and more
        sound = False
    if not sound:
        raise Malformed(
            f"{path}: expected finite features[n, F], fraud[n] and slice[n] in one .npz; write it anew or remove it"
        )
    return features.astype(np.float32), fraud.astype(bool), kind.astype(str)


def _latency_p95_us(run: Callable[[Floats], object], rows: Floats) -> float:
    """Processor time of this thread, not time on the wall: a busy machine must not gate a version."""
    seconds = []
    for index in range(len(rows)):
        started = time.thread_time()
        run(rows[index : index + 1])
        seconds.append(time.thread_time() - started)
    return float(np.quantile(seconds, 0.95)) * 1e6
