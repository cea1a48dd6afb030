"""What a model version is, as a value.

A `Manifest` says everything about one version: whose it is, which version, what file it is (segments and their Merkle
root), what goes in and comes out, what it needs, how to check that it runs here as it ran there (golden cases), where
it came from, and until when it may be used. The SHA-256 of its packed bytes is the version's identity; nothing else
names a version. It travels in an `Envelope` of type `manifest`.

A `Delivery` says which sealed blobs carry a version: whole segments, and patches from earlier versions. It is not
signed, because nothing in it is believed: what arrives is opened under the artifact's key, and the file that results is
checked against the signed manifest.

Compatibility promise: see `encoding`; `format` is raised only when an old reader must refuse. One rule more, because
the identity is recomputed from the record: a field that is added later is left out of the packed form while it has its
default, so that older versions keep their digests; a version that uses it is refused by readers that do not know it.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from model_delta.digest import digest_of
from model_delta.encoding import pack, unpack
from model_delta.errors import Malformed

FORMAT = 1
MANIFEST_TYPE = "manifest"


class Segment(msgspec.Struct, frozen=True):
    """A byte range of the model file, cut at tensor boundaries. `digest` is of the plaintext bytes."""

    name: str
    size: int
    digest: str


class StoredTensor(msgspec.Struct, frozen=True):
    """Where a weight's raw little-endian bytes stand inside the joined file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


class TensorSpec(msgspec.Struct, frozen=True):
    """A named input or output. A dimension of -1 is free (the batch)."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class Tensor(msgspec.Struct, frozen=True):
    """A tensor by value: `data` is C-order little-endian bytes of `dtype` (a NumPy name) and `shape`."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


class GoldenCase(msgspec.Struct, frozen=True):
    """Inputs and the outputs the publisher saw; a device must see the same within `tolerance` (absolute)."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    tolerance: float = 1e-4


class Requirements(msgspec.Struct, frozen=True):
    """What a device needs to run this version."""

    runtime: str = "onnxruntime"
    opset: int = 17
    memory_bytes: int = 0
    latency_ms_max: float = 50.0


class Lineage(msgspec.Struct, frozen=True):
    """Where this version came from. `contributions_root` is the Merkle root over the round's admitted contributions.
    `provenance` came later: the digest of the OpenSSF model-signing bundle that came with the published file."""

    data: str = ""
    code: str = ""
    round_id: str = ""
    contributions_root: str = ""
    provenance: str | msgspec.UnsetType = msgspec.UNSET


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """One model version. Times are Unix seconds, sizes bytes. `version` is a version vector, `release` a counter that
    only grows per tenant and model; `decision_threshold` splits the score into approve / decline."""

    format: int = FORMAT
    tenant: str
    model: str
    version: dict[str, int]
    release: int
    parents: tuple[str, ...] = ()
    size: int
    file_digest: str
    segments: tuple[Segment, ...]
    merkle_root: str
    tensors: tuple[StoredTensor, ...] = ()
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    feature_set: str = ""
    decision_threshold: float = 0.5
    requirements: Requirements = Requirements()
    golden: tuple[GoldenCase, ...] = ()
    lineage: Lineage = Lineage()
    created: int
    expires: int
    baseline: str = ""


class Blob(msgspec.Struct, frozen=True):
    """Sealed bytes in the store, by the digest of the sealed form."""

    digest: str
    size: int


class PatchOffer(msgspec.Struct, frozen=True):
    """A sealed patch that turns the file of manifest `base` into this version's file."""

    base: str
    blob: Blob
    format: Literal["bsdiff40"] = "bsdiff40"


class DenseOffer(msgspec.Struct, frozen=True):
    """A sealed patch in a format that a device need not know; one that it does not know is passed over."""

    base: str
    blob: Blob
    format: str


class Delivery(msgspec.Struct, frozen=True):
    """The blobs that carry one version: `segments` in the manifest's order, and patches from earlier versions.

    `dense` came later: it holds patches in other formats than `patches`, and is left out of the packed form when there
    are none. A delivery without segments only adds patches to another one (see `late_delivery_name`).
    """

    manifest: str
    segments: tuple[Blob, ...]
    patches: tuple[PatchOffer, ...] = ()
    dense: tuple[DenseOffer, ...] | msgspec.UnsetType = msgspec.UNSET

    @property
    def offers(self) -> tuple[PatchOffer | DenseOffer, ...]:
        """Patches in every format."""
        return (*self.patches, *(self.dense or ()))


def late_delivery_name(manifest: str, base: str) -> str:
    """Under which name of kind `delivery` a direct patch from `base` lies that the version's own delivery has not got.

    It is made for devices that are many releases behind; whoever asks for it may find nothing."""
    return digest_of(f"{manifest}|{base}".encode())


def manifest_digest(manifest: Manifest) -> str:
    """The version's identity."""
    return digest_of(pack(manifest))


def parse_manifest(payload: bytes) -> Manifest:
    """Parse verified payload bytes. Raises Malformed; a `format` newer than this reader's is refused by name, and so is
    a field that it does not know: without it the record would have another identity."""
    manifest = unpack(payload, Manifest)
    if manifest.format > FORMAT:
        raise Malformed(f"manifest of {manifest.model}: format {manifest.format}, this reader knows up to {FORMAT}")
    if pack(manifest) != payload:
        raise Malformed(f"manifest of {manifest.model}: it holds fields that this program does not know; upgrade atoll")
    if sum(segment.size for segment in manifest.segments) != manifest.size:
        raise Malformed(f"manifest of {manifest.model}: segment sizes do not add up to {manifest.size} bytes")
    return manifest
