"""Fixed point, replicated sharing, the range check, and what a contribution may not be."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_coordinator.shares.bounds import (
    _SKETCH_BITS,
    BUCKETS,
    COPIES,
    EXPONENT_MAX,
    bounds_of,
    fitted,
    require_announceable,
)
from fl_coordinator.shares.contribution import Claim, open_secrets, parse, verify
from fl_coordinator.shares.fixed_point import clip, decode, encode, encode_blocks, norm_max
from fl_coordinator.shares.gram import _PRODUCT_BITS, gram_share, multiply_transposed
from fl_coordinator.shares.lifting import SMALL_BITS, lift
from fl_coordinator.shares.measuring import Coefficients
from fl_coordinator.shares.range_check import range_check
from fl_coordinator.shares.sharing import (
    Pair,
    Session,
    conjunction,
    open_bits,
)
from fl_coordinator.shares.streams import (
    COLUMNS,
    SecretRows,
    SummedRows,
    expand,
    weighted_sum,
    weighted_sum_from,
)
from model_delta.digest import digest_of
from model_delta.encoding import pack, unpack
from model_delta.errors import Malformed, Untrusted
from tests.fakes.secure_round import NOW, ArrayRows, SecureRound, measure_words, random_sharing, whole
from tests.fakes.three_parties import sessions, together, xor_sharing

WORDS = st.integers(0, 2**64 - 1)


# --- fixed point ----------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=20), st.integers(0, 24))
def test_encoding_moves_a_value_by_less_than_one_unit(values: list[float], bits: int) -> None:
    array = np.array(values)
    back = decode(encode(array, bits, os.urandom), bits)
    assert np.abs(back - array).max() < 2.0**-bits


def test_stochastic_rounding_is_unbiased() -> None:
    encoded = decode(encode(np.full(40_000, 0.3), 0, os.urandom), 0)
    assert set(encoded) == {0.0, 1.0}
    assert abs(encoded.mean() - 0.3) < 6 * math.sqrt(0.21 / 40_000)


def test_a_value_that_leaves_the_ring_is_refused() -> None:
    assert decode(encode(np.array([-(2.0**15)]), 16, os.urandom), 16) == [-(2.0**15)]
    for value in (2.0**15, -(2.0**15) - 1, 1e300):
        with pytest.raises(Malformed, match="expected values below 2\\^15"):
            encode(np.array([0.0, value]), 16, os.urandom)


def test_a_known_norm_saves_the_search_for_large_values_and_changes_nothing_else() -> None:
    update = np.random.default_rng(1).standard_normal(40_000)
    norm = float(np.linalg.norm(update))

    def encoded(**known: float) -> list[int]:
        blocks = encode_blocks(update, 16, lambda count: bytes(count), 0.01, **known)
        return [int(word) for block in blocks for word in block]

    assert encoded(norm=norm) == encoded()
    with pytest.raises(Malformed, match="expected values below 2\\^15"):
        list(encode_blocks(np.array([2.0**15]), 16, os.urandom, norm=2.0**15))


def test_sharing_does_not_change_the_words_it_is_given() -> None:
    world = SecureRound(length=40)
    words = np.arange(40, dtype=np.uint32)
    world.raw("pos-0001", words)
    assert words.tolist() == list(range(40))


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


@given(st.integers(0, 2**32), st.sampled_from([1, 63, 2048, 2049, 5000, COLUMNS, 2 * COLUMNS + 1]))
@settings(max_examples=12, deadline=None)
def test_measurements_are_the_linear_maps_they_claim_to_be(seed: int, d: int) -> None:
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 2**32, size=(3, d), dtype=np.uint32)
    bounds = bounds_of(msgspec.structs.replace(SecureRound().task, length=d))
    coefficients = Coefficients(rng.bytes(32), d, bounds)
    measured = coefficients.measure((ArrayRows(words), [2, 0, 1]))[0]
    ternary = coefficients.ternary()
    assert set(np.unique(ternary)) <= {-1.0, 0.0, 1.0}
    exact = words.astype(object) @ ternary.astype(np.int64).astype(object)
    assert np.array_equal(measured.projections, np.array(exact % 2**32, dtype=np.uint32)[[2, 0, 1]])
    for place, row in enumerate([2, 0, 1]):
        sketch = coefficients.sketch_exact(words[row].view(np.int32).astype(np.int64))
        assert np.array_equal(measured.sketch[place], sketch.astype(np.uint32))
    halves = rng.integers(0, 2**32, size=words.shape, dtype=np.uint32)
    parts = [measure_words(coefficients, part).joined for part in (halves, words - halves)]
    assert np.array_equal(parts[0] + parts[1], measure_words(coefficients, words).joined)


def test_projections_of_many_columns_are_exact_at_the_edge() -> None:
    """2^20 columns of the largest magnitude: float64 must be reduced before it rounds."""
    bounds = bounds_of(msgspec.structs.replace(SecureRound().task, length=1 << 20))
    coefficients = Coefficients(bytes(32), 1 << 20, bounds)
    words = np.full((1, 1 << 20), 2**31 + 1, dtype=np.uint32)
    column_sums = coefficients.ternary().sum(axis=0).astype(np.int64)
    expected = (column_sums * (2**31 + 1)) % 2**32
    assert np.array_equal(measure_words(coefficients, words).projections[0], expected.astype(np.uint32))


def test_sketched_products_are_unbiased_and_as_sharp_as_stated() -> None:
    rng = np.random.default_rng(5)
    d = 20_000
    common = rng.normal(size=d)
    rows = np.rint(1000 * (common + rng.normal(size=(2, d)))).astype(np.int32)
    rows[1, : d // 2] = 1000  # structure: whole blocks alike
    exact = rows.astype(np.float64) @ rows.T
    bounds = bounds_of(msgspec.structs.replace(SecureRound().task, length=d))
    errors = []
    for _ in range(200):
        sketch = measure_words(Coefficients(os.urandom(32), d, bounds), rows.view(np.uint32)).sketch
        found = sketch.view(np.int32).astype(np.float64)
        errors.append((found @ found.T / bounds.scale - exact) / exact)
    rms = np.sqrt(np.square(errors).mean(axis=0))
    stated = math.sqrt(2 / (COPIES * BUCKETS))
    assert abs(np.mean(errors, axis=0)[0, 0]) < 5 * stated / math.sqrt(200)
    assert 0.5 * stated < rms[0, 0] < 1.3 * stated
    assert 0.5 * stated < rms[1, 1] < 1.3 * stated


@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 9))
@settings(max_examples=20, deadline=None)
def test_lifting_keeps_the_integers(seed: int, n: int, width: int) -> None:
    rng, top = np.random.default_rng(seed), 1 << SMALL_BITS
    small = rng.integers(-top // width + 1, top // width, size=(n, width), dtype=np.int32)
    small[0] = 0
    small[0, 0] = rng.choice([-top + 1, top - 1, 0, -1, 1])
    shares = random_sharing(small.view(np.uint32), seed)
    lifted: list[Pair] = together(lambda session, index: lift(session, shares[index]))  # type: ignore[assignment]
    for index in range(3):
        assert np.array_equal(lifted[index].second, lifted[(index + 1) % 3].first)
    total = lifted[0].first + lifted[1].first + lifted[2].first
    assert total.dtype == np.uint64
    assert np.array_equal(total.view(np.int64), small.astype(np.int64))


def test_rows_follow_from_their_secrets_and_ciphertexts() -> None:
    d = COLUMNS + 5
    secrets = [os.urandom(32) for _ in range(3)]
    rows = SecretRows(d, secrets)
    assert np.array_equal(whole(rows, 3), np.stack([expand(secret, d) for secret in secrets]))
    masked = [os.urandom(4 * d) for _ in secrets]
    opened = whole(SecretRows(d, secrets, [memoryview(data) for data in masked], ["a", "b", "c"]), 3)
    assert np.array_equal(opened ^ whole(rows, 3), np.stack([np.frombuffer(data, dtype="<u4") for data in masked]))
    expected = opened[0] * np.uint32(3) + opened[2] * np.uint32(128)
    assert np.array_equal(weighted_sum(ArrayRows(opened), [0, 2], [3, 128]), expected)
    assert np.array_equal(weighted_sum(ArrayRows(opened), [0, 1], [1, 1]), opened[0] + opened[1])


def test_gram_shares_add_up_to_twice_the_gram_matrix() -> None:
    rows = np.random.default_rng(1).integers(-(2**20), 2**20, size=(5, 70)).astype(np.int64)
    total = sum(gram_share(pair.first, pair.second) for pair in random_sharing(rows.view(np.uint64), 2))
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


@given(st.integers(0, 2**32), st.integers(1, 24), st.sampled_from([np.uint32, np.uint64]))
@settings(max_examples=25, deadline=None)
def test_the_range_check_accepts_exactly_the_range(seed: int, exponent: int, word: type[np.unsignedinteger]) -> None:
    rng, bound, top = np.random.default_rng(seed), 2**exponent, 2 ** (8 * word().itemsize - 1)
    edges = [-bound, bound - 1, 0, -1, bound, -bound - 1, top - 1, -top]
    sums = rng.integers(-bound, bound, size=(len(edges) + 1, 64), dtype=np.int64)
    sums[np.arange(len(edges)), rng.integers(0, 64, len(edges))] = edges
    shares = random_sharing(sums.astype(word), seed)
    inside = ((sums >= -bound) & (sums < bound)).all(axis=1)
    assert inside.tolist() == [True] * 4 + [False] * 4 + [True]
    for opened in together(lambda session, index: range_check(session, shares[index], exponent)):
        assert np.array_equal(opened, inside)


def test_masks_of_the_three_parties_cancel() -> None:
    parties = sessions()
    for like in (np.zeros(9, dtype=np.uint32), np.zeros((3, 3), dtype=np.uint64)):
        sums = [session.zero_sum(f"sums {like.ndim}", like) for session in parties]
        assert not (sums[0] + sums[1] + sums[2]).any()
        bits = [session.zero_bits(f"bits {like.ndim}", like) for session in parties]
        assert not (bits[0] ^ bits[1] ^ bits[2]).any()
        assert not np.array_equal(sums[0], parties[0].zero_sum(f"other {like.ndim}", like))
    with pytest.raises(RuntimeError, match="mask of step 'sums 1' with party 1 was drawn before"):
        parties[0].zero_bits("sums 1", like)


# --- the bound ------------------------------------------------------------------------------------------------------


def test_an_honest_update_is_at_most_n_long_and_n_times_six_below_the_bound() -> None:
    world = SecureRound(length=64)
    flat = world.encode(np.full(64, 100.0)).view(np.int32).astype(np.int64)
    bounds = bounds_of(world.task)
    assert math.isqrt(int(np.dot(flat, flat))) <= bounds.norm == norm_max(world.task.clip_norm_l2, 16, 64)
    assert 2**bounds.exponent // 2 < 6 * bounds.norm <= 2**bounds.exponent


def test_the_constants_of_the_soundness_proof() -> None:
    """The steps of docs/decisions/0002-sketched-distances.md that are numbers."""
    steps = 200_000
    s = (np.arange(steps) + 0.5) / steps
    integral = float(((1 - s) * np.exp(-((5 * math.pi * s / 4) ** 2))).mean())
    kernel = (math.sin(math.pi / 4) / (math.pi / 4)) ** 2
    terms = 2 ** (32 - 2 - EXPONENT_MAX)
    assert kernel > 0.8105
    assert terms >= 64
    assert (1 / terms + 2 * integral) / 0.8105 < 0.4962 < 0.5
    u = np.linspace(0, math.pi / 2, 10_001)
    assert (np.cos(u) ** 2 <= np.exp(-(u**2)) + 1e-15).all()
    assert 48 * 2 * math.exp(-36) < 3e-14
    assert COPIES * 4**_SKETCH_BITS <= 2**_PRODUCT_BITS < 2**62  # twice an entry of the Gram matrix is opened


@pytest.mark.parametrize("b", [3, 5])
def test_the_proof_bounds_what_a_small_ring_really_does(b: int) -> None:
    """Exact probabilities over Z_q, q = 2^12, by convolution: vectors at the proof's edges pass with at most 1/2."""
    q, bound = 1 << 12, 1 << b
    rng = np.random.default_rng(b)
    shapes = [[2 * bound], [q // 2], [q // 2, q // 2], [2 * bound, -2 * bound], [q // 2 - 1, 1, 1]]
    shapes += [[2 * bound - 1] * 8, [bound] * 26, [1] * (26 * bound * bound), [bound - 1, bound + 1] * 14]
    shapes += [list(rng.integers(-2 * bound + 1, 2 * bound, 60)) for _ in range(5)]
    for shape in shapes:
        spread = np.zeros(q)
        spread[0] = 1.0
        for entry in shape:
            spread = spread / 2 + (np.roll(spread, int(entry)) + np.roll(spread, -int(entry))) / 4
        passing = float(spread[:bound].sum() + spread[-bound:].sum())
        long = sum(int(x) ** 2 for x in shape) >= 25 * bound * bound
        assert long or max(abs(int(x)) for x in shape) >= 2 * bound
        assert passing <= 0.5 + 1e-12, shape[:4]


def test_a_round_of_before_lifting_was_checked_can_be_replayed_and_not_announced() -> None:
    task = msgspec.structs.replace(SecureRound().task, length=1_000_000, contributions_max=128, fraction_bits=16)
    with pytest.raises(Malformed, match="lower fraction_bits to 14"):
        require_announceable(task)
    require_announceable(task, once=True)
    with pytest.raises(Malformed, match=r"coordinates in the sketch can reach 2\^29"):
        require_announceable(msgspec.structs.replace(task, length=1 << 24), once=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fraction_bits": 20}, r"the sum of 1024 updates with weights of 0 bits can reach 2\^33, at most 2\^31 fits"),
        ({"fraction_bits": 22, "contributions_max": 8}, r"a projection can reach 2\^27, at most 2\^24"),
        ({"fraction_bits": 25}, "expected 0 to 24 fraction bits"),
        ({"policy": "robust"}, "weights of 7 bits can reach .* lower fraction_bits to 11"),
        ({"clip_norm_l2": 1000.0}, r"lower fraction_bits to 1\d or take fewer contributions"),
        ({"clip_norm_l2": 1e9}, "lower the clip norm"),
        ({"length": 1 << 24, "fraction_bits": 18, "contributions_max": 8}, r"sum of 16384 coordinates in the sketch"),
        ({"length": 1 << 27}, "expected 1 to 67108864 parameters"),
        ({"contributions_max": 1025}, "at most 1024 contributions"),
        ({"contributions_max": -1}, "at most 1024 contributions, found -1"),
        ({"fraction_bits": -1}, "expected 0 to 24 fraction bits"),
        ({"hostile_max": -3, "selected_min": 2}, "hostile_max"),
        ({"noise_multiplier": math.nan}, "noise_multiplier: expected 0 to 10000, found nan"),
        ({"noise_multiplier": 1e-9}, "would show its rounding"),
        ({"noise_multiplier": 2000.0}, "weights of 0 bits and noise can reach"),
        (
            {"policy": "average"},
            "policy: expected policy krum or robust or history or multikrum with `reveal: distances`, found 'average'",
        ),
        ({"memory": digest_of(b"earlier")}, "policy: expected one that remembers rounds, found 'krum'"),
        ({"reveal": "selection"}, "policy: expected policy multikrum with `reveal: selection`, found 'krum'"),
        ({"reveal": "graph"}, "policy: expected policy cluster with `reveal: graph`, found 'krum'"),
        ({"clip_norm_l2": 0.0}, "expected a clip norm above 0"),
        ({"clip_norm_l2": math.nan}, "expected a clip norm above 0"),
        ({"hostile_max": 7, "selected_min": 8}, r"hostile_max \+ 2 = 9"),
        ({"aggregators": ()}, "three aggregators"),
        ({"length": 0}, "1 to 67108864 parameters, found 0"),
    ],
)
def test_a_round_that_could_go_wrong_is_not_announced(changes: dict[str, object], message: str) -> None:
    task = msgspec.structs.replace(SecureRound().task, **changes)
    with pytest.raises(Malformed, match=message):
        require_announceable(task)


def test_the_built_in_model_fits() -> None:
    require_announceable(msgspec.structs.replace(SecureRound().task, length=40_000, clip_norm_l2=4.0))


@pytest.mark.parametrize(("policy", "count"), [("krum", 1024), ("robust", 1024), ("robust", 60)])
@pytest.mark.parametrize("length", [1, 40_000, 1_000_000, 20_000_000])
def test_a_round_is_announced_with_the_bits_that_fit(policy: str, count: int, length: int) -> None:
    wanted = msgspec.structs.replace(
        SecureRound().task, length=length, fraction_bits=24, policy=policy, contributions_max=count
    )
    task = fitted(wanted)
    require_announceable(task)
    with pytest.raises(Malformed):
        require_announceable(msgspec.structs.replace(task, fraction_bits=task.fraction_bits + 1))
    bounds = bounds_of(task)
    assert count * bounds.norm_accepted << (7 if policy == "robust" else 0) < 2**31
    assert math.isqrt(bounds.piled) * 5 * 2**bounds.exponent < 2**29


# --- contributions --------------------------------------------------------------------------------------------------


def test_the_three_aggregators_get_the_shares_of_the_update() -> None:
    world = SecureRound(length=20)
    encoded = world.encode(np.linspace(-1, 1, 20))
    data = world.raw("pos-0001", encoded)
    verified = verify(data, world.ca_pem, set(), NOW)
    assert verified.claim.length == 20
    holdings = [world.hold([data], index) for index in range(3)]
    for index in range(3):
        following = holdings[(index + 1) % 3]
        assert np.array_equal(whole(holdings[index].second, 1), whole(following.first, 1))
        assert holdings[index].second.origin(0) == following.first.origin(0)
    assert np.array_equal(sum(whole(holding.first, 1) for holding in holdings)[0], encoded)


def test_an_upload_is_one_float32_vector_and_little_more() -> None:
    world = SecureRound(length=100_000)
    assert len(world.contribution("pos-0001", np.ones(100_000))) <= 1.01 * 4 * 100_000


def test_no_aggregator_opens_the_pair_of_another() -> None:
    world = SecureRound(length=20)
    verified = verify(world.contribution("pos-0001", np.ones(20)), world.ca_pem, set(), NOW)
    with pytest.raises(Untrusted, match="does not open"):
        open_secrets(verified.claim, world.task, 0, world.sealing[1])


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
        (lambda w: altered(w, format=1), "format 1, this reader knows 2"),
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
    """Frozen: AES-256 of counter 0 as little-endian words; all versions must agree."""
    assert [f"{word:08x}" for word in expand(bytes(range(32)), 4).tolist()] == [
        "b60090f2",
        "d09f492a",
        "6a9af3a9",
        "80772edd",
    ]


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=6), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_a_sum_corrected_from_the_total_is_the_weighted_sum(weights: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 2**32, size=(8, COLUMNS + 3), dtype=np.uint32)
    passed = [7, *range(len(weights))]  # row 7 passes and is not chosen
    rows = SummedRows(ArrayRows(words))
    for _ in rows.blocks(passed):
        pass
    by_row = dict(enumerate(weights))
    found = weighted_sum_from(rows.total, passed, ArrayRows(words), by_row)
    assert np.array_equal(found, weighted_sum(ArrayRows(words), list(by_row), weights))


@pytest.mark.parametrize("spikes", [(1, 1), (5, 3, 1), (1, 1, 1), (3, 1, 1, 2)])
def test_no_two_meetings_more_than_double_a_squared_norm(spikes: tuple[int, ...]) -> None:
    """The tolerance of `Bounds.squared_max` for a sketched norm: meetings are pairs, in either of the two copies."""
    row = np.array(spikes, dtype=np.float64)
    own = float(row @ row)
    pairs = list(itertools.combinations(range(len(spikes)), 2))
    for one, two in itertools.product(itertools.product((0, 1), pairs), repeat=2):
        squared = 0.0
        for copy in (0, 1):
            bucket = list(range(len(spikes)))
            for where, (a, b) in (one, two):
                if where == copy:
                    bucket = [bucket[a] if entry == bucket[b] else entry for entry in bucket]
            squared += float(np.square(np.bincount(bucket, weights=row)).sum())
        assert squared <= 2 * COPIES * own + 1e-9
