"""What a peer says it measured of many rows, checked by random sums of them.

Measuring is linear: what it gives of a weighted sum of rows is the weighted sum of what it gives of each. So who holds
the rows too need not measure all of them again. Each row goes into one of 16 groups at random, the groups are added up
with random weights in [-2^15, 2^15), four times over, and only these four sums are measured, beside the same sums of
what the peer sent. Suppose any of that is wrong. Some row's error is not zero, and whatever the groups of the others
are, it goes, but for one group at most, into one whose errors then add up to something else than zero: all groups add
up to zero with probability at most 1/16 (0 where there are no more rows than groups). If a group does not, and 2^v is
the largest power of two in one of its errors, each sum is right for one weight in 2^(32 - v), or in 2^16. So errors
pass with probability at most 1/16 + 1/16 whatever they are, and 1/16 + 2^-16 if they move anything by less than 2^29,
which is more than a sketch may have. The peer cannot foresee weights and groups, of which nobody is told.

Up to four million words, or 4 rows, each row is measured again by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fl_coordinator.shares.fixed_point import Rng
from fl_coordinator.shares.streams import COLUMNS, Streams, Words

SUMS, GROUPS = 4, 16
WORDS_MAX = 1 << 22


class RandomSums:
    """Rows that are random sums, modulo 2^32, of the `chosen` ones of `rows`, uint32[n, length]: `count` of them. What
    is random comes from `rng`.

    `total` uint32[length] is the sum of all the chosen ones once `blocks` has gone through them.
    """

    def __init__(self, rows: Streams, length: int, chosen: Sequence[int], rng: Rng) -> None:
        self.total = np.zeros(length, dtype=np.uint32)
        self._rows = rows
        given = len(chosen)
        self._alone = given <= SUMS or given * length <= WORDS_MAX
        self.count = given if self._alone else SUMS
        groups = np.arange(given) if given <= GROUPS else np.frombuffer(rng(given), dtype=np.uint8) % GROUPS
        self._order = np.argsort(groups, kind="stable")
        self._chosen = [chosen[place] for place in self._order]
        ends = np.searchsorted(groups[self._order], np.arange(GROUPS + 1)).tolist()
        self._spans = [slice(*pair) for pair in pairwise(ends)]
        self._weights = np.frombuffer(rng(2 * SUMS * GROUPS), dtype=np.int16).reshape(SUMS, GROUPS).astype(np.float64)

    def of(self, measured: Words) -> Words:
        """The same sums of what was measured of each chosen row: uint32[count, m] of uint32[n, m]."""
        ordered = measured[self._order]
        return ordered if self._alone else self._sums(ordered, np.empty((GROUPS, measured.shape[1]), dtype=np.uint32))

    def blocks(self, rows: Sequence[int]) -> Iterator[tuple[int, Words]]:
        """All of them, column by column; see `Streams.blocks`."""
        room = np.empty((GROUPS, COLUMNS), dtype=np.uint32)
        for start, block in self._rows.blocks(self._chosen):
            width = block.shape[1]
            groups = room[:, :width]
            found = block if self._alone else self._sums(block, groups)
            np.add.reduce(block if self._alone else groups, axis=0, out=self.total[start : start + width])
            yield start, found

    def _sums(self, ordered: Words, groups: Words) -> Words:
        """The sums, and `groups` filled with those of the groups."""
        for span, group in zip(self._spans, groups, strict=True):
            np.add.reduce(ordered[span], axis=0, out=group)
        # Magnitudes: 2^31 times 2^15, 16 of them, is below 2^53, hence exact.
        exact: NDArray[np.float64] = self._weights @ groups.view(np.int32)
        return exact.astype(np.int64).astype(np.uint32)
