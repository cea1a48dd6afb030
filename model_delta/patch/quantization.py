"""int8 weights whose scales are locked to the parent version, so that a small update stays a small delta.

Symmetric: `weight ~ int8 * scale`, with one scale per channel or one for the whole tensor. A fresh scale maps the
largest magnitude to 127. Four rules keep consecutive versions alike:

1. A channel keeps its parent's scale unless its largest magnitude exceeds what that scale can hold by more than 5 %;
   up to there the excess is clipped. Re-scaling on any overflow changes every integer of the channel for a rounding
   error's worth of range.
2. Where the float32 weight did not move at all, the parent's integer stays, whatever rounding would say now: two
   roundings of one number may differ in a tie, and one flip makes a frozen tensor look changed.
3. Everywhere else the weight is rounded afresh. A dead zone around the old integer would be smaller still and throw the
   update away: a round moves a weight by a hundredth of a level, and the few integers that flip carry all of it.
   `fidelity` is the gate against that.
4. Tensors that stay float32 (biases, norms) take steps on a grid of twice their median step.

Plain NumPy; the graph surgery is in `graphs`. Weights are float32 of two dimensions, `axis` is the channel's; None
means one scale, float32[], for the whole tensor.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from model_delta.errors import Malformed

Weights = npt.NDArray[np.float32]
Levels = npt.NDArray[np.int8]
LEVELS = 127
ACTIVATION_LEVELS = 255
OVERFLOW_MAX = 1.05
GRID_STEPS = 2.0
GRID_ULPS_MAX = 1 << 17
"""No number is rounded by more than 1/128 of itself, however far the parent is."""
GRID_COUNT_MIN = 32
"""Of fewer numbers than that a median says little, and there is nothing to save."""
_SCALE_MIN = np.float32(1e-12)


class Parent(NamedTuple):
    """The same tensor in the version before: its integers, its scales, and the float32 it was made from if known."""

    levels: Levels
    scales: Weights
    source: Weights | None = None


def requantize(weight: Weights, axis: int | None, parent: Parent) -> tuple[Levels, Weights]:
    """Integers and scales of `weight` under the rules above; rule 2 needs `parent.source`. A channel of which no weight
    moved keeps its integers and its scale, even one that overflows."""
    scales = locked_scales(weight, axis, parent.scales)
    if parent.source is None:
        return quantize(weight, scales, axis), scales
    unmoved = _bits(weight) == _bits(parent.source)
    still = unmoved.all() if axis is None else unmoved.all(axis=1 - axis)
    usable = np.isfinite(parent.scales) & (parent.scales > 0)
    scales = np.where(still & usable, parent.scales, scales).astype(np.float32)
    levels = quantize(weight, scales, axis)
    keep = unmoved & _along(scales == parent.scales, axis)
    np.copyto(levels, parent.levels, where=keep)
    return levels, scales


def fresh_scales(weight: Weights, axis: int | None) -> Weights:
    """Scales that use the whole int8 range; a channel of zeros gets a tiny one, so that its first real weight makes a
    new scale."""
    scales: Weights = np.maximum(_magnitudes(weight, axis) / np.float32(LEVELS), _SCALE_MIN).astype(np.float32)
    return scales


def locked_scales(weight: Weights, axis: int | None, parent: Weights) -> Weights:
    """The parent's scales, with fresh ones for the channels that overflow theirs by more than 5 % (or whose parent
    scale is no positive number)."""
    usable = np.isfinite(parent) & (parent > 0)
    fits = _magnitudes(weight, axis) <= np.where(usable, parent, 0) * np.float32(LEVELS * OVERFLOW_MAX)
    return np.where(usable & fits, parent, fresh_scales(weight, axis)).astype(np.float32)


def quantize(weight: Weights, scales: Weights, axis: int | None) -> Levels:
    """Round to the nearest level (ties to even) and clip to [-127, 127]; the shape of `weight`."""
    scaled: Weights = weight / _along(scales, axis)
    np.rint(scaled, out=scaled)
    np.clip(scaled, -LEVELS, LEVELS, out=scaled)
    return scaled.astype(np.int8)


def dequantize(levels: Levels, scales: Weights, axis: int | None) -> Weights:
    """The float32 weights that the runtime computes with (ONNX DequantizeLinear, zero point 0)."""
    weight: Weights = (levels.astype(np.float32) * _along(scales, axis)).astype(np.float32)
    return weight


def on_grid(value: Weights, parent: Weights, source: Weights | None = None) -> Weights:
    """`value` with its steps from `parent` rounded to a power of two near twice the median step, both counted in units
    in the last place (the distance between neighbouring float32), at most 2**17. What did not move stays bit-identical;
    fewer than 32 steps are taken as they are.

    The grid is relative to the parent as deployed, so that what one version rounds away the next one still sees. With
    `source`, the float32 that the parent was made from, a number that training left alone keeps the deployed value.
    Numbers that are not finite, on either side, are taken as they are. Any shape.
    """
    before, after = _ordinal(parent), _ordinal(value)
    still = _bits(value) == _bits(parent if source is None else source)
    finite = np.isfinite(value) & np.isfinite(parent)
    steps = np.where(still | ~finite, 0, after - before)
    moved = np.abs(steps[steps != 0])
    if moved.size >= GRID_COUNT_MIN:
        grid = min(1 << round(np.log2(GRID_STEPS * float(np.median(moved)))), GRID_ULPS_MAX)
        steps = np.rint(steps / grid).astype(np.int64) * grid
    rounded = _from_ordinal(before + steps)
    taken = finite & np.isfinite(rounded)
    return np.where(still, parent, np.where(taken, rounded, value)).astype(np.float32)


def activation_scale(low: float, high: float) -> tuple[np.float32, np.uint8]:
    """Scale and zero point of uint8 activations that were seen from `low` to `high`: asymmetric, 0 is a level of its
    own (ONNX QuantizeLinear). Raises Malformed for a range that is none."""
    if not (np.isfinite(low) and np.isfinite(high) and low <= high):
        raise Malformed(f"activations: expected a finite range, found {low:g} to {high:g}; see the calibration rows")
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max(np.float32((high - low) / ACTIVATION_LEVELS), _SCALE_MIN)
    return scale, np.uint8(np.clip(np.rint(-low / float(scale)), 0, ACTIVATION_LEVELS))


class Measured(msgspec.Struct, frozen=True):
    """What one form of a model costs on one class of device: bytes of its file, median microseconds of one row."""

    size_bytes: int
    latency_us: float


class Worth(msgspec.Struct, frozen=True, kw_only=True):
    """When int8 is worth it for a class of device: it answers in at most `faster` of float32's time; or its file is at
    most `smaller` of float32's bytes and it answers in at most `slower_max` of float32's time."""

    faster: float = 0.95
    smaller: float = 0.6
    slower_max: float = 1.25


class Choice(msgspec.Struct, frozen=True):
    """Whether int8 is to be shipped, and the figures that say why."""

    int8: bool
    reason: str


def choose(int8: Measured, float32: Measured, worth: Worth = Worth()) -> Choice:  # noqa: B008 - a frozen value
    """int8 only where it measured faster, or smaller enough and hardly slower. Figures that are no numbers choose
    float32."""
    latency, size = int8.latency_us / max(float32.latency_us, 1e-9), int8.size_bytes / max(float32.size_bytes, 1)
    faster = latency <= worth.faster
    smaller = size <= worth.smaller and latency <= worth.slower_max
    verdict = "faster" if faster else "smaller enough" if smaller else "neither faster nor smaller enough"
    return Choice(faster or smaller, f"int8 is {verdict}: {size:.2f} of the bytes, {latency:.2f} of the time")


def _magnitudes(weight: Weights, axis: int | None) -> Weights:
    along = None if axis is None else 1 - axis
    found = np.maximum(weight.max(axis=along, initial=np.float32(0)), -weight.min(axis=along, initial=np.float32(0)))
    return np.asarray(found, np.float32)


def _along(scales: npt.NDArray[Any], axis: int | None) -> npt.NDArray[Any]:
    if axis is None:
        return scales
    return scales[np.newaxis, :] if axis == 1 else scales[:, np.newaxis]


def _bits(value: Weights) -> npt.NDArray[np.uint32]:
    return np.asarray(value, np.float32, order="C").view(np.uint32)  # ascontiguousarray would give a scalar an axis


def _ordinal(value: Weights) -> npt.NDArray[np.int64]:
    """float32 as integers in the order of the numbers, neighbours one apart (both zeros are 0)."""
    bits = _bits(value).astype(np.int64)
    return np.where(bits < 1 << 31, bits, (1 << 31) - bits)


def _from_ordinal(ordinal: npt.NDArray[np.int64]) -> Weights:
    bits = np.where(ordinal >= 0, ordinal, (1 << 31) - ordinal)
    return np.clip(bits, 0, (1 << 32) - 1).astype(np.uint32).view(np.float32)
