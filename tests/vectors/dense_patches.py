"""Dense patches (tp1) from one old file, good and bad, each bad one with one thing wrong."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import brotli
import numpy as np

from model_delta.patch import tp1
from model_delta.patch.bsdiff import make_patch
from model_delta.patch.coding import squeezed_whole, varint, write_planes, write_steps
from model_delta.patch.dense import make_dense
from model_delta.patch.tp1 import Body, Coded, Drafted, Header, Kind, Operation


def dense_patches(old: bytes, new: bytes) -> Iterator[tuple[str, bytes]]:
    """Names and bytes; `new` is another version of the model `old`."""
    good = make_dense(old, new)
    same = bytes([Kind.SAME]) + varint(len(old))
    yield "tp1.patch", good
    yield "tp1_of_every_operation.patch", _every_operation(old)
    yield "tp1_with_a_bsdiff40_body.patch", _patch(old, new, make_patch(old, new), Body.BSDIFF40)
    yield "tp1_with_a_brotli_body.patch", _patch(old, new, squeezed_whole(new, 18), Body.BROTLI)
    yield "tp1_cut_off.patch", good[:-1]
    yield "tp1_with_a_byte_behind_it.patch", good + b"x"
    yield "tp1_for_another_old_file.patch", make_dense(old[:-1] + b"?", new)
    yield "tp1_for_a_shorter_old_file.patch", make_dense(old[:-1], new)
    yield "tp1_of_another_new_file.patch", _patch(old, new, _segment(len(old), {0: same}))
    yield "tp1_of_two_gib.patch", _patch(old, new, _segment(1 << 31, {0: same}), new_size=1 << 31)
    yield "tp1_with_a_window_too_large.patch", good[:5] + bytes([19]) + good[6:]
    wide = brotli.compress(bytes(5_000), quality=5, lgwin=18)
    control = b"\x82" + varint(5_000)
    streams = {0: (len(control), control), 6: (5_000, wide)}
    yield (
        "tp1_with_a_stream_of_a_larger_window.patch",
        _patch(old, bytes(5_000), _coded_segment(5_000, streams), window_bits=17),
    )
    streams[6] = (5_001, wide)
    yield "tp1_with_a_stream_of_less.patch", _patch(old, bytes(5_000), _coded_segment(5_000, streams))
    yield "tp1_with_a_body_of_the_future.patch", good[:4] + b"\x03" + good[5:]
    yield "tp1_reading_past_the_old_file.patch", _patch(old, old, _segment(len(old), {0: same}, old_start=1))
    yield "tp1_reading_before_the_old_file.patch", _patch(old, old, _segment(len(old), {0: b"\x40\x01" + same[1:]}))
    yield "tp1_with_an_operation_too_long.patch", _patch(old, old[:-1], _segment(len(old) - 1, {0: same}))
    yield "tp1_with_an_unknown_operation.patch", _patch(old, old, _segment(len(old), {0: b"\x07" + same[1:]}))
    yield "tp1_with_an_operation_left_over.patch", _patch(old, old, _segment(len(old), {0: same + same}))
    steps = bytes([Kind.STEPS]) + varint(len(old))
    yield (
        "tp1_with_a_mark_outside.patch",
        _patch(old, old, _segment(len(old), {0: steps + b"\x01\x10\x00", 1: b"\x01", 2: b"\xff\xff", 3: b"\x00"})),
    )
    yield (
        "tp1_with_too_few_marks.patch",
        _patch(old, old, _segment(len(old), {0: steps + b"\x02\x00\x00", 1: b"\x01", 3: b"\x00"})),
    )
    yield (
        "tp1_with_a_segment_too_large.patch",
        _patch(old, old, varint(len(old)) + b"\x00\x01" + varint(tp1.SEGMENT_BYTES_MAX + 1) + b"\x05hello"),
    )


def _patch(
    old: bytes, new: bytes, body: bytes, kind: Body = Body.SEGMENTS, window_bits: int = 18, new_size: int | None = None
) -> bytes:
    digests = hashlib.sha256(old).digest(), hashlib.sha256(new).digest()
    size = len(new) if new_size is None else new_size
    return tp1.pack_header(Header(kind, window_bits, len(old), size, *digests)) + body


def _segment(size: int, streams: dict[int, bytes], old_start: int = 0) -> bytes:
    return _coded_segment(size, {index: (len(data), data) for index, data in streams.items()}, old_start)


def _coded_segment(size: int, streams: dict[int, tuple[int, bytes]], old_start: int = 0) -> bytes:
    """A segment of streams given as (plain size, coded bytes)."""
    numbers = [size, old_start, sum(1 << index for index in streams)]
    for plain, data in streams.values():
        numbers += [plain, len(data)]
    return b"".join(map(varint, numbers)) + b"".join(data for _, data in streams.values())


def _every_operation(old: bytes) -> bytes:
    """Two segments with each kind of operation, both ways of numbers, and moves in the old file."""
    rng = np.random.default_rng(2)
    before = np.frombuffer(old, np.uint8)
    draft, new, segments = Drafted(0), bytearray(), []

    def add(coded: Coded, made: bytes) -> None:
        draft.add(coded)
        new.extend(made)

    add(Coded(Operation(Kind.SAME, False, 100, 50)), old[100:150])
    places = np.flatnonzero(rng.random(400) < 0.2)
    steps = rng.integers(1, 256, len(places)).astype(np.uint8)
    parts = write_steps(places, steps, 400)
    stepped = before[:400].copy()
    stepped[places] += steps
    streams = {tp1.UNARY: parts.unary, tp1.LOW: parts.low, tp1.SIGNS: parts.signs, tp1.REST: parts.rest}
    add(Coded(Operation(Kind.STEPS, False, 0, 400), parts.control, streams), stepped.tobytes())
    difference = rng.integers(0, 9, 100).astype(np.uint8)
    added = (before[500:600] + difference).tobytes()
    add(Coded(Operation(Kind.BYTES, False, 500, 100), (), {tp1.DIFFERENCE: difference.tobytes()}), added)
    add(Coded(Operation(Kind.BYTES, True, 0, 5), (), {tp1.LITERAL: b"fresh"}), b"fresh")
    segments.append(draft.packed(18))
    draft = Drafted(7)
    for kind, width in tp1.WIDTHS.items():
        for fresh in (False, True):
            for step in (3, 100, 0x1234 if width == 2 else 0x123456):
                numbers = before[200:280].view(f"<u{width}") + rng.integers(0, step, 80 // width).astype(f"<u{width}")
                after = numbers.view(np.uint8)
                base = np.zeros_like(after) if fresh else before[200:280]
                planes = write_planes(base, after, width, floats=kind in tp1.FLOATS)
                control = (2 * planes.divisor + bool(planes.nibbles),)
                numbered = {tp1.NIBBLES: planes.nibbles, **dict(enumerate(planes.octets, tp1.PLANES))}
                add(Coded(Operation(kind, fresh, 0 if fresh else 200, 80), control, numbered), after.tobytes())
    numbers = np.arange(21, dtype="<u4") * 5000  # an odd number of nibbles
    folded = 2 * numbers
    low = np.append(folded & 15, 0).astype(np.uint8)
    octets = (folded >> 4).astype("<u4").view(np.uint8).reshape(-1, 4)
    cut = {
        tp1.NIBBLES: (low[::2] | low[1::2] << 4).tobytes(),
        **{tp1.PLANES + i: octets[:, i].tobytes() for i in range(4)},
    }
    add(Coded(Operation(Kind.INT32, True, 0, 84), (3,), cut), numbers.tobytes())
    segments.append(draft.packed(18))
    return _patch(old, bytes(new), b"".join(segments))
