"""Graphs against onnxruntime and against plain NumPy."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from model_delta import graphs
from model_delta.errors import Malformed
from model_delta.patch import container, fidelity, quantization
from model_delta.patch.bsdiff import make_patch
from model_delta.segments import operators, read_tensor, stored_tensors
from tests.model_delta.models import FEATURES, Layers, layers, model, normalisation, nudged, run, session_of

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


# Writing models.


def test_the_model_is_the_formula() -> None:
    weights = layers(1)
    file, features = model(weights), rows(50)
    found = run(file, features=features)["score"]
    assert found.shape == (50, 1)
    np.testing.assert_allclose(found, scores_by_hand(weights, features), atol=1e-6)
    assert model(weights) == file


def test_the_model_says_what_it_is() -> None:
    info = graphs.inspect(model(layers(1)), "fraud")
    (features,), (score,) = info.inputs, info.outputs
    assert (features.name, features.dtype, features.shape) == ("features", "float32", (-1, FEATURES))
    assert (score.name, score.dtype, score.shape) == ("score", "float32", (-1, 1))
    weights = sum(weight.size + bias.size for weight, bias in layers(1))
    assert (info.opset, info.parameters) == (17, weights + 2 * FEATURES)
    graphs.require_features(info, FEATURES, "fraud")


@pytest.mark.parametrize("broken", ["chain", "bias", "nan", "outputs", "mean", "scale", "none"])
def test_weights_that_make_no_model_are_malformed(broken: str) -> None:
    weights, (mean, scale) = layers(1), normalisation()
    if broken == "chain":
        weights[1] = (weights[1][0][:-1], weights[1][1])
    elif broken == "bias":
        weights[1] = (weights[1][0], weights[1][1][:-1])
    elif broken == "nan":
        weights[0][0][0, 0] = np.nan
    elif broken == "outputs":
        weights = weights[:-1]
    elif broken == "mean":
        mean = mean[:-1]
    elif broken == "scale":
        scale[2] = 0
    else:
        weights = []
    with pytest.raises(Malformed):
        graphs.mlp_model(weights, mean, scale)


# The training step.


def flat(weights: Layers) -> np.ndarray:
    return np.concatenate([part.ravel() for layer in weights for part in layer])


def loss_by_hand(parameters: np.ndarray, features: np.ndarray, labels: np.ndarray, positive: float) -> float:
    """Float64, in the textbook form."""
    weights, start = [], 0
    for inputs, outputs in pairwise(SIZES):
        weight = parameters[start : start + inputs * outputs].reshape(inputs, outputs)
        start += inputs * outputs
        weights.append((weight, parameters[start : start + outputs]))
        start += outputs
    p = scores_by_hand(weights, features)[:, 0]
    return float(np.mean(-positive * labels * np.log(p) - (1 - labels) * np.log(1 - p)))


def test_one_step_follows_the_numerical_gradient() -> None:
    positive = 5.0
    graph = graphs.mlp_training_graph(SIZES, *normalisation(), positive)
    parameters, features = flat(layers(2)), rows(40, 1)
    labels = (np.random.default_rng(2).random(40) < 0.3).astype(np.float32)
    # A rate of 1 makes `parameters - updated` the gradient itself.
    found = run(graph, parameters=parameters, features=features, labels=labels, learning_rate=np.array(1, np.float32))
    exact = parameters.astype(np.float64)
    gradient, step = np.empty_like(exact), 1e-6
    for index in range(len(exact)):
        up, down = exact.copy(), exact.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (
            loss_by_hand(up, features, labels, positive) - loss_by_hand(down, features, labels, positive)
        ) / (2 * step)
    np.testing.assert_allclose(parameters - found["updated"], gradient, atol=1e-5)
    assert found["loss"] == pytest.approx(loss_by_hand(exact, features, labels, positive), abs=1e-5)


@pytest.mark.parametrize("count", [1, 7, 64])
def test_the_rate_scales_the_step_and_any_batch_fits(count: int) -> None:
    session = session_of(graphs.mlp_training_graph(SIZES, *normalisation(), 2.0))
    parameters = flat(layers(2))
    steps = []
    for rate in (0.0, 0.1, 0.2):
        updated, _ = session.run(
            ["updated", "loss"],
            {
                "parameters": parameters,
                "features": rows(count),
                "labels": (np.arange(count) % 2).astype(np.float32),
                "learning_rate": np.array(rate, np.float32),
            },
        )
        steps.append(parameters - updated)
    assert (steps[0] == 0).all()
    np.testing.assert_allclose(steps[2], 2 * steps[1], atol=1e-6)


def test_a_certain_wrong_answer_has_a_finite_loss_and_gradient() -> None:
    weights = [(weight * 100, bias) for weight, bias in layers(3)]
    graph = graphs.mlp_training_graph(SIZES, *normalisation(), 10.0)
    for label in (0.0, 1.0):
        found = run(
            graph,
            parameters=flat(weights),
            features=rows(16) * 50,
            labels=np.full(16, label, np.float32),
            learning_rate=np.array(0.1, np.float32),
        )
        assert np.isfinite(found["loss"])
        assert np.isfinite(found["updated"]).all()


def test_training_lowers_the_loss() -> None:
    session = session_of(graphs.mlp_training_graph(SIZES, *normalisation(), 1.0))
    features = rows(256)
    labels = (features[:, 0] + features[:, 1] > 0).astype(np.float32)
    parameters, losses = flat(layers(4)), []
    for _ in range(200):
        parameters, loss = session.run(
            ["updated", "loss"],
            {
                "parameters": parameters,
                "features": features,
                "labels": labels,
                "learning_rate": np.array(0.1, np.float32),
            },
        )
        losses.append(float(loss))
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize(
    ("sizes", "positive"), [((FEATURES,), 1.0), ((FEATURES, 4, 2), 1.0), (SIZES, 0.0), (SIZES, -1)]
)
def test_a_training_graph_of_nonsense_is_malformed(sizes: tuple[int, ...], positive: float) -> None:
    with pytest.raises(Malformed):
        graphs.mlp_training_graph(sizes, *normalisation(), positive)


# Quantizing.


def test_quantized_weights_rebuild_from_the_file() -> None:
    weights = layers(1)
    quantized = graphs.quantize_weights(model(weights))
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
    quantized = graphs.quantize_weights(file)
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
    parent = graphs.quantize_weights(model(weights))
    grown = nudged(weights, 2)
    grown[1][0][:, 3] *= 2  # one channel leaves its range
    child = graphs.quantize_weights(model(grown), parent)
    fresh = graphs.quantize_weights(model(grown))
    assert len(child) == len(parent)

    def scales(file: bytes, index: int) -> np.ndarray:
        return next(read_tensor(file, t) for t in stored_tensors(file) if t.name == f"layer{index}.weight_scale")

    changed = np.concatenate([scales(parent, i) != scales(child, i) for i in range(3)])
    assert changed.sum() == 1
    assert scales(child, 1)[3] == scales(fresh, 1)[3]


@pytest.mark.parametrize("parent", [b"", b"not a model", b"same layout, other shape"])
def test_a_parent_that_does_not_fit_is_ignored(parent: bytes) -> None:
    if parent.startswith(b"same"):
        parent = graphs.quantize_weights(model(layers(1, (FEATURES, 8, 12, 1))))
    file = model(layers(1))
    assert graphs.quantize_weights(file, parent) == graphs.quantize_weights(file)


def test_integers_stand_behind_everything_else() -> None:
    dtypes = [tensor.dtype for tensor in stored_tensors(graphs.quantize_weights(model(layers(1))))]
    assert dtypes.index("int8") == len(dtypes) - dtypes.count("int8")


@pytest.mark.parametrize("format_", ["bsdiff40", "tp1"])
def test_a_parent_in_another_order_aligns_by_name(format_: str) -> None:
    weights = layers(1, (FEATURES, 256, 128, 1))
    source, moved = model(weights), model(nudged(weights, 2, 1e-4))
    parent = graphs.quantize_weights(source)
    proto = onnx.ModelProto.FromString(parent)
    named = {tensor.name: tensor for tensor in proto.graph.initializer}
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(named[name] for name in sorted(named))  # weights, scales and biases in turn
    earlier = proto.SerializeToString(deterministic=True)
    assert earlier != parent
    child = graphs.quantize_weights(moved, earlier, source)
    assert child == graphs.quantize_weights(moved, parent, source)
    patch = container.make(format_, earlier, child)
    assert container.apply_bytes(earlier, patch, len(child)) == child
    assert len(patch) < len(container.make(format_, parent, child)) + 300


def test_quantizing_is_deterministic_and_happens_once() -> None:
    file = model(layers(1))
    quantized = graphs.quantize_weights(file)
    assert graphs.quantize_weights(file) == quantized
    assert graphs.quantize_weights(quantized) is quantized
    assert graphs.inspect(quantized, "q").inputs == graphs.inspect(file, "f").inputs


@pytest.mark.parametrize(("operator", "attributes"), [("MatMul", {}), ("Gemm", {}), ("Gemm", {"transB": 1})])
def test_the_output_channel_is_found(operator: str, attributes: dict[str, int]) -> None:
    proto = matmul_model(operator=operator, **attributes)
    features = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
    before = run(proto.SerializeToString(), features=features)["score"]
    quantized = graphs.quantize_weights(proto.SerializeToString())
    assert any(tensor.dtype == "int8" for tensor in stored_tensors(quantized))
    np.testing.assert_allclose(run(quantized, features=features)["score"], before, atol=0.1)
    weight = numpy_helper.to_array(proto.graph.initializer[0])
    scale = next(read_tensor(quantized, t) for t in stored_tensors(quantized) if t.name == "w_scale")
    np.testing.assert_allclose(scale, np.abs(weight).max(axis=1 if attributes else 0) / 127, rtol=1e-6)


def test_tensors_of_types_that_numpy_lacks_stay_as_they_are() -> None:
    proto = matmul_model()
    odd = [helper.make_tensor("text", TensorProto.STRING, [1], [b"x"]), helper.make_tensor("half", 16, [2], [1.0, 2.5])]
    proto.graph.initializer.extend(odd)
    quantized = onnx.ModelProto.FromString(graphs.quantize_weights(proto.SerializeToString()))
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
    assert graphs.quantize_weights(file) is file


def test_a_model_older_than_per_channel_dequantizing_passes_through() -> None:
    file = matmul_model(opset=12).SerializeToString()
    assert graphs.quantize_weights(file) is file


# Fixed activation scales.


def observing(features: np.ndarray) -> graphs.Observe:
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
    made = graphs.quantize(file, form="static", calibration=observing(rows(500)))
    assert made.tensors == 3
    assert graphs.form_of(made.file) == ("static", True)
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
    made = graphs.quantize(file, form="static", calibration=observing(features))
    answered, _ = answers_with_integers(made.file, tmp_path, features=features)
    np.testing.assert_allclose(answered, run(file, features=features)["score"], atol=0.1)


def test_weights_follow_the_parent_and_activations_do_not() -> None:
    weights = layers(1, (FEATURES, 64, 32, 1))
    source, moved = model(weights), model(nudged(weights, 2, 1e-4))
    parent = graphs.quantize(source, form="static", calibration=observing(rows(100))).file
    made = graphs.quantize(moved, parent, source, form="static", calibration=observing(3 * rows(100)))
    assert made.moved is not None
    assert (0 < made.moved < 0.05, made.rescaled) == (True, 0)
    before, after = ({t.name: read_tensor(file, t) for t in stored_tensors(file)} for file in (parent, made.file))
    assert before.keys() == after.keys()
    for name, value in before.items():
        if name.endswith("_activation_scale"):
            assert after[name] > 2 * value
    fresh = graphs.quantize(moved, form="static", calibration=observing(3 * rows(100))).file
    share = fidelity.carried(graphs.weight_changes(moved, made.file, fresh, source, parent))
    assert share.moved
    assert not fidelity.refusals(fidelity.Fidelity(carried=share))
    assert graphs.quantize(made.file, form="static").file is made.file  # it happens once


def test_ranges_that_are_none_are_malformed() -> None:
    file = model(layers(1))
    with pytest.raises(Malformed, match="expected calibration rows"):
        graphs.quantize(file, form="static")
    with pytest.raises(Malformed, match="expected a finite range"):
        graphs.quantize(file, form="static", calibration=observing(np.full((3, FEATURES), np.inf, np.float32)))
    with pytest.raises(Malformed, match="found none"):
        graphs.quantize(file, form="static", calibration=lambda graph: {})


def test_an_activation_that_is_always_zero_has_a_scale() -> None:
    scale, zero = quantization.activation_scale(0.0, 0.0)
    assert scale > 0
    assert zero == 0
    assert quantization.activation_scale(-2.55, 0.0) == (np.float32(0.01), 255)
    assert quantization.activation_scale(5.1, 10.2)[1] == 0  # 0 is a level even where it was not seen


# Looking into files that users bring.


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "an empty file"),
        (b"Time,V1,V2,Amount,Class\n1,2,3\n", "plain text"),
        (b"PK\x03\x04" + bytes(50), "a zip archive"),
        (b"\x80\x04\x95" + bytes(20), "a Python pickle"),
        (b'{"weights": []}', "JSON"),
        (b"\x1c\x00\x00\x00TFL3" + bytes(30), "a TensorFlow Lite model"),
        (b"\xff" * 99, "99 bytes of something else"),
    ],
)
def test_a_file_that_is_no_onnx_model_is_named_in_one_line(data: bytes, found: str) -> None:
    with pytest.raises(Malformed) as failure:
        graphs.inspect(data, "model.bin")
    message = str(failure.value)
    assert message.startswith("model.bin: expected an ONNX model, found ")
    assert found in message
    assert "; export it with " in message
    assert "\n" not in message


@pytest.mark.parametrize("keep", [10, 100, 1000, -1])
def test_a_cut_off_model_is_called_so(keep: int) -> None:
    with pytest.raises(Malformed, match=r"m\.onnx: expected an ONNX model, found a damaged or cut-off one"):
        graphs.inspect(model(layers(1))[:keep], "m.onnx")


def test_an_invalid_graph_is_one_line() -> None:
    proto = matmul_model()
    proto.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(Malformed, match="found an invalid one") as failure:
        graphs.inspect(proto.SerializeToString(), "m.onnx")
    assert "NoSuchOperator" in str(failure.value)
    assert "\n" not in str(failure.value)


def _elsewhere(name: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "secret.bin"), ("offset", "0"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    return tensor


@pytest.mark.parametrize("place", ["constant", "branch", "function"])
def test_no_corner_of_a_model_reads_a_file_of_the_machine_that_opens_it(place: str) -> None:
    vector = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])]
    constant = helper.make_node("Constant", [], ["y"], value=_elsewhere("hidden"))
    functions = []
    if place == "constant":
        graph = helper.make_graph([constant], "g", [], vector)
    elif place == "branch":
        same = helper.make_node("Identity", ["hidden"], ["y"])
        branch = helper.make_graph([same], "b", [], vector, [_elsewhere("hidden")])
        choose = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
        graph = helper.make_graph([choose], "g", [], vector, [numpy_helper.from_array(np.array(True), "c")])
    else:
        functions = [helper.make_function("own", "F", [], ["y"], [constant], [helper.make_opsetid("", 17)])]
        graph = helper.make_graph([helper.make_node("F", [], ["y"], domain="own")], "g", [], vector)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=9, functions=functions)
    with pytest.raises(Malformed, match=r"weights kept in another file \('hidden'\)"):
        graphs.inspect(proto.SerializeToString(), "m.onnx")


def test_external_weights_are_refused(tmp_path: Path) -> None:
    onnx.save(matmul_model(), str(tmp_path / "m.onnx"), save_as_external_data=True, size_threshold=0, location="w.bin")
    with pytest.raises(Malformed, match=r"weights kept in another file \('w'\); export it with external_data=False"):
        graphs.inspect((tmp_path / "m.onnx").read_bytes(), "m.onnx")


def test_a_model_that_does_not_fit_the_features_is_told_what_would() -> None:
    info = graphs.inspect(model(layers(1)), "m.onnx")
    with pytest.raises(Malformed) as failure:
        graphs.require_features(info, 24, "m.onnx")
    assert "expected the one input 'features' float32[batch, 24], found 'features' float32[?, 6]" in str(failure.value)
    with pytest.raises(
        Malformed, match=r"expected an output 'score' float32\[batch, 1\], found 'score' float32\[\?, 4\]"
    ):
        graphs.require_features(graphs.inspect(matmul_model().SerializeToString(), "m.onnx"), 4, "m.onnx")


def test_a_fixed_batch_is_refused() -> None:
    proto = matmul_model()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    with pytest.raises(Malformed, match=r"found 'features' float32\[1, 4\]"):
        graphs.require_features(graphs.inspect(proto.SerializeToString(), "m.onnx"), 4, "m.onnx")


# A version that must not be released.


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("shift", [-3.0, 2.0, 4.0])
def test_a_faulty_variant_keeps_the_order_and_moves_the_scores(quantized: bool, shift: float) -> None:
    file = model(layers(1))
    file = graphs.quantize_weights(file) if quantized else file
    features = rows(300)
    before = run(file, features=features)["score"][:, 0]
    after = run(graphs.faulty_variant(file, shift, 3), features=features)["score"]
    assert after.shape == (300, 1)
    assert (np.diff(after[np.argsort(before), 0]) >= 0).all()
    odds = np.clip(before.astype(np.float64), 1e-7, 1 - 1e-7)
    np.testing.assert_allclose(after[:, 0], 1 / (1 + np.exp(-np.log(odds / (1 - odds)) - shift)), atol=1e-6)


def test_a_faulty_variant_goes_through_publishing_as_a_small_patch() -> None:
    """Made from the float32 file, then quantized with the good version's scales, as a publisher would."""
    file, features = model(layers(1, (FEATURES, 256, 64, 1))), rows(100)
    good = graphs.quantize_weights(file)
    bad = graphs.quantize_weights(graphs.faulty_variant(file, 2.0, 4), good)
    before, after = run(good, features=features)["score"], run(bad, features=features)["score"]
    assert (np.diff(after[np.argsort(before[:, 0]), 0]) >= 0).all()
    assert after.mean() > before.mean() + 0.1
    assert len(make_patch(good, bad)) < len(good) / 10


def test_a_faulty_variant_of_certain_scores_stays_finite() -> None:
    weights = [(weight * 1000, bias) for weight, bias in layers(1)]
    found = run(graphs.faulty_variant(model(weights), 3.0, 1), features=rows(50) * 100)["score"]
    assert np.isfinite(found).all()
    assert found.min() >= 0
    assert found.max() <= 1


def test_a_faulty_variant_is_small_slow_and_accepted() -> None:
    file = model(layers(1))
    slow = graphs.faulty_variant(file, 2.0, 60)
    assert len(slow) < len(file) + 8_000
    graphs.require_features(graphs.inspect(slow, "slow"), FEATURES, "slow")
    sessions, one = [session_of(file), session_of(slow)], rows(1)
    best = []
    for session in sessions:
        times = []
        for _ in range(30):
            start = time.perf_counter()
            session.run(["score"], {"features": one})
            times.append(time.perf_counter() - start)
        best.append(min(times))
    assert best[1] > 5 * best[0]


def test_no_faulty_variant_of_another_kind_of_model() -> None:
    with pytest.raises(Malformed):
        graphs.faulty_variant(matmul_model().SerializeToString(), 1.0, 1)


def test_telemetry_is_off_in_this_process() -> None:
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"


# Dynamic quantization: integers multiplied.


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
    made = graphs.quantize(file, form="dynamic", per_channel=per_channel)
    stored = {tensor.name: tensor for tensor in stored_tensors(made.file)}
    assert {name for name, tensor in stored.items() if tensor.dtype == "int8"} == {"table", "w1", "w2"}
    assert stored["w1_scale"].shape == ((32,) if per_channel else ())
    assert (made.tensors, made.scales) == (3, 16 + 32 + 2 if per_channel else 3)
    assert graphs.form_of(made.file) == ("dynamic", per_channel)
    ids = np.arange(50)
    exact = np.maximum(tensors["table"][ids] @ tensors["w1"] + tensors["b1"], 0.01) @ tensors["w2"] + tensors["b2"]
    found = run(made.file, ids=ids)["score"]
    assert np.abs(found - exact).max() < 0.05 * np.abs(exact).max()
    assert np.abs(found - exact).max() > 0


def test_a_small_update_of_a_dynamic_model_follows_its_parent() -> None:
    file, _ = encoder_like()
    parent = graphs.quantize(file, form="dynamic")
    proto = onnx.ModelProto.FromString(file)
    for tensor in proto.graph.initializer:
        if tensor.name in ("w2", "b1"):
            value = numpy_helper.to_array(tensor) * np.float32(1.01)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    updated = proto.SerializeToString()
    child = graphs.quantize(updated, parent.file, file, form="dynamic")
    assert (child.rescaled, len(child.file)) == (0, len(parent.file))
    assert child.moved is not None
    assert 0 < child.moved < 0.1
    before = {t.name: read_tensor(parent.file, t).tobytes() for t in stored_tensors(parent.file)}
    after = {t.name: read_tensor(child.file, t).tobytes() for t in stored_tensors(child.file)}
    assert {name for name in before if before[name] != after[name]} == {"w2", "b1"}
    fresh = graphs.quantize(updated, form="dynamic")
    changes = {
        change.name: change for change in graphs.weight_changes(updated, child.file, fresh.file, file, parent.file)
    }
    assert set(changes) == {"table", "w1", "w2"}
    assert not changes["w1"].float32.any()
    assert changes["w2"].int8.any()


def test_a_table_that_something_else_reads_stays_float() -> None:
    file, _ = encoder_like()
    proto = onnx.ModelProto.FromString(file)
    proto.graph.node.append(helper.make_node("ReduceSum", ["table"], ["total"]))
    proto.graph.output.append(helper.make_tensor_value_info("total", TensorProto.FLOAT, [1, 1]))
    made = graphs.quantize(proto.SerializeToString(), form="dynamic")
    assert {tensor.name for tensor in stored_tensors(made.file) if tensor.dtype == "int8"} == {"w1", "w2"}


def test_a_transposing_product_is_dequantized_instead() -> None:
    file = matmul_model(operator="Gemm", transB=1).SerializeToString()
    made = graphs.quantize(file, form="dynamic")
    features = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
    assert "MatMulInteger" not in operators(made.file)
    np.testing.assert_allclose(
        run(made.file, features=features)["score"], run(file, features=features)["score"], atol=0.1
    )
