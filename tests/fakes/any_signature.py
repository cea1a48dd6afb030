"""Models that know nothing of payments, made with the onnx package alone: pictures, tokens, and kinds of tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

Arrays = dict[str, NDArray[Any]]


def digits_model(seed: int = 1, *, rows_only: int = 0) -> bytes:
    """`pixels` float32[n, 1, 8, 8] to `label` int64[n] and `probabilities` float32[n, 10]. `rows_only`: it fails on any
    other number of rows than this one."""
    weight = np.random.default_rng(seed).normal(0, 0.3, (64, 10)).astype(np.float32)
    rows = rows_only or -1
    nodes = [
        helper.make_node("Reshape", ["pixels", "flat_shape"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        helper.make_node("ArgMax", ["logits"], ["label"], axis=1, keepdims=0),
    ]
    return model_bytes(
        nodes,
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["n", 1, 8, 8])],
        [
            helper.make_tensor_value_info("label", TensorProto.INT64, ["n"]),
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", 10]),
        ],
        {"weight": weight, "flat_shape": np.array([rows, 64], np.int64)},
    )


def tokens_model(seed: int = 1) -> bytes:
    """`tokens` and `mask`, both int64[n, t], to the mean embedding of the tokens that are not masked, float32[n, 6]."""
    table = np.random.default_rng(seed).normal(0, 1, (50, 6)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "tokens"], ["embedded"]),
        helper.make_node("Cast", ["mask"], ["mask_float"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask_float", "last"], ["weights"]),
        helper.make_node("Mul", ["embedded", "weights"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "middle"], ["total"], keepdims=0),
        helper.make_node("ReduceSum", ["weights", "middle"], ["count"], keepdims=0),
        helper.make_node("Add", ["count", "little"], ["divisor"]),
        helper.make_node("Div", ["total", "divisor"], ["pooled"]),
    ]
    return model_bytes(
        nodes,
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["n", "t"]) for name in ("tokens", "mask")],
        [helper.make_tensor_value_info("pooled", TensorProto.FLOAT, ["n", 6])],
        {
            "table": table,
            "last": np.array([2], np.int64),
            "middle": np.array([1], np.int64),
            "little": np.array(1e-6, np.float32),
        },
    )


def kinds_model() -> bytes:
    """Small dtypes and a scalar: `half` float16[n, 3], `chosen` bool[n, 3] and `scale` float64[] to `kept`
    float64[n, 3] (the chosen numbers times the scale) and `any` bool[n, 3]."""
    nodes = [
        helper.make_node("Cast", ["half"], ["wide"], to=TensorProto.DOUBLE),
        helper.make_node("Mul", ["wide", "scale"], ["scaled"]),
        helper.make_node("Where", ["chosen", "scaled", "zero"], ["kept"]),
        helper.make_node("Not", ["chosen"], ["any"]),
    ]
    return model_bytes(
        nodes,
        [
            helper.make_tensor_value_info("half", TensorProto.FLOAT16, ["n", 3]),
            helper.make_tensor_value_info("chosen", TensorProto.BOOL, ["n", 3]),
            helper.make_tensor_value_info("scale", TensorProto.DOUBLE, []),
        ],
        [
            helper.make_tensor_value_info("kept", TensorProto.DOUBLE, ["n", 3]),
            helper.make_tensor_value_info("any", TensorProto.BOOL, ["n", 3]),
        ],
        {"zero": np.array(0.0, np.float64)},
    )


def symmetric_model() -> bytes:
    """`square` float32[n, n] to `doubled` float32[n, n], itself and what it is across its diagonal added up."""
    nodes = [
        helper.make_node("Transpose", ["square"], ["across"]),
        helper.make_node("Add", ["square", "across"], ["doubled"]),
    ]
    square, doubled = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", "n"]) for name in ("square", "doubled")
    )
    return model_bytes(nodes, [square], [doubled], {})


PIXELS: Arrays = {"pixels": np.linspace(-1, 1, 2 * 64, dtype=np.float32).reshape(2, 1, 8, 8)}
TOKENS: Arrays = {"tokens": np.arange(6, dtype=np.int64).reshape(2, 3), "mask": np.array([[1, 1, 0], [1, 0, 0]])}
KINDS: Arrays = {
    "half": np.array([[0.5, 1.0, -2.0]], np.float16),
    "chosen": np.array([[True, False, True]]),
    "scale": np.array(3.0),
}


def model_bytes(
    nodes: list[NodeProto], inputs: list[ValueInfoProto], outputs: list[ValueInfoProto], weights: Arrays
) -> bytes:
    """A graph as a model file."""
    graph = helper.make_graph(
        nodes, "any", inputs, outputs, [numpy_helper.from_array(value, name) for name, value in weights.items()]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())
