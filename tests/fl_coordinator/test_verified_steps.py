"""What an aggregator computes on shares is checked: each kind of lie, and how often it passes, beside the bound."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_coordinator.shares import combining, gram, lifting, sharing, verifying
from fl_coordinator.shares.binary import binary
from fl_coordinator.shares.combining import GROUPS, SUMS, RandomSums
from fl_coordinator.shares.gram import multiply_by_small, open_gram
from fl_coordinator.shares.lifting import lift
from fl_coordinator.shares.range_check import range_check
from fl_coordinator.shares.sharing import Pair, Session, are_zero, are_zero_bits, missing_share, open_bits, toss
from fl_coordinator.shares.streams import Words, expand_bytes
from fl_coordinator.shares.verifying import Conjunctions
from model_delta.errors import Untrusted
from tests.fakes.secure_round import NAMES, ArrayRows, Tamper, random_sharing
from tests.fakes.three_parties import LIAR, Change, heard_by_the_silent, sessions, together, xor_sharing


def add_to(place: int, amount: int) -> Change:
    """A liar that adds to one word of its summand."""

    def change(words: np.ndarray) -> None:
        words[place : place + 1 or None] += words.dtype.type(amount % 2 ** (8 * words.itemsize))

    return change


def of_liar(step: str, kind: str = "<u8") -> Tamper:
    """A liar that sends something else in a step than it goes on with."""

    def tamper(sender: int, receiver: int, name: str, data: bytes) -> bytes:
        return bytes([data[0] ^ 1]) + data[1:] if (sender, name) == (LIAR, step) else data

    return tamper


# --- small numbers and bits -----------------------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.sampled_from([np.uint32, np.uint64]))
@settings(max_examples=20, deadline=None)
def test_numbers_become_their_bits(seed: int, word: type[np.unsignedinteger]) -> None:
    numbers = np.frombuffer(expand_bytes(seed.to_bytes(32, "big"), 8 * 15), dtype="<u8").astype(word).reshape(5, 3)
    numbers[0] = [0, 1, ~word(0)]
    shares = random_sharing(numbers, seed)
    for pair in shares:
        pair.first.setflags(write=False)

    def bits(session: Session, index: int) -> Any:
        made = Conjunctions(session, "bits")
        found = yield from binary(session, made, shares[index])
        yield from made.check()
        return (yield from open_bits(session, "open", found))

    for opened in together(bits):
        assert np.array_equal(opened, numbers)


def test_a_coin_is_the_same_for_all_and_never_the_same_again() -> None:
    def two(session: Session, index: int, second: str = "tails") -> Any:
        return [(yield from toss(session, "heads")), (yield from toss(session, second))]

    tossed = [*together(two), *together(two)]
    assert tossed[0] == tossed[1] == tossed[2] != tossed[3]
    assert len({coin for pair in tossed for coin in pair}) == 4
    assert {len(coin) for coin in tossed[0]} == {32}
    with pytest.raises(RuntimeError, match="drawn before"):
        together(lambda session, index: two(session, index, "heads"))
    with pytest.raises(Untrusted, match=r"centre and \w+ sent different values"):
        together(two, of_liar("heads"))


@pytest.mark.parametrize("liar", range(3))
def test_a_coin_takes_a_word_from_both_others(liar: int) -> None:
    """What one of them sends, with all that the liar has itself, does not give the coin; what both send does."""
    secrets = {frozenset(pair): os.urandom(32) for pair in ((0, 1), (1, 2), (2, 0))}

    def parties() -> list[Session]:
        return [Session(i, NAMES, {j: secrets[frozenset((i, j))] for j in range(3) if j != i}) for i in range(3)]

    steps = [toss(session, "heads") for session in parties()]
    sent = [next(step).outgoing for step in steps]
    like, peers = np.zeros(4, dtype=np.uint64), [peer for peer in range(3) if peer != liar]
    with pytest.raises(StopIteration) as ended:
        steps[liar].send({peer: sent[peer][liar] for peer in peers})
    coin, own = ended.value.value, parties()[liar]
    pairs = [own.random(name, like) for name in ("heads", "heads-after")]
    known = [pair.first ^ pair.second for pair in pairs]

    def from_messages(*messages: bytes) -> set[bytes]:
        pieces = [np.frombuffer(m[at : at + 32], "<u8") for m in messages for at in range(0, len(m), 32)]
        sums = [like]
        for piece in (*known, *pieces):
            sums += [piece ^ other for other in sums]
        return {found.tobytes() for found in sums}

    assert all(coin not in from_messages(sent[peer][liar]) for peer in peers)
    assert coin in from_messages(*(sent[peer][liar] for peer in peers))


@pytest.mark.parametrize("liar", range(3))
@pytest.mark.parametrize("silent", ["range-spare", "lift-bit", "lift", "lift-spare", "gram", "gram-taken"])
def test_who_has_something_to_send_yet_has_no_coin(silent: str, liar: int) -> None:
    """A message goes to one of the others, and the second has no reason to wait for it."""
    if silent == "lift-bit" and liar != 0:
        return
    shares = random_sharing(np.arange(6, dtype=np.uint32).reshape(2, 3), 1)

    def all_steps(session: Session, index: int) -> Any:
        inside = yield from range_check(session, shares[index], 10)
        assert inside.all()
        return (yield from open_gram(session, (yield from lift(session, shares[index]))))

    heard = heard_by_the_silent(all_steps, sessions(), liar, silent)
    after = {"range": "range-coin", "lift": "lift-sums", "gram": "gram-coin"}[silent.split("-")[0]]
    coin = "lift-coin" if silent == "lift-spare" else after
    assert sum(step == coin for _, step in heard) < 2
    assert silent in ("gram", "lift-bit") or any(step == silent for _, step in heard)


def test_zero_is_known_without_being_opened() -> None:
    zero, one = np.zeros(4, dtype=np.uint64), np.array([0, 0, 1, 0], dtype=np.uint64)

    def asked(value: np.ndarray, question: Callable[..., Any], share: Callable[[np.ndarray], list[Pair]]) -> set[bool]:
        shares = share(value)
        return set(together(lambda session, index: question(session, "zero", shares[index])))

    def added(value: np.ndarray) -> list[Pair]:
        return random_sharing(value, 3)

    assert asked(zero, are_zero_bits, xor_sharing) == asked(zero, are_zero, added) == {True}
    assert asked(one, are_zero_bits, xor_sharing) == asked(one, are_zero, added) == {False}


@pytest.mark.parametrize("liar", range(3))
@pytest.mark.parametrize("added", [True, False])
def test_what_is_not_zero_is_not_made_so_by_one(liar: int, added: bool) -> None:
    """A liar that knows by how much it is not zero knows what each of the others expects, and says that."""
    value = np.array([0, 5], dtype=np.uint64)
    shares = random_sharing(value, 3) if added else xor_sharing(value)

    def tamper(sender: int, receiver: int, name: str, data: bytes) -> bytes:
        own = shares[receiver]
        expected = -(own.first + own.second) if added else own.first ^ own.second
        return sharing._digest(name, sharing.to_bytes(expected)) if sender == liar else data

    question = are_zero if added else are_zero_bits
    answers = together(lambda session, index: question(session, "zero", shares[index]), tamper)
    assert not any(answers[index] for index in range(3) if index != liar)


def test_a_share_that_is_sent_once_is_compared_with_its_digest() -> None:
    words = np.arange(5, dtype=np.uint64)
    shares = xor_sharing(words)

    def opened(session: Session, index: int) -> Any:
        mine = shares[index]
        return mine.first ^ mine.second ^ (yield from missing_share(session, "words", mine))

    assert all(np.array_equal(found, words) for found in together(opened))
    with pytest.raises(Untrusted, match=r"step 'words': centre and \w+ sent different values"):
        together(opened, of_liar("words"))


# --- conjunctions ---------------------------------------------------------------------------------------------------


def product_of(count: int) -> Callable[[Session, int], Any]:
    a, b = (np.frombuffer(os.urandom(8 * count), dtype="<u8") for _ in range(2))
    shares_a, shares_b = xor_sharing(a), xor_sharing(b)

    def product(session: Session, index: int) -> Any:
        made = Conjunctions(session, "and")
        found = yield from made.of("both", shares_a[index], shares_b[index])
        yield from made.check()
        opened = yield from open_bits(session, "open", found)
        return np.array_equal(opened, a & b)

    return product


@pytest.mark.parametrize("count", [1, 5, 40_000])
def test_a_product_that_is_right_passes_and_one_wrong_bit_does_not(count: int) -> None:
    assert together(product_of(count)) == [True] * 3
    for step in ("and-both", "and-spare"):
        with pytest.raises(Untrusted, match="step 'and-check': a product of shared bits is wrong"):
            together(product_of(count), lies={step: add_to(count // 2, 1 << 40)})


@pytest.mark.parametrize("pattern", [(0,), (0, 3), (0, 2, 4, 6), tuple(range(8))], ids=str)
def test_lies_pass_no_more_often_than_proved(pattern: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """With one lane and four products of it opened: a liar that wrongs the same pattern among the real products and in
    the lane passes if the lane happens to be turned there, at most one time in four; with a lane that is as it should
    be, or with another pattern, never."""
    count, shown, tries = 8, 4, 150
    monkeypatch.setattr(verifying, "_lanes", lambda found: (1, shown))

    def wrong(places: tuple[int, ...]) -> Change:
        def change(words: np.ndarray) -> None:
            words[list(places)] ^= np.uint64(1)

        return change

    def passes(spares: tuple[int, ...]) -> int:
        passed = 0
        for _ in range(tries):
            with contextlib.suppress(Untrusted):
                together(product_of(count), lies={"and-both": wrong(pattern), "and-spare": wrong(spares)})
                passed += 1
        return passed

    assert passes(()) == 0
    assert passes((0, 5, 6)) == 0
    assert 0 < passes(pattern) < tries / shown + 5 * (tries / shown) ** 0.5


@pytest.mark.parametrize("count", [1, 1000, 1 << 15, (1 << 15) + 1, 1 << 20])
def test_as_many_spare_products_as_the_bound_needs(count: int) -> None:
    lanes, shown = verifying._lanes(count)
    assert shown**lanes >= 2**40


def test_lanes_are_turned_independently_of_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    turned = verifying._turned

    def watching(shared: Pair, turns: list[int]) -> Pair:
        seen.append(turns)
        return turned(shared, turns)

    monkeypatch.setattr(verifying, "_turned", watching)
    together(product_of(1))
    assert all(turns == seen[0] for turns in seen)
    assert len(seen[0]) == 4
    assert len(set(seen[0])) > 1
    assert all(0 <= turn < 1 + (1 << 10) for turn in seen[0])


def test_as_many_sums_parities_weights_and_groups_as_the_bounds_need() -> None:
    """The figures of docs/decisions/0002."""
    assert 2.0**-lifting._SUMS + 2.0**-lifting._PUBLIC + 2.0**-lifting._HIDDEN <= 2.0**-40 * 1.01
    assert gram._CHECKS * 8 >= 40
    assert (SUMS, GROUPS) == (4, 16)


def test_of_a_range_check_one_bit_a_device_is_opened_and_no_partial_result() -> None:
    sums = np.zeros((3, 48), dtype=np.int32)
    sums[1, 7] = 1 << 20
    shares, told = random_sharing(sums.view(np.uint32), 1), dict[int, np.ndarray]()

    def listen(sender: int, receiver: int, name: str, data: bytes) -> bytes:
        if name == "range" and receiver == (sender + 1) % 3:
            told[sender] = np.frombuffer(data, "<u4")
        return data

    together(lambda s, i: range_check(s, shares[i], 10), listen)
    assert (told[0] ^ told[1] ^ told[2]).tolist() == [1, 0, 1]


def test_a_range_check_is_not_opened_when_a_bit_of_it_was_wronged() -> None:
    """Every conjunction of it, the last one too, which alone would let a device pass that is out of range."""
    sums = np.zeros((3, 48), dtype=np.int32)
    sums[1, 7] = 1 << 20
    shares, steps = random_sharing(sums.view(np.uint32), 1), dict[str, int]()

    def listen(sender: int, receiver: int, name: str, data: bytes) -> bytes:
        steps[name] = len(data)
        return data

    assert together(lambda s, i: range_check(s, shares[i], 10), listen)[0].tolist() == [True, False, True]
    made = [name for name in steps if name not in ("range-spare", "range-coin", "range-check", "range-zero", "range")]
    assert len(made) == 1 + 6 + 6 + 5
    for step in made:
        opened = False

        def watch(sender: int, receiver: int, name: str, data: bytes) -> bytes:
            nonlocal opened
            opened = opened or name == "range"
            return data

        with pytest.raises(Untrusted, match="step 'range-check': a product of shared bits is wrong"):
            together(lambda s, i: range_check(s, shares[i], 10), watch, {step: add_to(steps[step] // 8, 1)})
        assert not opened, step


# --- lifting and products -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 8, 20])
@pytest.mark.parametrize("amount", [1, 1 << 31, (1 << 32) - 1])
def test_a_shifted_sketch_is_noticed_before_it_is_multiplied(rows: int, amount: int) -> None:
    small = np.random.default_rng(rows).integers(-(2**20), 2**20, size=(rows, 30), dtype=np.int32)
    shares = random_sharing(small.view(np.uint32), 1)
    with pytest.raises(Untrusted, match="step 'lift': a lifted sketch is no small integer"):
        together(lambda s, i: lift(s, shares[i]), lies={"lift": add_to(30 * rows - 1, amount)})


def test_a_lie_about_a_highest_bit_shifts_by_nothing_or_is_noticed() -> None:
    """Party 0 alone knows it; what its lie does depends on a bit that it does not know, so it may do nothing."""
    small = np.random.default_rng(5).integers(-(2**20), 2**20, size=(1, 1), dtype=np.int32)

    def tamper(sender: int, receiver: int, name: str, data: bytes) -> bytes:
        return (np.frombuffer(data, "<u4") + np.uint32(3)).tobytes() if name == "lift-bit" else data

    noticed = 0
    for seed in range(40):
        shares = random_sharing(small.view(np.uint32), seed)
        try:
            lifted = together(lambda s, i, shares=shares: lift(s, shares[i]), tamper)
        except Untrusted:
            noticed += 1
            continue
        assert int((lifted[0].first + lifted[1].first + lifted[2].first).view(np.int64)[0, 0]) == int(small[0, 0])
    assert 5 < noticed < 35


def test_what_a_lie_about_highest_bits_leaves_is_compared_in_parities_of_secret_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A digest of the sums themselves would let party 0 try which of the bits that it lied about count. Always the same
    lie, shares and bits: what is not zero looks random whatever it is."""
    small = np.random.default_rng(5).integers(-(2**20), 2**20, size=(3, 4), dtype=np.int32)
    shares, compared = random_sharing(small.view(np.uint32), 1), list[np.ndarray]()

    def listening(session: Session, step: str, shared: Pair) -> Any:
        if step == "lift-small":
            compared.append(shared.first)
        return (yield from are_zero_bits(session, step, shared))

    def tamper(sender: int, receiver: int, name: str, data: bytes) -> bytes:
        return (np.frombuffer(data, "<u4") + np.uint32(3)).tobytes() if name == "lift-bit" else data

    monkeypatch.setattr(lifting, "are_zero_bits", listening)
    for _ in range(30):
        with pytest.raises(Untrusted, match="step 'lift': a lifted sketch is no small integer"):
            together(lambda s, i: lift(s, shares[i]), tamper)
    left = np.array(compared).reshape(30, 3, -1)
    values = left[:, 0] ^ left[:, 1] ^ left[:, 2]
    assert (values <= 1).all()
    assert abs(values.mean() - 0.5) < 5 * 0.5 / values.size**0.5
    assert abs(values.mean(axis=0) - 0.5).max() < 0.5  # no place is always the same


@pytest.mark.parametrize("width", [3, 2048])
def test_the_matrix_that_is_opened_is_that_of_the_rows_or_the_round_ends(width: int) -> None:
    rows = np.random.default_rng(2).integers(-(2**16), 2**16, size=(9, width)).astype(np.int64)
    shares = random_sharing(rows.view(np.uint64), 4)
    for opened in together(lambda s, i: open_gram(s, shares[i])):
        assert np.array_equal(opened, rows @ rows.T)
    for step, place, amount in (("gram", 44, 2000), ("gram", 1, -2), ("gram-taken", 0, 1), ("gram-taken", -1, 1 << 63)):
        with pytest.raises(Untrusted, match="what was opened are not the products of the sketches"):
            together(lambda s, i: open_gram(s, shares[i]), lies={step: add_to(place, amount)})


def test_what_is_opened_to_check_the_matrix_is_masked() -> None:
    rows = np.random.default_rng(2).integers(-(2**16), 2**16, size=(4, 50)).astype(np.int64)
    shares, told = random_sharing(rows.view(np.uint64), 4), dict[int, np.ndarray]()

    def listen(sender: int, receiver: int, name: str, data: bytes) -> bytes:
        if name == "gram-sums" and receiver == (sender + 1) % 3:
            told[sender] = np.frombuffer(data, "<u8")
        return data

    together(lambda s, i: open_gram(s, shares[i]), listen)
    opened = (told[0] + told[1] + told[2]).view(np.int64)
    assert (np.abs(opened.astype(np.float64)) > 2.0**40).mean() > 0.9  # without a mask it is below 2^26


def test_who_foresees_a_weight_is_right_one_time_in_256(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one column, a liar that takes back what its lie adds for one weight passes if that is the weight."""
    monkeypatch.setattr(gram, "_CHECKS", 1)
    rows = np.random.default_rng(2).integers(-(2**16), 2**16, size=(2, 3)).astype(np.int64)
    shares, passed, tries = random_sharing(rows.view(np.uint64), 4), 0, 128
    for place in range(tries):
        lies = {"gram": add_to(0, 2), "gram-taken": add_to(0, -(place % 2))}
        with contextlib.suppress(Untrusted):
            together(lambda s, i: open_gram(s, shares[i]), lies=lies)
            passed += 1
    assert passed <= 8


def test_a_matrix_beyond_what_sketches_can_have_is_refused() -> None:
    gram._require_possible(np.array([[1 << 54, 1 << 53], [1 << 53, 1 << 54]]))
    for found in ([[1 << 55]], [[-1]], [[4, 5], [5, 4]], [[0, 1], [1, 4]]):
        with pytest.raises(Untrusted, match="the opened numbers are no inner products"):
            gram._require_possible(np.array(found))


@pytest.mark.parametrize(("liar", "victim"), [(i, j) for i in range(3) for j in range(3) if i != j])
def test_nobody_is_told_another_matrix_than_the_rest(liar: int, victim: int) -> None:
    """Whichever two of them hold the share on which the matrix counts."""
    rows = np.random.default_rng(2).integers(-(2**16), 2**16, size=(4, 3)).astype(np.int64)
    shares = random_sharing(rows.view(np.uint64), 4)

    def tamper(sender: int, receiver: int, name: str, data: bytes) -> bytes:
        if (sender, receiver, name) != (liar, victim, "gram"):
            return data
        words = np.frombuffer(data, "<u8").copy()
        words[0] += np.uint64(2000)
        return words.tobytes()

    with pytest.raises(Untrusted, match="what was opened are not the products of the sketches"):
        together(lambda s, i: open_gram(s, shares[i]), tamper)


def test_products_with_small_numbers_are_exact() -> None:
    words = np.frombuffer(os.urandom(8 * 7 * 300), dtype="<u8").reshape(7, 300)
    small = np.random.default_rng(3).integers(-1, 2, size=(300, 5)).astype(np.float64)
    expected = words.astype(object) @ small.astype(np.int64).astype(object) % 2**64
    assert np.array_equal(multiply_by_small(words, small), expected.astype(np.uint64))


# --- what was measured ----------------------------------------------------------------------------------------------


def all_blocks(sums: RandomSums) -> Words:
    return np.concatenate([block.copy() for _, block in sums.blocks(range(sums.count))], axis=1)


@pytest.mark.parametrize("count", [3, 4, 5, 16, 17, 100])
def test_sums_are_of_rows_as_of_what_was_measured_of_them(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(combining, "WORDS_MAX", 0)
    rows = np.frombuffer(os.urandom(4 * (count + 1) * 5000), dtype="<u4").reshape(count + 1, 5000)
    chosen = list(range(1, count + 1))
    sums = RandomSums(ArrayRows(rows), 5000, chosen, os.urandom)
    assert sums.count == (count if count <= SUMS else SUMS)
    found = all_blocks(sums)
    assert np.array_equal(found, sums.of(rows[chosen]))
    assert np.array_equal(sums.total, rows[chosen].sum(axis=0, dtype=np.uint32))
    assert len(np.unique(found[:, 0])) == sums.count


ERRORS = {
    "one row, little": {5: 1},
    "one row, the highest bit": {5: 1 << 31},
    "two rows that cancel": {5: 77, 60: -77},
    "all rows, the highest bit": dict.fromkeys(range(100), 1 << 31),
    "all rows, 2^28": dict.fromkeys(range(100), 1 << 28),
}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_what_is_wrong_passes_the_sums_no_more_often_than_stated(
    error: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(combining, "WORDS_MAX", 0)
    wrong = np.zeros((100, 1), dtype=np.uint32)
    for row, amount in error.items():
        wrong[row] = amount % 2**32
    tries = 1500
    passed = sum(not RandomSums(ArrayRows(wrong), 1, range(100), os.urandom).of(wrong).any() for _ in range(tries))
    least = min(amount & -amount for amount in error.values())
    bound = 1 / GROUPS + min(1.0, max(least / 2**32, 2**-16)) ** SUMS
    assert passed <= tries * bound + 5 * (tries * bound) ** 0.5


def test_each_row_of_a_small_round_is_measured_again() -> None:
    rows = np.frombuffer(os.urandom(4 * 50 * 70), dtype="<u4").reshape(50, 70)
    sums = RandomSums(ArrayRows(rows), 70, range(50), os.urandom)
    assert sums.count == 50
    found = all_blocks(sums)
    assert np.array_equal(found, sums.of(rows))
    assert {row.tobytes() for row in found} == {row.tobytes() for row in rows}
    assert np.array_equal(sums.total, rows.sum(axis=0, dtype=np.uint32))


def test_secrets_of_different_attempts_have_nothing_in_common() -> None:
    one, other = sessions(), sessions()
    like = np.zeros(4, dtype=np.uint64)
    shares = [session.random("x", like) for session in (*one, *other)]
    for place in range(3):
        assert np.array_equal(shares[place].second, shares[(place + 1) % 3].first)
    assert len({share.first.tobytes() for share in shares}) == 6
