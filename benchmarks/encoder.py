"""A small BERT encoder in plain NumPy: forward, and backward through a contrastive loss.

It makes real updates for the delta benchmarks without a training framework, and it is the independent check of the ONNX
graph in `benchmarks.models`. Post-norm encoder (Devlin et al. 2018) with exact GELU, mean pooling over the mask and L2
normalisation; no dropout. Weights are a dict by name, matrices as [in, out]; everything is float32.

The loss is InfoNCE over a batch of pairs (van den Oord et al. 2018), temperature 0.05, one direction: row i of the
first texts belongs to row i of the second.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Weights = dict[str, Floats]
Tokens = npt.NDArray[np.int64]
HEADS = 12
EPSILON = 1e-12
TEMPERATURE = 0.05
_MASKED = np.float32(-1e9)


class Batch(NamedTuple):
    """Token ids int64[n, l] and their mask int64[n, l], 1 for a token and 0 for padding."""

    ids: Tokens
    mask: Tokens


def layers_of(weights: Weights) -> int:
    """How many encoder layers the weights hold."""
    return sum(name.endswith(".intermediate.dense.weight") for name in weights)


def forward(weights: Weights, batch: Batch) -> Floats:
    """Embeddings float32[n, width] of length 1."""
    return _forward(weights, batch)[0]


def contrastive(weights: Weights, first: Batch, second: Batch, frozen_layers: int = 0) -> tuple[float, Weights]:
    """The loss of a batch of pairs, and its gradient by name. With `frozen_layers` > 0 the embeddings and that many
    first layers are left out of the gradient."""
    left, left_tape = _forward(weights, first)
    right, right_tape = _forward(weights, second)
    count = len(left)
    similar = left @ right.T / np.float32(TEMPERATURE)
    share = _softmax(similar)
    loss = -float(np.log(np.maximum(np.diagonal(share), 1e-30)).mean())
    pull: Floats = (share - np.eye(count, dtype=np.float32)) / np.float32(count * TEMPERATURE)
    gradient: Weights = {}
    _backward(weights, left_tape, pull @ right, gradient, frozen_layers)
    _backward(weights, right_tape, pull.T @ left, gradient, frozen_layers)
    return loss, gradient


def _forward(weights: Weights, batch: Batch) -> tuple[Floats, dict[str, Any]]:
    count, length = batch.ids.shape
    tape: dict[str, Any] = {"batch": batch}
    value = weights["embeddings.word_embeddings.weight"][batch.ids]
    value = value + weights["embeddings.position_embeddings.weight"][:length]
    value = value + weights["embeddings.token_type_embeddings.weight"][0]
    value = _norm(weights, "embeddings.LayerNorm", value, tape)
    width = value.shape[-1]
    hidden = np.where(batch.mask == 0, _MASKED, np.float32(0))[:, None, None, :]
    for layer in range(layers_of(weights)):
        name = f"encoder.layer.{layer}"
        tape[f"{name}.input"] = value
        query, key, content = (
            _heads(_dense(weights, f"{name}.attention.self.{part}", value)) for part in ("query", "key", "value")
        )
        share = _softmax(query @ key.swapaxes(-1, -2) / np.float32(np.sqrt(width // HEADS)) + hidden)
        mixed = (share @ content).swapaxes(1, 2).reshape(count, length, width)
        tape[f"{name}.attention"] = query, key, content, share, mixed
        value = _dense(weights, f"{name}.attention.output.dense", mixed) + value
        value = _norm(weights, f"{name}.attention.output.LayerNorm", value, tape)
        inner = _dense(weights, f"{name}.intermediate.dense", value)
        phi = (erf(inner / np.float32(np.sqrt(2))) + np.float32(1)) / np.float32(2)
        tape[f"{name}.feed"] = value, inner, phi
        value = _dense(weights, f"{name}.output.dense", inner * phi) + value
        value = _norm(weights, f"{name}.output.LayerNorm", value, tape)
    share = batch.mask[:, :, None].astype(np.float32)
    share = share / share.sum(axis=1, keepdims=True)
    pooled = (value * share).sum(axis=1)
    size = np.linalg.norm(pooled, axis=1, keepdims=True)
    tape["pool"] = share, pooled / size, size
    return pooled / size, tape


def _backward(weights: Weights, tape: dict[str, Any], pull: Floats, gradient: Weights, frozen_layers: int) -> None:
    batch: Batch = tape["batch"]
    count, length = batch.ids.shape
    share, unit, size = tape["pool"]
    pooled = (pull - unit * (unit * pull).sum(axis=1, keepdims=True)) / size
    value = pooled[:, None, :] * share
    width = value.shape[-1]
    for layer in reversed(range(frozen_layers, layers_of(weights))):
        name = f"encoder.layer.{layer}"
        value = _norm_back(weights, f"{name}.output.LayerNorm", value, tape, gradient)
        entered, inner, phi = tape[f"{name}.feed"]
        down = _dense_back(weights, f"{name}.output.dense", inner * phi, value, gradient)
        density = np.exp(-(inner**2) / 2) / np.float32(np.sqrt(2 * np.pi))
        value = value + _dense_back(
            weights, f"{name}.intermediate.dense", entered, down * (phi + inner * density), gradient
        )
        value = _norm_back(weights, f"{name}.attention.output.LayerNorm", value, tape, gradient)
        query, key, content, attention, mixed = tape[f"{name}.attention"]
        down = _heads(_dense_back(weights, f"{name}.attention.output.dense", mixed, value, gradient))
        spread = down @ content.swapaxes(-1, -2)
        spread = attention * (spread - (spread * attention).sum(axis=-1, keepdims=True))
        spread = spread / np.float32(np.sqrt(width // HEADS))
        parts = {
            "query": spread @ key,
            "key": spread.swapaxes(-1, -2) @ query,
            "value": attention.swapaxes(-1, -2) @ down,
        }
        entered = tape[f"{name}.input"]
        for part, step in parts.items():
            joined = step.swapaxes(1, 2).reshape(count, length, width)
            value = value + _dense_back(weights, f"{name}.attention.self.{part}", entered, joined, gradient)
    if frozen_layers:
        return
    value = _norm_back(weights, "embeddings.LayerNorm", value, tape, gradient)
    for table, rows in (
        ("word", batch.ids),
        ("position", np.broadcast_to(np.arange(length), batch.ids.shape)),
        ("token_type", np.zeros_like(batch.ids)),
    ):
        name = f"embeddings.{table}_embeddings.weight"
        total = gradient.setdefault(name, np.zeros_like(weights[name]))
        np.add.at(total, rows.ravel(), value.reshape(-1, width))


def _dense(weights: Weights, name: str, value: Floats) -> Floats:
    rows = value.reshape(-1, value.shape[-1]) @ weights[f"{name}.weight"] + weights[f"{name}.bias"]
    return rows.reshape(*value.shape[:-1], -1)


def _dense_back(weights: Weights, name: str, entered: Floats, pull: Floats, gradient: Weights) -> Floats:
    rows, steps = entered.reshape(-1, entered.shape[-1]), pull.reshape(-1, pull.shape[-1])
    _add(gradient, f"{name}.weight", rows.T @ steps)
    _add(gradient, f"{name}.bias", steps.sum(axis=0))
    return (steps @ weights[f"{name}.weight"].T).reshape(entered.shape)


def _norm(weights: Weights, name: str, value: Floats, tape: dict[str, Any]) -> Floats:
    centred = value - value.mean(axis=-1, keepdims=True)
    spread = 1 / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + np.float32(EPSILON))
    tape[name] = centred * spread, spread
    result: Floats = tape[name][0] * weights[f"{name}.weight"] + weights[f"{name}.bias"]
    return result


def _norm_back(weights: Weights, name: str, pull: Floats, tape: dict[str, Any], gradient: Weights) -> Floats:
    unit, spread = tape[name]
    width = pull.shape[-1]
    _add(gradient, f"{name}.weight", (pull * unit).reshape(-1, width).sum(axis=0))
    _add(gradient, f"{name}.bias", pull.reshape(-1, width).sum(axis=0))
    inner = pull * weights[f"{name}.weight"]
    centred = inner - inner.mean(axis=-1, keepdims=True) - unit * (inner * unit).mean(axis=-1, keepdims=True)
    result: Floats = centred * spread
    return result


def _add(gradient: Weights, name: str, value: Floats) -> None:
    gradient[name] = gradient[name] + value if name in gradient else value


def _heads(value: Floats) -> Floats:
    count, length, width = value.shape
    return value.reshape(count, length, HEADS, width // HEADS).swapaxes(1, 2)


def _softmax(value: Floats) -> Floats:
    raised = np.exp(value - value.max(axis=-1, keepdims=True))
    result: Floats = raised / raised.sum(axis=-1, keepdims=True)
    return result


def erf(value: Floats) -> Floats:
    """The error function to 1.5e-7 (Abramowitz and Stegun, 7.1.26)."""
    size = np.abs(value)
    term = 1 / (1 + np.float32(0.3275911) * size)
    series = term * (
        np.float32(0.254829592)
        + term
        * (
            np.float32(-0.284496736)
            + term * (np.float32(1.421413741) + term * (np.float32(-1.453152027) + term * np.float32(1.061405429)))
        )
    )
    result: Floats = np.sign(value) * (1 - series * np.exp(-(size**2)))
    return result
