"""Releases that two regions made apart, put together weight by weight.

Both regions trained from the same parent, so what each of them published is that parent plus an update. Adding all
updates to the parent keeps every one of them; the int8 file that follows is quantized with the parent's scales, as the
siblings' files were, so a device on any of them has a small patch to take. Where the siblings are more than weights of
one parent (another architecture, a tensor added, a graph edited twice) there is nothing to add up: `merge_updates`
says so, and one sibling has to win (`model_delta.version.winner`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from model_delta.manifest import StoredTensor
from model_delta.segments import read_tensor, stored_tensors

_FLOATS = ("float32", "float64", "float16")


def merge_updates(parent: bytes, siblings: Sequence[bytes]) -> bytes | None:
    """The parent's file plus every sibling's update, or None when they are not weights of one parent.

    Per float tensor: parent + sum of (sibling - parent), in float64, rounded once; a weight that one sibling alone
    moved is that sibling's, bit for bit. Any other tensor, and the bytes around tensors, must have been changed in one
    way at most. None too when the sum of a weight is not finite, or there are fewer than two siblings.
    """
    tensors = stored_tensors(parent)
    if len(siblings) < 2 or not tensors or any(stored_tensors(sibling) != tensors for sibling in siblings):
        return None
    if any(len(sibling) != len(parent) for sibling in siblings):
        return None
    merged = bytearray(parent)
    for start, end in _around(tensors, len(parent)):
        piece = _changed_once(parent[start:end], [sibling[start:end] for sibling in siblings])
        if piece is None:
            return None
        merged[start:end] = piece
    for tensor in tensors:
        start, end = tensor.offset, tensor.offset + tensor.size
        piece = _changed_once(parent[start:end], [sibling[start:end] for sibling in siblings])
        if piece is None and tensor.dtype in _FLOATS:
            piece = _sum(tensor, parent, siblings)
        if piece is None:
            return None
        merged[start:end] = piece
    return bytes(merged)


def _around(tensors: Sequence[StoredTensor], size: int) -> list[tuple[int, int]]:
    """The ranges that no tensor's weights stand in."""
    ordered = sorted((tensor.offset, tensor.offset + tensor.size) for tensor in tensors)
    edges = [(0, 0), *ordered, (size, size)]
    return [(end, start) for (_, end), (start, _) in pairwise(edges) if end < start]


def _changed_once(parent: bytes, siblings: Sequence[bytes]) -> bytes | None:
    """The one way in which these bytes were changed, the parent's if they were not, None if there are more."""
    changes = {sibling for sibling in siblings if sibling != parent}
    return next(iter(changes), parent) if len(changes) < 2 else None


def _sum(tensor: StoredTensor, parent: bytes, siblings: Sequence[bytes]) -> bytes | None:
    before = read_tensor(parent, tensor)
    after = np.stack([read_tensor(sibling, tensor) for sibling in siblings])
    updates: npt.NDArray[np.float64] = after.astype(np.float64) - before.astype(np.float64)
    # Sorted, so that the order in which the siblings are given does not change the last bit of the sum.
    total = before.astype(np.float64) + np.sort(updates, axis=0).sum(axis=0)
    moved = after != before
    once = moved.sum(axis=0) == 1
    alone = np.where(moved & once, after, 0).sum(axis=0, dtype=before.dtype)
    with np.errstate(over="ignore"):  # an overflow is not finite, which is looked for below
        result = np.where(once, alone, total.astype(before.dtype))
    if not np.isfinite(result).all():
        return None
    return bytes(result.astype(before.dtype.newbyteorder("<"), copy=False).tobytes())
