"""From a model file to a release, and back.

`build_release` turns a file into what is published: a signed manifest, an unsigned delivery, and sealed blobs (the
segments, and a patch from each earlier version that is named, in every format that earns its place). `open_release` is
the other end: it walks a route, opens the blobs under the versions' keys, applies patches, puts segments at hand beside
those that came, and returns a file only after size, every segment's digest, the Merkle root and the file's digest have
matched the signed manifest; so do the files in between. There is no other way out of this module for bytes that came
from outside. `pieces_of` says which segments of a file that may be damaged or changed are still the version's.

Blobs are sealed under the key of the version that they make, with the labels `segment:INDEX` and `patch:BASE DIGEST`
(`patch:FORMAT:BASE DIGEST` for formats other than BSDIFF40).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from model_delta import graphs, merkle
from model_delta.digest import digest_of, require_match
from model_delta.encoding import pack
from model_delta.errors import DigestMismatch, Malformed, NotFound
from model_delta.keys.encryption import open_blob, seal_blob
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
from model_delta.patch.container import FORMATS, apply_bytes, make
from model_delta.patch.route import Route, Step
from model_delta.segments import cut, stored_tensors
from model_delta.trust.signing import seal_envelope
from model_delta.version import is_private, show

LIFETIME_S = 400 * 86_400
"""How long a manifest may be used by default: longer than the longest absence that a device may return from."""

DENSE_GAIN = 0.03
"""A patch in a further format is offered when it is smaller than the BSDIFF40 one by more than this share: each offer
makes the delivery larger for every device."""

_PATCH_BYTES_EXTRA = 65_536


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
    them). `role` signs.
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
        info = graphs.inspect(file, f"release {release} of {model}")
        inputs, outputs = info.inputs, info.outputs
        requirements = requirements or Requirements(opset=info.opset, memory_bytes=2 * len(file))
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
        requirements=requirements or Requirements(memory_bytes=2 * len(file)),
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

    whole = tuple(seal(_segment_label(index), data) for index, (_, data) in enumerate(pieces))
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
        form: seal_blob(key, digest, _patch_label(base_digest, form), make(form, base_file, file)) for form in FORMATS
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
    pieces: Mapping[str, bytes | memoryview] | None = None,
) -> bytes:
    """The checked file of `manifest`, by the steps of `route` (see `patch.route.plan_update`).

    `blobs`: sealed bytes by digest, all that the route names. `keys`: artifact key by manifest digest, of every step's
    target. `held`: files at hand by manifest digest; a patch's base, or for a route without steps the file itself.
    `manifests`: verified manifests by digest, of the versions in between on a chain, and of held bases so that a
    damaged base is told from a damaged patch (both optional otherwise). `pieces`: plain segments at hand by digest, for
    the steps that replace the others.

    Raises NotFound for something missing, DigestMismatch for bytes that are not what they are called, Malformed and
    Untrusted for blobs that do not open. After any of these but NotFound the whole route may be tried instead.
    """
    goal = manifest_digest(manifest)
    known = {**(manifests or {}), goal: manifest}
    files = dict(held or {})
    for step in route.steps:
        target = known.get(step.target)
        if target is None or manifest_digest(target) != step.target:
            raise NotFound(f"version {step.target[:16]}…: the route passes through it, its manifest is not at hand")
        key = keys.get(step.target)
        if key is None:
            raise NotFound(f"version {step.target[:16]}… of {target.model}: its key is not at hand; ask for it")
        sealed = [_checked_blob(blob, blobs) for blob in step.blobs]
        if step.kind != "patch":
            file = _join(target, step, sealed, key, pieces or {})
        else:
            base_file = files.get(step.base)
            if base_file is None or len(sealed) != 1:
                raise NotFound(f"version {step.base[:16]}…: the patch's base is not at hand; take the whole route")
            if step.base in known:
                check_file(known[step.base], base_file)
            file = _patched(target, step, base_file, sealed[0], key)
        check_file(target, file)
        files[step.target] = file
    if goal not in files:
        raise NotFound(f"version {goal[:16]}… of {manifest.model}: the route does not lead to it")
    check_file(manifest, files[goal])
    return files[goal]


def check_file(manifest: Manifest, file: bytes) -> None:
    """Raise DigestMismatch unless `file` is the one that `manifest` describes: size, segments, Merkle root, digest."""
    what = f"file of {manifest.model} release {manifest.release}"
    if len(file) != manifest.size:
        raise DigestMismatch(f"{what}: expected {manifest.size} bytes, found {len(file)}")
    view, start = memoryview(file), 0
    for segment in manifest.segments:
        require_match(view[start : start + segment.size], segment.digest, f"{what}, segment {segment.name!r}")
        start += segment.size
    if start != len(file):
        raise DigestMismatch(f"{what}: its segments cover {start} of {len(file)} bytes")
    if segments_root(manifest.segments) != manifest.merkle_root:
        raise DigestMismatch(f"{what}: its segments are not the ones under the manifest's Merkle root")
    require_match(file, manifest.file_digest, what)


def segments_root(segments: Sequence[Segment]) -> str:
    """The Merkle root of a version: leaf i is the 32 bytes of segment i's digest."""
    return merkle.root([bytes.fromhex(segment.digest) for segment in segments])


def pieces_of(manifest: Manifest, file: bytes) -> dict[str, memoryview]:
    """The segments of `file` that are those of `manifest`, by digest, as views; of a damaged file those that are whole.

    The file's tree is walked against the manifest's from the root down. Raises DigestMismatch when the manifest's own
    segments are not under its root.
    """
    tree, parts = _tree(manifest, file)
    theirs = merkle.Tree([bytes.fromhex(segment.digest) for segment in manifest.segments])
    spoilt = set(merkle.differences(tree, manifest.merkle_root, theirs.digests))
    return {
        segment.digest: part
        for index, (segment, part) in enumerate(zip(manifest.segments, parts, strict=True))
        if index not in spoilt
    }


def root_of(manifest: Manifest, file: bytes) -> str:
    """The Merkle root of `file` cut as `manifest` says: the manifest's own unless the file was damaged or changed.

    Bytes behind the last segment belong to it, so that they change the root."""
    return _tree(manifest, file)[0].root


def _tree(manifest: Manifest, file: bytes) -> tuple[merkle.Tree, list[memoryview]]:
    view, start, parts = memoryview(file), 0, []
    for segment in manifest.segments:
        parts.append(view[start : start + segment.size])
        start += segment.size
    if parts and start < len(file):
        parts[-1] = view[start - manifest.segments[-1].size :]
    return merkle.Tree([bytes.fromhex(digest_of(part)) for part in parts]), parts


def _join(
    target: Manifest, step: Step, sealed: Sequence[bytes], key: bytes, pieces: Mapping[str, bytes | memoryview]
) -> bytes:
    """The file out of segments that came and, for a replace, those at hand."""
    numbers = step.segments if step.kind == "replace" else tuple(range(len(target.segments)))
    if len(sealed) != len(numbers) or not set(numbers) <= set(range(len(target.segments))):
        raise Malformed(
            f"version {step.target[:16]}… of {target.model}: expected {len(numbers)} of {len(target.segments)} "
            f"segments, found {len(sealed)} blobs"
        )
    opened: dict[str, bytes | memoryview] = dict(pieces) if step.kind == "replace" else {}
    for index, data in zip(numbers, sealed, strict=True):
        segment = target.segments[index]
        plain = open_blob(key, step.target, _segment_label(index), data, segment.size)
        require_match(plain, segment.digest, f"segment {segment.name!r} of {target.model}")
        opened[segment.digest] = plain
    missing = next((segment for segment in target.segments if segment.digest not in opened), None)
    if missing is not None:
        raise NotFound(f"segment {missing.name!r} of {target.model}: not at hand and not fetched; take the whole route")
    return b"".join(opened[segment.digest] for segment in target.segments)


def _patched(target: Manifest, step: Step, base_file: bytes, sealed: bytes, key: bytes) -> bytes:
    size_max = 2 * (target.size + len(base_file)) + _PATCH_BYTES_EXTRA
    patch = open_blob(key, step.target, _patch_label(step.base, step.format), sealed, size_max)
    return apply_bytes(base_file, patch, target.size)


def _checked_blob(blob: Blob, blobs: Mapping[str, bytes]) -> bytes:
    data = blobs.get(blob.digest)
    if data is None:
        raise NotFound(f"blob {blob.digest[:16]}…: not at hand; fetch it")
    require_match(data, blob.digest, f"blob {blob.digest[:16]}…")
    return data


def _segment_label(index: int) -> str:
    return f"segment:{index}"


def _patch_label(base: str, form: str) -> str:
    """A BSDIFF40 patch's label is older than the other formats and names none."""
    return f"patch:{base}" if form in ("", "bsdiff40") else f"patch:{form}:{base}"
