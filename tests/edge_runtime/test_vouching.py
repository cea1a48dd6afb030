"""A device runs what the repository vouches for, whoever signed the plan that names it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from edge_runtime.device import Device
from edge_runtime.update import State
from model_delta.keys.keyring import EmbeddedKeyring
from model_delta.topics import ChunkRequest
from model_delta.trust.authority import TIMESTAMP_LIFE_S
from tests.edge_runtime.world import TENANT, Life, World, eventually
from tests.fakes.tuf_site import DAY, new_key

Story = Callable[[World, Path], Awaitable[None]]


def play(story: Story, tmp_path: Path) -> None:
    async def run() -> None:
        world = World(tmp_path)
        world.start()
        await story(world, tmp_path / "pos-0001")

    asyncio.run(run())


def events(world: World) -> list[str]:
    return [outcome.event for outcome in world.outcomes]


async def adopted(world: World, device: Device, digest: str) -> None:
    await eventually(lambda: device.running.digest == digest and device.state == State.IDLE, what=f"runs {digest[:8]}")


def a_minute_later(device: Device) -> None:
    """What the device asked last is no longer fresh."""
    device.vouching._refreshed -= 60.0


def test_a_stolen_plan_key_makes_no_device_run_what_is_no_target(tmp_path: Path) -> None:
    """The thief signs plans, manifests and keys as the coordinator would; only the region's role is not his."""

    async def story(world: World, folder: Path) -> None:
        first = world.publish(world.model(seed=1))
        world.plan(first)
        async with Life(world.device("pos-0001", folder)) as device:
            await adopted(world, device, first.digest)
            invented = world.publish(world.model(seed=2), first, vouched=False)
            world.plan(invented, stable=first)
            await eventually(lambda: events(world) == ["adopted", "refused"])
            assert device.running.digest == first.digest
            assert device.state == State.IDLE
        assert "no role of eu-west vouches for it" in world.outcomes[1].reason

    play(story, tmp_path)


def test_a_version_that_was_withdrawn_is_refused_even_where_it_stands_in_the_other_slot(tmp_path: Path) -> None:
    async def story(world: World, folder: Path) -> None:
        first, second = world.publish(world.model(seed=1)), world.publish(world.model(seed=2))
        world.plan(first)
        async with Life(world.device("pos-0001", folder)) as device:
            await adopted(world, device, first.digest)
            world.plan(second)
            await adopted(world, device, second.digest)
            world.withdraw(first)
            a_minute_later(device)
            world.plan(first)  # named stable, so that no release floor is in the way
            await eventually(lambda: events(world) == ["adopted", "adopted", "refused"])
            assert device.running.digest == second.digest

    play(story, tmp_path)


def test_the_word_may_come_after_the_plan(tmp_path: Path) -> None:
    async def story(world: World, folder: Path) -> None:
        first = world.publish(world.model(seed=1), vouched=False)
        world.plan(first)
        async with Life(world.device("pos-0001", folder, vouching_patience_s=30.0)) as device:
            await eventually(lambda: device.state == State.FETCHING)
            await asyncio.sleep(0.05)
            assert not device.running.digest
            world.vouch(first)
            await adopted(world, device, first.digest)

    play(story, tmp_path)


def test_a_rotated_regional_key_is_followed(tmp_path: Path) -> None:
    async def story(world: World, folder: Path) -> None:
        first = world.publish(world.model(seed=1))
        world.plan(first)
        async with Life(world.device("pos-0001", folder)) as device:
            await adopted(world, device, first.digest)
            stolen = world.site.region
            world.site.rotate_region()
            second = world.publish(world.model(seed=2), first)
            world.plan(second)
            await adopted(world, device, second.digest)
            assert world.site.region is not stolen

    play(story, tmp_path)


def test_new_plan_keys_come_with_the_repository_and_the_old_ones_end(tmp_path: Path) -> None:
    async def story(world: World, folder: Path) -> None:
        first, second = world.publish(world.model(seed=1)), world.publish(world.model(seed=2))
        old = world.keyring
        world.plan(first)
        async with Life(world.device("pos-0001", folder)) as device:
            await adopted(world, device, first.digest)
            world.keyring = EmbeddedKeyring.create(tmp_path / "other-keys", TENANT, clock=lambda: world.now)
            world.site.rotate_anchors(world.keyring.anchors())
            a_minute_later(device)  # the device asks for unknown keys, though not every second
            world.plan(second)
            await adopted(world, device, second.digest)
            assert device.vouching.anchors == world.keyring.anchors()
            refused, world.keyring = device.installation.plans.refused, old
            world.plan(first)
            await eventually(lambda: device.installation.plans.refused > refused)
            assert device.running.digest == second.digest
        again = world.device("pos-0001", folder)
        assert again.vouching.anchors != old.anchors()

    play(story, tmp_path)


def test_while_news_is_held_back_the_device_runs_on_takes_nothing_new_and_says_so(tmp_path: Path) -> None:
    async def story(world: World, folder: Path) -> None:
        first, second = world.publish(world.model(seed=1)), world.publish(world.model(seed=2))
        world.plan(first)
        async with Life(world.device("pos-0001", folder)) as device:
            await adopted(world, device, first.digest)
            world.frozen = True
            world.now += 2 * DAY
            world.plan(second)
            await eventually(lambda: device.state == State.FETCHING and device.vouching.status.state == "stale")
            assert device.running.digest == first.digest
            assert device.vouching.alarm == ""
            world.now += 7 * DAY
            world.plan(second)
            await eventually(lambda: any("holding news back" in report.alarm for report in world.reports))
            assert device.running.digest == first.digest
            world.frozen = False
            await adopted(world, device, second.digest)
            await eventually(lambda: world.reports[-1].alarm == "")

    play(story, tmp_path)


def test_a_clock_that_was_set_back_does_not_make_old_metadata_fresh(tmp_path: Path) -> None:
    async def story(world: World, folder: Path) -> None:
        first = world.publish(world.model(seed=1))
        world.plan(first)
        start = world.now
        async with Life(world.device("pos-0001", folder)) as device:
            await adopted(world, device, first.digest)
            world.now += 30 * DAY
            a_minute_later(device)
            await device.vouching.refresh()
        signed = world.now
        world.now = start - 400 * DAY
        again = world.device("pos-0001", folder)
        assert again.vouching.now() >= signed - TIMESTAMP_LIFE_S > start

    play(story, tmp_path)


def test_a_mirror_with_metadata_that_does_not_verify_is_set_aside_for_the_next(tmp_path: Path) -> None:
    def spoil(region: str, request: ChunkRequest, data: bytes) -> bytes:
        spoilt = region == "eu-west" and request.name.endswith(".snapshot.json")
        return data.replace(b"1", b"2") if spoilt else data

    async def story(world: World, folder: Path) -> None:
        world.spoil = spoil
        first = world.publish(world.model(seed=1))
        world.plan(first)
        async with Life(world.device("pos-0001", folder)) as device:
            await adopted(world, device, first.digest)
            assert device.vouching.alarm == ""

    play(story, tmp_path)


def test_nothing_writes_on_into_the_folder_of_a_device_that_has_stopped(tmp_path: Path) -> None:
    async def story(world: World, folder: Path) -> None:
        asked = asyncio.Event()

        async def silent(*_: object) -> tuple[int, bytes]:
            asked.set()
            await asyncio.Event().wait()
            raise AssertionError

        device = world.device("pos-0001", folder)
        device.vouching._fetcher.part = silent  # type: ignore[method-assign]
        async with Life(device):
            await eventually(asked.is_set)
        assert not [thread.name for thread in threading.enumerate() if " trust" in thread.name]

    play(story, tmp_path)


@pytest.mark.slow
def test_a_device_back_after_400_days_and_12_rotations_of_every_key_updates_by_itself(tmp_path: Path) -> None:
    async def story(world: World, folder: Path) -> None:
        first = world.publish(world.model(seed=1))
        world.plan(first)
        async with Life(world.device("pos-0001", folder)) as device:
            await adopted(world, device, first.digest)
        for _ in range(12):
            world.now += 400 * DAY / 12
            world.site.keep_fresh(world.now)
            holders = [new_key() for _ in range(3)]
            world.site.rotate_root(root=holders, targets=[new_key() for _ in range(3)])
            world.site.rotate_root(snapshot=[new_key()], timestamp=[new_key()])
            world.site.repository.stage_targets(world.now)
            world.site.finish("targets", world.site.targets[:2])
            world.site.rotate_region()
        world.keyring = EmbeddedKeyring.create(tmp_path / "other-keys", TENANT, clock=lambda: world.now)
        world.site.rotate_anchors(world.keyring.anchors())
        second = world.publish(world.model(seed=2))
        world.plan(second)
        async with Life(world.device("pos-0001", folder)) as device:
            await adopted(world, device, second.digest)
            assert device.vouching.status.root == 25
            assert device.vouching.anchors == world.keyring.anchors()

    play(story, tmp_path)
