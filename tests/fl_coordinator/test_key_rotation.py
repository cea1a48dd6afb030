"""Rotation and shredding of artifact keys in a coordinator, with the power cut between any two steps."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest

from fl_coordinator.control import control_app
from fl_coordinator.ledger import Ledger
from model_delta.errors import Malformed, NotFound, Untrusted
from model_delta.keys.keyring import EmbeddedKeyring
from model_delta.keys.wrapping import KeyVersions, version_of
from tests.fl_coordinator.platform_in_memory import START, Platform, fraud_model, on_a_loop


def published(platform: Platform, count: int = 3) -> list[str]:
    return [
        platform.publisher.publish(fraud_model(seed), model="fraud", now=START + seed).manifest for seed in range(count)
    ]


def test_rotation_moves_every_key_and_changes_none(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    digests = published(platform)
    before = [platform.publisher.key(digest) for digest in digests]
    assert platform.publisher.keys.rotate() == KeyVersions(1, 2)
    records = platform.ledger.releases()
    assert {version_of(record.wrapped_key) for record in records} == {2}
    assert [platform.publisher.key(digest) for digest in digests] == before
    assert platform.publisher.keys.rotate(forget=True) == KeyVersions(3, 3)
    assert [platform.publisher.key(digest) for digest in digests] == before


def test_a_shredded_version_opens_nowhere_and_the_others_do(tmp_path: Path) -> None:
    platform = Platform(tmp_path / "platform")
    first, second, third = published(platform)
    copy = tmp_path / "copy.sqlite"
    platform.ledger.close()
    shutil.copyfile(tmp_path / "platform" / "ledger.sqlite", copy)
    platform.open()
    platform.publisher.keys.shred(second)
    for read in (platform.publisher.key, platform.publisher.file, platform.publisher.source):
        with pytest.raises(Untrusted, match="was shredded"):
            read(second)
    assert platform.ledger.withdrawn("fraud") == {second: "shredded"}
    assert platform.publisher.source(first) == fraud_model(0)
    assert platform.publisher.source(third) == fraud_model(2)
    backup = Ledger(copy)
    for record in backup.releases():
        with pytest.raises(Untrusted):
            platform.keyring.unwrap(f"acme/{record.manifest}", record.wrapped_key)
    backup.close()
    with pytest.raises(Malformed, match="was shredded"):
        platform.publisher.publish(fraud_model(1), model="fraud", now=START + 9, parent=first)
    assert platform.publisher.publish(fraud_model(7), model="fraud", now=START + 9).parents == (third,)
    assert platform.publisher.keys.shred(second).floor == 3  # again: nothing left to drop, and no harm
    with pytest.raises(NotFound):
        platform.publisher.keys.shred("0" * 64)


@on_a_loop
async def test_what_devices_fall_back_to_is_not_shredded(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    async with platform.running() as coordinator:
        record = await coordinator.publish(fraud_model(1), model="fraud")
        with platform.ledger._write() as db:
            db.execute("UPDATE models SET stable = ? WHERE model = 'fraud'", (record.manifest,))
        with pytest.raises(Malformed, match="is the stable one"):
            platform.publisher.keys.shred(record.manifest)
        assert platform.publisher.source(record.manifest) == fraud_model(1)


class PowerCut(BaseException):
    """The process is gone."""


class CutOff(EmbeddedKeyring):
    """The keyring of a process that dies as soon as it has done, or is about to do, one thing."""

    at = ("", "")

    def _maybe(self, what: str, when: str) -> None:
        if self.at == (what, when):
            raise PowerCut

    def rotate(self) -> int:
        self._maybe("rotate", "before")
        done = super().rotate()
        self._maybe("rotate", "after")
        return done

    def rewrap(self, records: Sequence[tuple[str, bytes]]) -> list[bytes]:
        self._maybe("rewrap", "before")
        done = super().rewrap(records)
        self._maybe("rewrap", "after")
        return done

    def trim(self, floor: int) -> None:
        self._maybe("trim", "before")
        super().trim(floor)
        self._maybe("trim", "after")


@pytest.mark.parametrize("what", ["rotate", "rewrap", "trim"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_shredding_cut_off_anywhere_loses_nothing_else_and_is_repeated(tmp_path: Path, what: str, when: str) -> None:
    platform = Platform(tmp_path)
    first, second, third = published(platform)
    before = [platform.publisher.key(digest) for digest in (first, third)]
    dying = CutOff.open(tmp_path / "keyring", platform.clock)
    dying.at = (what, when)
    platform.publisher.keys._keyring = dying
    with pytest.raises(PowerCut):
        platform.publisher.keys.shred(second)
    platform.keyring = EmbeddedKeyring.open(tmp_path / "keyring", platform.clock)
    platform.reopen()
    assert [platform.publisher.key(digest) for digest in (first, third)] == before
    with pytest.raises(Untrusted):
        platform.publisher.key(second)
    kept = platform.publisher.keys.shred(second)
    assert kept.floor == kept.latest
    assert [platform.publisher.key(digest) for digest in (first, third)] == before


def test_a_record_that_does_not_open_stops_a_rotation_before_anything_is_forgotten(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    first, second, _ = published(platform)
    platform.ledger.replace_wrapped_keys({second: b"vault:v1:" + b"A" * 80})
    with pytest.raises(Untrusted, match=second[:8]):
        platform.publisher.keys.rotate(forget=True)
    assert platform.keyring.versions().floor == 1
    assert platform.publisher.source(first) == fraud_model(0)
    with pytest.raises(NotFound):
        platform.ledger.replace_wrapped_keys({first: b"", "0" * 64: b""})
    assert platform.publisher.source(first) == fraud_model(0)


class Waiting(EmbeddedKeyring):
    """A keyring that says which batch came, and rewraps it when it is let."""

    def __init__(self, near: EmbeddedKeyring) -> None:
        self.__dict__.update(near.__dict__)
        self.batches: list[int] = []
        self.came = threading.Semaphore(0)
        self.let = threading.Semaphore(0)

    def rewrap(self, records: Sequence[tuple[str, bytes]]) -> list[bytes]:
        self.batches.append(len(records))
        self.came.release()
        assert self.let.acquire(timeout=60)
        return super().rewrap(records)


@on_a_loop
async def test_a_rotation_tells_how_far_it_is_and_ends_though_who_asked_for_it_left(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    digests = published(platform, 5)
    before = [platform.publisher.key(digest) for digest in digests]
    platform.publisher.keys._keyring = ring = Waiting(platform.keyring)
    platform.publisher.keys._rewrap_batch = 2
    app = control_app(platform.coordinator, tokens={"admin": "a" * 32}, flower=platform.bridge)
    transport = httpx.ASGITransport(app, client=("127.0.0.1", 1))
    admin = {"Authorization": f"Bearer {'a' * 32}"}
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=admin) as http:

        async def told() -> tuple[int, int]:
            found = (await http.get("/v1/keys")).json()
            return found["rewrapped"], found["to_rewrap"]

        assert await told() == (0, 0)
        asking = asyncio.create_task(http.post("/v1/keys/rotate", json={}))
        for done in (0, 2, 4):
            assert await asyncio.to_thread(ring.came.acquire, timeout=60)
            assert await told() == (done, 5)
            if done == 2:
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
                assert asking.cancelled()
            ring.let.release()
    await asyncio.to_thread(platform.publisher._one_at_a_time.acquire, timeout=60)
    platform.publisher._one_at_a_time.release()
    assert ring.batches == [2, 2, 1]
    assert platform.publisher.keys.rewrapping == (0, 0)
    assert {version_of(record.wrapped_key) for record in platform.ledger.releases()} == {2}
    assert [platform.publisher.key(digest) for digest in digests] == before
