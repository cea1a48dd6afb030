"""The coders of dense patches: what goes in comes out, near its entropy, and hostile streams are refused."""

from __future__ import annotations

import tracemalloc

import brotli
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_delta.errors import Malformed
from model_delta.patch import coding
from model_delta.patch.coding import Source


def source(data: bytes) -> Source:
    return Source(data, "stream")


@given(st.integers(0, 2**63 - 1))
def test_a_varint_comes_back_and_has_one_form(value: int) -> None:
    written = coding.varint(value)
    taken = source(written)
    assert taken.number() == value
    taken.close()
    with pytest.raises(Malformed, match="shortest"):
        source(written[:-1] + bytes([written[-1] | 0x80, 0])).number()


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=300, unique=True), st.integers(0, 2000))
def test_positions_come_back(places: list[int], beyond: int) -> None:
    marks = np.sort(np.array(places, np.int64))
    universe = int(marks[-1]) + 1 + beyond
    shift, unary, low = coding.write_positions(marks, universe)
    unary_source, low_source = source(unary), source(low)
    assert np.array_equal(coding.read_positions(len(marks), universe, shift, unary_source, low_source), marks)
    unary_source.close()
    low_source.close()


@pytest.mark.parametrize("share", [0.0015, 0.0058, 0.03, 0.16, 0.28])
def test_positions_take_little_more_than_their_entropy(share: float) -> None:
    universe = 1_000_000 if share < 0.01 else 50_000
    marks = np.flatnonzero(np.random.default_rng(1).random(universe) < share)
    _, unary, low = coding.write_positions(marks, universe)
    assert 8 * len(unary + low) < 1.035 * coding.marks_bits(len(marks), universe) + 16


@pytest.mark.parametrize(
    ("count", "universe", "shift", "unary", "low"),
    [
        (0, 10, 0, b"\xff", b""),
        (11, 10, 0, b"\xff\xff", b""),
        (coding.MARKS_MAX + 1, 1 << 20, 6, bytes(1 << 20), b""),
        (1, 10, 25, b"\x01", bytes(4)),
        (1, 1 << 40, 0, b"\x01", b""),
        (3, 100, 0, b"\x03", b""),
        (1, 10, 3, b"\x01", b""),
        (1, 10, 0, b"\x00\x80", b""),
        (2, 10, 3, b"\x03", b"\x3f"),
    ],
)
def test_positions_that_do_not_fit_are_malformed(
    count: int, universe: int, shift: int, unary: bytes, low: bytes
) -> None:
    with pytest.raises(Malformed, match="patch: "):
        coding.read_positions(count, universe, shift, source(unary), source(low))


@given(st.dictionaries(st.integers(0, 999), st.integers(1, 255), min_size=1, max_size=200))
def test_steps_come_back(changes: dict[int, int]) -> None:
    places = np.array(sorted(changes), np.int64)
    steps = np.array([changes[place] for place in places.tolist()], np.uint8)
    parts = coding.write_steps(places, steps, 1000)
    control = source(b"".join(map(coding.varint, parts.control)))
    streams = [source(data) for data in (parts.unary, parts.low, parts.signs, parts.rest)]
    found = coding.read_steps(1000, control, *streams)
    assert np.array_equal(found[0], places)
    assert np.array_equal(found[1], steps)
    for stream in (control, *streams):
        stream.close()


@pytest.mark.parametrize("floats", [True, False])
@pytest.mark.parametrize("width", [2, 4])
@given(data=st.data())
def test_planes_come_back_whatever_the_bits(width: int, floats: bool, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 60))
    old, new = (data.draw(st.binary(min_size=count * width, max_size=count * width)) for _ in range(2))
    if data.draw(st.booleans()):  # steps on a grid
        numbers = np.frombuffer(old, f"<u{width}")
        steps = np.array(data.draw(st.lists(st.integers(-9, 9), min_size=count, max_size=count)))
        new = (numbers + (steps * 64).astype(numbers.dtype)).tobytes()
    before, after = np.frombuffer(old, np.uint8), np.frombuffer(new, np.uint8)
    planes = coding.write_planes(before, after, width, floats=floats)
    assert coding.read_planes(old, planes, floats=floats) == new


def test_a_step_of_one_unit_in_the_last_place_is_one_for_floats_of_either_sign() -> None:
    old = np.array([1.0, -1.0, 1e-30, -1e30], np.float32)
    new = np.nextafter(old, np.float32(np.inf))
    planes = coding.write_planes(old.view(np.uint8), new.view(np.uint8), 4, floats=True)
    assert planes.octets[0] == bytes([2, 2, 2, 2])


def test_floats_on_a_grid_are_divided_by_it() -> None:
    old = np.linspace(0.1, 0.2, 64).astype(np.float32)
    new = (old.view(np.int32) + np.arange(64) % 5 * 1024 - 2048).astype(np.int32).view(np.float32)
    assert coding.write_planes(old.view(np.uint8), new.view(np.uint8), 4, floats=True).divisor == 1024


@given(st.binary(max_size=3000), st.integers(coding.WINDOW_BITS_MIN, coding.WINDOW_BITS_MAX))
def test_streams_come_back_within_their_window(data: bytes, window: int) -> None:
    for plain in (data, data * 20):
        coded = coding.squeezed(plain, window)
        assert len(coded) <= len(plain)
        assert coding.unsqueezed(coded, len(plain), window, "stream") == plain
        whole = coding.squeezed_whole(plain, window)
        pieces = (whole[start : start + 100] for start in range(0, len(whole), 100))
        assert b"".join(coding.unsqueezed_pieces(pieces, len(plain), window, "file")) == plain


@pytest.mark.parametrize("window", range(10, 25))
def test_the_window_is_read_as_brotli_writes_it(window: int) -> None:
    assert coding.window_of(brotli.compress(bytes(range(256)) * 3, quality=5, lgwin=window), "stream") == window


def test_a_window_too_large_is_refused_before_it_is_unpacked() -> None:
    stream = brotli.compress(bytes(1000), quality=5, lgwin=19)
    with pytest.raises(Malformed, match=r"window of 2\*\*19"):
        coding.unsqueezed(stream, 1000, 18, "stream")
    with pytest.raises(Malformed, match=r"window of 2\*\*19"):
        list(coding.unsqueezed_pieces(iter([stream]), 1000, 18, "file"))
    with pytest.raises(Malformed, match="no brotli stream"):
        coding.window_of(b"\x11\x12", "stream")  # the large-window extension


def test_a_bomb_takes_no_memory() -> None:
    bomb = brotli.compress(bytes(50_000_000), quality=5, lgwin=18)
    tracemalloc.start()
    try:
        with pytest.raises(Malformed):
            coding.unsqueezed(bomb, 1000, 18, "stream")
        with pytest.raises(Malformed, match="more than 1000"):
            list(coding.unsqueezed_pieces(iter([bomb]), 1000, 18, "file"))
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_streams_cut_off_damaged_or_followed_are_malformed() -> None:
    plain = bytes(range(64)) * 50
    stream = brotli.compress(plain, quality=5, lgwin=18)
    for wrong in (stream[:-1], stream[:5], stream + b"x", stream + stream, b"\x0b" + stream[1:3] + b"\xff" * 40):
        with pytest.raises(Malformed):
            coding.unsqueezed(wrong, len(plain), 18, "stream")
        with pytest.raises(Malformed):
            list(coding.unsqueezed_pieces(iter([wrong[:4], wrong[4:]]), len(plain), 18, "file"))
