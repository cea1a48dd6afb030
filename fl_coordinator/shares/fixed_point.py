"""Real vectors as vectors over the ring Z_2^64, and back.

Secret sharing needs a finite ring in which every element is equally likely; floats have none. A number u becomes the
integer q = u * 2^fraction_bits, rounded up or down at random so that its expectation is u (plain rounding would bias
the mean of many small updates towards zero), and q modulo 2^64 stands for it. Sums of ring elements are exact, hence
every aggregator gets bit-identical results on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from model_delta.errors import Malformed

Words = NDArray[np.uint64]
Rng = Callable[[int], bytes]
"""Returns that many bytes; cryptographic in production (`os.urandom`), seeded in a replay."""

WORD_BYTES = 8


def clip(update: NDArray[np.float32] | NDArray[np.float64], norm_max: float) -> NDArray[np.float64]:
    """`update` scaled down to l2 norm `norm_max` if it is longer; float64[d]. Raises Malformed for NaN or infinity."""
    values = np.asarray(update, dtype=np.float64).reshape(-1)
    if not np.isfinite(values).all():
        raise Malformed(f"update: {int((~np.isfinite(values)).sum())} of {values.size} values are not finite")
    peak = float(np.abs(values).max(initial=0.0))
    norm = peak * math.sqrt(float(np.square(values / peak).sum())) if peak > 0 else 0.0
    return values * (norm_max / norm) if norm > norm_max else values


def encode(update: NDArray[np.float64], fraction_bits: int, rng: Rng) -> Words:
    """Fixed point with unbiased stochastic rounding: uint64[d], each within 1 of update * 2^fraction_bits.

    Raises Malformed when a value leaves +-2^52 after scaling (float64 would no longer hold its fraction).
    """
    scaled = np.asarray(update, dtype=np.float64) * float(1 << fraction_bits)
    if not (np.abs(scaled) < 2.0**52).all():
        raise Malformed(f"update: expected values below 2^{52 - fraction_bits} in magnitude, found a larger one")
    floor = np.floor(scaled)
    uniform = (np.frombuffer(rng(WORD_BYTES * scaled.size), dtype="<u8") >> np.uint64(11)) * 2.0**-53
    return (floor + (uniform < scaled - floor)).astype(np.int64).view(np.uint64)


def decode(words: Words, fraction_bits: int) -> NDArray[np.float64]:
    """The real numbers that ring elements stand for, read as two's complement: float64, same shape."""
    return words.view(np.int64).astype(np.float64) / float(1 << fraction_bits)


def norm_max(clip_norm_l2: float, fraction_bits: int, length: int) -> int:
    """The largest l2 norm, in units of 2^-fraction_bits, of an honestly clipped and encoded vector.

    Rounding moves each of `length` entries by less than 1, hence the norm by less than sqrt(length).
    """
    return math.ceil(clip_norm_l2 * (1 << fraction_bits)) + math.isqrt(length) + 1
