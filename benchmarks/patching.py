"""The calls whose cost `benchmarks.deltas` measures, each in a process of its own (`benchmarks.cost`).

They live apart so that such a process loads what a real one would and nothing else. Arguments are file names; a result
is a number of bytes.
"""

from __future__ import annotations

from pathlib import Path

from model_delta.patch import container
from model_delta.patch.access import FileAccess


def nothing() -> int:
    """The interpreter with the imports of this module: the baseline of memory."""
    return 0


def make(form: str, old: str, new: str, patch: str) -> int:
    """Our patch, written to `patch`."""
    made = container.make(form, Path(old).read_bytes(), Path(new).read_bytes())
    return Path(patch).write_bytes(made)


def apply(old: str, patch: str, new: str) -> int:
    """Our applier, file to file."""
    with Path(old).open("rb") as before, Path(patch).open("rb") as change, Path(new).open("w+b") as after:
        return container.apply(FileAccess(before.fileno()), FileAccess(change.fileno()), after, 1 << 30)


def make_bsdiff4(old: str, new: str, patch: str) -> int:
    """The peer's patch."""
    import bsdiff4

    return Path(patch).write_bytes(bsdiff4.diff(Path(old).read_bytes(), Path(new).read_bytes()))


def apply_bsdiff4(old: str, patch: str, new: str) -> int:
    """The peer's applier."""
    import bsdiff4

    bsdiff4.file_patch(old, new, patch)
    return Path(new).stat().st_size
