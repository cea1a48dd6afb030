"""What choosing updates on shares costs: one aggregator's computing, messages between aggregators, a device's work.

`python -m benchmarks.secure_round [--devices N] [--length D] [--json]`. Three parties run in lock-step in this process,
one after the other on one BLAS thread; a party's time is a third of the whole. The baseline is Multi-Krum on the same
updates in clear (float32, NumPy), in the same run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence

# Before NumPy is loaded: on a busy machine OpenBLAS threads wait for each other by spinning, at ten times the cost.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from benchmarks.claims import Claim, at_most, run
from tests.fakes.secure_round import SecureRound

RUNS = 5


def measure(options: argparse.Namespace) -> Sequence[Claim]:
    """Medians over five runs, after one that warms up."""
    count, length = options.devices, options.length
    hostile = count // 10
    world = SecureRound(length=length, hostile_max=hostile, selected_min=max(8, hostile + 2))
    rng = np.random.default_rng(options.seed)
    common = rng.normal(size=length)
    updates = (0.01 * (common + rng.normal(size=(count, length)))).astype(np.float32)
    updates[:hostile] *= -3
    names = [f"pos-{place:04d}" for place in range(count)]
    contributions = [world.contribution(name, update) for name, update in zip(names, updates, strict=True)]
    rows = np.stack([world.encode(update) for update in updates])

    plain = _median_s(lambda: _plain_multikrum(updates, hostile))
    party = _median_s(lambda: world.run_rows(rows)) / 3
    admit = _median_s(lambda: world.hold(contributions, 0))
    device = _median_s(lambda: world.contribution(names[0], updates[0]))
    _, views, decision = world.run_rows(rows)
    if decision.selected != tuple(range(hostile, count)):
        raise SystemExit(f"selected {decision.selected}, expected all but the first {hostile}")
    sent = max(sum(map(len, view.sent.values())) for view in views)
    return [
        at_most("secure.party", party, f"s a party (n={count}, d={length})", 1.0, plain),
        at_most("secure.admit", admit, "s to verify and open all contributions", 1.0),
        at_most("secure.device", 1000 * device, "ms on the device", 50),
        at_most("secure.upload", len(contributions[0]) / (8 * length), "x the vector's 8 d bytes", 1.05),
        at_most("secure.messages", sent / 1e6, "MB sent by a party", 20),
        at_most("secure.steps", len({step for step, _ in views[0].sent | views[0].received}), "message steps", 32),
    ]


def _plain_multikrum(updates: np.ndarray, hostile: int) -> np.ndarray:
    gram = updates @ updates.T
    norms = np.diagonal(gram)
    distances = np.sort(norms[:, None] + norms[None, :] - 2 * gram, axis=1)
    scores = distances[:, 1 : len(updates) - hostile - 1].sum(axis=1)
    mean: np.ndarray = updates[np.argsort(scores)[: len(updates) - hostile]].mean(axis=0)
    return mean


def _median_s(work: Callable[[], object]) -> float:
    work()
    taken = []
    for _ in range(RUNS):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, default=60, help="contributions in the round (default 60)")
    parser.add_argument("--length", type=int, default=40_000, help="parameters (default 40000)")
    parser.add_argument("--seed", type=int, default=1)
    run(__doc__.splitlines()[0] if __doc__ else "", measure, parser)
