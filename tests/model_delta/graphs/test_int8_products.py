"""Integers multiplied: with activation scales fixed beforehand, or found as they come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from model_delta.errors import Malformed
from model_delta.graphs.int8 import Observe, form_of, quantize, weight_changes
from model_delta.patch import fidelity, quantization
from model_delta.segments import operators, read_tensor, stored_tensors
from tests.model_delta.graphs.samples import matmul_model, rows
from tests.model_delta.models import FEATURES, layers, model, normalisation, nudged, run


def observing(features: np.ndarray) -> Observe:
    return lambda graph: run(graph, features=features)


def answers_with_integers(file: bytes, folder: Path, **inputs: Any) -> tuple[np.ndarray, list[str]]:
    """What a session with quantization left on answers, and the operators that it runs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    found = session.run(["score"], inputs)[0]
    return found, [node.op_type for node in onnx.load(str(folder / "optimized.onnx")).graph.node]


def test_fixed_activation_scales_are_the_ranges_seen(tmp_path: Path) -> None:
    weights = layers(1, (FEATURES, 64, 32, 1))
    file = model(weights)
    made = quantize(file, form="static", calibration=observing(rows(500)))
    assert made.tensors == 3
    assert form_of(made.file) == ("static", True)
    mean, scale = normalisation()
    inside = (rows(500) - mean) / scale
    found = {t.name: read_tensor(made.file, t) for t in stored_tensors(made.file)}
    scales = [value for name, value in found.items() if name.endswith("_activation_scale")]
    assert len(scales) == 3
    assert float(scales[0]) == pytest.approx((inside.max() - inside.min()) / 255, rel=1e-5)
    hidden = np.maximum(inside @ weights[0][0] + weights[0][1], 0)
    assert float(scales[1]) == pytest.approx(hidden.max() / 255, rel=1e-4)
    zeros = [int(value) for name, value in found.items() if name.endswith("_activation_zero")]
    assert (zeros[1], zeros[2]) == (0, 0)  # after a ReLU
    assert zeros[0] == round(-float(inside.min()) / float(scales[0]))
    fresh = rows(200, 3)
    answered, operators_run = answers_with_integers(made.file, tmp_path, features=fresh)
    assert fidelity.distance(answered, run(file, features=fresh)["score"]) < 1e-3
    assert operators_run.count("MatMulIntegerToFloat") == 3  # products of integers, nothing restored on every run
    assert "DequantizeLinear" not in operators_run


@pytest.mark.parametrize(
    ("operator", "attributes"), [("MatMul", {}), ("Gemm", {}), ("Gemm", {"transB": 1}), ("Gemm", {"alpha": 0.5})]
)
def test_static_products_of_every_kind_answer_alike(operator: str, attributes: dict[str, Any], tmp_path: Path) -> None:
    file = matmul_model(operator=operator, **attributes).SerializeToString()
    features = np.random.default_rng(1).normal(size=(50, 4)).astype(np.float32)
    made = quantize(file, form="static", calibration=observing(features))
    answered, _ = answers_with_integers(made.file, tmp_path, features=features)
    np.testing.assert_allclose(answered, run(file, features=features)["score"], atol=0.1)


def test_weights_follow_the_parent_and_activations_do_not() -> None:
    weights = layers(1, (FEATURES, 64, 32, 1))
    source, moved = model(weights), model(nudged(weights, 2, 1e-4))
    parent = quantize(source, form="static", calibration=observing(rows(100))).file
    made = quantize(moved, parent, source, form="static", calibration=observing(3 * rows(100)))
    assert made.moved is not None
    assert (0 < made.moved < 0.05, made.rescaled) == (True, 0)
    before, after = ({t.name: read_tensor(file, t) for t in stored_tensors(file)} for file in (parent, made.file))
    assert before.keys() == after.keys()
    for name, value in before.items():
        if name.endswith("_activation_scale"):
            assert after[name] > 2 * value
    fresh = quantize(moved, form="static", calibration=observing(3 * rows(100))).file
    share = fidelity.carried(weight_changes(moved, made.file, fresh, source, parent))
    assert share.moved
    assert not fidelity.refusals(fidelity.Fidelity(carried=share))
    assert quantize(made.file, form="static").file is made.file  # it happens once


def test_ranges_that_are_none_are_malformed() -> None:
    file = model(layers(1))
    with pytest.raises(Malformed, match="expected calibration rows"):
        quantize(file, form="static")
    with pytest.raises(Malformed, match="expected a finite range"):
        quantize(file, form="static", calibration=observing(np.full((3, FEATURES), np.inf, np.float32)))
    with pytest.raises(Malformed, match="found none"):
        quantize(file, form="static", calibration=lambda graph: {})


def test_an_activation_that_is_always_zero_has_a_scale() -> None:
    scale, zero = quantization.activation_scale(0.0, 0.0)
    assert scale > 0
    assert zero == 0
    assert quantization.activation_scale(-2.55, 0.0) == (np.float32(0.01), 255)
    assert quantization.activation_scale(5.1, 10.2)[1] == 0  # 0 is a level even where it was not seen


def encoder_like() -> tuple[bytes, dict[str, np.ndarray]]:
    """ids[n, 3] -> a table -> MatMul, Add, Max -> Gemm -> score[n, 3, 2]."""
    rng = np.random.default_rng(5)
    tensors = {
        "table": rng.normal(0, 1, (50, 16)).astype(np.float32),
        "w1": rng.normal(0, 0.3, (16, 32)).astype(np.float32),
        "b1": rng.normal(0, 0.1, 32).astype(np.float32),
        "w2": rng.normal(0, 0.3, (32, 2)).astype(np.float32),
        "b2": rng.normal(0, 0.1, 2).astype(np.float32),
        "floor": np.array(0.01, np.float32),
    }
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "ids"], ["rows"]),
            helper.make_node("MatMul", ["rows", "w1"], ["m"]),
            helper.make_node("Add", ["m", "b1"], ["a"]),
            helper.make_node("Max", ["a", "floor"], ["r"]),
            helper.make_node("Gemm", ["r", "w2", "b2"], ["score"]),
        ],
        "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, ["n", 2])],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return proto.SerializeToString(), tensors


@pytest.mark.parametrize("per_channel", [True, False])
def test_a_dynamic_model_multiplies_integers_and_answers_alike(per_channel: bool) -> None:
    file, tensors = encoder_like()
    made = quantize(file, form="dynamic", per_channel=per_channel)
    stored = {tensor.name: tensor for tensor in stored_tensors(made.file)}
    assert {name for name, tensor in stored.items() if tensor.dtype == "int8"} == {"table", "w1", "w2"}
    assert stored["w1_scale"].shape == ((32,) if per_channel else ())
    assert (made.tensors, made.scales) == (3, 16 + 32 + 2 if per_channel else 3)
    assert form_of(made.file) == ("dynamic", per_channel)
    ids = np.arange(50)
    exact = np.maximum(tensors["table"][ids] @ tensors["w1"] + tensors["b1"], 0.01) @ tensors["w2"] + tensors["b2"]
    found = run(made.file, ids=ids)["score"]
    assert np.abs(found - exact).max() < 0.05 * np.abs(exact).max()
    assert np.abs(found - exact).max() > 0


def test_a_small_update_of_a_dynamic_model_follows_its_parent() -> None:
    file, _ = encoder_like()
    parent = quantize(file, form="dynamic")
    proto = onnx.ModelProto.FromString(file)
    for tensor in proto.graph.initializer:
        if tensor.name in ("w2", "b1"):
            value = numpy_helper.to_array(tensor) * np.float32(1.01)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    updated = proto.SerializeToString()
    child = quantize(updated, parent.file, file, form="dynamic")
    assert (child.rescaled, len(child.file)) == (0, len(parent.file))
    assert child.moved is not None
    assert 0 < child.moved < 0.1
    before = {t.name: read_tensor(parent.file, t).tobytes() for t in stored_tensors(parent.file)}
    after = {t.name: read_tensor(child.file, t).tobytes() for t in stored_tensors(child.file)}
    assert {name for name in before if before[name] != after[name]} == {"w2", "b1"}
    fresh = quantize(updated, form="dynamic")
    changes = {change.name: change for change in weight_changes(updated, child.file, fresh.file, file, parent.file)}
    assert set(changes) == {"table", "w1", "w2"}
    assert not changes["w1"].float32.any()
    assert changes["w2"].int8.any()


def test_a_table_that_something_else_reads_stays_float() -> None:
    file, _ = encoder_like()
    proto = onnx.ModelProto.FromString(file)
    proto.graph.node.append(helper.make_node("ReduceSum", ["table"], ["total"]))
    proto.graph.output.append(helper.make_tensor_value_info("total", TensorProto.FLOAT, [1, 1]))
    made = quantize(proto.SerializeToString(), form="dynamic")
    assert {tensor.name for tensor in stored_tensors(made.file) if tensor.dtype == "int8"} == {"w1", "w2"}


def test_a_transposing_product_is_dequantized_instead() -> None:
    file = matmul_model(operator="Gemm", transB=1).SerializeToString()
    made = quantize(file, form="dynamic")
    features = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
    assert "MatMulInteger" not in operators(made.file)
    np.testing.assert_allclose(
        run(made.file, features=features)["score"], run(file, features=features)["score"], atol=0.1
    )
