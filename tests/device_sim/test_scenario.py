"""A world is one function of its scenario, and its parts do not overlap."""

import dataclasses
from itertools import islice

import numpy as np
import pytest

from device_sim.payments import DAY, FEATURES, category_divergence, generate
from device_sim.payments_csv import CSV_FEATURES, LabelledRows
from device_sim.scenario import Scenario, World, generated_world, world_of_rows
from model_delta.errors import Malformed

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
    from device_sim.payments import PaymentSpec
    from device_sim.population import terminals_of

    table = generate(PaymentSpec(terminals_of(world.devices), days=20, seed=3, drift_day=6))
    rows = np.flatnonzero((table.terminal == 4) & table.days(13, 20))
    expected = table.features()[rows]
    found = np.array([list(sample.features.values()) for sample in islice(world.live(4), len(rows))])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert category_divergence(table, range(12)) > 0.25


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
