"""Removes from the store what nothing needs any more; `retention` says what that is.

The order makes every crash harmless. Objects are listed before the ledger is read, so that what is published meanwhile
is not on the list. The versions to give up are marked in the ledger in the same transaction that makes sure that no
plan, round or version was added since; from then on no rollout or round can name them. Then deliveries go, then blobs
and artifacts, each only if it was not written again since it was listed. A crash leaves objects that nothing names,
which the next run removes.

A store belongs to one ledger: the first run writes the ledger's id beside the objects, and a run that finds another id
removes nothing, because it cannot know what that other ledger still needs.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter
from collections.abc import Iterable, Iterator

import msgspec

from fl_coordinator.ledger import Ledger
from fl_coordinator.ports import Clock
from fl_coordinator.recorded_rounds import every_round
from fl_coordinator.retention import KINDS, OpenRound, Roots, Terms, Verdict, Version, unneeded
from fl_coordinator.tables.records import ReleaseRecord
from fl_coordinator.trimming import trim_results
from model_delta.encoding import unpack
from model_delta.errors import Malformed, NotFound, Unavailable
from model_delta.manifest import Delivery, parse_manifest
from model_delta.plan import RolloutPlan
from model_delta.store import InventoriedStore, StoredObject
from model_delta.trust.director import DevicePlan, VersionReport
from model_delta.trust.signing import open_envelope
from monitoring.metrics import Metrics

EVERY_S = 6 * 3600.0
FIRST_S = 600.0
ATTEMPTS = 3
OWNER = ("owner", "ledger")

_log = logging.getLogger("atoll.coordinator")


class Cleaned(msgspec.Struct, frozen=True, kw_only=True):
    """What a run did, or with `dry_run` would have done. `removed` counts objects by kind, `kept` by reason, `retired`
    names the versions that were given up; `unreadable` deliveries kept every blob. `trimmed` counts the rounds whose
    mean and shares left the ledger."""

    dry_run: bool
    freed_bytes: int
    removed: dict[str, int]
    retired: tuple[str, ...]
    kept: dict[str, int]
    unreadable: tuple[str, ...] = ()
    trimmed: int = 0


class Cleaning:
    """Cleans one coordinator's store. Blocking; one run at a time."""

    def __init__(
        self, *, ledger: Ledger, store: InventoriedStore, metrics: Metrics, clock: Clock, terms: Terms | None = None
    ) -> None:
        self._ledger, self._store, self._clock = ledger, store, clock
        self._terms = terms or Terms()
        self._one_at_a_time = threading.Lock()
        self._deliveries: dict[tuple[str, float], Delivery] = {}
        self._baselines: dict[str, str] = {}
        self._freed = metrics.counter("store_freed_bytes", "Bytes removed from the store.", ("kind",))
        self._removed = metrics.counter("store_removed_objects", "Objects removed from the store.", ("kind",))
        self._kept = metrics.gauge("store_kept_objects", "Objects that the last cleaning kept.", ("reason",))
        self._reasons: set[str] = set()

    def run(self, *, dry_run: bool = False) -> Cleaned:
        """Remove what nothing needs; and trim what the ledger has of ended rounds, before their transcripts'
        age is looked at. Raises Malformed for a store of another ledger, Unavailable when versions, plans or rounds
        were added all the time."""
        with self._one_at_a_time:
            self._require_ours(claim=not dry_run)
            trimmed = 0 if dry_run else self._trim()
            for _ in range(ATTEMPTS):
                verdict, seen = self._judge()
                if dry_run:
                    return _told(verdict, verdict.remove, dry_run=True)
                if self._ledger.retire(verdict.retire, seen, self._clock()):
                    return msgspec.structs.replace(self._remove(verdict), trimmed=trimmed)
        raise Unavailable("store: plans, rounds or versions were added while it was looked through; try again")

    def _trim(self) -> int:
        self._ledger.count_sat_out()
        return trim_results(self._ledger, self._store)

    def _judge(self) -> tuple[Verdict, str]:
        objects = [entry for kind in KINDS for entry in self._store.entries(kind)]
        seen = self._ledger.standing()
        deliveries = self._read_deliveries(objects)
        written = {entry.name: entry.modified for entry in objects if entry.kind == "delivery"}
        versions = self._versions(written)
        return unneeded(objects, versions, deliveries, self._roots(), self._terms, self._clock()), seen

    def _remove(self, verdict: Verdict) -> Cleaned:
        removed = []
        for entry in verdict.remove:
            if self._store.remove_unchanged(entry):
                removed.append(entry)
                self._removed.add(1, entry.kind)
                self._freed.add(entry.size, entry.kind)
        for reason in self._reasons - verdict.kept.keys():
            self._kept.set(0, reason)
        self._reasons = set(verdict.kept)
        for reason, count in verdict.kept.items():
            self._kept.set(count, reason)
        if verdict.unreadable:
            _log.warning("store: unreadable deliveries, so no blob was removed: %s", ", ".join(verdict.unreadable))
        return _told(verdict, removed, dry_run=False)

    def _require_ours(self, *, claim: bool) -> None:
        ours = self._ledger.identity()
        try:
            owner = self._store.get(*OWNER).decode(errors="replace")
        except NotFound:
            if claim:
                self._store.put(*OWNER, ours.encode())
            return
        if owner != ours:
            raise Malformed(
                f"store: expected one of ledger {ours}, found one of ledger {owner[:32]}: give each coordinator a "
                f"place of its own, or remove the object {'/'.join(OWNER)} if that ledger is gone for good"
            )

    def _read_deliveries(self, objects: list[StoredObject]) -> dict[str, Delivery | None]:
        """All deliveries by name; read once each, since one that is there does not change."""
        known, self._deliveries = self._deliveries, {}
        found: dict[str, Delivery | None] = {}
        for entry in (entry for entry in objects if entry.kind == "delivery"):
            key = (entry.name, entry.modified)
            try:
                self._deliveries[key] = known.get(key) or unpack(self._store.get("delivery", entry.name), Delivery)
                found[entry.name] = self._deliveries[key]
            except NotFound:
                continue
            except Malformed:
                found[entry.name] = None
        return found

    def _versions(self, written: dict[str, float]) -> list[Version]:
        releases = self._ledger.releases()
        withdrawn = {digest for model in {one.model for one in releases} for digest in self._ledger.withdrawn(model)}
        retired = self._ledger.retired()
        return [
            Version(
                manifest=one.manifest,
                model=one.model,
                release=one.release,
                version=one.version,
                parents=one.parents,
                # A version may be dated back; what counts is when devices could first have had it.
                published=max(one.created, written.get(one.manifest, 0.0)),
                source_blob=one.source_blob,
                baseline=self._baseline(one),
                withdrawn=one.manifest in withdrawn,
                retired=one.manifest in retired,
            )
            for one in releases
        ]

    def _baseline(self, record: ReleaseRecord) -> str:
        if record.manifest not in self._baselines:
            envelope = self._store.get("manifest", record.manifest)
            self._baselines[record.manifest] = parse_manifest(open_envelope(envelope).payload).baseline
        return self._baselines[record.manifest]

    def _roots(self) -> Roots:
        rounds = every_round(self._ledger)
        running: dict[str, float] = {}
        for digest, heard in self._positions():
            running[digest] = max(heard, running.get(digest, 0.0))
        return Roots(
            plans=[unpack(open_envelope(envelope).payload, RolloutPlan) for envelope in self._ledger.plans()],
            stable=[self._ledger.stable(model) for model in self._ledger.planned_models()],
            rounds=[OpenRound(one.task.base, one.task.training_graph, one.candidate) for one in rounds if one.live],
            ended_graphs=frozenset(one.task.training_graph for one in rounds if not one.live),
            ended_transcripts=frozenset(one.transcript for one in rounds if not one.live),
            running=running,
        )

    def _positions(self) -> Iterator[tuple[str, float]]:
        """Versions that devices run, hold, or were told to go over, each with when the device was heard."""
        for device in self._ledger.devices():
            yield device.running, device.last_seen
        for told in self._ledger.all_directed():
            with contextlib.suppress(Malformed):  # signed when it was taken in; an older form says nothing here
                report = unpack(open_envelope(told.report).payload, VersionReport)
                for digest in (report.wanted, report.running, *(file.manifest for file in report.held)):
                    yield digest, told.heard
            if told.plan:
                with contextlib.suppress(Malformed):
                    plan = unpack(open_envelope(told.plan).payload, DevicePlan)
                    for step in plan.steps:
                        yield from ((step.base, plan.expires), (step.target, plan.expires))


def _told(verdict: Verdict, removed: Iterable[StoredObject], *, dry_run: bool) -> Cleaned:
    removed = list(removed)
    return Cleaned(
        dry_run=dry_run,
        freed_bytes=sum(entry.size for entry in removed),
        removed=dict(Counter(entry.kind for entry in removed)),
        retired=verdict.retire,
        kept=dict(verdict.kept),
        unreadable=verdict.unreadable,
    )
