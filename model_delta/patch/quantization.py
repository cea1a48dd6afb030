"""Weight-only int8 whose scales are locked to the parent version, so that a small update stays a small delta.

Symmetric, one scale per output channel: `weight ~ int8 * scale`. A fresh scale maps the channel's largest magnitude to
127. A channel keeps its parent's scale unless its largest magnitude exceeds what the parent's scale can hold by more
than 5 %; up to there the excess is clipped. Re-scaling on any overflow changes every integer of the channel for a
rounding error's worth of range, and a dead zone around the old integers would throw small updates away.

Plain NumPy; the graph surgery is in `graphs`. Weights are float32 of two dimensions, `axis` is the output channel's.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Weights = npt.NDArray[np.float32]
LEVELS = 127
OVERFLOW_MAX = 1.05
_SCALE_MIN = np.float32(1e-12)


def fresh_scales(weight: Weights, axis: int) -> Weights:
    """Scales float32[channels] that use the whole int8 range; a channel of zeros gets a tiny one, so that its first
    real weight makes a new scale."""
    scales: Weights = np.maximum(_magnitudes(weight, axis) / np.float32(LEVELS), _SCALE_MIN).astype(np.float32)
    return scales


def locked_scales(weight: Weights, axis: int, parent: Weights) -> Weights:
    """The parent's scales float32[channels], with fresh ones for the channels that overflow theirs by more than 5 % (or
    whose parent scale is no positive number)."""
    usable = np.isfinite(parent) & (parent > 0)
    fits = _magnitudes(weight, axis) <= np.where(usable, parent, 0) * np.float32(LEVELS * OVERFLOW_MAX)
    return np.where(usable & fits, parent, fresh_scales(weight, axis)).astype(np.float32)


def quantize(weight: Weights, scales: Weights, axis: int) -> npt.NDArray[np.int8]:
    """Round to the nearest level (ties to even) and clip to [-127, 127]; the shape of `weight`."""
    levels: npt.NDArray[np.int8] = np.clip(np.rint(weight / _along(scales, axis)), -LEVELS, LEVELS).astype(np.int8)
    return levels


def dequantize(levels: npt.NDArray[np.int8], scales: Weights, axis: int) -> Weights:
    """The float32 weights that the runtime computes with (ONNX DequantizeLinear, zero point 0)."""
    return (levels.astype(np.float32) * _along(scales, axis)).astype(np.float32)


def _magnitudes(weight: Weights, axis: int) -> Weights:
    found: Weights = np.abs(weight).max(axis=1 - axis, initial=np.float32(0))
    return found


def _along(scales: Weights, axis: int) -> Weights:
    return scales[np.newaxis, :] if axis == 1 else scales[:, np.newaxis]
