"""Twelve federated rounds of the fraud model, as files: what a device that was away has to catch up with.

The model and its payments are those of `device_sim` (synthetic). Ten devices, each with the payments of its own
terminals only, take 20 local steps of plain SGD (batch 32, rate 0.05) on the weighted loss; the mean of their *updates*
is added to the weights. Deterministic for a seed.
"""

from __future__ import annotations

import numpy as np

from device_sim.fraud_model import POSITIVE_WEIGHT, Layer, TrainedModel, loss_gradients, train
from device_sim.payments import CATEGORY_NAMES, PaymentSpec, generate
from device_sim.terminal_features import table_features
from model_delta.graphs.mlp import mlp_model

DEVICES, STEPS, BATCH, RATE = 10, 20, 32, 0.05


def files(rounds: int, seed: int = 1) -> list[bytes]:
    """`rounds` + 1 float32 ONNX files, the version before the first round first."""
    terminals = tuple(CATEGORY_NAMES[place % len(CATEGORY_NAMES)] for place in range(DEVICES * 2))
    payments = generate(PaymentSpec(terminals, days=40, seed=seed))
    features = table_features(payments)
    model = train(features, payments.fraud, seed=seed)
    inputs = ((features - model.mean) / model.scale).astype(np.float32)
    rng = np.random.default_rng(seed)
    layers = list(model.weights)
    made = [_file(model, layers)]
    for _ in range(rounds):
        steps = []
        for device in range(DEVICES):
            rows = np.flatnonzero(payments.terminal % DEVICES == device)
            steps.append(_update(layers, inputs[rows], payments.fraud[rows].astype(np.float32), rng))
        layers = [
            (
                (weight + np.mean([step[2 * place] for step in steps], axis=0)).astype(np.float32),
                (bias + np.mean([step[2 * place + 1] for step in steps], axis=0)).astype(np.float32),
            )
            for place, (weight, bias) in enumerate(layers)
        ]
        made.append(_file(model, layers))
    return made


def _update(layers: list[Layer], inputs: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    start = [tensor for layer in layers for tensor in layer]
    now = [tensor.copy() for tensor in start]
    for _ in range(STEPS):
        batch = rng.integers(0, len(inputs), BATCH)
        pairs = list(zip(now[::2], now[1::2], strict=True))
        slopes = loss_gradients(pairs, inputs[batch], labels[batch], POSITIVE_WEIGHT)
        now = [
            (tensor - np.float32(RATE) * slope).astype(np.float32) for tensor, slope in zip(now, slopes, strict=True)
        ]
    return [after - before for after, before in zip(now, start, strict=True)]


def _file(model: TrainedModel, layers: list[Layer]) -> bytes:
    return mlp_model(layers, model.mean, model.scale)
