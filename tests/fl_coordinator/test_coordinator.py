import asyncio
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from fl_coordinator.enrolment import Enrolment
from fl_coordinator.publishing import Publisher
from fl_coordinator.rollout import Rollout
from model_delta import topics
from model_delta.encoding import pack, unpack
from model_delta.errors import Malformed, NotFound, StorageFull, Untrusted
from model_delta.keys.certificates import days_left, make_request, same_keys, serial_of
from model_delta.trust.updater import read_manifest
from monitoring.telemetry import Report
from tests.fl_coordinator.platform_in_memory import (
    CANARY,
    FIRST,
    START,
    Device,
    Platform,
    adopt_first,
    fleet,
    fraud_model,
    on_a_loop,
    report_all,
    state_of,
    until,
)


def running(platform: Platform, manifest: str) -> list[Device]:
    return [device for device in platform.devices.values() if device.running == manifest]


@on_a_loop
async def test_publish_roll_out_report_acknowledge(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    devices = fleet(platform, 6)
    async with platform.running() as coordinator:
        manifest = await adopt_first(platform, devices)
        snapshot = coordinator.snapshot()
        assert snapshot.decisions == 6 * 30
        assert {device.version for device in snapshot.devices} == {"eu-west:1"}
        assert platform.ledger.stable("fraud") == manifest
        described = read_manifest(platform.store.get("manifest", manifest), manifest, platform.keyring.tenant, START)
        assert described.golden[0].outputs["score"].shape == (3, 1)


@on_a_loop
async def test_a_canary_grows_from_one_device_to_all(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    devices = fleet(platform, 8)
    async with platform.running() as coordinator:
        first = await adopt_first(platform, devices)
        second = (await coordinator.publish(fraud_model(2), model="fraud")).manifest
        await coordinator.start_rollout(CANARY.replace("NAME", "second"))
        sizes = []
        for _ in range(200):
            sizes.append(len(running(platform, second)))
            await report_all(platform, devices)
            await asyncio.sleep(0.03)
            if platform.ledger.stable("fraud") == second:
                break
        await until(lambda: len(running(platform, second)) == 8)
        assert sizes[0] in (0, 1)
        assert 1 in sizes
        assert sizes == sorted(sizes)
        events = [entry.event for entry in platform.ledger.stage_history("second")]
        assert events == ["begun", "widened", "widened", "completed"]
        assert coordinator.ledger.release(second).bytes_patch.keys() == {first}


@on_a_loop
async def test_devices_of_another_model_are_in_nobodys_canary(tmp_path: Path) -> None:
    """Two models on one platform: each is rolled out to those that follow it, and completes."""
    platform = Platform(tmp_path)
    ours = fleet(platform, 3)
    others = [platform.device(f"pi-{number:04}", model="ranking") for number in range(9)]
    async with platform.running() as coordinator:
        for device in (*ours, *others):
            await device.hello()
        await adopt_first(platform, ours)
        await coordinator.publish(fraud_model(1), model="ranking")
        await coordinator.start_rollout(FIRST.replace("first", "ranks").replace("model: fraud", "model: ranking"))
        second = (await coordinator.publish(fraud_model(2), model="fraud")).manifest
        await coordinator.start_rollout(CANARY.replace("NAME", "second"))
        await until(lambda: len(running(platform, second)) == 1)
        for _ in range(200):
            await report_all(platform, [*ours, *others])
            await asyncio.sleep(0.03)
            if state_of(platform, "second") == state_of(platform, "ranks") == "completed":
                break
        shown = {one.name: (one.state, one.in_stage, one.adopted) for one in coordinator.snapshot().rollouts}
        assert shown["second"] == ("completed", 3, 3)
        assert shown["ranks"] == ("completed", 9, 9)


@on_a_loop
async def test_a_model_that_no_device_follows_waits_for_devices_and_makes_way_for_its_next_version(
    tmp_path: Path,
) -> None:
    """Regions may be all that answers by it."""
    platform = Platform(tmp_path)
    async with platform.running() as coordinator:
        await coordinator.publish(fraud_model(1), model="ranking")
        first = FIRST.replace("model: fraud", "model: ranking")
        await coordinator.start_rollout(first)
        await until(lambda: "waits for devices" in coordinator.snapshot().rollouts[0].reason)
        assert coordinator.snapshot().rollouts[0].standing == "waiting for devices"
        second = (await coordinator.publish(fraud_model(2), model="ranking")).manifest
        await coordinator.start_rollout(first.replace("name: first", "name: second"))
        shown = {one.name: one.standing for one in coordinator.snapshot().rollouts}
        assert shown == {"first": "superseded", "second": "waiting for devices"}
        device = platform.device("pi-0001", model="ranking")
        await device.hello()
        await until(lambda: device.running == second)
        for _ in range(200):
            await report_all(platform, [device])
            await asyncio.sleep(0.03)
            if state_of(platform, "second") == "completed":
                break
        assert state_of(platform, "second") == "completed"
        third = (await coordinator.publish(fraud_model(3), model="ranking")).manifest
        assert (await coordinator.start_rollout(first.replace("name: first", "name: third"))).target == third
        await coordinator.publish(fraud_model(4), model="ranking")
        with pytest.raises(Malformed, match="rollout third of ranking is running"):
            await coordinator.start_rollout(first.replace("name: first", "name: fourth"))


@on_a_loop
async def test_a_revoked_device_holds_up_no_rollout(tmp_path: Path) -> None:
    """Lost devices are revoked so that they count no more; until then a stage waits for the silent among few."""
    platform = Platform(tmp_path)
    devices = fleet(platform, 2)
    async with platform.running() as coordinator:
        await adopt_first(platform, devices)
        platform.clock.now += 3_600
        await devices[0].hello()
        second = (await coordinator.publish(fraud_model(2), model="fraud")).manifest
        rails = "  guardrails: [{metric: silence, share: 20%, withinSeconds: 30}]\n"
        await coordinator.start_rollout(FIRST.replace("first", "second") + rails)
        await until(lambda: devices[0].running == second)
        await report_all(platform, devices[:1])
        await until(lambda: "1 silent" in unpack(platform.ledger.rollout("second"), Rollout).reason)
        coordinator.revoke(devices[1].device_id)
        await report_all(platform, devices[:1])
        await until(lambda: state_of(platform, "second") == "completed")
        snapshot = coordinator.snapshot()
        assert [(one.device_id, one.running) for one in snapshot.devices] == [(devices[0].device_id, second)]
        assert snapshot.rollouts[-1].in_stage == 1
        devices[1].enrol(replace=True)
        assert len(platform.ledger.followers("fraud")) == 2


@on_a_loop
async def test_a_slow_version_is_stopped_at_the_canary_and_never_comes_back(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    devices = fleet(platform, 8)
    async with platform.running() as coordinator:
        first = await adopt_first(platform, devices)
        for _ in range(5):
            await report_all(platform, devices)
        bad = (await coordinator.publish(fraud_model(3), model="fraud")).manifest
        await coordinator.start_rollout(CANARY.replace("NAME", "bad"))
        await until(lambda: len(running(platform, bad)) == 1)
        canary = running(platform, bad)[0]
        exposed = set()
        for _ in range(100):
            for device in devices:
                await device.report(20, latency_us=9_000.0 if device.running == bad else 300.0)
            await asyncio.sleep(0.03)
            exposed |= {device.device_id for device in running(platform, bad)}
            if state_of(platform, "bad") == "stopped":
                break
        await until(lambda: len(running(platform, first)) == 8)
        assert exposed == {canary.device_id}
        assert "latency_p95_ms" in platform.ledger.withdrawn("fraud")[bad]
        with pytest.raises(Malformed, match="withdrawn"):
            await coordinator.start_rollout(CANARY.replace("NAME", "again"), target=bad)
        await canary.ask_key(bad)
        await until(lambda: canary.answers)
        assert "withdrawn" in canary.answers[0].error


@on_a_loop
async def test_a_crash_between_any_two_steps_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    devices = fleet(platform, 4)
    async with platform.running():
        await adopt_first(platform, devices)
    platform.reopen()
    platform.broker.retained.clear()  # the broker lost its disk as well
    async with platform.running() as coordinator:
        await until(lambda: topics.plan_topic("acme", "fraud") in platform.broker.retained)
        assert coordinator.snapshot().rollouts[0].state == "completed"
        repeated = devices[0].next_report(5)
        for _ in range(3):
            await devices[0].link.publish(topics.up(devices[0].device_id, "report"), pack(repeated))
        await until(lambda: devices[0].acked == devices[0].sequence)
        await until(lambda: coordinator.snapshot().decisions == 4 * 30 + 5)
        assert platform.ledger.summaries()


@on_a_loop
async def test_plans_are_published_again_when_the_broker_comes_back(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    device = platform.device("pos-0001")
    async with platform.running() as coordinator:
        await adopt_first(platform, [device])
        platform.broker.up = False
        second = (await coordinator.publish(fraud_model(2), model="fraud")).manifest
        begun = await coordinator.start_rollout(FIRST.replace("name: first", "name: second"))
        assert begun.state == "running"
        platform.broker.retained.clear()
        await asyncio.sleep(0.1)
        platform.broker.up = True
        await until(lambda: device.running == second)


@on_a_loop
async def test_the_artifact_key_goes_to_enrolled_devices_only(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    device = platform.device("pos-0001")
    async with platform.running():
        manifest = await adopt_first(platform, [device])
        await device.ask_key(manifest)
        await until(lambda: len(device.answers) == 1)
        assert device.open_key(device.answers[0], manifest) == platform.publisher.key(manifest)
        await device.ask_key(manifest, signed_by=ec.generate_private_key(ec.SECP256R1()))
        await until(lambda: len(device.answers) == 2)
        assert "signature" in device.answers[1].error
        assert device.answers[1].sealed == b""
        platform.keyring.revoke(int(platform.ledger.device("pos-0001").certificate_serial))
        await device.ask_key(manifest)
        await until(lambda: len(device.answers) == 3)
        assert "revoked" in device.answers[2].error


@on_a_loop
async def test_strangers_and_impostors_do_not_move_the_totals(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    device, other = platform.device("pos-0001"), platform.device("pos-0002")
    async with platform.running() as coordinator:
        await adopt_first(platform, [device])
        forged = other.next_report(1000)
        await device.link.publish(topics.up("pos-0001", "report"), pack(forged))
        await device.link.publish(topics.up("pos-0001", "report"), b"\xff\x00")
        # One report that cannot be written down must not hold up the others of its batch.
        absurd = msgspec.structs.replace(forged, device_id="pos-0001", last_sequence=2**63)
        await device.link.publish(topics.up("pos-0001", "report"), pack(absurd))
        stranger = platform.broker.link("pos-0099")
        report = Report(
            device_id="pos-0099", epoch=1, first_sequence=1, last_sequence=2, time=0.0, state="IDLE", running=""
        )
        await stranger.publish(topics.up("pos-0099", "report"), pack(report))
        await report_all(platform, [device], 1)
        await until(lambda: coordinator.snapshot().decisions == 31)


def test_enrolment_gives_no_name_away(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    device = platform.device("pos-0001")
    first = device.certificate
    device.enrol()
    assert device.certificate == first  # the same keys get the same answer
    device.key = ec.generate_private_key(ec.SECP256R1())
    with pytest.raises(Untrusted, match="another key"):
        device.enrol()
    device.enrol(replace=True)
    assert device.certificate != first
    assert len(platform.keyring.revoked()) == 1
    for kind, name in (
        ("device", "gateway-eu-west"),
        ("device", "coordinator"),
        ("gateway", "pos-0002"),
        ("server", "gateway-x"),
        ("root", "pos-0002"),
        ("device", "../x"),
        ("device", "a/b"),
    ):
        wanted = Enrolment(
            csr_pem=make_request(device.key, "pos-0001").decode(), sealing_public=b"", kind=kind, common_name=name
        )
        with pytest.raises(Malformed):
            platform.coordinator.enrol(wanted, replace=True)


def test_a_certificate_is_renewed_in_its_last_60_days_and_a_revoked_one_is_never_given_back(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    device = platform.device("pos-0001")
    first = device.certificate
    platform.clock.now += (400 - 60) * 86_400 - 3_600
    device.enrol()
    assert device.certificate == first
    platform.clock.now += 7_200
    device.enrol()
    assert device.certificate != first
    assert same_keys(first, device.certificate)
    assert days_left(device.certificate, platform.clock()) == pytest.approx(400, abs=0.1)
    platform.coordinator.revoke("pos-0001")
    with pytest.raises(Untrusted, match="its certificate was revoked"):
        device.enrol()
    device.enrol(replace=True)
    assert serial_of(device.certificate) not in platform.keyring.revoked()


def test_the_same_bytes_on_the_same_parent_are_the_same_version(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    publisher: Publisher = platform.publisher
    first = publisher.publish(fraud_model(1), model="fraud", now=START, name="v1")
    assert publisher.publish(fraud_model(1), model="fraud", now=START + 5) == first
    second = publisher.publish(fraud_model(2), model="fraud", now=START + 6)
    assert (second.release, second.version, second.parents) == (2, {"eu-west": 2}, (first.manifest,))
    assert 0 < second.bytes_patch[first.manifest] < second.bytes_whole
    assert publisher.source(second.manifest) == fraud_model(2)
    assert publisher.resolve("fraud", "latest") == second
    assert publisher.resolve("fraud", "v1") == publisher.resolve("fraud", "1") == first
    with pytest.raises(NotFound, match="not published"):
        publisher.resolve("fraud", "v9")
    with pytest.raises(Malformed):
        publisher.publish(b"not a model", model="fraud", now=START)
    assert len(platform.ledger.releases("fraud")) == 2


@on_a_loop
async def test_however_many_candidates_came_between_there_is_a_patch_from_what_the_fleet_runs(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    devices = fleet(platform, 3)
    async with platform.running() as coordinator:
        stable = await adopt_first(platform, devices)
        newest = stable
        for seed in range(2, 8):
            newest = (await coordinator.publish(fraud_model(seed), model="fraud", parent=newest)).manifest
        assert stable in platform.ledger.release(newest).bytes_patch


def test_a_full_disk_leaves_nothing_of_a_publication_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    platform = Platform(tmp_path)
    put, room = platform.store.put, iter(range(2))

    def filling(kind: str, name: str, data: bytes) -> None:
        if next(room, None) is None:
            raise StorageFull("no room")
        put(kind, name, data)

    monkeypatch.setattr(platform.store, "put", filling)
    with pytest.raises(StorageFull):
        platform.publisher.publish(fraud_model(1), model="fraud", now=START)
    assert platform.store.names("blob") == ()
    assert platform.ledger.releases("fraud") == []
    monkeypatch.undo()
    assert platform.publisher.publish(fraud_model(1), model="fraud", now=START).release == 1


@on_a_loop
async def test_one_rollout_of_a_model_at_a_time(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    devices = fleet(platform, 3)
    async with platform.running() as coordinator:
        first = await adopt_first(platform, devices)
        await coordinator.publish(fraud_model(2), model="fraud")
        text = CANARY.replace("NAME", "second")
        begun = await coordinator.start_rollout(text)
        assert (await coordinator.start_rollout(text)).name == begun.name  # the same once more: no harm
        with pytest.raises(Malformed, match="name was used"):
            await coordinator.start_rollout(text.replace("20}", "21}"))
        await coordinator.publish(fraud_model(3), model="fraud", parent=first)
        with pytest.raises(Malformed, match="rollout second of fraud is running"):
            await coordinator.start_rollout(CANARY.replace("NAME", "third"))
        await coordinator.abort_rollout("second")
        await until(lambda: len(running(platform, first)) == 3)
        assert (await coordinator.start_rollout(CANARY.replace("NAME", "third"))).state == "running"
