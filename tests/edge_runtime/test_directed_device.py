"""A whole device under a director that is honest, silent, or in the hands of an attacker.

Whatever it does, the device ends at the version that the signed rollout plan gives it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_runtime.device import Device
from edge_runtime.update import State
from model_delta.baseline import BASELINE_TYPE, codes_of_scale, quantized, sealed_form
from model_delta.digest import digest_of
from model_delta.encoding import unpack
from model_delta.manifest import Blob
from model_delta.patch.route import Route
from model_delta.release import Release
from model_delta.topics import ChunkRequest
from tests.edge_runtime.directing import Desk
from tests.edge_runtime.world import MODEL, QUIET, TENANT, Life, World, eventually, mlp_weights

Story = Callable[[World, Desk, Path], Awaitable[None]]


def play(story: Story, folder: Path) -> None:
    async def whole() -> None:
        world = World(folder)
        world.start()
        await story(world, Desk(world), folder / "pos-0001")

    asyncio.run(whole())


def runs(device: Device, release: Release) -> Callable[[], bool]:
    return lambda: device.running.digest == release.digest and device.state == State.IDLE


def patient(world: World, folder: Path) -> Device:
    """A device that waits for its director however busy the machine is."""
    return world.device("pos-0001", folder, answer_deadline_s=5.0)


def two(world: World) -> tuple[Release, Release]:
    first = world.publish(world.model(seed=1))
    return first, world.publish(world.model(seed=2, like=world.files[first.digest]), first)


def asked_for(world: World, kind: str) -> list[str]:
    requests = [unpack(data, ChunkRequest) for topic, data in world.broker.log if "/up/req/" in topic]
    return [request.name for request in requests if request.kind == kind]


def test_a_directed_device_fetches_no_delivery_and_reports_what_it_installed(tmp_path: Path) -> None:
    async def story(world: World, desk: Desk, folder: Path) -> None:
        first, second = two(world)
        world.plan(first)
        async with Life(patient(world, folder)) as device:
            await eventually(runs(device, first))
            world.plan(second)
            await eventually(runs(device, second))
            await eventually(lambda: [report.wanted for report in desk.reports][-1] == "")
            assert device.direction.directed == 2
        assert asked_for(world, "delivery") == []
        wanted = [report for report in desk.reports if report.wanted]
        assert [report.wanted for report in wanted] == [first.digest, second.digest]
        assert [held.root for held in wanted[1].held] == [first.manifest.merkle_root]
        last = desk.reports[-1]
        assert (last.running, last.release_floor) == (second.digest, 2)
        assert {held.manifest for held in last.held} == {first.digest, second.digest}
        assert [outcome.event for outcome in world.outcomes] == ["adopted", "adopted"]

    play(story, tmp_path)


def test_without_an_answer_the_device_plans_for_itself(tmp_path: Path) -> None:
    async def story(world: World, desk: Desk, folder: Path) -> None:
        first, second = two(world)
        desk.silent = True
        world.plan(first)
        async with Life(world.device("pos-0001", folder)) as device:
            await eventually(runs(device, first))
            world.plan(second)
            await eventually(runs(device, second))
            assert device.direction.directed == 0
        assert set(asked_for(world, "delivery")) >= {first.digest, second.digest}

    play(story, tmp_path)


def test_questions_that_are_dropped_are_planned_around_too(tmp_path: Path) -> None:
    async def story(world: World, desk: Desk, folder: Path) -> None:
        first, _ = two(world)
        world.broker.lose = lambda topic, payload: topic.endswith("/up/version")
        world.plan(first)
        async with Life(world.device("pos-0001", folder)) as device:
            await eventually(runs(device, first))
        assert desk.reports == []

    play(story, tmp_path)


def stolen(world: World, name: str, first: Release, second: Release, bad: Release) -> tuple[str, str]:
    """(what a director's stolen key names as target, the refusal's words)."""
    return {
        "a model of its own": (digest_of(b"evil"), "a director cannot choose the version"),
        "a release below the floor": (first.digest, "a director cannot choose the version"),
        "a withdrawn version": (bad.digest, "was withdrawn by plan"),
    }[name]


@pytest.mark.parametrize("attack", ["a model of its own", "a release below the floor", "a withdrawn version"])
def test_a_stolen_directors_key_cannot_choose_what_runs(tmp_path: Path, attack: str) -> None:
    async def story(world: World, desk: Desk, folder: Path) -> None:
        first, bad = two(world)
        second = world.publish(world.model(seed=3, like=world.files[first.digest]), first)
        world.plan(first)
        async with Life(patient(world, folder)) as device:
            await eventually(runs(device, first))
            target, words = stolen(world, attack, first, second, bad)
            desk.spoil = lambda plan: msgspec.structs.replace(plan, target=target)
            world.plan(second, withdrawn=(bad.digest,))
            await eventually(runs(device, second))
            assert device.direction.refused == 1
            assert words in device.direction.alarm
            await eventually(lambda: desk.reports[-1].alarm != "")
            assert words in desk.reports[-1].alarm
            assert target not in {device.running.digest, *asked_for(world, "manifest")[1:]} - {first.digest}

    play(story, tmp_path)


def _of_another_version(first: Release, second: Release) -> Callable[[Route], Route]:
    """The right steps, with the sealed bytes of another version in them."""

    def mixed(route: Route) -> Route:
        foreign = first.delivery.segments[0]
        steps = tuple(msgspec.structs.replace(step, blobs=(foreign, *step.blobs[1:])) for step in route.steps)
        return msgspec.structs.replace(route, steps=steps)

    return mixed


def _not_there(first: Release, second: Release) -> Callable[[Route], Route]:
    def partial(route: Route) -> Route:
        gone = Blob(digest_of(b"nowhere"), 100)
        steps = tuple(msgspec.structs.replace(step, blobs=(gone, *step.blobs[1:])) for step in route.steps)
        return msgspec.structs.replace(route, steps=steps)

    return partial


def _cut_short(first: Release, second: Release) -> Callable[[Route], Route]:
    def partial(route: Route) -> Route:
        steps = tuple(msgspec.structs.replace(step, blobs=step.blobs[:-1]) for step in route.steps)
        return msgspec.structs.replace(route, steps=steps)

    return partial


@pytest.mark.parametrize(
    ("bundle", "words"),
    [
        (_of_another_version, "route to .* failed"),
        (_not_there, "route to .* failed"),
        (_cut_short, "partial bundle|ascending"),
    ],
    ids=["mixed bundle", "partial bundle: a blob that nobody has", "partial bundle: a blob left out"],
)
def test_bundles_that_do_not_make_the_version_are_given_up(
    tmp_path: Path, bundle: Callable[[Release, Release], Callable[[Route], Route]], words: str
) -> None:
    async def story(world: World, desk: Desk, folder: Path) -> None:
        first, second = two(world)
        world.plan(first)
        async with Life(patient(world, folder)) as device:
            await eventually(runs(device, first))
            desk.spoil_route = bundle(first, second)
            world.plan(second)
            await eventually(runs(device, second))
            assert re.search(words, device.direction.alarm), device.direction.alarm
            await eventually(lambda: [outcome.event for outcome in world.outcomes] == ["adopted", "adopted"])

    play(story, tmp_path)


def test_a_plan_of_yesterday_is_refused_and_the_alarm_survives_a_power_cut(tmp_path: Path) -> None:
    async def story(world: World, desk: Desk, folder: Path) -> None:
        first, second = two(world)
        world.plan(first)
        async with Life(patient(world, folder)) as device:
            await eventually(runs(device, first))
            desk.spoil = lambda plan: msgspec.structs.replace(plan, expires=int(world.now))
            world.plan(second)
            await eventually(runs(device, second))
            assert "expired at" in device.direction.alarm
        again = patient(world, folder)
        assert "expired at" in again.direction.alarm

    play(story, tmp_path)


def test_a_download_that_a_power_cut_ended_is_asked_about_anew(tmp_path: Path) -> None:
    async def story(world: World, desk: Desk, folder: Path) -> None:
        first, second = two(world)
        missing = second.delivery.segments[0].digest
        held_back = {name: world.store.pop(("blob", name)) for name in second.blobs}
        world.plan(second, first)
        async with Life(patient(world, folder)):
            await eventually(lambda: missing in asked_for(world, "blob"))
        world.store.update({("blob", name): data for name, data in held_back.items()})
        before = len(desk.reports)
        async with Life(patient(world, folder)) as device:
            await eventually(runs(device, second))
            assert device.direction.directed >= 1
        counters = [report.counter for report in desk.reports]
        assert len(counters) > before >= 1
        assert counters == sorted(set(counters))
        assert len({report.nonce for report in desk.reports}) == len(counters)

    play(story, tmp_path)


def test_a_baseline_never_replaces_a_newer_full_model(tmp_path: Path) -> None:
    async def story(world: World, desk: Desk, folder: Path) -> None:
        first, second = two(world)
        world.plan(second, first)
        async with Life(patient(world, folder)) as device:
            await eventually(runs(device, second))
            old = quantized(
                mlp_weights(np.random.default_rng(1)),
                np.zeros(4, np.float32),
                codes_of_scale(np.ones(4, np.float32)),
                tenant=TENANT,
                model=MODEL,
                release=1,
                created=int(world.now),
                feature_set="",
                decision_threshold=0.5,
            )
            sealed = sealed_form(world.keyring.sign("baseline", BASELINE_TYPE, old.encode()))
            device.receive_baseline(sealed)
            decision = await device.decide(QUIET)
            assert (decision.where, decision.manifest) == ("device", second.digest)
            desk.spoil = lambda plan: msgspec.structs.replace(plan, target=digest_of(sealed))
            third = world.publish(world.model(seed=4, like=world.files[first.digest]), second)
            world.plan(third)
            await eventually(runs(device, third))
            assert "a director cannot choose the version" in device.direction.alarm

    play(story, tmp_path)
