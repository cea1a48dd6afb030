"""Training steps of torch models against torch itself. torch is an extra: without it these tests are skipped."""

from __future__ import annotations

import importlib.util
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from edge_runtime.onnx_model import run_graph
from edge_runtime.training import train
from model_delta.errors import Malformed
from model_delta.graphs.torch_step import torch_training_graph
from model_delta.graphs.training import require_equal_step, step_of
from model_delta.task import Parameter, RoundTask
from tests.model_delta.models import run, session_of

PRESENT = importlib.util.find_spec("torch") is not None
needs_torch = pytest.mark.skipif(not PRESENT, reason="torch is not installed (the extra atoll[train])")


def perceptron(*sizes: int) -> Any:
    import torch
    from torch import nn

    torch.manual_seed(0)
    parts: list[Any] = []
    for wide, narrow in pairwise(sizes):
        parts += [nn.Linear(wide, narrow), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def weighted(logits: Any, labels: Any) -> Any:
    import torch

    weight = torch.tensor(6.0)
    return torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 0], labels, pos_weight=weight)


@pytest.mark.skipif(PRESENT, reason="torch is installed")
def test_without_torch_the_extra_is_named() -> None:
    with pytest.raises(Malformed, match=r"torch is not installed: pip install 'atoll\[train\]'"):
        torch_training_graph(None, weighted, 4, momentum=True)


@needs_torch
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_step_of_the_fraud_perceptron_is_torchs_step_and_small() -> None:
    from torch import nn

    module = perceptron(32, 64, 32, 1)
    graph, trainer, start = torch_training_graph(module, weighted, 32, momentum=True)
    step = step_of(graph, "step.onnx")
    assert [one.tensor for one in step.tensors] == [name for name, _ in module.named_parameters()]
    np.testing.assert_array_equal(start, nn.utils.parameters_to_vector(module.parameters()).detach().numpy())
    assert require_equal_step(lambda i: run(graph, **i), trainer, step, start) <= 1e-6
    assert len(graph) <= 5_000


@needs_torch
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_many_steps_are_those_of_torchs_own_optimizer(momentum: float) -> None:
    import torch

    module = perceptron(8, 16, 1)
    graph, _, start = torch_training_graph(module, weighted, 8, momentum=momentum > 0)
    session, rng = session_of(graph), np.random.default_rng(1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=momentum)
    held = {"parameters": start, "velocity": np.zeros_like(start)}
    for count in (32, 7, 1, 32, 32):
        x = rng.standard_normal((count, 8)).astype(np.float32)
        y = (rng.random(count) < 0.4).astype(np.float32)
        inputs = {"parameters": held["parameters"], "features": x, "labels": y, "learning_rate": np.float32(0.05)}
        if momentum:
            inputs |= {"velocity": held["velocity"], "momentum": np.float32(momentum)}
        inputs = {name: np.asarray(value, np.float32) for name, value in inputs.items()}
        names = [value.name for value in session.get_outputs()]
        found = dict(zip(names, session.run(names, inputs), strict=True))
        optimizer.zero_grad()
        loss = weighted(module(torch.from_numpy(x)), torch.from_numpy(y))
        loss.backward()
        optimizer.step()
        expected = torch.nn.utils.parameters_to_vector(module.parameters()).detach().numpy()
        np.testing.assert_allclose(found["updated"], expected, atol=2e-6)
        assert float(found["loss"]) == pytest.approx(float(loss), abs=1e-6)
        held = {"parameters": found["updated"], "velocity": found.get("updated_velocity", held["velocity"])}


@needs_torch
def test_models_that_a_round_cannot_train_are_refused() -> None:
    from torch import nn

    with pytest.raises(Malformed, match=r"expected parameters and no buffers, found 4 and \['1.running_mean'"):
        torch_training_graph(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), weighted, 4, momentum=True)
    frozen = perceptron(4, 4, 1)
    frozen[0].weight.requires_grad = False
    with pytest.raises(Malformed, match=r"float32 parameters that are trained, found otherwise '0.weight'"):
        torch_training_graph(frozen, weighted, 4, momentum=True)
    with pytest.raises(Malformed, match="cannot be exported"):
        torch_training_graph(perceptron(4, 1), lambda logits, labels: logits.nonsense(), 4, momentum=True)


@needs_torch
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_dropout_is_refused_unless_it_is_off() -> None:
    from torch import nn

    module = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 1))
    with pytest.raises(Malformed, match="random numbers"):
        torch_training_graph(module, weighted, 8, momentum=True)
    graph, trainer, start = torch_training_graph(module.eval(), weighted, 8, momentum=True)
    assert require_equal_step(lambda i: run(graph, **i), trainer, step_of(graph, "step.onnx"), start) <= 1e-6


@needs_torch
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_device_trains_what_torch_published_as_torch_would() -> None:
    import torch
    from torch import nn

    module = perceptron(8, 16, 1)
    graph, _, _ = torch_training_graph(module, weighted, 8, momentum=True)
    published = torch.onnx.export(
        nn.Sequential(*module, nn.Sigmoid()),
        (torch.zeros(3, 8),),
        dynamo=True,
        input_names=["features"],
        output_names=["score"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
        external_data=False,
    )
    tensors = step_of(graph, "step.onnx").tensors
    task = RoundTask(
        tenant="acme",
        model="fraud",
        round_id="r",
        base="",
        training_graph="",
        parameters=tuple(Parameter(one.tensor, one.shape) for one in tensors),
        length=sum(one.length for one in tensors),
        steps=4,
        batch_size=32,
        clip_norm_l2=100.0,
        issued=0,
        deadline=1,
        momentum=0.9,
    )
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((32, 8)).astype(np.float32), (rng.random(32) < 0.4).astype(np.float32)
    file = published.model_proto.SerializeToString()
    found = train(file, task, graph, x, y, np.zeros(0, np.float32), rng, run_graph)
    before = nn.utils.parameters_to_vector(module.parameters()).detach().numpy().copy()
    optimizer = torch.optim.SGD(module.parameters(), lr=task.learning_rate, momentum=0.9)
    for _ in range(task.steps):
        optimizer.zero_grad()
        weighted(module(torch.from_numpy(x)), torch.from_numpy(y)).backward()
        optimizer.step()
    after = nn.utils.parameters_to_vector(module.parameters()).detach().numpy()
    np.testing.assert_allclose(found.update, after - before, atol=2e-6)
    assert found.loss_after < found.loss_before
