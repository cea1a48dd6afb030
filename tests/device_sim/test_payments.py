"""The payments generator: reproducible, in the promised proportions, non-IID, and the same features both ways."""

import numpy as np
import pytest

from device_sim.payments import (
    CATEGORIES,
    CATEGORY_NAMES,
    DAY,
    FIRST_MONDAY,
    SCENARIOS,
    Payment,
    Payments,
    PaymentSpec,
    generate,
)
from device_sim.terminal_features import FEATURES, TerminalHistory, table_features
from tests.device_sim.divergence import category_divergence

SPEC = PaymentSpec(tuple(CATEGORY_NAMES[i % 6] for i in range(18)), days=12, seed=5, drift_day=8)


@pytest.fixture(scope="module")
def table() -> Payments:
    return generate(SPEC)


def test_one_seed_one_table(table: Payments) -> None:
    again = generate(SPEC)
    for name, column in vars(table).items():
        assert np.array_equal(column, getattr(again, name)), name


def test_another_seed_another_table(table: Payments) -> None:
    other = generate(PaymentSpec(SPEC.categories, SPEC.days, seed=6, drift_day=8))
    assert len(other) != len(table) or not np.array_equal(other.amount_cents, table.amount_cents)


def test_rows_are_in_order_of_time_and_inside_the_days(table: Payments) -> None:
    assert (np.diff(table.time) >= 0).all()
    assert table.time[0] >= FIRST_MONDAY
    assert table.time[-1] < FIRST_MONDAY + SPEC.days * DAY
    assert table.amount_cents.min() >= 50


def test_fraud_is_rare_and_every_scenario_occurs(table: Payments) -> None:
    assert 0.01 <= table.fraud.mean() <= 0.03
    counts = np.bincount(table.scenario, minlength=len(SCENARIOS))
    assert (counts > 20).all()
    assert np.array_equal(table.fraud, table.scenario > 0)


def test_every_terminal_is_paid_at(table: Payments) -> None:
    assert np.bincount(table.terminal, minlength=18).min() > 100


def test_payments_follow_the_hours_of_the_merchant(table: Payments) -> None:
    kind = np.array([CATEGORY_NAMES.index(name) for name in SPEC.categories])[table.terminal]
    hour = (table.time % DAY) / 3600
    honest = ~table.fraud
    restaurant = hour[honest & (kind == CATEGORY_NAMES.index("restaurant"))]
    assert ((restaurant > 11) & (restaurant < 23)).mean() > 0.9
    assert ((restaurant > 2) & (restaurant < 6)).mean() < 0.01


def test_amounts_differ_between_merchants_as_their_medians_do(table: Payments) -> None:
    kind = np.array([CATEGORY_NAMES.index(name) for name in SPEC.categories])[table.terminal]
    medians = {
        name: float(np.median(table.amount[(kind == i) & ~table.fraud])) for i, name in enumerate(CATEGORY_NAMES)
    }
    assert medians["kiosk"] < medians["grocery"] < medians["electronics"]
    for name, median in medians.items():
        assert 0.5 < median / CATEGORIES[name].amount_median < 2.0


def test_terminals_of_different_merchants_are_far_apart_and_of_one_merchant_close(table: Payments) -> None:
    alike = generate(PaymentSpec(("grocery",) * 18, days=12, seed=5))
    mixed, same = category_divergence(table, range(18)), category_divergence(alike, range(18))
    assert mixed > 0.3
    assert same < 0.6 * mixed


def test_drift_moves_fraud_to_small_amounts_and_day_time(table: Payments) -> None:
    early, late = table.fraud & table.days(0, 8), table.fraud & table.days(8, 12)
    assert np.median(table.amount[late]) < 0.5 * np.median(table.amount[early])
    magstripe = (table.entry == 2)[early].mean(), (table.entry == 2)[late].mean()
    assert magstripe[1] < 0.7 * magstripe[0]
    honest = ~table.fraud
    before, after = (np.median(table.amount[honest & table.days(*d)]) for d in ((0, 8), (8, 12)))
    assert after == pytest.approx(before, rel=0.1), "honest customers must not change"


def test_online_and_table_features_agree_on_every_row_of_every_terminal(table: Payments) -> None:
    features = table_features(table)
    assert features.shape == (len(table), len(FEATURES))
    assert np.isfinite(features).all()
    for terminal in range(18):
        history = TerminalHistory()
        online = np.array([list(history.add(payment).values()) for payment in table.replay(terminal)])
        np.testing.assert_allclose(online, features[table.terminal == terminal], rtol=1e-5, atol=1e-5)


def test_features_agree_across_gaps_longer_than_a_week_and_equal_times() -> None:
    times = [0, 0, 5, 5, 3600, 3605, DAY, DAY + 5, 7 * DAY, 7 * DAY + 5, 20 * DAY, 20 * DAY, 27 * DAY, 27 * DAY + 1]
    count = len(times)
    column = np.arange(count, dtype=np.int64)
    table = Payments(
        terminal=np.zeros(count, dtype=np.int64),
        customer=column % 3,
        time=FIRST_MONDAY + np.array(times, dtype=np.int64),
        amount_cents=(column * 137) % 9000 + 50,
        entry=column % 4,
        fraud=np.zeros(count, dtype=bool),
        scenario=np.zeros(count, dtype=np.int64),
    )
    history = TerminalHistory()
    online = np.array([list(history.add(payment).values()) for payment in table.replay(0)])
    np.testing.assert_allclose(online, table_features(table), rtol=1e-5, atol=1e-5)


def test_a_feature_looks_back_only() -> None:
    table = generate(PaymentSpec(("grocery", "fuel"), days=3, seed=1))
    half = len(table) // 2
    np.testing.assert_array_equal(table_features(table.rows(slice(0, half))), table_features(table)[:half])


def test_history_forgets_after_a_week_and_is_bounded() -> None:
    history = TerminalHistory(payments_max=100)
    for second in range(150):
        named = history.add(Payment(0, second % 5, FIRST_MONDAY + second // 10, 1000, second % 4))
    assert len(history) == 100
    for window in ("1h", "24h", "7d"):
        assert named[f"count_{window}"] == pytest.approx(np.log1p(100))
        assert named[f"sum_{window}"] == pytest.approx(np.log1p(1000))
    assert named["chip_share_24h"] == 0.25
    later = history.add(Payment(0, 0, FIRST_MONDAY + 30 * DAY, 1000, 0))
    assert len(history) == 1
    assert later["card_new"] == 1.0
    assert later["count_7d"] == later["sum_7d"] == later["sum_1h"] == 0.0


def test_an_unknown_merchant_is_named() -> None:
    with pytest.raises(ValueError, match="unknown merchant category 'casino'; known: grocery"):
        generate(PaymentSpec(("casino",), days=1, seed=1))


def test_no_days_is_refused() -> None:
    with pytest.raises(ValueError, match="over 0 days"):
        generate(PaymentSpec(("fuel",), days=0, seed=1))


def test_a_resumed_history_continues_as_if_it_had_seen_everything(table: Payments) -> None:
    past, future = table.rows(table.days(0, 10)), table.rows(table.days(10, 12))
    features = table_features(table)[table.days(10, 12)]
    for terminal in (0, 7, 17):
        history = TerminalHistory.resumed(past, terminal)
        online = np.array([list(history.add(payment).values()) for payment in future.replay(terminal)])
        np.testing.assert_allclose(online, features[future.terminal == terminal], rtol=1e-5, atol=1e-5)


def test_a_history_resumed_from_nothing_is_empty(table: Payments) -> None:
    assert len(TerminalHistory.resumed(table.rows(slice(0, 0)), 0)) == 0
