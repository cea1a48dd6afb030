"""A device whose disk fails goes on answering with what runs, says so once, and goes on where it was when it can."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.device import Device
from edge_runtime.outbox import Outbox
from edge_runtime.update import Event, State
from model_delta.durable import storage_error
from model_delta.encoding import pack
from model_delta.errors import StorageFailed, StorageFull
from model_delta.release import Release
from model_delta.topics import ContributionReceipt, down
from tests.edge_runtime.test_device import ONES, events, play, two_versions
from tests.edge_runtime.test_outbox import decision
from tests.edge_runtime.test_participation import on_first_version, participation
from tests.edge_runtime.world import Life, World, eventually
from tests.fakes.disk import Disk

SOON = {"retry_most_s": 0.05}


async def answers(device: Device, release: Release) -> None:
    found = await device.decide(ONES)
    assert (found.where, found.manifest, found.fallback) == ("device", release.digest, "")


def alarm_of(world: World) -> str:
    return world.reports[-1].alarm if world.reports else ""


def test_an_update_waits_for_the_disk_and_the_old_version_answers_meanwhile(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(world: World, folder: Path) -> None:
        first, second = await two_versions(world, folder)
        disk = Disk(folder / "state")
        disk.refuse_writes()
        device = world.device("pos-0001", folder, **SOON)
        async with Life(device):
            await eventually(lambda: "the disk refuses" in alarm_of(world), what="the report tells it")
            await asyncio.sleep(0.2)
            await answers(device, first)
            assert device.state == State.IDLE
            disk.take_writes()
            await eventually(lambda: events(world) == ["adopted", "adopted"])
            await answers(device, second)
            await eventually(lambda: not alarm_of(world), what="the alarm is over")

    with caplog.at_level(logging.INFO, "edge_runtime"):
        play(story, tmp_path)
    told = [line.getMessage() for line in caplog.records if line.levelno >= logging.WARNING]
    assert len(told) == 1, "a cause is logged once, however often it is met"
    assert "marks (Is a directory): check it and how it is mounted" in told[0]


def test_a_device_that_starts_on_such_a_disk_runs_what_stands_there_before_it_writes_anything(tmp_path: Path) -> None:
    """Here it has an outcome to tell, which it would write down first."""

    async def story(world: World, folder: Path) -> None:
        first, _ = await two_versions(world, folder)
        device = world.device("pos-0001", folder, **SOON)
        journal = device.installation._journal
        journal.write(**journal.note(journal.outcome("withdrawn", "told late")))
        disk = Disk(folder / "state")
        disk.refuse_writes()
        async with Life(device, payments=False):
            await eventually(lambda: bool(device.installation.alarm))
            await answers(device, first)
            await asyncio.sleep(0.1)
            await answers(device, first)
            disk.take_writes()
            await eventually(lambda: events(world)[:2] == ["adopted", "withdrawn"])

    play(story, tmp_path)


@pytest.mark.parametrize("event", [Event.FETCHED, Event.SWITCHED, Event.HEALTHY])
def test_the_disk_may_fail_at_any_step_of_an_update(
    tmp_path: Path, event: Event, caplog: pytest.LogCaptureFixture
) -> None:
    """What runs at that moment answers on; nothing is lost, and nothing is told twice."""

    async def story(world: World, folder: Path) -> None:
        first, second = await two_versions(world, folder)
        disk = Disk(folder / "state")
        device = world.device("pos-0001", folder, **SOON)
        fails_at(device, event, disk)
        async with Life(device):
            await eventually(lambda: bool(device.installation.alarm))
            await asyncio.sleep(0.15)
            await answers(device, second if event is Event.HEALTHY else first)
            disk.take_writes()
            await eventually(lambda: events(world) == ["adopted", "adopted"])
            await answers(device, second)

    with caplog.at_level(logging.INFO, "edge_runtime"):
        play(story, tmp_path)
    told = [line for line in caplog.records if "what runs goes on answering" in line.getMessage()]
    assert len(told) == 1, "a cause is logged once, however often it is met"


def test_a_version_that_is_condemned_stops_answering_although_nothing_can_be_written(tmp_path: Path) -> None:
    async def story(world: World, folder: Path) -> None:
        first, _ = await two_versions(world, folder, golden_shift=0.3)
        disk = Disk(folder / "state")
        device = world.device("pos-0001", folder, **SOON)
        fails_at(device, Event.UNHEALTHY, disk)
        async with Life(device):
            await eventually(lambda: bool(device.installation.alarm))
            await asyncio.sleep(0.15)
            await answers(device, first)
            disk.take_writes()
            await eventually(lambda: events(world) == ["adopted", "rolled_back"])
            await answers(device, first)

    play(story, tmp_path)


def test_a_version_is_withdrawn_although_the_plan_cannot_be_stored(tmp_path: Path) -> None:
    async def story(world: World, folder: Path) -> None:
        first, second = await two_versions(world, folder)
        disk = Disk(folder / "state")
        device = world.device("pos-0001", folder, **SOON)
        async with Life(device):
            await eventually(lambda: events(world) == ["adopted", "adopted"])
            disk.refuse_writes()
            world.plan(first, withdrawn=(second.digest,))
            await eventually(lambda: second.digest in device.running.withdrawn)
            assert (await device.decide(ONES)).fallback == "withdrawn"
            disk.take_writes()
            await eventually(lambda: events(world)[2:] == ["rolled_back", "adopted"], what=str(events(world)))
            await answers(device, first)

    play(story, tmp_path)


def test_what_was_opened_answers_on_when_its_file_cannot_be_read_any_more(tmp_path: Path) -> None:
    async def story(world: World, folder: Path) -> None:
        first, _ = await two_versions(world, folder)
        disk = Disk(folder / "state")
        device = world.device("pos-0001", folder, **SOON)
        async with Life(device):
            await eventually(lambda: device.running.digest == first.digest)
            disk.refuse_reading("slots/a/manifest.envelope")
            disk.refuse_reading("slots/a/model.bin")
            assert device.installation.file_root() == ""
            device.installation._run_slot("a")
            await answers(device, first)

    play(story, tmp_path)


def fails_at(device: Device, event: Event, disk: Disk) -> None:
    """Make the disk refuse everything from the moment in which `event` would be written down."""
    advance = device.installation._advance
    failed: list[Event] = []

    def advancing(happened: Any) -> Any:
        if happened.event is event and not failed:
            failed.append(event)
            disk.refuse_writes()
        return advance(happened)

    device.installation._advance = advancing  # type: ignore[method-assign]


def test_a_queue_on_a_disk_that_takes_nothing_counts_what_it_lost(tmp_path: Path) -> None:
    folder = tmp_path / "outbox"
    outbox = Outbox(folder, 7, segment_records=2)
    outbox.append(decision(1))
    outbox.append(decision(2))
    (folder / f"{3:016d}.log").mkdir()  # where the next segment would begin
    Disk(tmp_path).refuse_writes_of("outbox/marks")
    assert outbox.append(decision(3)) == 0
    assert outbox.marks.dropped == 1
    with pytest.raises(StorageFailed, match=r"marks.*check it and how it is mounted"):
        outbox.next_range()
    Disk(tmp_path).take_writes()
    assert outbox.append(decision(4)) == 4
    assert outbox.next_range() == (1, 4)
    assert [sequence for sequence, _ in outbox.read(1, 4)] == [1, 2, 4]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EIO, errno.EACCES])
def test_a_disk_that_is_not_full_is_not_called_full(number: int) -> None:
    error = storage_error("update.record", OSError(number, os.strerror(number)))
    assert type(error) is StorageFailed
    assert f"update.record ({os.strerror(number)}): check it" in str(error)
    assert type(storage_error("x", OSError(errno.ENOSPC, "full"))) is StorageFull


@pytest.fixture
def read_only_again(tmp_path: Path) -> Iterator[Any]:
    """Mounts a folder over itself, read-only: what is opened from then on cannot be written."""
    mounted: list[Path] = []

    def mount(folder: Path) -> None:
        for words in (["--bind", str(folder), str(folder)], ["-o", "remount,bind,ro", str(folder)]):
            if subprocess.run(["mount", *words], capture_output=True).returncode:
                pytest.skip("no permission to mount")
            mounted.append(folder)

    yield mount
    if mounted:
        subprocess.run(["umount", str(mounted[0])], check=True)


def test_a_file_system_that_turns_read_only(tmp_path: Path, read_only_again: Any) -> None:
    """The kernel's own EROFS, under a running device and under one that starts."""

    async def story(world: World, folder: Path) -> None:
        first, _ = await two_versions(world, folder)
        device = world.device("pos-0001", folder, **SOON)
        async with Life(device):
            await eventually(lambda: device.running.digest == first.digest)
            (folder / "state" / "torn.new").write_text("left behind")
            read_only_again(folder / "state")
            await answers(device, first)
        later = world.device("pos-0001", folder, **SOON)
        async with Life(later):
            await eventually(lambda: later.running.digest == first.digest)
            await eventually(lambda: "Read-only file system" in alarm_of(world), what=alarm_of(world))
            await answers(later, first)
            assert world.reports[-1].dropped > 0

    play(story, tmp_path)


def test_a_round_that_is_announced_while_the_disk_takes_nothing_is_joined_once_it_does(tmp_path: Path) -> None:
    async def story(world: World, folder: Path) -> None:
        first = await on_first_version(world, folder)
        disk = Disk(folder / "state")
        device = world.device("pos-0001", folder, **SOON)
        part = participation(device)
        async with Life(device):
            await eventually(lambda: device.running.digest == first.digest)
            disk.refuse_writes()
            world.round(first)
            await eventually(lambda: part._untaken != b"")
            assert part.refused == 0, "nothing is wrong with the announcement"
            disk.take_writes()
            await eventually(lambda: part.record.ended == "accepted")

    play(story, tmp_path)


def test_a_device_does_not_train_again_and_again_for_a_disk_that_takes_nothing(tmp_path: Path) -> None:
    async def story(world: World, folder: Path) -> None:
        first = await on_first_version(world, folder)
        disk = Disk(folder / "state")
        device = world.device("pos-0001", folder, **SOON)
        part, trained = participation(device), []
        part._jitter = NoWait()
        train = part._learning.train

        def counted(*arguments: Any) -> Any:
            trained.append(1)
            return train(*arguments)

        part._learning.train = counted
        async with Life(device):
            await eventually(lambda: device.running.digest == first.digest)
            disk.refuse_writes_of("round.record")
            world.round(first)
            await eventually(lambda: len(trained) > 0)
            await asyncio.sleep(0.15)
            assert len(trained) == 1
            assert part.sitting_out.reason == "contribution not made"
            disk.take_writes()
            await eventually(lambda: part.record.ended == "accepted")

    play(story, tmp_path)


class NoWait:
    """Draws that make the shortest pauses."""

    def random(self) -> float:
        return -0.48


def test_a_receipt_that_the_disk_does_not_take_is_believed_all_the_same(tmp_path: Path) -> None:
    async def story(world: World, folder: Path) -> None:
        first = await on_first_version(world, folder)
        disk = Disk(folder / "state")
        world.receipts = False
        world.round(first)
        device = world.device("pos-0001", folder, **SOON)
        part = participation(device)
        async with Life(device):
            await eventually(lambda: len(world.contributions) == 1)
            disk.refuse_writes()
            receipt = pack(ContributionReceipt("round-1", True))
            await world.coordinator.publish(down("pos-0001", "receipt"), receipt)
            await eventually(lambda: part.record.ended == "accepted")
            await answers(device, first)

    play(story, tmp_path)
