"""Check-ins and their answers, good and bad, for `write.py`."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from model_delta.encoding import pack
from model_delta.trust.checkin import DEFLATED, PLAIN, TIMESTAMP_BYTES_MAX, CheckIn, CheckInAnswer

TIMESTAMP = b'{"signatures": [], "signed": {"_type": "timestamp", "version": 41}}'


def check_ins() -> Iterator[tuple[str, bytes]]:
    """Each file's name and bytes."""
    yield "check_in.cbor", pack(CheckIn(7, 2, 40))
    yield "check_in_as_a_map.cbor", pack({"request": 7, "root": 2, "timestamp": 40})
    yield "check_in_answer.cbor", pack(CheckInAnswer(7, 3, DEFLATED, zlib.compress(TIMESTAMP, 9)))
    yield "check_in_answer_plain.cbor", pack(CheckInAnswer(7, 3, PLAIN, TIMESTAMP))
    yield "check_in_answer_of_nothing_new.cbor", pack(CheckInAnswer(7, 2))
    yield "check_in_answer_of_an_unknown_form.cbor", pack(CheckInAnswer(7, 3, 9, TIMESTAMP))
    yield "check_in_answer_that_does_not_inflate.cbor", pack(CheckInAnswer(7, 3, DEFLATED, TIMESTAMP))
    endless = zlib.compress(bytes(TIMESTAMP_BYTES_MAX + 1), 9)
    yield "check_in_answer_that_inflates_too_far.cbor", pack(CheckInAnswer(7, 3, DEFLATED, endless))
