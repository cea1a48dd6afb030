"""An aggregator does not sign whatever account of privacy it is told."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fl_coordinator.kept_spends import KeptSpends
from fl_coordinator.privacy import Spend, Spent, epsilon
from model_delta.errors import AtollError, Malformed, Untrusted
from model_delta.store import DirectoryStore
from model_delta.task import RoundTask
from tests.fakes.secure_round import SecureRound

DELTA, ONE = 1e-5, Spend(4.0)
DEVICES = ["pos-1", "pos-2"]


@cache
def cost(openings: int) -> float:
    return epsilon([ONE] * openings, DELTA)


@cache
def announced() -> RoundTask:
    task = SecureRound(length=4).task
    return msgspec.structs.replace(task, noise_multiplier=4.0, epsilon=cost(3), epsilon_device=cost(2), delta=DELTA)


def of_round(number: int, **changes: Any) -> RoundTask:
    return msgspec.structs.replace(announced(), round_id=f"fraud-{number}", **changes)


def told(before: int = 0, of_device: int | None = None, **changes: Any) -> Spent:
    of_device = before if of_device is None else of_device
    spent = Spent(
        spend=ONE,
        before_release=(ONE,) * before,
        before_device=(ONE,) * of_device,
        delta=DELTA,
        epsilon_release=cost(before + 1),
        epsilon_device=cost(of_device + 1),
    )
    return msgspec.structs.replace(spent, **changes)


def after_rounds(folder: Path, rounds: int) -> KeptSpends:
    kept = KeptSpends(DirectoryStore(folder))
    for number in range(rounds):
        kept.promise(of_round(number), told(number), DEVICES)
        kept.opened(of_round(number), DEVICES)
        kept.opened(of_round(number), DEVICES)  # a repeated answer is no second opening
    return KeptSpends(DirectoryStore(folder))


def test_a_true_account_within_its_budget_is_signed_also_when_asked_again(tmp_path: Path) -> None:
    kept = after_rounds(tmp_path, 2)
    kept.promise(of_round(2), told(2, of_device=1), ["pos-3"])
    kept.promise(of_round(1), told(2, of_device=1), DEVICES)  # the same round, opened already
    kept.promise(of_round(2, noise_multiplier=0.0), None, DEVICES)


@pytest.mark.parametrize(
    ("spent", "kind", "words"),
    [
        (None, Malformed, "expected an account of noise 4 at delta 1e-05"),
        (lambda: told(1, spend=Spend(5.0)), Malformed, "expected an account of noise 4"),
        (lambda: told(1, delta=1e-6), Malformed, "expected an account of noise 4"),
        (lambda: told(0), Untrusted, "leaves out 1 of 1 openings of 'fraud'"),
        (lambda: told(1, before_device=(Spend(4.0, 1e-6),)), Untrusted, "the account counts openings as sampled"),
        (lambda: told(1, of_device=0), Untrusted, "leaves out openings of its most burdened device"),
        (lambda: told(1, epsilon_release=cost(1)), Untrusted, "epsilon of the release is"),
        (lambda: told(1, epsilon_device=cost(1)), Untrusted, "epsilon of the device is"),
        (lambda: told(3, of_device=1), Malformed, "would bring the release to epsilon"),
        (lambda: told(2), Malformed, "would bring its most burdened device to epsilon"),
    ],
)
def test_another_account_is_refused_before_anything_opens(
    tmp_path: Path, spent: Any, kind: type[AtollError], words: str
) -> None:
    kept = after_rounds(tmp_path, 1)
    with pytest.raises(kind, match=words):
        kept.promise(of_round(9), spent() if spent else None, DEVICES)


def test_an_opening_without_noise_cannot_be_passed_over(tmp_path: Path) -> None:
    kept = KeptSpends(DirectoryStore(tmp_path))
    kept.opened(of_round(1, noise_multiplier=0.0), DEVICES)
    with pytest.raises(Untrusted, match="leaves out 1 of 1 openings"):
        kept.promise(of_round(2), told(0), DEVICES)


def test_a_device_that_was_in_a_bare_sum_of_another_model_has_no_epsilon(tmp_path: Path) -> None:
    kept = KeptSpends(DirectoryStore(tmp_path))
    kept.opened(of_round(1, model="digits", noise_multiplier=0.0), ["pos-2"])
    kept.promise(of_round(2), told(0), ["pos-1"])
    with pytest.raises(Untrusted, match="leaves out openings of its most burdened device"):
        kept.promise(of_round(2), told(0), DEVICES)
    bare = told(0, before_device=(Spend(0.0),), epsilon_device=math.inf)
    with pytest.raises(Malformed, match="would bring its most burdened device to epsilon inf"):
        kept.promise(of_round(2), bare, DEVICES)


def test_rounds_side_by_side_cannot_leave_out_each_other(tmp_path: Path) -> None:
    """What was signed counts, opened or not; asked again for the same round it counts once."""
    kept = KeptSpends(DirectoryStore(tmp_path))
    kept.promise(of_round(1), told(0), DEVICES)
    kept = KeptSpends(DirectoryStore(tmp_path))
    with pytest.raises(Untrusted, match="leaves out 1 of 1 openings of 'fraud'"):
        kept.promise(of_round(2), told(0), DEVICES)
    other = of_round(3, model="digits")
    with pytest.raises(Untrusted, match="leaves out openings of its most burdened device"):
        kept.promise(other, told(0), DEVICES)
    kept.promise(other, told(0, of_device=1), DEVICES)
    with pytest.raises(Untrusted, match="leaves out openings of its most burdened device"):
        kept.promise(other, told(0), DEVICES)
    kept.promise(other, told(0, of_device=1), DEVICES)
