"""Which stored objects nothing needs any more: a rule over values.

A version is needed while one of these holds, and the first that does is its reason:

    plan       a signed plan names it as target or stable (what the control arm runs, and where a rollback leads): one
               that has not expired, the newest of its model, or one that was in force within the window
    stable     everybody may fall back to it
    round      an open round trains from it or made it
    window     it was published within the compatibility window
    running    a device that was heard within the window runs it, holds it or was told to go over it
    siblings   it waits to be joined with another one, or is the version that both come from
    newest     the next publication starts from it
    chain      patches lead over it from one version that devices run, or may be told to, to another

With a version its delivery, all blobs that this names, the publisher's bytes and the baseline are needed. A direct
patch for late devices is needed while both its ends are. Manifests, the look-up by root and TUF metadata are the
history of what was signed: they are small and never removed.

The transcript of a round that has ended is needed for as long as the terms say: it is what the round can be replayed
from, and as long as three models; what later rounds need of it is in the ledger (`trimming`).

Only what is recognised is removed: deliveries of recorded versions, blobs that no delivery names, training graphs and
transcripts of ended rounds, baselines of versions that are not needed. All else is kept and counted as unrecognised.
Whatever was written within the grace period is kept, since a publication in progress stores blobs before anything names
them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from model_delta.manifest import Delivery, late_delivery_name
from model_delta.plan import RolloutPlan
from model_delta.store import StoredObject
from model_delta.version import siblings

DAY_S = 86_400.0
TRANSCRIPT = "transcript"
KINDS = ("delivery", "blob", "artifact", TRANSCRIPT)
"""What may be removed, in the order in which it must be: a crash in between leaves nothing that names what is gone."""

_DIGEST = re.compile(r"[0-9a-f]{64}")


class Terms(msgspec.Struct, frozen=True):
    """How long versions stay without another reason (the compatibility window), objects that nothing names, and whole
    transcripts of rounds."""

    window_s: float = 90 * DAY_S
    grace_s: float = DAY_S
    transcripts_s: float = 400 * DAY_S


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """A recorded release. `published` is when its delivery was written; `retired` says that it was given up before."""

    manifest: str
    model: str
    release: int
    version: Mapping[str, int]
    parents: tuple[str, ...]
    published: float
    source_blob: str
    baseline: str = ""
    withdrawn: bool = False
    retired: bool = False


class OpenRound(msgspec.Struct, frozen=True):
    """A round that still has something to do: base and candidate by manifest digest, its training graph's digest."""

    base: str
    graph: str
    candidate: str = ""


class Roots(msgspec.Struct, frozen=True, kw_only=True):
    """What keeps versions: all signed plans, the stable versions, open rounds, graphs and transcripts of ended ones (by
    digest), and when a device that runs a version was last heard (Unix seconds, by manifest digest)."""

    plans: Sequence[RolloutPlan] = ()
    stable: Sequence[str] = ()
    rounds: Sequence[OpenRound] = ()
    ended_graphs: frozenset[str] = frozenset()
    ended_transcripts: frozenset[str] = frozenset()
    running: Mapping[str, float] = {}


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What to remove, in this order; which versions to give up for it; and what was kept, by reason."""

    remove: tuple[StoredObject, ...]
    retire: tuple[str, ...]
    kept: Mapping[str, int]
    unreadable: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """How much the removal frees."""
        return sum(entry.size for entry in self.remove)


def needed_versions(
    versions: Mapping[str, Version], deliveries: Iterable[Delivery], roots: Roots, terms: Terms, now: float
) -> dict[str, str]:
    """The versions that something needs, each with its first reason. `versions` by manifest digest; `now` Unix
    seconds."""
    live = {digest: version for digest, version in versions.items() if not version.retired}
    since = now - terms.window_s
    needed: dict[str, str] = {}

    def keep(digests: Iterable[str], reason: str) -> None:
        for digest in digests:
            if digest in live:
                needed.setdefault(digest, reason)

    for plan in _plans_that_count(roots.plans, since, now):
        keep((plan.target, plan.stable), "plan")
    keep(roots.stable, "stable")
    for one in roots.rounds:
        keep((one.base, one.candidate), "round")
    keep((digest for digest, version in live.items() if version.published >= since), "window")
    keep((digest for digest, heard in roots.running.items() if heard >= since), "running")
    for model in sorted({version.model for version in live.values()}):
        usable = {
            digest: version for digest, version in live.items() if version.model == model and not version.withdrawn
        }
        apart = siblings({digest: version.version for digest, version in usable.items()})
        if len(apart) > 1:
            keep(apart, "siblings")
            keep((parent for digest in apart for parent in usable[digest].parents), "siblings")
        keep(sorted(usable, key=lambda digest: usable[digest].release)[-1:], "newest")
    devices_go = {digest for digest, reason in needed.items() if reason not in ("siblings", "newest")}
    keep(_between(devices_go, deliveries), "chain")
    return needed


def unneeded(
    objects: Sequence[StoredObject],
    versions: Sequence[Version],
    deliveries: Mapping[str, Delivery | None],
    roots: Roots,
    terms: Terms,
    now: float,
) -> Verdict:
    """What of `objects` may be removed at `now`.

    `deliveries` by name in the store, None for one that cannot be read: then no blob is removed, since nobody knows
    which ones it names.
    """
    recorded = {version.manifest: version for version in versions}
    readable = {name: delivery for name, delivery in deliveries.items() if delivery is not None}
    unreadable = tuple(sorted(deliveries.keys() - readable.keys()))
    needed = needed_versions(recorded, readable.values(), roots, terms, now)
    late = _late_ends(recorded, readable)
    kept: Counter[str] = Counter()
    remove: list[StoredObject] = []
    kept_deliveries: list[tuple[str, str]] = []

    for entry in (entry for entry in objects if entry.kind == "delivery"):
        reason = _reason_of_delivery(entry.name, recorded, needed, late)
        if reason == "" and now - entry.modified < terms.grace_s:
            reason = "young"
        if reason:
            kept[reason] += 1
            kept_deliveries.append((entry.name, reason))
        else:
            remove.append(entry)

    blobs = {version.source_blob: needed[digest] for digest, version in recorded.items() if digest in needed}
    for name, reason in kept_deliveries:
        if name in readable:
            delivery = readable[name]
            for blob in (*delivery.segments, *(offer.blob for offer in delivery.offers)):
                blobs.setdefault(blob.digest, reason)
    artifacts = {one.graph: "round" for one in roots.rounds}
    artifacts |= {version.baseline: needed[digest] for digest, version in recorded.items() if digest in needed}
    ours = roots.ended_graphs | {version.baseline for version in recorded.values()}
    for entry in sorted(objects, key=lambda entry: KINDS.index(entry.kind) if entry.kind in KINDS else -1):
        if entry.kind == "delivery":
            continue
        if entry.kind == TRANSCRIPT:
            reason = _reason_of_transcript(entry, roots, terms, now)
            if reason:
                kept[reason] += 1
            else:
                remove.append(entry)
            continue
        wanted = blobs if entry.kind == "blob" else artifacts
        if entry.name in wanted:
            kept[wanted[entry.name]] += 1
        elif now - entry.modified < terms.grace_s:
            kept["young"] += 1
        elif entry.kind == "blob" and unreadable:
            kept["unreadable delivery"] += 1
        elif (entry.kind == "blob" and _DIGEST.fullmatch(entry.name)) or (
            entry.kind == "artifact" and entry.name in ours
        ):
            remove.append(entry)
        else:
            kept["unrecognised"] += 1
    removed = {entry.name for entry in remove}
    retire = tuple(
        digest
        for digest, version in recorded.items()
        if digest not in needed and not version.retired and (digest in removed or version.source_blob in removed)
    )
    return Verdict(remove=tuple(remove), retire=retire, kept=dict(sorted(kept.items())), unreadable=unreadable)


def _plans_that_count(plans: Iterable[RolloutPlan], since: float, now: float) -> list[RolloutPlan]:
    by_model: dict[str, list[RolloutPlan]] = {}
    for plan in sorted(plans, key=lambda plan: plan.serial):
        by_model.setdefault(plan.model, []).append(plan)
    counting = []
    for line in by_model.values():
        for position, plan in enumerate(line):
            ended = line[position + 1].issued if position + 1 < len(line) else now
            if plan.expires > now or ended >= since:
                counting.append(plan)
    return counting


def _between(ends: set[str], deliveries: Iterable[Delivery]) -> set[str]:
    """The versions on any way along patches from one of `ends` to another."""
    onward: dict[str, set[str]] = {}
    backward: dict[str, set[str]] = {}
    for delivery in deliveries:
        for offer in delivery.offers:
            onward.setdefault(offer.base, set()).add(delivery.manifest)
            backward.setdefault(delivery.manifest, set()).add(offer.base)
    return _reached(ends, onward) & _reached(ends, backward)


def _reached(starts: set[str], edges: Mapping[str, set[str]]) -> set[str]:
    reached, edge = set(starts), list(starts)
    while edge:
        new = edges.get(edge.pop(), set()) - reached
        reached |= new
        edge.extend(new)
    return reached


def _late_ends(versions: Mapping[str, Version], deliveries: Mapping[str, Delivery]) -> dict[str, tuple[str, str]]:
    """The (base, target) of deliveries that hold a direct patch for late devices, by their names."""
    by_model: dict[str, list[str]] = {}
    for digest, version in versions.items():
        by_model.setdefault(version.model, []).append(digest)
    found = {}
    for name, delivery in deliveries.items():
        target = delivery.manifest
        if name == target or target not in versions:
            continue
        # One that came to nothing names no base: it is found among all versions of the model.
        bases = [offer.base for offer in delivery.offers] or by_model[versions[target].model]
        base = next((base for base in bases if late_delivery_name(target, base) == name), None)
        if base is not None:
            found[name] = (base, target)
    return found


def _reason_of_transcript(entry: StoredObject, roots: Roots, terms: Terms, now: float) -> str:
    """Why a transcript is kept; "" when it is old enough."""
    if entry.name not in roots.ended_transcripts:
        return "unrecognised"  # or of a round that is about to end
    return "transcript" if now - entry.modified < max(terms.transcripts_s, terms.grace_s) else ""


def _reason_of_delivery(
    name: str, recorded: Mapping[str, Version], needed: Mapping[str, str], late: Mapping[str, tuple[str, str]]
) -> str:
    """Why a delivery is kept; "" when nothing needs it."""
    if name in recorded:
        return needed.get(name, "")
    if name in late:
        base, target = late[name]
        return "late patch" if base in needed and target in needed else ""
    return "unrecognised"
