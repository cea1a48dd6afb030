"""A device's folder on a disk that stops taking what is written, and takes it again.

Nothing is put in the place of the system's own calls. Every file that the device replaces is first written beside
itself, under a name that ends in `.new`; a folder that stands there makes the kernel refuse the write, with an error
that is not that of a full disk. A folder in the place of a file makes it refuse to be read.
"""

from __future__ import annotations

from pathlib import Path

REPLACED = ("update.record", "pointer", "direction.record", "round.record", "baseline", "outbox/marks")


class Disk:
    """The disk under `folder`, which exists."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def refuse_writes(self) -> None:
        """As a file system that the kernel has made read-only."""
        for name in REPLACED:
            self.refuse_writes_of(name)

    def refuse_writes_of(self, name: str) -> None:
        """The same for one file."""
        self._aside(name).mkdir(exist_ok=True)

    def take_writes(self) -> None:
        """As after a repair."""
        for name in REPLACED:
            if self._aside(name).is_dir():
                self._aside(name).rmdir()

    def refuse_reading(self, name: str) -> None:
        """As a bad sector under one file."""
        path = self._folder / name
        path.rename(path.with_name(path.name + ".kept"))
        path.mkdir()

    def _aside(self, name: str) -> Path:
        return self._folder / f"{name}.new"
