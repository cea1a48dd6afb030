"""A round with a training graph of the operator's own: for a model whose tensors have the trainer's names."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import onnx
import pytest

from fl_coordinator.masters import apply_mean
from fl_coordinator.rounds import RoundSpec
from model_delta.errors import Malformed
from model_delta.graphs.mlp import mlp_training_graph
from model_delta.graphs.training import Trained, TrainingStep, contracted
from model_delta.segments import read_tensor, stored_tensors
from tests.fl_coordinator.learning_platform import Aggregators, Learning, asked, contribute_all, honest
from tests.fl_coordinator.platform_in_memory import FEATURES, Platform, fraud_model, on_a_loop

NAMES = {"layer0.weight": "body.0.w", "layer0.bias": "body.0.b", "layer1.weight": "body.2.w", "layer1.bias": "body.2.b"}
SHAPES = {"body.0.w": (FEATURES, 4), "body.0.b": (4,), "body.2.w": (4, 1), "body.2.b": (1,)}


def somebodys_model(seed: int) -> bytes:
    """Our perceptron, its tensors named as a trainer's."""
    model = onnx.load_model_from_string(fraud_model(seed))
    for tensor in model.graph.initializer:
        tensor.name = NAMES.get(tensor.name, tensor.name)
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = NAMES.get(name, name)
    return bytes(model.SerializeToString())


def somebodys_graph(*, momentum: bool = True, **changed: tuple[int, ...]) -> str:
    shapes = {**SHAPES, **{name.replace("_", "."): shape for name, shape in changed.items()}}
    step = TrainingStep(tuple(Trained(name, shape) for name, shape in shapes.items()), FEATURES, momentum)
    model = onnx.load_model_from_string(
        mlp_training_graph(
            (FEATURES, 4, 1), np.zeros(FEATURES, np.float32), np.ones(FEATURES, np.float32), 6.0, momentum=momentum
        )
    )
    ports = {value.name: value for value in (*model.graph.input, *model.graph.output)}
    for values, names in ((model.graph.input, step.inputs), (model.graph.output, step.outputs)):
        del values[:]
        values.extend(ports[name] for name in names)
    return base64.b64encode(contracted(model, step)).decode()


@on_a_loop
async def test_a_round_trains_the_tensors_that_the_graph_names_and_publishes(tmp_path: Path) -> None:
    at = Learning(tmp_path)
    platform, coordinator, devices = at.platform, at.coordinator, at.devices
    async with platform.running(), at.aggregators.serving():
        first = await coordinator.publish(somebodys_model(0), model="fraud", name="theirs", quantize="none")
        for device in devices:
            device.running = first.manifest
            await device.hello()
        with pytest.raises(Malformed, match=r"needs tensors layer0\.weight"):
            await coordinator.open_round(asked(base=first.manifest))
        opened = await coordinator.open_round(asked(base=first.manifest, graph=somebodys_graph()))
        assert [(one.tensor, one.shape, one.scale) for one in opened.task.parameters] == [
            (name, shape, "") for name, shape in SHAPES.items()
        ]
        assert opened.task.momentum == 0.9
        assert opened.spec.graph == "", "it is in the store"
        assert platform.store.has("artifact", opened.task.training_graph)
        await contribute_all(devices, opened.round_id)
        ended = await at.ended(opened.round_id)
        assert (ended.state, ended.reason) == ("PUBLISHED", "")
        before, after = (platform.publisher.source(digest) for digest in (first.manifest, ended.candidate))
        mean, start = at.mean(ended), 0
        assert np.abs(mean - np.mean([honest(seed) for seed in range(8)], axis=0)).max() < 0.01
        stored = {tensor.name: tensor for tensor in stored_tensors(before)}
        for name, shape in SHAPES.items():
            moved = read_tensor(after, stored[name]) - read_tensor(before, stored[name])
            size = int(np.prod(shape))
            np.testing.assert_allclose(moved.reshape(-1), mean[start : start + size], atol=1e-6)
            start += size


@on_a_loop
async def test_a_graph_that_does_not_go_with_the_round_or_the_model_is_refused(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    Aggregators(platform)
    async with platform.running() as coordinator:
        first = await coordinator.publish(somebodys_model(0), model="fraud", name="theirs", quantize="none")
        for graph, momentum, message in (
            ("nothing!", 0.9, "expected a training graph as base64"),
            (base64.b64encode(b"nothing").decode(), 0.9, "expected an ONNX model"),
            (somebodys_graph(momentum=False), 0.9, "expected one with momentum, as the round's momentum is 0.9"),
            (somebodys_graph(), 0.0, "expected one without momentum"),
            (somebodys_graph(**{"body_0_w": (4, FEATURES)}), 0.9, r"tensor 'body.0.w': expected float32\[4, "),
        ):
            with pytest.raises(Malformed, match=message):
                await coordinator.open_round(
                    RoundSpec(model="fraud", base=first.manifest, graph=graph, momentum=momentum, quorum=8)
                )
        assert platform.ledger.rounds() == []


def test_masters_that_lack_a_trained_tensor_are_refused() -> None:
    with pytest.raises(Malformed, match=r"expected a stored tensor .body\.9\.w., found none"):
        apply_mean(somebodys_model(0), np.zeros(1, np.float32), ["body.9.w"])
