"""The door to patches: make one, apply one, look into one. Callers name a format; applying goes by the magic bytes.

`bsdiff40` is what stock `bspatch` reads; `tp1` is smaller, and names both files by their digests. Both sides of a patch
are hostile until a digest says otherwise: what is applied here has the right size or raises. Whether it is the right
file only a digest from a trusted place tells, which the caller has: a patch's own digests guard against mistakes alone.
"""

from __future__ import annotations

import io
from typing import BinaryIO

import msgspec

from model_delta.errors import Malformed
from model_delta.patch import bsdiff, bspatch, dense, tp1
from model_delta.patch.access import BytesAccess, RandomAccess

FORMATS: tuple[str, ...] = ("bsdiff40", "tp1")
"""The names of the patch formats, most interoperable first."""


class PatchStream(msgspec.Struct, frozen=True):
    """One compressed part of a patch: its bytes there, and unpacked (None where only unpacking would tell)."""

    name: str
    packed: int
    unpacked: int | None


class PatchInfo(msgspec.Struct, frozen=True):
    """What a patch says about itself; nothing of it is vouched for.

    Sizes in bytes, digests in hexadecimal SHA-256; None where the format has no room for it. `window`: how far back its
    decoders look, in bytes, which is what their memory depends on. `changed`: names of the tensors it changes.
    """

    format: str
    old_size: int | None
    old_digest: str | None
    new_size: int
    new_digest: str | None
    window: int
    streams: tuple[PatchStream, ...]
    changed: tuple[str, ...] | None = None


def make(format: str, old: bytes, new: bytes) -> bytes:  # noqa: A002
    """A patch of `format` (one of FORMATS) that turns `old` into `new`. Raises Malformed for another format."""
    if format == "bsdiff40":
        return bsdiff.make_patch(old, new)
    if format == "tp1":
        return dense.make_dense(old, new)
    raise Malformed(f"patch format: expected one of {', '.join(FORMATS)}, found {format!r}")


def apply(old: RandomAccess, patch: RandomAccess, new: BinaryIO, size_max: int, *, done: int = 0) -> int:
    """Write the new file, at most `size_max` bytes, to `new`; its size. The caller checks its digest.

    Memory does not grow with the files. `done`: so many first bytes stand in `new` since an interrupted attempt; they
    are compared, not written again. Raises Malformed for damaged, truncated or hostile patches and for an old file that
    the patch was visibly not made for; DigestMismatch where a tp1 patch names other files than these.
    """
    if _is_dense(patch):
        return dense.apply_dense(old, patch, new, size_max, done)
    return bspatch.apply_stream(old, patch, new, size_max, done=done)


def apply_bytes(old: bytes, patch: bytes, size_max: int) -> bytes:
    """`apply` between bytes in memory."""
    new = io.BytesIO()
    apply(BytesAccess(old), BytesAccess(patch), new, size_max)
    return new.getvalue()


def inspect(patch: RandomAccess, old: bytes | None = None) -> PatchInfo:
    """What a patch says about itself. Raises Malformed where its header or control block is none.

    A tp1 patch knows which bytes of the old file it changes, not what they are called: with `old`, `changed` has the
    tensors' names. Raises DigestMismatch when that is not its old file.
    """
    if _is_dense(patch):
        return _inspect_dense(patch, old)
    layout = bspatch.read_layout(patch)
    survey = bspatch.survey_patch(patch, layout)
    streams = (
        PatchStream("control", layout.difference_start - layout.control_start, survey.triples * bspatch.TRIPLE_BYTES),
        PatchStream("difference", layout.extra_start - layout.difference_start, survey.added),
        PatchStream("extra", layout.end - layout.extra_start, survey.copied),
    )
    window = bspatch.window_bytes(patch, layout)
    return PatchInfo("bsdiff40", None, None, layout.new_size, None, window, streams)


def _inspect_dense(patch: RandomAccess, old: bytes | None) -> PatchInfo:
    header, streams, _ = dense.inspect_dense(patch)
    return PatchInfo(
        "tp1",
        header.old_size,
        header.old_digest.hex(),
        header.new_size,
        header.new_digest.hex(),
        1 << header.window_bits,
        tuple(PatchStream(*stream) for stream in streams),
        None if old is None else dense.changed_tensors(patch, old),
    )


def _is_dense(patch: RandomAccess) -> bool:
    """Whether it is tp1 rather than BSDIFF40. Raises Malformed when it is neither."""
    start = patch.pread(0, len(bspatch.MAGIC))
    if start.startswith(tp1.MAGIC):
        return True
    if start != bspatch.MAGIC:
        raise Malformed(f"patch: expected one of {', '.join(FORMATS)}, found {patch.size} bytes of another kind")
    return False
