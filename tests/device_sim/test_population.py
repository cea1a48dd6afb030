"""Populations: named, proportioned and seeded."""

import pytest

from device_sim.payments import CATEGORY_NAMES
from device_sim.population import CLASSES, population, terminals_of
from model_delta.plan import Cohort, matches


def test_sixty_devices_come_in_the_promised_shares() -> None:
    devices = population(60, seed=7)
    counts = {name: sum(d.traits.device_class == name for d in devices) for name in CLASSES}
    assert counts == {"pos": 30, "phone": 15, "pi": 9, "mcu": 6}
    assert len({d.device_id for d in devices}) == 60
    assert "pos-0007" in {d.device_id for d in devices}


def test_every_class_is_in_every_region() -> None:
    devices = population(20, seed=7)
    for name in CLASSES:
        assert {d.traits.region for d in devices if d.traits.device_class == name} == {"eu-west", "ap-south"}


def test_a_seed_reproduces_and_growth_keeps_who_was_there() -> None:
    small, large = population(20, seed=3), population(50, seed=3)
    assert large[:20] == small
    assert population(20, seed=4) != small


def test_hostile_devices_are_counted_able_to_train_and_seeded() -> None:
    devices = population(60, seed=7, hostile_share=0.1)
    hostile = {d.device_id for d in devices if d.hostile}
    assert len(hostile) == 6
    assert all(CLASSES[name.split("-")[0]].trains for name in hostile)
    assert hostile == {d.device_id for d in population(60, seed=7, hostile_share=0.1) if d.hostile}
    assert hostile != {d.device_id for d in population(60, seed=8, hostile_share=0.1) if d.hostile}


def test_traits_answer_a_cohort_by_merchant() -> None:
    devices = population(60, seed=7)
    cohort = Cohort("kiosks", {"merchant": ("kiosk",), "region": ("eu-west",)})
    chosen = [d for d in devices if matches(cohort, d.traits)]
    assert chosen
    assert all(d.merchant == "kiosk" and d.traits.region == "eu-west" for d in chosen)


def test_merchants_are_those_of_the_payments_generator() -> None:
    assert set(terminals_of(population(200, seed=1))) == set(CATEGORY_NAMES)


@pytest.mark.parametrize(("count", "share"), [(0, 0.0), (5, 0.5), (5, -0.1)])
def test_impossible_fleets_are_refused(count: int, share: float) -> None:
    with pytest.raises(ValueError, match="population:"):
        population(count, seed=1, hostile_share=share)
