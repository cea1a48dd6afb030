"""Which constant matrices of a graph become int8, and by what use of each: decided before anything is rewritten."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from model_delta.graphs.reading import opset

if TYPE_CHECKING:
    import onnx

DEQUANTIZE_OPSET_MIN = 13  # DequantizeLinear with one scale per channel

Form = Literal["weights", "dynamic", "static"]


class Role(NamedTuple):
    """How a constant matrix is used, so how it is quantized: `kind` is product (MatMulInteger), rows (Gather), plain
    (dequantized before use) or static (that, and rounded activations); `axis` is the channel's, None for one scale."""

    kind: str
    axis: int | None


def roles_of(model: onnx.ModelProto, form: Form, per_channel: bool) -> dict[str, Role]:
    """The constant, finite float32 matrices that `quantize` replaces. One that is used in two ways is left alone."""
    from onnx import AttributeProto, TensorProto

    graph = model.graph
    quantized = {"DequantizeLinear", "QuantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "QLinearMatMul"}
    nested = any(a.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for node in graph.node for a in node.attribute)
    if nested or model.functions or opset(model) < DEQUANTIZE_OPSET_MIN:
        return {}
    if any(node.op_type in quantized for node in graph.node):
        return {}
    fixed = {t.name for t in graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) == 2 and min(t.dims)}
    fixed -= {value.name for value in (*graph.input, *graph.output)}
    roles: dict[str, Role] = {}
    conflicting: set[str] = set()
    for node in graph.node:
        if node.domain not in ("", "ai.onnx"):
            continue
        name, role = _use_of_matrix(node, form)
        if role is not None and name in fixed and roles.setdefault(name, role) != role:
            conflicting.add(name)
        if form != "weights":  # the integers must reach no other operator
            others = set(node.input) - ({name} if role is not None else set())
            conflicting |= others & fixed
    kept = {name: role for name, role in roles.items() if name not in conflicting and _is_finite(graph, name)}
    return kept if per_channel else {name: role._replace(axis=None) for name, role in kept.items()}


def static_weight(node: onnx.NodeProto, roles: dict[str, Role]) -> bool:
    """Whether a node is a product by a matrix whose activation is rounded by a fixed scale."""
    role = roles.get(node.input[1]) if node.op_type in ("MatMul", "Gemm") else None
    return role is not None and role.kind == "static"


def changes_operands(gemm: onnx.NodeProto) -> bool:
    """Whether a Gemm transposes or scales."""
    return any(
        (a.name in ("transA", "transB") and a.i) or (a.name in ("alpha", "beta") and a.f != 1) for a in gemm.attribute
    )


def _use_of_matrix(node: onnx.NodeProto, form: Form) -> tuple[str, Role | None]:
    if node.op_type in ("MatMul", "Gemm"):
        transposed = any(a.name == "transB" and a.i for a in node.attribute)
        kind = "product" if form == "dynamic" and not changes_operands(node) else "plain"
        return node.input[1], Role("static" if form == "static" else kind, 0 if transposed else 1)
    if node.op_type == "Gather" and form != "weights":
        first = all(a.i == 0 for a in node.attribute if a.name == "axis")
        return node.input[0], Role("rows", 1) if first else None
    return "", None


def _is_finite(graph: onnx.GraphProto, name: str) -> bool:
    from onnx import numpy_helper

    return all(np.isfinite(numpy_helper.to_array(t)).all() for t in graph.initializer if t.name == name)
