"""One canonical byte form for every record that is signed, hashed or sent.

The form is CBOR (RFC 8949) in its deterministic encoding (section 4.2): shortest integers and floats, definite
lengths, sorted map keys. `unpack` refuses bytes that are not what `pack` would have written, so that one value has
exactly one form and a digest names a value.

Bytes may come from anybody. Before anything is built from them a walk over the heads refuses what `pack` never writes:
tags (with shared values and string references a hundred kilobytes would become gigabytes), indefinite lengths, more
than 64 levels, and lengths past the end. So memory stays proportional to the bytes that arrived.

Records are frozen `msgspec.Struct`s. Compatibility promise: a field may be added if it has a default; fields are never
renamed or re-typed; a reader ignores map keys that it does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import cbor2
import msgspec

from model_delta.errors import Malformed

T = TypeVar("T")
DEPTH_MAX = 64
_SIMPLE = frozenset({0xF4, 0xF5, 0xF6, 0xF9, 0xFA, 0xFB})
"""Heads of major type 7 that `pack` writes: false, true, null, and floats of 16, 32 and 64 bits."""


def pack(value: Any) -> bytes:
    """Encode a record, or plain lists / dicts / str / bytes / int / float / bool / None, deterministically."""
    return cbor2.dumps(msgspec.to_builtins(value, builtin_types=(bytes,)), canonical=True)


def pack_octets(fields: Mapping[str, bytes | memoryview]) -> bytes:
    """The same bytes as `pack` of a record whose fields are all byte strings, each of them copied once and no more.

    Heads as in RFC 8949 section 3; keys in the order of section 4.2.3 (by length, then by bytes), as cbor2 writes them.
    """
    parts: list[bytes | memoryview] = [_head(5, len(fields))]
    for name in sorted((name.encode() for name in fields), key=lambda key: (len(key), key)):
        value = fields[name.decode()]
        parts += [_head(3, len(name)), name, _head(2, len(value)), value]
    return b"".join(parts)


def unpack(data: bytes, kind: type[T]) -> T:
    """Decode `data` as a `kind`. Raises Malformed for bad CBOR, a non-canonical form, or a field of the wrong type."""
    plain = unpack_plain(data)
    try:
        return msgspec.convert(plain, type=kind, builtin_types=(bytes,))
    except (msgspec.ValidationError, TypeError, ValueError) as error:
        raise Malformed(f"{kind.__name__}: {error}") from None


def unpack_plain(data: bytes) -> Any:
    """Decode `data` to plain Python values under the same canonical-form rule. Raises Malformed."""
    _require_plain(data)
    try:
        plain = cbor2.loads(data)
        canonical = cbor2.dumps(plain, canonical=True)
    except Exception as error:  # cbor2 raises several unrelated kinds on hostile input
        raise Malformed(f"CBOR: {type(error).__name__}: {error}") from None
    if canonical != data:
        raise Malformed("CBOR: not in deterministic form (RFC 8949 section 4.2), or bytes follow the value")
    return plain


def _head(major: int, argument: int) -> bytes:
    for width, code in ((1, 24), (2, 25), (4, 26), (8, 27)):
        if argument < 24:
            return bytes([major << 5 | argument])
        if argument < 1 << (8 * width):
            return bytes([major << 5 | code]) + argument.to_bytes(width, "big")
    raise Malformed(f"CBOR: expected a length below 2^64, found {argument}")


def _require_plain(data: bytes) -> None:
    """Raise Malformed unless `data` is one CBOR item of definite lengths without tags, at most DEPTH_MAX levels deep.

    Heads as in RFC 8949 section 3: three bits of major type, five of argument or of the argument's width.
    """
    at, end, left = 0, len(data), 1
    outer: list[int] = []
    while True:
        while left == 0:
            if not outer:
                if at != end:
                    raise Malformed(f"CBOR: expected {at} bytes, found {end - at} more after the value")
                return
            left = outer.pop()
        left -= 1
        if at >= end:
            raise Malformed(f"CBOR: expected another item at byte {at}, found the end")
        head = data[at]
        major, argument = head >> 5, head & 31
        at += 1
        if argument > 23:
            width = 1 << (argument - 24)
            if argument > 27 or at + width > end:
                raise Malformed(f"CBOR: expected a definite length at byte {at - 1}, found {head:#04x}")
            argument = int.from_bytes(data[at : at + width], "big")
            at += width
        if major < 2 or head in _SIMPLE:
            continue
        if major == 7:
            raise Malformed(f"CBOR: expected true, false, null or a number, found {head:#04x} before byte {at}")
        if major == 6:
            raise Malformed(f"CBOR: expected no tag, found tag {argument} before byte {at}")
        if argument > end - at:
            raise Malformed(f"CBOR: expected a length within {end - at} bytes, found {argument} before byte {at}")
        if major in (2, 3):
            at += argument
            continue
        if len(outer) >= DEPTH_MAX:
            raise Malformed(f"CBOR: expected at most {DEPTH_MAX} levels, found more at byte {at}")
        outer.append(left)
        left = argument if major == 4 else 2 * argument
