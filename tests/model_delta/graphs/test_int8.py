"""Weights stored as int8: what the file holds, and how it follows its parent."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from model_delta.graphs.inspection import inspect
from model_delta.graphs.int8 import quantize_weights
from model_delta.patch import container
from model_delta.segments import read_tensor, stored_tensors
from tests.model_delta.graphs.samples import matmul_model, rows, scores_by_hand
from tests.model_delta.models import FEATURES, layers, model, nudged, run


def test_quantized_weights_rebuild_from_the_file() -> None:
    weights = layers(1)
    quantized = quantize_weights(model(weights))
    tensors = {tensor.name: tensor for tensor in stored_tensors(quantized)}
    for index, (weight, bias) in enumerate(weights):
        levels = read_tensor(quantized, tensors[f"layer{index}.weight"])
        scales = read_tensor(quantized, tensors[f"layer{index}.weight_scale"])
        assert (levels.dtype, scales.shape) == (np.int8, (weight.shape[1],))
        np.testing.assert_allclose(levels * scales, weight, atol=scales.max() * 0.51)
        np.testing.assert_array_equal(read_tensor(quantized, tensors[f"layer{index}.bias"]), bias)


def test_a_quantized_model_scores_nearly_the_same_in_a_third_of_the_bytes() -> None:
    weights = layers(1, (FEATURES, 256, 128, 1))
    file, features = model(weights), rows(200)
    quantized = quantize_weights(file)
    assert len(quantized) < 0.35 * len(file)
    before, after = run(file, features=features)["score"], run(quantized, features=features)["score"]
    assert np.abs(before - after).max() < 0.02
    rebuilt = {tensor.name: read_tensor(quantized, tensor) for tensor in stored_tensors(quantized)}
    by_hand = scores_by_hand(
        [
            (rebuilt[f"layer{i}.weight"] * rebuilt[f"layer{i}.weight_scale"], rebuilt[f"layer{i}.bias"])
            for i in range(3)
        ],
        features,
    )
    np.testing.assert_allclose(after, by_hand, atol=1e-5)


def test_scales_are_locked_to_the_parent() -> None:
    weights = layers(1)
    parent = quantize_weights(model(weights))
    grown = nudged(weights, 2)
    grown[1][0][:, 3] *= 2  # one channel leaves its range
    child = quantize_weights(model(grown), parent)
    fresh = quantize_weights(model(grown))
    assert len(child) == len(parent)

    def scales(file: bytes, index: int) -> np.ndarray:
        return next(read_tensor(file, t) for t in stored_tensors(file) if t.name == f"layer{index}.weight_scale")

    changed = np.concatenate([scales(parent, i) != scales(child, i) for i in range(3)])
    assert changed.sum() == 1
    assert scales(child, 1)[3] == scales(fresh, 1)[3]


@pytest.mark.parametrize("parent", [b"", b"not a model", b"same layout, other shape"])
def test_a_parent_that_does_not_fit_is_ignored(parent: bytes) -> None:
    if parent.startswith(b"same"):
        parent = quantize_weights(model(layers(1, (FEATURES, 8, 12, 1))))
    file = model(layers(1))
    assert quantize_weights(file, parent) == quantize_weights(file)


def test_integers_stand_behind_everything_else() -> None:
    dtypes = [tensor.dtype for tensor in stored_tensors(quantize_weights(model(layers(1))))]
    assert dtypes.index("int8") == len(dtypes) - dtypes.count("int8")


@pytest.mark.parametrize("format_", ["bsdiff40", "tp1"])
def test_a_parent_in_another_order_aligns_by_name(format_: str) -> None:
    weights = layers(1, (FEATURES, 256, 128, 1))
    source, moved = model(weights), model(nudged(weights, 2, 1e-4))
    parent = quantize_weights(source)
    proto = onnx.ModelProto.FromString(parent)
    named = {tensor.name: tensor for tensor in proto.graph.initializer}
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(named[name] for name in sorted(named))  # weights, scales and biases in turn
    earlier = proto.SerializeToString(deterministic=True)
    assert earlier != parent
    child = quantize_weights(moved, earlier, source)
    assert child == quantize_weights(moved, parent, source)
    patch = container.make(format_, earlier, child)
    assert container.apply_bytes(earlier, patch, len(child)) == child
    assert len(patch) < len(container.make(format_, parent, child)) + 300


def test_quantizing_is_deterministic_and_happens_once() -> None:
    file = model(layers(1))
    quantized = quantize_weights(file)
    assert quantize_weights(file) == quantized
    assert quantize_weights(quantized) is quantized
    assert inspect(quantized, "q").inputs == inspect(file, "f").inputs


@pytest.mark.parametrize(("operator", "attributes"), [("MatMul", {}), ("Gemm", {}), ("Gemm", {"transB": 1})])
def test_the_output_channel_is_found(operator: str, attributes: dict[str, int]) -> None:
    proto = matmul_model(operator=operator, **attributes)
    features = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
    before = run(proto.SerializeToString(), features=features)["score"]
    quantized = quantize_weights(proto.SerializeToString())
    assert any(tensor.dtype == "int8" for tensor in stored_tensors(quantized))
    np.testing.assert_allclose(run(quantized, features=features)["score"], before, atol=0.1)
    weight = numpy_helper.to_array(proto.graph.initializer[0])
    scale = next(read_tensor(quantized, t) for t in stored_tensors(quantized) if t.name == "w_scale")
    np.testing.assert_allclose(scale, np.abs(weight).max(axis=1 if attributes else 0) / 127, rtol=1e-6)


def test_tensors_of_types_that_numpy_lacks_stay_as_they_are() -> None:
    proto = matmul_model()
    odd = [helper.make_tensor("text", TensorProto.STRING, [1], [b"x"]), helper.make_tensor("half", 16, [2], [1.0, 2.5])]
    proto.graph.initializer.extend(odd)
    quantized = onnx.ModelProto.FromString(quantize_weights(proto.SerializeToString()))
    assert [t for t in quantized.graph.initializer if t.name in ("text", "half")] == odd


def unsuitable() -> list[tuple[str, Callable[[onnx.ModelProto], None]]]:
    def shared_both_ways(proto: onnx.ModelProto) -> None:
        proto.graph.node[0].output[0] = "between"
        proto.graph.node.append(helper.make_node("Gemm", ["between", "w"], ["score"], transB=1))

    def overridable(proto: onnx.ModelProto) -> None:
        proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 4]))

    def infinite(proto: onnx.ModelProto) -> None:
        weight = np.full((4, 4), np.inf, np.float32)
        proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w"))

    def integer(proto: onnx.ModelProto) -> None:
        for value in (*proto.graph.input, *proto.graph.output):
            value.type.tensor_type.elem_type = TensorProto.DOUBLE
        proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((4, 4)), "w"))

    return [
        ("used both ways", shared_both_ways),
        ("overridable", overridable),
        ("infinite", infinite),
        ("double", integer),
    ]


@pytest.mark.parametrize(("what", "change"), unsuitable(), ids=[what for what, _ in unsuitable()])
def test_unsuitable_models_pass_through_unchanged(what: str, change: Callable[[onnx.ModelProto], None]) -> None:
    proto = matmul_model()
    change(proto)
    file = proto.SerializeToString()
    assert quantize_weights(file) is file


def test_a_model_older_than_per_channel_dequantizing_passes_through() -> None:
    file = matmul_model(opset=12).SerializeToString()
    assert quantize_weights(file) is file
