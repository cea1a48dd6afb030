"""What every training step has to look like, whoever wrote it: our own for the built-in model, or an exporter's.

A device runs a step as data and trusts nothing in it but its inputs and outputs (`RoundTask.training_graph` says
which). An exporter's graph names them as it likes, and carries the source lines of everybody who took part in making
it. `contracted` gives it the names, throws away what is not computed with, and writes into the file which tensors the
flat vector holds, in which order: from there an announcement reads them. `require_equal_step` lets no graph out whose
one step is not the trainer's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from model_delta.errors import Malformed
from model_delta.graphs.reading import checked
from model_delta.graphs.writing import canonical

if TYPE_CHECKING:
    import onnx

Arrays = Mapping[str, npt.NDArray[Any]]
Step = Callable[[Arrays], Mapping[str, npt.NDArray[Any]]]
"""Inputs by name to outputs by name: a trainer's own step, or a graph that a runtime runs."""

DISTANCE_MAX = 1e-6
GRAPH_BYTES_MAX = 128 * 2**10
TRAINED = "atoll.parameters"
_BATCHES = (32, 5, 1)
_INPUTS = ("parameters", "features", "labels", "learning_rate")
_OUTPUTS = ("updated", "loss")


class Trained(msgspec.Struct, frozen=True):
    """One tensor of the flat vector: its name in the published model, and its shape (row-major in the vector)."""

    tensor: str
    shape: tuple[int, ...]

    @property
    def length(self) -> int:
        """How many numbers it has."""
        return int(np.prod(self.shape, dtype=np.int64))


class TrainingStep(msgspec.Struct, frozen=True):
    """What a training graph trains: tensors in order of the flat vector, on rows of `features` numbers."""

    tensors: tuple[Trained, ...]
    features: int
    momentum: bool

    @property
    def length(self) -> int:
        """How long the flat vector is."""
        return sum(tensor.length for tensor in self.tensors)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names in the order in which an exported step has to take them."""
        return (*_INPUTS, "velocity", "momentum") if self.momentum else _INPUTS

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names in the order in which an exported step has to give them."""
        return (*_OUTPUTS, "updated_velocity") if self.momentum else _OUTPUTS

    def shape_of(self, name: str) -> tuple[int | str, ...]:
        """The shape of an input or output; "n" is the batch, of any size."""
        vectors = ("parameters", "updated", "velocity", "updated_velocity")
        if name in vectors:
            return (self.length,)
        return {"features": ("n", self.features), "labels": ("n",)}.get(name, ())


def contracted(model: onnx.ModelProto, step: TrainingStep) -> bytes:
    """An exporter's `model`, whose inputs and outputs come in the order of `step`, as a training graph.

    Everything gets a short name; documentation, shapes of intermediate values, unused constants and the makers' notes
    go. Raises Malformed for another number of inputs or outputs, for functions, and for operators of other domains.
    """
    from onnx import TensorProto, helper

    graph = model.graph
    if model.functions or any(node.domain not in ("", "ai.onnx") for node in graph.node):
        raise Malformed("training graph: expected operators of ONNX alone, found functions or another domain")
    stored = {tensor.name for tensor in graph.initializer}
    given = [value.name for value in graph.input if value.name not in stored]
    made = [value.name for value in graph.output]
    if (len(given), len(made)) != (len(step.inputs), len(step.outputs)):
        raise Malformed(
            f"training graph: expected {len(step.inputs)} inputs and {len(step.outputs)} outputs, "
            f"found {len(given)} and {len(made)}"
        )
    names = dict(zip(given, step.inputs, strict=True)) | dict(zip(made, step.outputs, strict=True))
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    for name in (*(tensor.name for tensor in kept), *(name for node in graph.node for name in node.output)):
        if name and name not in names:
            names[name] = f"t{len(names)}"
    for tensor in kept:
        tensor.name, tensor.doc_string = names[tensor.name], ""
        del tensor.metadata_props[:]
    bare = helper.make_graph(
        [_bare(node, names) for node in graph.node],
        "training_step",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, step.shape_of(name)) for name in step.inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, step.shape_of(name)) for name in step.outputs],
        kept,
    )
    versions = [entry for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    whole = helper.make_model(bare, opset_imports=versions, ir_version=model.ir_version)
    helper.set_model_props(whole, {TRAINED: msgspec.json.encode(step.tensors).decode()})
    return canonical(whole)


def step_of(graph: bytes, what: str) -> TrainingStep:
    """What a graph from anybody trains. Raises Malformed, in one line, unless it is a training graph in one file that
    says which tensors its vector holds, and whose inputs and outputs have the names, shapes and type of a step."""
    if len(graph) > GRAPH_BYTES_MAX:
        raise Malformed(f"{what}: expected a training graph of at most {GRAPH_BYTES_MAX} bytes, found {len(graph)}")
    model = checked(graph, what)
    noted = {entry.key: entry.value for entry in model.metadata_props}
    try:
        tensors = msgspec.json.decode(noted[TRAINED], type=tuple[Trained, ...])
    except (KeyError, msgspec.DecodeError):
        raise Malformed(
            f"{what}: expected a training graph that lists its tensors, found none listed; "
            "make it with `atoll model training-graph`"
        ) from None
    if not tensors or any(size < 1 for tensor in tensors for size in tensor.shape):
        raise Malformed(f"{what}: expected tensors of 1 number or more, found {len(tensors)} tensors")
    found = {value.name: _shape(value) for value in model.graph.input}
    wide = found.get("features", ())
    features = wide[1] if len(wide) == 2 and isinstance(wide[1], int) else 0
    step = TrainingStep(tensors, features, "velocity" in found)
    for side, names, seen in (
        ("inputs", step.inputs, found),
        ("outputs", step.outputs, {value.name: _shape(value) for value in model.graph.output}),
    ):
        wanted = {name: step.shape_of(name) for name in names}
        if seen != wanted or features < 1:
            raise Malformed(f"{what}: expected the {side} {_told(wanted)}, found {_told(seen)}")
    return step


def require_equal_step(graph: Step, trainer: Step, step: TrainingStep, start: npt.NDArray[np.float32]) -> float:
    """The largest difference between one step of both, over outputs and batches of 32, 5 and 1 made-up rows, from the
    trainer's own parameters `start`. Raises Malformed, with the numbers, above 1e-6."""
    rng = np.random.default_rng(1)
    worst, where = 0.0, ""
    for count in _BATCHES:
        inputs: dict[str, npt.NDArray[Any]] = {
            "parameters": start,
            "features": rng.standard_normal((count, step.features)).astype(np.float32),
            "labels": (rng.random(count) < 0.5).astype(np.float32),
            "learning_rate": np.array(0.05, np.float32),
        }
        if step.momentum:
            inputs |= {
                "velocity": (0.01 * rng.standard_normal(step.length)).astype(np.float32),
                "momentum": np.array(0.9, np.float32),
            }
        found, expected = graph(inputs), trainer(inputs)
        for name in step.outputs:
            distance = _distance(found, expected, name)
            if distance > worst:
                worst, where = distance, f"{name} for {count} rows"
    if worst > DISTANCE_MAX:
        raise Malformed(
            f"training graph: expected one step within {DISTANCE_MAX:g} of the trainer's, found {worst:.3g} in "
            f"{where}; a step must not draw random numbers (dropout), nor change anything but its parameters"
        )
    return worst


def flat(tensors: Iterable[npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
    """Tensors one after the other, each row-major: float32[d]."""
    parts = [np.asarray(tensor, dtype=np.float32).reshape(-1) for tensor in tensors]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def _bare(node: onnx.NodeProto, names: Mapping[str, str]) -> onnx.NodeProto:
    import onnx

    if any(attribute.type in (attribute.GRAPH, attribute.GRAPHS) for attribute in node.attribute):
        raise Malformed(f"training graph: expected no branches or loops, found {node.op_type}")
    bare = onnx.NodeProto(op_type=node.op_type)
    bare.input.extend(names.get(name, name) for name in node.input)
    bare.output.extend(names.get(name, name) for name in node.output)
    for attribute in node.attribute:
        copy = bare.attribute.add()
        copy.CopyFrom(attribute)
        copy.doc_string = ""
    return bare


def _distance(found: Arrays, expected: Arrays, name: str) -> float:
    one, other = (np.asarray(side[name], dtype=np.float64) for side in (found, expected))
    if one.shape != other.shape:
        raise Malformed(f"training graph: {name}: expected shape {other.shape}, found {one.shape}")
    distance = float(np.abs(one - other).max(initial=0.0))
    return distance if np.isfinite(distance) else float("inf")


def _shape(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    """Sizes, "n" for a free one; of anything but float32, a shape that no contract has."""
    tensor = value.type.tensor_type
    if tensor.elem_type != 1:
        return ("not float32",)
    return tuple(int(size.dim_value) if size.HasField("dim_value") else "n" for size in tensor.shape.dim)


def _told(shapes: Mapping[str, Sequence[int | str]]) -> str:
    return ", ".join(f"{name}{list(shape)}" for name, shape in sorted(shapes.items())[:8])
