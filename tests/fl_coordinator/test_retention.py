"""What the store keeps and gives up: the rule, on made-up histories."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_coordinator.retention import DAY_S, OpenRound, Roots, Terms, Verdict, Version, needed_versions, unneeded
from model_delta.digest import digest_of
from model_delta.manifest import (
    Blob,
    Delivery,
    Manifest,
    PatchOffer,
    Segment,
    TensorSpec,
    late_delivery_name,
    manifest_digest,
)
from model_delta.patch.route import Step, plan_update
from model_delta.plan import Cohort, RolloutPlan
from model_delta.store import StoredObject

NOW = 1_000 * DAY_S
SIZE = 100_000
SPEC = (TensorSpec("features", "float32", (-1, 6)),)


def plan(serial: int, target: str, stable: str, *, issued_day: float, expires_day: float = 2_000) -> RolloutPlan:
    return RolloutPlan(
        tenant="acme",
        model="fraud",
        name="r",
        serial=serial,
        salt="s",
        cohorts=(Cohort("everyone"),),
        target=target,
        stable=stable,
        issued=int(issued_day * DAY_S),
        expires=int(expires_day * DAY_S),
    )


class History:
    """Releases of one model in order, with what the store holds of them."""

    def __init__(self) -> None:
        self.manifests: list[Manifest] = []
        self.versions: list[Version] = []
        self.deliveries: dict[str, Delivery | None] = {}
        self.objects: list[StoredObject] = []

    def publish(self, day: float, bases: Mapping[int, int] | None = None, **more: Any) -> str:
        """One more version; `bases` gives the size of the patch from each earlier version, by its number."""
        number = len(self.manifests)
        name = digest_of(b"file %d" % number)
        manifest = Manifest(
            tenant="acme",
            model="fraud",
            version={"eu": number + 1},
            release=number + 1,
            size=SIZE,
            file_digest=name,
            segments=(Segment("file", SIZE, name),),
            merkle_root=digest_of(b"root %d" % number),
            inputs=SPEC,
            outputs=SPEC,
            created=int(day * DAY_S),
            expires=int(3_000 * DAY_S),
        )
        digest = manifest_digest(manifest)
        source = digest_of(b"source %d" % number)
        fields = {
            "manifest": digest,
            "model": "fraud",
            "release": number + 1,
            "version": manifest.version,
            "parents": (),
            "published": day * DAY_S,
            "source_blob": source,
        }
        self.manifests.append(manifest)
        self.versions.append(Version(**{**fields, **more}))
        segment = Blob(digest_of(b"segment %d" % number), SIZE)
        patches = tuple(
            PatchOffer(self[base], Blob(digest_of(b"patch %d %d" % (base, number)), size))
            for base, size in (bases or {}).items()
        )
        self._hold(digest, Delivery(digest, (segment,), patches), day)
        self.stored("blob", source, day)
        return digest

    def late(self, base: int, target: int, day: float, size: int | None = 40) -> str:
        """A direct patch for late devices, or (None) one that came to nothing."""
        blob = Blob(digest_of(b"late %d %d" % (base, target)), size or 0)
        offers = (PatchOffer(self[base], blob),) if size else ()
        name = late_delivery_name(self[target], self[base])
        self._hold(name, Delivery(self[target], (), offers), day)
        return name

    def _hold(self, name: str, delivery: Delivery, day: float) -> None:
        self.deliveries[name] = delivery
        self.stored("delivery", name, day)
        for blob in (*delivery.segments, *(offer.blob for offer in delivery.offers)):
            self.stored("blob", blob.digest, day, blob.size)

    def stored(self, kind: str, name: str, day: float, size: int = 10) -> None:
        self.objects.append(StoredObject(kind, name, size, day * DAY_S))

    def __getitem__(self, number: int) -> str:
        return manifest_digest(self.manifests[number])

    def needed(self, roots: Roots, terms: Terms | None = None) -> dict[str, str]:
        readable = [one for one in self.deliveries.values() if one is not None]
        return needed_versions({one.manifest: one for one in self.versions}, readable, roots, terms or Terms(), NOW)

    def judge(self, roots: Roots) -> Verdict:
        return unneeded(self.objects, self.versions, self.deliveries, roots, Terms(), NOW)


def test_each_reason_keeps_its_version() -> None:
    history = History()
    for number in range(12):
        history.publish(10 + number)
    history.publish(950)
    roots = Roots(
        plans=[
            plan(1, history[0], history[1], issued_day=20, expires_day=1_001),
            plan(2, history[2], history[3], issued_day=30, expires_day=420),
            plan(3, history[4], history[5], issued_day=905, expires_day=906),
            plan(4, history[6], history[6], issued_day=950, expires_day=960),
        ],
        stable=[history[7]],
        rounds=[OpenRound(history[8], "graph", history[9])],
        running={history[10]: NOW - 89 * DAY_S, history[11]: NOW - 91 * DAY_S, "": NOW, "unknown": NOW},
    )
    assert history.needed(roots) == {
        history[0]: "plan",
        history[1]: "plan",
        # Plan 2 expired long ago, and plan 3 took its place 95 days ago.
        history[4]: "plan",
        history[5]: "plan",
        history[6]: "plan",
        history[7]: "stable",
        history[8]: "round",
        history[9]: "round",
        history[10]: "running",
        history[12]: "window",
    }


def test_a_plan_that_was_in_force_within_the_window_counts_though_it_expired() -> None:
    history = History()
    for number in range(3):
        history.publish(number)
    plans = [
        plan(1, history[0], history[0], issued_day=5, expires_day=6),
        plan(2, history[1], history[1], issued_day=920, expires_day=921),
    ]
    assert history.needed(Roots(plans=plans)) == {history[0]: "plan", history[1]: "plan", history[2]: "newest"}


def test_siblings_and_what_they_come_from_stay_until_they_are_joined() -> None:
    history = History()
    base = history.publish(1, version={"eu": 1})
    left = history.publish(2, version={"eu": 2}, parents=(base,))
    right = history.publish(3, version={"eu": 1, "us": 1}, parents=(base,))
    assert history.needed(Roots()) == {base: "siblings", left: "siblings", right: "siblings"}
    joined = history.publish(4, version={"eu": 2, "us": 1}, parents=(left, right))
    assert history.needed(Roots()) == {joined: "newest"}


def test_a_withdrawn_version_is_not_the_newest_and_a_retired_one_is_nothing() -> None:
    history = History()
    first = history.publish(1)
    history.publish(2, withdrawn=True)
    gone = history.publish(3, retired=True)
    assert history.needed(Roots(stable=[gone])) == {first: "newest"}


def test_a_chain_between_needed_versions_stays_and_others_go() -> None:
    history = History()
    history.publish(1)
    history.publish(2, {0: 10})
    history.publish(3, {1: 10})
    aside = history.publish(4, {0: 10})
    history.publish(5, {2: 10})
    roots = Roots(stable=[history[4]], running={history[0]: NOW})
    assert history.needed(roots) == {
        history[4]: "stable",
        history[0]: "running",
        history[1]: "chain",
        history[2]: "chain",
    }
    verdict = history.judge(roots)
    assert verdict.retire == (aside,)
    assert [entry.kind for entry in verdict.remove] == ["delivery", "blob", "blob", "blob"]
    assert verdict.bytes == 10 + SIZE + 10 + 10


def test_a_late_patch_stays_while_both_its_ends_do() -> None:
    history = History()
    for number in range(4):
        history.publish(number)
    kept, empty, gone = history.late(0, 3, 1), history.late(0, 2, 1, None), history.late(1, 3, 1)
    roots = Roots(stable=[history[3], history[2]], running={history[0]: NOW})
    verdict = history.judge(roots)
    removed = {entry.name for entry in verdict.remove}
    assert gone in removed
    assert digest_of(b"late 1 3") in removed
    assert not {kept, empty, digest_of(b"late 0 3")} & removed
    assert verdict.kept["late patch"] == 3


def test_what_is_young_or_not_recognised_stays() -> None:
    history = History()
    history.publish(1)
    orphan = digest_of(b"left by a crash")
    history.stored("blob", orphan, 998.9, 7)
    history.stored("blob", digest_of(b"just written"), 999.1)
    history.stored("blob", "by-hand", 1)
    history.stored("artifact", digest_of(b"uploaded by somebody"), 1)
    history.stored("artifact", "old-graph", 1)
    history.stored("artifact", "open-graph", 1)
    stranger = Delivery("of another ledger", (Blob(digest_of(b"its blob"), 5),))
    history._hold(digest_of(b"its name"), stranger, 1)
    history.stored("notes", "anything", 1)
    roots = Roots(rounds=[OpenRound("", "open-graph")], ended_graphs=frozenset({"old-graph", "open-graph"}))
    verdict = history.judge(roots)
    assert {entry.name for entry in verdict.remove} == {orphan, "old-graph"}
    assert verdict.kept == {"newest": 3, "round": 1, "unrecognised": 5, "young": 1}
    assert verdict.retire == ()


def test_transcripts_of_ended_rounds_go_by_their_age() -> None:
    history = History()
    for name, day in (("old", 599), ("last", 601), ("of a live round", 1), ("another ledger's", 1)):
        history.stored("transcript", name, day)
    verdict = history.judge(Roots(ended_transcripts=frozenset({"old", "last"})))
    assert [entry.name for entry in verdict.remove] == ["old"]
    assert verdict.kept == {"transcript": 1, "unrecognised": 2}


def test_baselines_go_with_their_versions() -> None:
    history = History()
    history.publish(1, baseline="old-baseline")
    history.publish(2, baseline="shared")
    history.publish(3, baseline="shared")
    history.stored("artifact", "old-baseline", 1)
    history.stored("artifact", "shared", 1)
    assert [entry.name for entry in history.judge(Roots()).remove if entry.kind == "artifact"] == ["old-baseline"]


def test_an_unreadable_delivery_keeps_every_blob() -> None:
    history = History()
    old, kept = history.publish(1), history.publish(2)
    history.deliveries[kept] = None
    verdict = history.judge(Roots())
    assert [(entry.kind, entry.name) for entry in verdict.remove] == [("delivery", old)]
    assert verdict.unreadable == (kept,)
    assert verdict.kept == {"newest": 2, "unreadable delivery": 3}


days = st.integers(0, 999)


@st.composite
def histories(draw: st.DrawFn) -> tuple[History, Roots]:
    """Up to ten releases with patches from any earlier ones, late patches, plans, and devices anywhere."""
    history = History()
    count = draw(st.integers(1, 10))
    for number, day in enumerate(sorted(draw(st.lists(days, min_size=count, max_size=count)))):
        bases = {number - 1: draw(st.integers(1, 10_000))} if number and draw(st.booleans()) else {}
        earlier = st.dictionaries(st.integers(0, max(0, number - 1)), st.integers(1, 40_000), max_size=2)
        history.publish(day, {**(draw(earlier) if number else {}), **bases}, withdrawn=draw(st.booleans()))
    any_of = st.integers(0, count - 1)
    for base, target in draw(st.sets(st.tuples(any_of, any_of), max_size=4)):
        if base != target:
            history.late(base, target, 500, draw(st.one_of(st.none(), st.integers(1, 40_000))))
    plans = [
        plan(serial, history[target], history[stable], issued_day=issued, expires_day=issued + 200)
        for serial, (issued, target, stable) in enumerate(
            sorted(draw(st.lists(st.tuples(days, any_of, any_of), max_size=4)))
        )
    ]
    running = {history[one]: NOW - draw(st.sampled_from([1, 95])) * DAY_S for one in draw(st.sets(any_of))}
    return history, Roots(plans=plans, stable=[history[draw(any_of)]], running=running)


@given(histories())
@settings(deadline=None, max_examples=150)
def test_every_position_in_the_window_still_reaches_every_target_as_cheaply(drawn: tuple[History, Roots]) -> None:
    history, roots = drawn
    terms = Terms()
    verdict = history.judge(roots)
    gone = {(entry.kind, entry.name) for entry in verdict.remove}
    before = [one for one in history.deliveries.values() if one is not None]
    after = [one for name, one in history.deliveries.items() if one is not None and ("delivery", name) not in gone]
    named = {blob.digest for one in after for blob in (*one.segments, *(offer.blob for offer in one.offers))}
    assert not {name for kind, name in gone if kind == "blob"} & named, "a kept delivery names a removed blob"

    by_digest = dict(zip((one.manifest for one in history.versions), history.manifests, strict=True))
    published = {one.manifest: one.published for one in history.versions}
    since = NOW - terms.window_s
    positions = {digest for digest, day in published.items() if day >= since}
    positions |= {digest for digest, heard in roots.running.items() if heard >= since}
    targets = set(roots.stable)
    for one in roots.plans:
        if one.expires > NOW or one == roots.plans[-1]:
            targets |= {one.target, one.stable}
    for target in targets:
        for position in [*positions, None]:
            have = {position: SIZE} if position is not None else {}
            then = plan_update(have, by_digest[target], _merged(before))
            now = plan_update(have, by_digest[target], _merged(after))
            assert now.bytes <= SIZE
            if position is not None and _starts_at(position, then.steps):
                assert now.bytes <= then.bytes


@given(histories())
@settings(deadline=None, max_examples=60)
def test_a_second_run_finds_nothing_and_a_run_cut_off_anywhere_leaves_only_garbage(
    drawn: tuple[History, Roots],
) -> None:
    history, roots = drawn
    verdict = history.judge(roots)
    for cut in range(len(verdict.remove) + 1):
        left = History()
        done = set(verdict.remove[:cut])
        left.manifests = history.manifests
        left.versions = [
            msgspec.structs.replace(one, retired=one.manifest in verdict.retire) for one in history.versions
        ]
        left.objects = [entry for entry in history.objects if entry not in done]
        names = {entry.name for entry in left.objects if entry.kind == "delivery"}
        left.deliveries = {name: one for name, one in history.deliveries.items() if name in names}
        there = {entry.name for entry in left.objects if entry.kind == "blob"}
        for one in left.deliveries.values():
            assert one is not None
            assert {blob.digest for blob in (*one.segments, *(offer.blob for offer in one.offers))} <= there
        again = left.judge(roots)
        assert {*done, *again.remove} == set(verdict.remove)
        assert again.retire == ()


def _merged(deliveries: list[Delivery]) -> dict[str, Delivery]:
    """Deliveries by version, with the patches for late devices."""
    whole = {one.manifest: one for one in deliveries if one.segments}
    for one in deliveries:
        if not one.segments and one.manifest in whole:
            known = whole[one.manifest]
            whole[one.manifest] = msgspec.structs.replace(known, patches=(*known.patches, *one.patches))
    return whole


def _starts_at(position: str, steps: tuple[Step, ...]) -> bool:
    return not steps or steps[0].base == position
