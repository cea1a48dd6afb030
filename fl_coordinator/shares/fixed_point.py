"""Real vectors as vectors over the ring Z_2^32, and back.

Secret sharing needs a finite ring in which every element is equally likely; floats have none. A number u becomes the
integer q = u * 2^fraction_bits, rounded up or down at random so that its expectation is u (plain rounding would bias
the mean of many small updates towards zero), and q modulo 2^32 stands for it: as long as a float32. Sums of ring
elements are exact, hence every aggregator gets bit-identical results on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from fl_coordinator.shares.streams import SEED_BYTES, KeyStream, Words
from model_delta.errors import Malformed

Rng = Callable[[int], bytes]
"""Returns that many bytes; cryptographic in production (`os.urandom`), seeded in a replay."""

BLOCK = 32_768


def norm_of(update: NDArray[np.float32] | NDArray[np.float64]) -> float:
    """L2 norm, also of values whose squares overflow. Raises Malformed for NaN or infinity."""
    values = update.reshape(-1)
    squared = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, values.size, BLOCK):
            block = values[start : start + BLOCK].astype(np.float64)
            squared += float(np.dot(block, block))
    if 1e-200 < squared < 1e200:
        return math.sqrt(squared)
    finite = np.isfinite(values)
    if not finite.all():
        raise Malformed(f"update: {int((~finite).sum())} of {values.size} values are not finite")
    peak = float(np.abs(values).max(initial=0.0))
    return peak * math.sqrt(float(np.square(values.astype(np.float64) / peak).sum())) if peak > 0 else 0.0


def clip(update: NDArray[np.float32] | NDArray[np.float64], norm_max: float) -> NDArray[np.float64]:
    """`update` scaled down to l2 norm `norm_max` if it is longer; float64[d]. Raises Malformed for NaN or infinity."""
    norm = norm_of(update)
    return np.asarray(update, dtype=np.float64).reshape(-1) * (min(norm_max, norm) / norm if norm > 0 else 1.0)


def encode(update: NDArray[np.float32] | NDArray[np.float64], fraction_bits: int, rng: Rng) -> Words:
    """Fixed point with unbiased stochastic rounding: uint32[d], each within 1 of update * 2^fraction_bits.

    Raises Malformed when a value leaves +-2^31 after scaling.
    """
    parts = [block.copy() for block in encode_blocks(update, fraction_bits, rng)]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint32)


def encode_blocks(
    update: NDArray[np.float32] | NDArray[np.float64],
    fraction_bits: int,
    rng: Rng,
    factor: float = 1.0,
    norm: float = math.inf,
) -> Iterator[Words]:
    """`factor` * update so encoded, BLOCK words at a time; each is valid until the next is asked for, and may be
    changed by who takes it.

    32 bytes of `rng` seed an AES key stream, from which the 32 random bits of each rounding come; the expectation is
    exact to within 2^-21 of a unit. `norm` is the update's L2 norm where it is known: no value is larger, which saves
    looking for one that is. Raises Malformed as `encode` does.
    """
    values, scale = update.reshape(-1), float(factor * float(1 << fraction_bits))
    uniform = KeyStream(rng(SEED_BYTES))
    room, chance, whole = np.empty(BLOCK), np.empty(BLOCK), np.empty(BLOCK, dtype=np.int32)
    sure = norm * abs(scale) <= 2.0**31 - 1
    for start in range(0, values.size, BLOCK):
        part = values[start : start + BLOCK]
        scaled, random, rounded = room[: part.size], chance[: part.size], whole[: part.size]
        # Converted before they are multiplied: arithmetic on mixed types goes through small buffers, at twice the cost.
        np.copyto(scaled, part)
        np.copyto(random, uniform.words(part.size))
        np.multiply(scaled, scale, out=scaled)
        np.multiply(random, 2.0**-32, out=random)
        # Below 2^31 a double holds 21 bits or more behind the point: all that is lost of the sum is below 2^-21.
        np.add(scaled, random, out=scaled)
        np.floor(scaled, out=scaled)
        if not sure and not (scaled.min() >= -(2.0**31) and scaled.max() < 2.0**31):
            raise Malformed(f"update: expected values below 2^{31 - fraction_bits} in magnitude, found a larger one")
        np.copyto(rounded, scaled, casting="unsafe")
        yield rounded.view(np.uint32)


def decode(words: Words, fraction_bits: int) -> NDArray[np.float64]:
    """The real numbers that ring elements stand for, read as two's complement: float64, same shape."""
    return words.view(np.int32).astype(np.float64) / float(1 << fraction_bits)


def norm_max(clip_norm_l2: float, fraction_bits: int, length: int) -> int:
    """The largest l2 norm, in units of 2^-fraction_bits, of an honestly clipped and encoded vector.

    Rounding moves each of `length` entries by less than 1, hence the norm by less than sqrt(length).
    """
    return math.ceil(clip_norm_l2 * (1 << fraction_bits)) + math.isqrt(length) + 1
