import msgspec
import pytest

from fl_coordinator.admission import REASONS, Offered, OpenRound, already_in, refuse

OFFERED = Offered(device_id="pos-1", digest="d1", round_id="r1", base="b", length=10)
ROUND = OpenRound(round_id="r1", base="b", length=10, collecting=True, deadline=100.0, contributions_max=2, admitted={})


def changed(offered: dict[str, object], round_: dict[str, object]) -> tuple[Offered, OpenRound]:
    return msgspec.structs.replace(OFFERED, **offered), msgspec.structs.replace(ROUND, **round_)


def test_a_good_contribution_is_admitted() -> None:
    assert refuse(OFFERED, ROUND, 50.0) is None
    assert not already_in(OFFERED, ROUND)


# Every case breaks its own rule and all that come after it, so the order is tested as well.
LADDER: list[tuple[str, dict[str, object], dict[str, object]]] = [
    ("over privacy budget", {"over_budget": "epsilon 3 of 2"}, {}),
    ("over quota", {}, {"admitted": {"x": "1", "y": "2"}}),
    ("late", {}, {"collecting": False}),
    ("duplicate", {}, {"admitted": {"pos-1": "other", "y": "2"}}),
    ("malformed", {"mismatch": "aggregator keys"}, {}),
    ("wrong length", {"length": 11}, {}),
    ("wrong base", {"base": "c"}, {}),
    ("wrong round", {"round_id": "r0"}, {}),
    ("revoked certificate", {"flaw": "revoked certificate"}, {}),
    ("bad signature", {"flaw": "bad signature"}, {}),
]


@pytest.mark.parametrize("rung", range(len(LADDER)))
def test_the_first_reason_in_order_is_given(rung: int) -> None:
    offered: dict[str, object] = {}
    round_: dict[str, object] = {}
    for _, offers, rounds in LADDER[: rung + 1]:
        offered |= offers
        round_ |= rounds
    refusal = refuse(*changed(offered, round_), 50.0)
    assert refusal is not None
    assert refusal.reason == LADDER[rung][0]
    assert refusal.reason in REASONS


def test_the_deadline_itself_is_in_time() -> None:
    assert refuse(OFFERED, ROUND, 100.0) is None
    refusal = refuse(OFFERED, ROUND, 100.5)
    assert refusal is not None
    assert refusal.reason == "late"


def test_the_same_bytes_again_are_not_refused_even_late() -> None:
    offered, round_ = changed({}, {"admitted": {"pos-1": "d1"}, "collecting": False})
    assert refuse(offered, round_, 500.0) is None
    assert already_in(offered, round_)


def test_without_a_round_there_is_nothing_to_contribute_to() -> None:
    refusal = refuse(OFFERED, None, 50.0)
    assert refusal is not None
    assert (refusal.reason, refusal.text) == ("wrong round", "contribution to 'r1': no round is open")


def test_a_device_is_in_so_many_rounds_a_day() -> None:
    round_ = changed({}, {"per_device": 3})[1]
    assert refuse(changed({"lately": 2}, {})[0], round_, 50.0) is None
    refusal = refuse(changed({"lately": 3}, {})[0], round_, 50.0)
    assert refusal is not None
    assert (refusal.reason, refusal.text) == ("over quota", "3 rounds took this device within a day, 3 may")


def test_without_quotas_nothing_is_counted() -> None:
    assert refuse(*changed({"lately": 99, "group": "batch-7"}, {"groups": {"batch-7": 99}}), 50.0) is None


def test_a_group_has_so_many_contributions_and_others_have_their_own() -> None:
    round_ = changed({}, {"contributions_max": 9, "per_group": 2, "groups": {"batch-7": 2, "batch-8": 1}})[1]
    assert refuse(changed({"group": "batch-8"}, {})[0], round_, 50.0) is None
    assert refuse(changed({"group": "batch-9"}, {})[0], round_, 50.0) is None
    refusal = refuse(changed({"group": "batch-7"}, {})[0], round_, 50.0)
    assert refusal is not None
    assert refusal.reason == "over quota"
    assert "of group 'batch-7'" in refusal.text


def test_quotas_are_asked_before_privacy_alone() -> None:
    over = {"per_device": 1, "per_group": 1, "groups": {"": 5}}
    for before, offers, rounds in LADDER[2:]:
        refusal = refuse(*changed({"lately": 5, **offers}, {**over, **rounds}), 50.0)
        assert refusal is not None
        assert refusal.reason == before
