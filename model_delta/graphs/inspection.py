"""What a model takes and gives, whether a terminal can feed it, and inputs made up to try it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from model_delta.errors import Malformed
from model_delta.graphs.reading import checked, opset
from model_delta.manifest import TensorSpec
from model_delta.segments import DTYPES
from model_delta.signature import FEATURES, SCORE, shown

if TYPE_CHECKING:
    import onnx

_FREE_AXIS = 16


class GraphInfo(msgspec.Struct, frozen=True):
    """What a model takes and gives, its default operator set, and how many numbers its weights are."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    opset: int
    parameters: int


def inspect(data: bytes, what: str) -> GraphInfo:
    """Check that `data` is a valid ONNX model (onnx.checker) that stands on its own, and describe it.

    `what` names the file in messages. Raises Malformed, one line that says what was found and what to do.
    """
    model = checked(data, what)
    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer}
    return GraphInfo(
        tuple(_spec(value, what) for value in graph.input if value.name not in weights),
        tuple(_spec(value, what) for value in graph.output),
        opset(model),
        sum(int(np.prod(list(tensor.dims), dtype=np.int64)) for tensor in graph.initializer),
    )


def require_features(info: GraphInfo, feature_count: int, what: str) -> None:
    """Raise Malformed unless the model is one that a terminal can feed: the one input `features` float32[batch,
    feature_count] and an output `score` float32[batch, 1]; a free dimension fits."""
    expected_input = f"input 'features' float32[batch, {feature_count}]"
    expected_output = "output 'score' float32[batch, 1]"
    if not _is_matrix(info.inputs, FEATURES, feature_count) or len(info.inputs) != 1:
        raise Malformed(
            f"{what}: expected the one {expected_input}, found {shown(info.inputs)}; "
            f"train it on the {feature_count} features that a terminal computes, and name the input 'features'"
        )
    if not _is_matrix(info.outputs, SCORE, 1):
        raise Malformed(
            f"{what}: expected an {expected_output}, found {shown(info.outputs)}; "
            "let the model end in one probability per row, named 'score'"
        )


def made_up_inputs(data: bytes, rng: np.random.Generator, rows: int = 16) -> dict[str, npt.NDArray[Any]]:
    """Inputs by name that the model runs on: standard normal numbers; row numbers below the table's size for integers
    that a Gather looks up directly; ones for every other integer (a mask). Raises Malformed for what is no model.

    The first axis has `rows`; another free axis has 16, and axes of one name have one size."""
    model = checked(data, "model")
    tables = {tensor.name: tensor.dims[0] for tensor in model.graph.initializer if len(tensor.dims) == 2}
    looked_up = {node.input[1]: tables.get(node.input[0], 1) for node in model.graph.node if node.op_type == "Gather"}
    sizes: dict[str, int] = {}
    made: dict[str, npt.NDArray[Any]] = {}
    for value in model.graph.input:
        spec = _spec(value, "model")
        if any(tensor.name == spec.name for tensor in model.graph.initializer):
            continue
        shape = []
        for axis, size in enumerate(value.type.tensor_type.shape.dim):
            free = rows if axis == 0 else _FREE_AXIS
            shape.append(size.dim_value or sizes.setdefault(size.dim_param or f"{spec.name}.{axis}", free))
        if np.issubdtype(np.dtype(spec.dtype), np.floating):
            made[spec.name] = rng.normal(size=shape).astype(spec.dtype)
        elif spec.name in looked_up:
            made[spec.name] = rng.integers(0, looked_up[spec.name], shape).astype(spec.dtype)
        else:
            made[spec.name] = np.ones(shape, spec.dtype)
    return made


def _spec(value: onnx.ValueInfoProto, what: str) -> TensorSpec:
    if not value.type.HasField("tensor_type"):
        raise Malformed(
            f"{what}: expected tensors, found {value.name!r} of kind {value.type.WhichOneof('value')}; "
            "export it with zipmap off, so that every output is a tensor"
        )
    tensor = value.type.tensor_type
    dtype = DTYPES.get(tensor.elem_type)
    if dtype is None:
        raise Malformed(f"{what}: expected numbers in {value.name!r}, found ONNX element type {tensor.elem_type}")
    sizes = (size.dim_value if size.HasField("dim_value") else -1 for size in tensor.shape.dim)
    return TensorSpec(value.name, dtype, tuple(sizes))


def _is_matrix(specs: Iterable[TensorSpec], name: str, columns: int) -> bool:
    return any(
        spec.name == name
        and spec.dtype == "float32"
        and len(spec.shape) == 2
        and spec.shape[0] == -1
        and spec.shape[1] in (columns, -1)
        for spec in specs
    )
