"""`atoll delta make | apply | inspect`: patches between two files, without a platform.

Output is written beside its target under a hidden name, made durable, checked, and only then renamed: whatever goes
wrong (a digest, a full disk, Ctrl-C, a kill), the target's name holds what it held before. A patch is applied once to
the file that it was made from before it is kept.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

import msgspec

from atoll.output import columns, show
from atoll.settings import ConfigurationError
from model_delta.durable import sync_folder
from model_delta.errors import DigestMismatch, Malformed
from model_delta.patch import container
from model_delta.patch.access import BytesAccess, FileAccess

FILE_BYTES_MAX = (2 << 30) - 1
"""Largest file to make a patch from: an ONNX file holds no more, and both are held in memory."""

_PROGRESS_BYTES_MIN = 16 << 20
_PROGRESS_EVERY_S = 0.2
_STREAM = ("name", "packed", "unpacked")
T = TypeVar("T")


def make_delta(old: Path, new: Path, patch: Path, *, format_name: str, as_json: bool) -> None:
    """Write the patch from `old` to `new` and say what it saves. Raises ConfigurationError, Malformed; OSError with
    the file's name for what only a person can put right."""
    if format_name not in container.FORMATS:
        raise ConfigurationError(f"--format: expected {' or '.join(container.FORMATS)}, found {format_name!r}")
    _require_apart(patch, old, new)
    before, after = _read(old), _read(new)
    if len(before) + len(after) >= _PROGRESS_BYTES_MIN and sys.stderr.isatty() and not as_json:
        print(f"comparing {len(before) / 1e6:.0f} with {len(after) / 1e6:.0f} MB", file=sys.stderr, flush=True)
    started = time.perf_counter()
    with _written_aside(patch) as output:
        made = container.make(format_name, before, after)
        check = _Digesting(None, len(after))
        container.apply(BytesAccess(before), BytesAccess(made), cast(BinaryIO, check), len(after))
        digest = hashlib.sha256(after).hexdigest()
        if check.hexdigest() != digest:
            raise Malformed(f"{patch}: not written; applied to {old} it does not give {new}: please report this")
        output.write(made)
    seconds = time.perf_counter() - started
    share = len(made) / len(after) if after else 0.0
    found = {
        "patch": str(patch),
        "format": format_name,
        "bytes": len(made),
        "share": share,
        "old": {"bytes": len(before), "sha256": hashlib.sha256(before).hexdigest()},
        "new": {"bytes": len(after), "sha256": digest},
        "seconds": round(seconds, 3),
    }
    text = (
        f"{patch}: {len(made)} B as {format_name}, {share:.2%} of {new} ({len(after)} B), in {seconds:.2f} s\n"
        f"apply it: atoll delta apply {old} {patch} OUT --sha256 {digest}"
    )
    show(found, text, as_json=as_json)


def apply_delta(old: Path, patch: Path, out: Path, *, sha256: str, as_json: bool) -> None:
    """Write the new file that `patch` makes of `old`. Raises Malformed for a bad patch or a visibly wrong old file,
    DigestMismatch when the new file is not the one of `sha256`; OSError with the file's name."""
    expected = sha256.lower()
    if expected and not re.fullmatch(r"[0-9a-f]{64}", expected):
        raise ConfigurationError(f"--sha256: expected 64 hexadecimal digits, found {sha256!r}")
    _require_apart(out, patch)
    with _opened(old) as source, _opened(patch) as changes, _written_aside(out) as output:
        info = _named(patch, lambda: container.inspect(changes))
        room = shutil.disk_usage(out.parent).free
        if info.new_size > room:
            raise OSError(errno.ENOSPC, f"expected room for {info.new_size} bytes, found {room}", str(out))
        writer = _Digesting(output, info.new_size, _progress("applying", info.new_size, as_json))
        _named(patch, lambda: container.apply(source, changes, cast(BinaryIO, writer), info.new_size))
        found = writer.hexdigest()
        if expected and found != expected:
            raise DigestMismatch(
                f"{out}: not written; expected a file of SHA-256 {expected}, {patch} made {found} of {old}; "
                "is this the old file that the patch was made from?"
            )
    known = bool(expected or info.new_digest)
    text = f"{out}: {info.new_size} B, sha256 {found}" + ("" if known else " (not compared: pass --sha256)")
    value = {"out": str(out), "format": info.format, "bytes": info.new_size, "sha256": found, "compared": known}
    show(value, text, as_json=as_json)


def inspect_delta(patch: Path, old: Path | None, *, as_json: bool) -> None:
    """Show what a patch says about itself; with `old`, which of its tensors change, where the format tells. Raises
    Malformed, DigestMismatch when `old` is another file."""
    before = _read(old) if old is not None else None
    with _opened(patch) as changes:
        info, size = _named(patch, lambda: container.inspect(changes, before)), changes.size
    facts = {
        "old": _file_text(info.old_size, info.old_digest),
        "new": _file_text(info.new_size, info.new_digest),
        "window": f"{info.window} B",
        "changed": _changed_text(info, old is not None),
    }
    rows = [msgspec.to_builtins(stream) for stream in info.streams]
    lines = [f"{patch}: {info.format}, {size} B", *(f"{name:<9} {value}" for name, value in facts.items())]
    if info.changed:
        lines += [f"  {name}" for name in info.changed]
    show({"bytes": size, **msgspec.to_builtins(info)}, "\n".join([*lines, columns(rows, _STREAM)]), as_json=as_json)


def _named(path: Path, call: Callable[[], T]) -> T:
    """What `call` returns; a refusal names the file that it is about."""
    try:
        return call()
    except Malformed as error:
        raise Malformed(f"{path}: {error}") from None


def _changed_text(info: container.PatchInfo, is_old_known: bool) -> str:
    if info.changed is not None:
        return f"{len(info.changed)} tensors"
    return "not said" if is_old_known or info.old_digest is None else "not said without --old"


def _file_text(size: int | None, digest: str | None) -> str:
    return f"{'not said' if size is None else f'{size} B'}{f', sha256 {digest}' if digest else ''}"


class _Digesting:
    """A file that is written, hashed and counted on the way; without `output` it is only hashed."""

    def __init__(self, output: BinaryIO | None, size: int, tell: _Progress | None = None) -> None:
        self._output, self._size, self._tell = output, size, tell
        self._hash, self._written = hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        if self._output is not None:
            self._output.write(data)
        self._hash.update(data)
        self._written += len(data)
        if self._tell is not None:
            self._tell.at(self._written)
        return len(data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


class _Progress:
    """One line on a terminal's standard error, rewritten a few times a second."""

    def __init__(self, what: str, size: int) -> None:
        self._what, self._size, self._next = what, size, time.monotonic()

    def at(self, done: int) -> None:
        now = time.monotonic()
        if now >= self._next or done == self._size:
            self._next = now + _PROGRESS_EVERY_S
            end = "\n" if done == self._size else ""
            print(
                f"\r{self._what}: {done / 1e6:.0f} of {self._size / 1e6:.0f} MB", end=end, file=sys.stderr, flush=True
            )


def _progress(what: str, size: int, as_json: bool) -> _Progress | None:
    return _Progress(what, size) if size >= _PROGRESS_BYTES_MIN and sys.stderr.isatty() and not as_json else None


def _read(path: Path) -> bytes:
    with _opened(path) as file:
        if file.size > FILE_BYTES_MAX:
            raise ConfigurationError(f"{path}: expected at most {FILE_BYTES_MAX} bytes, found {file.size}")
        return path.read_bytes()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[FileAccess]:
    """A regular file, for reading at any position. Raises ConfigurationError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a named pipe must not block
    except OSError as error:
        raise ConfigurationError(f"{path}: expected a readable file, found: {error.strerror}; check the path") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ConfigurationError(f"{path}: expected a file, found something else; check the path")
        yield FileAccess(descriptor)
    finally:
        os.close(descriptor)


def _require_apart(target: Path, *sources: Path) -> None:
    """Raise ConfigurationError unless `target` may be written: no folder or device, and none of the sources."""
    if not target.parent.is_dir():
        raise ConfigurationError(f"{target}: expected an existing folder {target.parent}; make it first")
    if target.exists() and not target.is_file():
        raise ConfigurationError(f"{target}: expected the name of a file, found something else there")
    for source in sources:
        if target.exists() and source.exists() and target.samefile(source):
            raise ConfigurationError(f"{target}: expected a name of its own, found that of {source}")


@contextlib.contextmanager
def _written_aside(target: Path) -> Iterator[BinaryIO]:
    """A file that gets the name `target` when the block ends well, and none otherwise, also on Ctrl-C and SIGTERM."""
    aside = target.with_name(f".{target.name[:100]}.{secrets.token_hex(4)}.part")
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with open(descriptor, "wb") as output:  # noqa: PTH123 - a descriptor, not a path
            yield output
            output.flush()
            os.fsync(output.fileno())
        aside.replace(target)
        sync_folder(target.parent)
    except OSError as error:
        if error.filename is None or error.filename == str(aside):  # a write does not know the file's name
            raise OSError(error.errno, error.strerror, str(target)) from None
        raise
    finally:
        aside.unlink(missing_ok=True)
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
