"""Which answer counts: the device's own, a region's, the baseline's; and what the records say of it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519

from edge_runtime.device import Device
from edge_runtime.inference import Arrays, LoadedModel
from edge_runtime.onnx_model import open_model
from edge_runtime.regions import RegionAnswer
from edge_runtime.safe_mode import verified_baseline
from edge_runtime.update import State
from model_delta.baseline import BaselineModel, codes_of_scale
from model_delta.errors import AtollError, Malformed, NotFound, RolledBack, SignatureInvalid, Unavailable, Untrusted
from model_delta.frames import Fragments
from model_delta.manifest import Manifest
from model_delta.trust.signing import public_bytes
from model_delta.trust.updater import RoleKeys, TrustAnchors
from tests.edge_runtime.world import MODEL, QUIET, TENANT, Life, World, eventually

BASELINE_KEY = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
ANCHORS = TrustAnchors(TENANT, {"baseline": RoleKeys((public_bytes(BASELINE_KEY.public_key()),))})


BY_TEST_KEY: dict[str, object] = {"open_baseline": verified_baseline(lambda: ANCHORS, MODEL)}


class AskedRegion:
    """Answers, or raises `error`."""

    def __init__(self, error: AtollError | None = None) -> None:
        self.error, self.asked = error, 0

    async def ask(self, features: Mapping[str, float], device_id: str, nearest: str) -> RegionAnswer:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return RegionAnswer(0.9, "decline", "eu-west:7", "score", "e" * 64, nearest)


def baseline(release: int = 1, model: str = MODEL) -> bytes:
    """A signed baseline that declines high amounts."""
    return BaselineModel(
        tenant=TENANT,
        model=model,
        release=release,
        created=1,
        feature_set="",
        decision_threshold=0.5,
        feature_codes=codes_of_scale(np.ones(4, np.float32)),
        hidden=np.array([[7, 0], [0, 0], [0, 0], [0, 0]], np.int8),
        hidden_scale=1.0,
        hidden_bias=np.zeros(2, np.float32),
        output=np.array([7, 0], np.int8),
        output_scale=1.0,
        output_bias=-4.0,
    ).seal(BASELINE_KEY)


async def adopted(world: World, folder: Path, **options: object) -> Device:
    world.plan(world.publish(world.model(seed=1)))
    async with Life(world.device("pos-0001", folder, **options), payments=False) as device:
        await eventually(lambda: device.running.digest != "" and device.state == State.IDLE)
    return device


def test_a_clear_score_asks_nobody_and_an_unsure_one_asks_the_region(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        world.start()
        regions = AskedRegion()
        device = await adopted(world, tmp_path / "device", regions=regions, margin=0.0)
        clear = await device.decide(QUIET)
        assert (clear.where, regions.asked) == ("device", 0)
        unsure = world.device("pos-0001", tmp_path / "device", regions=regions, margin=1.0)
        task = asyncio.create_task(unsure.run())
        await eventually(lambda: unsure.running.digest != "")
        answer = await unsure.decide(QUIET)
        assert (answer.where, answer.manifest, answer.approved, answer.fallback) == (
            "region",
            "e" * 64,
            False,
            "unsure",
        )
        regions.error = Unavailable("away")
        answer = await unsure.decide(QUIET)
        assert (answer.where, answer.manifest, answer.fallback) == ("device", unsure.running.digest, "")
        assert unsure.outbox.marks.lost_requests == 1
        regions.error = Malformed("refused")
        assert (await unsure.decide(QUIET)).where == "device"
        assert unsure.outbox.marks.lost_requests == 1, "a refusal is an answer"
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(story())


def test_without_a_model_the_region_answers_then_the_baseline_then_the_rule(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        regions = AskedRegion()
        device = world.device(
            "pos-0001", tmp_path / "device", regions=regions, open_baseline=verified_baseline(lambda: ANCHORS, MODEL)
        )
        assert (await device.decide(QUIET)).where == "region"
        regions.error = Unavailable("away")
        rule = await device.decide({**QUIET, "amount": 49.0})
        assert (rule.where, rule.manifest, rule.approved, rule.fallback) == ("baseline", "", True, "no model")
        assert not (await device.decide({**QUIET, "amount": 50.5})).approved
        device.receive_baseline(baseline())
        small, large = await device.decide(QUIET), await device.decide({**QUIET, "amount": 2.0})
        assert (small.approved, large.approved) == (True, False)
        assert len(small.manifest) == 64

    asyncio.run(story())


def test_a_baseline_comes_in_frames_with_losses_and_survives_a_restart(tmp_path: Path) -> None:
    world = World(tmp_path)
    device = world_device(world, tmp_path, BY_TEST_KEY)
    fragments = Fragments(baseline(), 51)
    frames = [fragments.frame(index) for index in range(fragments.needed + 3)]
    del frames[0], frames[0], frames[2]
    found = [device.receive_frame(frame) for frame in reversed(frames)]
    assert [item is not None for item in found].count(True) == 1
    again = world_device(world, tmp_path, BY_TEST_KEY)
    assert again.safe_mode.baseline is not None
    assert again.safe_mode.baseline.release == 1


def test_a_baseline_that_is_forged_foreign_or_older_is_refused(tmp_path: Path) -> None:
    world = World(tmp_path)
    device = world_device(world, tmp_path, BY_TEST_KEY)
    device.receive_baseline(baseline(release=2))
    forged = bytearray(baseline(release=3))
    forged[-1] ^= 1
    with pytest.raises(SignatureInvalid):
        device.receive_baseline(bytes(forged))
    with pytest.raises(Untrusted, match="expected acme/fraud, found acme/other"):
        device.receive_baseline(baseline(release=3, model="other"))
    with pytest.raises(RolledBack, match="expected release 2 or later, found 1"):
        device.receive_baseline(baseline(release=1))
    with pytest.raises(Malformed, match="at most 717 bytes"):
        device.receive_baseline(bytes(2000))
    assert device.safe_mode.baseline is not None
    assert device.safe_mode.baseline.release == 2


def test_one_signature_makes_no_baseline_where_the_role_needs_two() -> None:
    keys = (BASELINE_KEY, ed25519.Ed25519PrivateKey.generate())
    role = RoleKeys(tuple(public_bytes(key.public_key()) for key in keys), threshold=2)
    with pytest.raises(SignatureInvalid, match="expected 2 signatures of the role"):
        verified_baseline(lambda: TrustAnchors(TENANT, {"baseline": role}), MODEL)(baseline())


def test_a_damaged_baseline_on_disk_is_named_and_the_rule_answers(tmp_path: Path) -> None:
    world = World(tmp_path)
    (tmp_path / "device" / "state").mkdir(parents=True)
    (tmp_path / "device" / "state" / "baseline").write_bytes(b"garbage")
    device = world_device(world, tmp_path, BY_TEST_KEY)
    assert "baseline at" in device.safe_mode.problem
    assert asyncio.run(device.decide(QUIET)).approved


class Failing:
    """A model that breaks after its golden cases."""

    def __init__(self, model: LoadedModel) -> None:
        self._model, self.digest = model, model.digest

    def run(self, inputs: Arrays) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]:
        if len(inputs["features"]) == 1:
            raise Malformed("kernel failed")
        return self._model.run(inputs)


def test_a_model_that_breaks_still_leaves_every_payment_answered_and_is_thrown_out(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        world.start()
        bad = world.publish(world.model(seed=1))

        def opening(manifest: Manifest, file: Path) -> LoadedModel:
            return Failing(open_model(manifest, file))

        world.plan(bad)
        async with Life(world.device("pos-0001", tmp_path / "device", open_model=opening)) as device:
            await eventually(lambda: device.state == State.SAFE)
            await eventually(lambda: [item.event for item in world.outcomes] == ["rolled_back", "safe_mode"])
        assert "live answers failed" in world.outcomes[0].reason
        errors = sum(
            item.errors for report in world.reports for item in report.summaries if item.manifest == bad.digest
        )
        assert errors >= 1

    asyncio.run(story())


def test_feedback_finds_its_decision_also_after_a_restart(tmp_path: Path) -> None:
    world = World(tmp_path)
    device = world_device(world, tmp_path, {})
    decision = asyncio.run(device.decide({**QUIET, "amount": 80.0}))
    again = world_device(world, tmp_path, {})
    feedback = again.feedback(decision.decision_id, fraud=True)
    assert (feedback.manifest, feedback.declined, feedback.fraud) == ("", True, True)
    with pytest.raises(Malformed, match="not one of device pos-0001"):
        again.feedback("deadbeef-1", fraud=True)
    with pytest.raises(NotFound):
        again.feedback(decision.decision_id.split("-")[0] + "-999", fraud=True)


def world_device(world: World, folder: Path, options: dict[str, object]) -> Device:
    return world.device("pos-0001", folder / "device", **options)
