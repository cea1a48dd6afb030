"""A transcript that holds, and what its replay says when any part of it was changed, re-signed by everybody or not."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import msgspec
import numpy as np
import pytest

from fl_coordinator.aggregation import OPENING_TYPE, Opening, combine_openings
from fl_coordinator.privacy import Spend, Spent, epsilon
from fl_coordinator.replay import CHECKS, Replay, replay
from fl_coordinator.round_opening import _settlement
from fl_coordinator.rounds import Round, RoundSpec, State
from fl_coordinator.shares.decision import Decision, DeviceVerdict
from fl_coordinator.shares.party import Outcome
from fl_coordinator.shares.sharing import Pair, to_bytes
from fl_coordinator.transcript import SETTLEMENT_TYPE, Settlement, Transcript, mean_digest, transcript_of
from model_delta.digest import digest_of
from model_delta.encoding import pack, unpack
from model_delta.errors import Untrusted
from model_delta.task import RoundTask
from model_delta.trust.signing import open_envelope, seal_envelope, sign
from tests.fakes.secure_round import SecureRound

LENGTH = 24
DELTA = 1e-5
SPENT = (Spend(4.0),)
EPSILONS = {"delta": DELTA, "epsilon_release": 1.0, "epsilon_device": 1.0}


class Written:
    """A round that was run, and its transcript, which a test may write anew with the keys of all who signed it."""

    def __init__(self, noise_multiplier: float = 0.0, world: SecureRound | None = None) -> None:
        self.world = world or SecureRound(
            **{"length": LENGTH, "hostile_max": 1, "selected_min": 3, "policy": "krum", "delta": DELTA},
            **{"noise_multiplier": noise_multiplier, "epsilon": 50.0, "epsilon_device": 50.0},
        )
        rng = np.random.default_rng(3)
        updates = [rng.normal(0.1, 0.02, LENGTH) for _ in range(6)] + [np.full(LENGTH, -0.7)]
        contributions = [self.world.contribution(f"pos-{n}", update) for n, update in enumerate(updates)]
        spent = None
        if noise_multiplier:
            spend = Spend(noise_multiplier)
            after, alone = epsilon([*SPENT, spend], DELTA), epsilon([spend], DELTA)
            spent = Spent(spend=spend, before_release=SPENT, delta=DELTA, epsilon_release=after, epsilon_device=alone)
        outcomes, _ = self.world.run(contributions, spent=spent)
        assert all(outcome.opened is not None for outcome in outcomes)
        self.decision = unpack(outcomes[0].decision, Decision)
        self.pairs = [
            (to_bytes(outcome.opened.first), to_bytes(outcome.opened.second)) for outcome in outcomes if outcome.opened
        ]
        aggregate = combine_openings(self.replies(), self.world.task)
        self.settlement = Settlement(
            tenant="acme",
            model="fraud",
            round_id=self.world.task.round_id,
            root=self.decision.root,
            mean=mean_digest(aggregate.mean),
        )
        if spent is not None:
            told = {name: getattr(spent, name) for name in Spent.__struct_fields__}
            self.settlement = msgspec.structs.replace(self.settlement, **told)

    def replies(self, decision: Decision | None = None) -> list[dict[str, Any]]:
        """The three aggregators' signed answers, about whatever decision."""
        packed = pack(decision or self.decision)
        replies = []
        for index, (key, signing) in enumerate(zip(self.world.task.aggregators, self.world.signing, strict=True)):
            first, second = self.pairs[index]
            opening = Opening(key.name, index, packed, digest_of(first), digest_of(second))
            envelope = seal_envelope(sign(OPENING_TYPE, pack(opening), [signing]))
            replies.append({"opening": envelope, "first": first, "second": second})
        return replies

    def settled(self, settlement: Settlement) -> bytes:
        return seal_envelope(sign(SETTLEMENT_TYPE, pack(settlement), [self.world.round_key]))

    def transcript(
        self, decision: Decision | None = None, settlement: Settlement | None = None, task: RoundTask | None = None
    ) -> Transcript:
        return transcript_of(
            self.world.announcement(task), self.replies(decision), self.settled(settlement or self.settlement)
        )

    def replay(self, transcript: Transcript) -> Replay:
        return replay(pack(transcript), self.world.anchors)


@cache
def written(noise_multiplier: float = 0.0) -> Written:
    return Written(noise_multiplier)


def problems(found: Replay) -> dict[str, str]:
    return {check.name: check.problem for check in found.checks if check.problem}


def test_a_transcript_holds_and_tells_the_round() -> None:
    found = written().replay(written().transcript())
    assert problems(found) == {}
    assert found.holds
    assert (found.round_id, found.model, found.policy) == ("fraud-7", "fraud", "krum")
    assert found.chosen == tuple(f"pos-{n}" for n in range(6))
    assert found.refused.keys() == {"pos-6"}
    assert found.aggregators == ("north", "centre", "south")


@pytest.mark.slow
def test_a_transcript_with_privacy_holds_and_tells_the_epsilons() -> None:
    found = written(3.0).replay(written(3.0).transcript())
    assert problems(found) == {}
    assert found.holds
    assert found.epsilon_release > found.epsilon_device > 0


def another(value: Any) -> Any:
    """A value of the same type that differs."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value[:-1] + ("0" if value[-1:] != "0" else "1")
    if isinstance(value, bytes):
        return bytes([value[0] ^ 1]) + value[1:] if value else b"\x01"
    if isinstance(value, tuple):
        return value[:-1] if value else ("x",)
    assert value is None or isinstance(value, Spend | Spent)
    return None if value is not None else Spend(1.0)


def resealed(envelope: bytes, payload: bytes) -> bytes:
    """An envelope with another payload under the old signatures."""
    return seal_envelope(msgspec.structs.replace(open_envelope(envelope), payload=payload))


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("field", Decision.__struct_fields__)
def test_a_decision_that_was_changed_is_not_what_was_signed(field: str, place: int) -> None:
    transcript = written().transcript()
    opening = unpack(open_envelope(transcript.openings[place]).payload, Opening)
    decision = written().decision
    changed = msgspec.structs.replace(decision, **{field: another(getattr(decision, field))})
    payload = pack(msgspec.structs.replace(opening, decision=pack(changed)))
    openings = list(transcript.openings)
    openings[place] = resealed(openings[place], payload)
    found = written().replay(msgspec.structs.replace(transcript, openings=tuple(openings)))
    assert not found.holds
    assert "openings" in problems(found)


@pytest.mark.parametrize("field", DeviceVerdict.__struct_fields__)
def test_one_aggregator_cannot_change_a_verdict_alone(field: str) -> None:
    transcript, decision = written().transcript(), written().decision
    devices = list(decision.devices)
    devices[6] = msgspec.structs.replace(devices[6], **{field: another(getattr(devices[6], field))})
    odd = written().replies(msgspec.structs.replace(decision, devices=tuple(devices)))[1]["opening"]
    openings = (transcript.openings[0], odd, transcript.openings[2])
    found = written().replay(msgspec.structs.replace(transcript, openings=openings))
    assert problems(found)["openings"] == "centre: signed another decision than the rest"


@pytest.mark.parametrize("field", Opening.__struct_fields__)
def test_an_opening_that_was_changed_does_not_hold(field: str) -> None:
    transcript = written().transcript()
    opening = unpack(open_envelope(transcript.openings[2]).payload, Opening)
    payload = pack(msgspec.structs.replace(opening, **{field: another(getattr(opening, field))}))
    openings = (*transcript.openings[:2], resealed(transcript.openings[2], payload))
    found = written().replay(msgspec.structs.replace(transcript, openings=openings))
    assert "openings" in problems(found)


@pytest.mark.parametrize("field", Settlement.__struct_fields__)
def test_a_settlement_that_was_changed_does_not_hold(field: str) -> None:
    transcript, settled = written().transcript(), written().settlement
    payload = pack(msgspec.structs.replace(settled, **{field: another(getattr(settled, field))}))
    changed = msgspec.structs.replace(transcript, settlement=resealed(transcript.settlement, payload))
    assert "settlement" in problems(written().replay(changed))


@pytest.mark.parametrize("field", RoundTask.__struct_fields__)
def test_an_announcement_that_was_changed_does_not_hold(field: str) -> None:
    transcript, task = written().transcript(), written().world.task
    payload = pack(msgspec.structs.replace(task, **{field: another(getattr(task, field))}))
    changed = msgspec.structs.replace(transcript, announcement=resealed(transcript.announcement, payload))
    assert problems(written().replay(changed)).keys() == {"announcement"}


@pytest.mark.parametrize("place", range(3))
def test_a_share_that_was_changed_is_named(place: int) -> None:
    transcript = written().transcript()
    shares = list(transcript.shares)
    shares[place] = another(shares[place])
    found = written().replay(msgspec.structs.replace(transcript, shares=tuple(shares)))
    assert "is not the one it signed" in problems(found)["openings"]
    assert "aggregate" in problems(found)


def test_another_format_and_what_is_no_transcript_are_refused() -> None:
    newer = msgspec.structs.replace(written().transcript(), format=2)
    assert problems(written().replay(newer)) == {"transcript": "transcript: format 2, this reader knows 1"}
    found = replay(b"not CBOR", written().world.anchors)
    assert problems(found).keys() == {"transcript"}
    assert not found.holds


def test_other_anchors_do_not_vouch_for_it() -> None:
    found = replay(pack(written().transcript()), SecureRound(length=4).anchors)
    assert problems(found).keys() == {"announcement"}


def test_another_tenants_round_under_the_same_key_is_not_ours() -> None:
    task = msgspec.structs.replace(written().world.task, tenant="globex")
    found = written().replay(written().transcript(task=task))
    assert problems(found) == {"announcement": "announcement: expected tenant 'acme', found 'globex'"}


def devices_with(index: int, **changes: Any) -> Callable[[Decision], Decision]:
    def change(decision: Decision) -> Decision:
        devices = list(decision.devices)
        devices[index] = msgspec.structs.replace(devices[index], **changes)
        return msgspec.structs.replace(decision, devices=tuple(devices))

    return change


def fields(**changes: Any) -> Callable[[Decision], Decision]:
    return lambda decision: msgspec.structs.replace(decision, **changes)


def swapped(name: str) -> Callable[[Decision], Decision]:
    """What the first two aggregators gave, the other way round."""

    def change(decision: Decision) -> Decision:
        first, second, third = getattr(decision, name)
        return msgspec.structs.replace(decision, **{name: (second, first, third)})

    return change


def choose_the_hostile(decision: Decision) -> Decision:
    decision = devices_with(6, selected=True, reason="", weight=1)(decision)
    decision = devices_with(5, selected=False, reason="too odd", weight=0)(decision)
    return msgspec.structs.replace(decision, selected=(0, 1, 2, 3, 4, 6))


@pytest.mark.parametrize(
    ("change", "check", "words"),
    [
        (fields(root="0" * 64), "root", "has root"),
        (devices_with(2, contribution="1" * 64), "root", "has root"),
        (fields(coin=bytes(32)), "freeze", "the coin is not the one that the parts make"),
        (fields(task="0" * 64), "freeze", "decided about announcement 0000"),
        (fields(attempt=2), "freeze", "north signed a freeze of another announcement, attempt or list"),
        (fields(frozen=()), "freeze", "expected 3 statements and parts, found 0 and 3"),
        (swapped("frozen"), "freeze", "north: its signed freeze: "),
        (swapped("parts"), "freeze", "north: step 'coin': does not open its commitment"),
        (devices_with(6, valid=0), "validity", "pos-6: its validity bit is 0, and it was measured"),
        (fields(memory="0" * 64), "weights", "leaves the memory of no round"),
        (fields(policy="robust"), "validity", "announced was krum"),
        (fields(measured=(1, 0, 2, 3, 4, 5, 6)), "validity", "no ascending indices"),
        (fields(measured=(0, 1, 2, 3, 4, 5, 99)), "validity", "no ascending indices"),
        (fields(measured=(0, 1, 2, 3, 4, 5, 99)), "weights", "cannot be computed: IndexError"),
        (devices_with(2, contribution="no digest"), "root", "cannot be computed: ValueError"),
        (fields(gram=b"12345678"), "weights", "Gram matrix: expected 224 bytes, found 8"),
        (fields(measured=(0,) * 200_000), "openings", "Gram matrix: expected 160000800000 bytes, found 224"),
        (fields(selected=(0, 1, 2, 3, 4)), "validity", "pos-5: selected and not selected at once"),
        (devices_with(6, reason=""), "validity", "pos-6: refused without a reason"),
        (devices_with(3, weight=2), "weights", "pos-3 has weight 2, the rules give 1"),
        (choose_the_hostile, "weights", "pos-5 has weight 0, the rules give 1"),
        (fields(divisor=5), "weights", "the divisor is 5, the rules give 6"),
        (devices_with(6, reason="disliked"), "weights", "pos-6 was refused because 'disliked'"),
        (fields(refusal="none of your business"), "weights", "refusal 'none of your business'"),
        (fields(format=4), "openings", "decision: format 4, this reader knows up to 3"),
        (fields(model="other"), "weights", "model is other, the rules give fraud"),
        (fields(base="0" * 64), "weights", "base is 0000"),
        (fields(aggregators=("north", "centre", "east")), "weights", "aggregators is"),
        (fields(scale=2), "weights", "scale is 2, the rules give 1"),
        (fields(selected=(1, 0, 2, 3, 4, 5)), "weights", "selected is (1, 0"),
        (fields(kept=(0,)), "weights", "kept is (0,), the rules give ()"),
        (fields(near=b"x"), "weights", "near is"),
        (fields(doubled_norm=1), "weights", "doubled_norm is 1, the rules give 0"),
        (fields(spent=Spent(spend=Spend(4.0), **EPSILONS)), "epsilon", "an account without a spend"),
        (devices_with(1, reason="disliked"), "weights", "pos-1: reason 'disliked', the rules give ''"),
        (devices_with(0, norm=1.0), "weights", "pos-0: norm 1.0, the rules give"),
        (devices_with(0, norm_sigma=9.1), "weights", "pos-0: norm_sigma 9.1, the rules give"),
        (devices_with(0, distance_sigma=9.1), "weights", "pos-0: distance_sigma 9.1"),
        (devices_with(0, krum_score=0.0), "weights", "pos-0: krum_score 0.0"),
        (devices_with(0, cluster=2), "weights", "pos-0: cluster 2, the rules give 0"),
        (devices_with(0, cosine_cluster=2), "weights", "pos-0: cosine_cluster 2"),
        (devices_with(0, spectral=9.0), "weights", "pos-0: spectral 9.0"),
        (devices_with(0, copies=2), "weights", "pos-0: copies 2, the rules give 1"),
    ],
)
def test_what_all_three_signed_is_still_held_to_the_rules(
    change: Callable[[Decision], Decision], check: str, words: str
) -> None:
    found = written().replay(written().transcript(change(written().decision)))
    assert words in problems(found)[check]


def test_more_contributions_than_were_announced_are_noticed() -> None:
    task = msgspec.structs.replace(written().world.task, contributions_max=6)
    found = problems(written().replay(written().transcript(task=task)))
    assert found["validity"] == "7 contributions, announced were 6 at most"


def test_a_gram_matrix_of_other_updates_does_not_foretell_the_sum() -> None:
    decision = written().decision
    entries = np.frombuffer(decision.gram, dtype="<i8").copy()
    entries[0] += 1 << 8
    found = written().replay(written().transcript(msgspec.structs.replace(decision, gram=entries.tobytes())))
    assert "another norm than the Gram matrix foretells" in problems(found)["openings"]


@pytest.mark.parametrize(
    ("changes", "check", "words"),
    [
        ({"round_id": "fraud-8"}, "settlement", "settles round 'fraud-8', expected 'fraud-7'"),
        ({"root": "0" * 64}, "settlement", "settles root"),
        ({"model": "other"}, "settlement", "settles model"),
        ({"mean": "0" * 64}, "settlement", "the mean has digest"),
        ({"mean": ""}, "settlement", "settled was none"),
        ({"spend": Spend(3.0)}, "settlement", "settles a noise multiplier of 3, announced was 0"),
        ({"epsilon_device": 0.1}, "epsilon", "epsilons without a spend"),
        ({"delta": 1e-5}, "epsilon", "epsilons without a spend"),
        ({"before_release": SPENT}, "epsilon", "an account without a spend"),
    ],
)
def test_what_the_coordinator_signed_is_computed_again(changes: dict[str, Any], check: str, words: str) -> None:
    settled = msgspec.structs.replace(written().settlement, **changes)
    assert words in problems(written().replay(written().transcript(settlement=settled)))[check]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "check", "words"),
    [
        ({"epsilon_release": 0.1}, "epsilon", "epsilon of the release is"),
        ({"epsilon_device": 0.1}, "epsilon", "epsilon of the device is"),
        ({"spend": Spend(30.0)}, "epsilon", "epsilon of the release is"),
        ({"before_device": (Spend(1e4),)}, "epsilon", "not the one that the aggregators signed"),
        ({"before_release": ()}, "epsilon", "epsilon of the release is"),
        ({"spend": None}, "settlement", "settles a noise multiplier of 0, announced was 3"),
    ],
)
def test_epsilons_are_computed_again(changes: dict[str, Any], check: str, words: str) -> None:
    settled = msgspec.structs.replace(written(3.0).settlement, **changes)
    assert words in problems(written(3.0).replay(written(3.0).transcript(settlement=settled)))[check]


def test_any_other_byte_in_a_transcript_is_noticed() -> None:
    """Unless it changes nothing that is read: what a reader does not know it passes over."""
    transcript = written().transcript()
    data, rng = pack(transcript), np.random.default_rng(7)
    for place in rng.choice(len(data), 100, replace=False).tolist():
        changed = bytearray(data)
        changed[place] ^= 1 << int(rng.integers(8))
        if replay(bytes(changed), written().world.anchors).holds:
            assert unpack(bytes(changed), Transcript) == transcript, place


def too_few(**changes: Any) -> tuple[SecureRound, Decision]:
    """A round in which fewer than m_min pass the check, or come to it at all."""
    world = SecureRound(length=LENGTH, policy="krum", **changes)
    rows = np.zeros((4, LENGTH), dtype=np.uint32)
    rows[:2] = 2**31
    return world, world.run_rows(rows)[2]


@pytest.mark.parametrize(
    ("selected_min", "change", "words"),
    [
        (3, fields(refusal="we did not like it"), "refusal is we did not like it, the rules give 2 usable"),
        (3, devices_with(0, reason="disliked"), "pos-0000: reason 'disliked', the rules give 'range check"),
        (3, devices_with(3, norm=1.0), "pos-0003: norm 1.0, the rules give -1.0"),
        (3, devices_with(0, valid=1), "3 contributions were usable, and none was measured"),
        (3, fields(divisor=1), "divisor is 1, the rules give 0"),
        (3, fields(gram=b"12345678"), "gram is"),
        (5, devices_with(3, reason="disliked"), "the rules give '3 usable contributions, a sum of fewer than 5"),
        (5, fields(refusal="5 usable"), "refusal is 5 usable, the rules give 0 usable contributions"),
    ],
)
def test_a_round_that_opened_nothing_is_held_to_the_rules_too(
    selected_min: int, change: Callable[[Decision], Decision], words: str
) -> None:
    world, decision = too_few(selected_min=selected_min)
    assert replay(transcript_without_a_sum(world, decision), world.anchors).holds
    found = problems(replay(transcript_without_a_sum(world, change(decision)), world.anchors))
    assert words in found["weights"]


def transcript_without_a_sum(world: SecureRound, decision: Decision) -> bytes:
    return world.transcript([Outcome(pack(decision), None)] * 3)


def test_a_share_beside_a_refusal_is_named() -> None:
    world, decision = too_few()
    share = Pair(*np.zeros((2, LENGTH), dtype=np.uint32))
    outcomes = [Outcome(pack(decision), None), Outcome(pack(decision), share), Outcome(pack(decision), None)]
    with pytest.raises(Untrusted, match="centre: opened a share of a sum, though nobody was selected"):
        combine_openings(world.replies(outcomes), world.task)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"delta": 1e-6}, "announced was 1e-06"),
        ({"epsilon": 0.1}, "epsilon of the release is"),
        ({"epsilon_device": 0.1}, "epsilon of the device is"),
    ],
)
def test_an_account_beyond_its_announced_budget_does_not_hold(changes: dict[str, Any], words: str) -> None:
    task = msgspec.structs.replace(written(3.0).world.task, **changes)
    assert words in problems(written(3.0).replay(written(3.0).transcript(task=task)))["epsilon"]


@pytest.mark.slow
def test_the_coordinator_settles_the_account_that_was_signed() -> None:
    """Not the one of a later attempt at the same opening: other models' rounds may have opened in between."""
    task, decision = written(3.0).world.task, written(3.0).decision
    found = Round(
        round_id=task.round_id,
        spec=RoundSpec(model="fraud"),
        task=task,
        announcement=b"",
        state=State.AGGREGATING.value,
        opened=0.0,
        root=decision.root,
    )
    settled = _settlement(found, written(3.0).settlement.mean, decision)
    assert written(3.0).replay(written(3.0).transcript(settlement=settled)).holds


def test_every_check_is_made() -> None:
    assert tuple(check.name for check in written().replay(written().transcript()).checks) == CHECKS
