"""A version that must not be released, made for drills of the guardrails."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from model_delta.graphs.inspection import inspect, require_features
from model_delta.graphs.reading import checked
from model_delta.graphs.writing import canonical, initializers, rewired
from model_delta.signature import FEATURES, SCORE

if TYPE_CHECKING:
    import onnx

_SLOW_WIDTH = 512


def faulty_variant(model: bytes, logit_shift: float, matmul_rounds: int) -> bytes:
    """A version that passes a look at its ranking and still must not be released: for drills of the guardrails.

    Every score becomes sigmoid(logit(score) + logit_shift), so rows keep their order while a fixed threshold declines
    far more (or fewer) of them; and `matmul_rounds` products with a 512 x 512 matrix that depend on the input delay
    every answer. The matrix is made by ConstantOfShape, so the file stays small. Scores are clipped 1e-7 from 0 and 1
    first (a logit must be finite). Raises Malformed unless the model has `features` and `score`.
    """
    from onnx import TensorProto, helper

    proto = checked(model, "model to make faulty")
    graph, width = proto.graph, _width(proto)
    require_features(inspect(model, "model to make faulty"), width, "model to make faulty")
    before, prefix = _fresh_name(graph, "score_before"), _fresh_name(graph, "faulty")
    nodes = [rewired(node, {SCORE: before}) for node in graph.node]
    graph.initializer.extend(
        initializers(
            {
                f"{prefix}.low": np.array(1e-7, np.float64),
                f"{prefix}.high": np.array(1 - 1e-7, np.float64),
                f"{prefix}.one": np.array(1, np.float64),
                f"{prefix}.shift": np.array(logit_shift, np.float64),
                f"{prefix}.tiny": np.array(1e-30, np.float64),
                f"{prefix}.widen": np.array([width, _SLOW_WIDTH], np.int64),
                f"{prefix}.square": np.array([_SLOW_WIDTH, _SLOW_WIDTH], np.int64),
                f"{prefix}.narrow": np.array([_SLOW_WIDTH, 1], np.int64),
            }
        )
    )

    def add(operator: str, inputs: Sequence[str], output: str, **attributes: object) -> str:
        nodes.append(helper.make_node(operator, list(inputs), [output], **attributes))
        return output

    # Averages of averages of the features: in [-1, 1], and of no use to anybody.
    for name, rows in (("widen", width), ("square", _SLOW_WIDTH), ("narrow", _SLOW_WIDTH)):
        value = helper.make_tensor("value", TensorProto.FLOAT, [1], [1 / rows])
        add("ConstantOfShape", [f"{prefix}.{name}"], f"{prefix}.{name}.matrix", value=value)
    add("Tanh", [FEATURES], f"{prefix}.bounded")
    slow = add("MatMul", [f"{prefix}.bounded", f"{prefix}.widen.matrix"], f"{prefix}.step0")
    for step in range(1, matmul_rounds + 1):
        slow = add("MatMul", [slow, f"{prefix}.square.matrix"], f"{prefix}.step{step}")
    add("MatMul", [slow, f"{prefix}.narrow.matrix"], f"{prefix}.average")
    add("Cast", [f"{prefix}.average"], f"{prefix}.average64", to=TensorProto.DOUBLE)
    add("Mul", [f"{prefix}.average64", f"{prefix}.tiny"], f"{prefix}.nothing")

    # The score, moved in logit space.
    add("Cast", [before], f"{prefix}.score64", to=TensorProto.DOUBLE)
    add("Max", [f"{prefix}.score64", f"{prefix}.low"], f"{prefix}.above")
    add("Min", [f"{prefix}.above", f"{prefix}.high"], f"{prefix}.inside")
    add("Sub", [f"{prefix}.one", f"{prefix}.inside"], f"{prefix}.rest")
    add("Div", [f"{prefix}.inside", f"{prefix}.rest"], f"{prefix}.odds")
    add("Log", [f"{prefix}.odds"], f"{prefix}.logit")
    add("Add", [f"{prefix}.logit", f"{prefix}.shift"], f"{prefix}.shifted")
    add("Add", [f"{prefix}.shifted", f"{prefix}.nothing"], f"{prefix}.slow")
    add("Sigmoid", [f"{prefix}.slow"], f"{prefix}.score")
    add("Cast", [f"{prefix}.score"], SCORE, to=TensorProto.FLOAT)
    del graph.node[:]
    graph.node.extend(nodes)
    return canonical(proto)


def _fresh_name(graph: onnx.GraphProto, wanted: str) -> str:
    used = {name for node in graph.node for name in (*node.input, *node.output)}
    used |= {tensor.name for tensor in graph.initializer}
    name, number = wanted, 2
    while any(other == name or other.startswith(f"{name}.") for other in used):
        name, number = f"{wanted}{number}", number + 1
    return name


def _width(model: onnx.ModelProto) -> int:
    for value in model.graph.input:
        sizes = value.type.tensor_type.shape.dim
        if value.name == FEATURES and len(sizes) == 2:
            return int(sizes[1].dim_value) or -1
    return -1
