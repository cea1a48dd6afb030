"""The idle check-in: one small question, one small answer, and the device knows whether anything is new.

A TUF client asks for the next root, hears that there is none, and fetches the timestamp: two exchanges for nothing new.
Here both go into one. The device says which root and which timestamp it holds; the mirror answers with the number of
its newest root and, if it has another timestamp, the timestamp itself, deflated (RFC 1950) where that is shorter. The
answer is no more than a hint from a stranger: the timestamp is verified like any other, and a mirror that conceals a
root or a timestamp does what it could always do by not answering, until what the device holds expires.

Records are CBOR arrays (see `encoding`), because every byte of them is sent by every device several times a day:
`[request, root, timestamp]` and `[request, root, form, bytes]`, form 0 as it is, 1 deflated.
"""

from __future__ import annotations

import json
import re
import zlib
from typing import Any

import msgspec

from model_delta.encoding import pack, unpack
from model_delta.errors import Malformed, NotFound, TooLarge
from model_delta.store import ArtifactStore

PLAIN, DEFLATED = 0, 1
TIMESTAMP_BYTES_MAX = 16_384
CHECK_IN_BYTES_MAX = 64
_ROOT = re.compile(r"(\d{1,9})\.root\.json")


class CheckIn(msgspec.Struct, frozen=True, array_like=True):
    """What a device holds: versions of root and timestamp (0: none). `request` comes back with the answer."""

    request: int
    root: int
    timestamp: int


class CheckInAnswer(msgspec.Struct, frozen=True, array_like=True):
    """What a mirror has: its newest root's version, and its timestamp unless it is the one the device holds."""

    request: int
    root: int
    form: int = PLAIN
    timestamp: bytes = b""


def answer_check_in(question: bytes, store: ArtifactStore, kind: str) -> bytes:
    """The mirror's answer out of what lies in its store under `kind`. Raises Malformed, and NotFound when it has no
    timestamp."""
    asked = unpack(question, CheckIn)
    timestamp = store.get(kind, "timestamp.json")
    newest = newest_root(store, kind)
    if _version(timestamp) == asked.timestamp:
        return pack(CheckInAnswer(asked.request, newest))
    short = zlib.compress(timestamp, 9)
    form, data = (DEFLATED, short) if len(short) < len(timestamp) else (PLAIN, timestamp)
    return pack(CheckInAnswer(asked.request, newest, form, data))


def newest_root(store: ArtifactStore, kind: str) -> int:
    """The highest version of a root in the store, 0 when it has none."""
    return max((int(match[1]) for match in map(_ROOT.fullmatch, store.names(kind)) if match), default=0)


def read_answer(data: bytes) -> tuple[CheckInAnswer, bytes | None]:
    """The answer and the timestamp's bytes, None when the mirror has no other than the device's.

    Nothing grows beyond TIMESTAMP_BYTES_MAX, whatever the answer claims. Raises Malformed and TooLarge.
    """
    answer = unpack(data, CheckInAnswer)
    if not answer.timestamp:
        return answer, None
    if answer.form == PLAIN:
        timestamp = answer.timestamp
    elif answer.form == DEFLATED:
        reader = zlib.decompressobj()
        try:
            timestamp = reader.decompress(answer.timestamp, TIMESTAMP_BYTES_MAX + 1)
        except zlib.error as error:
            raise Malformed(f"check-in: timestamp does not inflate ({error})") from None
    else:
        raise Malformed(f"check-in: expected form {PLAIN} or {DEFLATED}, found {answer.form}")
    if len(timestamp) > TIMESTAMP_BYTES_MAX:
        raise TooLarge(f"check-in: expected a timestamp of at most {TIMESTAMP_BYTES_MAX} bytes, found more")
    return answer, timestamp


def _version(timestamp: bytes) -> int:
    """The version a timestamp claims, only to tell whether the device has the same."""
    try:
        found: Any = json.loads(timestamp)["signed"]["version"]
        return int(found)
    except (ValueError, KeyError, TypeError):
        raise NotFound("check-in: the mirror's timestamp cannot be read; it will fetch another") from None
