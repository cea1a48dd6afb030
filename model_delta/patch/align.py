"""Which bytes of the old file stand for which bytes of the new one: by the names of tensors, not by a search.

Two versions of a model hold the same tensors, usually in the same places. A suffix sort (what bsdiff does) finds that
out in 17 times the file's memory; a look at the names finds it in milliseconds. So each initializer of the new file is
laid against the old file's of the same name, element type and shape, wherever it stands. A name that leads to other
weights (layers renumbered, tensors swapped) is dropped for the tensor of the same type and shape that fits best.

The bytes around the tensors (nodes, names, lengths) are laid against those around the same tensor when both are equally
long, otherwise by their common ends and by a search of 16-byte pieces, which is cheap because they are few.
What is not ONNX is laid against the old file as a whole when both have the same size, otherwise by its common ends.

A run is kept only where it pays: each 64 KiB of it are judged by a sample, and where the difference would take more
bits (order-0 entropy, one histogram per byte of the element) than the new bytes themselves, there is no run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from model_delta.manifest import StoredTensor
from model_delta.segments import stored_tensors

_BLOCK_BYTES = 65_536
_SAMPLE_BYTES = 4096
_JUDGED_BYTES_MIN = 1024
"""Shorter runs are kept unjudged: a histogram of so few bytes says nothing, and they cost nothing."""
_PIECE_BYTES = 16
_MATCH_BYTES_MIN = 24
_SEARCH_BYTES_MAX = 1024 * 1024
_RIVALS_MAX = 64

Bytes = npt.NDArray[np.uint8]


class Run(NamedTuple):
    """`new[new_start : new_start + size]` is coded against `old[old_start : old_start + size]`.

    `dtype` is the NumPy name of the elements ("int8", "float32", ...) that a coder may see in it, little endian from
    the run's first byte on; "uint8" for bytes around tensors. `size` is in bytes and a multiple of the element's.
    """

    old_start: int
    new_start: int
    size: int
    dtype: str


def align(old: bytes, new: bytes) -> tuple[Run, ...]:
    """The runs of `new` that are worth coding against `old`, by `new_start`, disjoint in `new`; () when there are none.

    An old byte may serve more than one run. Bytes of `new` in no run have no counterpart. Takes time
    linear in the bytes around tensors and in samples of the tensors, and a few MB of memory.
    """
    old_bytes, new_bytes = np.frombuffer(old, np.uint8), np.frombuffer(new, np.uint8)
    old_tensors = _in_file_order(stored_tensors(old))
    new_tensors = _in_file_order(stored_tensors(new)) if old_tensors else ()
    if new_tensors:
        runs = _by_name(old_bytes, new_bytes, old_tensors, new_tensors)
    else:
        runs = list(_by_ends(old_bytes, new_bytes, Run(0, 0, len(old), "uint8"), Run(0, 0, len(new), "uint8")))
    kept = (part for run in runs for part in _worthwhile(old_bytes, new_bytes, run))
    return tuple(_joined(sorted(kept, key=lambda run: run.new_start)))


def _in_file_order(tensors: Iterable[StoredTensor]) -> tuple[StoredTensor, ...]:
    """Tensors that hold bytes, by offset; none that overlaps the one before."""
    ordered = sorted((tensor for tensor in tensors if tensor.size), key=lambda tensor: tensor.offset)
    kept: list[StoredTensor] = []
    for tensor in ordered:
        if not kept or tensor.offset >= kept[-1].offset + kept[-1].size:
            kept.append(tensor)
    return tuple(kept)


def _by_name(
    old: Bytes, new: Bytes, old_tensors: tuple[StoredTensor, ...], new_tensors: tuple[StoredTensor, ...]
) -> list[Run]:
    partners = _partners(old, new, old_tensors, new_tensors)
    before = {later.name: earlier for earlier, later in pairwise(old_tensors)}
    runs: list[Run] = []
    open_gaps: list[Run] = []  # what is left of the bytes between tensors; old_start means nothing
    last: StoredTensor | None = None
    for tensor in (*new_tensors, None):
        start = last.offset + last.size if last else 0
        end = tensor.offset if tensor else len(new)
        old_last = partners.get(last.name) if last else None
        partner = partners.get(tensor.name) if tensor else None
        old_gap = _old_gap(old, old_tensors, before, old_last, partner, is_tail=tensor is None)
        gap = Run(0, start, end - start, "uint8")
        found = list(_by_ends(old, new, old_gap, gap)) if gap.size else []
        runs += found
        open_gaps += _uncovered(gap, found)
        if tensor and partner:
            runs.append(Run(partner.offset, tensor.offset, tensor.size, tensor.dtype))
        last = tensor
    around = _uncovered(Run(0, 0, len(old), "uint8"), [Run(0, t.offset, t.size, "uint8") for t in old_tensors])
    return runs + _searched(old, new, around, [gap for gap in open_gaps if gap.size >= _MATCH_BYTES_MIN])


def _old_gap(
    old: Bytes,
    old_tensors: tuple[StoredTensor, ...],
    before: dict[str, StoredTensor],
    old_last: StoredTensor | None,
    partner: StoredTensor | None,
    *,
    is_tail: bool,
) -> Run:
    """The old file's bytes that lie like a gap of the new one: those before the partner of the tensor that ends it,
    else those after the partner of the tensor that it follows."""
    if partner:
        earlier = before.get(partner.name)
        start = earlier.offset + earlier.size if earlier else 0
        return Run(0, start, partner.offset - start, "uint8")
    if is_tail or old_last is None:
        start = old_tensors[-1].offset + old_tensors[-1].size if is_tail else 0
        end = len(old) if is_tail else old_tensors[0].offset
        return Run(0, start, end - start, "uint8")
    start = old_last.offset + old_last.size
    later = next((tensor.offset for tensor in old_tensors if tensor.offset >= start), len(old))
    return Run(0, start, later - start, "uint8")


def _partners(
    old: Bytes, new: Bytes, old_tensors: tuple[StoredTensor, ...], new_tensors: tuple[StoredTensor, ...]
) -> dict[str, StoredTensor]:
    """The old tensor for each new one, by name; where its weights do not fit or the name is new, the best of the same
    element type and shape. New tensors without any are left out."""
    by_name = {tensor.name: tensor for tensor in old_tensors}
    by_form: dict[tuple[str, tuple[int, ...]], list[StoredTensor]] = {}
    for tensor in old_tensors:
        by_form.setdefault((tensor.dtype, tensor.shape), []).append(tensor)
    partners: dict[str, StoredTensor] = {}
    for tensor in new_tensors:
        same_form = by_form.get((tensor.dtype, tensor.shape), ())
        named = by_name.get(tensor.name)
        named = named if named is not None and named in same_form else None
        if named is not None and (tensor.size < _JUDGED_BYTES_MIN or _pays(old, new, _sampled(named, tensor))):
            partners[tensor.name] = named
            continue
        rivals = same_form[:_RIVALS_MAX] if tensor.size >= _JUDGED_BYTES_MIN else ()
        costs = [(_bits(old, new, _sampled(rival, tensor))[0], index) for index, rival in enumerate(rivals)]
        if costs:
            best = same_form[min(costs)[1]]
            if _pays(old, new, _sampled(best, tensor)):
                partners[tensor.name] = best
    return partners


def _sampled(old_tensor: StoredTensor, tensor: StoredTensor) -> Run:
    """A piece from the middle of both tensors: where padding and unused rows are least likely."""
    size = min(tensor.size, _SAMPLE_BYTES)
    skip = (tensor.size - size) // 2 // 16 * 16
    return Run(old_tensor.offset + skip, tensor.offset + skip, size, tensor.dtype)


def _by_ends(old: Bytes, new: Bytes, old_range: Run, new_range: Run) -> Iterator[Run]:
    """Runs between two ranges (their `new_start` and `size`): one if equally long and worth it, else the common ends.

    Ranges of equal size of which parts are not worth it are searched by their ends too: something was moved."""
    old_start, old_end = old_range.new_start, old_range.new_start + old_range.size
    new_start, new_end = new_range.new_start, new_range.new_start + new_range.size
    if old_range.size == new_range.size:
        whole = Run(old_start, new_start, new_range.size, "uint8")
        if sum(run.size for run in _worthwhile(old, new, whole)) == whole.size:
            if whole.size:
                yield whole
            return
    prefix = _common(old[old_start:old_end], new[new_start:new_end])
    suffix = _common(old[old_start + prefix : old_end][::-1], new[new_start + prefix : new_end][::-1])
    middle = new_range.size - prefix - suffix
    if prefix:
        yield Run(old_start, new_start, prefix, "uint8")
    if old_range.size == new_range.size and middle:
        yield from _worthwhile(old, new, Run(old_start + prefix, new_start + prefix, middle, "uint8"))
    if suffix:
        yield Run(old_end - suffix, new_end - suffix, suffix, "uint8")


def _common(first: Bytes, second: Bytes) -> int:
    """How many bytes both begin with."""
    size, position = min(len(first), len(second)), 0
    while position < size:
        end = min(position + _BLOCK_BYTES, size)
        differs = first[position:end] != second[position:end]
        if differs.any():
            return position + int(differs.argmax())
        position = end
    return size


def _uncovered(whole: Run, runs: Iterable[Run]) -> list[Run]:
    """What `runs` leave of `whole`, by `new_start`."""
    left, position, end = [], whole.new_start, whole.new_start + whole.size
    for run in sorted(runs, key=lambda run: run.new_start):
        if run.new_start > position:
            left.append(Run(0, position, run.new_start - position, "uint8"))
        position = max(position, run.new_start + run.size)
    if position < end:
        left.append(Run(0, position, end - position, "uint8"))
    return left


def _searched(old: Bytes, new: Bytes, old_ranges: list[Run], gaps: list[Run]) -> list[Run]:
    """Equal bytes in the ranges of `old` for the gaps of `new`: greedy, from pieces of 16 bytes that both have.

    Only for the bytes around tensors; more than 1 MiB of them on either side are left without a counterpart.
    """
    if max(sum(r.size for r in old_ranges), sum(gap.size for gap in gaps)) > _SEARCH_BYTES_MAX:
        return []
    pieces: dict[bytes, tuple[int, int]] = {}  # a piece, where it first stands, and the end of that range
    for old_range in old_ranges if gaps else ():
        start, end = old_range.new_start, old_range.new_start + old_range.size
        text = old[start:end].tobytes()
        for offset in range(0, len(text) - _PIECE_BYTES + 1, _PIECE_BYTES // 2):
            pieces.setdefault(text[offset : offset + _PIECE_BYTES], (start + offset, end))
    runs = []
    for gap in gaps:
        text, taken, position = new[gap.new_start : gap.new_start + gap.size].tobytes(), 0, 0
        while position <= len(text) - _PIECE_BYTES:
            found = pieces.get(text[position : position + _PIECE_BYTES])
            if found is None:
                position += 1
                continue
            start, end = found
            back = _common(
                old[max(start - (position - taken), 0) : start][::-1],
                new[gap.new_start + taken : gap.new_start + position][::-1],
            )
            ahead = _common(old[start:end], new[gap.new_start + position : gap.new_start + gap.size])
            if back + ahead < _MATCH_BYTES_MIN:
                position += 1
                continue
            runs.append(Run(start - back, gap.new_start + position - back, back + ahead, "uint8"))
            taken = position = position + ahead
    return runs


def _worthwhile(old: Bytes, new: Bytes, run: Run) -> Iterator[Run]:
    """The blocks of a run that pay; all of a short one."""
    if run.size < _JUDGED_BYTES_MIN:
        yield run
        return
    for start in range(0, run.size, _BLOCK_BYTES):
        size = min(_BLOCK_BYTES, run.size - start)
        block = Run(run.old_start + start, run.new_start + start, size, run.dtype)
        if size < _JUDGED_BYTES_MIN or _pays(old, new, block):
            yield block


def _pays(old: Bytes, new: Bytes, run: Run) -> bool:
    difference, plain = _bits(old, new, run)
    return difference <= plain


def _bits(old: Bytes, new: Bytes, run: Run) -> tuple[float, float]:
    """Bits per byte, by a sample, of the run's bytewise difference and of its new bytes (order-0 entropy, the mean of
    the elements' byte planes)."""
    width = np.dtype(run.dtype).itemsize
    parts = 4
    step = max(run.size // parts // 16 * 16, 16)
    length = min(_SAMPLE_BYTES // parts, step)
    starts = range(0, run.size, step) if run.size > _SAMPLE_BYTES else (0,)
    length = length if run.size > _SAMPLE_BYTES else run.size
    old_sample = np.concatenate([old[run.old_start + at : run.old_start + min(at + length, run.size)] for at in starts])
    new_sample = np.concatenate([new[run.new_start + at : run.new_start + min(at + length, run.size)] for at in starts])
    difference = new_sample - old_sample
    if not difference.any():
        return 0.0, _entropy(new_sample, width)
    return _entropy(difference, width), _entropy(new_sample, width)


def _entropy(sample: Bytes, width: int) -> float:
    total = 0.0
    for plane in range(width):
        counts = np.bincount(sample[plane::width], minlength=256)
        shares = counts[counts > 0] / max(counts.sum(), 1)
        total -= float((shares * np.log2(shares)).sum())
    return total / width


def _joined(runs: Iterable[Run]) -> Iterator[Run]:
    """Runs that continue one another in both files, and see the same elements, as one."""
    last: Run | None = None
    for run in runs:
        if (
            last is not None
            and last.dtype == run.dtype
            and (last.new_start + last.size, last.old_start + last.size) == (run.new_start, run.old_start)
        ):
            last = last._replace(size=last.size + run.size)
            continue
        if last is not None:
            yield last
        last = run
    if last is not None:
        yield last
