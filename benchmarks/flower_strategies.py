"""Flower's own Krum and MultiKrum beside ours, on the updates of real trainings: do they average the same devices?

`python -m benchmarks.flower_strategies [--json]` trains under Multi-Krum, every task, two splits, nobody hostile and
every untargeted attack, and hands the updates of some rounds to Flower's strategy classes in clear. A strategy spends
forty milliseconds on 32 updates, thirty times what the rest of a round takes here, so `benchmarks.robustness` runs our
transcription of the same rule in all rounds; this shows that it is the same.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

import numpy as np
from numpy.typing import NDArray

from benchmarks.attacks import UNTARGETED
from benchmarks.claims import Claim, at_most, run
from benchmarks.robustness import ASSUMED, DEVICES, HOSTILE, RULES, TASKS, gram_of, train
from benchmarks.robustness_report import Run
from fl_coordinator.rules.history import Memory

SEED = 200
ROUNDS_COMPARED = (0, 60)
TOLERANCE = 1e-6

Floats = NDArray[np.float64]


def averaged(strategy: Any, updates: Floats) -> Floats:
    """What a strategy of Flower makes of one reply a device, float64[d]."""
    from flwr.app import ArrayRecord, MetricRecord, RecordDict

    replies = [
        # A message needs a running Flower task; a strategy reads no more of it than this.
        SimpleNamespace(
            content=RecordDict({"arrays": ArrayRecord([update]), "metrics": MetricRecord({"num-examples": 1})}),
            has_error=lambda: False,
        )
        for update in updates
    ]
    arrays, _ = strategy.aggregate_train(1, replies)
    return np.asarray(arrays.to_numpy_ndarrays()[0], dtype=np.float64)


def measure(options: argparse.Namespace) -> Sequence[Claim]:
    """Rounds in which an average differs from ours by more than a millionth of its length."""
    import logging

    from flwr.serverapp.strategy import Krum, MultiKrum

    logging.getLogger("flwr").setLevel(logging.ERROR)  # It tells the number of replies of every round.
    peers = {
        "Multi-Krum": MultiKrum(num_malicious_nodes=ASSUMED, num_nodes_to_select=DEVICES - ASSUMED),
        "Krum": Krum(num_malicious_nodes=ASSUMED),
    }
    compared, differing = dict.fromkeys(peers, 0), dict.fromkeys(peers, 0)

    def watch(number: int, updates: Floats) -> None:
        if number not in ROUNDS_COMPARED:
            return
        for name, strategy in peers.items():
            weights, _ = RULES[name](gram_of(updates), ASSUMED, Memory())
            ours = weights @ updates
            distance = float(np.linalg.norm(ours - averaged(strategy, updates)))
            compared[name] += 1
            differing[name] += distance > TOLERANCE * float(np.linalg.norm(ours))

    for task in options.tasks:
        for alpha in (math.inf, 0.3):
            for attack in ("", *UNTARGETED):
                train(Run(task, alpha, attack, "Multi-Krum", HOSTILE if attack else 0, ASSUMED, SEED), watch)
    return [
        at_most(
            f"robust.flower_{name.lower().replace('-', '')}",
            differing[name],
            f"of {compared[name]} rounds in which Flower's {type(peers[name]).__name__} averages other devices",
            0,
        )
        for name in peers
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="the only form (for explicitness)")
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS, help="only these tasks")
    run(__doc__.splitlines()[0] if __doc__ else "", measure, parser)
