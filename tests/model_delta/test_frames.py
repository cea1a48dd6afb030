"""Frames: any sufficient number of them, in any order, give the file back; anything else is noticed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_delta.errors import Malformed
from model_delta.frames import FRAMES_MAX, HEADER_BYTES, NEEDED_MAX, TRANSFERS_MAX, Fragments, Reassembly


@given(st.binary(max_size=900), st.sampled_from([20, 51, 115, 222]), st.randoms(use_true_random=False))
def test_any_sufficient_frames_in_any_order_give_the_file_back(blob: bytes, frame_bytes: int, random: object) -> None:
    fragments = Fragments(blob, frame_bytes)
    chosen = random.sample(range(FRAMES_MAX), fragments.needed)  # type: ignore[attr-defined]
    receiver = Reassembly()
    for index in chosen[:-1]:
        assert len(fragments.frame(index)) <= frame_bytes
        assert receiver.add(fragments.frame(index)) is None
        assert receiver.add(fragments.frame(index)) is None  # a duplicate adds nothing
    assert receiver.add(fragments.frame(chosen[-1])) == blob


def test_four_hundred_bytes_take_nine_frames_of_the_slowest_data_rate() -> None:
    assert Fragments(bytes(411), 51).needed == 9


def test_the_first_frames_carry_the_file_itself() -> None:
    blob = bytes(range(100))
    fragments = Fragments(blob, 51)
    joined = b"".join(fragments.frame(i)[HEADER_BYTES:] for i in range(fragments.needed))
    assert joined[6 : 6 + len(blob)] == blob


def test_frames_of_two_files_may_be_interleaved() -> None:
    first, second = Fragments(b"a" * 300, 51), Fragments(b"b" * 300, 51)
    receiver = Reassembly()
    done = [receiver.add(f.frame(i)) for i in range(first.needed) for f in (first, second)]
    assert [blob for blob in done if blob] == [b"a" * 300, b"b" * 300]


def test_unfinished_files_are_bounded_and_the_oldest_goes_first() -> None:
    files = [Fragments(bytes([n]) * 80, 51) for n in range(TRANSFERS_MAX + 1)]
    receiver = Reassembly()
    for file in files:
        assert file.needed == 2
        assert receiver.add(file.frame(0)) is None
    assert receiver.add(files[-1].frame(1)) == bytes([TRANSFERS_MAX]) * 80
    assert receiver.add(files[0].frame(1)) is None  # its first piece was forgotten


def test_a_damaged_frame_is_noticed_and_a_fresh_start_works() -> None:
    fragments = Fragments(bytes(range(200)), 51)
    receiver = Reassembly()
    for index in range(fragments.needed - 1):
        receiver.add(fragments.frame(index))
    damaged = bytearray(fragments.frame(fragments.needed - 1))
    damaged[-3] ^= 1
    with pytest.raises(Malformed, match="do not give one sound file"):
        receiver.add(bytes(damaged))
    for index in range(fragments.needed - 1):
        assert receiver.add(fragments.frame(index)) is None
    assert receiver.add(fragments.frame(77)) == bytes(range(200))


@given(st.binary(max_size=60))
def test_noise_is_refused_or_kept_waiting_but_never_crashes(frame: bytes) -> None:
    receiver = Reassembly()
    try:
        receiver.add(frame)
    except Malformed as error:
        assert str(error).startswith("frames:")  # noqa: PT017


def test_a_file_too_large_for_radio_is_refused() -> None:
    with pytest.raises(ValueError, match=f"more than {NEEDED_MAX} frames"):
        Fragments(bytes(100_000), 51)
    with pytest.raises(ValueError, match="frames of 4 bytes"):
        Fragments(b"x", 4)


def test_every_square_of_the_parity_can_be_solved() -> None:
    blob = np.random.default_rng(1).bytes(500)
    fragments = Fragments(blob, 24)
    receiver = Reassembly()
    last = [receiver.add(fragments.frame(FRAMES_MAX - 1 - i)) for i in range(fragments.needed)][-1]
    assert last == blob
