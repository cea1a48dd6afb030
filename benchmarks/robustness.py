"""How much learning is left under attack: every task, split, attack and rule, worst cases with standard errors.

`python -m benchmarks.robustness [--json]` is the short form that `make bench` runs (two splits; two seeds under attack,
34 without attackers; about two minutes on two cores). `python -m benchmarks.robustness --full --results runs.jsonl`
runs everything and writes the tables in `docs/robustness.md` and the plots beside it; runs already in the file are not
repeated, so it can be stopped and continued. The protocol (what was tuned, on which seeds and task) stands in that
document.

32 devices take one local step a round with momentum 0.9; updates are clipped and encoded in fixed point with stochastic
rounding, and rules see the Gram matrix of those integers, computed in clear. That the protocol on shares opens the same
matrix, and hence chooses the same, is proved by its own tests (`tests/fl_coordinator/test_secure_round.py`).
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

# Before NumPy is loaded: one thread a process, two processes.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import msgspec
import numpy as np
from numpy.typing import NDArray

from benchmarks import robustness_report as report
from benchmarks.attacks import BACKDOORS, UNTARGETED, Scene
from benchmarks.claims import Claim, run
from benchmarks.robustness_report import Run
from benchmarks.tasks import Task, load, split
from fl_coordinator.rules import multikrum, policy
from fl_coordinator.rules.history import Memory

DEVICES, ROUNDS, MOMENTUM, FRACTION_BITS = 32, 120, 0.9, 16
TASKS = ("digits", "fraud", "cancer")
ALPHAS = (math.inf, 1.0, 0.3, 0.1)
HOSTILE, HOSTILE_BACKDOOR, ASSUMED, REALISTIC = 8, 6, 8, 2
SWEEP = (1, 3, 6, 10)
OURS, TEXTBOOK = ("Multi-Krum", "robust", "history"), ("FedAvg", "FedAdam", "Krum", "krum")
QUICK_SEEDS, FULL_SEEDS = (200, 201), (100, 101, 102, 103)
CLEAN_SEEDS = tuple(range(300, 332))
"""For the short form's runs without attackers: half a point is less than two of these trainings differ by chance."""
COMPARED_SEEDS = tuple(range(500, 528))
"""For the three rules that are compared cell by cell: more, since their differences are small, and none that an earlier
form of a rule was judged on."""
SWEEP_SEEDS = COMPARED_SEEDS[:8]
NAMES = tuple(f"device-{index:02d}" for index in range(DEVICES))

Floats = NDArray[np.float64]
Rule = Callable[[NDArray[np.int64], int, Memory], tuple[Floats, Memory]]
"""From a Gram matrix, f and the memory to the weights of the mean and the next memory."""


def _plain_multikrum(gram: NDArray[np.int64], assumed: int, kept: int) -> Floats:
    scores = np.array(multikrum.scores(gram, assumed), dtype=np.float64)
    weights = np.zeros(len(gram))
    weights[np.argsort(scores, kind="stable")[:kept]] = 1 / kept
    return weights


def _policy(name: str) -> Rule:
    def weigh(gram: NDArray[np.int64], assumed: int, memory: Memory) -> tuple[Floats, Memory]:
        found, after = policy.weigh(name, gram, assumed, memory, NAMES)
        return found.integers / max(found.divisor, 1), after

    return weigh


def _forgetful(rule: Callable[[NDArray[np.int64], int], Floats]) -> Rule:
    return lambda gram, assumed, memory: (rule(gram, assumed), memory)


def _mean(gram: NDArray[np.int64], _assumed: int) -> Floats:
    return np.full(len(gram), 1 / len(gram))


RULES: dict[str, Rule] = {
    "FedAvg": _forgetful(_mean),
    "FedAdam": _forgetful(_mean),
    "Krum": _forgetful(lambda gram, assumed: _plain_multikrum(gram, assumed, 1)),
    "Multi-Krum": _forgetful(lambda gram, assumed: _plain_multikrum(gram, assumed, len(gram) - assumed)),
    "krum": _policy("krum"),
    "robust": _policy("robust"),
    "history": _policy("history"),
}


@dataclass(frozen=True)
class _Adam:
    """The server's step of FedAdam (Reddi et al., ICLR 2021): rate 0.003, beta 0.9 and 0.99, tau 0.001."""

    first: Floats
    second: Floats

    def step(self, mean: Floats) -> tuple[_Adam, Floats]:
        first, second = 0.9 * self.first + 0.1 * mean, 0.99 * self.second + 0.01 * mean**2
        return _Adam(first, second), 0.003 * first / (np.sqrt(second) + 1e-3)


@dataclass(frozen=True)
class _Drawn:
    """What chance decides for honest devices: the first parameters; for every round the rows int64[n, b] that devices
    train on and the noise float32[n, d] that rounds their updates."""

    start: NDArray[np.float32]
    rounds: tuple[tuple[NDArray[np.int64], NDArray[np.float32]], ...]


@lru_cache(maxsize=1)
def _drawn(name: str, alpha: float, seed: int, rounds: int) -> _Drawn:
    """The same for every rule and attack, so drawn once for as long as runs come in order."""
    task = load(name, seed)
    rng = np.random.default_rng([seed, 2])
    parts = split(task, DEVICES, alpha, rng)
    start = task.start(rng)
    drawn = []
    for _ in range(rounds):
        rows = np.stack([part[rng.integers(0, part.size, task.batch)] for part in parts])
        drawn.append((rows, rng.random((DEVICES, task.length), dtype=np.float32)))
    return _Drawn(start, tuple(drawn))


def train(order: Run, watch: Callable[[int, Floats], None] | None = None) -> Run:
    """Carry out one run: the quality of the last model, and the backdoor's success. `watch` is shown each round's
    number and updates float64[n, d], hostile ones first."""
    task = load(order.task, order.seed)
    hostile = order.hostile if order.attack else 0
    centralised = order.rule == "centralised"
    rule = RULES["FedAvg" if centralised else order.rule]
    drawn = _drawn(order.task, math.inf if centralised else order.alpha, order.seed, ROUNDS)
    w = drawn.start
    momentum = np.zeros((DEVICES, task.length), dtype=np.float32)
    adam = _Adam(np.zeros(task.length), np.zeros(task.length))
    memory = Memory()
    notes: dict[str, object] = {}
    craft = (UNTARGETED | BACKDOORS).get(order.attack)
    attack_rng = np.random.default_rng([order.seed, 3])
    for number, (rows, noise) in enumerate(drawn.rounds):
        x, y = _poisoned(task, task.x[rows], task.y[rows], order.attack, hostile)
        momentum = MOMENTUM * momentum + task.gradients(w, x, y)
        updates = _encoded(momentum.astype(np.float64), task, noise)
        if craft is not None:

            def weigh(tried: Floats, memory: Memory = memory) -> Floats:
                return rule(gram_of(tried), order.assumed, memory)[0]

            scene = Scene(updates[hostile:], updates[:hostile], number, ROUNDS, weigh, attack_rng, notes)
            crafted = craft(scene)
            noise = attack_rng.random(crafted.shape, dtype=np.float32)
            updates[:hostile] = _encoded(crafted, task, noise)
        if watch is not None:
            watch(number, updates)
        weights, memory = rule(gram_of(updates), order.assumed, memory)
        mean = weights @ updates
        if order.rule == "FedAdam":
            adam, step = adam.step(mean)
        else:
            step = task.rate * mean
        w = (w - step).astype(np.float32)
    backdoor = task.backdoor_success(w) if order.attack in BACKDOORS or not order.attack else 0.0
    return msgspec.structs.replace(order, quality=task.quality(w), backdoor=backdoor)


def _poisoned(
    task: Task, x: NDArray[np.float32], y: NDArray[np.int64], attack: str, hostile: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    if attack == "label flip":
        y = y.copy()
        y[:hostile] = task.classes - 1 - y[:hostile]
    elif attack in BACKDOORS:
        x, y, half = x.copy(), y.copy(), task.batch // 2
        x[:hostile, :half] = task.marked(x[:hostile, :half])
        y[:hostile, :half] = task.target
    return x, y


def _encoded(updates: Floats, task: Task, noise: NDArray[np.float32]) -> Floats:
    """Clipped, and rounded to multiples of 2^-16, up where `noise` in [0, 1) says so."""
    lengths = np.sqrt(np.einsum("ij,ij->i", updates, updates))
    factors = np.minimum(1.0, task.clip_norm_l2 / np.maximum(lengths, 1e-12)) * 2.0**FRACTION_BITS
    scaled = updates * factors[:, None]
    scaled += noise
    np.floor(scaled, out=scaled)
    scaled /= 2.0**FRACTION_BITS
    return np.asarray(scaled)


def gram_of(updates: Floats) -> NDArray[np.int64]:
    """Inner products of encoded updates float64[n, d] as the aggregators open them, int64[n, n]."""
    # Multiples of 2^-16 with norms below 2^5: float64 adds these products without rounding.
    gram = updates @ updates.T * 2.0 ** (2 * FRACTION_BITS)
    return np.asarray(np.rint((gram + gram.T) / 2).astype(np.int64))


def quick_orders() -> list[Run]:
    """What the claims need, IID and at Dirichlet 0.3: nobody attacks, with f of 2 and 8, on many seeds; every
    untargeted attack at 25 % on two."""
    orders = []
    for seed in (*CLEAN_SEEDS, *QUICK_SEEDS):
        for task in TASKS:
            for alpha in (math.inf, 0.3):
                orders.append(Run(task, alpha, "", "FedAvg", 0, ASSUMED, seed))
                for rule in OURS:
                    orders += [Run(task, alpha, "", rule, 0, f, seed) for f in (REALISTIC, ASSUMED)]
                    if seed in QUICK_SEEDS:
                        orders += [Run(task, alpha, name, rule, HOSTILE, ASSUMED, seed) for name in UNTARGETED]
    return orders


def full_orders() -> list[Run]:
    """Everything: all splits seed by seed, textbook rules on four seeds and the compared rules on 28 others; on eight
    of these they meet other numbers of attackers too."""
    orders = []
    for seed in FULL_SEEDS:
        for task in TASKS:
            orders.append(Run(task, math.inf, "", "centralised", 0, 0, seed))
            for alpha in ALPHAS:
                orders += _cells(task, alpha, seed, TEXTBOOK)
    for seed in COMPARED_SEEDS:
        for task in TASKS:
            for alpha in ALPHAS:
                orders += _cells(task, alpha, seed, OURS)
    for seed in SWEEP_SEEDS:
        for task in TASKS:
            for hostile in SWEEP:
                for rule in OURS:
                    orders += [Run(task, 0.3, name, rule, hostile, ASSUMED, seed) for name in report.SWEEP_ATTACKS]
    return orders


def _cells(task: str, alpha: float, seed: int, rules: Sequence[str]) -> list[Run]:
    """One split: nobody attacks (f = 2, f = 8), the untargeted attacks at 25 %, both backdoors."""
    orders = [] if "FedAvg" in rules else [Run(task, alpha, "", "FedAvg", 0, ASSUMED, seed)]
    for rule in rules:
        orders += [Run(task, alpha, "", rule, 0, f, seed) for f in (ASSUMED, REALISTIC)]
        orders += [Run(task, alpha, name, rule, HOSTILE, ASSUMED, seed) for name in UNTARGETED]
        orders += [Run(task, alpha, name, rule, HOSTILE_BACKDOOR, ASSUMED, seed) for name in BACKDOORS]
    return list(dict.fromkeys(orders))


def carry_out(orders: Sequence[Run], results: Path | None, workers: int) -> list[Run]:
    """All runs, in order; those that `results` (JSON lines) holds are read, new ones are appended to it."""
    known: dict[Run, Run] = {}
    if results is not None and results.exists():
        for line in results.read_text().splitlines():
            done = msgspec.convert(json.loads(line), Run)
            known[done.order] = done
    missing = [order for order in dict.fromkeys(orders) if order not in known]
    with ProcessPoolExecutor(workers) as pool:
        for done in pool.map(train, missing, chunksize=8):
            known[done.order] = done
            if results is not None:
                with results.open("a") as out:
                    out.write(json.dumps(msgspec.to_builtins(done)) + "\n")
    return [known[order] for order in dict.fromkeys(orders)]


def measure(options: argparse.Namespace) -> Sequence[Claim]:
    """Run what is asked for; with `--full` write the document's tables and plots as well."""
    orders: Iterable[Run] = full_orders() if options.full else quick_orders()
    if options.seeds:
        orders = [order for order in orders if order.seed in options.seeds]
    found = carry_out(list(orders), options.results, options.workers)
    if options.full:
        report.write(found)
    return report.claims(found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="the short form (the default; for explicitness)")
    parser.add_argument("--full", action="store_true", help="every cell; rewrites docs/robustness.md")
    parser.add_argument("--results", type=Path, help="JSON lines file of runs to continue from and append to")
    parser.add_argument("--seeds", type=int, nargs="*", help="only these seeds")
    parser.add_argument("--workers", type=int, default=2)
    run(__doc__.splitlines()[0] if __doc__ else "", measure, parser)
