"""An aggregator stands by: what it waits for, what it takes, and what it refuses to begin."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fl_coordinator import standing_by
from fl_coordinator.round_command import WAITS_MAX_S
from fl_coordinator.standing_by import StandingBy, StoodDown
from model_delta.encoding import pack
from model_delta.errors import Expired, Malformed, NotFound, SignatureInvalid, Unavailable, Untrusted
from model_delta.keys.keyring import EmbeddedKeyring
from model_delta.merkle import root
from model_delta.task import TASK_TYPE, AggregatorKey, RoundTask
from model_delta.trust.signing import open_envelope, seal_envelope
from tests.fl_coordinator.platform_in_memory import on_a_loop

NOW = 1_800_000_000.0
KEYS = tuple(AggregatorKey(f"a{n}", bytes([n]) * 32, bytes([n + 3]) * 32) for n in range(3))
TASK = RoundTask(
    tenant="acme",
    model="fraud",
    round_id="fraud-1",
    base="0" * 64,
    training_graph="1" * 64,
    parameters=(),
    length=10,
    contributions_max=8,
    aggregators=KEYS,
    issued=int(NOW),
    deadline=int(NOW) + 60,
)


class Bench:
    """A coordinator that says what is in `says`, and an aggregator whose runs are counted. The last one stays."""

    def __init__(self, folder: Path, *says: bytes | Exception | None) -> None:
        self.keyring = EmbeddedKeyring.create(folder / "keyring", "acme")
        self.says = list(says)
        self.asked = 0
        self.ran: list[dict[str, Any]] = []
        self.now = NOW
        self.standing = StandingBy(
            anchors=self.keyring.anchors(), key=KEYS[0], fetch=self._fetch, run=self._run, clock=lambda: self.now
        )

    async def _fetch(self, round_id: str) -> bytes | None:
        self.asked += 1
        await asyncio.sleep(0)
        said = self.says.pop(0) if len(self.says) > 1 else self.says[0]
        if isinstance(said, Exception):
            raise said
        return said

    async def _run(self, command: Any) -> dict[str, Any]:
        self.ran.append(dict(command))
        await asyncio.sleep(0)
        return {"ran": command["attempt"]}

    def announcement(self, task: RoundTask = TASK) -> bytes:
        return seal_envelope(self.keyring.sign("round", TASK_TYPE, pack(task)))

    def standing_command(self, task: RoundTask = TASK, stands_s: float = 60.0) -> dict[str, Any]:
        return {"round_id": task.round_id, "task": self.announcement(task), "stands_s": stands_s}

    def attempt(self, task: RoundTask = TASK, round_id: str = "fraud-1") -> bytes:
        digests = ["d" * 64]
        return pack(
            {
                "round_id": round_id,
                "attempt": 1,
                "task": self.announcement(task),
                "contributions": digests,
                "root": root([bytes.fromhex(one) for one in digests]),
                "deadline_s": 5.0,
            }
        )


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standing_by, "_PAUSE_FIRST_S", 0.001)


@on_a_loop
async def test_it_asks_until_the_list_is_there_whoever_is_away_meanwhile(tmp_path: Path) -> None:
    bench = Bench(tmp_path, None, Unavailable("restarting"), Unavailable("restarting"), None)
    bench.says += [bench.attempt()]
    assert await bench.standing.answer(bench.standing_command()) == {"ran": 1}
    assert bench.asked == 5
    assert [command["contributions"] for command in bench.ran] == [["d" * 64]]
    assert bench.standing._waiting == {}


@on_a_loop
async def test_all_commands_of_a_round_get_what_the_first_gets(tmp_path: Path) -> None:
    """A coordinator that starts anew asks again; what runs then runs once, and nobody is told otherwise."""
    bench = Bench(tmp_path, None)
    first, second, third = (asyncio.create_task(bench.standing.answer(bench.standing_command())) for _ in range(3))
    await asyncio.sleep(0.01)
    first.cancel()  # who asked first is gone
    bench.says = [bench.attempt()]
    assert [await second, await third] == [{"ran": 1}] * 2
    assert len(bench.ran) == 1
    assert first.cancelled()


@on_a_loop
async def test_a_round_that_is_over_is_let_go_and_a_list_that_does_not_come_is_not_waited_for(tmp_path: Path) -> None:
    bench = Bench(tmp_path, None, NotFound("no command stands"))
    with pytest.raises(StoodDown, match="no command stands"):
        await bench.standing.answer(bench.standing_command())
    bench.says = [None]
    with pytest.raises(Unavailable, match=r"no frozen list came within 0 s: there is none yet"):
        await bench.standing.answer(bench.standing_command(stands_s=0.02))
    bench.says = [Unavailable("cannot be reached")]
    with pytest.raises(Unavailable, match="cannot be reached"):
        await bench.standing.answer(bench.standing_command(stands_s=0.02))
    assert bench.ran == []


@on_a_loop
async def test_it_waits_no_longer_than_the_signed_deadline_allows_whatever_it_is_told(tmp_path: Path) -> None:
    bench = Bench(tmp_path, None)
    bench.now = TASK.deadline + WAITS_MAX_S - 0.02
    with pytest.raises(Unavailable, match="no frozen list came"):
        await bench.standing.answer(bench.standing_command(stands_s=1e300))
    bench.now += 1.0
    for stands_s in (1e300, float("inf")):
        with pytest.raises(Expired, match="was to come until"):
            await bench.standing.answer(bench.standing_command(stands_s=stands_s))


def other(**changes: Any) -> RoundTask:
    return msgspec.structs.replace(TASK, **changes)


@pytest.mark.parametrize(
    ("found", "error", "says"),
    [
        (lambda bench: bench.attempt(other(selected_min=2)), Untrusted, "other terms than were announced"),
        (lambda bench: bench.attempt(round_id="fraud-2"), Malformed, "expected its attempt, found one of 'fraud-2'"),
        (lambda bench: bench.attempt(other(aggregators=KEYS[::-1][:2])), Malformed, "three aggregators"),
        (lambda bench: b"\xff", Malformed, "CBOR|cbor|bytes"),
        (lambda bench: pack({"round_id": "fraud-1"}), Malformed, "attempt"),
    ],
    ids=["other terms", "another round", "two aggregators", "no record", "half a record"],
)
@on_a_loop
async def test_a_list_of_anything_but_the_announced_round_is_refused(
    tmp_path: Path, found: Callable[[Bench], bytes], error: type[Exception], says: str
) -> None:
    bench = Bench(tmp_path, None)
    bench.says = [found(bench)]
    with pytest.raises(error, match=says):
        await bench.standing.answer(bench.standing_command())
    assert bench.ran == []


@on_a_loop
async def test_what_nobody_signed_or_signed_for_others_is_not_waited_for(tmp_path: Path) -> None:
    bench = Bench(tmp_path, None)
    torn = open_envelope(bench.announcement())
    forged = seal_envelope(msgspec.structs.replace(torn, payload=pack(other(selected_min=2))))
    strangers = tuple(AggregatorKey(f"b{n}", bytes([n + 9]) * 32, bytes([n + 19]) * 32) for n in range(3))
    for command, error in (
        ({**bench.standing_command(), "task": forged}, SignatureInvalid),
        ({**bench.standing_command(), "round_id": "fraud-2"}, Untrusted),
        (bench.standing_command(other(aggregators=strangers)), Untrusted),
        (bench.standing_command(other(selected_min=0)), Malformed),
    ):
        with pytest.raises(error):
            await bench.standing.answer(command)
    assert bench.asked == 0
    waiting = asyncio.create_task(bench.standing.answer(bench.standing_command()))
    await asyncio.sleep(0)
    with pytest.raises(Untrusted, match="other terms than at first"):
        await bench.standing.answer(bench.standing_command(other(selected_min=2)))
    waiting.cancel()
