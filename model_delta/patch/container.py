"""The door to patches: make one, apply one, look into one. Callers name a format; applying goes by the magic bytes.

`bsdiff40` is what stock `bspatch` reads. Both sides of a patch are hostile until a digest says otherwise: what is
applied here has the right size or raises, and whether it is the right file only its digest tells, which the caller has.
"""

from __future__ import annotations

import io
from typing import BinaryIO

import msgspec

from model_delta.errors import Malformed
from model_delta.patch import bsdiff, bspatch
from model_delta.patch.access import BytesAccess, RandomAccess

FORMATS: tuple[str, ...] = ("bsdiff40",)
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
    raise Malformed(f"patch format: expected one of {', '.join(FORMATS)}, found {format!r}")


def apply(old: RandomAccess, patch: RandomAccess, new: BinaryIO, size_max: int, *, done: int = 0) -> int:
    """Write the new file, at most `size_max` bytes, to `new`; its size. The caller checks its digest.

    Memory does not grow with the files. `done`: so many first bytes stand in `new` since an interrupted attempt; they
    are compared, not written again. Raises Malformed for damaged, truncated or hostile patches and for an old file that
    the patch was visibly not made for.
    """
    _require_known(patch)
    return bspatch.apply_stream(old, patch, new, size_max, done=done)


def apply_bytes(old: bytes, patch: bytes, size_max: int) -> bytes:
    """`apply` between bytes in memory."""
    new = io.BytesIO()
    apply(BytesAccess(old), BytesAccess(patch), new, size_max)
    return new.getvalue()


def inspect(patch: RandomAccess) -> PatchInfo:
    """What a patch says about itself. Raises Malformed where its header or control block is none."""
    _require_known(patch)
    layout = bspatch.read_layout(patch)
    survey = bspatch.survey_patch(patch, layout)
    streams = (
        PatchStream("control", layout.difference_start - layout.control_start, survey.triples * bspatch.TRIPLE_BYTES),
        PatchStream("difference", layout.extra_start - layout.difference_start, survey.added),
        PatchStream("extra", layout.end - layout.extra_start, survey.copied),
    )
    window = bspatch.window_bytes(patch, layout)
    return PatchInfo("bsdiff40", None, None, layout.new_size, None, window, streams)


def _require_known(patch: RandomAccess) -> None:
    if patch.pread(0, len(bspatch.MAGIC)) != bspatch.MAGIC:
        raise Malformed(f"patch: expected one of {', '.join(FORMATS)}, found {patch.size} bytes of another kind")
