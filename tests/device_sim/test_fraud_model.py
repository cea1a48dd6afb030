"""The built-in fraud model: gradients are right, and drift costs it precision that retraining brings back."""

import numpy as np
import pytest

from device_sim.fraud_model import initial_layers, loss_gradients, score, train, train_baseline
from device_sim.payments import FIRST_MONDAY, PaymentSpec, generate
from device_sim.population import population, terminals_of
from device_sim.terminal_features import FEATURE_SET, FEATURES, table_features
from monitoring.quality import at_threshold, average_precision


def test_gradients_match_finite_differences() -> None:
    rng = np.random.default_rng(0)
    layers = [(w.astype(np.float64), b.astype(np.float64)) for w, b in initial_layers((5, 7, 4, 1), rng)]
    inputs, labels = rng.standard_normal((11, 5)), (rng.random(11) < 0.4).astype(np.float64)

    def loss() -> float:
        hidden = inputs
        for weight, bias in layers[:-1]:
            hidden = np.maximum(hidden @ weight + bias, 0)
        logit = (hidden @ layers[-1][0] + layers[-1][1])[:, 0]
        each = np.logaddexp(0, logit) - labels * logit
        return float((each * np.where(labels > 0.5, 3.0, 1.0)).mean())

    gradients = loss_gradients(layers, inputs, labels, 3.0)  # type: ignore[arg-type]
    for tensor, gradient in zip([t for layer in layers for t in layer], gradients, strict=True):
        index = tuple(rng.integers(0, size) for size in tensor.shape)
        kept, step = tensor[index], 1e-4
        tensor[index] = kept + step
        up = loss()
        tensor[index] = kept - step
        down = loss()
        tensor[index] = kept
        assert gradient[index] == pytest.approx((up - down) / (2 * step), rel=2e-2, abs=1e-5)


@pytest.mark.slow
def test_drift_costs_precision_and_retraining_brings_it_back() -> None:
    spec = PaymentSpec(terminals_of(population(40, seed=11)), days=40, seed=11, drift_day=20)
    table = generate(spec)
    features = table_features(table)
    before, learn, after = table.days(0, 20), table.days(20, 32), table.days(32, 40)
    stale = train(features[before], table.fraud[before], seed=11)
    assert stale.weights[0][0].shape == (len(FEATURES), 256)
    assert 0.75 <= stale.average_precision <= 0.95

    stale_after = average_precision(stale.score(features[after]), table.fraud[after])
    assert 0.25 <= stale_after <= 0.6

    fresh = train(features[learn], table.fraud[learn], seed=12, start=stale, learning_rate=1e-3)
    assert average_precision(fresh.score(features[after]), table.fraud[after]) > 0.7

    measured = at_threshold(stale.score(features[before]), table.fraud[before], stale.decision_threshold)
    assert measured.false_positive_rate < 2 * stale.false_positive_rate
    assert measured.recall > 0.5


def test_training_is_reproducible() -> None:
    table = generate(PaymentSpec(("grocery", "kiosk", "travel"), days=10, seed=2))
    features = table_features(table)
    first, second = (train(features, table.fraud, seed=1, steps=30) for _ in range(2))
    for (weight, bias), (weight_again, bias_again) in zip(first.weights, second.weights, strict=True):
        assert np.array_equal(weight, weight_again)
        assert np.array_equal(bias, bias_again)


def test_scores_are_finite_for_extreme_inputs() -> None:
    rng = np.random.default_rng(0)
    layers = initial_layers((3, 4, 1), rng)
    mean, scale = np.zeros(3, np.float32), np.ones(3, np.float32)
    scores = score(layers, mean, scale, np.full((2, 3), 1e6, np.float32) * np.array([[1], [-1]], np.float32))
    assert np.isfinite(scores).all()
    assert ((scores >= 0) & (scores <= 1)).all()


def test_a_slice_without_fraud_is_refused() -> None:
    with pytest.raises(ValueError, match="0 frauds in 50 rows"):
        train(np.zeros((50, 3), np.float32), np.zeros(50, bool), seed=1)


@pytest.mark.slow
def test_the_baseline_keeps_most_of_the_precision_in_a_few_hundred_bytes() -> None:
    table = generate(PaymentSpec(terminals_of(population(30, seed=4)), days=25, seed=4))
    features = table_features(table)
    teacher = train(features, table.fraud, seed=4, steps=500)
    baseline, precision = train_baseline(
        teacher,
        features,
        table.fraud,
        tenant="acme",
        model="fraud",
        release=1,
        created=FIRST_MONDAY,
        feature_set=FEATURE_SET,
        seed=4,
    )
    assert precision > 0.85 * teacher.average_precision
    assert len(baseline.encode()) <= 360
    found = at_threshold(baseline.scores(features), table.fraud, baseline.decision_threshold)
    assert found.false_positive_rate < 0.02
    assert found.recall > 0.5
