"""`atoll model quantize`: the int8 version of a model file, gated on fidelity before it is written.

Without a parent it is a fresh quantization. With one it follows the parent, and is held against a fresh quantization of
the same float32: outputs on made-up inputs, and with the parent's float32 also the carried share. A version that fails
is not written.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from atoll.output import show
from atoll.settings import ConfigurationError, write_private
from edge_runtime.onnx_model import run_graph
from model_delta import graphs
from model_delta.errors import Malformed
from model_delta.patch import fidelity, quantization
from model_delta.patch.fidelity import Fidelity

FILE_BYTES_MAX = 512 * 2**20
FORMS = ("weights", "dynamic")
_RUNS, _RUNS_S = 30, 2.0

Inputs = dict[str, npt.NDArray[Any]]


def quantize_file(
    float32: Path,
    out: Path,
    parent: Path | None,
    parent_float32: Path | None,
    *,
    form: str,
    per_tensor: bool,
    seed: int,
    as_json: bool,
) -> None:
    """Quantize, compare, write, and print sizes, scales, integers that moved, fidelity, and whether int8 is worth it
    on this machine. Raises ConfigurationError, Malformed (one line, nothing written) and StorageFull."""
    if form and form not in FORMS:
        raise ConfigurationError(f"--form: expected {' or '.join(FORMS)}, found {form!r}")
    if parent_float32 is not None and parent is None:
        raise ConfigurationError("--parent-fp32: expected --parent with it, the int8 version made from that file")
    source = _read(float32)
    before = _read(parent) if parent is not None else None
    before_source = _read(parent_float32) if parent_float32 is not None else None
    chosen, per_channel = form or FORMS[0], not per_tensor
    if before is not None:
        found = graphs.form_of(before)
        if found is None:
            raise ConfigurationError(f"--parent {parent}: expected a file that `atoll model quantize` made")
        if (form and form != found[0]) or (per_tensor and found[1]):
            raise ConfigurationError(
                f"--parent {parent}: expected one of the same form, found {found[0]} with one scale a "
                f"{'channel' if found[1] else 'tensor'}; leave --form and --per-tensor out"
            )
        chosen, per_channel = found
    kind = cast(graphs.Form, chosen)
    made = graphs.quantize(source, before, before_source, form=kind, per_channel=per_channel)
    if not made.tensors:
        raise Malformed(
            f"{float32}: expected a float32 model with constant matrices, found none that could be int8; "
            "one that is quantized already, has control flow, or an operator set below 13 is released as it is"
        )
    if before is not None and made.moved is None:
        raise ConfigurationError(
            f"--parent {parent}: expected a version of the same model, found no tensor of its names"
        )
    fresh = graphs.quantize(source, form=kind, per_channel=per_channel).file if before is not None else None
    inputs = graphs.made_up_inputs(source, np.random.default_rng(seed))
    measured = _fidelity(source, made.file, fresh, before, before_source, inputs)
    reasons = fidelity.refusals(measured)
    if reasons:
        raise Malformed(f"{out}: not written; {'; '.join(reasons)}")
    choice = quantization.choose_by_measuring(made.file, source, lambda file: _latency_us(file, inputs))
    write_private(out, made.file)
    out.chmod(0o644)
    _tell(out, source, made, measured, choice, as_json)


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > FILE_BYTES_MAX:
            raise ConfigurationError(f"{path}: expected at most {FILE_BYTES_MAX} bytes, found {size}")
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot read: {error.strerror}") from None


def _fidelity(
    source: bytes,
    file: bytes,
    fresh: bytes | None,
    parent: bytes | None,
    parent_source: bytes | None,
    inputs: Inputs,
) -> Fidelity:
    share = None
    if fresh is not None and parent is not None and parent_source is not None:
        share = fidelity.carried(graphs.weight_changes(source, file, fresh, parent_source, parent))
    try:
        expected = run_graph(source, inputs)
    except Malformed:  # not everything runs on made-up inputs
        return Fidelity(carried=share)
    distances = [_distance(run_graph(one, inputs), expected) if one is not None else None for one in (file, fresh)]
    return Fidelity(distances[0], distances[1], share)


def _distance(found: dict[str, npt.NDArray[np.generic]], expected: dict[str, npt.NDArray[np.generic]]) -> float | None:
    outputs = [name for name, value in expected.items() if np.issubdtype(value.dtype, np.floating)]
    return max((fidelity.distance(found[name], expected[name]) for name in outputs), default=None)


def _latency_us(file: bytes, inputs: Inputs) -> float:
    """Median time of one row; NaN when the model does not run on one."""
    row = {name: value[:1] for name, value in inputs.items()}
    taken: list[float] = []
    try:
        run_graph(file, row)
        while len(taken) < _RUNS and sum(taken) < _RUNS_S:
            start = time.perf_counter()
            run_graph(file, row)
            taken.append(time.perf_counter() - start)
    except Malformed:
        return float("nan")
    return 1e6 * statistics.median(taken)


def _tell(
    out: Path, source: bytes, made: graphs.Quantized, measured: Fidelity, choice: quantization.Choice, as_json: bool
) -> None:
    share = measured.carried if measured.carried is not None and measured.carried.moved else None
    value = {
        "file": str(out),
        "bytes": len(made.file),
        "float32_bytes": len(source),
        "tensors": made.tensors,
        "weights": made.weights,
        "scales": made.scales,
        "scales_not_the_parents": made.rescaled,
        "integers_moved": made.moved,
        "distance": measured.distance,
        "distance_fresh": measured.distance_fresh,
        "carried": share.share if share else None,
        "carried_fresh": share.fresh if share else None,
        "int8_here": choice.int8,
        "int8_here_because": choice.reason,
    }
    lines = [f"{out}: {len(made.file)} bytes, float32 {len(source)}; {made.weights} weights of {made.tensors} tensors"]
    if made.moved is not None:
        lines.append(f"{made.moved:.4%} of the integers moved; {made.rescaled} of {made.scales} scales are new")
    if measured.distance is not None:
        beside = "" if measured.distance_fresh is None else f" (a fresh quantization: {measured.distance_fresh:.5f})"
        lines.append(f"outputs: 1 - cosine to float32 {measured.distance:.5f}{beside}")
    if share is not None:
        lines.append(f"carried share of the update: {share.share:.3f} (a fresh quantization: {share.fresh:.3f})")
    lines.append(f"on this machine {choice.reason}")
    show(value, "\n".join(lines), as_json=as_json)
