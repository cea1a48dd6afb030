"""An exporter's graph made into a training graph, and what is not one."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from model_delta.errors import Malformed
from model_delta.graphs.mlp import mlp_training_graph
from model_delta.graphs.training import (
    GRAPH_BYTES_MAX,
    TRAINED,
    Trained,
    TrainingStep,
    contracted,
    flat,
    require_equal_step,
    step_of,
)
from tests.model_delta.graphs.samples import SIZES
from tests.model_delta.models import FEATURES, layers, normalisation, run

TENSORS = tuple(
    Trained(f"body.{place}.{kind}", tuple(part.shape))
    for place, layer in enumerate(layers(2, SIZES))
    for kind, part in zip(("weight", "bias"), layer, strict=True)
)
START = flat(part for layer in layers(2, SIZES) for part in layer)


def own(momentum: bool = True) -> bytes:
    return mlp_training_graph(SIZES, *normalisation(), 5.0, momentum=momentum)


def step(momentum: bool = True) -> TrainingStep:
    return TrainingStep(TENSORS, FEATURES, momentum)


def exported(momentum: bool = True) -> onnx.ModelProto:
    """Our own step as an exporter would hand it over: other names, in the order of a step, with notes everywhere."""
    model = onnx.load_model_from_string(own(momentum))
    graph = model.graph
    ports = {value.name: value for value in (*graph.input, *graph.output)}
    inputs, outputs = ([ports[name] for name in names] for names in (step(momentum).inputs, step(momentum).outputs))
    renamed = {name: f"a_long_name_of_{name}" for name in ports}
    for node in graph.node:
        node.doc_string = "File /home/somebody/secret.py, line 7"
        node.name = f"node_of_{node.output[0]}"
        node.metadata_props.add(key="namespace", value="somebody.else")
        for edges in (node.input, node.output):
            for index, name in enumerate(edges):
                edges[index] = renamed.get(name, name)
    made = helper.make_graph(
        list(graph.node),
        "exported",
        [helper.make_tensor_value_info(renamed[value.name], TensorProto.FLOAT, None) for value in inputs],
        [helper.make_tensor_value_info(renamed[value.name], TensorProto.FLOAT, None) for value in outputs],
        [*graph.initializer, numpy_helper.from_array(np.zeros(1000, np.float32), "unused")],
        value_info=[helper.make_tensor_value_info("a0", TensorProto.FLOAT, ["n", FEATURES])],
    )
    return helper.make_model(made, opset_imports=model.opset_import, ir_version=model.ir_version)


@pytest.mark.parametrize("momentum", [True, False])
def test_an_exported_step_becomes_a_training_graph(momentum: bool) -> None:
    made = contracted(exported(momentum), step(momentum))
    assert step_of(made, "step.onnx") == step(momentum)
    assert require_equal_step(lambda i: run(made, **i), lambda i: run(own(momentum), **i), step(momentum), START) == 0
    for note in (b"somebody", b"secret", b"unused", b"a_long_name", b"node_of"):
        assert note not in made
    assert len(made) < len(own(momentum)) + 500
    assert contracted(exported(momentum), step(momentum)) == made


def test_a_step_that_is_not_the_trainers_is_refused_with_the_numbers() -> None:
    def other(inputs: Any) -> Any:
        return run(own(), **{**inputs, "learning_rate": np.array(0.06, np.float32)})

    with pytest.raises(Malformed, match=r"expected one step within 1e-06 .*, found 0\.\d+ in updated for"):
        require_equal_step(lambda i: run(own(), **i), other, step(), START)
    with pytest.raises(Malformed, match="found inf in loss"):
        require_equal_step(
            lambda i: {**run(own(), **i), "loss": np.float32(np.nan)}, lambda i: run(own(), **i), step(), START
        )
    with pytest.raises(Malformed, match=r"loss: expected shape \(\), found \(1,\)"):
        require_equal_step(lambda i: {**run(own(), **i), "loss": np.zeros(1)}, lambda i: run(own(), **i), step(), START)


def test_what_an_exporter_must_not_hand_over() -> None:
    with pytest.raises(Malformed, match="expected 6 inputs and 3 outputs, found 4 and 2"):
        contracted(exported(False), step(True))
    foreign = exported()
    foreign.graph.node[0].domain = "com.somebody"
    with pytest.raises(Malformed, match="operators of ONNX alone"):
        contracted(foreign, step())
    branch = exported()
    branch.graph.node[0].attribute.append(helper.make_attribute("then_branch", branch.graph))
    with pytest.raises(Malformed, match="no branches or loops"):
        contracted(branch, step())


def listed(model: onnx.ModelProto, text: str) -> bytes:
    helper.set_model_props(model, {TRAINED: text})
    return model.SerializeToString()


@pytest.mark.parametrize("wrong", ["long", "nothing", "unlisted", "list", "empty", "length", "width", "integers"])
def test_what_is_no_training_graph_is_refused_in_one_line(wrong: str) -> None:
    good = onnx.load_model_from_string(contracted(exported(), step()))
    text = good.metadata_props[0].value
    message = "step.onnx: expected"
    if wrong == "long":
        data = bytes(GRAPH_BYTES_MAX + 1)
    elif wrong == "nothing":
        data = b"nothing"
    elif wrong == "unlisted":
        data, message = own(), "make it with `atoll model training-graph`"
    elif wrong == "list":
        data = listed(good, "{")
    elif wrong == "empty":
        data = listed(good, "[]")
    elif wrong == "length":
        data, message = listed(good, text.replace("32", "31", 1)), r"expected the inputs .*found"
    elif wrong == "width":
        good.graph.input[1].type.tensor_type.shape.dim[1].dim_param = "any"
        data = good.SerializeToString()
    else:
        good.graph.input[2].type.tensor_type.elem_type = TensorProto.INT64
        data = good.SerializeToString()
    with pytest.raises(Malformed, match=message) as refused:
        step_of(data, "step.onnx")
    assert "\n" not in str(refused.value)
