"""Named tensors in and out: what a device answers by a model of any signature, refuses, counts, and goes back from."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_runtime.device import Device
from edge_runtime.inference import Arrays, InputsDisagree, LoadedModel, ModelFailed, NoVersion
from edge_runtime.inferences import Inferences
from edge_runtime.onnx_model import open_model, run_graph
from edge_runtime.outbox import Outbox
from edge_runtime.probation import ProbationRules
from edge_runtime.running import Running
from edge_runtime.update import State
from model_delta.errors import Malformed
from model_delta.manifest import Manifest
from model_delta.release import Release
from monitoring.telemetry import Decision, Inference, ModelSummary, merge_summaries
from tests.edge_runtime.world import Life, World, eventually, requirements
from tests.fakes.any_signature import KINDS, PIXELS, TOKENS, digits_model, kinds_model, symmetric_model, tokens_model

ONE = {"pixels": PIXELS["pixels"][:1]}


def published(world: World, file: bytes, inputs: Arrays, *parents: Release, **options: Any) -> Release:
    return world.publish(file, *parents, golden_inputs=dict(inputs), **options)


async def infer_until(device: Device, inputs: Arrays, condition: Callable[[], bool]) -> None:
    """Ask the device again and again, as its user would, until something has become true."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        with contextlib.suppress(NoVersion, ModelFailed):
            await device.infer(inputs)
        await asyncio.sleep(0.005)


def told_of(world: World, version: Release) -> ModelSummary:
    """Everything that was reported of a version's answers on the device."""
    total = ModelSummary(manifest=version.digest, where="device")
    reports = {report.first_sequence: report for report in world.reports}
    for summary in (summary for report in reports.values() for summary in report.summaries):
        if summary.manifest == version.digest:
            total = merge_summaries(total, summary)
    return total


@pytest.mark.parametrize(
    ("file", "inputs"),
    [(digits_model(), PIXELS), (tokens_model(), TOKENS), (kinds_model(), KINDS)],
    ids=["digits", "tokens", "kinds"],
)
def test_a_model_of_any_signature_is_adopted_and_answers_what_the_runtime_answers(
    tmp_path: Path, file: bytes, inputs: Arrays
) -> None:
    async def story() -> None:
        world = World(tmp_path)
        world.start()
        version = published(world, file, inputs)
        world.plan(version)
        async with Life(world.device("pos-0001", tmp_path / "device"), payments=False) as device:
            await infer_until(device, inputs, lambda: device.state == State.IDLE and device.running.digest != "")
            found = await device.infer(inputs)
            kept = device.outbox.last_sequence
            await eventually(lambda: device.outbox.marks.acked >= kept)
        expected = run_graph(file, inputs)
        assert found.outputs.keys() == expected.keys()
        for name, value in expected.items():
            assert found.outputs[name].dtype == value.dtype
            np.testing.assert_array_equal(found.outputs[name], value)
        assert (found.record.manifest, found.record.error) == (version.digest, "")
        assert [item.event for item in world.outcomes] == ["adopted"]
        told = told_of(world, version)
        assert (told.decisions, told.declined, told.errors, told.fallbacks) == (0, 0, 0, 0)
        assert told.inferences == told.answers == sum(told.latency.values()) > 3

    asyncio.run(story())


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({}, "expected the inputs 'pixels', found none"),
        ({**ONE, "more": np.zeros(1)}, "found 'more', 'pixels'"),
        ({"pixels": np.zeros((1, 1, 8, 8))}, r"input 'pixels': expected float32\[\?, 1, 8, 8\], found dtype float64"),
        ({"pixels": np.zeros((1, 8, 8), np.float32)}, r"expected float32\[\?, 1, 8, 8\], found shape \[1, 8, 8\]"),
        ({"pixels": np.zeros((1, 1, 8, 9), np.float32)}, r"found shape \[1, 1, 8, 9\]"),
        ({"pixels": np.zeros((0, 1, 8, 8), np.float32)}, r"found shape \[0, 1, 8, 8\]"),
    ],
)
def test_inputs_that_do_not_fit_are_named_and_blame_no_version(tmp_path: Path, inputs: Arrays, says: str) -> None:
    device, running = alone(tmp_path, digits_model(), PIXELS)
    with pytest.raises(Malformed, match=says):
        asyncio.run(device.infer(inputs))
    assert running.observed == []
    assert running.outbox.last_sequence == 0


def test_inputs_that_do_not_fit_each_other_are_the_callers_mistake(tmp_path: Path) -> None:
    device, running = alone(tmp_path, tokens_model(), TOKENS)
    with pytest.raises(InputsDisagree, match="one size of axis 't' in all inputs, found 'tokens' 3, 'mask' 2"):
        asyncio.run(device.infer({"tokens": TOKENS["tokens"], "mask": TOKENS["mask"][:, :2]}))
    assert running.observed == []
    assert running.outbox.last_sequence == 0


def test_a_square_that_is_none_is_the_callers_mistake_too(tmp_path: Path) -> None:
    square = np.eye(3, dtype=np.float32)
    device, running = alone(tmp_path, symmetric_model(), {"square": square})
    assert asyncio.run(device.infer({"square": square})).outputs["doubled"].tolist() == (2 * square).tolist()
    with pytest.raises(InputsDisagree, match="one size of axis 'n' in all inputs, found 'square' 3, 'square' 2"):
        asyncio.run(device.infer({"square": square[:, :2]}))
    assert running.observed == [(running.observed[0][0], False)]


def test_a_failure_names_the_node_and_none_of_the_inputs(tmp_path: Path) -> None:
    device, running = alone(tmp_path, tokens_model(), TOKENS)
    with pytest.raises(ModelFailed, match=r"running Gather node\. .* idx=# must be within") as failure:
        asyncio.run(device.infer({"tokens": TOKENS["tokens"] + 31_337, "mask": TOKENS["mask"]}))
    ((_, record),) = running.outbox.read(1, 1)
    assert isinstance(record, Inference)
    assert record.error == str(failure.value)[:200]
    assert "313" not in record.error.replace(record.manifest[:12], "")
    assert [failed for _, failed in running.observed] == [True]


def test_numbers_of_another_byte_order_mean_the_same(tmp_path: Path) -> None:
    device, _ = alone(tmp_path, digits_model(), PIXELS)
    found = asyncio.run(device.infer({"pixels": PIXELS["pixels"].astype(">f4")}))
    expected = run_graph(digits_model(), PIXELS)
    np.testing.assert_array_equal(found.outputs["probabilities"], expected["probabilities"])


def test_nothing_stands_in_for_a_version(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        world.start()
        version = published(world, digits_model(), PIXELS)
        device = world.device("pos-0001", tmp_path / "device")
        with pytest.raises(NoVersion, match=r"model fraud: expected a version .* found none \(no model\)"):
            await device.infer(PIXELS)
        world.plan(version)
        async with Life(device, payments=False):
            await eventually(lambda: device.running.digest != "")
            world.now = version.manifest.expires + 1.0
            with pytest.raises(NoVersion, match=r"\(expired\)"):
                await device.infer(PIXELS)
            world.now = version.manifest.created + 1.0
            device.running.withdrawn = frozenset({version.digest})
            with pytest.raises(NoVersion, match=r"\(withdrawn\)"):
                await device.infer(PIXELS)
        assert not any(isinstance(record, Inference) for _, record in device.outbox.read(1, 99))

    asyncio.run(story())


@pytest.mark.parametrize("fault", ["raises", "slow"])
def test_a_bad_version_goes_back_by_itself_and_is_told_of(tmp_path: Path, fault: str) -> None:
    async def story() -> None:
        world = World(tmp_path)
        world.start()
        good = published(world, digits_model(1), PIXELS)
        if fault == "raises":
            bad = published(world, digits_model(2, rows_only=2), PIXELS, good)
        else:
            bad = published(world, digits_model(2), PIXELS, good, requirements=requirements(1e-6))
        world.plan(good)
        rules = ProbationRules(decisions=3, latency_decisions=6, seconds=5.0)
        async with Life(world.device("pos-0001", tmp_path / "device", probation=rules), payments=False) as device:
            await infer_until(device, ONE, lambda: len(world.outcomes) == 1)
            world.plan(bad, stable=good)
            await infer_until(device, ONE, lambda: len(world.outcomes) == 2)
            assert (await device.infer(ONE)).record.manifest == good.digest
            kept = device.outbox.last_sequence
            await eventually(lambda: device.outbox.marks.acked >= kept)
        assert [item.event for item in world.outcomes] == ["adopted", "rolled_back"]
        told = told_of(world, bad)
        assert told.inferences > 0
        if fault == "raises":
            assert "live answers failed" in world.outcomes[1].reason
            assert told.errors == told.inferences
            assert told.latency == {}, "what gave no answer took no time to answer"
        else:
            assert "live answers took more than 1e-06 ms" in world.outcomes[1].reason
            assert told.errors == 0

    asyncio.run(story())


def test_who_decides_payments_goes_back_from_a_version_that_answers_none(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        world.start()
        good = world.publish(world.model(seed=1))
        other = published(world, digits_model(), PIXELS, good)
        world.plan(good)
        async with Life(world.device("pos-0001", tmp_path / "device")) as device:
            await eventually(lambda: len(world.outcomes) == 1)
            world.plan(other, stable=good)
            await eventually(lambda: len(world.outcomes) == 2)
            left = [record for _, record in device.outbox.read(1, device.outbox.last_sequence)]
            decision = next(record for record in left if isinstance(record, Decision) and record.error)
            assert (decision.where, decision.fallback) == ("baseline", "model failed")
            assert "expected the one input 'features' float32[batch, 4] and an output 'score'" in decision.error
            assert "found 'pixels' float32[?, 1, 8, 8]" in decision.error
            assert decision.error.endswith("ask it with infer()")
            assert device.running.digest == good.digest
        assert [item.event for item in world.outcomes] == ["adopted", "rolled_back"]

    asyncio.run(story())


class Sleeping:
    """Takes a while, as a large model does, and counts how many run at once."""

    digest = "f" * 64

    def __init__(self) -> None:
        self.now = self.most = 0
        self._lock = threading.Lock()

    def run(self, inputs: Arrays) -> dict[str, NDArray[np.generic]]:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(0.05)
        with self._lock:
            self.now -= 1
        return {"label": np.zeros(1, np.int64)}


def test_a_slow_model_holds_up_nothing_but_the_next_inference(tmp_path: Path) -> None:
    async def story() -> None:
        model = Sleeping()
        device, running = alone(tmp_path, digits_model(), PIXELS, model)
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += model.now  # while it runs
                await asyncio.sleep(0.005)

        ticking = asyncio.create_task(tick())
        begun = time.perf_counter()
        found = await asyncio.gather(*(device.infer(ONE) for _ in range(3)))
        seconds = time.perf_counter() - begun
        ticking.cancel()
        assert model.most == 1
        assert ticks > 0
        assert 0.15 <= sum(one.record.latency_us for one in found) / 1e6 <= seconds, "waiting is not counted"
        assert [failed for _, failed in running.observed] == [False] * 3

    asyncio.run(story())


def test_a_caller_who_does_not_wait_for_the_answer_hides_no_slow_version(tmp_path: Path) -> None:
    async def story() -> None:
        model = Sleeping()
        device, running = alone(tmp_path, digits_model(), PIXELS, model)
        for _ in range(2):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await device.infer(ONE)
        await device.infer(ONE)
        assert model.most == 1, "what was given up is still one at a time"
        assert [failed for _, failed in running.observed] == [False] * 2, "who gave up while waiting asked for nothing"
        assert min(latency_ms for latency_ms, _ in running.observed) >= 50
        assert running.outbox.last_sequence == 2

    asyncio.run(story())


def test_a_version_that_was_replaced_while_it_ran_is_not_judged_in_the_name_of_the_next(tmp_path: Path) -> None:
    device, running = alone(tmp_path, digits_model(), PIXELS)

    class Replaced:
        digest = running.digest

        def run(self, inputs: Arrays) -> dict[str, NDArray[np.generic]]:
            running.digest = "b" * 64
            raise Malformed("kernel failed")

    running.model = Replaced()
    version = running.digest
    with pytest.raises(ModelFailed, match="kernel failed"):
        asyncio.run(device.infer(PIXELS))
    assert running.observed == []
    ((_, record),) = running.outbox.read(1, 1)
    assert isinstance(record, Inference)
    assert (record.manifest, record.error) == (version, "kernel failed")


class Watched(Running):
    """A running version, what probation would hear, and the outbox."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.outbox = Outbox(folder / "outbox", 7)
        self.observed: list[tuple[float, bool]] = []


def alone(tmp_path: Path, file: bytes, inputs: Arrays, model: LoadedModel | None = None) -> tuple[Inferences, Watched]:
    """The answering part of a device alone, with a version running."""
    manifest: Manifest = published(World(tmp_path), file, inputs).manifest
    (tmp_path / "model.onnx").write_bytes(file)
    running = Watched(tmp_path)
    running.use(model or open_model(manifest, tmp_path / "model.onnx"), manifest, "a" * 64)
    made = Inferences(
        model="fraud",
        running=running,
        outbox=running.outbox,
        clock=lambda: float(manifest.created),
        observe=lambda latency_ms, failed: running.observed.append((latency_ms, failed)),
    )
    return made, running
