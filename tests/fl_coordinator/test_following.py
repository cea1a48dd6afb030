"""An aggregator that follows a log: what it keeps, what it passes over, and that a kill anywhere costs nothing."""

from __future__ import annotations

import asyncio
import errno
import functools
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.aggregator_reading import CoordinatorClient
from fl_coordinator.aggregation import combine_openings
from fl_coordinator.copies import Copies
from fl_coordinator.following import KEPT_S, PER_DEVICE_MAX, TIDY_S, Following
from fl_coordinator.mailbox import Bell
from fl_coordinator.shares.contribution import parse
from fl_coordinator.updates_log import LogPart, SegmentLog
from model_delta.digest import digest_of
from model_delta.errors import DigestMismatch, NotFound, StorageFull, Unavailable
from tests.fakes.secure_round import NAMES, NOW, SecureRound
from tests.fl_coordinator.platform_in_memory import until
from tests.fl_coordinator.test_aggregator import LENGTH, Platform, updates
from tests.systems import on_linux

ROOT = Path(__file__).parents[2]
VECTOR_BYTES = 4 * LENGTH


class LocalLog:
    """A log on this disk, as an aggregator reads it. `away` says that nobody answers."""

    name = "embedded"

    def __init__(self, log: SegmentLog) -> None:
        self.log = log
        self.away = False

    async def read_from(self, offset: int) -> LogPart:
        if self.away:
            raise Unavailable("nobody answers")
        part = self.log.read_from(offset, bytes_max=5000)
        if not part.records:
            await asyncio.sleep(0.01)
        return part


class Followed(Platform):
    """Three aggregators and the log that they follow. Fetching is refused, so that copies must have come by the log."""

    def __init__(self, path: Path, **changes: object) -> None:
        super().__init__(path, **changes)
        self.log = SegmentLog(path / "log")
        self.source = LocalLog(self.log)
        self.open = True
        self.asked = 0

    async def announcement(self, round_id: str) -> bytes:
        self.asked += 1
        if not self.open or round_id != self.world.task.round_id:
            raise NotFound(f"round {round_id}: has ended")
        return self.world.announcement()

    def following(self, name: str = "centre") -> Following:
        return self.aggregators[name].following(self.source, self.announcement)

    def read(self, following: Following) -> Following:
        """Read to the end of the log."""

        async def story() -> None:
            while await following.step():
                pass

        asyncio.run(story())
        return following

    def copies(self, name: str = "centre") -> dict[str, str]:
        return self.aggregators[name]._copies.devices(self.world.task.round_id)


@pytest.fixture
def platform(tmp_path: Path) -> Followed:
    found = Followed(tmp_path)
    found.contribute(updates())
    return found


def test_what_was_followed_needs_no_fetching(platform: Followed) -> None:
    platform.log.append(platform.data)
    for name in NAMES:
        assert platform.read(platform.following(name)).counts["kept"] == 8
    aggregate = combine_openings(platform.run(), platform.world.task)
    assert aggregate.decision.selected == tuple(range(8))
    assert platform.fetched == []


def test_only_the_tail_is_fetched_and_what_was_not_frozen_is_dropped_by_name(
    platform: Followed, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = platform.world.contribution("pos-0099", updates()[0])
    platform.log.append([*platform.data[:5], stranger])
    for name in NAMES:
        platform.read(platform.following(name))
    aggregate = combine_openings(platform.run(), platform.world.task)
    assert len(aggregate.decision.devices) == 8
    assert sorted(platform.fetched) == sorted((name, place) for name in NAMES for place in (5, 6, 7))
    assert sorted(platform.copies()) == sorted(map(digest_of, platform.data))
    assert "did not freeze, of pos-0099; dropped" in caplog.text


def test_a_restarted_reader_goes_on_where_it_was_and_counts_nothing_twice(platform: Followed) -> None:
    platform.log.append(platform.data[:3])
    place = platform.read(platform.following()).reached
    platform.start("centre")
    again = platform.following()
    assert again.reached == place
    platform.log.append([*platform.data[3:], *platform.data])  # delivered again
    platform.read(again)
    assert again.counts["kept"] == 5
    assert sorted(platform.copies()) == sorted(map(digest_of, platform.data))
    assert [path.stat().st_size for path in platform.path.glob("centre/copies/*.vectors")] == [8 * VECTOR_BYTES]


def test_another_log_is_read_from_its_beginning(platform: Followed) -> None:
    platform.log.append(platform.data)
    platform.read(platform.following())
    platform.source.name = "kafka://elsewhere/updates"  # type: ignore[misc]
    moved = platform.following()
    assert moved.reached == 0
    assert platform.read(moved).counts["kept"] == 0
    platform.source.name = "embedded"  # type: ignore[misc]
    assert platform.following().reached == 0


def torn(data: bytes) -> bytes:
    return data[:-10]


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def empty(data: bytes) -> bytes:
    return b""


def random(data: bytes) -> bytes:
    return os.urandom(500)


def doubled(data: bytes) -> bytes:
    return data * 2


@pytest.mark.parametrize("spoil", [torn, flipped, empty, random, doubled])
def test_records_that_are_no_contribution_are_passed_over(platform: Followed, spoil: Callable[[bytes], bytes]) -> None:
    platform.log.append([spoil(platform.data[0]), *platform.data[1:], spoil(platform.data[1])])
    following = platform.read(platform.following())
    assert following.counts["kept"] == 7
    assert following.counts["refused"] == 2
    assert following.reached == platform.log.end
    assert platform.copies().keys() == set(map(digest_of, platform.data[1:]))


def test_contributions_that_nobody_vouches_for_or_of_other_rounds_are_passed_over(platform: Followed) -> None:
    world = platform.world
    stranger = SecureRound(length=LENGTH, aggregators=world.task.aggregators).contribution("pos-0000", updates()[0])
    elsewhere = msgspec.structs.replace(world.task, round_id="fraud-8")
    longer = msgspec.structs.replace(world.task, length=LENGTH + 1)
    others = [
        world.contribution("pos-0001", updates()[1], elsewhere),
        world.contribution("pos-0002", np.zeros(LENGTH + 1, np.float32), longer),
    ]
    platform.log.append([stranger, *others, platform.data[0]])
    following = platform.read(platform.following())
    assert platform.copies() == {digest_of(platform.data[0]): "pos-0000"}
    assert (following.counts["refused"], following.counts["of no open round"]) == (2, 1)


def test_a_log_that_somebody_stuffs_does_not_fill_the_disk(platform: Followed) -> None:
    many = [platform.world.contribution("pos-0000", updates()[0]) for _ in range(6)]
    platform.log.append([*many, *platform.data[1:]])
    platform.data[0] = many[-1]  # what was admitted is not among those that were kept
    for name in NAMES:
        assert platform.read(platform.following(name)).counts["kept"] == 7 + PER_DEVICE_MAX
    assert combine_openings(platform.run(), platform.world.task).mean is not None
    assert sorted(platform.fetched) == sorted((name, 0) for name in NAMES)


def test_unknown_rounds_are_not_asked_for_again_and_again(platform: Followed) -> None:
    platform.open = False
    platform.log.append(platform.data)
    following = platform.read(platform.following())
    assert (platform.asked, following.counts["of no open round"]) == (1, 8)
    platform.now += TIDY_S + 1
    platform.open = True
    platform.log.append(platform.data)
    assert platform.read(following).counts["kept"] == 8


def test_a_trimmed_log_is_said_and_read_from_its_first_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    platform = Followed(tmp_path)
    platform.contribute(updates())
    platform.log = SegmentLog(tmp_path / "short", segment_bytes=1)
    platform.source.log = platform.log
    offsets = [platform.log.append([data])[0] for data in platform.data]
    following = platform.following()
    asyncio.run(following.step())
    platform.log.remove_before(offsets[5])
    platform.read(following)
    assert following.counts["gaps"] == 1
    assert f"it begins at {offsets[5]}; going on there" in caplog.text
    missing = platform.aggregators["centre"]._copies.missing(
        platform.world.task.round_id, map(digest_of, platform.data)
    )
    assert missing == [digest_of(data) for data in platform.data[2:5]]
    assert combine_openings(platform.run(), platform.world.task).mean is not None


def test_copies_go_when_the_round_is_over_and_stay_while_nobody_can_say(platform: Followed) -> None:
    platform.log.append(platform.data)
    following = platform.read(platform.following())

    def tidied() -> int:
        platform.now += TIDY_S
        asyncio.run(following.tidy())
        return len(platform.copies())

    assert tidied() == 8
    platform.open = False
    assert tidied() == 0
    assert list(platform.path.glob("centre/copies/*.vectors")) == []
    platform.open = True
    platform.log.append(platform.data)
    platform.read(following)

    async def nobody(round_id: str) -> bytes:
        raise Unavailable("nobody answers")

    following = platform.aggregators["centre"].following(platform.source, nobody)
    assert tidied() == 8
    platform.now += KEPT_S + 100
    assert tidied() == 0


def test_a_copy_that_the_disk_spoiled_is_fetched_again_and_said(
    platform: Followed, caplog: pytest.LogCaptureFixture
) -> None:
    platform.log.append(platform.data)
    for name in NAMES:
        platform.read(platform.following(name))
    (vectors,) = platform.path.glob("centre/copies/*.vectors")
    spoiled = bytearray(vectors.read_bytes())
    spoiled[3 * VECTOR_BYTES + 7] ^= 1
    vectors.write_bytes(spoiled[: 7 * VECTOR_BYTES + 100])  # the last one is cut off as well
    platform.start("centre")
    assert combine_openings(platform.run(), platform.world.task).mean is not None
    assert sorted(platform.fetched) == [("centre", 3), ("centre", 7)]
    assert "the copy of pos-0003's contribution" in caplog.text


def test_a_claim_that_the_disk_spoiled_does_not_refuse_its_device(platform: Followed) -> None:
    platform.log.append(platform.data)
    for name in NAMES:
        platform.read(platform.following(name))
    platform.aggregators["north"].close()
    for table in platform.path.glob("north/copies/copies.sqlite*"):
        signature = parse(platform.data[4]).signature
        table.write_bytes(table.read_bytes().replace(signature, flipped(signature)))
    platform.start("north")
    aggregate = combine_openings(platform.run(), platform.world.task)
    assert not any(device.reason for device in aggregate.decision.devices)
    assert platform.fetched == [("north", 4)]


@pytest.mark.parametrize("spoiled", [slice(0, 100), slice(100, 1000), slice(3000, 4096)])
def test_a_damaged_table_of_copies_is_begun_anew_and_said(
    platform: Followed, caplog: pytest.LogCaptureFixture, spoiled: slice
) -> None:
    platform.log.append(platform.data)
    platform.read(platform.following())
    platform.aggregators["centre"].close()
    table = platform.path / "centre" / "copies" / "copies.sqlite"
    data = bytearray(table.read_bytes())
    data[spoiled] = b"\x9c" * len(data[spoiled])
    table.write_bytes(data)
    platform.start("centre")
    assert "it is begun anew" in caplog.text
    following = platform.following()
    assert (following.reached, platform.copies()) == (0, {})
    assert platform.read(following).counts["kept"] == 8


def test_who_finds_a_frozen_contribution_nowhere_says_which_and_the_peers_hear_it(platform: Followed) -> None:
    platform.log.append(platform.data[:-1])
    for name in NAMES:
        platform.read(platform.following(name))

    async def hidden(round_id: str, digest: str) -> bytes:
        raise NotFound("not given out")

    platform.aggregators["south"]._completing._fetch = hidden
    failures = platform.run()
    assert isinstance(failures[2], NotFound)
    named = f"contribution 7 ({digest_of(platform.data[7])[:16]}…)"
    assert f"{named} is frozen, but south finds it nowhere" in str(failures[2])
    assert all(named in str(failure) for failure in failures[:2])


def test_an_altered_contribution_is_named(platform: Followed) -> None:
    platform.log.append(platform.data[:-1])
    platform.read(platform.following("south"))
    platform.deliveries["south"] = [*platform.data[:-1], platform.world.contribution("pos-0007", updates()[0])]
    failure = platform.run()[2]
    assert isinstance(failure, DigestMismatch)
    assert "contribution 7" in str(failure)


@on_linux
def test_a_full_disk_ends_the_attempt_by_name_and_nothing_is_lost(
    platform: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform.log.append(platform.data[:5])
    for name in NAMES:
        platform.read(platform.following(name))
    place = platform.following("south").reached
    platform.log.append(platform.data[5:])
    real = os.pwrite

    def full(file: int, data: bytes, offset: int) -> int:
        if "south" in str(Path(f"/proc/self/fd/{file}").readlink()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    following = platform.following("south")
    with pytest.raises(StorageFull, match=r"south/copies: No space left on device; free some space"):
        platform.read(following)
    assert (following.reached, len(platform.copies("south"))) == (place, 5)
    failures = platform.run()
    assert isinstance(failures[2], StorageFull)
    assert all("south gave up" in str(failure) for failure in failures[:2])
    monkeypatch.undo()
    platform.read(following)
    assert len(platform.copies("south")) == 8
    assert combine_openings(platform.run(attempt=2), platform.world.task).mean is not None


def test_following_survives_a_log_and_a_coordinator_that_come_and_go(platform: Followed) -> None:
    async def story() -> None:
        aggregator = platform.aggregators["centre"]
        following = platform.following()
        platform.source.away = True
        task = asyncio.create_task(aggregator.follow(following))
        await until(lambda: following.counts["failures"])
        platform.source.away = False
        platform.log.append(platform.data[:4])
        await until(lambda: following.counts["kept"] == 4)
        platform.log.append(platform.data[4:])
        await until(lambda: following.counts["kept"] == 8)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(story())


def test_a_command_waits_a_moment_for_the_log_before_it_fetches(platform: Followed) -> None:
    """Each record comes a tenth of a second after the one before: nothing is fetched."""

    async def story() -> Sequence[object]:
        followers = []
        for name in NAMES:
            aggregator = platform.aggregators[name]
            followers.append(asyncio.create_task(aggregator.follow(platform.following(name))))
        await asyncio.sleep(0)
        command = platform.command()
        runs = [asyncio.create_task(platform.aggregators[name].run_round(command)) for name in NAMES]
        for data in platform.data:
            await asyncio.to_thread(platform.log.append, [data])
            await asyncio.sleep(0.05)
        replies = await asyncio.gather(*runs)
        for follower in followers:
            follower.cancel()
        await asyncio.gather(*followers, return_exceptions=True)
        return replies

    replies = asyncio.run(story())
    assert combine_openings(replies, platform.world.task).mean is not None  # type: ignore[arg-type]


@given(st.data())
@settings(max_examples=20, deadline=None)
def test_however_records_arrive_each_contribution_is_kept_once(data: st.DataObject) -> None:
    """Repeated, reordered, torn, between restarts of the reader and under a log that forgets its beginning."""
    world = _world()
    with tempfile.TemporaryDirectory() as folder:
        log = SegmentLog(Path(folder, "log"), segment_bytes=1)
        copies = Copies(Path(folder, "copies"))
        appended: set[int] = set()
        expected: set[int] = set()
        following = _following(world, copies, log)
        for _ in range(data.draw(st.integers(1, 12))):
            match data.draw(st.sampled_from(["append", "append", "tear", "read", "restart", "forget"])):
                case "append":
                    places = data.draw(st.lists(st.integers(0, len(world.data) - 1), min_size=1, max_size=4))
                    log.append([world.data[place] for place in places])
                    appended |= set(places)
                case "tear":
                    log.append([world.data[0][: data.draw(st.integers(0, 2000))]])
                case "read":
                    while asyncio.run(following.step()):
                        pass
                    expected |= appended
                case "restart":
                    copies.close()
                    copies = Copies(Path(folder, "copies"))
                    following = _following(world, copies, log)
                case "forget":
                    while asyncio.run(following.step()):
                        pass
                    expected |= appended
                    log.remove_before(log.end)
        while asyncio.run(following.step()):
            pass
        expected |= appended
        digests = [digest_of(world.data[place]) for place in sorted(expected)]
        round_id = world.task.round_id
        assert sorted(copies.devices(round_id)) == sorted(digests)
        assert copies.missing(round_id, digests) == []
        with copies.opened(round_id, digests) as kept:
            for place, entry in zip(sorted(expected), kept, strict=True):
                assert bytes(entry.masked[:]) == parse(world.data[place]).masked
        sizes = [path.stat().st_size for path in Path(folder, "copies").glob("*.vectors")]
        assert sum(sizes) == VECTOR_BYTES * len(expected)
        copies.close()
        log.close()


class _World(SecureRound):
    """A round with six contributions, made once."""

    def __init__(self) -> None:
        super().__init__(length=LENGTH)
        self.data = [self.contribution(f"pos-{place:04d}", update) for place, update in enumerate(updates(6))]


@functools.cache
def _world() -> _World:
    return _World()


def _following(world: _World, copies: Copies, log: SegmentLog) -> Following:
    async def announcement(round_id: str) -> bytes:
        return world.announcement()

    return Following(
        log=LocalLog(log),
        announcement=announcement,
        copies=copies,
        key=world.task.aggregators[1],
        anchors=world.anchors,
        ca_pem=world.ca_pem,
        revoked=frozenset,
        clock=lambda: NOW,
        kept=Bell(),
    )


READER = """
import os, sys, time
from pathlib import Path
from fl_coordinator.copies import Copies, HeldRound, Reached
from fl_coordinator.shares.contribution import keep
from fl_coordinator.updates_log import SegmentLog

folder, log, stop_at = Path(sys.argv[1]), SegmentLog(Path(sys.argv[2])), sys.argv[3]
if stop_at == "written":   # the vectors are on the disk, the table does not know
    def stop(descriptor, real=os.fsync):
        real(descriptor)
        if "vectors" in os.readlink(f"/proc/self/fd/{descriptor}") and copies.devices("fraud-7"):
            print("stopped", flush=True)
            time.sleep(60)
    os.fsync = stop
copies = Copies(folder)
copies.begin(HeldRound("fraud-7", 2**40))
offset = copies.reached("log")
while True:
    part = log.read_from(offset, 5000)
    if part.records:
        copies.keep({"fraud-7": [keep(record, 2**20) for _, record in part.records]}, Reached("log", part.next))
        offset = part.next
        if stop_at == "kept":
            print("stopped", flush=True)
            time.sleep(60)
"""


@on_linux
@pytest.mark.slow
@pytest.mark.parametrize("stop_at", ["written", "kept"])
def test_a_reader_killed_at_any_step_has_read_each_record_once_in_the_end(tmp_path: Path, stop_at: str) -> None:
    world = SecureRound(length=LENGTH)
    data = [world.contribution(f"pos-{place:04d}", update) for place, update in enumerate(updates())]
    SegmentLog(tmp_path / "log").append(data)
    for _ in range(2):
        child = subprocess.Popen(
            [sys.executable, "-c", READER, str(tmp_path / "copies"), str(tmp_path / "log"), stop_at],
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        assert child.stdout is not None
        assert child.stdout.readline() == b"stopped\n"
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
    copies, log = Copies(tmp_path / "copies"), SegmentLog(tmp_path / "log")
    before, offset = copies.devices("fraud-7"), copies.reached("log")
    assert list(before.values()) == [f"pos-{place:04d}" for place in range(len(before))]
    assert 0 < len(before) < 8
    left = [record for _, record in log.read_from(offset).records]
    assert [digest_of(record) for record in data[len(before) :]] == [digest_of(record) for record in left]
    assert copies.missing("fraud-7", before) == []


@pytest.mark.parametrize("name", ["x" * 100_000, "../../etc", "a\nb", "a/b?c#d"])
def test_a_round_name_in_the_log_is_asked_for_as_a_name_or_not_at_all(platform: Followed, name: str) -> None:
    stranger = platform.world.contribution(
        "pos-0001", updates()[1], msgspec.structs.replace(platform.world.task, round_id=name)
    )
    platform.log.append([stranger, *platform.data])
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.raw_path.decode())
        if request.url.path == f"/v1/rounds/{platform.world.task.round_id}/announcement":
            return httpx.Response(200, content=platform.world.announcement())
        return httpx.Response(404, text="there is none")

    async def story() -> Following:
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
            ask = CoordinatorClient(client, "http://coordinator").announcement
            following = platform.aggregators["centre"].following(platform.source, ask)
            while await following.step():
                pass
            return following

    following = asyncio.run(story())
    assert following.counts["kept"] == 8
    assert len(platform.copies()) == 8
    for path in asked:
        assert path.startswith("/v1/rounds/")
        assert path.endswith("/announcement")
        assert path.count("/") == 4
