"""A key server that answers nothing holds up nobody for long, and the event loop not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from fl_coordinator.distant_keyring import CALLS_MAX, DistantKeyring
from fl_coordinator.rounds import State
from model_delta.errors import Unavailable, Untrusted
from model_delta.keys.keyring import EmbeddedKeyring
from tests.fakes.keyring import HangingKeyring
from tests.fl_coordinator.control_calls import calling
from tests.fl_coordinator.learning_platform import SPEC, Learning
from tests.fl_coordinator.platform_in_memory import Platform, adopt_first, on_a_loop

DEADLINE_S = 0.05
PATIENCE_S = 60.0
"""Where it has to answer, on a busy machine too."""


@pytest.fixture
def behind(tmp_path: Path) -> Iterator[HangingKeyring]:
    hanging = HangingKeyring(EmbeddedKeyring.create(tmp_path / "keyring", "acme"))
    yield hanging
    hanging.answering.set()


def test_answers_and_refusals_pass_through(behind: HangingKeyring) -> None:
    ring = DistantKeyring(behind.as_keyring())
    key, wrapped = ring.new_key("acme/1")
    assert ring.unwrap("acme/1", wrapped) == key
    assert ring.rotate() == 2
    (again,) = ring.rewrap([("acme/1", wrapped)])
    assert ring.unwrap("acme/1", again) == key
    ring.trim(2)
    with pytest.raises(Untrusted):
        ring.unwrap("acme/1", wrapped)
    envelope = ring.sign("release", "x", b"payload")
    assert ring.verify(envelope, "x", "release") == b"payload"
    ring.revoke(7)
    assert ring.revoked() == {7}
    assert ring.sign_bytes("release", b"x")[1]
    assert ring.tenant == ring.anchors().tenant == "acme"


def test_who_asks_a_silent_server_is_told_in_time_and_the_next_at_once(behind: HangingKeyring) -> None:
    now = [0.0]
    ring = DistantKeyring(behind.as_keyring(), DEADLINE_S, clock=lambda: now[0])
    behind.answering.clear()
    with pytest.raises(Unavailable, match=r"keys of acme: sign: .* none within 0.05 s"):
        ring.sign("release", "x", b"payload")
    with pytest.raises(Unavailable, match="before this"):
        ring.ca_pem()
    assert behind.begun == ["sign"], "nobody is asked, so nothing is waited for"
    behind.answering.set()
    now[0] = 2 * DEADLINE_S  # it may be asked again
    ring._deadline_s = PATIENCE_S
    assert ring.ca_pem().startswith(b"-----BEGIN")


def test_calls_that_hang_are_bounded(behind: HangingKeyring) -> None:
    now = [0.0]
    ring = DistantKeyring(behind.as_keyring(), 0.01, clock=lambda: now[0])
    behind.answering.clear()
    for _ in range(CALLS_MAX + 3):
        now[0] += 1
        with pytest.raises(Unavailable):
            ring.ca_pem()
    assert len(behind.begun) == CALLS_MAX


def test_what_was_revoked_is_still_known(behind: HangingKeyring) -> None:
    ring = DistantKeyring(behind.as_keyring(), PATIENCE_S)
    ring.revoke(7)
    behind.answering.clear()
    with pytest.raises(Unavailable):
        DistantKeyring(behind.as_keyring(), DEADLINE_S).revoked()  # one that never heard
    behind.answering.set()
    assert ring.revoked() == {7}
    behind.answering.clear()
    ring._deadline_s = DEADLINE_S
    assert ring.revoked() == {7}


class FarKeys(Platform):
    """The platform in memory, with its keys behind `behind`: `distant` has the deadline."""

    def open(self) -> None:
        near = self.keyring
        self.behind = HangingKeyring(near)
        self.keyring = self.distant = DistantKeyring(self.behind.as_keyring(), PATIENCE_S)  # type: ignore[assignment]
        super().open()
        self.keyring = near  # what the devices and aggregators of the tests use


class Watched(Platform):
    """The platform in memory, with an eye on who asks for keys."""

    def open(self) -> None:
        near = self.keyring
        self.behind = HangingKeyring(near)
        self.keyring = self.behind  # type: ignore[assignment]
        super().open()
        self.keyring = near


@on_a_loop
async def test_a_silent_key_server_does_not_stall_the_coordinator(tmp_path: Path) -> None:
    platform = FarKeys(tmp_path)
    async with calling(platform) as call:
        first = await call("GET", "/v1/revoked", "aggregator")
        assert first.json() == {"serials": []}
        platform.behind.answering.clear()
        platform.distant._deadline_s = DEADLINE_S
        try:
            turns = 0
            for _ in range(50):  # a machine that stands still for the whole deadline proves nothing
                platform.distant._silent_until = 0.0
                begun = len(platform.behind.begun)
                asked = asyncio.create_task(call("GET", "/v1/revoked", "aggregator"))
                keys = asyncio.create_task(call("GET", "/v1/keys"))
                while not (asked.done() and keys.done()):
                    await asyncio.sleep(0.001)
                    turns += len(platform.behind.begun) > begun  # while somebody waits for the key server
                assert (await asked).json() == {"serials": []}
                assert (await keys).status_code == 503
                if turns > 5:
                    break
            assert turns > 5
        finally:
            platform.behind.answering.set()


def test_a_round_from_end_to_end_asks_for_no_key_on_the_loop(tmp_path: Path) -> None:
    platform = Watched(tmp_path)
    at = Learning(platform)  # before there is a loop: devices enrol here

    async def story() -> None:
        async with platform.running(), at.aggregators.serving():
            await adopt_first(platform, at.devices)
            assert (await at.learned(SPEC)).at is State.PUBLISHED

    asyncio.run(story())
    assert platform.behind.on_loop == []
    assert {"sign", "new_key", "revoked"} <= set(platform.behind.begun)
