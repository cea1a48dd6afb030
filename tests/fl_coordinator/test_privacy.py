"""Noise that three deal and two suffice for, accounts by device and release, and the round that is refused."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from fl_coordinator.ledger import Ledger
from fl_coordinator.privacy import (
    Budget,
    Spend,
    Spent,
    _composed,
    account,
    burden,
    epsilon,
    exceeding,
    gaussian_epsilon,
    headroom_units,
    miscounted,
    noise,
    part_std_units,
)
from fl_coordinator.tables.records import AdmittedContribution
from model_delta.digest import digest_of
from model_delta.errors import Malformed

DELTA = 1e-6


def gaussian_delta(eps: float, sigma: float) -> float:
    """Delta of one Gaussian mechanism of sensitivity 1 (Balle and Wang, ICML 2018, theorem 8)."""

    def below(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    return below(0.5 / sigma - eps * sigma) - math.exp(eps) * below(-0.5 / sigma - eps * sigma)


@pytest.mark.parametrize(("sigma", "rounds"), [(4.0, 1), (4.0, 9), (10.0, 100)])
def test_epsilon_is_that_of_the_gaussian_mechanism(sigma: float, rounds: int) -> None:
    found = epsilon([Spend(sigma)] * rounds, DELTA)
    together = sigma / math.sqrt(rounds)
    assert gaussian_delta(found, together) <= DELTA * 1.0001
    assert gaussian_delta(found - 0.01 * math.sqrt(rounds) - 0.01, together) > DELTA


def test_sampling_costs_less_and_no_noise_costs_everything() -> None:
    assert epsilon([Spend(2.0, 0.05)] * 20, DELTA) < 0.3 * epsilon([Spend(2.0)] * 20, DELTA)
    assert epsilon([Spend(0.0)], DELTA) == math.inf
    assert epsilon([Spend(2.0), Spend(0.0)], DELTA) == math.inf
    assert epsilon([], DELTA) == 0.0


@pytest.mark.parametrize("spend", [Spend(-1.0), Spend(math.nan), Spend(1.0, 0.0), Spend(1.0, 1.5)])
def test_impossible_spends_are_refused(spend: Spend) -> None:
    with pytest.raises(Malformed, match="privacy: expected a"):
        epsilon([spend], DELTA)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_impossible_deltas_are_refused(delta: float) -> None:
    with pytest.raises(Malformed, match="expected a delta between 0 and 1"):
        epsilon([], delta)


def test_a_round_that_would_overspend_is_refused_by_device_and_by_release() -> None:
    one = epsilon([Spend(4.0)], DELTA)
    two = epsilon([Spend(4.0)] * 2, DELTA)
    budget = Budget(epsilon_device=(one + two) / 2, epsilon_release=10.0, delta=DELTA)
    fresh = account(budget, [], {"pos-1": [], "pos-2": []}, Spend(4.0))
    assert fresh.refusal == ""
    assert fresh.epsilon_device == pytest.approx(one)
    again = account(budget, [Spend(4.0)], {"pos-1": [Spend(4.0)], "pos-2": []}, Spend(4.0))
    assert again.refusal.startswith(f"this opening would bring 1 of 2 devices (first: pos-1) to epsilon {two:.2f} at")
    tight = Budget(epsilon_device=10.0, epsilon_release=(one + two) / 2, delta=DELTA)
    assert "would bring the release to epsilon" in account(tight, [Spend(4.0)], {}, Spend(4.0)).refusal


@pytest.mark.parametrize("sigmas", [[4.0], [1.0, 2.0, 3.0] * 3, [0.2], [50.0]])
def test_the_accountant_is_never_below_the_exact_epsilon_and_close_to_it(sigmas: list[float]) -> None:
    spends = [Spend(sigma) for sigma in sigmas]
    exact = gaussian_epsilon(burden(spends), DELTA)
    assert exact - 1e-9 <= epsilon(spends, DELTA) <= exact + 1e-4


def test_a_thousand_histories_are_judged_without_a_thousand_accounts() -> None:
    sigmas = [2.0 + 0.25 * level for level in range(12)]
    devices = {
        f"pos-{number:04}": [Spend(sigma) for bit, sigma in enumerate(sigmas) if number >> bit & 1]
        for number in range(1_000)
    }
    before = _composed.cache_info().misses
    over = exceeding(devices, Spend(4.0), DELTA, 4.0)
    assert 100 < len(over) < 900
    assert _composed.cache_info().misses - before < 25
    for name in ("pos-0000", "pos-0007", "pos-0100", "pos-0511", max(over, key=lambda one: -over[one])):
        exact = epsilon([*devices[name], Spend(4.0)], DELTA)
        assert (exact > 4.0) == (name in over)
        assert over.get(name, exact) == pytest.approx(exact, abs=1e-4)


def test_the_account_is_of_the_history_that_is_told_also_where_others_weigh_the_same() -> None:
    devices = {"pos-1": [Spend(50.0)], "pos-2": [Spend(100.0)] * 4}
    found = account(Budget(1.0, 1.0, DELTA), [], devices, Spend(50.0))
    told = Spent(
        spend=Spend(50.0),
        before_device=tuple(max(devices.values(), key=burden)),
        delta=DELTA,
        epsilon_release=found.epsilon_release,
        epsilon_device=found.epsilon_device,
    )
    assert miscounted(told) == ""


def test_two_parts_are_the_noise_that_is_accounted_for() -> None:
    rng = np.random.default_rng(1)
    std = part_std_units(2.0, 1_000)
    parts = [noise(200_001, std, rng.bytes) for _ in range(3)]
    assert [part.size for part in parts] == [200_001] * 3
    assert (parts[0] + parts[1]).std() == pytest.approx(2_000, rel=0.01)
    assert sum(parts).std() == pytest.approx(2_000 * math.sqrt(1.5), rel=0.01)
    assert abs(np.corrcoef(parts[0], parts[1])[0, 1]) < 0.01
    kurtosis = float(np.mean((parts[0] / parts[0].std()) ** 4))
    assert kurtosis == pytest.approx(3, abs=0.1)
    assert np.abs(sum(parts)).max() < headroom_units(std)  # type: ignore[arg-type]


def test_noise_that_would_show_its_rounding_is_refused() -> None:
    with pytest.raises(Malformed, match="would show its rounding"):
        part_std_units(1.0, 50)


def test_the_ledger_remembers_what_was_spent(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    ledger.spend_privacy("r1", 1, "fraud", Spend(4.0), ["pos-1", "pos-2"])
    ledger.spend_privacy("r1", 2, "fraud", Spend(4.0), ["pos-1", "pos-2"])
    ledger.spend_privacy("r2", 1, "digits", Spend(3.0, 0.5), ["pos-2"])
    with pytest.raises(Malformed, match="attempt 1 was paid for already"):
        ledger.spend_privacy("r2", 1, "digits", Spend(9.0), ["pos-3"])
    ledger.close()
    ledger = Ledger(tmp_path / "ledger.db")
    assert ledger.privacy_of_release("fraud") == [Spend(4.0)] * 2
    assert ledger.privacy_of_devices(["pos-1", "pos-2", "pos-3"]) == {
        "pos-1": [Spend(4.0)] * 2,
        "pos-2": [Spend(4.0)] * 2 + [Spend(3.0, 0.5)],
        "pos-3": [],
    }
    ledger.close()


def test_a_sum_that_was_opened_without_noise_counts_for_its_devices_in_every_model(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    for round_id, mean in (("bare", b"mean"), ("refused", b"")):
        ledger.save_round(round_id=round_id, model="digits", state="PUBLISHED", created=1.0, record=b"")
        admitted = AdmittedContribution(f"pos-{round_id}", digest_of(round_id.encode()), 0, 9, 1.0)
        ledger.admit(round_id, [admitted])
        ledger.save_round_result(round_id, mean, b"transcript")
    found = ledger.privacy_of_devices(["pos-bare", "pos-refused"])
    assert found == {"pos-bare": [Spend(0.0)], "pos-refused": []}
    assert ledger.privacy_of_devices(["pos-bare"], other_than="bare") == {"pos-bare": []}
    budget = Budget(epsilon_device=10.0, epsilon_release=10.0, delta=DELTA)
    refusal = account(budget, [], found, Spend(4.0)).refusal
    assert "1 of 2 devices (first: pos-bare) to epsilon inf" in refusal
    assert "opened without noise, of whatever model" in refusal
    ledger.close()
