"""A world is one function of its scenario, and its parts do not overlap."""

import dataclasses
from itertools import islice

import numpy as np
import pytest

from device_sim.faults import plain_average, scaled
from device_sim.fraud_model import POSITIVE_WEIGHT, loss_gradients, score, train
from device_sim.payments import DAY, PaymentSpec, generate
from device_sim.payments_csv import CSV_FEATURES, LabelledRows
from device_sim.population import terminals_of
from device_sim.scenario import Scenario, World, generated_world, world_of_rows
from device_sim.terminal_features import FEATURES, table_features
from model_delta.errors import Malformed
from monitoring.quality import average_precision
from tests.device_sim.divergence import category_divergence

SMALL = Scenario(seed=3, devices=12, history_days=6, local_days=4, held_out_days=3, live_days=7)


@pytest.fixture(scope="module")
def world() -> World:
    return generated_world(SMALL)


def test_a_scenario_gives_one_world(world: World) -> None:
    again = generated_world(SMALL)
    assert again.devices == world.devices
    for mine, other in zip(world.held_out(), again.held_out(), strict=True):
        np.testing.assert_array_equal(mine, other)
    assert list(islice(world.live(2), 20)) == list(islice(again.live(2), 20))


def test_the_parts_are_disjoint_and_complete(world: World) -> None:
    parts = [len(world.history()[1]), len(world.held_out()[1]), *(len(world.local(i)[1]) for i in range(12))]
    assert min(parts) > 0
    assert sum(parts) == len(world._fraud)
    assert world.history()[0].shape[1] == len(FEATURES)


def test_fraud_drifts_between_history_and_the_rest(world: World) -> None:
    (early, early_fraud), (late, late_fraud) = world.history(), world.held_out()
    amount = FEATURES.index("amount")
    assert np.median(late[late_fraud, amount]) < 0.6 * np.median(early[early_fraud, amount])


def test_local_data_of_devices_are_not_alike(world: World) -> None:
    amount = FEATURES.index("amount_log")
    medians = [float(np.median(world.local(i)[0][:, amount])) for i in range(12)]
    assert np.std(medians) > 0.5


def test_the_live_stream_goes_on_for_ever_in_whole_weeks(world: World) -> None:
    stream = world.live(0)
    first = next(stream)
    later = next(sample for sample in stream if sample.time >= first.time + 7 * DAY)
    assert (later.time - first.time) % (7 * DAY) == 0
    assert later.features["hour_sin"] == first.features["hour_sin"]
    assert set(later.features) == set(FEATURES)
    times = [sample.time for sample in islice(stream, 500)]
    assert times == sorted(times)


def test_live_features_are_those_of_the_whole_table(world: World) -> None:
    table = generate(PaymentSpec(terminals_of(world.devices), days=20, seed=3, drift_day=6))
    rows = np.flatnonzero((table.terminal == 4) & table.days(13, 20))
    expected = table_features(table)[rows]
    found = np.array([list(sample.features.values()) for sample in islice(world.live(4), len(rows))])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert category_divergence(table, range(12)) > 0.25


def test_a_part_of_the_fleet_sees_the_same_payments(world: World) -> None:
    part = generated_world(SMALL, only=(2, 9))
    assert part.devices == world.devices
    for index in (2, 9):
        np.testing.assert_array_equal(part.local(index)[0], world.local(index)[0])
        assert list(islice(part.live(index), 50)) == list(islice(world.live(index), 50))
    assert len(part.local(3)[1]) == 0
    assert len(list(part.live(3))) == 0


def test_half_weeks_are_refused() -> None:
    with pytest.raises(ValueError, match="whole weeks, found 10"):
        generated_world(dataclasses.replace(SMALL, live_days=10))


def rows_of(count: int, fraud_share: float = 0.05) -> LabelledRows:
    rng = np.random.default_rng(3)
    features = rng.standard_normal((count, len(CSV_FEATURES))).astype(np.float32)
    return LabelledRows(CSV_FEATURES, "ulb-30-v1", features, rng.random(count) < fraud_share, np.arange(count))


def test_a_users_rows_make_a_world_too() -> None:
    rows = rows_of(3_000)
    world = world_of_rows(SMALL, rows)
    assert len(world.history()[1]) == 1_200
    assert len(world.held_out()[1]) == 450
    assert sum(len(world.local(i)[1]) for i in range(12)) == 900
    stream = list(islice(world.live(5), 1_000))
    assert set(stream[0].features) == set(CSV_FEATURES)


def test_rows_without_fraud_are_refused() -> None:
    with pytest.raises(Malformed, match="no fraud in the first 40 %"):
        world_of_rows(SMALL, rows_of(500, fraud_share=0.0))


@pytest.mark.slow
def test_one_round_on_local_data_raises_precision_and_a_plain_average_under_attack_does_not() -> None:
    world = generated_world(Scenario(seed=5, devices=30, history_days=15, local_days=14, held_out_days=7, live_days=7))
    stale = train(*world.history(), seed=5, steps=500)
    features, fraud = world.held_out()
    base = np.concatenate([tensor.ravel() for layer in stale.weights for tensor in layer])

    def layers_of(flat: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        shapes = [tensor.shape for layer in stale.weights for tensor in layer]
        ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
        tensors = [part.reshape(shape) for part, shape in zip(np.split(flat, ends[:-1]), shapes, strict=True)]
        return list(zip(tensors[0::2], tensors[1::2], strict=True))

    def precision(flat: np.ndarray) -> float:
        return average_precision(score(layers_of(flat), stale.mean, stale.scale, features), fraud)

    def local_update(index: int) -> np.ndarray:
        rng = np.random.default_rng(index)
        rows, labels = world.local(index)
        inputs = ((rows - stale.mean) / stale.scale).astype(np.float32)
        moved = base.copy()
        layers = layers_of(moved)
        for _ in range(60):
            batch = rng.integers(0, len(labels), 64)
            gradients = loss_gradients(layers, inputs[batch], labels[batch].astype(np.float32), POSITIVE_WEIGHT)
            for tensor, gradient in zip([t for layer in layers for t in layer], gradients, strict=True):
                tensor -= 0.1 * gradient
        return np.asarray(moved - base)

    learned = {device.index: local_update(device.index) for device in world.devices}
    honest = [learned[device.index] for device in world.devices if not device.hostile]
    rng = np.random.default_rng(0)
    sent = [scaled(8.0)(learned[d.index], rng) if d.hostile else learned[d.index] for d in world.devices]
    before = precision(base)
    after = precision(base + plain_average(honest))
    attacked = precision(base + plain_average(sent))
    assert before < 0.6
    assert after > before + 0.08
    assert attacked < after - 0.06
