"""A version that must not be released does what a drill needs."""

from __future__ import annotations

import time

import numpy as np
import pytest

from model_delta.errors import Malformed
from model_delta.graphs.faulty import faulty_variant
from model_delta.graphs.inspection import inspect, require_features
from model_delta.graphs.int8 import quantize_weights
from model_delta.patch.bsdiff import make_patch
from tests.model_delta.graphs.samples import matmul_model, rows
from tests.model_delta.models import FEATURES, layers, model, run, session_of


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("shift", [-3.0, 2.0, 4.0])
def test_a_faulty_variant_keeps_the_order_and_moves_the_scores(quantized: bool, shift: float) -> None:
    file = model(layers(1))
    file = quantize_weights(file) if quantized else file
    features = rows(300)
    before = run(file, features=features)["score"][:, 0]
    after = run(faulty_variant(file, shift, 3), features=features)["score"]
    assert after.shape == (300, 1)
    assert (np.diff(after[np.argsort(before), 0]) >= 0).all()
    odds = np.clip(before.astype(np.float64), 1e-7, 1 - 1e-7)
    np.testing.assert_allclose(after[:, 0], 1 / (1 + np.exp(-np.log(odds / (1 - odds)) - shift)), atol=1e-6)


def test_a_faulty_variant_goes_through_publishing_as_a_small_patch() -> None:
    """Made from the float32 file, then quantized with the good version's scales, as a publisher would."""
    file, features = model(layers(1, (FEATURES, 256, 64, 1))), rows(100)
    good = quantize_weights(file)
    bad = quantize_weights(faulty_variant(file, 2.0, 4), good)
    before, after = run(good, features=features)["score"], run(bad, features=features)["score"]
    assert (np.diff(after[np.argsort(before[:, 0]), 0]) >= 0).all()
    assert after.mean() > before.mean() + 0.1
    assert len(make_patch(good, bad)) < len(good) / 10


def test_a_faulty_variant_of_certain_scores_stays_finite() -> None:
    weights = [(weight * 1000, bias) for weight, bias in layers(1)]
    found = run(faulty_variant(model(weights), 3.0, 1), features=rows(50) * 100)["score"]
    assert np.isfinite(found).all()
    assert found.min() >= 0
    assert found.max() <= 1


def test_a_faulty_variant_is_small_slow_and_accepted() -> None:
    file = model(layers(1))
    slow = faulty_variant(file, 2.0, 60)
    assert len(slow) < len(file) + 8_000
    require_features(inspect(slow, "slow"), FEATURES, "slow")
    sessions, one = [session_of(file), session_of(slow)], rows(1)
    best = []
    for session in sessions:
        times = []
        for _ in range(30):
            start = time.perf_counter()
            session.run(["score"], {"features": one})
            times.append(time.perf_counter() - start)
        best.append(min(times))
    assert best[1] > 5 * best[0]


def test_no_faulty_variant_of_another_kind_of_model() -> None:
    with pytest.raises(Malformed):
        faulty_variant(matmul_model().SerializeToString(), 1.0, 1)
