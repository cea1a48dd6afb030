"""Applying: in little memory, from a sender that is not believed, and again after an interruption."""

from __future__ import annotations

import bz2
import contextlib
import io
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_delta.errors import Malformed
from model_delta.patch import bspatch
from model_delta.patch.access import BytesAccess, FileAccess, read_exactly
from model_delta.patch.bsdiff import make_patch
from model_delta.patch.container import apply_bytes, inspect

OLD, NEW = bytes(range(256)) * 8, bytes(range(255, -1, -1)) + bytes(range(256)) * 9
PATCH = make_patch(OLD, NEW)


def patch_of(
    triples: list[tuple[int, int, int]], difference: bytes, extra: bytes, size: int, magic: bytes = b"BSDIFF40"
) -> bytes:
    """A patch as bsdiff writes it: integers are sign and magnitude."""

    def number(value: int) -> bytes:
        return struct.pack("<Q", abs(value) | (1 << 63 if value < 0 else 0))

    control, packed = (bz2.compress(data) for data in (b"".join(number(n) for t in triples for n in t), difference))
    return magic + number(len(control)) + number(len(packed)) + number(size) + control + packed + bz2.compress(extra)


def attempt(old: bytes, patch: bytes, size_max: int) -> bytes:
    """What stands in the output after applying, or after a refusal."""
    new = io.BytesIO()
    with contextlib.suppress(Malformed):
        bspatch.apply_stream(BytesAccess(old), BytesAccess(patch), new, size_max)
    return new.getvalue()


@given(st.data())
def test_a_damaged_patch_is_malformed_or_gives_other_bytes_of_the_right_size(data: st.DataObject) -> None:
    """The caller's digest check does the rest."""
    patch = bytearray(PATCH)
    for _ in range(data.draw(st.integers(1, 3))):
        patch[data.draw(st.integers(0, len(patch) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    damaged = bytes(patch[: data.draw(st.integers(0, len(patch)))]) if data.draw(st.booleans()) else bytes(patch)
    with contextlib.suppress(Malformed):
        assert len(apply_bytes(OLD, damaged, len(NEW))) <= len(NEW)


def test_every_flipped_bit_is_malformed_and_writes_no_more_than_the_new_file() -> None:
    """bz2 has a checksum over each block; the header's lengths and the triples must fit one another."""
    for bit in range(len(PATCH) * 8):
        damaged = bytearray(PATCH)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            assert apply_bytes(OLD, bytes(damaged), len(NEW)) == NEW  # a bit that means nothing
        except Malformed:
            assert len(attempt(OLD, bytes(damaged), len(NEW))) <= len(NEW)


@given(st.binary(max_size=200))
def test_bytes_that_are_no_patch_are_malformed(data: bytes) -> None:
    for patch in (data, b"BSDIFF40" + data):
        with pytest.raises(Malformed, match="patch: "):
            apply_bytes(OLD, patch, 1000)


def test_every_truncation_is_malformed() -> None:
    for length in range(len(PATCH)):
        with pytest.raises(Malformed):
            apply_bytes(OLD, PATCH[:length], len(NEW))
    with pytest.raises(Malformed, match="bytes follow"):
        apply_bytes(OLD, PATCH + b"x", len(NEW))


def test_a_patch_for_another_old_file_is_refused_before_a_byte_is_written() -> None:
    new = io.BytesIO()
    with pytest.raises(Malformed, match="made for another one"):
        bspatch.apply_stream(BytesAccess(OLD[:10]), BytesAccess(PATCH), new, len(NEW))
    assert new.getvalue() == b""


@pytest.mark.parametrize(
    ("triples", "difference", "extra", "size", "message"),
    [
        ([(4, 0, 0)], b"aaaa", b"", 10**9, "at most 100"),
        ([(4, 0, 0)], b"aaaa", b"", 2**31, "at most 100"),
        ([(4, 0, 0)], b"aaaa", b"", -1, "lengths do not fit"),
        ([(4, 0, 0)], b"aaaa", b"", 5, "do not make 5"),
        ([(4, 2, 0)], b"aaaa", b"aa", 5, "more than the 5 bytes"),
        ([(4, 0, 0)], b"aaaaa", b"", 4, "difference block unpacks to more than 4"),
        ([(4, 0, 0)], b"aaa", b"", 4, "difference block ends after 3"),
        ([(0, 4, 0)], b"", b"aaa", 4, "extra block ends after 3"),
        ([(0, 4, 0)], b"a", b"aaaa", 4, "difference block unpacks to more than 0"),
        ([(-4, 8, 0)], b"", b"aaaa", 4, "outside the new file"),
        ([(4, -4, 0)], b"aaaa", b"", 4, "outside the new file"),
        ([(2**62, 2**62, 0)], b"aa", b"aa", 4, "outside the new file"),
        ([(0, 0, -5), (4, 0, 0)], b"aaaa", b"", 4, "reads outside"),
        ([(0, 0, 7), (4, 0, 0)], b"aaaa", b"", 4, "reads outside"),
        ([(0, 0, -(2**62)), (4, 0, 0)], b"aaaa", b"", 4, "moves outside"),
        ([(0, 0, 12), (0, 0, 12), (4, 0, 0)], b"aaaa", b"", 4, "reads outside"),
        ([(4, 0, 12), (0, 0, 12)], b"aaaa", b"", 4, "moves outside"),
        ([], b"", b"", 4, "do not make 4"),
        ([(0, 0, 0)] * 6, b"", b"", 4, "unpacks to more than 5 triples"),
        ([(4, 0, 0)], b"aaaa", bytes(101), 4, "extra block unpacks to more than 0"),
    ],
)
def test_hostile_patches(
    triples: list[tuple[int, int, int]], difference: bytes, extra: bytes, size: int, message: str
) -> None:
    with pytest.raises(Malformed, match=message):
        apply_bytes(b"old file", patch_of(triples, difference, extra, size), 100)


def test_the_hostile_patches_are_hostile_only_where_they_say() -> None:
    assert apply_bytes(b"old file", patch_of([(4, 1, 0)], bytes(4), b"!", 5), 100) == b"old !"
    with pytest.raises(Malformed, match="bsdiff40"):
        apply_bytes(b"old file", patch_of([(4, 1, 0)], bytes(4), b"!", 5, b"BSDIFF41"), 100)


def test_lengths_that_would_overflow_are_refused_before_they_are_added_up() -> None:
    for size in (2**62, 2**63 - 1):
        patch = patch_of([(2**62, 0, 0)] * 4, b"aa", b"aa", size)
        with pytest.raises(Malformed, match=f"found {size}"):
            inspect(BytesAccess(patch))
        with pytest.raises(Malformed, match=f"found {size}"):
            apply_bytes(b"old file", patch, size)


def test_a_control_block_that_is_cut_within_a_triple_is_malformed() -> None:
    control, packed = bz2.compress(struct.pack("<QQQQ", 4, 0, 0, 0)), bz2.compress(b"aaaa")
    patch = b"BSDIFF40" + struct.pack("<QQQ", len(control), len(packed), 4) + control + packed + bz2.compress(b"")
    with pytest.raises(Malformed, match="8 bytes are left over"):
        apply_bytes(b"old file", patch, 100)


def test_triples_are_checked_across_batches() -> None:
    """More triples than one batch holds; the last one reads past the old file."""
    triples = [(1, 1, -1)] * 5000
    good = patch_of(triples, bytes(5000), b"-" * 5000, 10_000)
    assert apply_bytes(b"x", good, 10_000) == b"x-" * 5000
    with pytest.raises(Malformed, match="reads outside"):
        apply_bytes(b"x", patch_of([*triples[:-2], (1, 1, 0), (1, 1, 0)], bytes(5000), b"-" * 5000, 10_000), 10_000)


def test_bombs_take_no_memory() -> None:
    """Three streams that unpack to far more than they may, and a header that declares 2 GiB."""
    bombs = [
        patch_of([(4, 0, 0)], bytes(20_000_000), b"", 4),
        patch_of([(4, 0, 0)], b"aaaa", bytes(20_000_000), 4),
        patch_of([(0, 0, 0)] * 200_000, b"", b"", 4),
        patch_of([(2**31, 0, 0)], b"aaaa", b"", 2**31),
    ]
    for bomb in bombs:
        with contextlib.suppress(Malformed):
            assert inspect(BytesAccess(bomb)).new_size <= 2**31
        tracemalloc.start()
        try:
            with pytest.raises(Malformed):
                apply_bytes(b"old file", bomb, 2**31)
            assert tracemalloc.get_traced_memory()[1] < 1_000_000
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("done", [0, 1, 65_535, 65_536, 65_537, 150_000, 199_999, 200_000])
def test_an_interrupted_output_is_taken_up_where_it_ends(tmp_path: Path, done: int) -> None:
    old = np.random.default_rng(1).bytes(200_000)
    new = bytearray(old)
    new[::777] = bytes(len(new[::777]))
    patch = make_patch(old, bytes(new))
    path = tmp_path / "new"
    path.write_bytes(new[:done] + b"torn")  # what came after the durable part is rewritten
    with path.open("r+b") as output:
        assert bspatch.apply_stream(BytesAccess(old), BytesAccess(patch), output, len(new), done=done) == len(new)
        output.truncate(len(new))
    assert path.read_bytes() == new


def test_an_interrupted_output_of_something_else_is_refused() -> None:
    output = io.BytesIO(b"other bytes")
    with pytest.raises(Malformed, match="remove it and start again"):
        bspatch.apply_stream(BytesAccess(OLD), BytesAccess(PATCH), output, len(NEW), done=5)
    assert output.getvalue() == b"other bytes"
    for done in (-1, len(NEW) + 1):
        with pytest.raises(Malformed, match="start again"):
            bspatch.apply_stream(BytesAccess(OLD), BytesAccess(PATCH), io.BytesIO(NEW), len(NEW), done=done)


def test_an_old_file_that_shrinks_while_it_is_read_is_malformed(tmp_path: Path) -> None:
    path = tmp_path / "old"
    path.write_bytes(OLD)
    with path.open("rb") as file:
        access = FileAccess(file.fileno())
        assert read_exactly(access, 10, 20, "old file") == OLD[10:30]
        path.write_bytes(OLD[:100])
        with pytest.raises(Malformed, match="old file: expected 20 bytes at 90, found 10"):
            read_exactly(access, 90, 20, "old file")


MEASURED = """
import resource, sys
import bz2, numpy
from model_delta.patch import bspatch
from model_delta.patch.access import FileAccess
numpy.add(numpy.zeros(100_000, numpy.uint8), 1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
old, patch, new = (open(path, mode) for path, mode in zip(sys.argv[1:4], ("rb", "rb", "wb")))
bspatch.apply_stream(FileAccess(old.fileno()), FileAccess(patch.fileno()), new, 1 << 40)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(grown // 1024 if sys.platform == "darwin" else grown)  # bytes there, KiB elsewhere
"""


@pytest.mark.slow
@pytest.mark.parametrize("megabytes", [23, 90])
def test_memory_does_not_grow_with_the_model(tmp_path: Path, megabytes: int) -> None:
    rng = np.random.default_rng(1)
    old = np.resize(rng.integers(0, 255, 1_000_000, np.uint8), megabytes * 1_000_000)
    size = len(old)
    places = rng.integers(0, size, size // 200)
    difference = np.zeros(size, np.uint8)
    difference[places] = 1
    packed, control = (bz2.compress(data, 1) for data in (difference.tobytes(), struct.pack("<QQQ", size, 0, 0)))
    header = b"BSDIFF40" + struct.pack("<QQQ", len(control), len(packed), size)
    (tmp_path / "patch").write_bytes(header + control + packed + bz2.compress(b"", 1))
    (tmp_path / "old").write_bytes(old.tobytes())
    paths = [str(tmp_path / name) for name in ("old", "patch", "new")]
    ran = subprocess.run([sys.executable, "-c", MEASURED, *paths], capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 4 * 1024
    assert (tmp_path / "new").read_bytes() == (old + difference).tobytes()
