"""Three parties in lock-step: the choice is the plain rule's, malformed updates are named, nobody sees an update."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_coordinator.shares.bounds import bounds_of
from fl_coordinator.shares.decision import Decision, judge, read_gram
from fl_coordinator.shares.freezing import Frozen, joint_coin, statement
from fl_coordinator.shares.measuring import Coefficients
from fl_coordinator.shares.origins import Compared
from fl_coordinator.shares.party import AggregationParty, Committed, Keep, Outcome, Protocol, _Coin, _Hello
from fl_coordinator.shares.sharing import Exchange, _digest
from fl_coordinator.shares.streams import Words
from model_delta.encoding import pack, unpack
from model_delta.errors import Untrusted
from model_delta.trust.signing import open_envelope
from tests.fakes.secure_round import (
    NAMES,
    ArrayRows,
    SecureRound,
    honest_rows,
    measure_words,
    ones_off_balance,
    opened_sum,
    random_holdings,
    run_parties,
    whole,
)


def plain_choice(world: SecureRound, rows: Words, decision: Decision) -> tuple[tuple[int, ...], list[int], str]:
    """What the rule says of the same encoded inputs in clear, with the same coin: selection, weights, refusal. Integers
    of Python's own, sketches where the round has them."""
    task, bounds = world.task, bounds_of(world.task)
    bound = 2**bounds.exponent
    coefficients = Coefficients(decision.coin, task.length, bounds)
    sums = np.array(
        rows.astype(object) @ coefficients.ternary().astype(np.int64).astype(object) % 2**32, dtype=np.int64
    )
    inside = [i for i, row in enumerate(sums) if ((row < bound) | (row >= 2**32 - bound)).all()]
    if len(inside) < task.selected_min:
        return (), [], "few"
    integers = [coefficients.sketch_exact(row.view(np.int32).astype(np.int64)).astype(object) for row in rows[inside]]
    gram = np.array([[int(a @ b) for b in integers] for a in integers], dtype=np.int64)
    names = [decision.devices[index].device_id for index in inside]
    chosen = judge(task, gram, names, len(rows) - len(inside)).choice
    weights = [int(weight) for weight in chosen.integers if weight]
    return tuple(inside[i] for i in chosen.selected), weights, chosen.refusal


def test_thirty_honest_and_four_hostile_from_device_to_sum() -> None:
    world = SecureRound(length=500, hostile_max=4, selected_min=8)
    rng = np.random.default_rng(3)
    common = 0.05 * rng.normal(size=500)
    updates = [common + 0.02 * rng.normal(size=500) for _ in range(30)]
    updates += [-5 * common + 0.02 * rng.normal(size=500) for _ in range(4)]
    contributions = [world.contribution(f"pos-{i:04d}", update) for i, update in enumerate(updates)]
    outcomes, views = world.run(contributions)
    decision = unpack(outcomes[0].decision, Decision)
    assert decision.selected == tuple(range(30))
    assert decision.refusal == ""
    for verdict in decision.devices[30:]:
        assert "sigma above the median" in verdict.reason
        assert verdict.krum_score > 10 * decision.devices[0].krum_score
        assert verdict.weight == 0
    holdings = [world.hold(contributions, index) for index in range(3)]
    encoded = sum(whole(holding.first, 34) for holding in holdings)
    assert np.array_equal(opened_sum(outcomes), encoded[:30].sum(axis=0, dtype=np.uint32))
    assert np.abs(encoded[5].view(np.int32) / 2.0**16 - updates[5]).max() < 2.0**-15
    for view in views:
        assert [keep.agreed for keep in view.kept] == [False, True]
        assert {keep.decision for keep in view.kept} == {outcomes[0].decision}


@given(
    seed=st.integers(0, 2**32),
    length=st.sampled_from([1, 2, 7, 20, 40, 2049, 4200]),
    count=st.integers(3, 12),
    hostile=st.integers(0, 3),
    spread=st.sampled_from([0, 1, 1000, 2**18, 2**20, 2**22, 2**24, 2**26, 2**31 - 1001]),
    policy=st.sampled_from(["krum", "robust", "history"]),
)
@settings(max_examples=40, deadline=None)
def test_selection_on_shares_is_the_plain_rule_on_the_same_inputs(
    seed: int, length: int, count: int, hostile: int, spread: int, policy: str
) -> None:
    world = SecureRound(
        length=length, hostile_max=hostile, selected_min=hostile + 2, policy=policy, contributions_max=16
    )
    rng = np.random.default_rng(seed)
    rows = rng.integers(-1000, 1001, size=(count, length), dtype=np.int64)
    wild = rng.random(count) < 0.3
    rows[wild] += rng.integers(-spread, spread + 1, size=(int(wild.sum()), length), dtype=np.int64)
    encoded = rows.astype(np.int32).view(np.uint32)
    outcomes, _, decision = world.run_rows(encoded, seed=seed)
    selected, weights, refusal = plain_choice(world, encoded, decision)
    assert decision.selected == selected
    assert [decision.devices[index].weight for index in selected] == weights
    assert bool(decision.refusal) == bool(refusal) == (not selected)
    if selected:
        expected = (encoded[list(selected)] * np.array(weights, dtype=np.uint32)[:, None]).sum(axis=0, dtype=np.uint32)
        assert np.array_equal(opened_sum(outcomes), expected)


# --- who sees what --------------------------------------------------------------------------------------------------


Answer = Callable[[Exchange], dict[int, bytes] | None]
"""What the simulated peers of one party say in a step; None: what they say in every round."""


def simulate(world: SecureRound, index: int, rows: Words, gram: np.ndarray, answer: Answer | None = None) -> Outcome:
    """Run one party against peers that know only what is opened anyway: every bit 1, and the Gram matrix.

    No update enters: the party's own shares are random words, and each message it receives is random, or what makes the
    opened values come out.
    """
    noise = np.frombuffer(os.urandom(2 * rows.nbytes), dtype="<u4").reshape(2, *rows.shape)
    holding = random_holdings(rows, 0)[index]
    holding = dataclasses.replace(holding, first=ArrayRows(noise[0]), second=ArrayRows(noise[1]))
    following, preceding = (index + 1) % 3, (index - 1) % 3
    party = world.party(index, [], holding=holding)
    secrets = {peer: os.urandom(32) for peer in (following, preceding)}
    steps, received, coin = party.steps(), None, b""
    while True:
        try:
            wanted = next(steps) if received is None else steps.send(received)
        except StopIteration as done:
            return done.value
        if isinstance(wanted, Keep | Committed):
            received = {}
            continue
        if wanted.step == "coin":
            coins = {**secrets, index: unpack(wanted.outgoing[following], _Coin).secret}
            coin = joint_coin(world.task.round_id, party._root, [coins[place] for place in range(3)])
        if wanted.step == "measured":
            coefficients = Coefficients(coin, world.task.length, bounds_of(world.task))
            received = {following: measure_words(coefficients, noise[1]).joined.tobytes()}
            continue
        told = checked(steps, wanted, following, preceding)
        told = told if told is not None or answer is None else answer(wanted)
        received = told if told is not None else simulated(world, wanted, secrets, following, preceding, gram, rows)


def checked(steps: Protocol, wanted: Exchange, following: int, preceding: int) -> dict[int, bytes] | None:
    """What two peers say together in the steps that check others: random words where random ones are opened, what makes
    spare products right, and, where something is zero, the digest that a party expects. All follow from its own view.
    """
    frames: dict[str, dict[str, Any]] = {}
    innermost: Any = steps
    while innermost is not None:
        frames[innermost.__name__] = innermost.gi_frame.f_locals
        innermost = innermost.gi_yieldfrom
    if "_is_lacking" in frames:
        return dict.fromkeys(wanted.expected, frames["_is_lacking"]["expected"])
    if "missing_share" in frames:
        own = frames["missing_share"]["shared"]
        missing = np.frombuffer(os.urandom(own.first.nbytes), dtype=np.uint64).copy()
        if "check" in frames:
            spare = frames["check"]["lanes"] * frames["check"]["shown"]
            x, y, _ = (own.first ^ own.second ^ missing)[: 3 * spare].reshape(3, -1)
            missing[2 * spare : 3 * spare] = (x & y) ^ (own.first ^ own.second)[2 * spare : 3 * spare]
        return {preceding: missing.tobytes(), following: _digest(wanted.step, missing.tobytes())}
    if "toss" in frames:
        (step, after), one, other = frames["toss"]["names"], os.urandom(32), os.urandom(32)
        return {preceding: one + _digest(after, other), following: other + _digest(step, one)}
    return None


def simulated(
    world: SecureRound,
    wanted: Exchange,
    secrets: dict[int, bytes],
    following: int,
    preceding: int,
    gram: np.ndarray,
    rows: Words,
) -> dict[int, bytes]:
    count, length = rows.shape
    if wanted.step == "hello":
        own = unpack(open_envelope(unpack(wanted.outgoing[following], _Hello).frozen).payload, Frozen)
        return {
            peer: pack(_Hello(os.urandom(32), world.sign_frozen(peer, said), ""))
            for peer, secret in secrets.items()
            for said in [statement(world.task, own.task, 1, own.root, count, peer, secret)]
        }
    if wanted.step == "compare":
        own, third = unpack(wanted.outgoing[following], Compared), os.urandom(32 * count)
        return {following: pack(Compared((), own.second, third)), preceding: pack(Compared((), third, own.first))}
    if wanted.step == "coin":
        own_coin = unpack(wanted.outgoing[following], _Coin)
        return {peer: pack(_Coin(secret, own_coin.seen)) for peer, secret in secrets.items()}
    if wanted.step == "range":
        first, second = (np.frombuffer(wanted.outgoing[peer], dtype="<u4") for peer in (following, preceding))
        return dict.fromkeys(secrets, (first ^ second ^ np.uint32(1)).tobytes())
    if wanted.step == "gram":
        own_share = np.frombuffer(wanted.outgoing[following], dtype="<u8")
        other = np.frombuffer(os.urandom(own_share.nbytes), dtype="<u8")
        doubled = (2 * gram[np.triu_indices(count)]).view(np.uint64)
        return {following: other.tobytes(), preceding: (doubled - own_share - other).tobytes()}
    if wanted.step == "agree":
        return {peer: wanted.outgoing[peer] for peer in secrets}
    unsent = {"lift-bit": 4 * count * length}
    sizes = {len(data) for data in wanted.outgoing.values()} or {unsent.get(wanted.step, 0)}
    return {peer: os.urandom(max(sizes)) for peer in wanted.expected}


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_partys_view_can_be_made_from_what_is_opened_alone(index: int) -> None:
    """The simulation argument, run: from random messages and the Gram matrix the party gets to the same decision, so
    its messages tell it nothing else (that the true ones look as random is the next test, and AES)."""
    world = SecureRound(length=50, hostile_max=1, selected_min=4)
    rows = honest_rows(world, 8)
    rows[6] = -rows[6]
    _, _, decision = world.run_rows(rows)
    integers = rows.view(np.int32).astype(np.int64)
    outcome = simulate(world, index, rows, integers @ integers.T)
    again = unpack(outcome.decision, Decision)
    assert again.devices == decision.devices
    assert (again.gram, again.selected) == (decision.gram, decision.selected)


@pytest.mark.parametrize("row", ["zero", "honest"])
def test_what_a_party_holds_and_receives_looks_random_whatever_the_update(row: str) -> None:
    world = SecureRound(length=300, selected_min=4)
    contributions = []
    rows = np.zeros((8, 300), dtype=np.uint32) if row == "zero" else honest_rows(world, 8)
    for place, encoded in enumerate(rows):
        contributions.append(world.raw(f"pos-{place:04d}", encoded))
    outcomes, views = world.run(contributions)
    assert unpack(outcomes[0].decision, Decision).selected == tuple(range(8))
    steps = 0
    for index, view in enumerate(views):
        holding = world.hold(contributions, index)
        for share in (whole(holding.first, 8), whole(holding.second, 8)):
            assert ones_off_balance(share.tobytes()) < 6
            if row == "honest":
                pairs = zip(share.view(np.int32), rows.view(np.int32), strict=True)
                assert max(abs(np.corrcoef(held, update)[0, 1]) for held, update in pairs) < 6 / math.sqrt(300)
        for (step, _), data in view.received.items():
            assert all(encoded.tobytes()[:64] not in data for encoded in rows)
            if step not in ("hello", "compare", "coin", "range", "agree"):
                steps += 1
                assert ones_off_balance(data) < 6, step
    assert steps > 3 * 15


def test_the_coordinator_sees_the_sum_and_no_summand() -> None:
    world = SecureRound(length=300, selected_min=4)
    rows = honest_rows(world, 8)
    outcomes, _, decision = world.run_rows(rows)
    for outcome in outcomes:
        for share in (outcome.opened.first, outcome.opened.second):
            assert ones_off_balance(share.tobytes()) < 6
            assert not any(encoded.tobytes()[:64] in share.tobytes() for encoded in rows)
    assert np.array_equal(opened_sum(outcomes), rows.sum(axis=0, dtype=np.uint32))
    assert not any(encoded.tobytes()[:64] in outcomes[0].decision for encoded in rows)
    integers = rows.view(np.int32).astype(np.int64)
    assert np.array_equal(read_gram(decision), integers @ integers.T)


def test_two_attempts_share_a_coin_and_no_mask() -> None:
    world = SecureRound(length=60, selected_min=4)
    contributions = [world.raw(f"pos-{i:04d}", row) for i, row in enumerate(honest_rows(world, 6))]
    first, second = (world.run(contributions, attempt=attempt) for attempt in (1, 1))
    for step, sender in first[1][0].received:
        if step not in ("range", "measured", "agree"):  # what was measured goes, as it is, to who has that share
            assert first[1][0].received[step, sender] != second[1][0].received[step, sender], step
    assert np.array_equal(opened_sum(first[0]), opened_sum(second[0]))
    assert len({unpack(outcomes[0].decision, Decision).coin for outcomes, _ in (first, second)}) == 1
    other = [world.raw(f"pos-{i:04d}", row) for i, row in enumerate(honest_rows(world, 6))]
    assert world.decide(other).coin != world.decide(contributions).coin


def test_who_commits_to_another_coin_for_the_same_list_is_named() -> None:
    """Whoever makes attempts fail after the distances were opened sees no other sketch of the same updates."""
    world = SecureRound(length=60, selected_min=4)
    contributions = [world.raw(f"pos-{i:04d}", row) for i, row in enumerate(honest_rows(world, 6))]
    _, views = world.run(contributions)
    assert len({view.committed for view in views}) == 1

    def again(liar: int | None) -> list[AggregationParty]:
        parties = [world.party(i, contributions, attempt=2, committed=views[i].committed) for i in range(3)]
        for index, party in enumerate(parties):
            if index == liar:
                party._own_secret, party._committed = os.urandom(32), ()
        return parties

    run_parties(again(None))
    with pytest.raises(Untrusted, match="centre: step 'coin': committed to another part of the coin"):
        run_parties(again(1))


# --- refusals -------------------------------------------------------------------------------------------------------


def test_too_few_usable_contributions_open_nothing_not_even_distances() -> None:
    world = SecureRound(length=60, selected_min=8)
    outcomes, views, decision = world.run_rows(honest_rows(world, 7))
    assert decision.refusal == "7 usable contributions, a sum of fewer than 8 is not opened"
    assert decision.selected == ()
    assert decision.gram == b""
    assert all(outcome.opened is None for outcome in outcomes)
    assert not any(step == "gram" for step, _ in views[0].sent)


def test_a_sum_of_fewer_than_selected_min_is_not_opened() -> None:
    world = SecureRound(length=60, hostile_max=2, selected_min=7)
    outcomes, _, decision = world.run_rows(honest_rows(world, 8))
    assert decision.refusal == "6 updates selected, a sum of fewer than 7 is not opened"
    assert all(outcome.opened is None for outcome in outcomes)
    assert all(verdict.reason for verdict in decision.devices)


# --- noise ----------------------------------------------------------------------------------------------------------


def test_noise_on_the_sum_is_as_strong_as_announced_and_the_same_when_opened_again() -> None:
    world = SecureRound(length=3000, selected_min=4, noise_multiplier=0.5, contributions_max=16)
    rows = honest_rows(world, 6)
    outcomes, views, decision = world.run_rows(rows)
    noise = (opened_sum(outcomes) - rows[list(decision.selected)].sum(axis=0, dtype=np.uint32)).view(np.int32)
    # Three parts of half the variance each: one may be subtracted by who colludes with its dealer.
    stated = 0.5 * bounds_of(world.task).norm * math.sqrt(1.5)
    assert abs(float(np.std(noise)) / stated - 1) < 6 / math.sqrt(2 * 3000)
    for view in views:
        received = [data for (step, _), data in view.received.items() if step == "noise"]
        assert sorted(map(len, received)) == [32, 4 * 3000]
        assert all(ones_off_balance(data) < 6 for data in received)

    def again(secret: int) -> Words:
        holdings = random_holdings(rows, 0)
        digests = [bytes.fromhex(digest) for digest in holdings[0].digests]
        parties = [world.party(i, digests, 2, holdings[i], outcomes[0].decision, True) for i in range(3)]
        for place, party in enumerate(parties):
            party._own_secret = bytes([secret, place]) * 16
        return opened_sum(run_parties(parties)[0])

    assert np.array_equal(again(1), again(1))
    assert not np.array_equal(again(1), again(2))


# --- attempts -------------------------------------------------------------------------------------------------------


def test_a_remembered_decision_is_repeated_and_a_forgotten_one_is_not_replaced() -> None:
    world = SecureRound(length=60, selected_min=4)
    contributions = [world.raw(f"pos-{i:04d}", row) for i, row in enumerate(honest_rows(world, 6))]
    outcomes, _ = world.run(contributions)
    decision = outcomes[0].decision

    def again(remembered: list[bytes], final: bool) -> list[Outcome]:
        parties = [
            world.party(i, contributions, attempt=2, remembered=remembered[i], final=final and bool(remembered[i]))
            for i in range(3)
        ]
        return run_parties(parties)[0]

    resumed = again([decision] * 3, final=True)
    assert {outcome.decision for outcome in resumed} == {decision}
    assert np.array_equal(opened_sum(resumed), opened_sum(outcomes))
    with pytest.raises(Untrusted, match="south no longer remembers that decision"):
        again([decision, decision, b""], final=True)
    fresh = again([decision, decision, b""], final=False)
    assert {unpack(outcome.decision, Decision).attempt for outcome in fresh} == {2}


def test_a_chosen_device_that_is_refused_by_the_next_attempt_ends_the_round_by_name() -> None:
    """Its certificate expired meanwhile, say: there is a decision, and no share of it any more."""
    world = SecureRound(length=60, selected_min=4)
    contributions = [world.raw(f"pos-{i:04d}", row) for i, row in enumerate(honest_rows(world, 6))]
    outcomes, _ = world.run(contributions)
    parties = [world.party(i, contributions, 2, remembered=outcomes[0].decision, final=True) for i in range(3)]
    for party in parties:
        party._holding = dataclasses.replace(party._holding, refusals={3: "its certificate expired"})
    with pytest.raises(Untrusted, match="decided with pos-0003, which is refused now: its certificate expired"):
        run_parties(parties)


def test_names_in_the_decision_are_the_announced_ones() -> None:
    world = SecureRound(length=60, selected_min=4)
    _, _, decision = world.run_rows(honest_rows(world, 6))
    assert decision.aggregators == NAMES
    assert (decision.round_id, decision.attempt, decision.base) == ("fraud-7", 1, world.task.base)
