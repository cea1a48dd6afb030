"""BSDIFF40 as written here: what two stock programs apply, and never larger than what they write."""

from __future__ import annotations

import bz2
import os
import shutil
import subprocess
import time
from pathlib import Path

import bsdiff4
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_delta.graphs.int8 import quantize_weights
from model_delta.patch.bsdiff import make_patch
from model_delta.patch.container import apply_bytes
from tests.model_delta.models import layers, model, nudged

OLD, NEW = bytes(range(256)) * 8, bytes(range(255, -1, -1)) + bytes(range(256)) * 9
FORMAT_BYTES = 105
"""What the format itself costs beside one packed stream."""
WORDS = [bytes([65 + i] * (i % 5 + 2)) + b" " for i in range(40)]


def text(seed: int, count: int) -> bytes:
    return b"".join(WORDS[i] for i in np.random.default_rng(seed).integers(0, len(WORDS), count))


@given(st.binary(max_size=400), st.binary(max_size=400))
def test_a_patch_gives_the_new_file_both_ways(first: bytes, second: bytes) -> None:
    for old, new in ((first, second), (second, first)):
        patch = make_patch(old, new)
        assert apply_bytes(old, patch, len(new)) == new == bsdiff4.patch(old, patch)


@given(st.binary(min_size=1, max_size=2000), st.data())
def test_a_patch_of_an_edited_file_gives_the_edited_file_both_ways(first: bytes, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(first)))
    end = data.draw(st.integers(start, len(first)))
    second = first[:start] + data.draw(st.binary(max_size=50)) + first[end:] + first[: data.draw(st.integers(0, 100))]
    for old, new in ((first, second), (second, first)):
        patch = make_patch(old, new)
        assert apply_bytes(old, patch, len(new)) == new == bsdiff4.patch(old, patch)


MOVED_OLD = np.random.default_rng(1).integers(-120, 120, 44_000).astype(np.int8)
MOVED_NEW = MOVED_OLD + np.random.default_rng(2).integers(-2, 3, 44_000).astype(np.int8)


def test_weights_that_nearly_all_moved_by_a_step_still_make_a_small_patch() -> None:
    old, new = MOVED_OLD.tobytes(), MOVED_NEW.tobytes()
    patch = make_patch(old, new)
    assert len(bsdiff4.diff(old, new)) > 0.9 * len(new)  # what bsdiff's own search makes of it
    assert len(patch) < 0.4 * len(new)
    assert bsdiff4.patch(old, patch) == new == apply_bytes(old, patch, len(new))


def round_of_int8(sizes: tuple[int, ...] = (6, 256, 128, 1)) -> tuple[bytes, bytes]:
    weights = layers(1, sizes)
    old = quantize_weights(model(weights))
    return old, quantize_weights(model(nudged(weights, 2, 1e-4)), old)


def test_a_small_round_makes_a_small_patch() -> None:
    old, new = round_of_int8()
    patch = make_patch(old, new)
    assert apply_bytes(old, patch, len(new)) == new
    assert len(patch) < len(bz2.compress(new)) / 4


def test_a_larger_model_that_aligns_is_not_searched() -> None:
    old, new = round_of_int8((6, 800, 800, 800, 1))
    started = time.process_time()
    patch = make_patch(old, new)
    aligned_s = time.process_time() - started
    started = time.process_time()
    searched = bsdiff4.diff(old, new)
    assert aligned_s < 0.5 * (time.process_time() - started)
    assert len(patch) < 1.05 * len(searched)
    assert apply_bytes(old, patch, len(new)) == new
    assert patch[32:35] == b"BZh"
    assert patch[35:36] == b"1"  # blocks of 100 KB


def pairs() -> list[tuple[str, bytes, bytes]]:
    """Files that do not align."""
    rng = np.random.default_rng(5)
    noise = rng.bytes(60_000)
    weights = layers(1, (6, 96, 96, 96, 1))
    prose = text(1, 30_000)
    return [
        ("another model", model(weights), model(layers(2, (6, 96, 96, 96, 1)))),
        ("a layer more", model(weights), model([*weights[:2], layers(9, (96, 96))[0], *weights[2:]])),
        ("tensors swapped", model(weights), model([weights[0], weights[2], weights[1], weights[3]])),
        ("arbitrary bytes", noise, rng.bytes(50_000)),
        ("a byte before everything", noise, b"x" + noise[:-1]),
        ("halves exchanged", noise, noise[30_000:] + noise[:30_000]),
        ("text with long repetitions", text(3, 50_000), prose + prose),
        ("from nothing", b"", prose),
        ("to nothing", prose, b""),
        (
            "zeros that moved",
            bytes(40_000) + noise[:1000] + bytes(30_000),
            bytes(47_000) + noise[:1000] + bytes(23_000),
        ),
    ]


@pytest.mark.parametrize(("old", "new"), [(old, new) for _, old, new in pairs()], ids=[name for name, _, _ in pairs()])
def test_what_does_not_align_costs_no_more_than_bsdiff_or_the_packed_file(old: bytes, new: bytes) -> None:
    patch = make_patch(old, new)
    assert bsdiff4.patch(old, patch) == new == apply_bytes(old, patch, len(new))
    assert len(patch) <= 1.02 * len(bsdiff4.diff(old, new))
    assert len(patch) <= 1.02 * len(bz2.compress(new)) + FORMAT_BYTES


def larger_pair(change: str) -> tuple[bytes, bytes]:
    """Files above the size up to which everything is searched, of which names alone cannot tell what moved."""
    weights = layers(1, (6, 512, 512, 512, 1))
    if change == "smooth rows moved":  # in every place the difference looks good
        first, (_, bias), last = layers(1, (6, 400, 400, 1))
        waves = np.sin(np.arange(400 * 400, dtype=np.float32) / 700).reshape(400, 400)
        return model([first, (waves, bias), last]), model([first, (np.roll(waves, 5), bias), last])
    old = quantize_weights(model(weights))
    if change == "a layer inserted":
        return old, quantize_weights(model([*weights[:2], layers(9, (512, 512))[0], *weights[2:]]), old)
    if change == "rows moved":
        moved = [(np.roll(weight, 1, 0) if len(weight) == 512 else weight, bias) for weight, bias in weights]
        return old, quantize_weights(model(moved), old)
    if change == "layers exchanged":
        return old, quantize_weights(model([weights[0], weights[2], weights[1], weights[3]]))
    return old, quantize_weights(model(layers(3, (6, 512, 512, 512, 1))))


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", ["a layer inserted", "rows moved", "smooth rows moved", "layers exchanged", "another model"]
)
def test_larger_files_that_do_not_align_cost_no_more_than_bsdiff_or_the_packed_file(change: str) -> None:
    old, new = larger_pair(change)
    assert len(old) > 512 * 1024
    patch = make_patch(old, new)
    assert bsdiff4.patch(old, patch) == new == apply_bytes(old, patch, len(new))
    assert len(patch) <= 1.02 * len(bsdiff4.diff(old, new)) + FORMAT_BYTES
    assert len(patch) <= 1.02 * len(bz2.compress(new)) + FORMAT_BYTES


def test_a_file_above_the_search_limit_costs_at_most_the_packed_file() -> None:
    old, new = np.random.default_rng(5).bytes(60_000), text(1, 10_000)
    patch = make_patch(old, new, search_bytes_max=1000)
    assert apply_bytes(old, patch, len(new)) == new
    assert len(patch) <= 1.02 * len(bz2.compress(new)) + FORMAT_BYTES


BSPATCH = pytest.mark.skipif(
    shutil.which("bspatch") is None and not os.environ.get("ATOLL_REQUIRE_SERVERS"), reason="needs Debian's bsdiff"
)


def stock(folder: Path, old: bytes, patch: bytes) -> bytes:
    (folder / "old").write_bytes(old)
    (folder / "patch").write_bytes(patch)
    subprocess.run(["bspatch", folder / "old", folder / "new", folder / "patch"], check=True)
    return (folder / "new").read_bytes()


@BSPATCH
@pytest.mark.parametrize(
    ("old", "new"), [(OLD, NEW), (MOVED_OLD.tobytes(), MOVED_NEW.tobytes()), *(pair[1:] for pair in pairs())]
)
def test_stock_bspatch_applies_it(tmp_path: Path, old: bytes, new: bytes) -> None:
    assert stock(tmp_path, old, make_patch(old, new)) == new


@BSPATCH
@pytest.mark.slow
@settings(max_examples=60)
@given(st.binary(max_size=300), st.binary(max_size=300), st.binary(max_size=300))
def test_stock_bspatch_applies_patches_of_any_files(
    tmp_path_factory: pytest.TempPathFactory, first: bytes, second: bytes, third: bytes
) -> None:
    old, new = first + second + third, first + third + second
    assert stock(tmp_path_factory.mktemp("stock"), old, make_patch(old, new)) == new
