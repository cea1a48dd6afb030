"""A coordinator killed before each thing that a round writes down: nothing admitted is lost, nothing counts twice, and
the round ends as if nothing had happened.

Other rows of the matrix: an aggregator in each step of the protocol (`test_aggregator`), and while it follows the log
(`test_aggregator_killed`; in a whole platform on Kafka, `tests/atoll/test_user_journey`); the embedded log and Kafka in
admission (`test_admission_killed`, `test_log_contract`); SuperLink, ServerApp and SuperExec at each step of a command
(`test_flower_process`); all of them while the aggregators stand by for a list (`test_standing`, `test_flower_process`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fl_coordinator.ledger import Ledger
from model_delta.digest import digest_of
from model_delta.errors import Unavailable
from tests.fl_coordinator.learning_platform import Learning, asked, honest
from tests.fl_coordinator.platform_in_memory import Device, Platform, adopt_first, on_a_loop, until


class DyingLedger(Ledger):
    """From `doom` on nothing is written any more: to whoever started anew, the coordinator died right before it."""

    doom: tuple[str, int] = ("", 0)
    dead = False
    seen = 0

    @contextmanager
    def _write(self) -> Iterator[Any]:
        if self.dead:
            raise Unavailable("killed")
        with super()._write() as db:
            yield db

    def _reached(self, what: str) -> None:
        if what == self.doom[0]:
            self.seen += 1
            self.dead = self.dead or self.seen == self.doom[1]

    def save_round(self, **fields: Any) -> None:
        self._reached(f"state {fields['state']}")
        super().save_round(**fields)

    def save_round_result(self, *arguments: Any) -> None:
        self._reached("result")
        super().save_round_result(*arguments)

    def admit(self, *arguments: Any) -> None:
        self._reached("admission")
        super().admit(*arguments)

    def add_release(self, *arguments: Any) -> None:
        self._reached("release")
        super().add_release(*arguments)


class Place(Platform):
    ledger: DyingLedger

    def open_ledger(self) -> Ledger:
        return DyingLedger(self.folder / "ledger.sqlite")


POINTS = (
    ("state ANNOUNCED", 1),
    ("state COLLECTING", 1),
    ("admission", 1),
    ("admission", 2),
    ("state FROZEN", 1),
    ("state AGGREGATING", 1),
    ("state AGGREGATING", 2),  # the attempt's number
    ("result", 1),  # after the opening
    ("state OPENED", 1),
    ("state APPLIED", 1),
    ("release", 1),
    ("state PUBLISHED", 1),
)


async def offer(devices: list[Device], round_id: str, sent: dict[str, bytes]) -> None:
    """Every device hands in its update, the same bytes each time."""
    await until(lambda: all(device.task is not None and device.task.round_id == round_id for device in devices))
    for place, device in enumerate(devices):
        if device.device_id not in sent:
            sent[device.device_id] = device.contribution(honest(place))
        await device.contribute(sent[device.device_id])


@pytest.mark.slow
@on_a_loop
async def test_a_kill_before_anything_that_a_round_writes_loses_nothing(tmp_path: Path) -> None:
    platform = Place(tmp_path)
    at = Learning(platform, 7)
    devices, aggregators = at.devices, at.aggregators

    async def one_round(point: tuple[str, int]) -> None:
        spec = asked(name=f"{point[0]} {point[1]}", contributions_max=7)
        sent: dict[str, bytes] = {}
        platform.ledger.doom = point
        commanded, heard = len(aggregators.commands), "none"
        async with platform.running() as coordinator, aggregators.serving():
            try:
                opened = await coordinator.open_round(spec)
                heard = opened.round_id
                await until(lambda: platform.ledger.dead or any(d.task is not None for d in devices))
                if not platform.ledger.dead:
                    await offer(devices, opened.round_id, sent)
            except Unavailable:
                assert point == ("state ANNOUNCED", 1)
            await until(lambda: platform.ledger.dead)
            await asyncio.sleep(0.05)  # what is under way comes to nothing
        promised = {digest_of(sent[d.device_id]) for d in devices if any(r.round_id == heard for r in d.receipts)}
        platform.reopen()
        async with platform.running() as coordinator, aggregators.serving():
            opened = await coordinator.open_round(spec)
            if coordinator.round(opened.round_id).state in ("ANNOUNCED", "COLLECTING"):
                await offer(devices, opened.round_id, sent)
            ended = await at.ended(opened.round_id)
        assert ended.state == "PUBLISHED", (point, ended.reason)
        assert sorted(ended.frozen) == sorted(digest_of(data) for data in sent.values()), point
        assert promised <= set(ended.frozen)
        entries = platform.ledger.contributions(ended.round_id)
        assert len(entries) == len({entry.device_id for entry in entries}) == 7
        assert at.replayed(ended).holds
        assert platform.store.get("transcript", ended.transcript) == at.transcript(ended)
        assert len([one for one in platform.ledger.releases() if one.name == ended.round_id]) == 1
        # However often they were asked, the aggregators opened one set, and one decision.
        commands = aggregators.commands[commanded:]
        assert {command["root"] for command in commands} == {ended.root}
        assert [command["attempt"] for command in commands] == list(range(1, len(commands) + 1))

    async with platform.running():
        await adopt_first(platform, devices)
    platform.reopen()
    for point in POINTS:
        await one_round(point)
        platform.reopen()
