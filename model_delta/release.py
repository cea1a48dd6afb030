"""From a model file to a release, and back.

`build_release` turns a file into what is published: a signed manifest, an unsigned delivery, and sealed blobs (the
segments, and a patch from each earlier version that is named). `open_release` is the other end: it walks a route, opens
the blobs under the versions' keys, applies patches, and returns a file only after size, every segment's digest, the
Merkle root and the file's digest have matched the signed manifest; so do the files in between. There is no other way
out of this module for bytes that came from outside.

Blobs are sealed under the key of the version that they make, with the labels `segment:INDEX` and `patch:BASE DIGEST`.
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
    GoldenCase,
    Lineage,
    Manifest,
    PatchOffer,
    Requirements,
    Segment,
    TensorSpec,
    manifest_digest,
)
from model_delta.patch.bsdiff import apply_patch, make_patch
from model_delta.patch.route import Route, Step
from model_delta.segments import cut, stored_tensors
from model_delta.trust.signing import seal_envelope

LIFETIME_S = 400 * 86_400
"""How long a manifest may be used by default: longer than the longest absence that a device may return from."""

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
    Raises Malformed for an unusable file, and DigestMismatch for a parent whose file is not the one in its manifest.
    """
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
    patches = []
    bases = {manifest_digest(base): (base, data) for base, data in (*parents, *patch_from)}
    for base_digest, (base, base_file) in bases.items():
        check_file(base, base_file)
        if base_digest == digest:
            continue
        sealed = seal_blob(key, digest, _patch_label(base_digest), make_patch(base_file, file))
        if len(sealed) < sum(blob.size for blob in whole):
            blobs[digest_of(sealed)] = sealed
            patches.append(PatchOffer(base_digest, Blob(digest_of(sealed), len(sealed))))
    envelope = seal_envelope(keyring.sign(role, MANIFEST_TYPE, payload))
    return Release(manifest, envelope, Delivery(digest, whole, tuple(patches)), blobs)


def open_release(
    manifest: Manifest,
    route: Route,
    blobs: Mapping[str, bytes],
    keys: Mapping[str, bytes],
    *,
    held: Mapping[str, bytes] | None = None,
    manifests: Mapping[str, Manifest] | None = None,
) -> bytes:
    """The checked file of `manifest`, by the steps of `route` (see `patch.route.plan_update`).

    `blobs`: sealed bytes by digest, all that the route names. `keys`: artifact key by manifest digest, of every step's
    target. `held`: files at hand by manifest digest; a patch's base, or for a route without steps the file itself.
    `manifests`: verified manifests by digest, of the versions in between on a chain, and of held bases so that a
    damaged base is told from a damaged patch (both optional otherwise).

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
        if step.kind == "whole":
            file = _join(target, step, sealed, key)
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


def _join(target: Manifest, step: Step, sealed: Sequence[bytes], key: bytes) -> bytes:
    if len(sealed) != len(target.segments):
        raise Malformed(
            f"version {step.target[:16]}… of {target.model}: expected {len(target.segments)} segments, "
            f"found {len(sealed)} blobs"
        )
    parts = []
    for index, (segment, data) in enumerate(zip(target.segments, sealed, strict=True)):
        plain = open_blob(key, step.target, _segment_label(index), data, segment.size)
        require_match(plain, segment.digest, f"segment {segment.name!r} of {target.model}")
        parts.append(plain)
    return b"".join(parts)


def _patched(target: Manifest, step: Step, base_file: bytes, sealed: bytes, key: bytes) -> bytes:
    size_max = 2 * (target.size + len(base_file)) + _PATCH_BYTES_EXTRA
    patch = open_blob(key, step.target, _patch_label(step.base), sealed, size_max)
    return apply_patch(base_file, patch, target.size)


def _checked_blob(blob: Blob, blobs: Mapping[str, bytes]) -> bytes:
    data = blobs.get(blob.digest)
    if data is None:
        raise NotFound(f"blob {blob.digest[:16]}…: not at hand; fetch it")
    require_match(data, blob.digest, f"blob {blob.digest[:16]}…")
    return data


def _segment_label(index: int) -> str:
    return f"segment:{index}"


def _patch_label(base: str) -> str:
    return f"patch:{base}"
