"""Hostile bytes at the one decoder: refused before anything is built from them, and in bounded time."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_delta.encoding import DEPTH_MAX, pack, pack_octets, unpack_plain
from model_delta.errors import Malformed

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**64), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(max_size=300),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(VALUES)
def test_what_is_packed_is_unpacked(value: object) -> None:
    assert unpack_plain(pack(value)) == value


@given(st.dictionaries(st.text(max_size=30), st.binary(max_size=300), max_size=30))
def test_a_record_of_byte_strings_has_one_form_however_it_is_packed(fields: dict[str, bytes]) -> None:
    assert pack_octets(fields) == pack(fields)


@pytest.mark.parametrize("size", [23, 24, 255, 256, 65_535, 65_536, 70_000])
def test_a_long_byte_string_is_packed_as_any_other(size: int) -> None:
    fields = {"masked": bytes(size), "k" * 30: b""}
    assert pack_octets({name: memoryview(value) for name, value in fields.items()}) == pack(fields)


def _string_references(size: int, times: int) -> bytes:
    """An array whose every element stands for the one long string: small on the line, size x times written out."""
    first = b"\x5a" + struct.pack(">I", size) + b"a" * size
    return b"\xd9\x01\x00\x9a" + struct.pack(">I", times) + first + b"\xd8\x19\x00" * (times - 1)


def _shared_values(levels: int) -> bytes:
    """Arrays of twice the array before: 2 to the power of `levels` items."""
    data = b"\xd8\x1c\x80"
    for level in range(levels):
        data = b"\xd8\x1c\x82" + data + b"\xd8\x1d" + bytes([level])
    return data


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(_string_references(100_000, 200_000), id="string references"),
        pytest.param(_shared_values(20), id="shared values"),
        pytest.param(b"\xd8\x23\x61a", id="a regular expression"),
        pytest.param(b"\xc2\x49\x01" + bytes(8), id="an integer of more than 64 bits"),
        pytest.param(b"\x81" * (DEPTH_MAX + 1) + b"\x00", id="too deep"),
        pytest.param(b"\x81" * 900_000, id="much too deep"),
        pytest.param(b"\x9b" + struct.pack(">Q", 2**40) + b"\x00", id="a longer list than there are bytes"),
        pytest.param(b"\x5b" + struct.pack(">Q", 2**40) + b"\x00", id="a longer string than there are bytes"),
        pytest.param(b"\x9f\x00\xff", id="indefinite length"),
        pytest.param(b"\xf7", id="undefined"),
        pytest.param(b"\xe0", id="a simple value of no meaning"),
        pytest.param(b"\x1c", id="reserved head"),
        pytest.param(b"\x19\x01", id="a cut-off head"),
        pytest.param(b"\x00\x00", id="bytes after the value"),
        pytest.param(b"", id="nothing"),
    ],
)
def test_bombs_and_broken_heads_are_refused(data: bytes) -> None:
    with pytest.raises(Malformed, match="CBOR"):
        unpack_plain(data)


@given(st.binary(max_size=200))
def test_any_bytes_decode_or_are_malformed(data: bytes) -> None:
    try:
        value = unpack_plain(data)
    except Malformed:
        return
    assert pack(value) == data


@pytest.mark.parametrize("text", ["c249010000000000000000", "c01a514b67b0", "d90102820102", "81d81e820103"])
def test_tags_are_refused_before_anything_is_made_of_them(text: str) -> None:
    with pytest.raises(Malformed, match="expected no tag, found tag"):
        unpack_plain(bytes.fromhex(text))
