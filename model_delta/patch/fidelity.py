"""Two gates between a requantized version and a release: does it answer like its float32, and did the update arrive.

Outputs alone would also pass a model that ignored the update, because one round moves them less than int8 does. So the
second figure looks at the weights: the *carried* share is the slope of (dequantized int8, new - old) regressed through
zero on (float32, new - old), over all weights. A faithful rounding scores about 1; keeping every old integer until the
weight is 0.6 levels away scores about 0.003. Both figures are held against those of a fresh requantization (new scales,
nothing kept) of the same float32, never against perfection.

A share has a sampling error: a round flips few integers, and each flip is a whole level. Where locked and fresh
integers disagree by chance, the shares differ by chance too; three standard errors of that difference are added to the
tolerance. For millions of weights that is nothing; for a hundred weights that moved by a hundredth of a level nothing
can be said, and the gate says so by letting it pass.

Plain NumPy.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from model_delta.patch.quantization import Weights

DISTANCE_EXCESS_MAX = 0.005
CARRIED_LOSS_MAX = 0.02
STANDARD_ERRORS = 3.0


class Change(NamedTuple):
    """How one tensor changed, each new - old of one shape: in float32; in int8 as it is to be released; in int8 after a
    fresh requantization."""

    name: str
    float32: Weights
    int8: Weights
    fresh: Weights


class Carried(msgspec.Struct, frozen=True):
    """The carried share of a version, of a fresh requantization, and the standard error of their difference. None of
    them means anything (and all are 0) when no weight moved: `moved` is false."""

    share: float
    fresh: float
    error: float
    moved: bool


class Fidelity(msgspec.Struct, frozen=True):
    """What the gates look at: mean 1 - cosine of outputs to float32's, of the version and of a fresh requantization
    (None where there was nothing to feed them), and the carried share (None without a parent)."""

    distance: float | None = None
    distance_fresh: float | None = None
    carried: Carried | None = None


def carried(changes: Iterable[Change]) -> Carried:
    """The carried shares over all tensors: sum(int8 * float32) / sum(float32 ** 2).

    The error is the heteroskedasticity-consistent one (White 1980, HC0) of the slope of (int8 - fresh) on float32."""
    squares = product = product_fresh = variance = 0.0
    for change in changes:
        step = change.float32.ravel().astype(np.float64)
        squares += float(step @ step)
        product += float(step @ change.int8.ravel().astype(np.float64))
        product_fresh += float(step @ change.fresh.ravel().astype(np.float64))
        apart = step * (change.int8.ravel().astype(np.float64) - change.fresh.ravel())
        variance += float(apart @ apart)
    if squares == 0:
        return Carried(0.0, 0.0, 0.0, False)
    return Carried(product / squares, product_fresh / squares, variance**0.5 / squares, True)


def distance(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """Mean of 1 - cosine over rows; outputs of one number a row are compared as one vector. NaN for shapes that differ
    or numbers that are not finite. Two zero vectors are at 0, a zero and another at 1."""
    if found.shape != expected.shape:
        return float("nan")
    width = found.shape[-1] if found.ndim > 1 else 1
    shape = (-1, width) if width > 1 else (1, -1)
    left, right = found.reshape(shape).astype(np.float64), expected.reshape(shape).astype(np.float64)
    lengths = np.linalg.norm(left, axis=1), np.linalg.norm(right, axis=1)
    scale = lengths[0] * lengths[1]
    same_zero = (lengths[0] == 0) & (lengths[1] == 0)
    cosine = np.where(same_zero, 1.0, (left * right).sum(axis=1) / np.where(scale == 0, 1.0, scale))
    return max(0.0, float(1 - cosine.mean())) if np.isfinite(cosine).all() else float("nan")


def refusals(measured: Fidelity) -> tuple[str, ...]:
    """Why this version must not be released; () when both gates pass. NaN never passes."""
    reasons = []
    if measured.distance is not None and measured.distance_fresh is not None:
        excess = measured.distance - measured.distance_fresh
        if not excess <= DISTANCE_EXCESS_MAX:
            reasons.append(
                f"outputs: expected 1 - cosine to float32 within {DISTANCE_EXCESS_MAX:g} of a fresh requantization's "
                f"{measured.distance_fresh:.4f}, found {measured.distance:.4f}"
            )
    if measured.carried is not None and measured.carried.moved:
        share = measured.carried
        tolerance = CARRIED_LOSS_MAX + STANDARD_ERRORS * share.error
        if not abs(share.share - share.fresh) <= tolerance:
            reasons.append(
                f"carried share: expected within {tolerance:.3f} of a fresh requantization's {share.fresh:.3f}, "
                f"found {share.share:.3f}; the integers do not carry the update"
            )
    return tuple(reasons)
