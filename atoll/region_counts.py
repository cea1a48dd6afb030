"""How many questions a fleet process has put to regions, in a file that its death does not reset.

The counts say whether a region's death lost anything, and the process that counts may itself be killed meanwhile. So
they live in a mapped file: what was stored there survives `kill -9` at any point (not a power cut, which ends the whole
machine and with it every question). A question is counted before it is put and settled after its answer; one that was
under way when the process died is counted as `cut_short` by its successor, because nobody is left to say how it ended.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from edge_runtime.regions import RegionAnswer, RegionClient
from model_delta.errors import Malformed, Unavailable

FIELDS = ("requests", "settled", "lost", "failovers", "cut_short")
_MAGIC = b"atollrc1"
_VALUE = struct.Struct("<Q")
_SIZE = len(_MAGIC) + len(FIELDS) * _VALUE.size


class RegionCounts:
    """The counts at `path`, continued from where the last process left them. For one process and one thread.

    Raises Malformed for a file that is something else, Unavailable when it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                found = os.read(descriptor, _SIZE + 1)
                fresh = _MAGIC.ljust(_SIZE, b"\0")
                if len(found) < _SIZE and fresh.startswith(found):  # new, or its first writing was cut short
                    os.pwrite(descriptor, fresh, 0)
                    found = fresh
                if len(found) != _SIZE or not found.startswith(_MAGIC):
                    raise Malformed(f"{path}: expected counts of {_SIZE} bytes, found something else; remove the file")
                self._map = mmap.mmap(descriptor, _SIZE)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise Unavailable(f"{path}: {error.strerror}") from None
        # Settled last: a death in between counts the same questions as cut short once more rather than not at all.
        self._set("cut_short", self.read("cut_short") + self.read("requests") - self.read("settled"))
        self._set("settled", self.read("requests"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._map.close()

    def read(self, name: str) -> int:
        """One of `FIELDS`."""
        return int(_VALUE.unpack_from(self._map, self._at(name))[0])

    def add(self, name: str, count: int = 1) -> None:
        """Count up."""
        self._set(name, self.read(name) + count)

    def _set(self, name: str, value: int) -> None:
        _VALUE.pack_into(self._map, self._at(name), value)

    def _at(self, name: str) -> int:
        return len(_MAGIC) + FIELDS.index(name) * _VALUE.size


class CountedRegions:
    """A `RegionClient` whose questions are counted durably."""

    def __init__(self, client: RegionClient, counts: RegionCounts) -> None:
        self._client, self._counts = client, counts
        self._failovers = len(client.failovers)

    async def ask(self, features: Mapping[str, float], device_id: str, nearest: str) -> RegionAnswer:
        """See `RegionClient.ask`."""
        self._counts.add("requests")
        try:
            return await self._client.ask(features, device_id, nearest)
        except Unavailable:
            self._counts.add("lost")
            raise
        finally:
            self._counts.add("settled")
            seen, self._failovers = self._failovers, len(self._client.failovers)
            self._counts.add("failovers", self._failovers - seen)
