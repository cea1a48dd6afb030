"""A model with int8 weights answers as its dequantized weights do."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from edge_runtime.onnx_model import run_graph
from model_delta.graphs.int8 import quantize_weights
from model_delta.graphs.mlp import mlp_model
from model_delta.segments import read_tensor, stored_tensors

SIZES = (32, 256, 128, 1)


def test_scores_of_int8_weights_are_those_of_the_dequantized_ones() -> None:
    rng = np.random.default_rng(0)
    weights = [
        (
            rng.normal(0, 1 / np.sqrt(rows), (rows, columns)).astype(np.float32),
            rng.normal(0, 0.1, columns).astype(np.float32),
        )
        for rows, columns in pairwise(SIZES)
    ]
    file = quantize_weights(mlp_model(weights, np.zeros(SIZES[0], np.float32), np.ones(SIZES[0], np.float32)))
    tensors = {tensor.name: read_tensor(file, tensor) for tensor in stored_tensors(file)}
    features = rng.normal(0, 2, (200, SIZES[0])).astype(np.float32)
    value = features.astype(np.float64)
    for layer in range(3):
        name = f"layer{layer}.weight"
        value = value @ (tensors[name] * tensors[f"{name}_scale"]) + tensors[f"layer{layer}.bias"]
        value = np.maximum(value, 0) if layer < 2 else 1 / (1 + np.exp(-value))
    found = run_graph(file, {"features": features})["score"]
    # Without the runtime's `session.disable_quant_qdq` the difference is a hundred times that.
    assert np.abs(np.subtract(found, value)).max() < 1e-6
