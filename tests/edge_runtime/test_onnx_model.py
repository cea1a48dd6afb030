"""A model with int8 weights answers as its dequantized weights do."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_runtime.onnx_model import OnnxModel, run_graph
from model_delta.errors import Malformed
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


def lookup(ir_version: int) -> bytes:
    """A graph that takes one of four numbers."""
    place = helper.make_tensor_value_info("place", TensorProto.INT64, [1])
    found = helper.make_tensor_value_info("found", TensorProto.FLOAT, [1])
    table = numpy_helper.from_array(np.ones(4, np.float32), "table")
    node = helper.make_node("Gather", ["table", "place"], ["found"])
    graph = helper.make_graph([node], "lookup", [place], [found], [table])
    model: onnx.ModelProto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=ir_version
    )
    return bytes(model.SerializeToString())


def test_what_the_runtime_refuses_is_told_in_its_words_without_the_place_in_its_source(tmp_path: Path) -> None:
    path = tmp_path / "lookup.onnx"
    path.write_bytes(lookup(ir_version=99))
    for file in (path, path.read_bytes()):
        with pytest.raises(Malformed, match="Unsupported model IR version: 99, max supported IR version") as refused:
            OnnxModel("d" * 64, file, "model lookup")
        assert "::" not in str(refused.value)
        assert ".cc" not in str(refused.value)


def test_a_failing_run_leaves_no_value_of_an_input_in_error_or_log(capfd: pytest.CaptureFixture[str]) -> None:
    model = OnnxModel("d" * 64, lookup(ir_version=8), "model lookup")
    with pytest.raises(Malformed, match="indices element out of data bounds") as failed:
        model.run({"place": np.array([7_654_321])})
    assert "7654321" not in str(failed.value) + "".join(capfd.readouterr())
