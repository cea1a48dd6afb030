"""What one enrolled device sends costs it a refusal, and nobody else anything: no receipt, no room on the disk."""

from __future__ import annotations

import base64
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from fl_coordinator.shares.contribution import parse, verify_claim
from model_delta.digest import digest_of
from model_delta.encoding import pack
from tests.fl_coordinator.learning_platform import SPEC, honest, inconsistent, learning, signed
from tests.fl_coordinator.platform_in_memory import Device, on_a_loop, until

P256 = bytes.fromhex("2a8648ce3d030107")


def with_certificate(device: Device, change: Callable[[bytes], bytes]) -> bytes:
    lines = device.certificate.split(b"\n")
    der = change(base64.b64decode(b"".join(line for line in lines if line and not line.startswith(b"-"))))
    pem = b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(der) + b"-----END CERTIFICATE-----\n"
    return signed(device, certificate=pem)


def on_no_curve(device: Device) -> bytes:
    return with_certificate(device, lambda der: der.replace(P256, P256[:-1] + b"\x06"))


def off_the_curve(device: Device) -> bytes:
    def moved(der: bytes) -> bytes:
        at = der.index(P256) + len(P256) + 10
        return der[:at] + bytes([der[at] ^ 1]) + der[at + 1 :]

    return with_certificate(device, moved)


def of_a_round_with_an_endless_name(device: Device) -> bytes:
    return signed(device, round_id="x" * 500_000)


def on_a_base_with_an_endless_name(device: Device) -> bytes:
    return signed(device, base="x" * 500_000)


@pytest.mark.parametrize(
    ("spoiled", "reason"),
    [
        (on_no_curve, "malformed"),
        (off_the_curve, "malformed"),
        (of_a_round_with_an_endless_name, "malformed"),
        (on_a_base_with_an_endless_name, "malformed"),
    ],
)
@on_a_loop
async def test_others_get_their_receipts_whatever_one_device_sends(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoiled: Callable[[Device], bytes], reason: str
) -> None:
    caplog.set_level(logging.INFO)
    async with learning(tmp_path, 4) as at:
        opened = await at.coordinator.open_round(SPEC)
        await until(lambda: all(device.task is not None for device in at.devices))
        hostile, *others = at.devices
        await hostile.contribute(spoiled(hostile))
        for number, device in enumerate(others):  # most of them in the same batch
            await device.contribute(device.contribution(honest(number)))
        await until(lambda: all(device.receipts for device in at.devices), 5.0)
        assert all(device.receipts[-1].accepted for device in others)
        assert hostile.receipts[-1].reason.startswith(f"{reason}: ")
        assert len(pack(hostile.receipts[-1])) < 2_000
        assert [entry.device_id for entry in at.ledger.contributions(opened.round_id)] == [
            device.device_id for device in others
        ]
        assert max(len(record.getMessage()) for record in caplog.records) < 4_000


@on_a_loop
async def test_what_a_device_signed_that_sealed_different_shares_is_kept_when_it_is_dropped(tmp_path: Path) -> None:
    async with learning(tmp_path) as at:
        opened = await at.coordinator.open_round(SPEC)
        await until(lambda: all(device.task is not None for device in at.devices))
        liar, *others = at.devices
        sent = inconsistent(liar)
        await liar.contribute(sent)
        for number, device in enumerate(others):
            await device.contribute(device.contribution(honest(number)))
        ended = await at.ended(opened.round_id)
        assert (ended.state, len(ended.chosen)) == ("PUBLISHED", 6)
        assert ended.rejected[liar.device_id].startswith("inconsistent shares: ")
        assert ended.figures["evidence"] == {liar.device_id: digest_of(sent)}
        kept = parse(at.platform.store.get("evidence", digest_of(sent)))
        assert (kept.claim, kept.signature, kept.masked) == (parse(sent).claim, parse(sent).signature, b"")
        verified = verify_claim(kept.claim, kept.signature, liar.ca, frozenset(), at.platform.clock())
        assert (verified.device_id, verified.round_id) == (liar.device_id, opened.round_id)
