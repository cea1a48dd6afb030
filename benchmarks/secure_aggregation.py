"""What choosing updates on shares costs and withstands, beside doing it in clear.

`python -m benchmarks.secure_aggregation [--quick] [--growth FILE.svg] [--json]`. Three parties run in lock-step in
this process on one BLAS thread; a party's time is the CPU time of its own steps, from the frozen contributions
(verified, masked vectors in a file) to its shares of the sum. Baselines are computed in the same run: Multi-Krum and
mean in NumPy, and Flower's MultiKrum strategy, on the same updates in clear. `--quick` measures smaller rounds; their
targets are those of the large ones.

    fl.agg.*       CPU seconds of the slowest of the three aggregators
    fl.memory      of the process with all three
    fl.upload      bytes of a contribution over those of a float32 vector
    fl.device      CPU milliseconds from a local update to a signed contribution
    fl.soundness   malformed updates that pass check and norm, fourteen shapes, a new coin for every hundred; honest
                   ones refused
    fl.leak        correlation that a device and one server get by its sending unit vectors
    fl.dropout     half of the announced devices silent: time over that of a round announced for those who came
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

# Before NumPy is loaded: on a busy machine OpenBLAS threads wait for each other by spinning, at ten times the cost.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

import numpy as np
from numpy.typing import NDArray

from benchmarks.claims import Claim, at_most, at_most_share, run
from fl_coordinator.copies import Copies
from fl_coordinator.shares.bounds import bounds_of, fitted
from fl_coordinator.shares.contribution import Holding, hold, keep, size_max
from fl_coordinator.shares.decision import Decision
from fl_coordinator.shares.measuring import Coefficients
from fl_coordinator.shares.party import AggregationParty, Committed, Keep, Outcome, Protocol
from fl_coordinator.shares.sharing import Exchange
from model_delta.encoding import unpack
from tests.fakes.secure_round import NOW, ArrayRows, SecureRound

COINS = 100
Floats = NDArray[np.float32]


def measure(options: argparse.Namespace) -> Sequence[Claim]:
    """All claims; with `--growth` none, but the plot."""
    if options.growth:
        _growth(Path(options.growth), options.seed)
        return []
    claims: list[Claim] = []
    sizes = [(32, 100_000)] if options.quick else [(512, 1_000_000), (128, 1_000_000)]
    for count, length in sizes:
        claims += _aggregation(count, length, options.seed)
    claims += _device(100_000, 20_000 if options.quick else 1_000_000)
    claims += _soundness(COINS // 20 if options.quick else COINS, options.seed)
    claims += _leak(50_000 if options.quick else 1_000_000, options.seed)
    claims += _dropout(8 if options.quick else 32, 4_000 if options.quick else 40_000, options.seed)
    return claims


def _aggregation(count: int, length: int, seed: int) -> list[Claim]:
    hostile = count // 10
    world = _world(count, length, hostile)
    seconds, decision = _party_seconds(world, _updates(count, length, hostile, seed), runs=1 if count > 256 else 3)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if decision.selected != tuple(range(hostile, count)):
        raise SystemExit(f"selected {decision.selected}, expected all but the first {hostile}")
    clear = np.stack(list(_updates(count, length, hostile, seed)))
    plain = _cpu_s(lambda: _plain_multikrum(clear, hostile), 1 if count > 256 else 3)
    name = f"fl.agg.{count}x{length // 1_000_000}m" if length >= 1_000_000 else f"fl.agg.{count}x{length // 1000}k"
    unit = f"CPU s an aggregator (n={count}, d={length})"
    if count > 256:
        return [
            at_most_share(name, seconds, f"{unit}; baseline: Multi-Krum in clear, NumPy", 1.3, plain),
            at_most("fl.memory", peak_mb, f"MB, all three aggregators in one process (n={count}, d={length})", 1024),
        ]
    flower = _flower_s(clear, hostile)
    return [
        at_most(name, seconds, f"{unit}; baseline: Multi-Krum in clear, NumPy", 1.5, plain),
        at_most_share(f"{name}.flower", seconds, f"{unit}; baseline: Flower's MultiKrum in clear", 1 / 3, flower),
    ]


def _world(count: int, length: int, hostile: int, announced: int = 0) -> SecureRound:
    world = SecureRound(
        length=length,
        hostile_max=hostile,
        selected_min=max(8, hostile + 2),
        contributions_max=announced or count,
    )
    world.task = fitted(world.task)
    return world


def _updates(count: int, length: int, hostile: int, seed: int) -> Iterator[Floats]:
    """Devices that learn about the same thing, the first of them the other way round."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal(length, dtype=np.float32)
    for place in range(count):
        update = (common + rng.standard_normal(length, dtype=np.float32)) * np.float32(2 / length**0.5)
        yield -update if place < hostile else update


def _party_seconds(world: SecureRound, updates: Iterator[Floats], runs: int) -> tuple[float, Decision]:
    """CPU seconds of the slowest party, the median of some runs, and what was decided."""
    task = world.task
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as opened:
        copies = [Copies(Path(folder, str(index))) for index in range(3)]
        digests = []
        for place, update in enumerate(updates):
            entry = keep(world.contribution(f"pos-{place:04d}", update), size_max(task))
            digests.append(entry.digest)
            for index, own in enumerate(copies):
                own.keep({task.round_id: [entry.needed_by(index)]})
        holdings = [
            hold(
                opened.enter_context(own.opened(task.round_id, digests)),
                *(task, index, world.sealing[index], world.ca_pem, frozenset(), NOW),
            )
            for index, own in enumerate(copies)
        ]
        taken = []
        for attempt in range(1, runs + 1):
            seconds, outcome = _timed(world, holdings, attempt)
            taken.append(max(seconds))
        return statistics.median(taken), unpack(outcome.decision, Decision)


def _timed(world: SecureRound, holdings: Sequence[Holding], attempt: int) -> tuple[list[float], Outcome]:
    """Run the three in lock-step, each on its own clock."""
    names = [bytes.fromhex(digest) for digest in holdings[0].digests]
    parties: list[AggregationParty] = [world.party(i, names, attempt, holdings[i]) for i in range(3)]
    steps: list[Protocol] = [party.steps() for party in parties]
    inputs: list[dict[int, bytes] | None] = [None, None, None]
    seconds = [0.0, 0.0, 0.0]
    while True:
        wanted: dict[int, Exchange] = {}
        for index, generator in enumerate(steps):
            start = time.thread_time()
            try:
                command = next(generator) if inputs[index] is None else generator.send(inputs[index] or {})
                while isinstance(command, Keep | Committed):
                    command = generator.send({})
                wanted[index] = command
            except StopIteration as done:
                outcome: Outcome = done.value
            seconds[index] += time.thread_time() - start
        if not wanted:
            return seconds, outcome
        inputs = [{peer: wanted[peer].outgoing[index] for peer in wanted[index].expected} for index in range(3)]


def _plain_multikrum(updates: Floats, hostile: int) -> Floats:
    gram = updates @ updates.T
    norms = np.diagonal(gram)
    distances = np.sort(norms[:, None] + norms[None, :] - 2 * gram, axis=1)
    scores = distances[:, 1 : len(updates) - hostile - 1].sum(axis=1)
    mean: Floats = updates[np.argsort(scores)[: len(updates) - hostile]].mean(axis=0)
    return mean


def _flower_s(updates: Floats, hostile: int) -> float:
    """Flower's own selection and aggregation of the same updates, as its strategy calls them for one reply a device."""
    from flwr.app import ArrayRecord, MetricRecord, RecordDict
    from flwr.serverapp.strategy.multikrum import select_multikrum
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

    replies = [
        RecordDict({"arrays": ArrayRecord([update]), "metrics": MetricRecord({"num-examples": 1})})
        for update in updates
    ]

    def strategy() -> None:
        chosen = select_multikrum(replies, hostile, len(updates) - hostile)
        aggregate_arrayrecords(chosen, "num-examples")

    return _cpu_s(strategy, 1)


def _device(upload: int, length: int) -> list[Claim]:
    rng = np.random.default_rng(0)
    small, large = _world(128, upload, 4), _world(128, length, 4)
    update = rng.standard_normal(length, dtype=np.float32)
    milliseconds = 1000 * _cpu_s(lambda: large.contribution("pos-0001", update), 9)
    size = len(small.contribution("pos-0001", rng.standard_normal(upload, dtype=np.float32)))
    return [
        at_most("fl.upload", size / (4 * upload), f"x the bytes of a float32 vector (d={upload})", 1.01),
        at_most("fl.device", milliseconds, f"CPU ms on the device, signature included (d={length})", 20),
    ]


def _soundness(coins: int, seed: int) -> list[Claim]:
    """Check and norm in clear with the round's own coefficients; that shares give the same is a test of its own."""
    length, each = 4_096, 100
    world = _world(128, length, 4)
    bounds, rng = bounds_of(world.task), np.random.default_rng(seed)
    accepted, refused, honest = 0, 0, 0
    for _ in range(coins):
        coefficients = Coefficients(os.urandom(32), length, bounds)
        for shape in SHAPES:
            rows = shape(_honest(world, each, rng), rng, 1 << bounds.exponent)
            accepted += int(_passes(coefficients, rows).sum())
        for _ in range(10):
            rows = _honest(world, each, rng)
            refused += int((~_passes(coefficients, rows)).sum())
            honest += each
    tried = coins * each
    return [
        at_most("fl.soundness", accepted, f"malformed of {len(SHAPES)} shapes x {tried} accepted (d={length})", 0),
        at_most("fl.soundness.honest", refused / honest, f"of {honest} honest refused", 1e-5),
    ]


def _honest(world: SecureRound, count: int, rng: np.random.Generator) -> NDArray[np.uint32]:
    """Updates of the clip's length exactly, rounded at random: the ones nearest to a refusal."""
    real = rng.standard_normal((count, world.task.length)) * rng.choice([1.0, 0.01], (1, world.task.length))
    real *= world.task.clip_norm_l2 * 2.0**world.task.fraction_bits / np.linalg.norm(real, axis=1, keepdims=True)
    rounded: NDArray[np.int32] = np.floor(real + rng.random(real.shape)).astype(np.int32)
    return rounded.view(np.uint32)


def _passes(coefficients: Coefficients, rows: NDArray[np.uint32]) -> NDArray[np.bool_]:
    bounds = bounds_of(_world(128, rows.shape[1], 4).task)
    found = coefficients.measure((ArrayRows(rows), range(len(rows))))[0]
    sums, bound = found.projections.view(np.int32).astype(np.int64), 1 << bounds.exponent
    inside = ((sums >= -bound) & (sums < bound)).all(axis=1)
    squared = np.square(found.sketch.view(np.int32).astype(np.float64)).sum(axis=1)
    return np.asarray(inside & (squared <= bounds.squared_max))


Shape = Callable[[NDArray[np.uint32], np.random.Generator, int], NDArray[np.uint32]]


def _entries(*values: Callable[[int], int]) -> Shape:
    """Honest but for entries at random places; values as functions of the bound."""

    def change(rows: NDArray[np.uint32], rng: np.random.Generator, bound: int) -> NDArray[np.uint32]:
        for row in rows:
            places = rng.choice(row.size, len(values), replace=False)
            row[places] = [value(bound) % 2**32 for value in values]
        return rows

    return change


def _every(value: Callable[[np.random.Generator, tuple[int, ...], int], NDArray[np.int64]]) -> Shape:
    def change(rows: NDArray[np.uint32], rng: np.random.Generator, bound: int) -> NDArray[np.uint32]:
        words: NDArray[np.uint32] = (value(rng, rows.shape, bound) % 2**32).astype(np.uint32)
        return words

    return change


SHAPES: tuple[Shape, ...] = (
    _entries(lambda b: 2**31),
    _entries(lambda b: 2**31, lambda b: 2**31),
    _entries(lambda b: 2**30, lambda b: -(2**30)),
    _entries(lambda b: 2 * b),
    _entries(lambda b: 2 * b, lambda b: -2 * b),
    _entries(*[lambda b: 2**31] * 16),
    _every(lambda rng, shape, b: rng.choice([0, 2**31], shape)),
    _every(lambda rng, shape, b: np.full(shape, 2**30)),
    _every(lambda rng, shape, b: np.tile([2**30, -(2**30)], (shape[0], shape[1] // 2))),
    _every(lambda rng, shape, b: rng.choice([-b, b], shape)),
    _every(lambda rng, shape, b: rng.integers(-(b // 4), b // 4, shape)),
    lambda rows, rng, b: rows + np.uint32(2**24),
    lambda rows, rng, b: rows * np.uint32(30),
    lambda rows, rng, b: rows * np.uint32(2),
)


def _leak(length: int, seed: int) -> list[Claim]:
    """Inner products with unit vectors, from the opened matrix, against the entries that they would be in clear.
    Isotropic updates; the figure's own standard error is 0.006."""
    honest, probes = 64, 512
    rng = np.random.default_rng(seed)
    world = _world(128, length, 4)
    coefficients = Coefficients(os.urandom(32), length, bounds_of(world.task))
    scale = np.float32(2 / length**0.5)
    rows = np.stack([world.encode(scale * rng.standard_normal(length, dtype=np.float32)) for _ in range(honest)])
    own = coefficients.measure((ArrayRows(rows), range(honest)))[0].sketch.view(np.int32).astype(np.float64)
    places = rng.choice(length, probes, replace=False)
    seen = []
    for place in places:
        unit = np.zeros(length, dtype=np.int64)
        unit[place] = 1
        seen.append(own @ coefficients.sketch_exact(unit))
    true = rows[:, places].view(np.int32).T.astype(np.float64)
    found = float(np.corrcoef(np.array(seen).ravel(), true.ravel())[0, 1])
    return [at_most("fl.leak", abs(found), f"correlation (d={length}); baseline: exact distances", 0.06, 1.0)]


def _dropout(count: int, length: int, seed: int) -> list[Claim]:
    hostile = count // 10
    taken: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(8):
        for factor in taken:
            world = _world(count, length, hostile, announced=factor * count)
            taken[factor].append(_party_seconds(world, _updates(count, length, hostile, seed), runs=3)[0])
    whole, half = min(taken[1]), min(taken[2])
    unit = f"of the round's time (n={count} of {2 * count}, d={length}); no message to or about the silent"
    return [at_most("fl.dropout", abs(half / whole - 1), unit, 0.05)]


def _growth(path: Path, seed: int) -> None:
    """Seconds of an aggregator over d, a line for each n; both axes as powers of ten."""
    lines: dict[int, list[tuple[int, float]]] = {}
    for count in (32, 128, 512):
        points: list[tuple[int, float]] = []
        for length in (10_000, 100_000, 1_000_000):
            world = _world(count, length, count // 10)
            runs = 1 if count * length > 2e8 else 3
            seconds, _ = _party_seconds(world, _updates(count, length, count // 10, seed), runs)
            points.append((length, seconds))
            print(f"n={count} d={length}: {seconds:.3g} s", file=sys.stderr, flush=True)
        lines[count] = points
    path.write_text(_plot(lines))


def _plot(lines: Mapping[int, Sequence[tuple[int, float]]]) -> str:
    """An SVG of seconds over parameters, both by powers of ten; a dashed line of slope 1 goes with each line."""
    width, height, left, right, top, bottom = 640, 400, 64, 110, 44, 44
    powers, decades = (4, 5, 6), (-2, -1, 0, 1)

    def x(length: float) -> float:
        return left + (width - left - right) * (math.log10(length) - powers[0]) / (powers[-1] - powers[0])

    def y(seconds: float) -> float:
        share = (math.log10(seconds) - decades[0]) / (decades[-1] - decades[0])
        return height - bottom - (height - bottom - top) * share

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12"><title>CPU seconds of one aggregator by size of the round</title>'
        f'<rect width="{width}" height="{height}" fill="white"/>'
        f'<text x="{left}" y="20" font-size="14">CPU seconds of one aggregator, checks, distances and sum</text>'
    ]
    for power in decades:
        at = y(10.0**power)
        parts.append(f'<line x1="{left}" x2="{x(10.0 ** powers[-1]):.0f}" y1="{at:.1f}" y2="{at:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{10.0**power:g} s</text>')
    for power in powers:
        at, words = x(10.0**power), f"d = {10**power:,}"
        parts.append(f'<text x="{at:.0f}" y="{height - 18}" text-anchor="middle">{words}</text>')
    for colour, (count, points) in zip(("#1b6ca8", "#c2571a", "#3b7d3b"), lines.items(), strict=False):
        path = "L".join(f"{x(length):.1f} {y(seconds):.1f}" for length, seconds in points)
        length, last = points[-1]
        low = max(10.0 ** powers[0], length * 10.0 ** decades[0] / last)
        parts.append(
            f'<path d="M{x(low):.1f} {y(last * low / length):.1f}L{x(length):.1f} {y(last):.1f}" fill="none" '
            f'stroke="{colour}" stroke-dasharray="2 4" opacity="0.6"/>'
        )
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for place, seconds in points:
            at, up = x(place), y(seconds)
            parts.append(f'<circle cx="{at:.1f}" cy="{up:.1f}" r="3" fill="{colour}"/>')
            if place != length:
                parts.append(f'<text x="{at + 6:.1f}" y="{up + 18:.1f}" fill="{colour}">{seconds:.2g} s</text>')
        words = f"n = {count}: {last:.2g} s"
        parts.append(f'<text x="{x(length) + 8:.0f}" y="{y(last) + 4:.1f}" fill="{colour}">{words}</text>')
    parts.append(f'<text x="{left}" y="36" fill="#666">dotted: what is linear in d and meets the last point</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _cpu_s(work: Callable[[], object], runs: int) -> float:
    """Median CPU seconds of this thread; several runs follow one that warms up."""
    if runs > 1:
        work()
    taken = []
    for _ in range(runs):
        start = time.thread_time()
        work()
        taken.append(time.thread_time() - start)
    return statistics.median(taken)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="smaller rounds, for a look")
    parser.add_argument("--growth", default="", help="only draw time over size into this SVG file")
    parser.add_argument("--seed", type=int, default=1)
    run(__doc__.splitlines()[0] if __doc__ else "", measure, parser)
