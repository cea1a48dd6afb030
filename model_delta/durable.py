"""Files that outlive a power cut: replaced whole, flushed, and the folder that names them flushed as well.

Whoever keeps something in a file of its own writes it through here; how a full disk is told is the caller's business.
"""

from __future__ import annotations

import os
from pathlib import Path


def replace_whole(path: Path, data: bytes, *, aside: Path, durable: bool = True) -> None:
    """Replace `path` by `data`, readable by its owner alone: a power cut leaves the old content or the new.

    `aside`, in the same folder, holds the bytes until they are complete; no two writers may share it, and what a cut
    leaves of it is overwritten or swept away by the caller. With `durable` off only the death of this process is
    survived, which costs no wait for the disk. Raises OSError with the old content in place and nothing aside.
    """
    try:
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            if durable:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        aside.rename(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Make durable what was written to a file. Raises OSError."""
    _sync(path, 0)


def sync_folder(path: Path) -> None:
    """Make durable which names a folder holds: files made, renamed or removed in it. Raises OSError."""
    _sync(path, os.O_DIRECTORY)


def _sync(path: Path, kind: int) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | kind)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
