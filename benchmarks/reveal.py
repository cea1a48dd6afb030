"""What rounds cost and leak that reveal less than distances.

`python -m benchmarks.reveal [--quick] [--learning] [--json]`. Three parties in lock-step in this process on one BLAS
thread, 128 devices, sketched distances; bytes and messages do not depend on the length of an update. `bytes` and
`rounds` are of the steps in the place of the opened Gram matrix: from its shares to the choice and the opened norm of
the sum. Lifting, which all rounds do, is not among them. CPU seconds are of those steps too, of the slowest party.

    fl.checks.*         what aggregators do in any round to check each other, when distances are opened
    fl.graph.*          with an announced eps; `.found`: with one that is found on shares
    fl.selection.*      Multi-Krum on shares
    fl.leak.graph       correlation with another device's entry that a device and one server get from the opened bits,
                        by its sending one coordinate as long as serves best; baseline: from distances, in the same run
    fl.leak.selection   the same from the chosen set alone
    ....exact           of an update short enough for exact distances (d = 2,000)
    ....many            by as many devices as the round is announced to stand (6 of 70), all in one round
    fl.graph.learning.* with `--learning` (ten minutes of a core): points that `cluster` loses to the worst untargeted
                        attack of `robustness`, against FedAvg unattacked; baseline: what Multi-Krum loses

Leaks are measured on isotropic updates of 64 honest devices, at the best of some lengths of the probe. They are the
largest of several correlations of 32,768 pairs each, so about 0.015 means nothing at all.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

# Before NumPy is loaded: see `secure_aggregation`.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from numpy.typing import NDArray

from benchmarks import robustness
from benchmarks.attacks import UNTARGETED
from benchmarks.claims import Claim, at_most, run
from benchmarks.robustness_report import Run, Runs
from fl_coordinator.rules import multikrum, unseen
from fl_coordinator.rules.geometry import squared_distances
from fl_coordinator.rules.history import Memory
from fl_coordinator.rules.reveals import POLICIES
from fl_coordinator.shares.bounds import bounds_of, fitted
from fl_coordinator.shares.decision import Decision
from fl_coordinator.shares.measuring import Coefficients
from fl_coordinator.shares.party import Committed, Keep, Protocol
from fl_coordinator.shares.revealing import SAMPLE_MAX, quantile_place
from fl_coordinator.shares.sharing import Exchange
from model_delta.encoding import unpack
from tests.fakes.secure_round import ArrayRows, SecureRound, random_holdings

COUNT, HOSTILE = 128, 12
HONEST, PROBERS = 64, 6
SEEDS = (100, 101)
ELSEWHERE = ("hello", "compare", "coin", "measured", "range", "lift", "agree", "noise")
CHECKS = ("lift-sums", "lift-carr", "lift-kept", "lift-small", "gram-")
CHECKS_OF = ("-spare", "-coin", "-check", "-zero")
LENGTHS = (0.02, 0.1, 0.3, 0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0)
"""Of a probe, over the clip."""

Reals = NDArray[np.float64]


@dataclass
class Cost:
    """What one party sent and computed, by step."""

    sent: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))


def measure(options: argparse.Namespace) -> Sequence[Claim]:
    """All claims."""
    claims = _checks(options.seed)
    for name, reveal, eps, most_bytes, most_rounds in (
        ("fl.graph", "graph", 1.2, 1e6, 10),
        ("fl.graph.found", "graph", 0.0, 1e6, 40),
        ("fl.selection", "selection", 0.0, 30e6, 260),
    ):
        claims += _cost(name, reveal, eps, most_bytes, most_rounds, options.seed)
    for suffix, length in (("", 50_000 if options.quick else 1_000_000), (".exact", 2_000)):
        claims += _leaks(suffix, length, options.seed)
    if options.learning:
        claims += _learning()
    return claims


def _checks(seed: int) -> list[Claim]:
    """What the checks between aggregators add to a round that opens distances."""
    costs = _round("distances", 0.0, seed)
    steps = [step for step in costs[0].sent if step.startswith(CHECKS) or step.endswith(CHECKS_OF)]
    sent = max(sum(cost.sent[step] for step in steps) for cost in costs)
    seconds = max(sum(cost.seconds[step] for step in steps) for cost in costs)
    return [
        at_most("fl.checks.bytes", sent, f"bytes sent by an aggregator (n={COUNT}, sketched)", 10e6),
        at_most("fl.checks.rounds", len(steps), f"messages one after the other (n={COUNT})", 30),
        at_most("fl.checks.cpu", seconds, f"CPU s an aggregator (n={COUNT}, sketched)", 0.2),
    ]


def _cost(name: str, reveal: str, eps: float, most_bytes: float, most_rounds: int, seed: int) -> list[Claim]:
    costs = _round(reveal, eps, seed)
    steps = [step for step in costs[0].sent if not step.startswith(ELSEWHERE)]
    sent = max(sum(cost.sent[step] for step in steps) for cost in costs)
    seconds = max(sum(cost.seconds[step] for step in steps) for cost in costs)
    unit = f"n={COUNT}, in the place of {8 * COUNT * (COUNT + 1)} bytes in one message to both"
    return [
        at_most(f"{name}.bytes", sent, f"bytes sent by an aggregator ({unit})", most_bytes),
        at_most(f"{name}.rounds", len(steps), f"messages one after the other (n={COUNT})", most_rounds),
        at_most(f"{name}.cpu", seconds, f"CPU s an aggregator (n={COUNT})", 1.5),
    ]


def _round(reveal: str, eps: float, seed: int) -> list[Cost]:
    """What a round costs each of the three."""
    world = SecureRound(
        length=4_096,
        hostile_max=HOSTILE,
        selected_min=HOSTILE + 2,
        contributions_max=COUNT,
        policy=POLICIES[reveal][0],
        reveal=reveal,
        eps_l2=eps,
    )
    rng = np.random.default_rng(seed)
    common = rng.standard_normal(4_096)
    updates = [0.01 * (common + rng.standard_normal(4_096)) * (-1 if at < HOSTILE else 1) for at in range(COUNT)]
    costs, decision = _run(world, np.stack([world.encode(update) for update in updates]), seed)
    if decision.selected != tuple(range(HOSTILE, COUNT)):
        raise SystemExit(f"{reveal}: selected {decision.selected}, expected all but the first {HOSTILE}")
    return costs


def _run(world: SecureRound, rows: NDArray[np.uint32], seed: int) -> tuple[list[Cost], Decision]:
    """Three parties in lock-step. What a step costs is what leads to its message, and what is done after the last."""
    holdings = random_holdings(rows, seed)
    names = [bytes.fromhex(digest) for digest in holdings[0].digests]
    steps: list[Protocol] = [world.party(index, names, holding=holdings[index]).steps() for index in range(3)]
    costs = [Cost(), Cost(), Cost()]
    inputs: list[dict[int, bytes] | None] = [None, None, None]
    while True:
        wanted: dict[int, Exchange] = {}
        for index, generator in enumerate(steps):
            start = time.thread_time()
            try:
                command = next(generator) if inputs[index] is None else generator.send(inputs[index] or {})
                while isinstance(command, Keep | Committed):
                    if isinstance(command, Keep):
                        decision = command.decision
                    command = generator.send({})
                wanted[index] = command
                costs[index].sent[command.step] += sum(map(len, command.outgoing.values()))
                costs[index].seconds[command.step] += time.thread_time() - start
            except StopIteration:
                continue
        if not wanted:
            return costs, unpack(decision, Decision)
        inputs = [{peer: wanted[peer].outgoing[index] for peer in wanted[index].expected} for index in range(3)]


def _leaks(suffix: str, length: int, seed: int) -> list[Claim]:
    """One coin; a probe is one coordinate, of the largest length a device may send or of a part of it."""
    rng = np.random.default_rng(seed)
    world = SecureRound(length=length, hostile_max=PROBERS, selected_min=PROBERS + 2, contributions_max=COUNT)
    world.task = fitted(world.task)
    coefficients = Coefficients(os.urandom(32), length, bounds_of(world.task))
    scale = np.float32(2 / length**0.5)
    rows = np.stack([world.encode(scale * rng.standard_normal(length, dtype=np.float32)) for _ in range(HONEST)])
    own = coefficients.measure((ArrayRows(rows), range(HONEST)))[0].sketch.view(np.int32).astype(np.float64)
    places = rng.choice(length, 512, replace=False)
    units = []
    for place in places:
        unit = np.zeros(length, dtype=np.int64)
        unit[place] = 1
        units.append(coefficients.sketch_exact(unit).astype(np.float64))
    probes = np.array(units)
    true = rows[:, places].view(np.int32).T.astype(np.float64)
    gram = own @ own.T
    seen = probes @ own.T
    longest = world.task.clip_norm_l2 * 2.0**world.task.fraction_bits
    squares = np.square(probes).sum(axis=1)

    def away(part: float) -> Reals:
        """Squared distances of the probes, one at a time, to the honest devices: float64[probes, devices]."""
        size = part * longest
        return np.asarray(np.diagonal(gram)[None, :] - 2 * size * seen + size * size * squares[:, None])

    distances = _correlation(seen, true)
    words = f"correlation (d={length}); baseline: distances"
    bound = {"": (0.06, 0.06), ".exact": (0.8, 0.1)}[suffix]
    many = {"": (0.06, 0.06), ".exact": (0.95, 0.2)}[suffix]
    return [
        at_most(name, value, words, most, distances)
        for name, value, most in (
            (f"fl.leak.graph{suffix}", _from_graph(gram, away, true, 1), bound[0]),
            (f"fl.leak.graph{suffix}.many", _from_graph(gram, away, true, PROBERS), many[0]),
            (f"fl.leak.selection{suffix}", _from_selection(gram, away, true, 1), bound[1]),
            (f"fl.leak.selection{suffix}.many", _from_selection(gram, away, true, PROBERS), many[1]),
        )
    ]


def _from_graph(gram: Reals, away: Callable[[float], Reals], true: Reals, probers: int) -> float:
    """The radius is what the round finds among the honest. Several probers send different lengths, a step apart."""
    lengths = np.diagonal(gram)
    pairs = (lengths[:, None] + lengths[None, :] - 2 * gram)[np.triu_indices(HONEST, 1)]
    radius = 1.44 * np.sort(pairs)[quantile_place(pairs.size, HONEST + probers, PROBERS)]
    found = 0.0
    for part in np.linspace(0.5, 1.0, 101):
        for step in (0.0,) if probers == 1 else (0.002, 0.005, 0.01, 0.02):
            parts = np.minimum(part + step * (np.arange(probers) - (probers - 1) / 2), 1.0)
            bits = sum((away(float(one)) <= radius).astype(np.float64) for one in parts)
            found = max(found, _correlation(np.asarray(bits), true))
    return found


def _from_selection(gram: Reals, away: Callable[[float], Reals], true: Reals, probers: int) -> float:
    """All probers send the same. Scores as the round computes them (`multikrum`), in floats."""
    lengths = np.diagonal(gram)
    count = HONEST + probers
    honest = lengths[:, None] + lengths[None, :] - 2 * gram
    neighbours = multikrum.neighbours_of(count, PROBERS)
    found = 0.0
    for part in LENGTHS:
        chosen = []
        for row in away(part):
            beside = np.repeat(row[:, None], probers, axis=1)
            near = np.sort(np.concatenate([honest, beside], axis=1), axis=1)[:, 1 : 1 + neighbours]
            one = np.sort(np.concatenate([np.zeros(probers), row]))[1 : 1 + neighbours].sum()
            scores = np.concatenate([near.sum(axis=1), np.full(probers, one)])
            kept = np.argsort(scores, kind="stable")[: count - PROBERS]
            chosen.append(np.isin(np.arange(HONEST), kept))
        found = max(found, _correlation(np.array(chosen, dtype=np.float64), true))
    return found


def _learning() -> list[Claim]:
    """Two of the seeds of the tables in `docs/robustness.md`; 8 of 32 devices are hostile."""
    robustness.RULES["cluster"] = cluster
    cells = [(task, alpha) for task in ("digits", "fraud") for alpha in (math.inf, 0.3)]
    rules = ("cluster", "Multi-Krum")
    orders = [Run(task, alpha, "", "FedAvg", 0, 8, seed) for task, alpha in cells for seed in SEEDS]
    orders += [
        Run(task, alpha, attack, rule, 8, 8, seed)
        for task, alpha in cells
        for attack in UNTARGETED
        for rule in rules
        for seed in SEEDS
    ]
    found = Runs(robustness.carry_out(orders, None, 2))
    claims = []
    for task, alpha in cells:
        best = float(found.quality(task, alpha, "", "FedAvg", 0, 8).mean())
        lost = {
            rule: (best - float(values.mean()), name)
            for rule in rules
            for name, values in [found.worst(task, alpha, rule)]
        }
        points, name = lost["cluster"]
        split = "iid" if alpha == math.inf else f"dirichlet-{alpha:g}"
        unit = f"points lost to {name}, the worst attack ({task}); baseline: Multi-Krum and its worst"
        claims.append(
            at_most(
                f"fl.graph.learning.{task}.{split}", points, unit, 5 if alpha == math.inf else 8, lost["Multi-Krum"][0]
            )
        )
    return claims


def cluster(gram: NDArray[np.int64], assumed: int, memory: Memory) -> tuple[Reals, Memory]:
    """Weights by the policy `cluster`, float64[n], with the radius that a round finds; zeros when it opens nothing."""
    count = len(gram)
    distances = squared_distances(gram)
    pairs = distances[np.triu_indices(count, 1)]
    drawn = np.sort(np.random.default_rng(abs(int(gram.sum()))).permutation(pairs)[:SAMPLE_MAX])
    near = 25 * distances <= 36 * drawn[quantile_place(drawn.size, count, assumed)]
    choice, _ = unseen.by_neighbours(near, assumed, assumed + 2)
    return choice.weights, memory


def _correlation(seen: Reals, true: Reals) -> float:
    """Of all pairs, its magnitude; 0 when nothing varies."""
    if seen.std() == 0:
        return 0.0
    return abs(float(np.corrcoef(seen.ravel(), true.ravel())[0, 1]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="shorter updates, for a look")
    parser.add_argument("--learning", action="store_true", help="also what is left of learning under attack")
    parser.add_argument("--seed", type=int, default=1)
    run(__doc__.splitlines()[0] if __doc__ else "", measure, parser)
