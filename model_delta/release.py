"""From a model file to a release, and back.

`build_release` turns a file into what is published: a signed manifest, an unsigned delivery, and sealed blobs (the
segments, and a patch from each earlier version that is named, in every format that earns its place). The way back is
`assembly`; `open_release` is that way where memory holds the files.

Blobs are sealed under the key of the version that they make, with the labels `segment:INDEX` and `patch:BASE DIGEST`
(`patch:FORMAT:BASE DIGEST` for formats other than BSDIFF40).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from model_delta.assembly import (
    MemoryRoom,
    check_file,
    patch_label,
    segment_label,
    segments_root,
    write_release,
)
from model_delta.digest import digest_of
from model_delta.encoding import pack
from model_delta.errors import Malformed
from model_delta.graphs.inspection import inspect
from model_delta.keys.encryption import seal_blob
from model_delta.keys.keyring import Keyring
from model_delta.manifest import (
    MANIFEST_TYPE,
    Blob,
    Delivery,
    DenseOffer,
    GoldenCase,
    Lineage,
    Manifest,
    PatchOffer,
    Requirements,
    Segment,
    TensorSpec,
    manifest_digest,
)
from model_delta.patch.access import BytesAccess, RandomAccess
from model_delta.patch.container import FORMATS, make
from model_delta.patch.route import Route
from model_delta.segments import cut, stored_tensors
from model_delta.trust.signing import seal_envelope
from model_delta.version import is_private, show

LIFETIME_S = 400 * 86_400
"""How long a manifest may be used by default: longer than the longest absence that a device may return from."""

DENSE_GAIN = 0.03
"""A patch in a further format is offered when it is smaller than the BSDIFF40 one by more than this share: each offer
makes the delivery larger for every device."""


class Release(msgspec.Struct, frozen=True):
    """What is published: the manifest, its signed envelope's bytes, the delivery, and sealed blobs by digest."""

    manifest: Manifest
    envelope: bytes
    delivery: Delivery
    blobs: dict[str, bytes]

    @property
    def digest(self) -> str:
        """The version's identity."""
        return self.delivery.manifest


def build_release(
    file: bytes,
    *,
    tenant: str,
    model: str,
    version: Mapping[str, int],
    release: int,
    parents: Sequence[tuple[Manifest, bytes]],
    keyring: Keyring,
    key: bytes,
    now: float,
    golden: Sequence[GoldenCase] = (),
    decision_threshold: float = 0.5,
    feature_set: str = "",
    requirements: Requirements | None = None,
    latency_ms_max: float = Requirements().latency_ms_max,
    lineage: Lineage | None = None,
    baseline: str = "",
    lifetime_s: int = LIFETIME_S,
    patch_from: Sequence[tuple[Manifest, bytes]] = (),
    inputs: Sequence[TensorSpec] | None = None,
    outputs: Sequence[TensorSpec] | None = None,
    role: str = "release",
) -> Release:
    """Describe, cut, seal and sign `file` as version `version`, release number `release`, of `model`.

    `parents` are the versions it was made from, each with its file: they enter the lineage and get a patch;
    `patch_from` are further versions that only get a patch. A patch that is no smaller than the whole is left out.
    `key` is this version's artifact key (32 bytes), `now` Unix seconds, `lifetime_s` seconds until the manifest
    expires. `inputs` and `outputs` are read from the ONNX graph unless both are given (a file that is not ONNX needs
    them). `latency_ms_max` is what a device may take for an answer, unless `requirements` say so. `role` signs.
    Raises Malformed for an unusable file and for a device's private branch, and DigestMismatch for a parent whose file
    is not the one in its manifest.
    """
    if is_private(version):
        raise Malformed(
            f"release {release} of {model}: {show(version)} is a device's own branch, which nobody publishes"
        )
    if not file:
        raise Malformed(f"release {release} of {model}: expected a model file, found an empty one")
    if inputs is None or outputs is None:
        info = inspect(file, f"release {release} of {model}")
        inputs, outputs = info.inputs, info.outputs
        requirements = requirements or Requirements(
            opset=info.opset, memory_bytes=2 * len(file), latency_ms_max=latency_ms_max
        )
    pieces = cut(file)
    segments = tuple(Segment(name, len(data), digest_of(data)) for name, data in pieces)
    manifest = Manifest(
        tenant=tenant,
        model=model,
        version=dict(version),
        release=release,
        parents=tuple(manifest_digest(parent) for parent, _ in parents),
        size=len(file),
        file_digest=digest_of(file),
        segments=segments,
        merkle_root=segments_root(segments),
        tensors=stored_tensors(file),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        feature_set=feature_set,
        decision_threshold=decision_threshold,
        requirements=requirements or Requirements(memory_bytes=2 * len(file), latency_ms_max=latency_ms_max),
        golden=tuple(golden),
        lineage=lineage or Lineage(),
        created=int(now),
        expires=int(now) + lifetime_s,
        baseline=baseline,
    )
    payload = pack(manifest)
    digest = digest_of(payload)
    blobs: dict[str, bytes] = {}

    def seal(label: str, plaintext: bytes) -> Blob:
        sealed = seal_blob(key, digest, label, plaintext)
        blob = Blob(digest_of(sealed), len(sealed))
        blobs[blob.digest] = sealed
        return blob

    whole = tuple(seal(segment_label(index), data) for index, (_, data) in enumerate(pieces))
    delivery = Delivery(digest, whole)
    for base, base_file in {manifest_digest(base): (base, data) for base, data in (*parents, *patch_from)}.values():
        offered, sealed = offer_patches(manifest, file, key, base, base_file, sum(blob.size for blob in whole))
        delivery = with_offers(delivery, offered)
        blobs.update(sealed)
    envelope = seal_envelope(keyring.sign(role, MANIFEST_TYPE, payload))
    return Release(manifest, envelope, delivery, blobs)


def offer_patches(
    manifest: Manifest, file: bytes, key: bytes, base: Manifest, base_file: bytes, bytes_max: int
) -> tuple[Delivery, dict[str, bytes]]:
    """A delivery of direct patches from `base` to `manifest`, without segments, and their sealed blobs by digest.

    Every device can apply the BSDIFF40 patch; a patch in another format is beside it when it is smaller by DENSE_GAIN.
    None is offered that is not smaller than `bytes_max`, the whole. Raises DigestMismatch for a file that is not its
    manifest's.
    """
    check_file(base, base_file)
    digest, base_digest = manifest_digest(manifest), manifest_digest(base)
    delivery, blobs = Delivery(digest, ()), dict[str, bytes]()
    if digest == base_digest:
        return delivery, blobs
    sealed_by_format = {
        form: seal_blob(key, digest, patch_label(base_digest, form), make(form, base_file, file)) for form in FORMATS
    }
    first = len(sealed_by_format["bsdiff40"])
    for form, sealed in sealed_by_format.items():
        blob = Blob(digest_of(sealed), len(sealed))
        if blob.size >= bytes_max or (form != "bsdiff40" and blob.size >= (1 - DENSE_GAIN) * first):
            continue
        if form == "bsdiff40":
            added = Delivery(digest, (), (PatchOffer(base_digest, blob),))
        else:
            added = Delivery(digest, (), (), (DenseOffer(base_digest, blob, form),))
        delivery, blobs[blob.digest] = with_offers(delivery, added), sealed
    return delivery, blobs


def with_offers(delivery: Delivery, more: Delivery) -> Delivery:
    """`delivery` with the patches of `more` too."""
    dense = (*(delivery.dense or ()), *(more.dense or ()))
    return msgspec.structs.replace(
        delivery, patches=(*delivery.patches, *more.patches), dense=dense if dense else msgspec.UNSET
    )


def open_release(
    manifest: Manifest,
    route: Route,
    blobs: Mapping[str, bytes],
    keys: Mapping[str, bytes],
    *,
    held: Mapping[str, bytes] | None = None,
    manifests: Mapping[str, Manifest] | None = None,
    pieces: Mapping[str, bytes | RandomAccess] | None = None,
) -> bytes:
    """The checked file of `manifest` in memory, where there is room for it: `assembly.write_release` between bytes."""
    file = write_release(
        manifest,
        route,
        _by_position(blobs),
        keys,
        MemoryRoom(),
        held=_by_position(held or {}),
        manifests=manifests,
        pieces=_by_position(pieces or {}),
    )
    return file.pread(0, file.size)


def _by_position(files: Mapping[str, bytes | RandomAccess] | Mapping[str, bytes]) -> dict[str, RandomAccess]:
    return {name: BytesAccess(file) if isinstance(file, bytes) else file for name, file in files.items()}
