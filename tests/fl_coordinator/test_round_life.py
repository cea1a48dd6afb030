"""What a round's spec asks for beside learning: quotas, gates, a budget of privacy, a canary that starts by itself."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fl_coordinator.aggregation import OPENING_TYPE, Opening
from fl_coordinator.privacy import Spend, epsilon
from fl_coordinator.promotion import Evaluation, Limits
from fl_coordinator.rounds import Privacy, Quota, Round, State
from fl_coordinator.shares.contribution import CONTRIBUTION_TYPE, Claim, Contribution, parse
from fl_coordinator.shares.decision import Decision
from fl_coordinator.tables.records import AdmittedContribution
from fl_coordinator.updates_log import unpacked_part
from model_delta import topics
from model_delta.digest import digest_of
from model_delta.encoding import pack, unpack
from model_delta.errors import Malformed
from model_delta.manifest import Manifest
from model_delta.task import RoundTask
from model_delta.trust.signing import open_envelope, pre_authentication_encoding, seal_envelope, sign
from tests.fl_coordinator.control_calls import calls
from tests.fl_coordinator.learning_platform import (
    SPEC,
    Aggregators,
    Learning,
    asked,
    contribute_all,
    honest,
    inconsistent,
    learning,
    sitting_out,
)
from tests.fl_coordinator.platform_in_memory import CANARY, Device, Platform, fraud_model, on_a_loop, until

PARTS = ("first", "second")


def rollouts(platform: Platform) -> dict[str, Any]:
    return {found.name: found for found in platform.coordinator.snapshot().rollouts}


def wind_back(at: Learning, ended: Round, **changes: Any) -> None:
    """Have a round stand in the ledger as before its last step."""
    again = msgspec.structs.replace(ended, **changes)
    at.ledger.save_round(
        round_id=ended.round_id, model="fraud", state=again.state, created=ended.opened, record=pack(again)
    )


@on_a_loop
async def test_a_candidate_starts_its_canary_by_itself(tmp_path: Path) -> None:
    async with learning(tmp_path) as at:
        ended = await at.learned(asked(autopilot=True))
        assert (ended.state, ended.reason) == ("PUBLISHED", "")
        assert ended.figures["autopilot"] == f"rollout {ended.round_id} began"
        begun = rollouts(at.platform)[ended.round_id]
        assert begun.target == ended.candidate
        await until(lambda: all(device.running == ended.candidate for device in at.devices))
        manifest = at.platform.publisher.manifest(ended.candidate)
        assert (manifest.lineage.round_id, manifest.lineage.contributions_root) == (ended.round_id, ended.root)
        # Died after the canary began, before the round said so: what is there already is not begun again.
        wind_back(at, ended, state=State.APPLIED.value, candidate="", figures={})
    at.platform.reopen()
    async with at.platform.running():
        await at.ended(ended.round_id)
        assert at.coordinator.round(ended.round_id).candidate == ended.candidate
        assert at.coordinator.round(ended.round_id).figures["autopilot"] == f"rollout {ended.round_id} began"
        assert list(rollouts(at.platform)) == ["first", ended.round_id]
        assert len(at.ledger.releases("fraud")) == 2


@on_a_loop
async def test_the_canary_follows_the_yaml_that_the_round_was_given(tmp_path: Path) -> None:
    async with learning(tmp_path) as at:
        ended = await at.learned(asked(autopilot=True, rollout=CANARY.replace("NAME", "any")))
        assert rollouts(at.platform)[ended.round_id].state == "running"
        assert len(rollouts(at.platform)[ended.round_id].stages) == 3
        await until(lambda: sum(device.running == ended.candidate for device in at.devices) == 1)


@on_a_loop
async def test_a_canary_that_cannot_begin_is_told_and_does_not_undo_the_round(tmp_path: Path) -> None:
    async with learning(tmp_path) as at:
        opened = await at.coordinator.open_round(asked(autopilot=True))
        await until(lambda: all(device.task is not None for device in at.devices))
        await at.coordinator.publish(fraud_model(7), model="fraud")
        await at.coordinator.start_rollout(CANARY.replace("NAME", "meanwhile"))
        await contribute_all(at.devices, opened.round_id)
        ended = await at.ended(opened.round_id)
        assert ended.state == "PUBLISHED"
        assert "did not begin: rollout" in ended.figures["autopilot"]
        assert "meanwhile" in ended.figures["autopilot"]
        assert any("its canary did not begin" in event.text for event in at.ledger.events())


@pytest.mark.parametrize(
    ("rollout", "words"),
    [
        ("kind: Rollout", "rollout:1"),
        (CANARY.replace("NAME", "any").replace("model: fraud", "model: other"), "expected a rollout of 'fraud'"),
    ],
)
@on_a_loop
async def test_a_canary_that_could_never_begin_is_refused_at_the_announcement(
    tmp_path: Path, rollout: str, words: str
) -> None:
    async with learning(tmp_path, 3) as at:
        with pytest.raises(Malformed, match=words):
            await at.coordinator.open_round(asked(autopilot=True, rollout=rollout))
        assert at.ledger.rounds() == []


@on_a_loop
async def test_a_round_has_gates_of_its_own(tmp_path: Path) -> None:
    def evaluate(manifest: Manifest, file: bytes) -> Evaluation:
        return Evaluation(average_precision=0.55 if manifest.parents else 0.6, size_bytes=len(file))

    async with learning(Platform(tmp_path, evaluate)) as at:
        strict = await at.learned(asked(name="strict"))
        assert (strict.state, "allowed loss 0.01" in strict.reason) == ("REFUSED", True)
        mild = await at.learned(asked(name="mild", gates=Limits(precision_loss_max=0.1)))
        assert (mild.state, mild.reason) == ("PUBLISHED", "")


@on_a_loop
async def test_quotas_count_rounds_of_a_device_and_devices_of_a_group(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    devices = [platform.device(f"pos-{n:04}", batch="old" if n < 5 else f"new-{n}") for n in range(10)]
    quota = Quota(per_device=1, per_group=3, group="batch")
    async with learning(platform, devices) as at:
        first = await at.coordinator.open_round(asked(name="first", quota=quota, contributions_max=10))
        await contribute_all(at.devices, first.round_id)
        entries = at.ledger.contributions(first.round_id)
        assert [entry.device_id for entry in entries] == [f"pos-{n:04}" for n in (0, 1, 2, 5, 6, 7, 8, 9)]
        assert at.ledger.refusals(first.round_id) == {"over quota": 2}
        assert "over quota: round" in at.devices[3].receipts[-1].reason
        await at.coordinator.abort_round(first.round_id)
        await at.ended(first.round_id)
        second = await at.coordinator.open_round(asked(name="second", quota=quota, contributions_max=10))
        known = [f"pos-{n:04}" for n in (0, 1, 2, 5, 6, 7, 8, 9)]
        await until(lambda: list(at.ledger.sitting_out(second.round_id)) == known)
        early = [device for device in at.devices if device.device_id in known]
        await until(lambda: all(device.receipts[-1].round_id == second.round_id for device in early))
        assert at.ledger.refusals(second.round_id) == {}, "they were told before they sent anything"
        await contribute_all(at.devices[:4], second.round_id)
        await until(lambda: at.ledger.refusals(second.round_id) == {"over quota": 3})
        entries = at.ledger.contributions(second.round_id)
        assert [entry.device_id for entry in entries] == ["pos-0003"]
        assert "over quota: 1 rounds took this device" in at.devices[0].receipts[-1].reason
        counted = at.coordinator.metrics.render().decode()
        assert 'contributions_refused_total{reason="over quota"} 5.0' in counted


def resigned(device: Device, by: Device, **changes: Any) -> bytes:
    """A contribution of `device` with other claims, signed by the key of `by`."""
    found = parse(device.contribution(honest(0)))
    claim = pack(msgspec.structs.replace(unpack(found.claim, Claim), **changes))
    message = pre_authentication_encoding(CONTRIBUTION_TYPE, claim)
    return pack(Contribution(claim, by.key.sign(message, ec.ECDSA(hashes.SHA256())), found.masked))


@on_a_loop
async def test_each_refusal_is_counted_by_the_first_reason_that_applies(tmp_path: Path) -> None:
    async with learning(tmp_path, 8) as at:
        opened = await at.coordinator.open_round(SPEC)
        await until(lambda: all(device.task is not None for device in at.devices))
        forger, stranger, revoked, other_round, other_base, short, late = at.devices[:7]
        at.coordinator.revoke(revoked.device_id)
        cases = [
            (forger, resigned(forger, stranger, base="0" * 64), "bad signature"),
            (revoked, resigned(revoked, stranger), "bad signature"),  # asked before anything about certificates
            (stranger, forger.contribution(honest(1)), "unknown certificate"),
            (revoked, resigned(revoked, revoked, base="0" * 64), "revoked certificate"),
            (other_round, resigned(other_round, other_round, round_id="fraud-0", base="0" * 64), "wrong round"),
            (other_base, resigned(other_base, other_base, base="0" * 64, length=1), "wrong base"),
            (short, resigned(short, short, length=5), "wrong length"),
            (short, resigned(short, short, fraction_bits=1), "malformed: fraction bits"),
            (short, resigned(short, short, certificate=bytes(20_000)), "malformed: expected at most"),
        ]
        for device, data, reason in cases:
            before = len(device.receipts)
            await device.contribute(data)
            await until(lambda: len(device.receipts) > before)  # noqa: B023 - awaited within its turn
            assert device.receipts[-1].reason.startswith(reason), device.receipts[-1].reason
        at.platform.clock.now += 3600
        await late.contribute(late.contribution(honest(2)))
        await until(lambda: late.receipts)
        assert late.receipts[-1].reason.startswith("late: ")
        counts = at.ledger.refusals(opened.round_id)
        expected = ["bad signature", "late", "malformed", "revoked certificate", "unknown certificate"]
        assert sorted(counts) == sorted([*expected, "wrong base", "wrong length"])
        assert counts["bad signature"] == 2


@on_a_loop
async def test_an_expired_certificate_is_said_to_be_expired(tmp_path: Path) -> None:
    async with learning(tmp_path, 3) as at:
        opened = await at.coordinator.open_round(asked(deadline_s=29 * 86_400))
        await until(lambda: all(device.task is not None for device in at.devices))
        data = at.devices[0].contribution(np.zeros(opened.task.length))
        forged = resigned(at.devices[1], at.devices[0])
        at.platform.clock.now += 3650 * 86_400
        at.coordinator.revoke(at.devices[0].device_id)
        await at.devices[0].contribute(data)
        await until(lambda: at.devices[0].receipts)
        assert at.devices[0].receipts[-1].reason.startswith("expired certificate: ")
        await at.devices[1].contribute(forged)
        await until(lambda: at.devices[1].receipts)
        assert at.devices[1].receipts[-1].reason.startswith("bad signature: ")


@pytest.mark.slow
@on_a_loop
async def test_a_round_with_privacy_is_paid_for_once_and_told_in_its_transcript(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Aggregators, "step_timeout_s", 1.0)  # two wait for one that is down
    private = asked(privacy=Privacy(epsilon=4, delta=1e-5, noise_multiplier=2.0))
    once = [Spend(2.0)]
    async with learning(tmp_path) as at:
        at.aggregators.down = {"a1"}
        opened = await at.coordinator.open_round(msgspec.structs.replace(private, name="one"))
        await contribute_all(at.devices, opened.round_id)
        await until(lambda: len(at.coordinator.round(opened.round_id).failures) >= 1, 15)
        at.aggregators.down = set()
        ended = await at.ended(opened.round_id)
        assert (ended.state, ended.reason) == ("PUBLISHED", "")
        assert at.ledger.privacy_of_release("fraud") == once == [Spend(2.0)]
        spent = ended.figures["privacy"]
        assert spent["epsilon_release"] == spent["epsilon_device"] == pytest.approx(epsilon([Spend(2.0)], 1e-5), 1e-3)
        assert at.replayed(ended).epsilon_release == pytest.approx(spent["epsilon_release"], abs=1e-3)
        assert 0.01 < float(np.std(at.mean(ended))) < 5  # the updates' own spread is 0.002
        with pytest.raises(Malformed, match=r"would bring the release to epsilon [\d.]+ .*the budget is 2\.5"):
            await at.coordinator.open_round(asked(privacy=Privacy(epsilon=2.5, delta=1e-5, noise_multiplier=2.0)))


@pytest.mark.slow
@on_a_loop
async def test_devices_that_have_spent_their_budget_are_left_out_and_the_others_go_on(tmp_path: Path) -> None:
    private = asked(privacy=Privacy(epsilon=100, epsilon_device=2.5, delta=1e-5, noise_multiplier=2.0))
    async with learning(tmp_path, 14) as at:
        spent, fresh = at.devices[:8], at.devices[8:]
        other = at.platform.device("of-another-model", model="digits")
        at.ledger.heard(other.device_id, at.platform.clock(), running="", state="idle", model="digits")
        at.ledger.spend_privacy("elsewhere", 1, "digits", Spend(2.0), [other.device_id])
        opened = await at.coordinator.open_round(msgspec.structs.replace(private, name="one", contributions_max=8))
        await contribute_all(spent, opened.round_id)
        assert (await at.ended(opened.round_id)).state == "PUBLISHED"
        opened = await at.coordinator.open_round(msgspec.structs.replace(private, name="two"))
        told = r"over privacy budget: this round would bring the device to epsilon [\d.]+ at .*, the budget is 2\.5"
        await until(lambda: all(device.receipts[-1].round_id == opened.round_id for device in spent))
        assert all(re.fullmatch(told, device.receipts[-1].reason) for device in spent), "before anything was uploaded"
        assert at.ledger.sitting_out(opened.round_id) == {device.device_id: "over privacy budget" for device in spent}
        assert other.receipts == [], "it was not asked"
        await contribute_all(spent[:2], opened.round_id)  # who did not hear it
        await until(lambda: at.ledger.refusals(opened.round_id) == {"over privacy budget": 2})
        await contribute_all(fresh, opened.round_id)
        ended = await at.ended(opened.round_id)
        assert (ended.state, ended.reason) == ("PUBLISHED", "")
        assert {entry.device_id for entry in at.ledger.contributions(ended.round_id)} == {
            device.device_id for device in fresh
        }
        # The aggregators signed the account of those who are in: nothing before of any device, one of the release.
        account = at.aggregators.commands[-1]["spent"]
        assert (len(account["before_release"]), len(account["before_device"])) == (1, 0)
        assert at.replayed(ended).epsilon_device == pytest.approx(epsilon([Spend(2.0)], 1e-5), abs=1e-3)


@pytest.mark.slow
@on_a_loop
async def test_a_device_that_spends_its_budget_elsewhere_after_it_was_admitted_is_not_frozen(tmp_path: Path) -> None:
    private = asked(privacy=Privacy(epsilon=100, epsilon_device=2.5, delta=1e-5, noise_multiplier=2.0))
    async with learning(tmp_path, 7) as at:
        for spent, state in ((1, "PUBLISHED"), (2, "FAILED")):
            opened = await at.coordinator.open_round(msgspec.structs.replace(private, name=state))
            await contribute_all(at.devices[:6], opened.round_id)
            names = [device.device_id for device in at.devices[:spent]]
            at.ledger.spend_privacy(f"elsewhere {spent}", 1, "digits", Spend(2.0), names)
            await contribute_all(at.devices[6:], opened.round_id)
            ended = await at.ended(opened.round_id)
            assert ended.state == state
            left_out = [name for name, told in ended.rejected.items() if told.startswith("over privacy budget: this")]
            assert left_out == names
            if state == "PUBLISHED":
                assert len(ended.frozen) == 6
                assert at.ledger.privacy_of_devices(names) == {"pos-0000": [Spend(2.0)]}
                with at.ledger._write() as db:
                    db.execute("DELETE FROM privacy_devices")
        told = "expected a quorum of 6 contributions to freeze; 2 of 7 contributions are of devices over privacy budget"
        assert ended.reason.startswith(told)
        assert len(at.aggregators.commands) == 1, "nobody was asked about the second one"


@pytest.mark.slow
@on_a_loop
async def test_a_device_that_was_in_a_bare_sum_is_left_out_of_rounds_with_privacy(tmp_path: Path) -> None:
    async with learning(tmp_path, 3) as at:
        private = Privacy(epsilon=100, delta=1e-5, noise_multiplier=2.0)
        opened = await at.coordinator.open_round(asked(privacy=private))
        bare = pack(msgspec.structs.replace(opened, round_id="bare", state="PUBLISHED"))
        at.ledger.save_round(round_id="bare", model="digits", state="PUBLISHED", created=1.0, record=bare)
        at.ledger.admit("bare", [AdmittedContribution("pos-0001", digest_of(b"one"), 0, 9, 1.0)])
        at.ledger.save_round_result("bare", b"mean", b"transcript")
        await contribute_all(at.devices[1:2], opened.round_id)
        told = at.devices[1].receipts[-1].reason
        assert "no epsilon holds for a device that was in a sum opened without noise" in told
        await contribute_all(at.devices[:1], opened.round_id)
        assert [entry.device_id for entry in at.ledger.contributions(opened.round_id)] == ["pos-0000"]


@pytest.mark.slow
@on_a_loop
async def test_no_epsilon_is_told_of_a_model_that_was_opened_without_noise(tmp_path: Path) -> None:
    private = asked(name="private", privacy=Privacy(epsilon=100, delta=1e-5, noise_multiplier=2.0))
    async with learning(tmp_path) as at:
        bare = await at.learned(asked(name="bare"))
        assert bare.state == "PUBLISHED"
        told = rf"1 round\(s\) of 'fraud' opened without noise \(first: {bare.round_id}\)"
        with pytest.raises(Malformed, match=told):
            await at.coordinator.open_round(private)


def sat_out(device: Device, round_id: str, reason: str) -> bytes:
    """A report of a device that takes no part."""
    return pack(msgspec.structs.replace(device.next_report(1), sitting_out=sitting_out(device, round_id, reason)))


@on_a_loop
async def test_a_round_without_a_quorum_says_who_sat_out_and_why(tmp_path: Path) -> None:
    async with learning(tmp_path, 10) as at:
        opened = await at.coordinator.open_round(asked(quota=Quota(per_group=5)))
        await contribute_all(at.devices[:6], opened.round_id)
        for device, reason in zip(at.devices[5:], ["no data", *["training diverged"] * 3, "a\nnew one"], strict=True):
            for _ in range(2):  # told again with every report, counted once
                told = sat_out(device, opened.round_id, reason)
                await device.link.publish(topics.up(device.device_id, "report"), told)
            await until(lambda: device.acked == device.sequence)  # noqa: B023 - awaited within its turn
        other = at.devices[9]
        for round_id, reason in (("fraud-0", "no data"), ("x" * 201, "no data")):
            await other.link.publish(topics.up(other.device_id, "report"), sat_out(other, round_id, reason))
        borrowed = sat_out(at.devices[0], opened.round_id, "no data")  # nobody speaks for another, or of what is in
        await other.link.publish(topics.up(other.device_id, "report"), borrowed)
        await at.devices[0].link.publish(topics.up("pos-0000", "report"), borrowed)
        await until(lambda: at.devices[0].acked == at.devices[0].sequence)
        at.platform.clock.now += 31
        ended = await at.ended(opened.round_id)
        assert ended.state == "FAILED"
        assert ended.reason == (
            "expected a quorum of 6 contributions, found 5 at the deadline; "
            "sat out: 1 another reason, 1 no data, 3 training diverged; refused: 1 over quota"
        )
        await other.link.publish(topics.up(other.device_id, "report"), sat_out(other, ended.round_id, "no data"))
        await until(lambda: other.acked == other.sequence)
        counted = {"another reason": 1, "no data": 1, "training diverged": 3}
        shown = await calls(at.platform)("GET", f"/v1/rounds/{ended.round_id}", "admin")
        assert shown.json()["sat_out"] == counted, "what comes after the end changes nothing"
        assert [one.sat_out for one in at.coordinator.snapshot().rounds] == [counted]


@on_a_loop
async def test_a_round_does_not_wait_for_devices_that_sit_it_out(tmp_path: Path) -> None:
    async with learning(tmp_path, 8) as at:
        opened = await at.coordinator.open_round(asked())
        await contribute_all(at.devices[:6], opened.round_id)
        for device, reason in zip(at.devices[6:], ["no version may answer", "training diverged"], strict=True):
            await device.link.publish(topics.up(device.device_id, "report"), sat_out(device, opened.round_id, reason))
        await until(lambda: len(at.ledger.sitting_out(opened.round_id)) == 2)
        await asyncio.sleep(0.1)
        assert at.coordinator.round(opened.round_id).state == "COLLECTING", "the first of the two may still come"
        waiting = at.devices[6]
        await waiting.link.publish(topics.up(waiting.device_id, "report"), sat_out(waiting, opened.round_id, "no data"))
        assert (await at.ended(opened.round_id)).state == "PUBLISHED"


@on_a_loop
async def test_a_refusal_of_the_aggregators_has_a_transcript_too(tmp_path: Path) -> None:
    async with learning(tmp_path, 6) as at:
        opened = await at.coordinator.open_round(asked(policy="robust"))
        await until(lambda: all(device.task is not None for device in at.devices))
        for index, device in enumerate(at.devices):
            sent = inconsistent(device) if index == 0 else device.contribution(honest(index))
            await device.contribute(sent)
        ended = await at.ended(opened.round_id)
        assert ended.state == "FAILED"
        assert "3 updates selected, a sum of fewer than 4 is not opened" in ended.reason
        assert at.mean(ended).size == 0
        told = at.replayed(ended)
        assert (told.chosen, told.mean, told.policy) == ((), "", "robust")
        assert "3 updates selected" in told.refusal
        assert at.ledger.opened_without_noise("fraud") == []
        # Died after the refusal was written down, before the round said so: nobody is asked again.
        wind_back(at, ended, state=State.AGGREGATING.value, reason="")
    at.platform.reopen()
    async with at.platform.running():
        await at.ended(ended.round_id)
        assert at.coordinator.round(ended.round_id).reason == ended.reason
        assert len(at.aggregators.commands) == 1


@pytest.mark.parametrize(("lies", "state"), [(1, "PUBLISHED"), (3, "FAILED")])
@on_a_loop
async def test_a_lie_about_the_sum_ends_an_attempt_by_name_and_the_same_set_is_run_again(
    tmp_path: Path, lies: int, state: str
) -> None:
    async with learning(tmp_path, 6) as at:
        asked_for = at.aggregators._run

        async def lying(name: str, command: dict[str, Any]) -> dict[str, Any] | str:
            answer = await asked_for(name, command)
            if name == "a1" and command.get("attempt", 1) <= lies and isinstance(answer, dict):
                answer = {**answer, "first": bytes(len(answer["first"]))}
            return answer

        at.aggregators._run = lying  # type: ignore[method-assign]
        ended = await at.learned(asked())
        assert ended.state == state
        assert ended.attempt == min(lies + 1, 3)
        assert set(ended.failures) == {"a1: share 1 of the sum is not the one it signed"}
        assert ended.reason == ("" if state == "PUBLISHED" else ended.failures[-1])
        assert {tuple(command["contributions"]) for command in at.aggregators.commands} == {ended.frozen}


@on_a_loop
async def test_a_choice_that_the_rules_do_not_make_is_not_taken_from_three_aggregators_either(tmp_path: Path) -> None:
    async with learning(tmp_path, 6) as at:
        asked_for = at.aggregators._run

        async def agreed(name: str, command: dict[str, Any]) -> dict[str, Any] | str:
            answer = await asked_for(name, command)
            assert isinstance(answer, dict)
            opening = unpack(open_envelope(answer["opening"]).payload, Opening)
            decision = unpack(opening.decision, Decision)
            devices = tuple(msgspec.structs.replace(one, weight=2 * one.weight) for one in decision.devices)
            changed = pack(msgspec.structs.replace(decision, devices=devices, divisor=2 * decision.divisor))
            first, second = ((2 * np.frombuffer(answer[part], "<u4")).astype("<u4").tobytes() for part in PARTS)
            digests = {"first": digest_of(first), "second": digest_of(second)}
            told = pack(msgspec.structs.replace(opening, decision=changed, **digests))
            envelope = sign(OPENING_TYPE, told, [at.aggregators.members[name]._state.signing])
            return {**answer, "opening": seal_envelope(envelope), "first": first, "second": second}

        at.aggregators._run = agreed  # type: ignore[method-assign]
        ended = await at.learned(asked())
        assert ended.state == "FAILED"
        assert ended.reason.endswith("the aggregators' divisor is not what the rules give")


@on_a_loop
async def test_aggregators_follow_the_log_and_fetch_what_was_frozen_one_by_one(tmp_path: Path) -> None:
    async with learning(tmp_path) as at:
        call = calls(at.platform)
        at.aggregators.down = {"a0"}  # the round stays open
        opened = await at.coordinator.open_round(SPEC)
        path = f"/v1/rounds/{opened.round_id}"
        announced = await call("GET", f"{path}/announcement", "aggregator")
        assert unpack(open_envelope(announced.content).payload, RoundTask).round_id == opened.round_id
        early = await call("GET", f"{path}/contributions/{'0' * 64}", "aggregator")
        assert (early.status_code, "not frozen yet" in early.text) == (503, True)
        waiting = asyncio.create_task(call("GET", "/v1/log?from=0&wait=20", "aggregator"))
        await contribute_all(at.devices, opened.round_id)
        async with asyncio.timeout(10.0):
            part = unpacked_part((await waiting).content)
        records = list(part.records)
        while part.records:
            part = unpacked_part((await call("GET", f"/v1/log?from={part.next}&wait=0", "aggregator")).content)
            records += part.records
        await until(lambda: at.coordinator.round(opened.round_id).root)
        frozen = at.coordinator.round(opened.round_id).frozen
        assert tuple(digest_of(record) for _, record in records) == frozen
        for digest, (_, record) in zip(frozen, records, strict=True):
            found = await call("GET", f"{path}/contributions/{digest}", "aggregator")
            assert found.content == record
        for nothing in (f"{path}/contributions/{'0' * 64}", "/v1/rounds/fraud-0/announcement"):
            assert (await call("GET", nothing, "aggregator")).status_code == 404
        for bad in ("-1", "1.5", "x", "9" * 19):
            assert (await call("GET", f"/v1/log?from={bad}", "aggregator")).status_code == 400


@pytest.mark.parametrize(("reveal", "policy"), [("graph", "cluster"), ("selection", "multikrum")])
@on_a_loop
async def test_a_round_may_reveal_less_than_distances(tmp_path: Path, reveal: str, policy: str) -> None:
    async with learning(tmp_path) as at:
        ended = await at.learned(asked(reveal=reveal, policy=policy), hostile=1)
        assert (ended.state, ended.reason) == ("PUBLISHED", "")
        assert ended.rejected.keys() == {"pos-0000"}
        assert "not revealed" in ended.rejected["pos-0000"]
        assert [one.reveal for one in at.coordinator.snapshot().rounds] == [reveal]
        told = at.replayed(ended)
        assert (told.reveal, told.policy, len(told.chosen)) == (reveal, policy, len(at.devices) - 1)
        with pytest.raises(Malformed, match=f"policy: expected policy {policy} with `reveal: {reveal}`"):
            await at.coordinator.open_round(asked(reveal=reveal, policy="robust"))
