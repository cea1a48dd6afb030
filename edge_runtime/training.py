"""One round's local step: from the version in the slot and the device's own data to one clipped vector.

The step itself travels as data: an ONNX graph that the task names, run by the `run_graph` that is handed in. Here is
what surrounds it: the base vector is read out of the model file's stored weights (int8 times its scale where the model
is quantized), mini-batches are drawn, the difference is clipped. Pure but for `run_graph`.
"""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_runtime.inference import RunGraph
from model_delta.errors import Malformed, Unavailable
from model_delta.segments import read_tensor, stored_tensors
from model_delta.task import RoundTask

EVALUATION_ROWS_MAX = 4_096
Vector = NDArray[np.float32]


class Diverged(Malformed):
    """The steps led to numbers that are not finite, on this data and from this base."""


class LocalUpdate(msgspec.Struct, frozen=True):
    """What training gave: `update` float32[d] with L2 norm at most the task's clip, `norm` before clipping, and the
    mean loss on the local data before and after. `velocity` float32[d] is for the device's next round, empty without
    momentum."""

    update: Vector
    velocity: Vector
    norm: float
    loss_before: float
    loss_after: float
    samples: int


def base_vector(file: bytes, task: RoundTask) -> Vector:
    """The trainable weights of `file` as float32[d], in the task's order (C order within a tensor).

    A parameter with a `scale` is int8 times the float32 scale of its last-axis channel. Raises Malformed when the file
    does not hold what the task names.
    """
    stored = {tensor.name: tensor for tensor in stored_tensors(file)}
    if len({parameter.tensor for parameter in task.parameters}) != len(task.parameters):
        raise Malformed(f"round {task.round_id}: expected each tensor of the base once, found one twice")
    parts: list[Vector] = []
    for parameter in task.parameters:
        for name in filter(None, (parameter.tensor, parameter.scale)):
            if name not in stored:
                raise Malformed(f"round {task.round_id}: base version has no stored tensor {name!r}")
        value = read_tensor(file, stored[parameter.tensor])
        if tuple(value.shape) != parameter.shape:
            raise Malformed(
                f"round {task.round_id}: {parameter.tensor} has shape {tuple(value.shape)}, expected {parameter.shape}"
            )
        if parameter.scale:
            scale = read_tensor(file, stored[parameter.scale]).astype(np.float32).reshape(-1)
            if value.shape[-1:] != scale.shape:
                raise Malformed(
                    f"round {task.round_id}: {parameter.scale} has {scale.size} scales, expected {value.shape[-1:]}"
                )
            value = value.astype(np.float32) * scale
        parts.append(value.astype(np.float32).reshape(-1))
    vector = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    if len(vector) != task.length:
        raise Malformed(f"round {task.round_id}: expected {task.length} parameters, found {len(vector)} in the base")
    return vector


def train(
    file: bytes,
    task: RoundTask,
    graph: bytes,
    features: NDArray[np.float32],
    labels: NDArray[np.float32],
    velocity: Vector,
    rng: np.random.Generator,
    run_graph: RunGraph,
) -> LocalUpdate:
    """Run the task's steps of mini-batch SGD from the version in `file` on `features` [n, F] and `labels` [n].

    Batches are drawn without replacement within a batch (with, when there is less data than a batch). With momentum the
    steps begin with `velocity`, or with zeros if it is empty. Raises Unavailable without data, Malformed when shapes do
    not fit, Diverged when a number is not finite.
    """
    rows = len(labels)
    if rows == 0:
        raise Unavailable(f"round {task.round_id}: no local payments to train on")
    if features.ndim != 2 or len(features) != rows:
        raise Malformed(f"round {task.round_id}: {features.shape} features do not go with {rows} labels")
    base = base_vector(file, task)
    some = slice(max(0, rows - EVALUATION_ROWS_MAX), rows)
    wanted = {"updated", "loss"} | ({"updated_velocity"} if task.momentum > 0 else set())

    def one_step(
        parameters: Vector, velocity: Vector, x: NDArray[np.float32], y: NDArray[np.float32], rate: float
    ) -> tuple[Vector, Vector, float]:
        inputs = {
            "parameters": parameters,
            "features": np.ascontiguousarray(x, np.float32),
            "labels": np.ascontiguousarray(y, np.float32),
            "learning_rate": np.array(rate, np.float32),
        }
        if task.momentum > 0:
            inputs |= {"velocity": velocity, "momentum": np.array(task.momentum, np.float32)}
        outputs = run_graph(graph, inputs)
        if not wanted <= outputs.keys():
            raise Malformed(
                f"round {task.round_id}: training graph gave {sorted(outputs)}, expected {', '.join(sorted(wanted))}"
            )
        vectors = [outputs[name].astype(np.float32).reshape(-1) for name in sorted(wanted - {"loss"})]
        loss = float(outputs["loss"].reshape(-1)[0])
        if any(len(vector) != task.length for vector in vectors):
            found = ", ".join(str(len(vector)) for vector in vectors)
            raise Malformed(f"round {task.round_id}: the training step gave {found} numbers, expected {task.length}")
        if not (np.isfinite(loss) and all(np.isfinite(vector).all() for vector in vectors)):
            raise Diverged(f"round {task.round_id}: the training step gave numbers that are not finite")
        return vectors[0], vectors[1] if len(vectors) > 1 else velocity, loss

    velocity = _begun(velocity, task)
    loss_before = one_step(base, velocity, features[some], labels[some], 0.0)[2]
    parameters = base
    for _ in range(task.steps):
        batch = rng.choice(rows, size=task.batch_size, replace=rows < task.batch_size)
        parameters, velocity, _loss = one_step(parameters, velocity, features[batch], labels[batch], task.learning_rate)
    loss_after = one_step(parameters, velocity, features[some], labels[some], 0.0)[2]
    update, norm = clip(parameters - base, task.clip_norm_l2)
    return LocalUpdate(update, velocity, norm, loss_before, loss_after, rows)


def _begun(velocity: Vector, task: RoundTask) -> Vector:
    if task.momentum <= 0:
        return np.zeros(0, np.float32)
    if velocity.size == 0:
        return np.zeros(task.length, np.float32)
    if velocity.shape != (task.length,) or not np.isfinite(velocity).all():
        raise Malformed(
            f"round {task.round_id}: expected a finite velocity of {task.length} numbers, found {velocity.shape}"
        )
    return velocity


def clip(update: Vector, norm_max: float) -> tuple[Vector, float]:
    """`update` scaled down to L2 norm `norm_max` if longer, and its norm before (Abadi et al. 2016, section 3)."""
    norm = float(np.linalg.norm(update.astype(np.float64)))
    if norm <= norm_max:
        return update.astype(np.float32), norm
    return (update * (norm_max / norm)).astype(np.float32), norm
