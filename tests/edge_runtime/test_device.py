"""A device's life over a broker in memory: adopted, delta, refused, rolled back, withdrawn, cut off at every moment."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import msgspec
import numpy as np
import pytest

from edge_runtime.device import Device
from edge_runtime.inference import LoadedModel
from edge_runtime.installation import Happened, Installation
from edge_runtime.onnx_model import open_model
from edge_runtime.probation import ProbationRules
from edge_runtime.slots import SlotName, SlotRoom
from edge_runtime.update import Command, State
from model_delta.encoding import pack
from model_delta.errors import Malformed
from model_delta.manifest import Manifest
from model_delta.release import Release
from model_delta.topics import ChunkRequest, plan_topic
from tests.edge_runtime.world import MODEL, QUIET, TENANT, Life, World, eventually, requirements

ONES = dict.fromkeys(QUIET, 1.0)


def play(story: Callable[[World, Path], Coroutine[Any, Any, None]], folder: Path) -> None:
    async def run() -> None:
        world = World(folder)
        world.start()
        await story(world, folder / "pos-0001")

    asyncio.run(run())


def events(world: World) -> list[str]:
    return [outcome.event for outcome in world.outcomes]


def test_a_version_is_fetched_verified_judged_and_answers(tmp_path: Path) -> None:
    async def story(world: World, folder: Path) -> None:
        first = world.publish(world.model(seed=1))
        world.plan(first)
        device = world.device("pos-0001", folder)
        before = await device.decide(ONES)
        assert (before.where, before.fallback, before.approved) == ("baseline", "no model", True)
        async with Life(device):
            await eventually(lambda: events(world) == ["adopted"])
        assert device.running.digest == first.digest
        after = await device.decide(ONES)
        assert (after.where, after.manifest, after.fallback) == ("device", first.digest, "")
        outcome = world.outcomes[0]
        assert (outcome.manifest, outcome.route) == (first.digest, "whole")
        assert outcome.bytes_received > sum(len(blob) for blob in first.blobs.values())
        assert world.chunks["ap-south"] == 0, "the home region served it alone"
        hello = [payload for topic, payload in world.broker.log if topic.endswith("/up/hello")]
        assert len(hello) == 1

    play(story, tmp_path)


def test_an_update_travels_as_a_patch_from_what_runs(tmp_path: Path) -> None:
    async def story(world: World, folder: Path) -> None:
        first = world.publish(world.model(seed=1))
        second = world.publish(world.model(seed=2, like=world.files[first.digest]), first)
        world.plan(first)
        async with Life(world.device("pos-0001", folder)) as device:
            await eventually(lambda: device.running.digest == first.digest and device.state == State.IDLE)
            world.plan(second)
            await eventually(lambda: len(world.outcomes) == 2)
        adopted = world.outcomes[1]
        assert (adopted.event, adopted.manifest, adopted.route) == ("adopted", second.digest, "patch")
        assert adopted.bytes_received < world.outcomes[0].bytes_received

    play(story, tmp_path)


def test_a_long_absence_is_made_good_by_a_chain_of_patches(tmp_path: Path) -> None:
    async def story(world: World, folder: Path) -> None:
        releases = [world.publish(world.model(seed=1))]
        for seed in (2, 3, 4):
            parent = releases[-1]
            releases.append(world.publish(world.model(seed=seed, like=world.files[parent.digest]), parent))
        world.plan(releases[0])
        async with Life(world.device("pos-0001", folder)) as device:
            await eventually(lambda: device.running.digest == releases[0].digest and device.state == State.IDLE)
        world.now += 20 * 86_400
        for release in releases:  # the files are small here; a chain pays only where the whole is dear
            dear = tuple(msgspec.structs.replace(blob, size=900_000) for blob in release.delivery.segments)
            delivery = msgspec.structs.replace(release.delivery, segments=dear)
            world.store[("delivery", release.digest)] = pack(delivery)
        world.plan(releases[-1])
        async with Life(world.device("pos-0001", folder)) as device:
            await eventually(lambda: device.running.digest == releases[-1].digest and device.state == State.IDLE)
            await eventually(lambda: len(world.outcomes) == 2)
        assert world.outcomes[-1].route == "chain"

    play(story, tmp_path)


def test_a_dead_home_region_costs_a_wait_and_nothing_else(tmp_path: Path) -> None:
    async def story(world: World, folder: Path) -> None:
        world.dead.add("eu-west")
        world.plan(world.publish(world.model(seed=1)))
        async with Life(world.device("pos-0001", folder)):
            await eventually(lambda: events(world) == ["adopted"])
        assert world.chunks["ap-south"] > 0

    play(story, tmp_path)


def test_a_lying_mirror_is_found_out_and_the_other_asked(tmp_path: Path) -> None:
    def spoil(region: str, request: ChunkRequest, data: bytes) -> bytes:
        spoilt = region == "eu-west" and request.kind == "blob"
        return bytes([data[0] ^ 1]) + data[1:] if spoilt and data else data

    async def story(world: World, folder: Path) -> None:
        world.spoil = spoil
        world.plan(world.publish(world.model(seed=1)))
        async with Life(world.device("pos-0001", folder)):
            await eventually(lambda: events(world) == ["adopted"])
        assert world.chunks["ap-south"] > 0

    play(story, tmp_path)


def test_an_older_plan_and_a_forged_one_change_nothing(tmp_path: Path) -> None:
    async def story(world: World, folder: Path) -> None:
        first, second = world.publish(world.model(seed=1)), world.publish(world.model(seed=2))
        world.plan(first)
        old = world.broker.retained[plan_topic(TENANT, MODEL)]
        world.plan(second)
        async with Life(world.device("pos-0001", folder)) as device:
            await eventually(lambda: device.running.digest == second.digest and device.state == State.IDLE)
            world.broker.deliver(plan_topic(TENANT, MODEL), old)
            world.broker.deliver(plan_topic(TENANT, MODEL), b"not even CBOR")
            await eventually(lambda: device.installation.plans.refused == 2)
            assert device.running.digest == second.digest
            assert device.installation.plans.serial == 2

    play(story, tmp_path)


def test_a_version_that_computes_something_else_never_answers(tmp_path: Path) -> None:
    async def story(world: World, folder: Path) -> None:
        first = world.publish(world.model(seed=1))
        bad = world.publish(world.model(seed=2), first, golden_shift=0.3)
        world.plan(first)
        answered: set[str] = set()
        async with Life(world.device("pos-0001", folder)) as device:
            await eventually(lambda: events(world) == ["adopted"])
            world.plan(bad, stable=first)
            while len(world.outcomes) < 2:
                answered.add((await device.decide(ONES)).manifest)
                await asyncio.sleep(0)
            assert device.running.digest == first.digest
        outcome = world.outcomes[1]
        assert (outcome.event, outcome.manifest, outcome.seconds_active) == ("rolled_back", bad.digest, 0.0)
        assert "golden case 0: score differs by 0.3" in outcome.reason
        assert answered == {first.digest}

    play(story, tmp_path)


class Slow:
    """A model that takes its time."""

    def __init__(self, model: LoadedModel, seconds: float) -> None:
        self._model, self._seconds, self.digest = model, seconds, model.digest

    def run(self, inputs: Any) -> dict[str, np.ndarray[Any, Any]]:
        time.sleep(self._seconds)
        return self._model.run(inputs)


def test_a_slow_version_is_rolled_back_by_the_device_itself_and_not_tried_again(tmp_path: Path) -> None:
    async def story(world: World, folder: Path) -> None:
        first = world.publish(world.model(seed=1))
        slow = world.publish(world.model(seed=2), first, requirements=requirements(latency_ms_max=5.0))

        def open_slowly(manifest: Manifest, file: Path) -> LoadedModel:
            found = open_model(manifest, file)
            return Slow(found, 0.02) if found.digest == slow.digest else found

        world.plan(first)
        async with Life(world.device("pos-0001", folder, open_model=open_slowly)) as device:
            await eventually(lambda: events(world) == ["adopted"])
            world.plan(slow, stable=first, share=0.9999, name="bad")
            world.now += 5
            await eventually(lambda: len(world.outcomes) == 2)
            assert device.running.digest == first.digest
            world.plan(slow, stable=first, name="bad")
            await eventually(lambda: device.installation.plans.serial == 3)
            await asyncio.sleep(0.1)
            assert (device.running.digest, device.state) == (first.digest, State.IDLE)
        assert events(world) == ["adopted", "rolled_back"]
        assert "took more than 5 ms" in world.outcomes[1].reason

    play(story, tmp_path)


def test_a_withdrawn_version_is_left_at_once_without_a_byte(tmp_path: Path) -> None:
    async def story(world: World, folder: Path) -> None:
        first = world.publish(world.model(seed=1))
        second = world.publish(world.model(seed=2), first)
        world.plan(first)
        async with Life(world.device("pos-0001", folder)) as device:
            await eventually(lambda: events(world) == ["adopted"])
            world.plan(second, stable=first)
            await eventually(lambda: events(world) == ["adopted", "adopted"])
            chunks = dict(world.chunks)
            world.now += 60
            world.plan(second, stable=first, share=0.0, withdrawn=(second.digest,))
            await eventually(lambda: len(world.outcomes) == 4)
            assert device.running.digest == first.digest
            assert world.chunks == chunks, "the stable version was still in the other slot"
        left, back = world.outcomes[2:]
        assert (left.event, left.manifest, left.reason) == ("rolled_back", second.digest, "withdrawn by the plan")
        assert left.seconds_active >= 60
        assert (back.event, back.manifest, back.route) == ("adopted", first.digest, "none")

    play(story, tmp_path)


def test_a_rollout_stopped_during_probation_restores_the_old_version(tmp_path: Path) -> None:
    async def story(world: World, folder: Path) -> None:
        first = world.publish(world.model(seed=1))
        second = world.publish(world.model(seed=2), first)
        world.plan(first)
        patient = ProbationRules(decisions=10_000, seconds=30)
        async with Life(world.device("pos-0001", folder)):
            await eventually(lambda: events(world) == ["adopted"])
        async with Life(world.device("pos-0001", folder, probation=patient)) as device:
            world.plan(second, stable=first)
            await eventually(lambda: device.running.digest == second.digest)
            assert device.state == State.ON_PROBATION
            world.now += 7
            world.plan(second, stable=first, share=0.0, withdrawn=(second.digest,))
            await eventually(lambda: events(world) == ["adopted", "rolled_back"])
            assert (device.running.digest, device.state) == (first.digest, State.IDLE)
        assert world.outcomes[1].seconds_active >= 7
        assert asyncio.all_tasks() == {asyncio.current_task()}

    play(story, tmp_path)


def test_a_first_version_that_fails_leaves_safe_mode_until_a_better_one_comes(tmp_path: Path) -> None:
    async def story(world: World, folder: Path) -> None:
        bad = world.publish(world.model(seed=1), golden_shift=0.3)
        good = world.publish(world.model(seed=2))
        world.plan(bad)
        async with Life(world.device("pos-0001", folder)) as device:
            await eventually(lambda: device.state == State.SAFE)
            decision = await device.decide({**QUIET, "amount": 51.0})
            assert (decision.where, decision.approved, decision.manifest) == ("baseline", False, "")
            await eventually(lambda: events(world) == ["rolled_back", "safe_mode"])
            assert world.reports[-1].safe_mode
            world.plan(good)
            await eventually(lambda: device.running.digest == good.digest and device.state == State.IDLE)

    play(story, tmp_path)


def test_an_expired_version_stops_answering_and_nothing_breaks(tmp_path: Path) -> None:
    async def story(world: World, folder: Path) -> None:
        first = world.publish(world.model(seed=1), lifetime_s=100)
        world.plan(first)
        async with Life(world.device("pos-0001", folder)) as device:
            await eventually(lambda: events(world) == ["adopted"])
            world.now += 101
            assert (await device.decide(ONES)).fallback == "expired"
            world.now -= 101  # the clock was wrong, and is put right
            assert (await device.decide(ONES)).where == "device"
            world.now += 101
        again = world.device("pos-0001", folder)
        assert (await again.decide(ONES)).where == "baseline"

    play(story, tmp_path)


def test_features_that_are_missing_are_named(tmp_path: Path) -> None:
    async def story(world: World, folder: Path) -> None:
        device = world.device("pos-0001", folder)
        with pytest.raises(Malformed, match=r"expected 4 named values, missing hour, ratio"):
            await device.decide({"amount": 1.0, "count": 2.0})
        with pytest.raises(Malformed, match=r"expected finite numbers, found otherwise in hour"):
            await device.decide({**QUIET, "hour": float("nan")})

    play(story, tmp_path)


def test_the_power_may_go_off_before_and_after_every_command(tmp_path: Path) -> None:
    """The device dies at every command in turn, before performing it and then after it, before what came of it is
    stored. It must still end up with the second version, and tell of it exactly once."""

    async def story(world: World, folder: Path) -> None:
        _, second = await two_versions(world, folder)
        for command in (Command.RUN, Command.FETCH, Command.SWITCH, Command.JUDGE):
            for side in ("before", "after"):
                device = world.device("pos-0001", folder)
                cut_at(device.installation, command, side)
                await dies(device)
        await ends_with_exactly(world, folder, second.digest, ["adopted", "adopted"])

    play(story, tmp_path)


def test_the_power_may_go_off_at_every_write(tmp_path: Path) -> None:
    """The device dies at its first write to the slots' folder, then at its second, and so on, before the write and
    after it; nothing it wrote may lead elsewhere."""

    async def story(world: World, folder: Path) -> None:
        _, second = await two_versions(world, folder)
        deaths = 0
        while True:
            device = world.device("pos-0001", folder)
            death = cut_at_write(device, number=deaths // 2 % 8 + 1, side=("before", "after")[deaths % 2])
            if not await dies(device, death, until=second.digest):
                break
            deaths += 1
            assert deaths < 60
        assert deaths >= 5
        await ends_with_exactly(world, folder, second.digest, ["adopted", "adopted"])

    play(story, tmp_path)


def test_the_power_may_go_off_while_a_bad_version_is_thrown_out(tmp_path: Path) -> None:
    async def story(world: World, folder: Path) -> None:
        first, bad = await two_versions(world, folder, golden_shift=0.3)
        for command in (Command.JUDGE, Command.RESTORE, Command.REPORT):
            for side in ("before", "after") if command is not Command.REPORT else ("before",):
                device = world.device("pos-0001", folder)
                cut_at(device.installation, command, side)
                await dies(device)
        await ends_with_exactly(world, folder, first.digest, ["adopted", "rolled_back"])
        assert world.outcomes[-1].manifest == bad.digest

    play(story, tmp_path)


async def two_versions(world: World, folder: Path, **options: Any) -> tuple[Release, Release]:
    """A device on `folder` runs the first version; the plan now wants the second."""
    first = world.publish(world.model(seed=1))
    second = world.publish(world.model(seed=2, like=world.files[first.digest]), first, **options)
    world.plan(first)
    async with Life(world.device("pos-0001", folder)):
        await eventually(lambda: events(world) == ["adopted"])
    world.plan(second, stable=first)
    return first, second


def cut_at(target: Installation, command: Command, side: str) -> None:
    """Make `target` die when it comes to `command`."""
    perform = target._perform

    async def performing(now: Command) -> Happened:
        if now is command and side == "before":
            raise PowerCut
        happened = await perform(now)
        if now is command:
            raise PowerCut
        return happened

    target._perform = performing  # type: ignore[assignment, method-assign]


def cut_at_write(device: Device, number: int, side: str) -> list[str]:
    """Make `device` die at its `number`-th write to the slots' folder; the list is filled when it does. `side`: before
    it, after it, or "torn", with half of what goes to a file in the making."""
    slots = device.installation._slots
    writes: list[str] = []
    death: list[str] = []

    def dying(write: Callable[..., None]) -> Callable[..., None]:
        def writing(*arguments: Any, **options: Any) -> None:
            writes.append(write.__name__)
            if len(writes) > number or (len(writes) == number and side != "after"):
                if side == "torn" and write.__name__ == "write":
                    write(arguments[0][: len(arguments[0]) // 2])
                death.append(write.__name__)
                raise PowerCut
            write(*arguments, **options)
            if len(writes) == number:
                death.append(write.__name__)
                raise PowerCut

        return writing

    slots.write_record = dying(slots.write_record)  # type: ignore[method-assign]
    slots.point_to = dying(slots.point_to)  # type: ignore[method-assign]
    slots.install = dying(slots.install)  # type: ignore[method-assign]
    room = slots.room

    def fragile(slot: SlotName) -> SlotRoom:
        made = room(slot)
        opened = made.open

        @contextmanager
        def opening(name: str) -> Iterator[BinaryIO]:
            with opened(name) as file:
                yield cast(BinaryIO, FragileFile(file, dying(cast(Callable[..., None], file.write))))

        made.open = opening  # type: ignore[method-assign]
        return made

    slots.room = fragile  # type: ignore[method-assign]
    return death


class FragileFile:
    """An open file with another way to write."""

    def __init__(self, file: BinaryIO, write: Callable[..., None]) -> None:
        self._file, self.write = file, write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


async def dies(device: Device, death: Sequence[str] = (), until: str = "never") -> bool:
    """Run `device` until the power goes off (True), or until it is idle on version `until` and had time to tell."""
    task = asyncio.create_task(device.run())
    try:
        await eventually(
            lambda: task.done() or bool(death) or (device.running.digest == until and device.state == State.IDLE),
            what=device.state,
        )
        if not task.done() and not death:
            await asyncio.sleep(0.1)
    finally:
        task.cancel()
        result = (await asyncio.gather(task, return_exceptions=True))[0]
    if death:
        return True
    if isinstance(result, asyncio.CancelledError):
        return False
    assert isinstance(result, BaseExceptionGroup)
    assert result.subgroup(PowerCut) is not None, result
    return True


async def ends_with_exactly(world: World, folder: Path, digest: str, told: list[str]) -> None:
    """One last, undisturbed life: what answers, and what the coordinator has heard in all."""
    async with Life(world.device("pos-0001", folder)) as device:
        await eventually(lambda: device.running.digest == digest and device.state == State.IDLE)
        await eventually(lambda: len(world.outcomes) >= len(told))
        await asyncio.sleep(0.15)
    assert events(world) == told


class PowerCut(Exception):
    """The power goes off here."""
