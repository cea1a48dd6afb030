"""Fixed point, replicated sharing, the range check, and what a contribution may not be."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_coordinator.shares.contribution import Claim, open_shares, parse, verify
from fl_coordinator.shares.fixed_point import clip, decode, encode, norm_max
from fl_coordinator.shares.range_check import bound_exponent, range_check, require_announceable
from fl_coordinator.shares.sharing import (
    Exchange,
    Pair,
    Session,
    conjunction,
    expand,
    gram_share,
    multiply_transposed,
    open_bits,
    project,
)
from model_delta.encoding import pack, unpack
from model_delta.errors import Malformed, Untrusted
from tests.fakes.secure_round import NAMES, NOW, SecureRound, random_sharing

WORDS = st.integers(0, 2**64 - 1)


def sessions() -> list[Session]:
    secrets = {frozenset(pair): os.urandom(32) for pair in ((0, 1), (1, 2), (2, 0))}
    return [
        Session(i, NAMES, {j: secrets[frozenset((i, j))] for j in range(3) if j != i})  # type: ignore[arg-type]
        for i in range(3)
    ]


def together(make: Callable[[Session, int], object]) -> list[object]:
    """Run one generator per party in lock-step; their results."""
    steps = [make(session, session.index) for session in sessions()]
    results: list[object] = [None] * 3
    inputs: list[dict[int, bytes] | None] = [None] * 3
    while True:
        wanted: dict[int, Exchange] = {}
        for index, generator in enumerate(steps):
            try:
                wanted[index] = generator.send(inputs[index])  # type: ignore[attr-defined]
            except StopIteration as done:
                results[index] = done.value
        if not wanted:
            return results
        inputs = [{peer: wanted[peer].outgoing[index] for peer in wanted[index].expected} for index in range(3)]


def xor_sharing(value: np.ndarray) -> list[Pair]:
    a, b = (np.frombuffer(os.urandom(value.nbytes), dtype="<u8").reshape(value.shape) for _ in range(2))
    parts = [a, b, value ^ a ^ b]
    return [Pair(parts[i], parts[(i + 1) % 3]) for i in range(3)]


# --- fixed point ----------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=20), st.integers(0, 30))
def test_encoding_moves_a_value_by_less_than_one_unit(values: list[float], bits: int) -> None:
    array = np.array(values)
    back = decode(encode(array, bits, os.urandom), bits)
    assert np.abs(back - array).max() < 2.0**-bits


def test_stochastic_rounding_is_unbiased() -> None:
    encoded = decode(encode(np.full(40_000, 0.3), 0, os.urandom), 0)
    assert set(encoded) == {0.0, 1.0}
    assert abs(encoded.mean() - 0.3) < 6 * math.sqrt(0.21 / 40_000)


def test_clip_keeps_the_direction_and_short_updates() -> None:
    update = np.array([3.0, 4.0])
    assert clip(update, 10.0).tolist() == [3.0, 4.0]
    assert np.allclose(clip(update, 1.0), [0.6, 0.8])
    huge = np.array([1e200, 1e200])
    assert np.allclose(clip(huge, 1.0), [math.sqrt(0.5)] * 2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_not_finite_never_leaves_the_device(bad: float) -> None:
    with pytest.raises(Malformed, match="1 of 3 values are not finite"):
        clip(np.array([0.0, bad, 1.0]), 1.0)


# --- arithmetic on shares -------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 6), st.sampled_from([1, 5, 511, 512, 513, 1100]))
@settings(max_examples=40, deadline=None)
def test_the_float_product_is_the_integer_product(seed: int, n: int, m: int, d: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 2**64, size=(n, d), dtype=np.uint64), rng.integers(0, 2**64, size=(m, d), dtype=np.uint64)
    assert np.array_equal(multiply_transposed(a, b), a @ b.T)


@pytest.mark.parametrize("word", [0, 2**64 - 1, 2**63, 2**21, 2**22 - 1, 2**43, 2**44 - 1, 2**63 - 1])
def test_the_float_product_at_the_edges_of_its_limbs(word: int) -> None:
    a = np.full((2, 1537), word, dtype=np.uint64)
    assert np.array_equal(multiply_transposed(a, a), a @ a.T)


@given(st.integers(0, 2**32), st.sampled_from([1, 63, 16_384, 16_385]))
@settings(max_examples=10, deadline=None)
def test_projections_are_the_subset_sums(seed: int, d: int) -> None:
    rng = np.random.default_rng(seed)
    rows, selectors = rng.integers(0, 2**64, size=(2, d), dtype=np.uint64), rng.integers(0, 2**64, d, dtype=np.uint64)
    bits = (selectors[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert np.array_equal(project(rows, selectors), rows @ bits)


def test_gram_shares_add_up_to_twice_the_gram_matrix() -> None:
    rows = np.random.default_rng(1).integers(-(2**20), 2**20, size=(5, 70)).astype(np.int64)
    total = sum(gram_share(pair) for pair in random_sharing(rows.view(np.uint64), 2))
    assert np.array_equal(total.view(np.int64) >> 1, rows @ rows.T)


@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=8))
@settings(max_examples=30, deadline=None)
def test_conjunction_and_opening(pairs: list[tuple[int, int]]) -> None:
    a, b = (np.array([pair[side] for pair in pairs], dtype=np.uint64) for side in (0, 1))
    shares_a, shares_b = xor_sharing(a), xor_sharing(b)

    def both(session: Session, index: int) -> object:
        product = yield from conjunction(session, "and", shares_a[index], shares_b[index])
        return (yield from open_bits(session, "open", product))

    for opened in together(both):
        assert np.array_equal(opened, a & b)


@given(st.integers(0, 2**32), st.integers(1, 40))
@settings(max_examples=25, deadline=None)
def test_the_range_check_accepts_exactly_the_range(seed: int, exponent: int) -> None:
    rng, bound = np.random.default_rng(seed), 2**exponent
    edges = np.array([-bound, bound - 1, 0, -1, bound, -bound - 1, 2**63 - 1, -(2**63)], dtype=np.int64)
    sums = rng.integers(-bound, bound, size=(edges.size + 1, 64), dtype=np.int64)
    sums[np.arange(edges.size), rng.integers(0, 64, edges.size)] = edges
    shares = random_sharing(sums.view(np.uint64), seed)
    inside = ((sums >= -bound) & (sums < bound)).all(axis=1)
    assert inside.tolist() == [True] * 4 + [False] * 4 + [True]
    for opened in together(lambda session, index: range_check(session, shares[index], exponent)):
        assert np.array_equal(opened, inside)


def test_masks_of_the_three_parties_cancel() -> None:
    parties = sessions()
    assert not sum(session.zero_sum("x", (9,)) for session in parties).any()
    bits = [session.zero_bits("x", (9,)) for session in parties]
    assert not (bits[0] ^ bits[1] ^ bits[2]).any()
    assert not np.array_equal(parties[0].zero_sum("x", (9,)), parties[0].zero_sum("y", (9,)))


# --- the bound ------------------------------------------------------------------------------------------------------


def test_the_worst_honest_update_stays_below_the_bound() -> None:
    world = SecureRound(length=64)
    flat = world.encode(np.full(64, 100.0)).view(np.int64)  # all entries equal: the subset of all is the largest sum
    assert math.isqrt(int(np.dot(flat, flat))) <= norm_max(world.task.clip_norm_l2, 16, 64)
    assert int(flat.sum()) < 2 ** bound_exponent(world.task)


def test_a_long_vector_without_large_entries_fails_each_projection_more_often_than_not() -> None:
    """The step of the soundness argument that is a number: twelve groups, each wide with probability 3/16."""
    groups, wide = 12, (1 - 1 / 4) ** 2 / 3
    passing = sum(
        math.comb(groups, m) * wide**m * (1 - wide) ** (groups - m) * math.comb(m, m // 2) / 2**m
        for m in range(groups + 1)
    )
    assert passing < 0.5
    assert groups * (4 / (1 / 4) + 4) <= 16**2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fraction_bits": 30}, r"a subset sum can reach 2\^3\d, at most 2\^27"),
        ({"clip_norm_l2": 1e6}, r"lower fraction_bits to"),
        ({"clip_norm_l2": 0.0}, "expected a clip norm above 0"),
        ({"clip_norm_l2": math.nan}, "expected a clip norm above 0"),
        ({"hostile_max": 7, "selected_min": 8}, r"hostile_max \+ 2 = 9"),
        ({"aggregators": ()}, "three aggregators"),
        ({"length": 0}, "at least 1 parameter"),
    ],
)
def test_a_round_that_could_go_wrong_is_not_announced(changes: dict[str, object], message: str) -> None:
    task = msgspec.structs.replace(SecureRound().task, **changes)
    with pytest.raises(Malformed, match=message):
        require_announceable(task)


def test_the_built_in_model_fits() -> None:
    require_announceable(msgspec.structs.replace(SecureRound().task, length=40_000, clip_norm_l2=4.0))


# --- contributions --------------------------------------------------------------------------------------------------


def test_the_three_aggregators_get_the_shares_of_the_update() -> None:
    world = SecureRound(length=20)
    encoded = world.encode(np.linspace(-1, 1, 20))
    verified = verify(world.raw("pos-0001", encoded), world.ca_pem, set(), NOW)
    pairs = [open_shares(verified, world.task, index, world.sealing[index]) for index in range(3)]
    for index in range(3):
        assert np.array_equal(pairs[index].second, pairs[(index + 1) % 3].first)
    assert np.array_equal(pairs[0].first + pairs[1].first + pairs[2].first, encoded)


def test_an_upload_is_one_vector_and_little_more() -> None:
    world = SecureRound(length=4000)
    assert len(world.contribution("pos-0001", np.ones(4000))) < 8 * 4000 + 3000


def test_no_aggregator_opens_the_pair_of_another() -> None:
    world = SecureRound(length=20)
    verified = verify(world.contribution("pos-0001", np.ones(20)), world.ca_pem, set(), NOW)
    with pytest.raises(Untrusted, match="does not open"):
        open_shares(verified, world.task, 0, world.sealing[1])


def test_the_client_refuses_another_length() -> None:
    with pytest.raises(Malformed, match="expected 20 values, found 19"):
        SecureRound(length=20).contribution("pos-0001", np.ones(19))


def altered(world: SecureRound, **changes: object) -> bytes:
    """A contribution whose claim was changed and signed again by its device."""
    contribution = parse(world.contribution("pos-0001", np.ones(20)))
    claim = msgspec.structs.replace(unpack(contribution.claim, Claim), **changes)
    return world.signed("pos-0001", claim, contribution.masked)


def forged(world: SecureRound) -> bytes:
    contribution = parse(world.contribution("pos-0001", np.ones(20)))
    other = world.device("pos-0002").sign(contribution.claim)
    return pack(msgspec.structs.replace(contribution, signature=other))


def swapped_vector(world: SecureRound) -> bytes:
    contribution = parse(world.contribution("pos-0001", np.ones(20)))
    return pack(msgspec.structs.replace(contribution, masked=contribution.masked[:-1] + b"\x00"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (forged, "signature is not by the certificate's key"),
        (swapped_vector, "masked vector is not the one that was signed"),
        (lambda w: altered(w, device_id="pos-0009"), "its certificate names 'pos-0001'"),
        (lambda w: altered(w, certificate=SecureRound().device("pos-0001").certificate), "not issued by"),
        (lambda w: altered(w, certificate=b"junk"), "X.509"),
        (lambda w: altered(w, format=99), "format 99"),
        (lambda w: b"\x00" * 40, "CBOR"),
        (lambda w: w.contribution("pos-0001", np.ones(20))[:-1], "CBOR"),
    ],
)
def test_a_contribution_that_does_not_verify_is_refused_by_name(
    make: Callable[[SecureRound], bytes], message: str
) -> None:
    world = SecureRound(length=20)
    with pytest.raises((Malformed, Untrusted), match=message):
        verify(make(world), world.ca_pem, set(), NOW)


def test_a_revoked_device_is_refused() -> None:
    from model_delta.keys.certificates import serial_of

    world = SecureRound(length=20)
    data = world.contribution("pos-0001", np.ones(20))
    with pytest.raises(Untrusted, match="revoked"):
        verify(data, world.ca_pem, {serial_of(world.device("pos-0001").certificate)}, NOW)


def test_a_seed_expands_to_the_same_words_everywhere() -> None:
    """Frozen: AES-256 of counters 0 and 1 as little-endian words; all versions must agree."""
    assert [f"{int(word):016x}" for word in expand(bytes(range(32)), 2)] == ["d09f492ab60090f2", "80772edd6a9af3a9"]
