"""A coordinator killed between any two steps of admission: whoever has a receipt is in, and nobody is in twice."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from fl_coordinator.rounds import Round
from model_delta import topics
from model_delta.digest import digest_of
from model_delta.encoding import unpack
from tests.fl_coordinator.admitting_process import DEVICES, Place
from tests.fl_coordinator.learning_platform import Aggregators
from tests.fl_coordinator.platform_in_memory import until

ROOT = Path(__file__).parents[2]


@pytest.fixture
def log_place(request: pytest.FixtureRequest, kind: str, tmp_path: Path) -> str:
    if kind == "embedded":
        return str(tmp_path / "log")
    return f"kafka://{request.getfixturevalue('kafka').address}/updates-{uuid.uuid4().hex}"


def killed_at(folder: Path, log_place: str, stop_at: str, count: int) -> list[str]:
    """Run the coordinator until it stops there, kill it; the devices that had their receipts."""
    arguments = [str(folder), log_place, stop_at, str(count)]
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.fl_coordinator.admitting_process", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "ORT_DISABLE_TELEMETRY": "1"},
    )
    assert child.stdout is not None
    lines = []
    for line in child.stdout:
        if line == "stopped\n":
            break
        lines.append(line.strip())
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    return lines


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "stop_at", "count"),
    [("embedded", "appended", 5), ("embedded", "recorded", 4), ("kafka", "appended", 3)],
)
def test_whoever_has_a_receipt_is_in_and_nobody_is_in_twice(
    tmp_path: Path, log_place: str, stop_at: str, count: int
) -> None:
    receipted = killed_at(tmp_path, log_place, stop_at, count)
    assert len(receipted) == count - 1
    sent = {path.name: path.read_bytes() for path in (tmp_path / "sent").iterdir()}
    assert len(sent) == DEVICES

    platform = Place(tmp_path / "platform", log_place)
    aggregators = Aggregators(platform)
    [packed] = platform.ledger.rounds()
    found = unpack(packed, Round)
    before = platform.ledger.contributions(found.round_id)
    assert [entry.device_id for entry in before] == [
        *receipted,
        *([f"pos-{count - 1:04}"] if stop_at == "recorded" else []),
    ]
    for entry in before:
        assert platform.log.read(entry.log_offset) == sent[entry.device_id]

    receipts: dict[str, topics.ContributionReceipt] = {}

    async def story() -> None:
        async with platform.running() as coordinator:
            for device_id, data in sent.items():  # nobody knows whether it was heard, so everybody repeats
                link = platform.broker.link(device_id)
                link.subscribe(
                    topics.down(device_id, "receipt"),
                    lambda topic, data, who=device_id: receipts.update(  # type: ignore[misc]
                        {who: unpack(data, topics.ContributionReceipt)}
                    ),
                )
                await link.publish(topics.up(device_id, "contribution"), data)
            await until(lambda: len(receipts) == DEVICES)
            following = aggregators.following("a1")
            while platform.log.end > following.reached:
                await following.step()
            # What the crash left in the log without a name is there twice now, and kept once.
            assert following.counts["kept"] == DEVICES
            assert sorted(aggregators.copies("a1", found.round_id)) == sorted(map(digest_of, sent.values()))
            await until(lambda: coordinator.round(found.round_id).root)
            async with aggregators.serving():
                await until(lambda: not coordinator.round(found.round_id).live, 30.0)
            ended = coordinator.round(found.round_id)
            assert (ended.state, ended.reason) == ("PUBLISHED", "")
            assert sorted(ended.frozen) == sorted(digest_of(data) for data in sent.values())

    asyncio.run(story())
    assert all(receipt.accepted for receipt in receipts.values())
    assert platform.ledger.refusals(found.round_id) == {}
    platform.ledger.close()
    platform.log.close()
