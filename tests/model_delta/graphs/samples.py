"""Rows, a model of one product, and the fraud model worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.model_delta.models import FEATURES, Layers, normalisation

SIZES = (FEATURES, 32, 16, 1)


def rows(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, (count, FEATURES)).astype(np.float32)


def scores_by_hand(weights: Layers, features: np.ndarray) -> np.ndarray:
    mean, scale = normalisation()
    value = (features.astype(np.float64) - mean) / scale
    for index, (weight, bias) in enumerate(weights):
        value = value @ weight + bias
        if index < len(weights) - 1:
            value = np.maximum(value, 0)
    return 1 / (1 + np.exp(-value))


def matmul_model(opset: int = 17, operator: str = "MatMul", **attributes: Any) -> onnx.ModelProto:
    """features[?, 4] times one constant matrix, with a square weight so that any transposition fits."""
    weight = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node(operator, ["features", "w"], ["score"], **attributes)],
        "g",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
