import asyncio
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from fl_coordinator import round_announcing
from fl_coordinator.ledger import Ledger
from fl_coordinator.masters import apply_mean
from fl_coordinator.promotion import Evaluation
from fl_coordinator.rounds import RoundSpec, State
from fl_coordinator.shares.contribution import OVERHEAD_BYTES
from fl_coordinator.tables.records import AdmittedContribution, DeviceRecord
from model_delta.digest import digest_of
from model_delta.encoding import pack
from model_delta.errors import Malformed, NotFound, Unavailable
from model_delta.manifest import Manifest
from tests.fl_coordinator.learning_platform import LENGTH, SPEC, Aggregators, asked, contribute_all, honest, learning
from tests.fl_coordinator.platform_in_memory import Platform, adopt_first, fleet, fraud_model, on_a_loop, until


@on_a_loop
async def test_a_round_learns_from_the_honest_and_publishes(tmp_path: Path) -> None:
    async with learning(tmp_path) as at:
        opened = await at.coordinator.open_round(SPEC)
        with pytest.raises(Unavailable, match="wait for its end"):
            await at.coordinator.open_round(SPEC)
        await contribute_all(at.devices, opened.round_id, hostile=1)
        ended = await at.ended(opened.round_id)
        assert (ended.state, ended.reason) == ("PUBLISHED", "")
        assert ended.rejected.keys() == {"pos-0000"}
        assert sorted(ended.chosen) == [f"pos-{number:04}" for number in range(1, 8)]
        publisher = at.platform.publisher
        manifest = publisher.manifest(ended.candidate)
        assert manifest.parents == (at.base,)
        assert (manifest.lineage.round_id, manifest.lineage.contributions_root) == (ended.round_id, ended.root)
        assert len(publisher.source(at.base)) == len(publisher.source(ended.candidate))
        expected = np.mean([honest(seed) for seed in range(1, 8)], axis=0)
        assert np.abs(at.mean(ended) - expected).max() < 1e-3
        assert at.replayed(ended).holds
        await until(lambda: all(device.task is not None and not device.task.open for device in at.devices))
        # Too late: the round is over, and its receipt says so.
        late = at.devices[0]
        assert late.task is not None
        await late.contribute(late.contribution(honest(99)))
        await until(lambda: len(late.receipts) == 2)
        assert not late.receipts[1].accepted


@on_a_loop
async def test_a_resent_contribution_counts_once_and_gets_its_receipt_again(tmp_path: Path) -> None:
    async with learning(tmp_path, 6) as at:
        opened = await at.coordinator.open_round(SPEC)
        first, second = at.devices[0], at.devices[1]
        await until(lambda: all(device.task is not None for device in at.devices))
        data = first.contribution(honest(0))
        for _ in range(3):
            await first.contribute(data)
        await until(lambda: len(first.receipts) == 3)
        assert [receipt.accepted for receipt in first.receipts] == [True, True, True]
        await first.contribute(first.contribution(honest(1)))  # a second, different one
        await until(lambda: len(first.receipts) == 4)
        assert first.receipts[3].reason.startswith("duplicate")
        await second.contribute(data)  # somebody else's, on the wrong line
        await until(lambda: len(second.receipts) == 1)
        assert second.receipts[0].reason.startswith("unknown certificate")
        broken = bytearray(second.contribution(honest(1)))
        broken[-5] ^= 1
        await second.contribute(bytes(broken))
        await until(lambda: len(second.receipts) == 2)
        assert not second.receipts[1].accepted
        assert [entry.device_id for entry in at.ledger.contributions(opened.round_id)] == ["pos-0000"]
        assert sum(at.ledger.refusals(opened.round_id).values()) == 3
        await at.coordinator.abort_round(opened.round_id)
        assert (await at.ended(opened.round_id)).at is State.FAILED


@on_a_loop
async def test_too_few_contributions_fail_the_round_by_name(tmp_path: Path) -> None:
    async with learning(tmp_path, 6) as at:
        opened = await at.coordinator.open_round(SPEC)
        await contribute_all(at.devices[:2], opened.round_id)
        at.platform.clock.now += 60
        ended = await at.ended(opened.round_id)
        assert ended.at is State.FAILED
        assert "quorum of 6 contributions, found 2" in ended.reason


@on_a_loop
async def test_an_aggregator_that_is_down_is_tried_again_with_the_same_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Aggregators, "step_timeout_s", 1.0)  # two wait for one that is down
    async with learning(tmp_path) as at:
        at.aggregators.down = {"a1"}
        opened = await at.coordinator.open_round(SPEC)
        await contribute_all(at.devices, opened.round_id)
        await until(lambda: len(at.coordinator.round(opened.round_id).failures) >= 1, 15)
        at.aggregators.down = set()
        ended = await at.ended(opened.round_id)
        assert ended.state == "PUBLISHED"
        assert "a1" in ended.failures[0]
        assert {command["root"] for command in at.aggregators.commands} == {ended.root}
        attempts = [command["attempt"] for command in at.aggregators.commands]
        assert attempts == sorted(set(attempts))
        assert len(attempts) > 1


@on_a_loop
async def test_every_crash_of_the_coordinator_during_a_round_is_survived(tmp_path: Path) -> None:
    async with learning(tmp_path) as at:
        opened = await at.coordinator.open_round(SPEC)
        await contribute_all(at.devices[:4], opened.round_id)
    at.platform.reopen()  # died while collecting
    async with at.platform.running():
        await until(lambda: at.coordinator.round(opened.round_id).at is State.COLLECTING)
        await contribute_all(at.devices, opened.round_id)
        await until(lambda: at.coordinator.round(opened.round_id).attempt == 1)
    at.platform.reopen()  # died while the aggregators were asked
    async with at.platform.running(), at.aggregators.serving():
        ended = await at.ended(opened.round_id)
        assert ended.state == "PUBLISHED"
        assert ended.attempt == 2
        assert len(ended.frozen) == 8
    at.platform.reopen()
    async with at.platform.running():
        assert at.coordinator.round(opened.round_id).candidate == ended.candidate


@on_a_loop
async def test_aggregators_read_while_the_round_is_open_whoever_is_killed_meanwhile(tmp_path: Path) -> None:
    async with learning(tmp_path) as at:
        opened = await at.coordinator.open_round(SPEC)
        async with at.aggregators.reading() as followings:
            await contribute_all(at.devices[:3], opened.round_id)
            await until(lambda: all(following.counts["kept"] == 3 for following in followings.values()))
    at.platform.reopen()  # the coordinator died while it collected
    at.aggregators.start("a1")  # and one of the aggregators
    async with at.platform.running(), at.aggregators.reading() as followings:
        assert followings["a1"].reached == followings["a0"].reached > 0
        await contribute_all(at.devices, opened.round_id)
        await until(lambda: all(following.counts["kept"] == 5 for following in followings.values()))
        await until(lambda: at.coordinator.round(opened.round_id).root)
    at.aggregators.start("a2")  # died after the freeze, before the command
    async with at.platform.running(), at.aggregators.serving():
        ended = await at.ended(opened.round_id)
        assert (ended.state, ended.reason) == ("PUBLISHED", "")
        assert len(ended.frozen) == 8
        for name in at.aggregators.members:
            assert tuple(at.aggregators.copies(name, ended.round_id)) == ended.frozen
        assert at.aggregators.fetched == 0
        async with at.aggregators.reading():
            await until(lambda: not any(at.aggregators.copies(name, ended.round_id) for name in at.aggregators.members))


@on_a_loop
async def test_contributions_of_ended_rounds_are_let_go_and_those_of_a_live_one_stay(tmp_path: Path) -> None:
    platform = Platform(tmp_path, segment_bytes=1)  # a file for each batch

    def files() -> int:
        return len(list((tmp_path / "log").glob("*.log")))

    async with learning(platform) as at:
        for name in ("first", "second"):
            at.aggregators.down = {"a0"}
            opened = await at.coordinator.open_round(asked(name=name))
            for device in at.devices:
                await contribute_all([device], opened.round_id)
            await until(lambda: at.coordinator.round(opened.round_id).attempt > 0)  # noqa: B023 - awaited in its turn
            assert files() >= 8
            assert len(platform.frozen_contributions(opened.round_id)) == 8  # aggregators may ask until the end
            at.aggregators.down = set()
            ended = await at.ended(opened.round_id)
            await until(lambda: files() <= 2)
            with pytest.raises(NotFound):
                platform.frozen_contributions(ended.round_id)
            with pytest.raises(NotFound, match="has ended, it is PUBLISHED"):
                at.coordinator.announcement(ended.round_id)
            assert ended.state == "PUBLISHED"
            assert at.replayed(ended).holds


@on_a_loop
async def test_a_candidate_that_is_worse_is_not_released(tmp_path: Path) -> None:
    def evaluate(manifest: Manifest, file: bytes) -> Evaluation:
        return Evaluation(average_precision=0.2 if manifest.parents else 0.6, size_bytes=len(file))

    async with learning(Platform(tmp_path, evaluate)) as at:
        ended = await at.learned(SPEC)
        assert ended.state == "REFUSED"
        assert "precision: average precision 0.2000, stable 0.6000" in ended.reason
        assert len(at.ledger.releases("fraud")) == 1


@on_a_loop
async def test_a_round_that_is_asked_for_twice_under_one_name_is_one_round(tmp_path: Path) -> None:
    named = asked(name="monday")
    async with learning(tmp_path) as at:
        first = await at.coordinator.open_round(named)
        assert (await at.coordinator.open_round(named)).round_id == first.round_id
        with pytest.raises(Unavailable, match="wait for its end"):
            await at.coordinator.open_round(asked(name="tuesday"))
        await contribute_all(at.devices, first.round_id)
        await at.ended(first.round_id)
        again = await at.coordinator.open_round(named)
        assert (again.round_id, again.state) == (first.round_id, "PUBLISHED")
        assert len(at.ledger.rounds()) == 1


@on_a_loop
async def test_a_round_that_cannot_work_is_refused_before_anybody_trains(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    devices = fleet(platform, 3)
    async with platform.running() as coordinator:
        with pytest.raises(Malformed, match="no stable version"):
            await coordinator.open_round(SPEC)
        await adopt_first(platform, devices)
        with pytest.raises(Malformed, match="three aggregators"):
            await coordinator.open_round(SPEC)
        with pytest.raises(Malformed, match="quorum"):
            await coordinator.open_round(RoundSpec(model="fraud", quorum=8, hostile_max=5))
        assert platform.ledger.rounds() == []


def test_masters_move_by_the_mean_and_nothing_else_changes() -> None:
    source = fraud_model(5)
    changed = apply_mean(source, np.zeros(LENGTH, np.float32))
    assert changed == source
    mean = np.zeros(LENGTH, np.float32)
    mean[0] = 0.5
    moved = apply_mean(source, mean)
    assert sum(a != b for a, b in zip(source, moved, strict=True)) <= 4
    with pytest.raises(Malformed, match="expected 33 parameters"):
        apply_mean(source, mean[:-1])
    mean[0] = np.inf
    with pytest.raises(Malformed, match="not finite"):
        apply_mean(source, mean)


@on_a_loop
async def test_two_who_ask_at_once_get_one_round(tmp_path: Path) -> None:
    async with learning(tmp_path) as at:
        answers = await asyncio.gather(*(at.coordinator.open_round(asked(name="monday")) for _ in range(4)))
        assert len({one.round_id for one in answers}) == 1
        others = await asyncio.gather(
            *(at.coordinator.open_round(asked(name=f"tuesday-{n}")) for n in range(3)), return_exceptions=True
        )
        assert all(isinstance(one, Unavailable) for one in others)
        assert len(at.ledger.rounds()) == 1


@on_a_loop
async def test_a_clock_that_was_set_back_does_not_keep_devices_from_the_next_round(tmp_path: Path) -> None:
    async with learning(tmp_path) as at:
        at.platform.clock.now += 86_400  # wrong by a day, and put right between two rounds
        first = await at.learned(asked(name="first"))
        assert first.state == "PUBLISHED"
        at.platform.clock.now += 20
        await until(lambda: all(device.task is not None and not device.task.open for device in at.devices))
        at.platform.clock.now -= 86_400
        second = await at.learned(asked(name="second"))
        assert (second.state, second.reason) == ("PUBLISHED", "")
        assert [one.round_id for one in at.coordinator.snapshot().rounds] == [first.round_id, second.round_id]


@on_a_loop
async def test_a_model_whose_contributions_no_broker_takes_is_refused_before_anybody_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with learning(tmp_path, 3) as at:
        monkeypatch.setattr(round_announcing, "MESSAGE_BYTES_MAX", OVERHEAD_BYTES + 40)
        with pytest.raises(Malformed, match=f"expected at most 10 parameters, found {LENGTH}: a contribution is one"):
            await at.coordinator.open_round(SPEC)
        assert at.ledger.rounds() == []


class InterruptedLedger(Ledger):
    """Something happens while the coordinator looks up who may take part."""

    meanwhile: Callable[[], None] | None = None

    def devices(self, kind: str = "device") -> list[DeviceRecord]:
        found = super().devices(kind)
        happens, self.meanwhile = self.meanwhile, None
        if happens is not None:
            happens()
        return found


class Interrupted(Platform):
    ledger: InterruptedLedger

    def open_ledger(self) -> Ledger:
        return InterruptedLedger(self.folder / "ledger.sqlite")


@on_a_loop
async def test_a_quorum_that_is_reached_just_before_the_deadline_counts(tmp_path: Path) -> None:
    platform = Interrupted(tmp_path)
    async with learning(platform) as at:
        opened = await at.coordinator.open_round(SPEC)
        await until(lambda: at.coordinator.round(opened.round_id).at is State.COLLECTING)

        def at_the_last_moment() -> None:
            came = [AdmittedContribution(f"pos-{n:04}", digest_of(b"%d" % n), n, 1, 0.0) for n in range(SPEC.quorum)]
            at.ledger.admit(opened.round_id, came)
            at.platform.clock.now += 60

        platform.ledger.meanwhile = at_the_last_moment
        await until(lambda: at.coordinator.round(opened.round_id).at is not State.COLLECTING)
        assert at.coordinator.round(opened.round_id).reason == ""
        await until(lambda: len(at.coordinator.round(opened.round_id).frozen) == SPEC.quorum)


@on_a_loop
async def test_a_round_that_was_told_to_end_ends_also_when_the_coordinator_dies_meanwhile(tmp_path: Path) -> None:
    async with learning(tmp_path) as at:
        opened = await at.coordinator.open_round(SPEC)
        await until(lambda: at.coordinator.round(opened.round_id).at is State.COLLECTING)
        aborting = asyncio.create_task(at.coordinator.abort_round(opened.round_id))
        await until(lambda: at.ledger.aborted_rounds() == {opened.round_id})
    await asyncio.gather(aborting, return_exceptions=True)
    at.ledger.save_round(
        round_id=opened.round_id,
        model="fraud",
        state=State.COLLECTING.value,
        created=opened.opened,
        record=pack(msgspec.structs.replace(opened, state=State.COLLECTING.value)),
    )
    at.platform.reopen()
    async with at.platform.running():
        ended = await at.ended(opened.round_id)
        assert (ended.at, ended.reason) == (State.FAILED, "an operator aborted it")
