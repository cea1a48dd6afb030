"""Real vectors as vectors over the ring Z_2^32, and back.

Secret sharing needs a finite ring in which every element is equally likely; floats have none. A number u becomes the
integer q = u * 2^fraction_bits, rounded up or down at random so that its expectation is u (plain rounding would bias
the mean of many small updates towards zero), and q modulo 2^32 stands for it: as long as a float32. Sums of ring
elements are exact, hence every aggregator gets bit-identical results on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fl_coordinator.shares.streams import SEED_BYTES, Words, expand
from model_delta.errors import Malformed

Rng = Callable[[int], bytes]
"""Returns that many bytes; cryptographic in production (`os.urandom`), seeded in a replay."""

_BLOCK = 32_768


def norm_of(update: NDArray[np.float32] | NDArray[np.float64]) -> float:
    """L2 norm, also of values whose squares overflow. Raises Malformed for NaN or infinity."""
    values = update.reshape(-1)
    # An infinity or a NaN anywhere makes this product a NaN; finite values make it 0.
    with np.errstate(invalid="ignore"):
        product = float(np.dot(values, np.zeros_like(values)))
    if not math.isfinite(product):
        raise Malformed(f"update: {int((~np.isfinite(values)).sum())} of {values.size} values are not finite")
    blocks = (values[start : start + _BLOCK].astype(np.float64) for start in range(0, values.size, _BLOCK))
    peak = float(np.abs(values).max(initial=0.0))
    if 1e-100 < peak < 1e100:
        return math.sqrt(sum(float(np.dot(block, block)) for block in blocks))
    return peak * math.sqrt(sum(float(np.square(block / peak).sum()) for block in blocks)) if peak > 0 else 0.0


def clip(update: NDArray[np.float32] | NDArray[np.float64], norm_max: float) -> NDArray[np.float64]:
    """`update` scaled down to l2 norm `norm_max` if it is longer; float64[d]. Raises Malformed for NaN or infinity."""
    norm = norm_of(update)
    return np.asarray(update, dtype=np.float64).reshape(-1) * (min(norm_max, norm) / norm if norm > 0 else 1.0)


def encode(
    update: NDArray[np.float32] | NDArray[np.float64], fraction_bits: int, rng: Rng, factor: float = 1.0
) -> Words:
    """`factor` * update in fixed point with stochastic rounding: uint32[d], each within 1 of the exact product.

    Unbiased to within 2^-21 of a unit. 32 bytes of `rng` seed an AES key stream, from which the 32 random bits of each
    rounding come. Raises Malformed when a value leaves +-2^31 after scaling.
    """
    values, scale = update.reshape(-1), factor * float(1 << fraction_bits)
    encoded = np.empty(values.size, dtype=np.uint32)
    uniform = expand(rng(SEED_BYTES), values.size)
    for start in range(0, values.size, _BLOCK):
        part = slice(start, start + _BLOCK)
        scaled = values[part] * np.float64(scale)
        # Below 2^31 a double holds 21 bits or more behind the point: all that is lost of the sum is below 2^-21.
        scaled += uniform[part] * 2.0**-32
        np.floor(scaled, out=scaled)
        if not (scaled.min() >= -(2.0**31) and scaled.max() < 2.0**31):
            raise Malformed(f"update: expected values below 2^{31 - fraction_bits} in magnitude, found a larger one")
        encoded[part] = scaled.astype(np.int32).view(np.uint32)
    return encoded


def decode(words: Words, fraction_bits: int) -> NDArray[np.float64]:
    """The real numbers that ring elements stand for, read as two's complement: float64, same shape."""
    return words.view(np.int32).astype(np.float64) / float(1 << fraction_bits)


def norm_max(clip_norm_l2: float, fraction_bits: int, length: int) -> int:
    """The largest l2 norm, in units of 2^-fraction_bits, of an honestly clipped and encoded vector.

    Rounding moves each of `length` entries by less than 1, hence the norm by less than sqrt(length).
    """
    return math.ceil(clip_norm_l2 * (1 << fraction_bits)) + math.isqrt(length) + 1
