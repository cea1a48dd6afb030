"""The nodes of a quantized graph: how a product, a look-up or another operator reads int8 weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from model_delta.graphs.roles import Role, changes_operands, static_weight
from model_delta.graphs.writing import rewired

if TYPE_CHECKING:
    import onnx


def quantized_nodes(nodes: Sequence[onnx.NodeProto], roles: dict[str, Role]) -> list[onnx.NodeProto]:
    """The graph's nodes with int8 weights in the roles given, in a valid order."""
    from onnx import helper

    restored = {name: f"{name}_dequantized" for name, role in roles.items() if role.kind in ("plain", "static")}
    made = []
    for name, output in restored.items():
        # With one scale a tensor the operator ignores the axis.
        axis = roles[name].axis
        attributes = {} if axis is None else {"axis": axis}
        made.append(
            helper.make_node(
                "DequantizeLinear", [name, f"{name}_scale"], [output], name=f"dequantize_{name}", **attributes
            )
        )
    products = {node.output[0] for node in nodes if static_weight(node, roles)}
    rounded: set[str] = set()  # activations that are integers already: several products may share one
    for node in nodes:
        place = {"MatMul": 1, "Gemm": 1, "Gather": 0}.get(node.op_type)
        name = node.input[place] if place is not None and len(node.input) > place else ""
        role = roles.get(name)
        if role is not None and role.kind == "product":
            made += _product(node, rounded)
        elif role is not None and static_weight(node, roles):
            made += _static_product(node, rounded, restored)
        elif role is not None and role.kind == "rows":
            read, result = f"{node.output[0]}_int8", node.output[0]
            made.append(rewired(node, {result: read}))
            attributes = {} if role.axis is None else {"axis": -1}
            made.append(helper.make_node("DequantizeLinear", [read, f"{name}_scale"], [result], **attributes))
        elif node.op_type == "Add" and products & set(node.input):
            made.append(helper.make_node("Sum", [restored.get(one, one) for one in node.input], list(node.output)))
        else:
            made.append(rewired(node, restored))
    return made


def _product(node: onnx.NodeProto, rounded: set[str]) -> list[onnx.NodeProto]:
    """A product of integers whose activation is rounded as it comes."""
    from onnx import TensorProto, helper

    (value, name), result = node.input[:2], node.output[0]
    scale, zero = f"{value}_activation_scale", f"{value}_activation_zero"
    made = []
    if value not in rounded:
        rounded.add(value)
        made.append(helper.make_node("DynamicQuantizeLinear", [value], [f"{value}_uint8", scale, zero]))
    biased = node.op_type == "Gemm" and len(node.input) > 2 and bool(node.input[2])
    product = f"{result}_product" if biased else result
    made += [
        helper.make_node("MatMulInteger", [f"{value}_uint8", name, zero], [f"{result}_int32"]),
        helper.make_node("Cast", [f"{result}_int32"], [f"{result}_float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [scale, f"{name}_scale"], [f"{result}_scale"]),
        helper.make_node("Mul", [f"{result}_float", f"{result}_scale"], [product]),
    ]
    if biased:
        made.append(helper.make_node("Add", [product, node.input[2]], [result]))
    return made


def _static_product(node: onnx.NodeProto, rounded: set[str], restored: dict[str, str]) -> list[onnx.NodeProto]:
    """A product whose activation is rounded by a fixed scale, in the form that runtimes fuse."""
    from onnx import helper

    value, result = node.input[0], node.output[0]
    scale = [f"{value}_activation_scale", f"{value}_activation_zero"]
    made = []
    if value not in rounded:
        rounded.add(value)
        made.append(helper.make_node("QuantizeLinear", [value, *scale], [f"{value}_uint8"]))
        made.append(helper.make_node("DequantizeLinear", [f"{value}_uint8", *scale], [f"{value}_rounded"]))
    inputs = [f"{value}_rounded", restored[node.input[1]], *node.input[2:]]
    if node.op_type == "Gemm" and not changes_operands(node):
        biased = len(inputs) > 2 and bool(inputs[2])
        product = f"{result}_product" if biased else result
        made.append(helper.make_node("MatMul", inputs[:2], [product]))
        if biased:
            made.append(helper.make_node("Sum", [product, inputs[2]], [result]))
        return made
    kept = rewired(node, {})
    kept.input[0], kept.input[1] = inputs[:2]
    return [*made, kept]
