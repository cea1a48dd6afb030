"""Patches: real BSDIFF40, and nothing that a hostile one can do but be refused."""

from __future__ import annotations

import bz2
import contextlib
import os
import shutil
import struct
import subprocess
import tracemalloc
from pathlib import Path

import bsdiff4
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_delta import graphs
from model_delta.errors import Malformed
from model_delta.patch.bsdiff import apply_patch, make_patch
from tests.model_delta.models import layers, model, nudged

OLD, NEW = bytes(range(256)) * 8, bytes(range(255, -1, -1)) + bytes(range(256)) * 9


def patch_of(
    triples: list[tuple[int, int, int]], difference: bytes, extra: bytes, size: int, magic: bytes = b"BSDIFF40"
) -> bytes:
    """A patch as bsdiff writes it: integers are sign and magnitude."""

    def number(value: int) -> bytes:
        return struct.pack("<Q", abs(value) | (1 << 63 if value < 0 else 0))

    control, packed = (bz2.compress(data) for data in (b"".join(number(n) for t in triples for n in t), difference))
    return magic + number(len(control)) + number(len(packed)) + number(size) + control + packed + bz2.compress(extra)


@given(st.binary(max_size=400), st.binary(max_size=400))
def test_a_patch_gives_the_new_file(old: bytes, new: bytes) -> None:
    assert apply_patch(old, make_patch(old, new), len(new)) == new


@given(st.binary(min_size=1, max_size=2000), st.data())
def test_a_patch_of_an_edited_file_gives_the_edited_file(old: bytes, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(old)))
    end = data.draw(st.integers(start, len(old)))
    new = old[:start] + data.draw(st.binary(max_size=50)) + old[end:] + old[: data.draw(st.integers(0, 100))]
    assert apply_patch(old, make_patch(old, new), len(new)) == new


@given(st.data())
def test_a_damaged_patch_is_malformed_or_gives_other_bytes_of_the_right_size(data: st.DataObject) -> None:
    """The caller's digest check does the rest."""
    patch = bytearray(make_patch(OLD, NEW))
    for _ in range(data.draw(st.integers(1, 3))):
        patch[data.draw(st.integers(0, len(patch) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(patch[: data.draw(st.integers(0, len(patch)))]) if data.draw(st.booleans()) else bytes(patch)
    with contextlib.suppress(Malformed):
        assert len(apply_patch(OLD, damaged, len(NEW))) <= len(NEW)


@given(st.binary(max_size=200))
def test_bytes_that_are_no_patch_are_malformed(data: bytes) -> None:
    for patch in (data, b"BSDIFF40" + data):
        with pytest.raises(Malformed, match="patch: "):
            apply_patch(OLD, patch, 1000)


def test_every_truncation_is_malformed() -> None:
    patch = make_patch(OLD, NEW)
    for length in range(len(patch)):
        with pytest.raises(Malformed):
            apply_patch(OLD, patch[:length], len(NEW))
    with pytest.raises(Malformed, match="bytes follow"):
        apply_patch(OLD, patch + b"x", len(NEW))


def test_a_patch_for_another_base_is_refused_or_differs() -> None:
    patch = make_patch(OLD, NEW)
    with pytest.raises(Malformed, match="made for another one"):
        apply_patch(OLD[:10], patch, len(NEW))


@pytest.mark.parametrize(
    ("triples", "difference", "extra", "size", "message"),
    [
        ([(4, 0, 0)], b"aaaa", b"", 10**9, "at most 100"),
        ([(4, 0, 0)], b"aaaa", b"", -1, "lengths do not fit"),
        ([(4, 0, 0)], b"aaaa", b"", 5, "do not make 5"),
        ([(4, 0, 0)], b"aaaaa", b"", 4, "unpacks to more than 4"),
        ([(-4, 8, 0)], b"", b"aaaa", 4, "outside the new file"),
        ([(4, -4, 0)], b"aaaa", b"", 4, "outside the new file"),
        ([(2**62, 2**62, 0)], b"aa", b"aa", 4, "outside the new file"),
        ([(0, 0, -5), (4, 0, 0)], b"aaaa", b"", 4, "reads outside"),
        ([(0, 0, 7), (4, 0, 0)], b"aaaa", b"", 4, "reads outside"),
        ([(0, 0, -(2**62)), (4, 0, 0)], b"aaaa", b"", 4, "moves outside"),
        ([], b"", b"", 4, "do not make 4"),
        ([(0, 0, 0)] * 6, b"", b"", 4, "unpacks to more than"),
        ([(4, 0, 0)], b"aaaa", bytes(101), 4, "unpacks to more than 4"),
    ],
)
def test_hostile_patches(
    triples: list[tuple[int, int, int]], difference: bytes, extra: bytes, size: int, message: str
) -> None:
    with pytest.raises(Malformed, match=message):
        apply_patch(b"old file", patch_of(triples, difference, extra, size), 100)


def test_the_hostile_patches_are_hostile_only_where_they_say() -> None:
    assert apply_patch(b"old file", patch_of([(4, 1, 0)], bytes(4), b"!", 5), 100) == b"old !"
    with pytest.raises(Malformed, match="BSDIFF40"):
        apply_patch(b"old file", patch_of([(4, 1, 0)], bytes(4), b"!", 5, b"BSDIFF41"), 100)


def test_a_bomb_takes_no_memory() -> None:
    bomb = patch_of([(4, 0, 0)], bytes(50_000_000), b"", 4)
    tracemalloc.start()
    try:
        with pytest.raises(Malformed, match="difference block unpacks to more than 4"):
            apply_patch(b"old file", bomb, 100)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_small_round_makes_a_small_patch() -> None:
    weights = layers(1, (6, 256, 128, 1))
    old = graphs.quantize_weights(model(weights))
    new = graphs.quantize_weights(model(nudged(weights, 2, 1e-4)), old)
    patch = make_patch(old, new)
    assert apply_patch(old, patch, len(new)) == new
    assert len(patch) < len(bz2.compress(new)) / 4


MOVED_OLD = np.random.default_rng(1).integers(-120, 120, 44_000).astype(np.int8)
MOVED_NEW = MOVED_OLD + np.random.default_rng(2).integers(-2, 3, 44_000).astype(np.int8)


def test_weights_that_nearly_all_moved_by_a_step_still_make_a_small_patch() -> None:
    old, new = MOVED_OLD.tobytes(), MOVED_NEW.tobytes()
    patch = make_patch(old, new)
    assert len(bsdiff4.diff(old, new)) > 0.9 * len(new)  # what bsdiff's own search makes of it
    assert len(patch) < 0.4 * len(new)
    assert bsdiff4.patch(old, patch) == new == apply_patch(old, patch, len(new))


@pytest.mark.skipif(
    shutil.which("bspatch") is None and not os.environ.get("ATOLL_REQUIRE_SERVERS"), reason="needs Debian's bsdiff"
)
@pytest.mark.parametrize(("old", "new"), [(OLD, NEW), (MOVED_OLD.tobytes(), MOVED_NEW.tobytes())])
def test_stock_bspatch_applies_it(tmp_path: Path, old: bytes, new: bytes) -> None:
    (tmp_path / "old").write_bytes(old)
    (tmp_path / "patch").write_bytes(make_patch(old, new))
    subprocess.run(["bspatch", tmp_path / "old", tmp_path / "new", tmp_path / "patch"], check=True)
    assert (tmp_path / "new").read_bytes() == new
