"""One door for all patch formats: whoever makes, applies or looks into a patch."""

from __future__ import annotations

import io

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
