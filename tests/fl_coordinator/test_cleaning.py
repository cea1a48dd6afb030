"""Cleaning a real coordinator's store: ledger, publisher and store are the real ones."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from fl_coordinator.cleaning import OWNER, Cleaning
from fl_coordinator.ledger import Ledger
from fl_coordinator.retention import DAY_S, Terms
from fl_coordinator.rollout import Rollout
from fl_coordinator.rounds import RoundSpec
from fl_coordinator.tables.records import Directed, ReleaseRecord
from model_delta.encoding import pack
from model_delta.errors import AtollError, Malformed, NotFound
from model_delta.manifest import late_delivery_name
from model_delta.object_store import ObjectStore
from model_delta.patch.route import plan_update
from model_delta.trust.director import ChosenStep, DevicePlan, HeldFile, VersionReport
from model_delta.trust.signing import seal_envelope
from monitoring.metrics import Metrics
from tests.fl_coordinator.control_calls import calling
from tests.fl_coordinator.learning_platform import Aggregators
from tests.fl_coordinator.platform_in_memory import FIRST, Platform, adopt_first, fraud_model, on_a_loop, until

SHORT = Terms(window_s=30 * DAY_S, grace_s=3600.0)


def platform_at(folder: Path, day: float = 0.0) -> Platform:
    """A platform whose clock is the files' clock, `day` days on."""
    platform = Platform(folder)
    platform.clock.now = time.time() + day * DAY_S
    return platform


def cleaning(platform: Platform, terms: Terms = SHORT, metrics: Metrics | None = None) -> Cleaning:
    return Cleaning(
        ledger=platform.ledger,
        store=platform.store,
        metrics=metrics or Metrics(),
        clock=platform.clock,
        terms=terms,
    )


def published(platform: Platform, count: int, first: int = 0) -> list[ReleaseRecord]:
    return [
        platform.publisher.publish(fraud_model(first + number), model="fraud", now=platform.clock())
        for number in range(count)
    ]


def require_complete(platform: Platform) -> None:
    """Whatever a kept delivery names is there, and every version that was not given up can be read as a whole."""
    for name in platform.store.names("delivery"):
        delivery = platform.publisher.delivery(name)
        for blob in (*delivery.segments, *(offer.blob for offer in delivery.offers)):
            assert platform.store.has("blob", blob.digest), (name, blob)
    for record in platform.ledger.releases():
        if record.manifest not in platform.ledger.retired():
            assert platform.publisher.file(record.manifest)
            assert platform.publisher.source(record.manifest)


def test_old_versions_go_and_what_is_left_is_whole(tmp_path: Path) -> None:
    platform, metrics = platform_at(tmp_path), Metrics()
    records = published(platform, 6)
    clean = cleaning(platform, metrics=metrics)
    assert clean.run().freed_bytes == 0

    platform.clock.now += 31 * DAY_S
    before = {(kind, name) for kind in ("delivery", "blob") for name in platform.store.names(kind)}
    foreseen = clean.run(dry_run=True)
    assert foreseen.freed_bytes > 0
    assert {(kind, name) for kind in ("delivery", "blob") for name in platform.store.names(kind)} == before
    assert platform.ledger.retired() == frozenset()

    cleaned = clean.run()
    assert (cleaned.freed_bytes, cleaned.removed) == (foreseen.freed_bytes, foreseen.removed)
    assert set(cleaned.retired) == {record.manifest for record in records[:-1]} == platform.ledger.retired()
    assert platform.store.names("delivery") == (records[-1].manifest,)
    assert len(platform.store.names("manifest")) == 6
    require_complete(platform)
    assert metrics.value("atoll_store_freed_bytes_total", kind="blob") > 0
    assert metrics.value("atoll_store_removed_objects_total", kind="delivery") == 5
    assert metrics.value("atoll_store_kept_objects", reason="newest") == cleaned.kept["newest"]
    assert clean.run().removed == {}
    following = published(platform, 1, first=50)[0]
    assert following.parents == (records[-1].manifest,)


@on_a_loop
async def test_what_was_given_up_cannot_be_rolled_out_trained_from_or_published_again(tmp_path: Path) -> None:
    platform = platform_at(tmp_path)
    first, _ = published(platform, 2)
    # Without a parent of its own, version 1's bytes on no parent are version 1 again.
    platform.publisher._parent = lambda model, wanted: None  # type: ignore[method-assign]
    platform.clock.now += 31 * DAY_S
    assert cleaning(platform).run().retired == (first.manifest,)
    with pytest.raises(Malformed, match="removed from the store"):
        await platform.coordinator.start_rollout(FIRST, first.manifest)
    with pytest.raises(AtollError):
        await platform.coordinator.open_round(RoundSpec(model="fraud", base=first.manifest))
    with pytest.raises(Malformed, match="which nothing needed any more"):
        await platform.coordinator.publish(fraud_model(0), model="fraud", parent=None)
    assert platform.ledger.rollouts() == platform.ledger.rounds() == []


@on_a_loop
async def test_plans_rounds_and_devices_keep_what_they_need(tmp_path: Path) -> None:
    platform = platform_at(tmp_path)
    Aggregators(platform)
    device = platform.device("pos-0001")
    async with platform.running():
        first = await adopt_first(platform, [device])
        published(platform, 3, first=10)
        round_ = await platform.coordinator.open_round(
            RoundSpec(model="fraud", quorum=8, deadline_s=86_400.0 * 29, clip_norm_l2=1.0)
        )
        platform.clock.now += 28 * DAY_S
        await device.hello()
        await until(lambda: platform.ledger.device("pos-0001").last_seen == platform.clock())
        platform.store.put("blob", "f" * 64, b"left by a crash")
        os.utime(platform.folder / "store" / "blob" / ("f" * 64), (1_000, 1_000))
        cleaned = cleaning(platform, Terms(window_s=7 * DAY_S, grace_s=60.0)).run()
        assert not platform.store.has("blob", "f" * 64)
        assert first not in cleaned.retired
        assert cleaned.kept["round"] == 1  # the graph; the base has an earlier reason
        assert platform.store.has("artifact", round_.task.training_graph)
        assert cleaned.kept["plan"] > 0
        assert len(cleaned.retired) == 2
        require_complete(platform)
        await platform.coordinator.abort_round(round_.round_id)
        await until(lambda: not platform.coordinator.round(round_.round_id).live)
        cleaned = cleaning(platform, Terms(window_s=7 * DAY_S, grace_s=60.0)).run()
        assert cleaned.removed == {"artifact": 1}


def test_a_device_from_the_window_still_gets_its_late_patch(tmp_path: Path) -> None:
    """Seven releases on, the first is only reached by the direct patch that was made for it."""
    platform = platform_at(tmp_path)
    records = published(platform, 7)
    base, target = records[0].manifest, records[-1].manifest
    assert platform.publisher.offer_direct(base, target)
    name = late_delivery_name(target, base)
    cleaning(platform).run()
    assert platform.store.has("delivery", name)
    late = platform.publisher.delivery(name)
    route = plan_update({base: records[0].file_bytes}, platform.publisher.manifest(target), {target: late})
    assert all(platform.store.has("blob", blob.digest) for step in route.steps for blob in step.blobs)
    platform.clock.now += 31 * DAY_S
    cleaning(platform).run()
    assert not platform.store.has("delivery", name)
    require_complete(platform)


def test_what_a_device_holds_or_was_told_to_go_over_stays(tmp_path: Path) -> None:
    """By its signed report and by the signed plan that it was answered with, until that runs out."""
    platform = platform_at(tmp_path)
    held, wanted, step, old, _ = (record.manifest for record in published(platform, 5))
    platform.clock.now += 100 * DAY_S
    now = int(platform.clock())

    def signed(value: VersionReport | DevicePlan) -> bytes:
        return seal_envelope(platform.keyring.sign("plan", "test", pack(value)))

    report = VersionReport(
        tenant="acme",
        device_id="pos-1",
        model="fraud",
        wanted=wanted,
        held=(HeldFile(held, "r"),),
        nonce=b"n" * 16,
        counter=1,
        time=now,
    )
    plan = DevicePlan(
        tenant="acme",
        device_id="pos-1",
        model="fraud",
        target=step,
        nonce=b"n" * 16,
        serial=1,
        issued=now,
        expires=now + 600,
        steps=(ChosenStep(kind="whole", target=step, blobs=()),),
    )
    platform.ledger.save_directed(
        [
            Directed(
                device_id="pos-1",
                model="fraud",
                counter=1,
                serial=1,
                heard=now,
                report=signed(report),
                plan=signed(plan),
            )
        ]
    )
    assert cleaning(platform).run().retired == (old,)
    platform.clock.now += 31 * DAY_S
    assert set(cleaning(platform).run().retired) == {held, wanted, step}
    require_complete(platform)


def test_publications_while_it_cleans(tmp_path: Path) -> None:
    """With no window at all every older version is garbage at once; what is being published never is."""
    platform = platform_at(tmp_path)
    clean = cleaning(platform, Terms(window_s=0.0, grace_s=3600.0))
    failures: list[BaseException] = []

    def publish() -> None:
        try:
            for number in range(8):
                platform.clock.now = time.time()
                record = platform.publisher.publish(fraud_model(number), model="fraud", now=platform.clock())
                assert platform.publisher.file(record.manifest)
        except BaseException as error:
            failures.append(error)

    publishing = threading.Thread(target=publish)
    publishing.start()
    runs = 0
    while publishing.is_alive():
        try:
            clean.run()
            runs += 1
        except AtollError as error:
            assert "try again" in str(error)  # noqa: PT017
    publishing.join()
    assert failures == []
    assert runs > 0
    require_complete(platform)


def test_a_rollout_that_begins_in_between_wins(tmp_path: Path) -> None:
    """The rollout is written after the ledger was read and before versions are given up."""
    platform = platform_at(tmp_path)
    first, second = published(platform, 2)
    platform.clock.now += 31 * DAY_S
    clean = cleaning(platform)
    retire = platform.ledger.retire
    begun: list[Rollout] = []

    def slowly(*arguments: object) -> bool:
        if not begun:
            begun.append(asyncio.run(platform.coordinator.start_rollout(FIRST, first.manifest)))
        return retire(*arguments)  # type: ignore[arg-type]

    platform.ledger.retire = slowly  # type: ignore[method-assign, assignment]
    cleaned = clean.run()
    assert cleaned.retired == ()
    assert platform.publisher.file(first.manifest)
    assert platform.publisher.file(second.manifest)


def test_an_object_written_again_in_between_stays(tmp_path: Path) -> None:
    platform = platform_at(tmp_path)
    name = "a" * 64
    platform.store.put("blob", name, b"x")
    os.utime(tmp_path / "store" / "blob" / name, (1_000, 1_000))
    retire = platform.ledger.retire

    def again(*arguments: object) -> bool:
        platform.store.put("blob", name, b"x")
        return retire(*arguments)  # type: ignore[arg-type]

    platform.ledger.retire = again  # type: ignore[method-assign, assignment]
    assert cleaning(platform).run().removed == {}
    assert platform.store.has("blob", name)


_CLEANER = """
    import os, signal, sys, time
    from pathlib import Path
    from fl_coordinator.cleaning import Cleaning
    from fl_coordinator.ledger import Ledger
    from fl_coordinator.retention import Terms
    from model_delta.store import DirectoryStore
    from monitoring.metrics import Metrics

    folder, left = Path(sys.argv[1]), int(sys.argv[2])

    class Dying(DirectoryStore):
        def remove_unchanged(self, entry):
            global left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return super().remove_unchanged(entry)

    Cleaning(ledger=Ledger(folder / "ledger.sqlite"), store=Dying(folder / "store"), metrics=Metrics(),
             clock=lambda: time.time() + 31 * 86400, terms=Terms(30 * 86400.0, 3600.0)).run()
"""


@pytest.mark.slow
def test_killed_in_the_middle_it_leaves_only_garbage(tmp_path: Path) -> None:
    platform = platform_at(tmp_path)
    records = published(platform, 4)
    objects = len(platform.store.names("blob"))
    for removals in (0, 1, 3, 5, 10_000):
        platform.ledger.close()
        script = [sys.executable, "-c", textwrap.dedent(_CLEANER), str(tmp_path), str(removals)]
        ended = subprocess.run(script, timeout=60, check=False).returncode
        assert ended == (0 if removals == 10_000 else -signal.SIGKILL)
        platform.reopen()
        require_complete(platform)
        assert platform.ledger.retired() == {record.manifest for record in records[:-1]}
    assert len(platform.store.names("blob")) < objects
    assert platform.store.names("delivery") == (records[-1].manifest,)
    referenced = {blob.digest for blob in platform.publisher.delivery(records[-1].manifest).segments}
    assert referenced < set(platform.store.names("blob"))


def test_a_store_of_another_ledger_is_left_alone(tmp_path: Path) -> None:
    platform = platform_at(tmp_path)
    cleaning(platform).run()
    other = Ledger(tmp_path / "other.sqlite")
    stranger = Cleaning(ledger=other, store=platform.store, metrics=Metrics(), clock=platform.clock, terms=SHORT)
    platform.clock.now += 100 * DAY_S
    published(platform, 1)
    for dry_run in (False, True):
        with pytest.raises(Malformed, match="give each coordinator a place of its own"):
            stranger.run(dry_run=dry_run)
    assert platform.store.get(*OWNER) == platform.ledger.identity().encode() != other.identity().encode()
    other.close()


def test_a_missing_manifest_stops_the_run(tmp_path: Path) -> None:
    platform = platform_at(tmp_path)
    first, _ = published(platform, 2)
    platform.store.remove("manifest", first.manifest)
    platform.clock.now += 31 * DAY_S
    with pytest.raises(NotFound):
        cleaning(platform).run()
    assert platform.store.has("delivery", first.manifest)


def test_in_a_bucket(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    platform.store = ObjectStore("memory://")  # type: ignore[assignment]
    platform.clock.now = time.time()
    platform.reopen()
    records = published(platform, 3)
    platform.clock.now += 31 * DAY_S
    cleaned = cleaning(platform).run()
    assert set(cleaned.retired) == {record.manifest for record in records[:-1]}
    require_complete(platform)
    assert cleaning(platform).run().removed == {}


@on_a_loop
async def test_over_http_and_by_itself(tmp_path: Path) -> None:
    platform = platform_at(tmp_path)
    published(platform, 2)
    platform.clock.now += 200 * DAY_S
    async with calling(platform) as call:
        for role in ("gateway", "aggregator", "join"):
            assert (await call("POST", "/v1/store/clean", role, json={})).status_code == 403
        assert (await call("POST", "/v1/store/clean", json={"dry_run": "yes"})).status_code == 400
        foreseen = (await call("POST", "/v1/store/clean", json={"dry_run": True})).json()
        done = (await call("POST", "/v1/store/clean", json={})).json()
        assert foreseen["freed_bytes"] == done["freed_bytes"] > 0
        assert (foreseen["dry_run"], done["dry_run"]) == (True, False)
        assert b"atoll_store_freed_bytes_total" in (await call("GET", "/metrics")).content
    platform.clock.now += 1
    older = published(platform, 2, first=20)[0]
    platform.clock.now += 200 * DAY_S
    platform.reopen()
    platform.coordinator._clean_pause_s = platform.coordinator._clean_every_s = 0.01
    async with platform.running():
        await until(lambda: older.manifest in platform.ledger.retired())
        await until(lambda: any("removed" in event.text for event in platform.ledger.events()))
