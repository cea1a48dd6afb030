"""From a file that somebody hands in to a version that devices may be told to run.

`Publisher.publish` inspects the ONNX file, quantizes it with its parent's scales (so that the delta stays small),
records what it answers to golden inputs, and builds the release: signed manifest, sealed segments, patches from the
versions that devices may still run. Everything goes to the store under its digest before the ledger names it; a crash
in between leaves objects that nothing refers to, and the next attempt starts over. The same bytes on the same parent
are the same version, however often they are handed in.

The bytes as handed in (for our own model: the float32 master weights) are kept too, sealed under the version's key: a
federated round adds its update to them, not to their rounded form.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from fl_coordinator.ledger import Ledger, ReleaseRecord
from model_delta import graphs
from model_delta.digest import digest_of
from model_delta.encoding import pack, unpack
from model_delta.errors import AtollError, Malformed, NotFound
from model_delta.keys.encryption import new_key, open_blob, seal_blob
from model_delta.keys.keyring import Keyring
from model_delta.manifest import (
    Delivery,
    GoldenCase,
    Lineage,
    Manifest,
    Segment,
    Tensor,
    TensorSpec,
    parse_manifest,
)
from model_delta.patch.route import plan_update
from model_delta.release import LIFETIME_S, Release, build_release, open_release
from model_delta.store import ArtifactStore
from model_delta.trust.signing import open_envelope
from model_delta.version import increment, merge

MODEL_BYTES_MAX = 512 * 2**20
PATCHES_FROM = 3
"""From how many earlier versions a patch is offered; devices further behind take a chain or the whole."""

_SOURCE_LABEL = "source"

Array = npt.NDArray[np.generic]


class LoadedModel(Protocol):
    """A model that answers; see the programs that run one."""

    digest: str

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Named tensors to named tensors."""


OpenModel = Callable[[Manifest, bytes], LoadedModel]
GoldenInputs = Callable[[str, Sequence[TensorSpec]], Sequence[Mapping[str, Array]]]
"""(model, its inputs) -> a few batches of inputs that a publisher wants every device to try."""


class Candidate(msgspec.Struct, frozen=True):
    """A file ready to be released, and the manifest as far as it is known before golden cases and signature."""

    draft: Manifest
    file: bytes


class Publisher:
    """Makes and reads releases of one tenant. Blocking; one publication at a time."""

    def __init__(
        self,
        *,
        tenant: str,
        region: str,
        ledger: Ledger,
        store: ArtifactStore,
        keyring: Keyring,
        open_model: OpenModel,
        golden_inputs: GoldenInputs,
        feature_counts: Mapping[str, int],
    ) -> None:
        """`region` is whose counter of the version vector a publication raises; `feature_counts` says for which models
        the input must be `features` of that width."""
        self._tenant = tenant
        self._region = region
        self._ledger = ledger
        self._store = store
        self._keyring = keyring
        self._open_model = open_model
        self._golden_inputs = golden_inputs
        self._feature_counts = dict(feature_counts)
        self._one_at_a_time = threading.Lock()

    def publish(
        self,
        source: bytes,
        *,
        model: str,
        now: float,
        name: str = "",
        parent: str | None = None,
        decision_threshold: float | None = None,
        feature_set: str | None = None,
        baseline: str | None = None,
        lineage: Lineage | None = None,
        lifetime_s: int = LIFETIME_S,
    ) -> ReleaseRecord:
        """Make a version of `source` and return it, or the version that these bytes on this parent already are.

        `parent` is a manifest digest; by default the stable version, else the newest that is not withdrawn. Threshold,
        feature set and baseline are the parent's unless given. `now` dates the version, `lifetime_s` seconds later it
        expires on every device. Raises Malformed for an unusable file or parent, and
        StorageFull with nothing published.
        """
        with self._one_at_a_time:
            base = self._parent(model, parent)
            digest = digest_of(source)
            if base is not None and base.source == digest:
                return base
            known = self._ledger.release_from(model, digest, base.manifest if base else "")
            if known is not None:
                return known
            candidate = self.prepare(source, model=model, now=now, parent=base.manifest if base else None)
            before = self.manifest(base.manifest) if base is not None else None
            threshold = (
                decision_threshold if decision_threshold is not None else before.decision_threshold if before else 0.5
            )
            key = new_key()
            release = build_release(
                candidate.file,
                tenant=self._tenant,
                model=model,
                version=candidate.draft.version,
                release=candidate.draft.release,
                parents=[(before, self.file(base.manifest))] if base is not None and before is not None else [],
                patch_from=self._patch_bases(model, base),
                keyring=self._keyring,
                key=key,
                now=now,
                golden=self._golden(candidate),
                decision_threshold=threshold,
                feature_set=feature_set if feature_set is not None else before.feature_set if before else "",
                baseline=baseline if baseline is not None else before.baseline if before else "",
                lineage=lineage,
                lifetime_s=lifetime_s,
            )
            return self._commit(release, source, key, model=model, name=name, now=now)

    def prepare(self, source: bytes, *, model: str, now: float, parent: str | None) -> Candidate:
        """The file that would be released for `source`, quantized with the scales of `parent`; nothing is stored."""
        if len(source) > MODEL_BYTES_MAX:
            raise Malformed(f"model {model}: expected at most {MODEL_BYTES_MAX} bytes, found {len(source)}")
        base = self._ledger.release(parent) if parent is not None else None
        what = f"model {model}"
        info = graphs.inspect(source, what)
        if model in self._feature_counts:
            graphs.require_features(info, self._feature_counts[model], what)
        file = graphs.quantize_weights(source, self.file(base.manifest) if base is not None else None)
        releases = self._ledger.releases(model)
        version = merge(base.version if base is not None else {}, {})
        # The region's counter counts all of its publications, so that two versions on one parent do not share a vector.
        counted = max((record.version.get(self._region, 0) for record in releases), default=0)
        version = increment({**version, self._region: counted}, self._region)
        digest = digest_of(file)
        return Candidate(
            Manifest(
                tenant=self._tenant,
                model=model,
                version=version,
                release=max((record.release for record in releases), default=0) + 1,
                parents=(base.manifest,) if base is not None else (),
                size=len(file),
                file_digest=digest,
                segments=(Segment("file", len(file), digest),),
                merkle_root="",
                inputs=info.inputs,
                outputs=info.outputs,
                created=int(now),
                expires=int(now) + 86_400,
            ),
            file,
        )

    def manifest(self, manifest: str) -> Manifest:
        """A published manifest. Raises NotFound."""
        return parse_manifest(open_envelope(self._store.get("manifest", manifest)).payload)

    def delivery(self, manifest: str) -> Delivery:
        """What carries a published version. Raises NotFound."""
        return unpack(self._store.get("delivery", manifest), Delivery)

    def key(self, manifest: str) -> bytes:
        """The artifact key of a published version. Raises NotFound, Untrusted."""
        record = self._ledger.release(manifest)
        return self._keyring.unwrap(self._context(manifest), record.wrapped_key)

    def file(self, manifest: str) -> bytes:
        """The plain, checked file that devices run. Raises NotFound, Untrusted, Malformed."""
        described, delivery = self.manifest(manifest), self.delivery(manifest)
        route = plan_update({}, described, {manifest: msgspec.structs.replace(delivery, patches=())})
        blobs = {blob.digest: self._store.get("blob", blob.digest) for step in route.steps for blob in step.blobs}
        return open_release(described, route, blobs, {manifest: self.key(manifest)})

    def source(self, manifest: str) -> bytes:
        """The bytes that the publisher handed in. Raises NotFound, Untrusted."""
        record = self._ledger.release(manifest)
        sealed = self._store.get("blob", record.source_blob)
        return open_blob(self.key(manifest), manifest, _SOURCE_LABEL, sealed, MODEL_BYTES_MAX)

    def resolve(self, model: str, wanted: str) -> ReleaseRecord:
        """The version called `wanted`: a manifest digest, a release number, a name, or `latest`. Raises NotFound."""
        releases = self._ledger.releases(model)
        withdrawn = self._ledger.withdrawn(model)
        if wanted == "latest":
            found = [record for record in releases if record.manifest not in withdrawn]
        else:
            found = [record for record in releases if wanted in (record.manifest, str(record.release), record.name)]
        if not found:
            listed = ", ".join(f"{record.release} {record.name}".strip() for record in releases[-5:]) or "none"
            raise NotFound(f"version {wanted!r} of model {model!r}: not published; the newest releases are: {listed}")
        return found[-1]

    def _parent(self, model: str, wanted: str | None) -> ReleaseRecord | None:
        if wanted is not None:
            record = self._ledger.release(wanted)
            if record.model != model:
                raise Malformed(f"parent {wanted[:16]}…: expected a version of {model}, found one of {record.model}")
            return record
        stable = self._ledger.stable(model)
        if stable:
            return self._ledger.release(stable)
        withdrawn = self._ledger.withdrawn(model)
        return next((r for r in reversed(self._ledger.releases(model)) if r.manifest not in withdrawn), None)

    def _patch_bases(self, model: str, parent: ReleaseRecord | None) -> list[tuple[Manifest, bytes]]:
        """The versions that devices may be on: the stable one, and the newest (withdrawn ones too, since devices that
        ran them have to come back)."""
        others = [record.manifest for record in self._ledger.releases(model) if record != parent]
        chosen = dict.fromkeys(others[-(PATCHES_FROM - 1) :])
        stable = self._ledger.stable(model)
        if stable and (parent is None or stable != parent.manifest):
            chosen[stable] = None
        return [(self.manifest(digest), self.file(digest)) for digest in chosen]

    def _golden(self, candidate: Candidate) -> tuple[GoldenCase, ...]:
        loaded = self._open_model(candidate.draft, candidate.file)
        cases = []
        for inputs in self._golden_inputs(candidate.draft.model, candidate.draft.inputs):
            outputs = loaded.run(inputs)
            if not all(np.isfinite(value).all() for value in outputs.values()):
                raise Malformed(
                    f"model {candidate.draft.model}: answers a golden input with a number that is not finite"
                )
            cases.append(GoldenCase(_tensors(inputs), _tensors(outputs)))
        return tuple(cases)

    def _commit(
        self, release: Release, source: bytes, key: bytes, *, model: str, name: str, now: float
    ) -> ReleaseRecord:
        manifest = release.manifest
        source_digest = digest_of(source)
        sealed_source = seal_blob(key, release.digest, _SOURCE_LABEL, source)
        source_blob = digest_of(sealed_source)
        self._store_all(
            {
                **{("blob", digest): data for digest, data in release.blobs.items()},
                ("blob", source_blob): sealed_source,
                ("delivery", release.digest): pack(release.delivery),
                ("manifest", release.digest): release.envelope,
            }
        )
        record = ReleaseRecord(
            manifest=release.digest,
            model=model,
            name=name,
            version=manifest.version,
            release=manifest.release,
            parents=manifest.parents,
            created=now,
            source=source_digest,
            source_blob=source_blob,
            wrapped_key=self._keyring.wrap(self._context(release.digest), key),
            file_bytes=manifest.size,
            bytes_whole=sum(blob.size for blob in release.delivery.segments),
            bytes_patch={offer.base: offer.blob.size for offer in release.delivery.patches},
            round_id=manifest.lineage.round_id,
        )
        self._ledger.add_release(record)
        return record

    def _store_all(self, objects: Mapping[tuple[str, str], bytes]) -> None:
        """Keep every object or, when the disk is full, none that was not there before."""
        new = [place for place in objects if not self._store.has(*place)]
        try:
            for (kind, name), data in objects.items():
                self._store.put(kind, name, data)
        except AtollError:
            for kind, name in new:
                self._store.remove(kind, name)
            raise

    def _context(self, manifest: str) -> str:
        return f"{self._tenant}/{manifest}"


def _tensors(values: Mapping[str, Array]) -> dict[str, Tensor]:
    tensors = {}
    for name, value in values.items():
        array = np.ascontiguousarray(value)
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        tensors[name] = Tensor(array.dtype.name, tuple(array.shape), little.tobytes())
    return tensors
