"""What a publisher makes of a float32 model."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from model_delta import graphs
from model_delta.manifest import Manifest
from model_delta.segments import read_tensor, stored_tensors
from tests.fl_coordinator.platform_in_memory import FEATURES, START, Platform


class WeightModel:
    """Answers one product of the stored (or dequantized) first matrix with each row."""

    def __init__(self, manifest: Manifest, file: bytes) -> None:
        self.digest = manifest.file_digest
        stored = {tensor.name: read_tensor(file, tensor) for tensor in stored_tensors(file)}
        self._weight = stored["layer0.weight"] * stored.get("layer0.weight_scale", np.float32(1))

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {"score": np.asarray(inputs["features"] @ self._weight, np.float32)}


def wide_model(size: float, step: float = 0.0) -> bytes:
    """A model whose weights are of that size, the first layer's up to a `step` of themselves smaller."""
    rng, moves = np.random.default_rng(1), np.random.default_rng(2)
    sizes = [FEATURES, 64, 1]
    weights = [
        (rng.normal(0, size, pair).astype(np.float32), np.zeros(pair[1], np.float32)) for pair in pairwise(sizes)
    ]
    first = weights[0][0] * (1 - step * moves.random(weights[0][0].shape))
    weights[0] = (first.astype(np.float32), weights[0][1])
    return graphs.mlp_model(weights, np.zeros(FEATURES, np.float32), np.ones(FEATURES, np.float32))


def tensors(file: bytes) -> dict[str, Any]:
    return {tensor.name: read_tensor(file, tensor) for tensor in stored_tensors(file)}


def platform(folder: Path) -> Platform:
    made = Platform(folder)
    made.publisher._open_model = WeightModel
    return made


def test_a_small_update_keeps_the_scales_and_what_did_not_move(tmp_path: Path) -> None:
    publisher = platform(tmp_path).publisher
    first = publisher.publish(wide_model(1.0), model="fraud", now=START)
    second = publisher.publish(wide_model(1.0, step=0.02), model="fraud", now=START + 1)
    before, after = (tensors(publisher.file(record.manifest)) for record in (first, second))
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert changed == {"layer0.weight"}


def test_a_model_too_small_for_its_parents_scales_is_quantized_afresh(tmp_path: Path) -> None:
    """All weights shrank a hundredfold: on the parent's scales next to nothing would be left of them."""
    publisher = platform(tmp_path).publisher
    publisher.publish(wide_model(1.0), model="fraud", now=START)
    second = publisher.publish(wide_model(0.01), model="fraud", now=START + 1)
    assert publisher.file(second.manifest) == graphs.quantize_weights(wide_model(0.01))


def test_growth_that_clipping_would_swallow_is_quantized_afresh(tmp_path: Path) -> None:
    """Channels of six weights that all grow by up to 4 %: the scale still holds by the rule, yet the largest weights,
    which moved most, would stay where they were, and outputs alone would not tell."""
    publisher = platform(tmp_path).publisher
    publisher.publish(wide_model(1.0), model="fraud", now=START)
    grown = wide_model(1.0, step=-0.04)
    second = publisher.publish(grown, model="fraud", now=START + 1)
    assert publisher.file(second.manifest) == graphs.quantize_weights(grown)
    assert publisher.file(second.manifest) != graphs.quantize_weights(grown, graphs.quantize_weights(wide_model(1.0)))
