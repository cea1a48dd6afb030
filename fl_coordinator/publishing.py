"""From a file that somebody hands in to a version that devices may be told to run.

`Publisher.publish` inspects the ONNX file, quantizes it with its parent's scales (so that the delta stays small),
records what it answers to golden inputs, and builds the release: signed manifest, sealed segments, patches from the
versions that devices may still run. Everything goes to the store under its digest before the ledger names it; a crash
in between leaves objects that nothing refers to, and the next attempt starts over. The same bytes on the same parent
are the same version, however often they are handed in. `forming` makes the files, `published` reads versions back.

`join_siblings` ends a split: where two regions released apart, one more release contains both.

The bytes as handed in (for our own model: the float32 master weights) are kept too, sealed under the version's key: a
federated round adds its update to them, not to their rounded form.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence

import msgspec

from fl_coordinator.forming import Forming, GoldenInputs, LatenciesUs, OpenModel
from fl_coordinator.forms import Asked, Form
from fl_coordinator.joining import merge_updates
from fl_coordinator.ledger import Ledger
from fl_coordinator.published import MODEL_BYTES_MAX, SOURCE_LABEL, Published, require_names
from fl_coordinator.tables.records import ReleaseRecord
from fl_coordinator.version_keys import VersionKeys
from model_delta.digest import digest_of, require_digest
from model_delta.encoding import pack
from model_delta.errors import Malformed, NotFound, Untrusted
from model_delta.graphs.inspection import inspect, require_features
from model_delta.keys.encryption import seal_blob
from model_delta.keys.keyring import Keyring
from model_delta.manifest import GoldenCase, Lineage, Manifest, Requirements, Segment
from model_delta.patch.quantization import Worth
from model_delta.release import LIFETIME_S, Release, build_release
from model_delta.store import ArtifactStore
from model_delta.version import Dot, dot_of, increment, joined, merge, show, siblings, winner

PATCHES_FROM = 3
"""From how many earlier versions the delivery itself offers a patch."""

_log = logging.getLogger("atoll.coordinator")


class Candidate(msgspec.Struct, frozen=True):
    """A file ready to be released, and the manifest as far as it is known before golden cases and signature."""

    draft: Manifest
    file: bytes
    form: Form | None = None


class Publisher(Published):
    """Makes and reads releases of one tenant. Blocking; one publication, or change of `keys`, at a time."""

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
        vouch: Callable[[], None] = lambda: None,
        latencies_us: LatenciesUs | None = None,
        worth: Mapping[str, Worth] | None = None,
    ) -> None:
        """`region` is whose counter of the version vector a publication raises; `feature_counts` says for which models
        the input must be `features` of that width; `vouch` is called after every publication, before anybody can
        roll it out. `latencies_us` measures both forms of a version, and `worth` by device class says what it must gain
        to be int8 (see `forms`); unmeasured it always is."""
        super().__init__(tenant=tenant, ledger=ledger, store=store, keyring=keyring)
        self._region = region
        self._forming = Forming(
            published=self,
            ledger=ledger,
            open_model=open_model,
            golden_inputs=golden_inputs,
            latencies_us=latencies_us,
            worth=worth or {},
        )
        self._feature_counts = dict(feature_counts)
        self._vouch = vouch
        self._one_at_a_time = threading.Lock()
        self.keys = VersionKeys(
            ledger=ledger, keyring=keyring, context=self._context, one_at_a_time=self._one_at_a_time
        )

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
        provenance: str = "",
        lifetime_s: int = LIFETIME_S,
        quantize: Asked = "",
        latency_ms_max: float | None = None,
    ) -> ReleaseRecord:
        """Make a version of `source` and return it, or the version that these bytes on this parent already are.

        `parent` is a manifest digest; by default the stable version, else the newest that is not withdrawn. Threshold,
        feature set, baseline and `latency_ms_max` (an answer that takes a device longer is a slow one) are the parent's
        unless given. `now` dates the version, `lifetime_s` seconds later it
        expires on every device. `provenance` is the digest of a signature bundle that was checked, and lies in the
        store as an artifact. Raises Malformed for an unusable file, parent or name, and
        StorageFull with nothing published. `quantize`: see `forms`.
        """
        require_names(model, name)
        with self._one_at_a_time:
            base = self._parent(model, parent)
            digest = digest_of(source)
            asked = {
                "decision_threshold": decision_threshold,
                "feature_set": feature_set,
                "baseline": baseline,
                "latency_ms_max": latency_ms_max,
            }
            if base is not None and base.source == digest:
                self._require_same(base, name, asked, provenance, quantize)
                return base
            if provenance and not self._store.has("artifact", require_digest(provenance, "provenance")):
                raise NotFound(f"provenance {provenance[:16]}…: the bundle is not in the store; put it there first")
            known = self._ledger.release_from(model, digest, base.manifest if base else "")
            if known is not None:
                if not known.wrapped_key:
                    raise Malformed(f"model {model}: these bytes were version {known.release}, which was shredded")
                if known.manifest in self._ledger.retired():
                    raise Malformed(
                        f"model {model}: these bytes were version {known.release}, which nothing needed any more, so "
                        "its files were removed from the store; train it anew, or publish it with another --parent"
                    )
                withdrawn = self._ledger.withdrawn(model).get(known.manifest)
                if withdrawn is not None:
                    raise Malformed(
                        f"model {model}: these bytes were version {known.release}, which was withdrawn ({withdrawn}); "
                        "train it anew, or publish it with another --parent"
                    )
                self._require_same(known, name, asked, provenance, quantize)
                return known
            candidate = self.prepare(
                source, model=model, now=now, parent=base.manifest if base else None, quantize=quantize
            )
            before = self.manifest(base.manifest) if base is not None else None
            threshold = (
                decision_threshold if decision_threshold is not None else before.decision_threshold if before else 0.5
            )
            golden, form = self._golden(candidate.draft, candidate.file, candidate.form)
            key, _ = self._keyring.new_key(self._context("new"))  # made where the keys are; bound to its digest below
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
                golden=golden,
                decision_threshold=threshold,
                feature_set=feature_set if feature_set is not None else before.feature_set if before else "",
                baseline=baseline if baseline is not None else before.baseline if before else "",
                latency_ms_max=_latency_of(before) if latency_ms_max is None else latency_ms_max,
                lineage=_with_provenance(lineage, provenance),
                lifetime_s=lifetime_s,
            )
            return self._commit(release, source, key, model=model, name=name, now=now, form=form)

    def join_siblings(self, *, model: str, now: float, name: str = "") -> ReleaseRecord:
        """One release that contains all siblings of `model`: those that no other release contains and that are not
        withdrawn. Its parents are the siblings, the winner first.

        Where they changed only weights of one common parent, their updates are added and quantized with its scales;
        else the winner's file stands, byte for byte. Raises Malformed when there is nothing to join, and as `publish`.
        """
        require_names(model, name)
        with self._one_at_a_time:
            every = {record.manifest: record for record in self._ledger.releases(model)}
            withdrawn = self._ledger.withdrawn(model)
            apart = siblings({digest: record.version for digest, record in every.items() if digest not in withdrawn})
            if len(apart) < 2:
                contained = show(every[apart[0]].version) if apart else "none"
                raise Malformed(
                    f"model {model}: expected releases made apart, found one that contains all: {contained}"
                )
            dots = {digest: self._dot(every, digest) for digest in apart}
            first = every[winner(dots)]
            parents = [first, *(every[digest] for digest in apart if digest != first.manifest)]
            before = self.manifest(first.manifest)
            source, file, how, form = self._joined_file(parents, before)
            key, _ = self._keyring.new_key(self._context("new"))  # made where the keys are; bound to its digest below
            counted = max(record.version.get(self._region, 0) for record in every.values())
            draft = msgspec.structs.replace(
                before,
                version=joined((record.version for record in parents), self._region, counted),
                release=max(record.release for record in every.values()) + 1,
            )
            golden, form = self._golden(draft, file, form)
            release = build_release(
                file,
                tenant=self._tenant,
                model=model,
                version=draft.version,
                release=draft.release,
                parents=[(self.manifest(parent.manifest), self.file(parent.manifest)) for parent in parents],
                keyring=self._keyring,
                key=key,
                now=now,
                golden=golden,
                decision_threshold=before.decision_threshold,
                feature_set=before.feature_set,
                baseline=before.baseline,
                latency_ms_max=_latency_of(before),
                lineage=Lineage(code=f"join of {', '.join(str(dots[parent.manifest]) for parent in parents)}: {how}"),
            )
            return self._commit(release, source, key, model=model, name=name, now=now, form=form)

    def _joined_file(self, parents: Sequence[ReleaseRecord], like: Manifest) -> tuple[bytes, bytes, str, Form | None]:
        """What the joining release is made of: source, the file that devices run, how it came about in words, and its
        form."""
        bases = {parent.parents for parent in parents}
        if len(bases) == 1 and len(parents[0].parents) == 1:
            (base,) = parents[0].parents
            merged = merge_updates(self.source(base), [self.source(parent.manifest) for parent in parents])
            if merged is not None:
                file, form = self._forming.formed(merged, like, self._ledger.release(base), asked="")
                return merged, file, "updates added", form
        first = parents[0]
        return self.source(first.manifest), self.file(first.manifest), "the first one's file", first.form

    def _dot(self, every: Mapping[str, ReleaseRecord], digest: str) -> Dot:
        record = every[digest]
        return dot_of(record.version, [every[parent].version for parent in record.parents if parent in every])

    def prepare(self, source: bytes, *, model: str, now: float, parent: str | None, quantize: Asked = "") -> Candidate:
        """The file that would be released for `source`, quantized with the scales of `parent`; nothing is stored."""
        if len(source) > MODEL_BYTES_MAX:
            raise Malformed(f"model {model}: expected at most {MODEL_BYTES_MAX} bytes, found {len(source)}")
        base = self._ledger.release(parent) if parent is not None else None
        what = f"model {model}"
        info = inspect(source, what)
        if model in self._feature_counts:
            require_features(info, self._feature_counts[model], what)
        releases = self._ledger.releases(model)
        version = merge(base.version if base is not None else {}, {})
        # The region's counter counts all of its publications, so that two versions on one parent do not share a vector.
        counted = max((record.version.get(self._region, 0) for record in releases), default=0)
        version = increment({**version, self._region: counted}, self._region)
        draft = Manifest(
            tenant=self._tenant,
            model=model,
            version=version,
            release=max((record.release for record in releases), default=0) + 1,
            parents=(base.manifest,) if base is not None else (),
            size=0,
            file_digest="",
            segments=(),
            merkle_root="",
            inputs=info.inputs,
            outputs=info.outputs,
            created=int(now),
            expires=int(now) + 86_400,
        )
        file, form = self._forming.formed(source, draft, base, quantize)
        digest = digest_of(file)
        described = msgspec.structs.replace(
            draft, size=len(file), file_digest=digest, segments=(Segment("file", len(file), digest),)
        )
        return Candidate(described, file, form)

    def _golden(self, draft: Manifest, file: bytes, form: Form | None) -> tuple[tuple[GoldenCase, ...], Form | None]:
        """The golden cases of a file, and its form, which tells why when there are none."""
        golden, untried = self._forming.golden(draft, file, scored=draft.model in self._feature_counts)
        return golden, msgspec.structs.replace(form, untried=untried) if form is not None and untried else form

    def _require_same(
        self, known: ReleaseRecord, name: str, asked: Mapping[str, object], provenance: str, quantize: Asked
    ) -> None:
        """Raise Malformed where bytes that are a version already are asked for with anything else than it has: what it
        is called and what its manifest says stand for good. `asked`: manifest fields by name, None for any."""
        manifest = self.manifest(known.manifest)
        holders = {"name": known, "latency_ms_max": manifest.requirements}
        found = {field: getattr(holders.get(field, manifest), field) for field in ("name", *asked)}
        for field, wanted in {"name": name or None, **asked}.items():
            if wanted is not None and wanted != found[field]:
                raise Malformed(
                    f"model {known.model}: these bytes are version {known.release} already, with {field} "
                    f"{found[field]!r}, found {wanted!r}; a version does not change: leave it out, or train it anew"
                )
        self._forming.require_form(known, quantize)
        self._require_provenance(known, provenance)

    def _require_provenance(self, known: ReleaseRecord, provenance: str) -> None:
        """Raise Malformed where bytes that are a version already come with another signature: its manifest is signed
        and says where it came from for good."""
        there = self.manifest(known.manifest).lineage.provenance or ""
        if provenance and provenance != there:
            raise Malformed(
                f"model {known.model}: these bytes are version {known.release} already, published with "
                f"{'signature ' + there[:16] + '…' if there else 'no signature'}; a signature cannot be added to it"
            )

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
        others = [one.manifest for one in self._ledger.releases(model) if one != parent and one.wrapped_key]
        chosen = dict.fromkeys(others[-(PATCHES_FROM - 1) :])
        stable = self._ledger.stable(model)
        if stable and (parent is None or stable != parent.manifest):
            chosen[stable] = None
        return [base for digest in chosen if (base := self._readable(digest)) is not None]

    def _readable(self, digest: str) -> tuple[Manifest, bytes] | None:
        """A version and its file; None for one whose file or key is gone: no patch can start there any more."""
        try:
            return self.manifest(digest), self.file(digest)
        except (NotFound, Untrusted) as error:
            _log.info("no patch from %s: %s", digest[:12], error)
            return None

    def _commit(
        self,
        release: Release,
        source: bytes,
        key: bytes,
        *,
        model: str,
        name: str,
        now: float,
        form: Form | None,
    ) -> ReleaseRecord:
        manifest = release.manifest
        source_digest = digest_of(source)
        sealed_source = seal_blob(key, release.digest, SOURCE_LABEL, source)
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
            form=form,
        )
        self._ledger.add_release(record)
        if not self._store.has("root", manifest.merkle_root):
            self._store.put("root", manifest.merkle_root, release.digest.encode())
        self._vouch()
        return record


def _latency_of(before: Manifest | None) -> float:
    return (before.requirements if before is not None else Requirements()).latency_ms_max


def _with_provenance(lineage: Lineage | None, provenance: str) -> Lineage | None:
    return msgspec.structs.replace(lineage or Lineage(), provenance=provenance) if provenance else lineage
