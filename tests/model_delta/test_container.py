"""One door for all patch formats: whoever makes, applies or looks into a patch."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_delta.digest import digest_of
from model_delta.errors import Malformed
from model_delta.patch.access import BytesAccess
from model_delta.patch.container import FORMATS, apply, apply_bytes, inspect, make
from model_delta.segments import stored_tensors
from tests.model_delta.models import layers, model, nudged


@pytest.mark.parametrize("format_name", FORMATS)
@given(old=st.binary(max_size=300), new=st.binary(max_size=300))
def test_what_one_format_makes_the_door_applies(format_name: str, old: bytes, new: bytes) -> None:
    patch = make(format_name, old, new)
    assert apply_bytes(old, patch, len(new)) == new
    output = io.BytesIO()
    assert apply(BytesAccess(old), BytesAccess(patch), output, len(new)) == len(new)
    info = inspect(BytesAccess(patch))
    assert (info.format, info.new_size) == (format_name, len(new))


RESUMED_OLD = model(layers(1, (6, 96, 64, 1)))
RESUMED_NEW = model(nudged(layers(1, (6, 96, 64, 1)), 2, 1e-4))
RESUMED = {name: make(name, RESUMED_OLD, RESUMED_NEW) for name in FORMATS}


class _PowerCut(Exception):
    """The machine went off."""


class _Cut(io.BytesIO):
    """An output on a machine that goes off after so many bytes."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self._left = left

    def write(self, data: Any, /) -> int:
        written = super().write(memoryview(data)[: self._left])
        self._left -= written
        if self._left == 0:
            raise _PowerCut
        return written


@pytest.mark.parametrize("format_name", FORMATS)
@given(cuts=st.lists(st.integers(1, len(RESUMED_NEW) - 1), max_size=4))
def test_an_applier_that_dies_anywhere_and_often_is_taken_up_by_the_next(format_name: str, cuts: list[int]) -> None:
    old, patch = BytesAccess(RESUMED_OLD), BytesAccess(RESUMED[format_name])
    durable = b""
    for cut in sorted(cuts):
        output = _Cut(cut - len(durable)) if cut > len(durable) else None
        if output is not None:
            io.BytesIO.write(output, durable)
            output.seek(0)
            with pytest.raises(_PowerCut):
                apply(old, patch, output, len(RESUMED_NEW), done=len(durable))
            durable = output.getvalue()
            assert durable == RESUMED_NEW[:cut]
    last = io.BytesIO(durable)
    assert apply(old, patch, last, len(RESUMED_NEW), done=len(durable)) == len(RESUMED_NEW)
    assert last.getvalue() == RESUMED_NEW


def test_what_a_bsdiff40_patch_says_about_itself() -> None:
    weights = layers(1, (6, 96, 64, 1))
    old, new = model(weights), model(nudged(weights, 2, 1e-4))
    patch = make("bsdiff40", old, new)
    info = inspect(BytesAccess(patch))
    assert (info.old_size, info.old_digest, info.new_digest, info.changed) == (None, None, None, None)
    assert info.window == 100_000
    assert [stream.name for stream in info.streams] == ["control", "difference", "extra"]
    assert sum(stream.packed for stream in info.streams) == len(patch) - 32
    assert (info.streams[1].unpacked or 0) + (info.streams[2].unpacked or 0) == len(new)


def test_what_a_tp1_patch_says_about_itself() -> None:
    weights = layers(1, (6, 96, 64, 1))
    old, new = model(weights), model([*weights[:-1], *nudged(weights[-1:], 2, 1e-4)])
    patch = make("tp1", old, new)
    info = inspect(BytesAccess(patch))
    assert (info.old_size, info.new_size, info.window, info.changed) == (len(old), len(new), 1 << 18, None)
    assert (info.old_digest, info.new_digest) == (digest_of(old), digest_of(new))
    assert sum(stream.packed for stream in info.streams) < len(patch)
    changed = inspect(BytesAccess(patch), old).changed
    assert changed is not None
    assert 0 < len(changed) < len(stored_tensors(old))


@pytest.mark.parametrize("data", [b"", b"BSDIFF4", b"PK\x03\x04" + bytes(100)])
def test_what_is_no_patch_is_refused_by_both_doors(data: bytes) -> None:
    with pytest.raises(Malformed, match=rf"patch: expected one of bsdiff40.*{len(data)} bytes"):
        inspect(BytesAccess(data))
    with pytest.raises(Malformed, match="patch: expected one of bsdiff40"):
        apply_bytes(b"old", data, 100)


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(Malformed, match=r"expected one of bsdiff40.*found 'xdelta'"):
        make("xdelta", b"", b"")
