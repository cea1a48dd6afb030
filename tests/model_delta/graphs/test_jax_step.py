"""Training steps of JAX functions against JAX itself. jax is an extra: without it these tests are skipped."""

from __future__ import annotations

import importlib.util
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from edge_runtime.onnx_model import run_graph
from model_delta.errors import Malformed
from model_delta.graphs.jax_step import jax_training_graph, linear
from model_delta.graphs.training import require_equal_step, step_of

PRESENT = importlib.util.find_spec("jax2onnx") is not None
needs_jax = pytest.mark.skipif(not PRESENT, reason="jax2onnx is not installed (the extra atoll[train-jax])")


def parameters(*sizes: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    made: dict[str, Any] = {}
    for layer, (wide, narrow) in enumerate(pairwise(sizes)):
        made[f"layer{layer}.weight"] = (rng.standard_normal((wide, narrow)) / np.sqrt(wide)).astype(np.float32)
        made[f"layer{layer}.bias"] = np.zeros(narrow, np.float32)
    return made


def loss_with(product: Any) -> Any:
    def loss(held: dict[str, Any], x: Any, y: Any) -> Any:
        import jax
        import jax.numpy as jnp

        layers = len(held) // 2
        for layer in range(layers):
            x = product(x, held[f"layer{layer}.weight"], held[f"layer{layer}.bias"])
            x = jax.nn.relu(x) if layer < layers - 1 else x[:, 0]
        return jnp.mean(6 * y * jax.nn.softplus(-x) + (1 - y) * jax.nn.softplus(x))

    return loss


@pytest.mark.skipif(PRESENT, reason="jax is installed")
def test_without_jax_the_extra_is_named() -> None:
    with pytest.raises(Malformed, match=r"jax\w* is not installed: pip install 'atoll\[train-jax\]'"):
        jax_training_graph(parameters(4, 1), loss_with(linear), 4, momentum=True)


@needs_jax
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("momentum", [True, False])
def test_a_step_is_jaxs_step(momentum: bool) -> None:
    held = parameters(8, 16, 4, 1)
    graph, trainer, start = jax_training_graph(held, loss_with(linear), 8, momentum=momentum)
    step = step_of(graph, "step.onnx")
    assert [(one.tensor, one.shape) for one in step.tensors] == [(name, value.shape) for name, value in held.items()]
    np.testing.assert_array_equal(start, np.concatenate([value.reshape(-1) for value in held.values()]))
    assert require_equal_step(lambda i: run_graph(graph, i), trainer, step, start) <= 1e-6


@needs_jax
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_plain_product_is_refused_somewhere_on_the_way() -> None:
    graph, trainer, start = jax_training_graph(
        parameters(8, 16, 1), loss_with(lambda x, w, b: x @ w + b), 8, momentum=True
    )
    with pytest.raises(Malformed):
        require_equal_step(lambda i: run_graph(graph, i), trainer, step_of(graph, "step.onnx"), start)


@needs_jax
def test_parameters_that_are_not_float32_are_refused() -> None:
    with pytest.raises(Malformed, match="expected float32 arrays by name, found otherwise 'layer0"):
        jax_training_graph({**parameters(4, 1), "layer0.bias": np.zeros(1)}, loss_with(linear), 4, momentum=True)
