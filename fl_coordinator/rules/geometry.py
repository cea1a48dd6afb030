"""What a Gram matrix says about lengths and distances, in integers wherever a decision hangs on it.

Three aggregators and every later verifier compute a round's choice by themselves, on other machines and other builds of
NumPy. Sums of floats depend on the order of addition, hence on the machine; so a Gram matrix is scaled once, element by
element (IEEE 754 rounds those operations the same everywhere), to integers, and all sums after that are exact.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from model_delta.errors import Malformed

Gram = NDArray[np.int64]
Floats = NDArray[np.float64]

ENTRY_MAX = 1 << 58
UNIT = 1 << 20
"""Entries of a clipped Gram matrix are in units of the squared median norm over UNIT."""

DEVICES_MAX = 4_096


def checked(gram: NDArray[np.int64]) -> Gram:
    """`gram` as int64[n, n]. Raises Malformed unless it is a symmetric matrix of integers of magnitude up to 2^58 with
    a non-negative diagonal, for at most 4,096 devices."""
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not np.array_equal(gram, gram.T):
        raise Malformed(f"Gram matrix: expected a symmetric matrix, found one of shape {gram.shape}")
    if not np.issubdtype(gram.dtype, np.integer):
        raise Malformed(f"Gram matrix: expected integers, found {gram.dtype}")
    if gram.shape[0] > DEVICES_MAX:
        raise Malformed(f"Gram matrix: expected at most {DEVICES_MAX} devices, found {gram.shape[0]}")
    if gram.size and (int(gram.max()) > ENTRY_MAX or int(gram.min()) < -ENTRY_MAX):
        found = max(abs(int(gram.max())), abs(int(gram.min())))
        raise Malformed(f"Gram matrix: expected entries up to 2^58, found {found}")
    if gram.size and int(np.diagonal(gram).min()) < 0:
        raise Malformed("Gram matrix: expected squared norms on the diagonal, found a negative one")
    return gram.astype(np.int64)


def median(values: Floats) -> float:
    """Middle value, or the mean of the two middle values; 0.0 of nothing."""
    if not values.size:
        return 0.0
    ordered = np.sort(values)
    return float((ordered[(values.size - 1) // 2] + ordered[values.size // 2]) / 2)


def norms(gram: Gram) -> Floats:
    """L2 norms float64[n], in the units of the updates."""
    return np.asarray(np.sqrt(np.diagonal(gram).astype(np.float64)))


def clip_factors(gram: Gram, medians: float = 1.0) -> Floats:
    """s float64[n] with min(1, c / norm): what shortens every update to c = `medians` times the median norm at most."""
    lengths = norms(gram)
    bound = medians * median(lengths)
    return np.asarray(np.minimum(1.0, bound / np.where(lengths > 0, lengths, 1.0)), dtype=np.float64)


def clipped(gram: Gram, medians: float = 1.0) -> Gram:
    """Gram matrix of the updates so clipped, int64[n, n] in units of (median norm)^2 / 2^20.

    All entries lie within +-(2^20 medians^2 + 1). Zero throughout when the median norm is zero.
    """
    scale = median(norms(gram))
    if scale == 0:
        return np.zeros_like(gram)
    s = clip_factors(gram, medians) / scale
    return np.asarray(np.rint(gram.astype(np.float64) * s[:, None] * s[None, :] * UNIT).astype(np.int64))


def squared_distances(gram: Gram) -> Gram:
    """Squared distances int64[n, n], exact for entries up to 2^58."""
    diagonal = np.diagonal(gram)
    return np.asarray(diagonal[:, None] + diagonal[None, :] - 2 * gram)


def robust_sigmas(values: Floats, spread_min: float = 0.0) -> Floats:
    """(value - median) / (1.4826 MAD), float64[n] rounded to six decimals; zeros when the MAD is zero.

    The divisor is at least `spread_min` times the median's magnitude.
    """
    centre = median(values)
    spread = max(1.4826 * median(np.abs(values - centre)), spread_min * abs(centre))
    return np.round((values - centre) / spread, 6) if spread > 0 else np.zeros(values.size)
