"""Looking into files that users bring."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from model_delta.errors import Malformed
from model_delta.graphs.inspection import inspect, require_features
from tests.model_delta.graphs.samples import matmul_model
from tests.model_delta.models import FEATURES, layers, model


def test_the_model_says_what_it_is() -> None:
    info = inspect(model(layers(1)), "fraud")
    (features,), (score,) = info.inputs, info.outputs
    assert (features.name, features.dtype, features.shape) == ("features", "float32", (-1, FEATURES))
    assert (score.name, score.dtype, score.shape) == ("score", "float32", (-1, 1))
    weights = sum(weight.size + bias.size for weight, bias in layers(1))
    assert (info.opset, info.parameters) == (17, weights + 2 * FEATURES)
    require_features(info, FEATURES, "fraud")


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
        inspect(data, "model.bin")
    message = str(failure.value)
    assert message.startswith("model.bin: expected an ONNX model, found ")
    assert found in message
    assert "; export it with " in message
    assert "\n" not in message


@pytest.mark.parametrize("keep", [10, 100, 1000, -1])
def test_a_cut_off_model_is_called_so(keep: int) -> None:
    with pytest.raises(Malformed, match=r"m\.onnx: expected an ONNX model, found a damaged or cut-off one"):
        inspect(model(layers(1))[:keep], "m.onnx")


def test_an_invalid_graph_is_one_line() -> None:
    proto = matmul_model()
    proto.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(Malformed, match="found an invalid one") as failure:
        inspect(proto.SerializeToString(), "m.onnx")
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
        inspect(proto.SerializeToString(), "m.onnx")


def test_external_weights_are_refused(tmp_path: Path) -> None:
    onnx.save(matmul_model(), str(tmp_path / "m.onnx"), save_as_external_data=True, size_threshold=0, location="w.bin")
    with pytest.raises(Malformed, match=r"weights kept in another file \('w'\); export it with external_data=False"):
        inspect((tmp_path / "m.onnx").read_bytes(), "m.onnx")


def test_a_model_that_does_not_fit_the_features_is_told_what_would() -> None:
    info = inspect(model(layers(1)), "m.onnx")
    with pytest.raises(Malformed) as failure:
        require_features(info, 24, "m.onnx")
    assert "expected the one input 'features' float32[batch, 24], found 'features' float32[?, 6]" in str(failure.value)
    with pytest.raises(
        Malformed, match=r"expected an output 'score' float32\[batch, 1\], found 'score' float32\[\?, 4\]"
    ):
        require_features(inspect(matmul_model().SerializeToString(), "m.onnx"), 4, "m.onnx")


def test_a_fixed_batch_is_refused() -> None:
    proto = matmul_model()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    with pytest.raises(Malformed, match=r"found 'features' float32\[1, 4\]"):
        require_features(inspect(proto.SerializeToString(), "m.onnx"), 4, "m.onnx")
