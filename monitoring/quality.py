"""How good a score is, from labels: average precision, and precision, recall and alert rate at a threshold.

Pure functions of two arrays: `scores` float[n] (higher means more suspicious) and `fraud` bool[n].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class AtThreshold:
    """What declining every score >= `threshold` does. Rates are 0.0 where there is nothing to divide by."""

    threshold: float
    precision: float
    recall: float
    false_positive_rate: float
    alert_rate: float


def average_precision(scores: npt.ArrayLike, fraud: npt.ArrayLike) -> float:
    """Area under precision over recall as a step function, sum of (R_k - R_{k-1}) P_k; 0.0 without any fraud.

    Equal scores form one step, so the order of ties does not matter (the definition of scikit-learn's
    `average_precision_score`, without interpolation). Raises ValueError for unequal lengths or a NaN score.
    """
    score, label = _checked(scores, fraud)
    positives = int(label.sum())
    if positives == 0:
        return 0.0
    order = np.argsort(-score, kind="stable")
    hits = np.cumsum(label[order])
    last_of_tie = np.append(np.flatnonzero(np.diff(score[order])), len(order) - 1)
    found = hits[last_of_tie]
    precision = found / (last_of_tie + 1)
    gained = np.diff(np.concatenate([[0], found])) / positives
    return float((gained * precision).sum())


def at_threshold(scores: npt.ArrayLike, fraud: npt.ArrayLike, threshold: float) -> AtThreshold:
    """Precision, recall, false-positive rate and alert rate when every score >= `threshold` is declined."""
    score, label = _checked(scores, fraud)
    alert = score >= threshold
    true_positives = int((alert & label).sum())
    alerts, positives = int(alert.sum()), int(label.sum())
    return AtThreshold(
        threshold=threshold,
        precision=_share(true_positives, alerts),
        recall=_share(true_positives, positives),
        false_positive_rate=_share(alerts - true_positives, len(label) - positives),
        alert_rate=_share(alerts, len(label)),
    )


def threshold_for_false_positives(scores: npt.ArrayLike, fraud: npt.ArrayLike, rate_max: float) -> float:
    """The lowest threshold in [0, 1] at which at most `rate_max` of the legitimate payments are declined.

    It lies halfway between two neighbouring scores, so that a score moved by rounding stays on its side.
    """
    score, label = _checked(scores, fraud)
    legitimate = np.sort(score[~label])[::-1]
    allowed = int(rate_max * len(legitimate))
    if allowed >= len(legitimate):
        return 0.0
    ceiling = legitimate[allowed]
    above = score[score > ceiling]
    return float((ceiling + (above.min() if len(above) else max(1.0, ceiling))) / 2)


def _checked(scores: npt.ArrayLike, fraud: npt.ArrayLike) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    score = np.asarray(scores, dtype=np.float64).ravel()
    label = np.asarray(fraud).astype(bool).ravel()
    if len(score) != len(label):
        raise ValueError(f"quality: {len(score)} scores for {len(label)} labels")
    if np.isnan(score).any():
        raise ValueError("quality: a score is not a number")
    return score, label


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
