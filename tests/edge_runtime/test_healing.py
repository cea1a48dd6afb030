"""A device whose files were damaged or changed: recognised by its root, healed by the segments that it lacks."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_runtime.device import Device
from edge_runtime.update import State
from model_delta.encoding import pack, unpack
from model_delta.graphs.int8 import quantize_weights
from model_delta.graphs.mlp import mlp_model
from model_delta.keys.encryption import new_key
from model_delta.manifest import Blob, Delivery, DenseOffer, PatchOffer, late_delivery_name
from model_delta.patch.container import FORMATS
from model_delta.patch.route import DeviceLimits
from model_delta.release import Release, offer_patches, with_offers
from model_delta.topics import Hello
from tests.edge_runtime.test_device import cut_at_write, dies, events, play
from tests.edge_runtime.world import Life, World, eventually

SIZES = (4, 300, 300, 300, 1)


def large_model(seed: int, like: bytes | None = None) -> bytes:
    """Three weights of 1 KB, 90 KB and 90 KB: several segments. Near `seed` 1's weights."""
    rng, nudge = np.random.default_rng(1), np.random.default_rng(seed)
    weights = [
        ((rng.standard_normal((a, b)) / 16).astype(np.float32), np.zeros(b, np.float32)) for a, b in pairwise(SIZES)
    ]
    moved = [
        (w + np.float32(1e-4 * (seed != 1)) * nudge.standard_normal(w.shape).astype(np.float32), b) for w, b in weights
    ]
    return quantize_weights(mlp_model(moved, np.zeros(4, np.float32), np.ones(4, np.float32)), like)


def hellos(world: World) -> list[Hello]:
    return [unpack(payload, Hello) for topic, payload in world.broker.log if topic.endswith("/up/hello")]


def spoil(folder: Path, at: float, slot: str = "a") -> None:
    """Change one byte of a slot's file, `at` of the way through."""
    path = folder / "state" / "slots" / slot / "model.bin"
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 0x40
    path.write_bytes(data)


def settled(device: Device, release: Release) -> bool:
    return device.running.digest == release.digest and device.state == State.IDLE


async def adopted(world: World, folder: Path, release: Release, count: int = 1, **options: object) -> None:
    """One life of the device on `folder`, until it runs `release` and has told of `count` outcomes."""
    async with Life(world.device("pos-0001", folder, **options)) as device:
        await eventually(lambda: settled(device, release) and len(world.outcomes) == count)


def test_a_damaged_file_is_recognised_and_only_its_spoilt_segment_comes(tmp_path: Path) -> None:
    async def story(world: World, folder: Path) -> None:
        first = world.publish(large_model(1))
        world.plan(first)
        await adopted(world, folder, first)
        spoil(folder, 0.5)
        await adopted(world, folder, first, 2)
        assert hellos(world)[1].root not in ("", first.manifest.merkle_root)
        healed, whole = world.outcomes[1], world.outcomes[0]
        assert (healed.event, healed.route, healed.manifest) == ("adopted", "replace", first.digest)
        assert healed.bytes_received < 0.6 * whole.bytes_received
        async with Life(world.device("pos-0001", folder)) as device:
            await eventually(lambda: len(hellos(world)) == 3)
            assert device.running.digest == first.digest
        assert hellos(world)[2].root == first.manifest.merkle_root
        assert len(world.outcomes) == 2, "a whole file needs no healing"

    play(story, tmp_path)


def test_a_file_cut_off_by_a_power_cut_is_healed_too(tmp_path: Path) -> None:
    async def story(world: World, folder: Path) -> None:
        first = world.publish(large_model(1))
        world.plan(first)
        await adopted(world, folder, first)
        path = folder / "state" / "slots" / "a" / "model.bin"
        path.write_bytes(path.read_bytes()[:-200])
        await adopted(world, folder, first, 2)
        assert world.outcomes[1].route == "replace"

    play(story, tmp_path)


def test_a_damaged_base_is_healed_and_patched_in_one_update(tmp_path: Path) -> None:
    async def story(world: World, folder: Path) -> None:
        first = world.publish(large_model(1))
        second = world.publish(large_model(2, world.files[first.digest]), first)
        world.plan(first)
        await adopted(world, folder, first)
        spoil(folder, 0.01)  # the small segment at the front
        world.plan(second)
        await adopted(world, folder, second, 2)
        outcome = world.outcomes[1]
        assert (outcome.event, outcome.route) == ("adopted", "chain")
        assert outcome.bytes_received < 0.5 * world.outcomes[0].bytes_received

    play(story, tmp_path)


def test_the_other_slot_gives_what_the_active_one_lost(tmp_path: Path) -> None:
    """Back to a version whose file in the inactive slot is damaged: its patch's base is whole, so nothing but spoilt
    segments has to come."""

    async def story(world: World, folder: Path) -> None:
        first = world.publish(large_model(1))
        second = world.publish(large_model(2, world.files[first.digest]), first)
        for count, release in enumerate((first, second), 1):
            world.plan(release)
            await adopted(world, folder, release, count)
        spoil(folder, 0.5, slot="a")
        world.plan(first)
        await adopted(world, folder, first, 3)
        assert world.outcomes[2].route == "replace"
        assert world.outcomes[2].bytes_received < 0.6 * world.outcomes[0].bytes_received

    play(story, tmp_path)


def test_a_changed_file_never_answers(tmp_path: Path) -> None:
    """Nobody is there to heal it: the device answers safely rather than with a file that is not the version's."""

    async def story(world: World, folder: Path) -> None:
        first = world.publish(large_model(1))
        world.plan(first)
        await adopted(world, folder, first)
        spoil(folder, 0.5)
        world.dead = set(world.chunks)
        async with Life(world.device("pos-0001", folder)) as device:
            await eventually(lambda: device.state == State.FETCHING)
            decision = await device.decide(dict.fromkeys(("amount", "hour", "ratio", "count"), 1.0))
            assert decision.where == "baseline"
            world.dead = set()
            await eventually(lambda: settled(device, first))
        assert [outcome.route for outcome in world.outcomes][1:] in ([], ["replace"])

    play(story, tmp_path)


def test_the_power_may_go_off_at_every_write_of_a_healing(tmp_path: Path) -> None:
    async def story(world: World, folder: Path) -> None:
        first = world.publish(large_model(1))
        world.plan(first)
        await adopted(world, folder, first)
        spoil(folder, 0.5)
        deaths = 0
        while True:
            device = world.device("pos-0001", folder)
            death = cut_at_write(device, number=deaths // 2 % 4 + 1, side=("before", "after")[deaths % 2])
            if not await dies(device, death, until=first.digest):
                break
            deaths += 1
            assert deaths < 60
        assert deaths >= 4
        async with Life(world.device("pos-0001", folder)) as device:
            await eventually(lambda: settled(device, first) and len(world.outcomes) == 2)
        assert events(world) == ["adopted", "adopted"]

    play(story, tmp_path)


# Devices that are many releases behind, and what a device can take.


def line(world: World, count: int) -> list[Release]:
    """Releases, each made from the one before and patched from it alone; the whole is said to be dear."""
    releases: list[Release] = []
    for seed in range(1, count + 1):
        parents = releases[-1:]
        releases.append(world.publish(large_model(seed, world.files[parents[0].digest] if parents else None), *parents))
    return releases


def test_a_late_device_finds_a_direct_patch_made_for_it(tmp_path: Path) -> None:
    async def story(world: World, folder: Path) -> None:
        releases = line(world, 4)
        first, last = releases[0], releases[-1]
        world.plan(first)
        await adopted(world, folder, first)
        file, base = world.files[last.digest], world.files[first.digest]
        key = world.keys[last.digest]
        offers, blobs = offer_patches(last.manifest, file, key, first.manifest, base, 10**6)
        world.store[("delivery", late_delivery_name(last.digest, first.digest))] = pack(offers)
        world.store.update({("blob", digest): data for digest, data in blobs.items()})
        world.plan(last)
        await adopted(world, folder, last, 2)
        assert world.outcomes[1].route == "patch"

    play(story, tmp_path)


@pytest.mark.parametrize("lie", ["another version's", "not a delivery", "a patch that does not open"])
def test_a_late_patch_that_lies_costs_bytes_and_nothing_else(tmp_path: Path, lie: str) -> None:
    async def story(world: World, folder: Path) -> None:
        releases = line(world, 3)
        first, last = releases[0], releases[-1]
        world.plan(first)
        await adopted(world, folder, first)
        blob = next(iter(releases[1].blobs))
        offered = PatchOffer(first.digest, Blob(blob, len(releases[1].blobs[blob])))
        told = {
            "another version's": pack(Delivery(first.digest, (), (offered,))),
            "not a delivery": b"\xff" * 40,
            "a patch that does not open": pack(Delivery(last.digest, (), (msgspec.structs.replace(offered),))),
        }[lie]
        world.store[("delivery", late_delivery_name(last.digest, first.digest))] = told
        world.plan(last)
        await adopted(world, folder, last, 2)
        assert world.outcomes[1].event == "adopted"

    play(story, tmp_path)


def test_a_device_takes_only_what_it_can_apply(tmp_path: Path) -> None:
    async def story(world: World, folder: Path) -> None:
        first = world.publish(large_model(1))
        second = world.publish(large_model(2, world.files[first.digest]), first)
        strange = DenseOffer(first.digest, Blob(new_key().hex(), 10), "from-the-future")
        delivery = with_offers(second.delivery, Delivery(second.digest, (), (), (strange,)))
        world.store[("delivery", second.digest)] = pack(delivery)
        world.plan(first)
        await adopted(world, folder, first)
        world.plan(second)
        await adopted(world, folder, second, 2, limits=DeviceLimits(formats=frozenset(FORMATS)))
        assert world.outcomes[1].route == "patch"
        third = world.publish(large_model(3, world.files[second.digest]), second)
        world.plan(third)
        await adopted(world, folder, third, 3, limits=DeviceLimits(memory_bytes=900_000))
        assert world.outcomes[2].route == "replace", "no applier fits its memory; frozen segments need none"

    play(story, tmp_path)


def test_where_the_backhaul_is_dear_hops_that_the_region_has_are_taken(tmp_path: Path) -> None:
    async def story(world: World, folder: Path) -> None:
        releases = line(world, 3)
        first, last = releases[0], releases[-1]
        direct, blobs = offer_patches(
            last.manifest,
            world.files[last.digest],
            world.keys[last.digest],
            first.manifest,
            world.files[first.digest],
            10**6,
        )
        world.store[("delivery", last.digest)] = pack(with_offers(last.delivery, direct))
        world.store.update({("blob", digest): data for digest, data in blobs.items()})
        for name, kept in (("near", True), ("far", False)):
            folder = folder.parent / name
            world.plan(first)
            await adopted(world, folder, first, len(world.outcomes) + 1)
            hops = {offer.blob.digest for release in releases[1:] for offer in release.delivery.offers}
            world.kept["eu-west"] = hops if kept else set()
            world.plan(last)
            await adopted(world, folder, last, len(world.outcomes) + 1, cached_cost=0.001)
            assert world.outcomes[-1].route == ("chain" if kept else "patch"), name

    play(story, tmp_path)
