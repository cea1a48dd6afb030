"""One aggregator of three that lies: in every message of the protocol, in what it signs, and about its memory.

A round with a lie in it ends in one of two ways, and the threat model says which for which message: it fails with the
name of the liar, or of two of whom one lies; or it fails without a name. Never is anything opened but the weighted sum
of the devices that the signed decision names, of at least m_min. How often a lie passes the checks of what is computed
on shares is in test_verified_steps.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from fl_coordinator.aggregation import OPENING_TYPE, combine_openings
from fl_coordinator.channel import Channel
from fl_coordinator.replay import replay
from fl_coordinator.shares.bounds import bounds_of, fitted, noise_std
from fl_coordinator.shares.decision import Decision
from fl_coordinator.shares.freezing import Frozen
from fl_coordinator.shares.origins import Compared
from fl_coordinator.shares.party import _Coin, _Hello
from fl_coordinator.shares.streams import Words
from model_delta.digest import digest_of
from model_delta.encoding import pack, unpack
from model_delta.errors import Malformed, SignatureInvalid, Untrusted
from model_delta.trust.signing import open_envelope, seal_envelope, sign
from tests.fakes.secure_round import NAMES, ArrayRows, SecureRound, honest_rows, random_holdings, run_parties

Change = Callable[[SecureRound, bytes], bytes]
LIAR = 1


def world_of(**changes: object) -> SecureRound:
    return SecureRound(length=20, **{"selected_min": 4, "hostile_max": 1, "contributions_max": 16, **changes})


def flipped(world: SecureRound, data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :]


def shorter(world: SecureRound, data: bytes) -> bytes:
    return data[:-1]


def of_hello(**changes: object) -> Change:
    return lambda world, data: pack(msgspec.structs.replace(unpack(data, _Hello), **changes))


def of_freeze(signed_by: int = LIAR, **changes: object) -> Change:
    """Another freeze, signed."""

    def change(world: SecureRound, data: bytes) -> bytes:
        hello = unpack(data, _Hello)
        said = unpack(open_envelope(hello.frozen).payload, Frozen)
        sealed = world.sign_frozen(signed_by, msgspec.structs.replace(said, **changes))
        return pack(msgspec.structs.replace(hello, frozen=sealed))

    return change


def of_compare(change: Callable[[Compared], Compared]) -> Change:
    return lambda world, data: pack(change(unpack(data, Compared)))


def of_coin(**changes: object) -> Change:
    return lambda world, data: pack(msgspec.structs.replace(unpack(data, _Coin), **changes))


def complaint(compare: Compared) -> Compared:
    return msgspec.structs.replace(compare, refusals=((2, "said to one only"),))


def endless_complaint(compare: Compared) -> Compared:
    return msgspec.structs.replace(compare, refusals=((99, "nobody"),))


def run(world: SecureRound, rows: Words, step: str, victims: set[int], change: Change, liar: int = LIAR) -> Decision:
    """The decision of a round in which the liar changes its messages of a step to some peers; what was opened is the
    sum that the decision says, or Untrusted is raised."""

    def tamper(sender: int, receiver: int, name: str, data: bytes) -> bytes:
        return change(world, data) if (sender, name) == (liar, step) and receiver in victims else data

    outcomes, _, decision = world.run_rows(rows, tamper)
    aggregate = combine_openings(world.replies(outcomes), world.task)
    if decision.selected:
        assert len(decision.selected) >= world.task.selected_min
        chosen = rows[list(decision.selected)].view(np.int32) / 2.0**world.task.fraction_bits
        weights = np.array([decision.devices[index].weight for index in decision.selected])
        assert aggregate.mean is not None
        assert np.allclose(aggregate.mean, weights @ chosen / decision.divisor, atol=1e-6)
    else:
        assert aggregate.mean is None
    assert replay(world.transcript(outcomes), world.anchors).holds
    return decision


NAMED = [
    ("hello", {0}, of_hello(nonce=bytes(32)), r"step 'coin': .* saw other messages"),
    ("hello", {0, 2}, of_hello(frozen=b"nothing"), "centre: its signed freeze"),
    ("hello", {0, 2}, of_freeze(signed_by=2), "centre: its signed freeze: .*expected 1 valid signature"),
    ("hello", {0, 2}, of_freeze(index=2), "centre: its signed freeze is of aggregator 2"),
    ("hello", {0}, of_freeze(root="0" * 64), "centre: step 'hello': signed root 0000"),
    ("hello", {2}, of_freeze(task="0" * 64), "centre: step 'hello': signed announcement 0000"),
    ("hello", {2}, of_freeze(count=5), "centre: step 'hello': signed number of contributions 5, expected 6"),
    ("hello", {0}, of_freeze(attempt=2), "centre: step 'hello': signed attempt 2, expected 1"),
    ("hello", {2}, of_freeze(format=2), "centre: step 'hello': signed format 2, expected 3"),
    ("hello", {0, 2}, of_freeze(commitment=bytes(32)), "centre: step 'coin': does not open its commitment"),
    ("hello", {0}, shorter, "centre: step 'hello'"),
    ("compare", {0}, of_compare(complaint), "step 'coin': .* saw other messages"),
    ("compare", {0, 2}, of_compare(endless_complaint), "centre: step 'compare': no contribution 99 among 6"),
    ("compare", {2}, lambda w, data: data[:-40], "centre: step 'compare'"),
    ("coin", {0, 2}, of_coin(secret=bytes(32)), "centre: step 'coin': does not open its commitment"),
    ("coin", {0}, of_coin(seen="0" * 64), "step 'coin': centre saw other messages"),
    ("measured", {0}, flipped, "centre: step 'measured': what it says it measured of a share is not what"),
    ("measured", {0}, shorter, "centre: step 'measured': expected"),
    ("lift", {0}, shorter, "centre: step 'lift': expected"),
    ("range", {0}, flipped, "centre and south sent different values"),
    ("range", {2}, flipped, "centre and north sent different values"),
    ("gram", {0}, shorter, "centre: step 'gram': expected"),
    ("agree", {0}, lambda w, data: digest_of(b"other").encode(), "centre saw another decision than the rest"),
]


@pytest.mark.parametrize(("step", "victims", "change", "words"), NAMED)
def test_a_lie_about_what_is_said_to_all_is_named(step: str, victims: set[int], change: Change, words: str) -> None:
    world = world_of()
    with pytest.raises(Untrusted, match=words):
        run(world, honest_rows(world, 6), step, victims, change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w, data: bytes([data[0] ^ 1]) + data[1:], "the three shares add up to odd numbers"),
        (
            lambda w, data: data[:8] + bytes([data[8] ^ 2]) + data[9:15] + bytes([data[15] ^ 1]) + data[16:],
            "are no inner",
        ),
    ],
    ids=["odd", "large"],
)
def test_numbers_that_are_no_inner_products_end_the_round(change: Change, words: str) -> None:
    world = world_of()
    with pytest.raises(Untrusted, match=words):
        run(world, honest_rows(world, 6), "gram", {0, 2}, change)


@pytest.mark.parametrize("place", range(7))
def test_a_careful_lie_about_distances_ends_the_round_before_anything_is_chosen(place: int) -> None:
    """A liar that adds to one diagonal entry of the opened matrix, the same to both peers and to itself."""
    world = world_of()
    rows = honest_rows(world, 7)
    upper = np.triu_indices(len(rows))
    entry = next(at for at, pair in enumerate(zip(*upper, strict=True)) if pair == (place, place))

    def tamper(sender: int, receiver: int, name: str, data: bytes) -> bytes:
        if name != "gram" or (sender != LIAR and (sender, receiver) != (0, LIAR)):
            return data
        words = np.frombuffer(data, dtype="<u8").copy()
        words[entry] += np.uint64(2_000)
        return words.tobytes()

    outcomes: list[Any] = []
    with pytest.raises(Untrusted, match="what was opened are not the products of the sketches"):
        outcomes.append(world.run_rows(rows, tamper))
    assert not outcomes


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        (lambda holding: dataclasses.replace(holding, refusals={2: "I do not like it"}), "centre: I do not like it"),
        (
            lambda holding: dataclasses.replace(holding, first=ArrayRows(holding.first.words ^ np.uint32(1))),
            "inconsistent shares: centre and north were sealed different values of share 1",
        ),
    ],
)
def test_a_false_complaint_keeps_devices_out_and_names_who_complained(lie: Callable[[Any], Any], reason: str) -> None:
    """An aggregator may say to both that contributions are bad, or differ from what the other holder has. It takes
    devices out of the round that way, in its own name and on record."""
    world, count = world_of(), 9
    holdings = random_holdings(honest_rows(world, count), 0)
    names = [bytes.fromhex(digest) for digest in holdings[0].digests]
    holdings[LIAR] = lie(holdings[LIAR])
    parties = [world.party(index, names, holding=holding) for index, holding in enumerate(holdings)]
    decision = unpack(run_parties(parties)[0][0].decision, Decision)
    assert decision.devices[2].reason == reason
    assert (decision.devices[2].valid, decision.devices[2].weight) == (-1, 0)


def test_without_a_lie_the_mean_is_that_of_the_chosen() -> None:
    world = world_of()
    assert run(world, honest_rows(world, 6), "nothing", set(), flipped).selected


def test_nobody_opens_in_anothers_name() -> None:
    """Two aggregators' silence cannot be made up for by the third one's key, whoever asks."""
    world = world_of()
    replies = world.replies(world.run_rows(honest_rows(world, 6))[0])
    for index in (0, 2):
        envelope = open_envelope(replies[index]["opening"])
        forged = seal_envelope(sign(OPENING_TYPE, envelope.payload, [world.signing[LIAR]]))
        with pytest.raises(SignatureInvalid, match="expected 1 valid signature"):
            combine_openings(
                [*replies[:index], {**replies[index], "opening": forged}, *replies[index + 1 :]], world.task
            )
    with pytest.raises(Untrusted, match="centre: opened round 'fraud-7' twice"):
        combine_openings([replies[0], replies[LIAR], replies[LIAR]], world.task)


@pytest.mark.parametrize("key", [bytes(32), bytes(31)], ids=["of low order", "too short"])
def test_a_peers_key_that_hides_nothing_is_refused(key: bytes) -> None:
    with pytest.raises(Malformed, match="south: X25519 key"):
        Channel(world_of().sealing[LIAR], key, "centre", "south", "fraud-7", 1, "0" * 64)


def test_more_contributions_than_the_numbers_allow_are_not_summed() -> None:
    world = world_of(contributions_max=8)
    holding = random_holdings(honest_rows(world, 9), 0)[0]
    with pytest.raises(Malformed, match="its numbers allow 8 contributions, found 9"):
        world.party(0, [], holding=holding)


def test_two_tongues_in_a_shares_noise_do_not_add_up() -> None:
    world = world_of(noise_multiplier=0.5)
    with pytest.raises(Untrusted, match="centre: step 'noise': expected 32 bytes, found 31"):
        run(world, honest_rows(world, 6), "noise", {2}, shorter)
    with pytest.raises(Untrusted, match="centre: step 'noise': expected 80 bytes, found 79"):
        run(world, honest_rows(world, 6), "noise", {0}, shorter)
    for victim in (0, 2):
        with pytest.raises(Untrusted, match=r"^(north or centre|centre or south): a share of the opened sum differs"):
            run(world, honest_rows(world, 6), "noise", {victim}, flipped)


@pytest.mark.parametrize(
    ("length", "reveal", "policy"),
    [(20, "distances", "krum"), (3_000, "distances", "krum"), (20, "selection", "multikrum")],
)
def test_what_is_dealt_as_noise_and_is_none_shows_in_the_length_of_the_sum(
    length: int, reveal: str, policy: str
) -> None:
    """Honest noise passes, however often; an aggregator that deals a long vector in its place does not."""
    world = SecureRound(length=length, noise_multiplier=0.5, contributions_max=16, selected_min=4, policy=policy)
    world.task = fitted(msgspec.structs.replace(world.task, reveal=reveal, hostile_max=1))
    rows = honest_rows(world, 6)
    deviation = noise_std(world.task)

    def opened(dealt: float | None) -> None:
        def tamper(sender: int, receiver: int, name: str, data: bytes) -> bytes:
            if (sender, receiver, name) != (LIAR, 0, "noise") or dealt is None:
                return data
            return (np.frombuffer(data, "<u4") + np.uint32(int(dealt))).astype("<u4").tobytes()

        parties = [world.party(index, names, holding=holding) for index, holding in enumerate(holdings)]
        for party in parties:
            party._own_secret = os.urandom(32)
        if dealt is not None:
            steps = parties[LIAR]._noisy

            def noisy(decision: bytes, first: Words, second: Words) -> Any:
                one, two = yield from steps(decision, first, second)
                return one + np.uint32(int(dealt)), two

            parties[LIAR]._noisy = noisy  # type: ignore[method-assign]
        outcomes, _ = run_parties(parties, tamper)
        assert combine_openings(world.replies(outcomes), world.task).mean is not None

    holdings = random_holdings(rows, 0)
    names = [bytes.fromhex(digest) for digest in holdings[0].digests]
    for _ in range(20 if length == 20 else 3):
        opened(None)
    far = 40 * deviation + 20 * bounds_of(world.task).norm * (reveal != "distances")
    with pytest.raises(Untrusted, match="longer or shorter than its noise can make it"):
        opened(far)


@pytest.mark.slow
def test_every_message_may_be_a_lie_and_nothing_but_the_sum_of_the_chosen_is_opened() -> None:
    """Each message of each aggregator in turn, one bit of it: the round fails by Untrusted, or what it opens is right
    for what was signed."""
    world = world_of()
    rows = honest_rows(world, 6)
    _, views, honest = world.run_rows(rows)
    messages = [(step, sender, peer) for sender, view in enumerate(views) for step, peer in view.sent]
    assert {step for step, _, _ in messages} >= {"hello", "compare", "coin", "measured", "range", "lift", "gram"}
    turned: dict[str, set[str]] = {}
    for step, sender, peer in messages:
        if sender != LIAR and step != "lift-bit":  # what the others send it sends as well
            continue
        try:
            decision = run(world, rows, step, {peer}, flipped, sender)
            told = "same" if decision.selected == honest.selected else "other"
        except Untrusted as error:
            told = "named" if any(name in str(error) for name in NAMES) else "failed"
        turned.setdefault(step, set()).add(told)
    of_all = {"hello", "compare", "coin", "measured", "range", "agree"}
    coins = {step for step in turned if step.endswith(("-coin", "-sums", "-check"))}
    assert coins >= {"range-coin", "lift-sums", "gram-coin", "gram-sums", "range-check", "lift-check"}
    for step in of_all | coins:
        assert turned[step] == {"named"}, step
    for step in turned.keys() - of_all - coins - {"lift-bit"}:
        assert turned[step] <= {"named", "failed"}, step
    assert turned["lift-bit"] <= {"failed", "same"}  # a lie that depends on a bit which the liar does not know
