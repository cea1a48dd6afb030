"""The training step that devices run, and what fixed point costs in accuracy.

`python -m benchmarks.training [--quick] [--json]`. The step is that of the perceptron 32-64-32-1 with momentum, on
batches of 32, one thread; the reference is NumPy's in float64. Rounding is measured on the three tasks of
`benchmarks.tasks`: 32 devices, one local step a round with momentum 0.9, 120 rounds, Dirichlet 0.3, the mean of all
updates, nobody hostile; the same seed with float updates and with what `fixed_point.encode` makes of them, and the
difference in points of accuracy (payments: average precision).

    fl.train.bytes      of the training graph
    fl.train.distance   largest difference of one step from the reference, over parameters, velocity and loss
    fl.train.steps      steps a second of the thread's CPU time (the fastest of 30 runs), in onnxruntime on memory that
                        is bound once, each step going on from the one before; baseline: the same by NumPy in float32
    fl.rounding         points lost at 16 fraction bits, the most that a round announces
    fl.rounding.low     points lost at the fewest that a round for 1,024 devices announces at four times the usual clip
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

# Before NumPy is loaded: one thread.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from numpy.typing import NDArray

from benchmarks.claims import Claim, at_least, at_most, run
from benchmarks.tasks import load, split
from device_sim.fraud_model import Layer, initial_layers, loss_gradients
from edge_runtime.onnx_model import OnnxModel, run_graph
from fl_coordinator.rounds import RoundSpec
from fl_coordinator.shares.bounds import CONTRIBUTIONS_MAX, fitted
from fl_coordinator.shares.fixed_point import clip, decode, encode
from model_delta.digest import digest_of
from model_delta.graphs.mlp import mlp_training_graph
from model_delta.task import RoundTask

SIZES, BATCH, RATE, MOMENTUM, POSITIVE = (32, 64, 32, 1), 32, 0.05, 0.9, 6.0
DEVICES, ROUNDS, ALPHA = 32, 120, 0.3
TASKS = ("digits", "fraud", "cancer")
Floats = NDArray[np.float32]
Batches = Sequence[tuple[Floats, Floats]]


def measure(options: argparse.Namespace) -> Sequence[Claim]:
    """All claims."""
    return [*_step(options.seed, 100 if options.quick else 500), *_rounding(2 if options.quick else options.seeds)]


def _step(seed: int, steps: int) -> list[Claim]:
    rng = np.random.default_rng(seed)
    mean, scale = rng.normal(size=SIZES[0]).astype(np.float32), (0.5 + rng.random(SIZES[0])).astype(np.float32)
    graph = mlp_training_graph(SIZES, mean, scale, POSITIVE, momentum=True)
    start = _flat([part for layer in initial_layers(SIZES, rng) for part in layer])
    batches = [_batch(rng) for _ in range(64)]
    distance = max(_distance(graph, mean, scale, start, rng, *batch) for batch in batches)
    by_runtime = _steps_a_second(lambda: _by_runtime(graph, start, batches, steps), steps)
    by_numpy = _steps_a_second(lambda: _by_numpy(mean, scale, start, batches, steps), steps)
    unit = f"steps/s of one thread (batch {BATCH}, momentum); baseline: NumPy"
    return [
        at_most("fl.train.bytes", len(graph), "bytes of the training graph (perceptron 32-64-32-1)", 5_000),
        at_most("fl.train.distance", distance, "from the reference step in float64", 1e-6),
        at_least("fl.train.steps", by_runtime, unit, 20_000, by_numpy),
    ]


def _batch(rng: np.random.Generator) -> tuple[Floats, Floats]:
    return rng.standard_normal((BATCH, SIZES[0])).astype(np.float32), (rng.random(BATCH) < 0.3).astype(np.float32)


def _flat(parts: Sequence[NDArray[Any]]) -> Floats:
    return np.concatenate([part.reshape(-1) for part in parts]).astype(np.float32)


def _layers(flat: NDArray[Any]) -> list[Layer]:
    made, at = [], 0
    for wide, narrow in pairwise(SIZES):
        weight = flat[at : at + wide * narrow].reshape(wide, narrow)
        at += wide * narrow
        made.append((weight, flat[at : at + narrow]))
        at += narrow
    return made


def _distance(
    graph: bytes, mean: Floats, scale: Floats, start: Floats, rng: np.random.Generator, x: Floats, y: Floats
) -> float:
    velocity = (0.01 * rng.standard_normal(start.size)).astype(np.float32)
    found = run_graph(
        graph,
        {
            "parameters": start,
            "velocity": velocity,
            "features": x,
            "labels": y,
            "learning_rate": np.array(RATE, np.float32),
            "momentum": np.array(MOMENTUM, np.float32),
        },
    )
    inputs = (x.astype(np.float64) - mean) / scale
    gradient, loss = _reference(start.astype(np.float64), inputs, y.astype(np.float64))
    moved = float(np.float32(MOMENTUM)) * velocity.astype(np.float64) + gradient
    exact: dict[str, Any] = {
        "updated": start - float(np.float32(RATE)) * moved,
        "updated_velocity": moved,
        "loss": loss,
    }
    return max(float(np.abs(found[name] - value).max()) for name, value in exact.items())


def _reference(
    flat: NDArray[np.float64], inputs: NDArray[np.float64], labels: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float]:
    """Gradient and loss in float64, from the textbook's formulas."""
    layers, activations = _layers(flat), [inputs]
    for weight, bias in layers[:-1]:
        activations.append(np.maximum(activations[-1] @ weight + bias, 0))
    p = 1 / (1 + np.exp(-(activations[-1] @ layers[-1][0] + layers[-1][1])[:, 0]))
    loss = float(np.mean(-POSITIVE * labels * np.log(p) - (1 - labels) * np.log(1 - p)))
    back = (((1 - labels) * p - POSITIVE * labels * (1 - p)) / len(labels))[:, None]
    gradients: list[NDArray[np.float64]] = []
    for index in reversed(range(len(layers))):
        gradients = [(activations[index].T @ back).reshape(-1), back.sum(axis=0), *gradients]
        back = (back @ layers[index][0].T) * (activations[index] > 0)
    return np.concatenate(gradients), loss


def _by_runtime(graph: bytes, start: Floats, batches: Batches, steps: int) -> Floats:
    """The parameters after `steps`. Two pairs of vectors take turns: what a step writes the next one reads."""
    held = [{"parameters": start.copy(), "velocity": np.zeros_like(start)} for _ in range(2)]
    x, y, loss = np.empty_like(batches[0][0]), np.empty_like(batches[0][1]), np.empty((), np.float32)
    fixed = {"learning_rate": np.array(RATE, np.float32), "momentum": np.array(MOMENTUM, np.float32)}
    session = OnnxModel(digest_of(graph), graph, "training graph", repeated=True)._session  # as a device opens it
    turns = []
    for turn in (0, 1):
        binding, other = session.io_binding(), held[1 - turn]
        for name, array in {**held[turn], "features": x, "labels": y, **fixed}.items():
            binding.bind_cpu_input(name, array)
        outputs = {"updated": other["parameters"], "updated_velocity": other["velocity"], "loss": loss}
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
        turns.append(binding)
    for step in range(steps):
        x[:], y[:] = batches[step % len(batches)]
        session.run_with_iobinding(turns[step % 2])
    return held[steps % 2]["parameters"]


def _by_numpy(mean: Floats, scale: Floats, start: Floats, batches: Batches, steps: int) -> Floats:
    now, velocity = start.copy(), np.zeros_like(start)
    for step in range(steps):
        x, y = batches[step % len(batches)]
        slopes = loss_gradients(_layers(now), (x - mean) / scale, y, POSITIVE)
        velocity = np.float32(MOMENTUM) * velocity + np.concatenate([slope.reshape(-1) for slope in slopes])
        now = now - np.float32(RATE) * velocity
    return now


def _steps_a_second(work: Callable[[], object], steps: int) -> float:
    """The fastest of several runs, by this thread's CPU time; one before them warms up. Whatever else the machine does
    shares caches and execution units with this thread, and only ever adds to its time."""
    work()
    taken = []
    for _ in range(30):
        start = time.thread_time()
        work()
        taken.append(time.thread_time() - start)
    return steps / min(taken)


def _rounding(seeds: int) -> list[Claim]:
    low = _fewest_bits()
    whole = f"32 devices, {len(TASKS)} tasks x {seeds} seeds"
    lost: dict[int, list[float]] = {16: [], low: []}
    for name in TASKS:
        for seed in range(300, 300 + seeds):
            exact = _quality(name, seed, None)
            for bits, found in lost.items():
                found.append(exact - _quality(name, seed, bits))
    claims = []
    for claim, bits in (("fl.rounding", 16), ("fl.rounding.low", low)):
        error = statistics.stdev(lost[bits]) / math.sqrt(len(lost[bits]))
        unit = f"points lost at {bits} fraction bits, standard error {error:.3f} ({whole})"
        claims.append(at_most(claim, statistics.mean(lost[bits]), unit, 0.2))
    return claims


def _fewest_bits() -> int:
    """What the coordinator's own rule leaves of 16 bits for the largest round and a wide clip."""
    spec = RoundSpec(model="fraud")
    task = RoundTask(
        tenant="acme",
        model="fraud",
        round_id="r",
        base="",
        training_graph="",
        parameters=(),
        length=45_000,
        clip_norm_l2=4 * spec.clip_norm_l2,
        policy=spec.policy,
        contributions_max=CONTRIBUTIONS_MAX,
        issued=0,
        deadline=1,
    )
    return fitted(task).fraction_bits


def _quality(name: str, seed: int, bits: int | None) -> float:
    """Quality of the last model in %, trained with updates in fixed point, or in float for None."""
    task, rng = load(name, seed), np.random.default_rng([seed, 2])
    rounding = np.random.default_rng([seed, 4])
    parts = split(task, DEVICES, ALPHA, rng)
    w, velocity = task.start(rng), np.zeros((DEVICES, task.length), np.float32)
    for _ in range(ROUNDS):
        rows = np.stack([part[rng.integers(0, part.size, task.batch)] for part in parts])
        velocity = MOMENTUM * velocity + task.gradients(w, task.x[rows], task.y[rows])
        sent = partial(_sent, bits=bits, clip_norm_l2=task.clip_norm_l2, random=rounding.bytes)
        mean = np.mean([sent(update) for update in velocity], axis=0)
        w = (w - task.rate * mean).astype(np.float32)
    return task.quality(w)


def _sent(update: Floats, bits: int | None, clip_norm_l2: float, random: Callable[[int], bytes]) -> NDArray[np.float64]:
    clipped = clip(update, clip_norm_l2)
    return clipped if bits is None else decode(encode(clipped, bits, random), bits)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="fewer steps and seeds, for a look")
    parser.add_argument("--seeds", type=int, default=12, help="paired runs of each task for the loss by rounding")
    parser.add_argument("--seed", type=int, default=1)
    run(__doc__.splitlines()[0] if __doc__ else "", measure, parser)
