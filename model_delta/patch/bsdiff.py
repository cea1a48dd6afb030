"""Writes BSDIFF40 patches; stock `bspatch` applies what is written here. The only importer of bsdiff4.

Where two versions align by their tensors' names (see `align`), no search is needed: one control triple per run, the
bytewise difference, and the rest as extra bytes. bz2 blocks are 100 KB, so that applying takes little memory.

Only where that leaves bytes without a counterpart, saves too little, there are no tensors, or the file is small
anyway, bsdiff's own search is tried, and the new file as nothing but extra bytes; the smallest wins. So no such patch
takes more than bsdiff's or the new file packed by bz2, whichever is smaller, but for 1 % that blocks of 100 KB may cost
against those of 900 KB (where they cost more, the large ones are taken), and the format's own 105 bytes.

Patches of aligned models always have the small blocks; they cost more where float tensors stand between int8 matrices
than where like stands with like.
"""

from __future__ import annotations

import bz2
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import bsdiff4.core
import numpy as np

from model_delta.patch.align import Run, align
from model_delta.patch.bspatch import MAGIC
from model_delta.segments import stored_tensors

SEARCH_BYTES_MAX = 32 * 1024 * 1024
"""Default for the largest file, old or new, that bsdiff's search is let loose on: it takes about 17 times the old
file's size in memory, and half a second a megabyte."""

_SEARCHED_BYTES = 512 * 1024  # up to here a search is too quick to be saved
_COVERED_MIN = 0.99
_GAIN_MAX = 0.8  # of what bz2 makes of the new file alone, by samples
_PACKED_SHARE_MIN = 0.1  # no weights pack better; what does is quickly searched and full of surprises
_SAMPLES, _SAMPLE_BYTES = 8, 32_768
_PROBES, _PROBE_BYTES, _PROBE_VALUES_MIN = 8, 48, 12
_RUN_BYTES_MIN = 16  # a triple costs about as much
_PIECE_BYTES = 1024 * 1024
_LEVELS = (1, 9)  # times 100 KB a block
_LEVEL_COST_MAX = 1.01

Triple: TypeAlias = tuple[int, int, int]
Buffer: TypeAlias = bytes | memoryview


class _Gap(NamedTuple):
    """A range of the new file that is in no run."""

    new_start: int
    size: int


def make_patch(old: bytes, new: bytes, *, search_bytes_max: int = SEARCH_BYTES_MAX) -> bytes:
    """A BSDIFF40 patch that turns `old` into `new`.

    Models over 0.5 MiB that align need the two files and a few MB in memory, and little time. Others cost what bsdiff's
    search does. Files above `search_bytes_max` are not searched, so their patches may be larger than bsdiff's where the
    tensors' names do not help; they still never exceed the packed new file.
    """
    runs = _worth_a_triple(align(old, new))
    aligned = _aligned(old, new, runs, _LEVELS[0])
    if aligns_well(len(aligned), old, new, runs, search_bytes_max):
        return aligned
    candidates = [aligned, _aligned(old, new, runs, *_LEVELS), _aligned(old, new, (), *_LEVELS)]
    if max(len(old), len(new)) <= search_bytes_max:
        streams = bsdiff4.core.diff(old, new)
        candidates.append(_written(len(new), *(_packed([stream], *_LEVELS) for stream in streams)))
    return min(candidates, key=len)


def aligns_well(
    size: int, old: bytes, new: bytes, runs: Sequence[Run], search_bytes_max: int = SEARCH_BYTES_MAX
) -> bool:
    """Whether a patch of `size` bytes made of these runs, in any format, is one that no search would better."""
    searchable = max(len(old), len(new)) <= search_bytes_max
    return _is_enough(size, old, new, runs) and not (searchable and _has_moved(old, new, runs))


def _is_enough(size: int, old: bytes, new: bytes, runs: Sequence[Run]) -> bool:
    """Whether a patch of `size` bytes made of these runs is as good as any, so that no search is worth its time."""
    if max(len(old), len(new)) <= _SEARCHED_BYTES or sum(run.size for run in runs) < _COVERED_MIN * len(new):
        return False
    if not stored_tensors(new):  # without names, equal places are no evidence: everything may have moved by a byte
        return False
    step = max(len(new) // _SAMPLES, 1)
    sample = b"".join(new[start : start + _SAMPLE_BYTES] for start in range(0, len(new), step))
    packed_share = len(bz2.compress(sample)) / len(sample)
    return packed_share >= _PACKED_SHARE_MIN and size <= _GAIN_MAX * packed_share * len(new)


def _has_moved(old: bytes, new: bytes, runs: Sequence[Run]) -> bool:
    """Whether bytes that differ in their place stand unchanged in another: then bsdiff's search finds what names
    cannot tell (the rows of a smooth table, all moved by one). A few probes, each a look through the old file."""
    step = max(len(new) // _PROBES, 1)
    for place in range(step // 2, len(new), step):
        run = next((run for run in runs if run.new_start <= place < run.new_start + run.size), None)
        if run is None:
            continue
        size = min(_SAMPLE_BYTES, run.new_start + run.size - place)
        after = np.frombuffer(new, np.uint8, size, place)
        changed = after != np.frombuffer(old, np.uint8, size, run.old_start + place - run.new_start)
        start = place + int(changed.argmax()) if changed.any() else len(new)
        piece = new[start : start + _PROBE_BYTES]
        if len(piece) == _PROBE_BYTES and len(set(piece)) >= _PROBE_VALUES_MIN and piece in old:
            return True
    return False


def _worth_a_triple(runs: Iterable[Run]) -> tuple[Run, ...]:
    """Runs without regard to element types: those that continue one another as one, short ones left out."""
    joined: list[Run] = []
    for run in runs:
        last = joined[-1] if joined else None
        if last and (last.new_start + last.size, last.old_start + last.size) == (run.new_start, run.old_start):
            joined[-1] = last._replace(size=last.size + run.size)
        else:
            joined.append(run)
    return tuple(run for run in joined if run.size >= _RUN_BYTES_MIN)


def _aligned(old: bytes, new: bytes, runs: Sequence[Run], *levels: int) -> bytes:
    """The patch of these runs; what lies between them is extra."""
    gaps = _gaps(runs, len(new))
    triples: list[Triple] = [(0, gaps[0].size, runs[0].old_start if runs else 0)]
    for run, gap, after in zip(runs, gaps[1:], [*runs[1:], *runs[-1:]], strict=True):
        triples.append((run.size, gap.size, after.old_start - run.old_start - run.size if after != run else 0))
    if triples[0] == (0, 0, 0):
        del triples[0]
    return _written(
        len(new),
        _packed([_numbers(number for triple in triples for number in triple)], *levels),
        _packed(_differences(old, new, runs), *levels),
        _packed((memoryview(new)[gap.new_start : gap.new_start + gap.size] for gap in gaps), *levels),
    )


def _gaps(runs: Sequence[Run], size: int) -> list[_Gap]:
    """The bytes of the new file before, between and after the runs: one gap more than runs, some of them empty."""
    ends = [0, *(run.new_start + run.size for run in runs)]
    starts = [*(run.new_start for run in runs), size]
    return [_Gap(end, start - end) for end, start in zip(ends, starts, strict=True)]


def _differences(old: bytes, new: bytes, runs: Iterable[Run]) -> Iterator[bytes]:
    for run in runs:
        for start in range(0, run.size, _PIECE_BYTES):
            size = min(_PIECE_BYTES, run.size - start)
            before = np.frombuffer(old, np.uint8, size, run.old_start + start)
            yield (np.frombuffer(new, np.uint8, size, run.new_start + start) - before).tobytes()


def _packed(pieces: Iterable[Buffer], *levels: int) -> bytes:
    """The pieces in one bz2 stream: of the smallest blocks that cost at most 1 % more than the best of `levels`."""
    packers = [bz2.BZ2Compressor(level) for level in levels]
    parts: list[list[bytes]] = [[] for _ in levels]
    for piece in pieces:
        for packer, packed in zip(packers, parts, strict=True):
            packed.append(packer.compress(piece))
    streams = [b"".join([*packed, packer.flush()]) for packer, packed in zip(packers, parts, strict=True)]
    best = min(map(len, streams))
    return next(stream for stream in streams if len(stream) <= _LEVEL_COST_MAX * best)


def _written(new_size: int, control: bytes, difference: bytes, extra: bytes) -> bytes:
    header = _numbers((len(control), len(difference), new_size))
    return b"".join((MAGIC, header, control, difference, extra))


def _numbers(values: Iterable[int]) -> bytes:
    """bsdiff's integers: 64 bits, little endian, sign and magnitude."""
    return b"".join((abs(value) | (1 << 63 if value < 0 else 0)).to_bytes(8, "little") for value in values)
