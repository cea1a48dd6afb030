"""A device's life over a broker in memory: adopted, delta, refused, rolled back, withdrawn, cut off at every moment."""

from __future__ import annotations

import asyncio
from pathlib import Path

from edge_runtime.update import State
from tests.edge_runtime.world import Life, World, eventually


def test_a_version_is_fetched_verified_judged_and_answers(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        world.start()
        first = world.publish(world.model(seed=1))
        world.plan(first)
        device = world.device("pos-0001", tmp_path / "pos-0001")
        before = await device.decide(dict.fromkeys(("amount", "hour", "ratio", "count"), 1.0))
        assert (before.where, before.fallback, before.approved) == ("baseline", "no model", True)
        async with Life(device):
            await eventually(lambda: [item.event for item in world.outcomes] == ["adopted"])
        assert device.running.digest == first.digest
        after = await device.decide(dict.fromkeys(("amount", "hour", "ratio", "count"), 1.0))
        assert (after.where, after.manifest, after.fallback) == ("device", first.digest, "")
        outcome = world.outcomes[0]
        assert (outcome.manifest, outcome.route) == (first.digest, "whole")
        assert outcome.bytes_received > sum(len(blob) for blob in first.blobs.values())
        assert world.chunks["ap-south"] == 0, "the home region served it alone"

    asyncio.run(story())


def test_an_update_travels_as_a_patch_from_what_runs(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        world.start()
        first = world.publish(world.model(seed=1))
        second = world.publish(world.model(seed=2, like=world.files[first.digest]), first)
        world.plan(first)
        async with Life(world.device("pos-0001", tmp_path / "pos-0001")) as device:
            await eventually(lambda: device.running.digest == first.digest and device.state == State.IDLE)
            world.plan(second)
            await eventually(lambda: len(world.outcomes) == 2)
        adopted = world.outcomes[1]
        assert (adopted.event, adopted.manifest, adopted.route) == ("adopted", second.digest, "patch")
        assert adopted.bytes_received < world.outcomes[0].bytes_received

    asyncio.run(story())
