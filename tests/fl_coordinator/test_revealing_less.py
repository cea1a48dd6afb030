"""Rounds that open bits or the chosen set instead of distances: the plain rule's choice, and nothing else shows."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from itertools import combinations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_coordinator.aggregation import OPENING_TYPE, Opening, combine_openings
from fl_coordinator.replay import replay
from fl_coordinator.rules import multikrum, outliers, policy, unseen
from fl_coordinator.rules.reveals import POLICIES, SELECTION_MAX
from fl_coordinator.shares.bounds import EXPONENT_MAX, bounds_of, require_announceable
from fl_coordinator.shares.comparing import as_numbers, negative, open_planes
from fl_coordinator.shares.decision import VERDICTS, Decision
from fl_coordinator.shares.measuring import Coefficients, coin_key
from fl_coordinator.shares.ranking import LENGTH_MAX, below, sums_where
from fl_coordinator.shares.revealing import SAMPLE_MAX, eps_doubled, near_matrix, quantile_place, unpacked
from fl_coordinator.shares.sharing import Exchange, Pair, Session, to_bytes
from fl_coordinator.shares.streams import Words, expand_bytes
from fl_coordinator.transcript import Settlement, mean_digest, transcript_of
from model_delta.digest import digest_of
from model_delta.encoding import pack, unpack
from model_delta.errors import Malformed, Untrusted
from model_delta.trust.signing import seal_envelope, sign
from tests.fakes.secure_round import SecureRound, measure_words, random_sharing
from tests.fakes.three_parties import together
from tests.fl_coordinator.test_lying_aggregators import flipped, run
from tests.fl_coordinator.test_secure_round import simulate

# --- comparisons ----------------------------------------------------------------------------------------------------


def joined(shares: list[Pair]) -> np.ndarray:
    for index in range(3):
        assert np.array_equal(shares[index].second, shares[(index + 1) % 3].first)
    return np.asarray(shares[0].first ^ shares[1].first ^ shares[2].first)


@given(
    seed=st.integers(0, 2**32),
    bits=st.sampled_from([(64, np.uint64), (49, np.uint64), (42, np.uint64), (5, np.uint64), (8, np.uint8)]),
    count=st.sampled_from([1, 2, 7, 8, 25]),
)
@settings(max_examples=40, deadline=None)
def test_signs_on_shares_are_signs(seed: int, bits: tuple[int, type[np.unsignedinteger]], count: int) -> None:
    width, word = bits
    rng = np.random.default_rng(seed)
    top = 1 << (width - 1)
    values = rng.integers(-top, top - 1, size=count, endpoint=True)
    edges = np.array([0, -1, 1, -top, top - 1], dtype=np.int64)
    values[: min(count, 5)] = edges[: min(count, 5)]
    pairs = random_sharing(values.astype(np.int64).astype(np.uint64).astype(word), seed)

    def signs(session: Session, index: int) -> object:
        found = yield from negative(session, "test", pairs[index], width)
        opened = yield from open_planes(session, "open", found, count)
        numbers = yield from as_numbers(session, "numbers", found, count, np.uint64)
        return found, opened, numbers

    found = together(signs)
    expected = values < 0
    assert np.array_equal(np.unpackbits(joined([one[0] for one in found]), count=count), expected)
    assert all(np.array_equal(one[1], expected) for one in found)
    assert np.array_equal(sum(one[2] for one in found), expected)


@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 4),
    length=st.sampled_from([1, 2, 3, 20, 128]),
    spread=st.sampled_from([1, 3, 2**40]),
)
@settings(max_examples=25, deadline=None)
def test_ranks_and_sums_on_shares_are_those_of_a_stable_sort(seed: int, rows: int, length: int, spread: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(0, spread, size=(rows, length)).astype(np.uint64)
    ranks = sorted(rng.integers(0, length + 1, size=2).tolist())
    pairs = random_sharing(values, seed)

    def lowest(session: Session, index: int) -> object:
        found = yield from below(session, "test", pairs[index], 42, ranks)
        part = Pair(*(np.packbits(np.unpackbits(s)[: values.size]) for s in (found.first, found.second)))
        return found, (yield from sums_where(session, "sums", part, pairs[index]))

    found = together(lowest)
    bits = np.unpackbits(joined([one[0] for one in found]), count=2 * values.size).reshape(2, rows, length)
    place = np.argsort(np.argsort(values, axis=1, kind="stable"), axis=1, kind="stable")
    for given_rank, one in zip(ranks, bits, strict=True):
        assert np.array_equal(one, place < given_rank)
    assert np.array_equal(sum(one[1] for one in found), np.sort(values, axis=1)[:, : ranks[0]].sum(axis=1))


def test_no_sum_of_distances_leaves_the_ring_in_any_round_that_may_be_announced() -> None:
    norm = (2**EXPONENT_MAX) // 6 + 1
    squared_max = 2 * 2 * norm * norm
    assert 1024 * 8 * squared_max < 2**58
    assert 36 * 8 * squared_max < 2**62


# --- the choice -----------------------------------------------------------------------------------------------------


def hidden_world(reveal: str, length: int = 40, **changes: object) -> SecureRound:
    chosen = {"hostile_max": 2, "selected_min": 4, "contributions_max": 16, **changes}
    return SecureRound(length=length, reveal=reveal, policy=POLICIES[reveal][0], **chosen)


def rows_of(length: int, count: int, seed: int, spread: int = 2000, far: int = 0) -> Words:
    """Encoded updates around zero, the first `far` of them elsewhere."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(-spread, spread + 1, size=(count, length))
    rows[:far] += 10 * spread
    return rows.astype(np.int32).view(np.uint32)


def plain_gram(world: SecureRound, rows: Words, decision: Decision) -> np.ndarray:
    """Inner products of the same measurements, in clear."""
    coefficients = Coefficients(decision.coin, world.task.length, bounds_of(world.task))
    own = measure_words(coefficients, rows).sketch.view(np.int32).astype(np.int64)
    return np.asarray(own @ own.T)


@given(
    seed=st.integers(0, 2**32),
    length=st.sampled_from([1, 2, 20, 2049]),
    count=st.integers(5, 16),
    hostile=st.integers(0, 3),
    spread=st.sampled_from([0, 1, 2, 1000, 2**17]),
)
@settings(max_examples=30, deadline=None)
def test_multikrum_on_shares_is_the_plain_rule(seed: int, length: int, count: int, hostile: int, spread: int) -> None:
    world = hidden_world("selection", length, hostile_max=hostile, selected_min=hostile + 2)
    rows = rows_of(length, count, seed, spread)
    rows[0] *= np.uint32(2)
    _, _, decision = world.run_rows(rows, seed=seed)
    gram = plain_gram(world, rows, decision)
    kept = np.flatnonzero(np.diagonal(gram) <= bounds_of(world.task).squared_max)
    assert decision.kept == tuple(kept.tolist())
    left = max(0, hostile - (count - len(kept)))
    if decision.refusal:
        assert decision.selected == ()
        assert unseen.refusal_before("multikrum", len(kept), left, hostile + 2)
        return
    plain = multikrum.select(gram[np.ix_(kept, kept)], left)
    assert decision.selected == tuple(int(kept[place]) for place in plain.selected)
    clear = policy.choose(
        "multikrum",
        gram[np.ix_(kept, kept)],
        left,
        [f"d{place}" for place in kept],
        selected_min=hostile + 2,
    )
    assert clear.selected == plain.selected


@given(
    seed=st.integers(0, 2**32),
    length=st.sampled_from([1, 3, 20, 2049]),
    count=st.integers(7, 16),
    eps=st.sampled_from([0.0, 0.0, 1e-4, 0.05, 0.4, 5.0]),
    spread=st.sampled_from([0, 1, 1000, 2**16]),
)
@settings(max_examples=30, deadline=None)
def test_the_bits_of_a_graph_are_those_of_the_distances(
    seed: int, length: int, count: int, eps: float, spread: int
) -> None:
    world = hidden_world("graph", length, eps_l2=eps)
    rows = rows_of(length, count, seed, spread, far=2)
    _, _, decision = world.run_rows(rows, seed=seed)
    gram = plain_gram(world, rows, decision)
    kept = np.flatnonzero(np.diagonal(gram) <= bounds_of(world.task).squared_max)
    assert decision.kept == tuple(kept.tolist())
    left = max(0, 2 - (count - len(kept)))
    if not decision.near:
        assert unseen.refusal_before("cluster", len(kept), left, 4)
        return
    gram = gram[np.ix_(kept, kept)]
    distances = np.diagonal(gram)[:, None] + np.diagonal(gram)[None, :] - 2 * gram
    pairs = distances[np.triu_indices(len(kept), 1)]
    if eps:
        near = 2 * pairs <= eps_doubled(world.task)
    else:
        draws = np.frombuffer(expand_bytes(coin_key(decision.coin, "pairs"), 8 * pairs.size), dtype="<u8")
        drawn = np.sort(pairs[np.argsort(draws, kind="stable")[:SAMPLE_MAX]])
        near = 25 * pairs <= 36 * drawn[quantile_place(drawn.size, len(kept), left)]
    assert np.array_equal(unpacked(decision.near, len(kept)), near)
    choice, labels = unseen.by_neighbours(near_matrix(near, len(kept)), left, 4)
    assert decision.refusal == choice.refusal
    assert decision.selected == tuple(int(kept[place]) for place in choice.selected)
    assert [decision.devices[index].cluster for index in kept] == labels.tolist()


@pytest.mark.parametrize("reveal", ["graph", "selection"])
def test_far_updates_are_left_out_and_told_why_without_a_figure(reveal: str) -> None:
    world = hidden_world(reveal, 60, hostile_max=3, selected_min=5)
    rows = rows_of(60, 12, seed=1, far=2)
    rows[5] *= np.uint32(60)
    outcomes, _, decision = world.run_rows(rows)
    assert decision.selected == tuple(place for place in range(2, 12) if place != 5)
    assert decision.gram == b""
    assert decision.devices[5].reason == "norm exceeds the clip norm 4; by how much was not revealed"
    assert "not revealed" in decision.devices[0].reason
    assert {getattr(device, name) for device in decision.devices for name in VERDICTS} == {None}
    total = outcomes[0].opened.first + outcomes[1].opened.first + outcomes[2].opened.first
    assert np.array_equal(total, rows[list(decision.selected)].sum(axis=0, dtype=np.uint32))
    assert decision.divisor == len(decision.selected)
    summed = total.view(np.int32).astype(np.int64)
    assert decision.doubled_norm == 2 * int(summed @ summed)


def test_a_found_radius_stands_as_many_far_or_equal_updates_as_announced() -> None:
    """Whatever f of n devices send, the quantile lies between distances of honest pairs, or it is copies' own zero."""
    for count, hostile in ((7, 2), (15, 3), (32, 8), (33, 15), (128, 32)):
        honest, pairs = math.comb(count - hostile, 2), math.comb(count, 2)
        place = quantile_place(pairs, count, hostile)
        assert place <= honest // 2  # all others far away: at most the middle of the honest ones
        if hostile <= count // 4:
            assert place >= math.comb(hostile, 2) + honest // 4  # all hostile ones equal: still among the honest


def test_two_halves_that_are_far_apart_open_nothing() -> None:
    world = hidden_world("graph", 20, eps_l2=0.2, selected_min=4)
    rows = rows_of(20, 12, seed=2, spread=100)
    rows[6:] += np.uint32(2**15)
    outcomes, _, decision = world.run_rows(rows)
    assert decision.refusal == "no device is close to more than half of all; nothing is opened"
    assert all(outcome.opened is None for outcome in outcomes)
    assert decision.doubled_norm == 0


@pytest.mark.parametrize("reveal", ["graph", "selection"])
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_nothing_is_opened_below_the_minimum(reveal: str, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 10))
    least = data.draw(st.integers(4, 12))
    world = hidden_world(reveal, 10, selected_min=least)
    rows = rows_of(10, count, data.draw(st.integers(0, 2**32)), far=data.draw(st.integers(0, count)))
    outcomes, views, decision = world.run_rows(rows)
    if decision.selected:
        assert len(decision.selected) >= least
        return
    assert decision.refusal
    assert all(outcome.opened is None for outcome in outcomes)
    if count < least:
        assert not any(step in ("over", "near", "chosen", "sum") for step, _ in views[0].sent)


def test_a_round_with_noise_does_not_open_the_exact_norm_of_the_sum() -> None:
    world = hidden_world("selection", 30, noise_multiplier=1.0)
    _, views, decision = world.run_rows(rows_of(30, 9, seed=3))
    assert decision.doubled_norm == 0
    assert not any(step == "sum" for step, _ in views[0].sent)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reveal": "graph", "policy": "robust"}, "policy cluster with `reveal: graph`, found 'robust'"),
        ({"reveal": "selection", "policy": "krum"}, "policy: expected policy multikrum with `reveal: selection`"),
        ({"policy": "cluster"}, "expected policy krum or robust or history or multikrum with `reveal: distances`"),
        ({"reveal": "all"}, "reveal: expected distances or graph or selection, found 'all'"),
        (
            {"reveal": "selection", "policy": "multikrum", "contributions_max": 129},
            "at most 128 contributions with `reveal: selection`, found 129",
        ),
        ({"reveal": "graph", "policy": "cluster", "eps_l2": 8.0}, "below twice the clip norm 4, found 8.0"),
        ({"reveal": "graph", "policy": "cluster", "eps_l2": math.nan}, "below twice the clip norm 4, found nan"),
        ({"reveal": "graph", "policy": "cluster", "eps_l2": -1.0}, "below twice the clip norm 4, found -1.0"),
        ({"eps_l2": 1.0}, "eps_l2: expected 0, or with `reveal: graph`"),
    ],
)
def test_what_does_not_go_together_is_not_announced(changes: dict[str, object], message: str) -> None:
    with pytest.raises(Malformed, match=message):
        require_announceable(msgspec.structs.replace(SecureRound().task, **changes))


def test_ranks_have_room_for_every_round_that_needs_them() -> None:
    assert max(SELECTION_MAX, SAMPLE_MAX) <= LENGTH_MAX == 128


def test_policies_with_distances_are_those_of_the_rules() -> None:
    assert POLICIES["distances"] == tuple(policy.POLICIES)


# --- who sees what ---------------------------------------------------------------------------------------------------


OPENED = ("over", "near", "chosen")
HIDDEN = ("lift", "over-", "near-", "radius", "distances", "nearest", "lowest", "scores")
"""Steps, by how they begin, whose messages are under masks."""

ROUNDS = [("graph", 0.0), ("graph", 0.5), ("selection", 0.0)]


def opened_bits(decision: Decision) -> dict[str, np.ndarray]:
    """The bits that were opened of a decision, as the parties open them."""
    kept = set(decision.kept)
    bits = {"over": np.array([index not in kept for index in decision.measured])}
    if decision.near:
        bits["near"] = ~unpacked(decision.near, len(kept))
    bits["chosen"] = np.array([index in decision.selected for index in decision.kept])
    return bits


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize(("reveal", "eps"), ROUNDS)
def test_a_partys_view_can_be_made_from_the_opened_bits_alone(reveal: str, eps: float, index: int) -> None:
    """The simulation argument, run: every message is random of its length, or makes the opened bits come out, or twice
    the norm of a sum that is opened next; from these the party gets to the same decision."""
    world = hidden_world(reveal, 30, eps_l2=eps)
    rows = rows_of(30, 11, seed=7, far=1)
    rows[4] *= np.uint32(100)
    _, views, decision = world.run_rows(rows)
    bits, lengths = opened_bits(decision), {key: len(data) for key, data in views[index].received.items()}
    assert len(decision.kept) == 10
    following, preceding = (index + 1) % 3, (index - 1) % 3

    def answer(wanted: Exchange) -> dict[int, bytes] | None:
        if wanted.step in bits:
            own = (np.frombuffer(wanted.outgoing[peer], dtype=np.uint8) for peer in (following, preceding))
            return dict.fromkeys(wanted.expected, (np.bitwise_xor(*own) ^ np.packbits(bits[wanted.step])).tobytes())
        if wanted.step == "sum":
            own_share, other = np.frombuffer(wanted.outgoing[following], dtype="<u8"), os.urandom(8)
            rest = np.uint64(decision.doubled_norm) - own_share - np.frombuffer(other, dtype="<u8")
            return {following: other, preceding: rest.tobytes()}
        if wanted.step.startswith(HIDDEN):
            return {peer: os.urandom(lengths[wanted.step, peer]) for peer in wanted.expected}
        return None

    again = unpack(simulate(world, index, rows, np.zeros((0, 0)), answer).decision, Decision)
    for name in ("devices", "selected", "kept", "near", "doubled_norm", "divisor", "refusal"):
        assert getattr(again, name) == getattr(decision, name), name


@pytest.mark.slow
@pytest.mark.parametrize(("reveal", "eps"), ROUNDS)
def test_inputs_with_the_same_bits_and_sum_cannot_be_told_apart(reveal: str, eps: float) -> None:
    """Neither by what is opened nor by any message of any party: every bit of it is even, whichever input it was."""
    world = hidden_world(reveal, 30, eps_l2=eps)
    rows = rows_of(30, 10, seed=8, far=2)
    other = rows.copy()
    shift = np.random.default_rng(9).integers(-60, 60, size=30).astype(np.int32).view(np.uint32)
    other[5], other[6] = other[5] + shift, other[6] - shift
    told = []
    for given_rows in (rows, other):
        ones: dict[tuple[int, str, int], np.ndarray] = {}
        for seed in range(12):
            _, views, decision = world.run_rows(given_rows, seed=seed)
            for place, view in enumerate(views):
                for (step, sender), data in view.received.items():
                    if step in ("hello", "compare", "coin", "range", "agree"):
                        continue
                    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8))
                    ones[place, step, sender] = ones.get((place, step, sender), 0) + bits.astype(np.int64)
        for key, counts in ones.items():
            # Bits beyond the last of a plane are zeros in what is opened.
            even = counts[: counts.size - 7] if key[1] in OPENED else counts
            assert abs(even.sum() - 6 * even.size) < 6 * math.sqrt(3 * even.size), key
        told.append((decision.kept, decision.near, decision.selected, decision.doubled_norm))
    assert told[0] == told[1]


# --- what the parts say to each other -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reveal", "step", "change", "message"),
    [
        ("graph", "over", lambda data: bytes([data[0] ^ 128]) + data[1:], "centre and south sent different values"),
        ("graph", "near", lambda data: bytes([data[0] ^ 1]) + data[1:], "centre and south sent different values"),
        ("graph", "near", lambda data: data[:-1], "centre: step 'near': expected"),
        ("selection", "chosen", lambda data: bytes([data[0] ^ 1]) + data[1:], "centre and south sent different"),
        ("selection", "sum", lambda data: os.urandom(8), "saw another decision than the rest"),
        ("selection", "nearest-order-digits", lambda data: data + b"0", "centre: step 'nearest-order-digits': exp"),
    ],
)
def test_a_deviating_aggregator_is_noticed(
    reveal: str, step: str, change: Callable[[bytes], bytes], message: str
) -> None:
    world = hidden_world(reveal, 30)

    def tamper(sender: int, receiver: int, name: str, data: bytes) -> bytes:
        return change(data) if (sender, receiver, name) == (1, 0, step) else data

    with pytest.raises(Untrusted, match=message):
        world.run_rows(rows_of(30, 9, seed=4), tamper)


@pytest.mark.slow
@pytest.mark.parametrize(("reveal", "eps"), ROUNDS)
def test_a_lie_in_any_message_in_between_opens_nothing_but_the_sum_of_who_was_signed_for(
    reveal: str, eps: float
) -> None:
    """The threat model: trusted to compute, so a lie may change who is chosen; never what is opened of them."""
    world = hidden_world(reveal, 8, eps_l2=eps)
    rows = rows_of(8, 10, seed=11, far=2)
    _, views, _ = world.run_rows(rows)
    steps = dict.fromkeys(step for step, _ in views[1].sent if step.startswith((*HIDDEN, *OPENED, "sum")))
    failed = set()
    for step in steps:
        try:
            run(world, rows, step, {0, 2}, flipped)
        except Untrusted:
            failed.add(step)
    assert {"sum", "over"} <= failed
    assert len(steps) >= 10


# --- the transcript -------------------------------------------------------------------------------------------------


class Written:
    """A round's transcript, which a test may write anew with all keys."""

    def __init__(self, reveal: str, **changes: object) -> None:
        self.world = hidden_world(reveal, 24, **changes)
        outcomes, _, self.decision = self.world.run_rows(rows_of(24, 10, seed=5, far=2))
        self.pairs = [(to_bytes(one.opened.first), to_bytes(one.opened.second)) for one in outcomes]

    def replies(self, decision: Decision | None = None) -> list[dict[str, object]]:
        packed, replies = pack(decision or self.decision), []
        for index, (key, signing) in enumerate(zip(self.world.task.aggregators, self.world.signing, strict=True)):
            first, second = self.pairs[index]
            opening = Opening(key.name, index, packed, digest_of(first), digest_of(second))
            replies.append(
                {
                    "opening": seal_envelope(sign(OPENING_TYPE, pack(opening), [signing])),
                    "first": first,
                    "second": second,
                }
            )
        return replies

    def problems(self, decision: Decision | None = None) -> dict[str, str]:
        task = self.world.task
        mean = combine_openings(self.replies(), task).mean
        settled = Settlement(
            tenant="acme",
            model="fraud",
            round_id=task.round_id,
            root=self.decision.root,
            mean=mean_digest(mean),
        )
        envelope = seal_envelope(sign("round-settlement", pack(settled), [self.world.round_key]))
        found = replay(
            pack(transcript_of(self.world.announcement(), self.replies(decision), envelope)), self.world.anchors
        )
        assert found.reveal == task.reveal
        return {check.name: check.problem for check in found.checks if check.problem}


@pytest.mark.parametrize(("reveal", "eps"), [("graph", 0.0), ("graph", 0.5), ("selection", 0.0)])
def test_a_transcript_of_a_round_that_reveals_less_holds(reveal: str, eps: float) -> None:
    written = Written(reveal, eps_l2=eps)
    assert written.problems() == {}


def other_graph(decision: Decision) -> dict[str, object]:
    """No two devices close."""
    return {"near": bytes(len(decision.near))}


def one_more(decision: Decision) -> dict[str, object]:
    """A device that was left out has a weight after all."""
    out = next(index for index, device in enumerate(decision.devices) if not device.selected)
    devices = list(decision.devices)
    devices[out] = msgspec.structs.replace(devices[out], selected=True, weight=1, reason="")
    return {"devices": tuple(devices), "selected": tuple(sorted({*decision.selected, out}))}


@pytest.mark.parametrize(
    ("reveal", "change", "name", "words"),
    [
        ("graph", other_graph, "weights", "the rules give 0"),
        ("graph", lambda decision: {"near": decision.near[:-1]}, "weights", "bytes of bits for 10 devices"),
        ("graph", one_more, "weights", "has weight 1, the rules give 0"),
        ("graph", lambda decision: {"kept": decision.kept[1:]}, "weights", ""),
        ("graph", lambda decision: {"kept": (*decision.kept, 99)}, "weights", "no ascending part of the measured"),
        ("graph", lambda _: {"reveal": "distances"}, "weights", "reveals 'distances', announced was 'graph'"),
        ("selection", one_more, "weights", "expected 8 of 10 selected, found 9"),
        ("selection", lambda d: {"doubled_norm": d.doubled_norm + 2}, "openings", "another norm than the decision"),
    ],
)
def test_what_all_three_signed_is_still_held_to_the_rules(
    reveal: str, change: Callable[[Decision], dict[str, object]], name: str, words: str
) -> None:
    written = Written(reveal)
    changed = msgspec.structs.replace(written.decision, **change(written.decision))
    assert words in written.problems(changed)[name]


# --- rules on bits --------------------------------------------------------------------------------------------------


def test_the_cluster_of_distances_follows_from_bits() -> None:
    rng = np.random.default_rng(6)
    rows = rng.integers(-100, 100, size=(20, 30))
    rows[:4] += 300
    gram = rows @ rows.T
    distances = np.sqrt(np.diagonal(gram)[:, None] + np.diagonal(gram)[None, :] - 2.0 * gram)
    radius = 1.5 * float(np.median([distances[i, j] for i, j in combinations(range(20), 2)]))
    assert np.array_equal(outliers.density(distances <= radius, 5), outliers.clusters(gram))


def bits_of(count: int, *far: tuple[int, int]) -> np.ndarray:
    """All close but some pairs."""
    near = np.ones((count, count), dtype=np.bool_)
    for a, b in far:
        near[a, b] = near[b, a] = False
    return near


def test_a_group_of_copies_is_no_cluster_of_its_own() -> None:
    near = bits_of(11, *((a, b) for a in range(5) for b in range(5, 11)))
    choice, labels = unseen.by_neighbours(near, 4, 5)
    assert choice.selected == (5, 6, 7, 8, 9, 10)
    assert labels.tolist() == [-1] * 5 + [0] * 6
    assert choice.refused[0] == (
        "close to 4 of 10 others, outside the cluster of those close to most; distances were not revealed"
    )


def test_of_a_cluster_those_close_to_the_most_are_kept_the_lower_index_first() -> None:
    choice, labels = unseen.by_neighbours(bits_of(9, (0, 1), (0, 2), (3, 4)), 2, 4)
    assert labels.tolist() == [0] * 9
    assert choice.selected == (1, 2, 3, 5, 6, 7, 8)
    assert choice.refused.keys() == {0, 4}
    assert "close to 7 of 8 others, not among the 7 with the most" in choice.refused[4]
    assert choice.divisor == 7
