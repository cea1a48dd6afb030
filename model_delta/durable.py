"""Files that outlive a power cut: replaced whole, flushed, and the folder that names them flushed as well.

Whoever keeps something in a file of its own writes it through here; how a full disk is told is the caller's business.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from model_delta.errors import StorageFailed, StorageFull

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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


def storage_error(what: Path | str, error: OSError) -> StorageFailed:
    """What the system says of a file as our error: a full disk needs room, any other somebody who looks at it."""
    if error.errno in _FULL:
        return StorageFull(f"no room left for {what}: free some space; nothing was changed")
    reason = error.strerror or type(error).__name__
    return StorageFailed(f"the disk refuses {what} ({reason}): check it and how it is mounted; nothing was changed")


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
