"""The device's part in a round: trained on its own payments, sent once, the same bytes however often the power goes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_runtime import training
from edge_runtime.device import Device
from edge_runtime.onnx_model import run_graph
from edge_runtime.training import base_vector, clip, train
from edge_runtime.update import State
from model_delta.digest import digest_of
from model_delta.encoding import pack
from model_delta.errors import Malformed, Unavailable
from model_delta.graphs.int8 import quantize_weights
from model_delta.graphs.mlp import mlp_model
from model_delta.release import Release
from model_delta.task import RoundTask
from model_delta.topics import ContributionReceipt, down
from model_delta.trust.sitting_out import require_own_word
from monitoring.telemetry import SittingOut
from tests.edge_runtime.world import Life, World, eventually, local_data, mlp_weights

NOTHING = np.zeros(0, np.float32)


async def on_first_version(world: World, folder: Path) -> Release:
    first = world.publish(world.model(seed=1))
    world.plan(first)
    async with Life(world.device("pos-0001", folder)) as device:
        await eventually(lambda: device.running.digest == first.digest and device.state == State.IDLE)
    return first


def participation(device: Device) -> Any:
    return device.participation


def test_a_device_trains_and_sends_one_contribution(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        world.start()
        first = await on_first_version(world, tmp_path / "device")
        for name in [name for name in world.store if name[0] == "blob"]:
            del world.store[name]  # a device that holds the base downloads no weights
        task = world.round(first, clip_norm_l2=0.05)
        async with Life(world.device("pos-0001", tmp_path / "device")) as device:
            await eventually(lambda: participation(device).record.ended == "accepted")
        record = participation(device).record
        assert record.loss_after < record.loss_before
        sent = world.contributions[0][1].removeprefix(b"round-1|")
        update = np.frombuffer(sent, np.float32)
        assert len(update) == task.length
        assert 0 < np.linalg.norm(update) <= 0.05 + 1e-6
        assert len(world.contributions) == 1
        assert record.contribution == b"", "what was delivered is not kept"

    asyncio.run(story())


def test_the_same_bytes_are_sent_until_a_receipt_also_after_power_cuts(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        world.start()
        world.receipts = False
        first = await on_first_version(world, tmp_path / "device")
        world.round(first)
        for life in range(1, 4):
            async with Life(world.device("pos-0001", tmp_path / "device")):
                await eventually(lambda life=life: len(world.contributions) >= 2 * life)  # type: ignore[misc]
        world.receipts = True
        async with Life(world.device("pos-0001", tmp_path / "device")) as device:
            await eventually(lambda: participation(device).record.ended == "accepted")
        assert len({payload for _, payload in world.contributions}) == 1
        count = len(world.contributions)
        async with Life(world.device("pos-0001", tmp_path / "device")) as device:
            await eventually(lambda: participation(device)._task is not None)
            await asyncio.sleep(0.15)
        assert len(world.contributions) == count, "a round that has ended for this device is left alone"

    asyncio.run(story())


@pytest.mark.parametrize("heard", ["before the announcement", "while it trains"])
def test_a_device_that_is_left_out_of_a_round_sends_nothing(tmp_path: Path, heard: str) -> None:
    async def story() -> None:
        world = World(tmp_path)
        world.start()
        first = await on_first_version(world, tmp_path / "device")
        loop, trained = asyncio.get_running_loop(), []
        refusal = pack(ContributionReceipt("round-1", False, "over privacy budget: epsilon 3 of 2"))
        device = world.device("pos-0001", tmp_path / "device")

        def watched(*arguments: Any) -> training.LocalUpdate:
            trained.append(1)
            told = world.coordinator.publish(down("pos-0001", "receipt"), refusal)
            asyncio.run_coroutine_threadsafe(told, loop).result(5)
            return train(*arguments)

        participation(device)._learning.train = watched
        async with Life(device):
            await eventually(lambda: device.running.digest == first.digest)
            if heard == "before the announcement":
                await world.coordinator.publish(down("pos-0001", "receipt"), refusal)
                await eventually(lambda: participation(device)._left_out is not None)
            world.round(first)
            await eventually(lambda: participation(device).record.ended.startswith("refused: over privacy budget"))
            await asyncio.sleep(0.05)
        assert (len(trained), world.contributions) == (int(heard == "while it trains"), [])

    asyncio.run(story())


def test_a_device_on_another_version_fetches_the_base_and_goes_on_answering_with_its_own(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        world.start()
        first = await on_first_version(world, tmp_path / "device")
        base = world.publish(world.model(seed=2, like=world.files[first.digest]), first)
        world.round(base)
        async with Life(world.device("pos-0001", tmp_path / "device")) as device:
            await eventually(lambda: participation(device).record.ended == "accepted")
            assert device.running.digest == first.digest
        assert len(world.contributions) == 1

    asyncio.run(story())


def test_a_round_and_an_update_to_the_same_version_do_not_disturb_each_other(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        world.start()
        first = await on_first_version(world, tmp_path / "device")
        second = world.publish(world.model(seed=2))
        world.round(second)
        world.plan(second, stable=first)
        async with Life(world.device("pos-0001", tmp_path / "device")) as device:
            await eventually(lambda: participation(device).record.ended == "accepted")
            await eventually(lambda: device.running.digest == second.digest and device.state == State.IDLE)
            await eventually(lambda: len(world.outcomes) == 2)
        assert [outcome.event for outcome in world.outcomes] == ["adopted", "adopted"]

    asyncio.run(story())


def test_a_device_without_a_version_sits_the_round_out(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        world.start()
        world.round(world.publish(world.model(seed=1)))
        async with Life(world.device("pos-0001", tmp_path / "device")) as device:
            await eventually(lambda: participation(device)._task is not None)
            await asyncio.sleep(0.1)
        assert world.contributions == []

    asyncio.run(story())


def test_a_round_whose_graph_is_not_what_was_signed_is_sat_out(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        world.start()
        first = await on_first_version(world, tmp_path / "device")
        task = world.round(first)
        world.store[("artifact", task.training_graph)] += b"more"
        async with Life(world.device("pos-0001", tmp_path / "device")) as device:
            await eventually(lambda: participation(device).record.ended.startswith("sat out: training graph"))
        assert world.contributions == []

    asyncio.run(story())


def told(world: World) -> list[tuple[str, str]]:
    """The rounds and reasons that reports name, each signed by the device's own key, anew for each reason and life."""
    found = [one.sitting_out for one in world.reports if isinstance(one.sitting_out, SittingOut)]
    public = world.devices["pos-0001"].private.public_key()
    for one in found:
        assert world.task is not None
        require_own_word(world.task, "pos-0001", one.reason, one.signature, public)
    assert len({one.signature for one in found}) == len({(one.round_id, one.reason) for one in found})
    return [(one.round_id, one.reason) for one in found]


def no_data() -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((0, 4), np.float32), np.zeros(0, np.float32)


@pytest.mark.parametrize(
    ("announced", "device_options", "reason"),
    [
        ({"steps": 100_001}, {}, "terms refused"),
        ({"training_graph": "0" * 64}, {}, "base or training graph not reachable"),
        ({}, {"data": no_data}, "no data"),
        ({}, {"data": None}, "does not train"),
        ({}, {"contribute": lambda update, task: bytes(6_000_000)}, "contribution too large"),
    ],
)
def test_a_devices_reports_name_the_reason_for_which_it_sits_a_round_out(
    tmp_path: Path, announced: dict[str, Any], device_options: dict[str, Any], reason: str
) -> None:
    async def story() -> None:
        world = World(tmp_path)
        world.start()
        first = world.publish(world.model(seed=1))
        world.plan(first)
        async with Life(world.device("pos-0001", tmp_path / "device", **device_options)) as device:
            await eventually(lambda: device.running.digest == first.digest)
            world.round(first, **announced)
            await eventually(lambda: ("round-1", reason) in told(world))
        assert world.contributions == []

    asyncio.run(story())


def test_a_reason_outlives_a_restart_and_is_told_no_more_once_the_round_is_closed(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        world.start()
        first = await on_first_version(world, tmp_path / "device")
        assert all(report.sitting_out is msgspec.UNSET for report in world.reports)
        world.round(first, learning_rate=1e30, steps=40)
        diverged = ("round-1", "training diverged")
        async with Life(world.device("pos-0001", tmp_path / "device")):
            await eventually(lambda: diverged in told(world))
        world.reports.clear()
        async with Life(world.device("pos-0001", tmp_path / "device")) as device:
            await eventually(lambda: told(world).count(diverged) > 1)
            world.round(first, issued=int(world.now) + 1, open=False)
            await eventually(lambda: not participation(device)._task.open)
            world.reports.clear()
            await eventually(lambda: bool(world.reports))
        assert world.reports[-1].sitting_out is msgspec.UNSET

    asyncio.run(story())


def test_the_base_vector_is_the_models_weights_quantized_or_not(tmp_path: Path) -> None:
    world = World(tmp_path)
    weights = mlp_weights(np.random.default_rng(3))
    plain = mlp_model(weights, np.zeros(4, np.float32), np.ones(4, np.float32))
    expected = np.concatenate([part.reshape(-1) for layer in weights for part in layer])
    task, file = task_on(world, plain)
    np.testing.assert_array_equal(base_vector(file, task), expected)
    task, file = task_on(world, quantize_weights(plain))
    assert any(parameter.scale for parameter in task.parameters), "otherwise this tests nothing new"
    np.testing.assert_allclose(base_vector(file, task), expected, atol=0.02)
    assert not np.array_equal(base_vector(file, task), expected)


def test_training_lowers_the_loss_and_is_reproducible(tmp_path: Path) -> None:
    world = World(tmp_path)
    task, file = task_on(world, world.model(seed=1), steps=60, clip_norm_l2=1.0, learning_rate=0.1)
    graph = world.store[("artifact", task.training_graph)]
    features, labels = local_data()

    def once(seed: int) -> training.LocalUpdate:
        return train(file, task, graph, features, labels, NOTHING, np.random.default_rng(seed), run_graph)

    first, again, other = once(1), once(1), once(2)
    assert first.loss_after < 0.8 * first.loss_before
    np.testing.assert_array_equal(first.update, again.update)
    assert not np.array_equal(first.update, other.update)
    assert np.linalg.norm(first.update) <= 1.0 + 1e-6


def test_training_without_data_or_with_a_foreign_base_says_so(tmp_path: Path) -> None:
    world = World(tmp_path)
    task, file = task_on(world, world.model(seed=1))
    graph = world.store[("artifact", task.training_graph)]
    none = np.zeros((0, 4), np.float32), np.zeros(0, np.float32)
    rng = np.random.default_rng(1)
    with pytest.raises(Unavailable, match="round round-1: no local payments"):
        train(file, task, graph, *none, NOTHING, rng, run_graph)
    with pytest.raises(Malformed, match="base version has no stored tensor"):
        base_vector(b"not a model", task)
    with pytest.raises(Malformed, match="features do not go with 5 labels"):
        train(file, task, graph, np.zeros((4, 4), np.float32), np.ones(5, np.float32), NOTHING, rng, run_graph)


def test_momentum_is_kept_over_the_steps_of_a_round_and_given_to_the_next(tmp_path: Path) -> None:
    world = World(tmp_path)
    task, file = task_on(world, world.model(seed=1), steps=3, clip_norm_l2=1e6, momentum=0.9)
    graph = world.store[("artifact", task.training_graph)]
    features, labels = local_data()
    features, labels = features[:16], labels[:16]  # one batch is all there is, whatever is drawn
    task = msgspec.structs.replace(task, batch_size=16)

    def trained(velocity: np.ndarray) -> training.LocalUpdate:
        return train(file, task, graph, features, labels, velocity, np.random.default_rng(1), run_graph)

    def gradient(parameters: np.ndarray) -> np.ndarray:
        inputs = {
            "parameters": parameters,
            "velocity": np.zeros(task.length, np.float32),
            "features": features,
            "labels": labels,
            "learning_rate": np.array(0, np.float32),
            "momentum": np.array(0, np.float32),
        }
        return np.asarray(run_graph(graph, inputs)["updated_velocity"], np.float64)

    base = base_vector(file, task)
    first = trained(NOTHING)
    second = trained(first.velocity)
    for begun, found in ((np.zeros(task.length), first), (first.velocity.astype(np.float64), second)):
        w, v = base.astype(np.float64), begun
        for _ in range(task.steps):
            v = 0.9 * v + gradient(w.astype(np.float32))
            w = w - task.learning_rate * v
        np.testing.assert_allclose(found.update, w - base, atol=2e-6)
        np.testing.assert_allclose(found.velocity, v, atol=2e-5)
    assert np.linalg.norm(second.update) > 1.2 * np.linalg.norm(first.update)
    for wrong in (first.velocity[1:], np.full_like(first.velocity, np.nan)):
        with pytest.raises(Malformed, match="expected a finite velocity of"):
            trained(wrong)


def test_the_velocity_is_on_disk_with_the_contribution_and_goes_into_the_next_round(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        world.start()
        world.receipts = False
        first = await on_first_version(world, tmp_path / "device")
        given: list[np.ndarray] = []

        def watched(*arguments: Any) -> training.LocalUpdate:
            given.append(arguments[5].copy())
            return train(*arguments)

        def life() -> Life:
            device = world.device("pos-0001", tmp_path / "device")
            participation(device)._learning.train = watched
            return Life(device)

        task = world.round(first, momentum=0.9)
        async with life():
            await eventually(lambda: bool(world.contributions))
        async with life() as device:  # the power was off before a receipt came: nothing is trained again
            await eventually(lambda: len(world.contributions) >= 2)
            kept = np.frombuffer(participation(device).record.velocity, "<f4")
            world.receipts = True
            await eventually(lambda: participation(device).record.ended == "accepted")
            assert len(kept) == task.length
            assert np.any(kept)
            assert participation(device).record.velocity == kept.tobytes(), "a receipt leaves it alone"
            world.now += 1
            world.round(first, momentum=0.9, round_id="round-2")
            await eventually(lambda: participation(device).record.ended == "accepted" and len(given) == 2)
            world.now += 1
            world.store[("artifact", digest_of(b"no graph"))] = b"no graph"
            world.round(first, momentum=0.9, round_id="round-3", training_graph=digest_of(b"no graph"))
            await eventually(lambda: participation(device).record.ended.startswith("sat out"))
            assert participation(device).record.velocity == b"", "a round sat out begins anew"
        assert [len(velocity) for velocity in given] == [0, task.length, task.length]
        np.testing.assert_array_equal(given[1], kept)

    asyncio.run(story())


def test_a_velocity_of_other_tensors_is_not_used(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        world.start()
        first = await on_first_version(world, tmp_path / "device")
        task = world.round(first, momentum=0.9)
        async with Life(world.device("pos-0001", tmp_path / "device")) as device:
            await eventually(lambda: participation(device).record.ended == "accepted")
            part = participation(device)
            assert part.record.layout
            part._write(msgspec.structs.replace(part.record, layout="of another model"))
            before = part.record.velocity
            world.now += 1
            world.round(first, momentum=0.9, round_id="round-2", steps=task.steps)
            await eventually(lambda: part.record.round_id == "round-2" and part.record.ended == "accepted")
            assert len(part.record.velocity) == len(before)
            assert part.record.layout != "of another model"

    asyncio.run(story())


def test_a_device_that_does_not_know_momentum_cannot_run_its_graph(tmp_path: Path) -> None:
    world = World(tmp_path)
    task, file = task_on(world, world.model(seed=1), momentum=0.9)
    graph = world.store[("artifact", task.training_graph)]
    before = msgspec.structs.replace(task, momentum=0.0)  # what a reader of an earlier release sees
    with pytest.raises(Malformed, match="velocity"):
        train(file, before, graph, *local_data(), NOTHING, np.random.default_rng(1), run_graph)


def test_clipping_keeps_the_direction() -> None:
    update = np.array([3.0, 4.0], np.float32)
    clipped, norm = clip(update, 1.0)
    assert norm == 5.0
    np.testing.assert_allclose(clipped, [0.6, 0.8], rtol=1e-6)
    assert clip(update, 10.0)[0] is not None
    np.testing.assert_array_equal(clip(update, 10.0)[0], update)


def task_on(world: World, file: bytes, **options: Any) -> tuple[RoundTask, bytes]:
    release = world.publish(file)
    return world.round(release, **options), file


@pytest.mark.parametrize("fault", ["step", "data", "disk", "record", "steps", "twice", "scales"])
def test_whatever_goes_wrong_in_a_round_the_device_goes_on_answering(tmp_path: Path, fault: str) -> None:
    """And takes part in the next one."""

    async def story() -> None:
        world = World(tmp_path)
        world.start()
        folder = tmp_path / "device"
        first = await on_first_version(world, folder)
        record = folder / "state" / "round.record"
        if fault == "record":
            record.write_bytes(b"\xff torn")
        device = world.device("pos-0001", folder)
        part = participation(device)
        whole = part._learning.train

        def broken(*_: Any) -> Any:
            raise MemoryError

        if fault == "step":
            part._learning.train = broken
        elif fault == "data":
            data, part._learning.data = part._learning.data, broken
        elif fault == "disk":
            part._learning.train = broken
            (folder / "state" / "round.record.new").mkdir()  # nothing can be written there
        parameters = world.round(first).parameters
        if fault in ("steps", "twice", "scales"):
            wrong: dict[str, dict[str, Any]] = {
                "steps": {"steps": 10**9},
                "twice": {"parameters": parameters * 3},
                "scales": {"parameters": (msgspec.structs.replace(parameters[0], scale=parameters[1].tensor),)},
            }
            world.now += 1
            world.round(first, round_id="round-2", **wrong[fault])
        async with Life(device):
            await eventually(lambda: part.record.ended.startswith("sat out: "))
            decision = await device.decide(dict.fromkeys(("amount", "hour", "ratio", "count"), 0.0))
            assert decision.manifest == first.digest
            part._learning.train = whole
            if fault == "data":
                part._learning.data = data
            elif fault == "disk":
                (folder / "state" / "round.record.new").rmdir()
            world.now += 1
            world.round(first, round_id="round-3")
            await eventually(lambda: part.record.round_id == "round-3" and part.record.ended == "accepted")
        assert all(payload.startswith(b"round-3|") for _, payload in world.contributions)

    asyncio.run(story())
