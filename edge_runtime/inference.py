"""What a model is to a device: named tensors in, named tensors out, and which version it is.

The runtime behind it is handed in (`OpenModel`), so that a device without onnxruntime still has every rule here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from model_delta.errors import AtollError, Malformed, Unavailable
from model_delta.manifest import Manifest, Tensor

Arrays = Mapping[str, NDArray[np.generic]]


class NoVersion(Unavailable):
    """No version may answer now: none is installed, or it was withdrawn, or it has expired."""


class ModelFailed(AtollError):
    """The version failed on inputs that fit its signature."""


class InputsDisagree(Malformed):
    """Inputs that each fit the signature but not each other: the caller's mistake, not the model's."""


class LoadedModel(Protocol):
    """A version ready to answer. `digest` is its manifest's digest. The fraud model: input `features` float32[n, F],
    output `score` float32[n, 1] in [0, 1]. Called from several threads."""

    digest: str

    def run(self, inputs: Arrays) -> dict[str, NDArray[np.generic]]:
        """Named tensors to named tensors. Raises InputsDisagree, and Malformed for whatever else goes wrong."""


OpenModel = Callable[[Manifest, Path], LoadedModel]
"""Opens a version from the path of its file, which has just been checked."""
RunGraph = Callable[[bytes, Arrays], dict[str, NDArray[np.generic]]]


def array_of(tensor: Tensor, what: str) -> NDArray[np.generic]:
    """A read-only array over a manifest's tensor. Raises Malformed when dtype, shape and size do not fit together."""
    try:
        kind = np.dtype(tensor.dtype)
        if kind.hasobject:
            raise TypeError
        return np.frombuffer(tensor.data, dtype=kind.newbyteorder("<")).astype(kind, copy=False).reshape(tensor.shape)
    except (TypeError, ValueError):
        raise Malformed(
            f"{what}: {len(tensor.data)} bytes are no {tensor.dtype[:20]!r} of shape {tensor.shape}"
        ) from None


def feature_row(features: Mapping[str, float], names: Sequence[str]) -> NDArray[np.float32]:
    """The values of `names` in order, float32[F]. Raises Malformed with the names that are missing or not finite."""
    missing = [name for name in names if name not in features]
    if missing:
        raise Malformed(f"features: expected {len(names)} named values, missing {', '.join(missing[:8])}")
    row = np.array([features[name] for name in names], dtype=np.float32)
    if not np.isfinite(row).all():
        bad = [name for name, value in zip(names, row, strict=True) if not np.isfinite(value)]
        raise Malformed(f"features: expected finite numbers, found otherwise in {', '.join(bad[:8])}")
    return row


def score_of(model: LoadedModel, row: NDArray[np.float32]) -> float:
    """The model's score for one row, in [0, 1]. Raises Malformed if the model gives no finite number there."""
    outputs = model.run({"features": row.reshape(1, -1)})
    if "score" not in outputs or outputs["score"].size != 1:
        raise Malformed(f"model {model.digest[:12]}: expected one `score`, found {sorted(outputs)}")
    score = float(outputs["score"].reshape(-1)[0])
    if not 0.0 <= score <= 1.0:
        raise Malformed(f"model {model.digest[:12]}: expected a score in [0, 1], found {score!r}")
    return score
