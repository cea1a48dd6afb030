"""How unlike the simulated terminals are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from device_sim.payments import Payments


def category_divergence(payments: Payments, terminals: Sequence[int], bins: int = 20) -> float:
    """How unlike the terminals are: mean total-variation distance of their amount histograms to the pooled one.

    0 when every terminal holds the same distribution, towards 1 when they share nothing. Log-spaced bins.
    """
    edges = np.quantile(payments.amount, np.linspace(0, 1, bins + 1)[1:-1])
    bucket = np.searchsorted(edges, payments.amount)
    pooled = np.bincount(bucket, minlength=bins) / max(len(payments), 1)
    distances = []
    for terminal in terminals:
        mine = bucket[payments.terminal == terminal]
        if len(mine):
            distances.append(0.5 * np.abs(np.bincount(mine, minlength=bins) / len(mine) - pooled).sum())
    return float(np.mean(distances)) if distances else 0.0
