"""One canonical byte form for every record that is signed, hashed or sent.

The form is CBOR (RFC 8949) in its deterministic encoding (section 4.2): shortest integers and floats, definite
lengths, sorted map keys. `unpack` refuses bytes that are not what `pack` would have written, so that one value has
exactly one form and a digest names a value.

Records are frozen `msgspec.Struct`s. Compatibility promise: a field may be added if it has a default; fields are never
renamed or re-typed; a reader ignores map keys that it does not know.
"""

from __future__ import annotations

from typing import Any, TypeVar

import cbor2
import msgspec

from model_delta.errors import Malformed

T = TypeVar("T")


def pack(value: Any) -> bytes:
    """Encode a record, or plain lists / dicts / str / bytes / int / float / bool / None, deterministically."""
    return cbor2.dumps(msgspec.to_builtins(value, builtin_types=(bytes,)), canonical=True)


def unpack(data: bytes, kind: type[T]) -> T:
    """Decode `data` as a `kind`. Raises Malformed for bad CBOR, a non-canonical form, or a field of the wrong type."""
    plain = unpack_plain(data)
    try:
        return msgspec.convert(plain, type=kind, builtin_types=(bytes,))
    except (msgspec.ValidationError, TypeError, ValueError) as error:
        raise Malformed(f"{kind.__name__}: {error}") from None


def unpack_plain(data: bytes) -> Any:
    """Decode `data` to plain Python values under the same canonical-form rule. Raises Malformed."""
    try:
        plain = cbor2.loads(data)
        canonical = cbor2.dumps(plain, canonical=True)
    except Exception as error:  # cbor2 raises several unrelated kinds on hostile input
        raise Malformed(f"CBOR: {type(error).__name__}: {error}") from None
    if canonical != data:
        raise Malformed("CBOR: not in deterministic form (RFC 8949 section 4.2), or bytes follow the value")
    return plain
