"""Trains the built-in fraud model on a historical slice: the version that a fleet starts from.

A multi-layer perceptron with ReLU and one logit, trained in NumPy by Adam (Kingma and Ba, 2015) on class-weighted
binary cross-entropy. The weights, mean and scale it returns are what an ONNX writer needs; nothing here knows
about ONNX.

`train_baseline` distils the same slice into the tiny int4 model that fits a few radio frames (Hinton, Vinyals and Dean,
2015, with the teacher's score as a soft label), rounding the weights during the second half of the training
(straight-through estimator, Bengio, Leonard and Courville, 2013).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from model_delta.baseline import BaselineModel, codes_of_scale, int4_scale, quantized, scale_of_codes, to_int4
from monitoring.quality import average_precision, threshold_for_false_positives

HIDDEN: tuple[int, ...] = (256, 128)
POSITIVE_WEIGHT = 6.0

Float32 = npt.NDArray[np.float32]
Layer = tuple[Float32, Float32]


@dataclass(frozen=True)
class TrainedModel:
    """Layers (W float32[in, out], b float32[out]) over standardized features (x - mean) / scale, and what they reach.

    `average_precision` is on the held-out part; `decision_threshold` declines at most `false_positive_rate` of its
    legitimate payments."""

    weights: tuple[Layer, ...]
    mean: Float32
    scale: Float32
    average_precision: float
    decision_threshold: float
    false_positive_rate: float

    def score(self, features: Float32) -> Float32:
        """Fraud scores in [0, 1]: float32[n] for features float32[n, F]."""
        return score(self.weights, self.mean, self.scale, features)


def score(weights: Sequence[Layer], mean: Float32, scale: Float32, features: Float32) -> Float32:
    """What the model answers: float32[n] in [0, 1] for features float32[n, F]."""
    hidden = (features - mean) / scale
    for weight, bias in weights[:-1]:
        hidden = np.maximum(hidden @ weight + bias, 0.0)
    return sigmoid(np.asarray((hidden @ weights[-1][0] + weights[-1][1])[:, 0], dtype=np.float32))


def sigmoid(logit: Float32) -> Float32:
    """1 / (1 + exp(-x)) without overflow."""
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * logit)), dtype=np.float32)


def standardization(features: Float32) -> tuple[Float32, Float32]:
    """Mean and scale of each column; a column that never changes keeps scale 1."""
    mean = features.mean(axis=0, dtype=np.float64)
    scale = features.std(axis=0, dtype=np.float64)
    return mean.astype(np.float32), np.where(scale > 1e-6, scale, 1.0).astype(np.float32)


def train(
    features: Float32,
    fraud: npt.NDArray[np.bool_],
    *,
    seed: int,
    hidden: Sequence[int] = HIDDEN,
    steps: int = 700,
    batch_size: int = 256,
    learning_rate: float = 2e-3,
    positive_weight: float = POSITIVE_WEIGHT,
    held_out: float = 0.2,
    false_positive_rate: float = 0.01,
    start: TrainedModel | None = None,
) -> TrainedModel:
    """Train on the first rows (in order of time), measure on the last `held_out` share of them.

    Batches are drawn from all rows, so frequencies stay; `positive_weight` weighs fraud in the loss. `start`
    continues from an earlier model with its mean and scale. Raises ValueError when either part holds no fraud.
    """
    cut = round(len(features) * (1.0 - held_out))
    if not fraud[:cut].any() or not fraud[cut:].any() or fraud.all():
        raise ValueError(
            f"fraud model: {int(fraud.sum())} frauds in {len(fraud)} rows are too few to train and measure"
        )
    rng = np.random.default_rng(seed)
    if start is None:
        mean, scale = standardization(features[:cut])
        sizes = (features.shape[1], *hidden, 1)
        layers = initial_layers(sizes, rng)
    else:
        mean, scale = start.mean, start.scale
        layers = [(weight.copy(), bias.copy()) for weight, bias in start.weights]
    inputs = ((features[:cut] - mean) / scale).astype(np.float32)
    labels = fraud[:cut].astype(np.float32)
    optimizer = Adam([tensor for layer in layers for tensor in layer])
    for step in range(1, steps + 1):
        batch = rng.integers(0, cut, batch_size)
        gradients = loss_gradients(layers, inputs[batch], labels[batch], positive_weight)
        rate = min(1.0, 2.0 * (1.0 - step / (steps + 1)))  # constant, then linear to zero
        optimizer.step(gradients, learning_rate * rate)
    scores = score(layers, mean, scale, features[cut:])
    return TrainedModel(
        weights=tuple(layers),
        mean=mean,
        scale=scale,
        average_precision=average_precision(scores, fraud[cut:]),
        decision_threshold=threshold_for_false_positives(scores, fraud[cut:], false_positive_rate),
        false_positive_rate=false_positive_rate,
    )


def initial_layers(sizes: Sequence[int], rng: np.random.Generator) -> list[Layer]:
    """He-normal weights and zero biases for the given layer sizes."""
    return [
        (
            (rng.standard_normal((wide, narrow)) * np.sqrt(2.0 / wide)).astype(np.float32),
            np.zeros(narrow, dtype=np.float32),
        )
        for wide, narrow in pairwise(sizes)
    ]


def loss_gradients(layers: Sequence[Layer], inputs: Float32, labels: Float32, positive_weight: float) -> list[Float32]:
    """Gradients of the mean weighted binary cross-entropy with logits, in the order W0, b0, W1, b1, ..."""
    activations = [inputs]
    for weight, bias in layers[:-1]:
        activations.append(np.maximum(activations[-1] @ weight + bias, 0.0))
    logit = (activations[-1] @ layers[-1][0] + layers[-1][1])[:, 0]
    weight_of_row = np.where(labels > 0.5, positive_weight, 1.0).astype(np.float32)
    backward = ((sigmoid(logit) - labels) * weight_of_row / np.float32(len(labels)))[:, None]
    gradients: list[Float32] = []
    for index in range(len(layers) - 1, -1, -1):
        gradients = [activations[index].T @ backward, backward.sum(axis=0), *gradients]
        if index:
            backward = (backward @ layers[index][0].T) * (activations[index] > 0.0)
    return gradients


def train_baseline(
    teacher: TrainedModel,
    features: Float32,
    fraud: npt.NDArray[np.bool_],
    *,
    tenant: str,
    model: str,
    release: int,
    created: int,
    feature_set: str,
    seed: int,
    hidden: int = 16,
    steps: int = 1_500,
    batch_size: int = 256,
    learning_rate: float = 5e-3,
    held_out: float = 0.2,
) -> tuple[BaselineModel, float]:
    """The teacher's knowledge in F -> `hidden` -> 1 at four bits, and its average precision on the held-out part.

    The rows are those the teacher was trained on, split in the same way, so that both figures compare.
    """
    cut = round(len(features) * (1.0 - held_out))
    rng = np.random.default_rng([seed, 4])
    codes = codes_of_scale(teacher.scale)
    inputs = ((features[:cut] - teacher.mean) / scale_of_codes(codes)).astype(np.float32)
    targets = (0.5 * fraud[:cut] + 0.5 * teacher.score(features[:cut])).astype(np.float32)
    layers = initial_layers((features.shape[1], hidden, 1), rng)
    optimizer = Adam([tensor for layer in layers for tensor in layer])
    for step in range(1, steps + 1):
        batch = rng.integers(0, cut, batch_size)
        seen = [(_rounded(weight), bias) for weight, bias in layers] if step > steps // 2 else layers
        gradients = loss_gradients(seen, inputs[batch], targets[batch], POSITIVE_WEIGHT)
        optimizer.step(gradients, learning_rate * (1.0 - (step - 1) / steps))
    held = slice(cut, None)
    draft = quantized(
        layers,
        teacher.mean,
        codes,
        tenant=tenant,
        model=model,
        release=release,
        created=created,
        feature_set=feature_set,
        decision_threshold=0.5,
    )
    scores = draft.scores(features[held])
    threshold = threshold_for_false_positives(scores, fraud[held], teacher.false_positive_rate)
    return replace(draft, decision_threshold=float(np.float16(threshold))), average_precision(scores, fraud[held])


def _rounded(weight: Float32) -> Float32:
    scale = int4_scale(weight)
    return np.asarray(to_int4(weight, scale) * np.float32(scale), dtype=np.float32)


class Adam:
    """Adam (Kingma and Ba, 2015, algorithm 1; beta 0.9 and 0.999, epsilon 1e-8) on arrays that it changes in place."""

    def __init__(self, tensors: Sequence[Float32]) -> None:
        self._tensors = tensors
        self._first = [np.zeros_like(tensor) for tensor in tensors]
        self._second = [np.zeros_like(tensor) for tensor in tensors]
        self._steps = 0

    def step(self, gradients: Sequence[Float32], rate: float) -> None:
        """Move every tensor against its gradient."""
        self._steps += 1
        first_weight, second_weight = 1 - 0.9**self._steps, 1 - 0.999**self._steps
        for tensor, gradient, m, v in zip(self._tensors, gradients, self._first, self._second, strict=True):
            m += 0.1 * (gradient - m)
            v += 0.001 * (gradient * gradient - v)
            tensor -= rate * (m / first_weight) / (np.sqrt(v / second_weight) + 1e-8)
