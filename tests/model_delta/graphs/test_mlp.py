"""The fraud model and its training step against onnxruntime and plain NumPy."""

from __future__ import annotations

import os
from itertools import pairwise

import numpy as np
import pytest

from model_delta.errors import Malformed
from model_delta.graphs.mlp import mlp_model, mlp_training_graph
from tests.model_delta.graphs.samples import SIZES, rows, scores_by_hand
from tests.model_delta.models import FEATURES, Layers, layers, model, normalisation, run, session_of


def test_the_model_is_the_formula() -> None:
    weights = layers(1)
    file, features = model(weights), rows(50)
    found = run(file, features=features)["score"]
    assert found.shape == (50, 1)
    np.testing.assert_allclose(found, scores_by_hand(weights, features), atol=1e-6)
    assert model(weights) == file


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
        mlp_model(weights, mean, scale)


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
    graph = mlp_training_graph(SIZES, *normalisation(), positive)
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


def step_by_hand(
    parameters: np.ndarray, velocity: np.ndarray, features: np.ndarray, labels: np.ndarray, rate: float, m: float
) -> tuple[np.ndarray, np.ndarray]:
    """A step of SGD with momentum in float64, backwards through the layers; positive weight 5."""
    mean, scale = normalisation()
    weights, start = [], 0
    for inputs, outputs in pairwise(SIZES):
        weights.append(parameters[start : start + inputs * outputs].reshape(inputs, outputs).astype(np.float64))
        start += inputs * outputs
        weights.append(parameters[start : start + outputs].astype(np.float64))
        start += outputs
    activations = [(features.astype(np.float64) - mean) / scale]
    for w, b in zip(weights[:-2:2], weights[1:-2:2], strict=True):
        activations.append(np.maximum(activations[-1] @ w + b, 0))
    p = 1 / (1 + np.exp(-(activations[-1] @ weights[-2] + weights[-1])[:, 0]))
    back = ((1 - labels) * p - 5 * labels * (1 - p))[:, None] / len(labels)
    gradients: list[np.ndarray] = []
    for layer in reversed(range(len(activations))):
        gradients = [(activations[layer].T @ back).ravel(), back.sum(axis=0), *gradients]
        back = (back @ weights[2 * layer].T) * (activations[layer] > 0)
    velocity = m * velocity + np.concatenate(gradients)
    return parameters - rate * velocity, velocity


@pytest.mark.parametrize("labels", [np.float32([0, 1] * 16), np.linspace(0, 1, 32, dtype=np.float32)])
def test_momentum_is_the_heavy_ball(labels: np.ndarray) -> None:
    session = session_of(mlp_training_graph(SIZES, *normalisation(), 5.0, momentum=True))
    parameters, velocity = flat(layers(2)), np.zeros(len(flat(layers(2))), np.float32)
    exact, exact_velocity = parameters.astype(np.float64), velocity.astype(np.float64)
    for step in range(3):
        features = rows(32, step)
        inputs = {
            "parameters": parameters,
            "velocity": velocity,
            "features": features,
            "labels": labels,
            "learning_rate": np.array(0.05, np.float32),
            "momentum": np.array(0.9, np.float32),
        }
        parameters, velocity, loss = session.run(["updated", "updated_velocity", "loss"], inputs)
        before = exact
        exact, exact_velocity = step_by_hand(exact, exact_velocity, features, labels, 0.05, 0.9)
        np.testing.assert_allclose(parameters, exact, atol=1e-6)
        np.testing.assert_allclose(velocity, exact_velocity, atol=3e-6)
        assert loss == pytest.approx(loss_by_hand(before, features, labels, 5.0), abs=1e-5)


def test_without_momentum_the_graph_asks_for_nothing_more() -> None:
    session = session_of(mlp_training_graph(SIZES, *normalisation(), 5.0))
    assert {one.name for one in session.get_inputs()} == {"parameters", "features", "labels", "learning_rate"}
    assert {one.name for one in session.get_outputs()} == {"updated", "loss"}


@pytest.mark.parametrize("count", [1, 7, 64])
def test_the_rate_scales_the_step_and_any_batch_fits(count: int) -> None:
    session = session_of(mlp_training_graph(SIZES, *normalisation(), 2.0))
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
    graph = mlp_training_graph(SIZES, *normalisation(), 10.0)
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
    session = session_of(mlp_training_graph(SIZES, *normalisation(), 1.0))
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
        mlp_training_graph(sizes, *normalisation(), positive)


def test_telemetry_is_off_in_this_process() -> None:
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
