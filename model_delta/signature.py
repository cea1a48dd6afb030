"""What kind of question a version answers, as its manifest's inputs and outputs tell it.

A version that takes the one input `features` float32[batch, F] and gives a `score` for each row answers payments: a
device decides by its score and threshold. Any other version answers named tensors with named tensors, and nobody may
read a decision into what it gives. Which of the two a version is, is said by its signature alone: it is in the signed
manifest, so that a device knows it before the model's file has arrived.

Dtypes are NumPy's names; a dimension of -1 is free.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model_delta.errors import Malformed
from model_delta.manifest import TensorSpec

FEATURES = "features"
SCORE = "score"


def payment_width(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> int | None:
    """How many features a version scores payments by (-1: any number), or None for a version of another signature."""
    if len(inputs) != 1 or inputs[0].name != FEATURES or inputs[0].dtype != "float32" or len(inputs[0].shape) != 2:
        return None
    batch, width = inputs[0].shape
    if batch not in (-1, 1) or not any(_is_score(spec) for spec in outputs):
        return None
    return width


def require_tensors(tensors: Mapping[str, NDArray[Any]], inputs: Sequence[TensorSpec], what: str) -> None:
    """Raise Malformed unless `tensors` are what `inputs` promise: these names, each of its dtype, rank and fixed sizes,
    with something in it. The message names the tensor, what was expected and what was found, and none of its values."""
    expected = {spec.name: spec for spec in inputs}
    if tensors.keys() != expected.keys():
        raise Malformed(f"{what}: expected the inputs {_names(expected)}, found {_names(tensors)}")
    for name, spec in expected.items():
        found = tensors[name]
        if found.dtype.name != spec.dtype:
            raise Malformed(f"{what}: input {name!r}: expected {shown_type(spec)}, found dtype {found.dtype.name}")
        sizes = found.shape
        fits = len(sizes) == len(spec.shape) and all(
            wanted in (-1, size) for wanted, size in zip(spec.shape, sizes, strict=True)
        )
        if not fits or 0 in sizes:
            raise Malformed(f"{what}: input {name!r}: expected {shown_type(spec)}, found shape {list(sizes)}")


def made_up(
    inputs: Sequence[TensorSpec], rng: np.random.Generator, *, batch: int = 1, free: int = 4
) -> dict[str, NDArray[Any]]:
    """Tensors of the signature, by name: standard normal numbers, integers from 0 to 3, either truth. A free first axis
    has the size `batch`, any other free axis `free`. See `size_of` for the bytes that this takes."""
    return {spec.name: _made_up(spec, _sizes(spec, batch, free), rng) for spec in inputs}


def size_of(inputs: Sequence[TensorSpec], *, batch: int = 1, free: int = 4) -> int:
    """How many bytes the tensors of `made_up` are."""
    return sum(math.prod(_sizes(spec, batch, free)) * np.dtype(spec.dtype).itemsize for spec in inputs)


def shown(specs: Iterable[TensorSpec]) -> str:
    """Tensors in words: `'pixels' float32[?, 1, 8, 8], 'mask' int64[?, ?]`; "none" without any."""
    return ", ".join(f"{spec.name!r} {shown_type(spec)}" for spec in specs) or "none"


def shown_type(spec: TensorSpec) -> str:
    """A tensor's type in words: `float32[?, 1, 8, 8]`."""
    return f"{spec.dtype}[{', '.join('?' if size < 0 else str(size) for size in spec.shape)}]"


def _sizes(spec: TensorSpec, batch: int, free: int) -> tuple[int, ...]:
    return tuple(size if size >= 0 else batch if axis == 0 else free for axis, size in enumerate(spec.shape))


def _made_up(spec: TensorSpec, sizes: tuple[int, ...], rng: np.random.Generator) -> NDArray[Any]:
    kind = np.dtype(spec.dtype)
    if kind.kind in "iub":
        return np.asarray(rng.integers(0, 2 if kind.kind == "b" else 4, sizes)).astype(kind)
    return np.asarray(rng.standard_normal(sizes)).astype(kind)


def _is_score(spec: TensorSpec) -> bool:
    return spec.name == SCORE and spec.dtype.startswith("float") and all(size in (-1, 1) for size in spec.shape)


def _names(named: Iterable[str]) -> str:
    every = sorted(named)
    return ", ".join(repr(name[:64]) for name in every[:8]) + (", ..." if len(every) > 8 else "") or "none"
