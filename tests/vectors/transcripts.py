"""Frozen transcripts: how they are replayed, and how they were made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fl_coordinator.replay import replay
from fl_coordinator.transcript import SETTLEMENT_TYPE, Transcript
from model_delta.encoding import pack, unpack_plain
from model_delta.errors import Untrusted
from model_delta.task import TASK_TYPE
from model_delta.trust.signing import public_bytes
from model_delta.trust.updater import TrustAnchors
from tests.fakes.secure_round import SecureRound
from tests.fl_coordinator.test_transcript import LENGTH, Written, another

Signed = Callable[[str, str, object], bytes]


def read_transcript(data: bytes, anchors: TrustAnchors) -> Mapping[str, Any]:
    """What the replay tells. Raises Untrusted with the first check that does not hold."""
    told = replay(data, anchors)
    for check in told.checks:
        if check.problem:
            raise Untrusted(f"{check.name}: {check.problem}")
    found: Mapping[str, Any] = msgspec.json.decode(msgspec.json.encode(told))
    return {**found, "holds": told.holds}


def transcripts(signed: Signed) -> Iterator[tuple[str, bytes]]:
    """File names and bytes; `signed(role, type, payload)` is an envelope."""
    world = SecureRound(length=LENGTH, hostile_max=1, selected_min=3, policy="krum")
    world.signing = [Ed25519PrivateKey.from_private_bytes(bytes([index]) * 32) for index in range(3)]
    keys = tuple(
        msgspec.structs.replace(key, verifying=public_bytes(signing.public_key()))
        for key, signing in zip(world.task.aggregators, world.signing, strict=True)
    )
    world.task = msgspec.structs.replace(world.task, aggregators=keys)
    written = Written(world=world)
    good = Transcript(
        announcement=signed("round", TASK_TYPE, world.task),
        openings=tuple(reply["opening"] for reply in written.replies()),
        shares=written.transcript().shares,
        settlement=signed("round", SETTLEMENT_TYPE, written.settlement),
    )

    def but(**fields: Any) -> bytes:
        return pack({**unpack_plain(pack(good)), **fields})

    other = msgspec.structs.replace(written.settlement, mean="0" * 64)
    coined = tuple(
        reply["opening"] for reply in written.replies(msgspec.structs.replace(written.decision, coin=bytes(32)))
    )
    yield "transcript.cbor", pack(good)  # of decision format 2, before the freeze was signed
    yield "transcript_with_a_signed_freeze.cbor", pack(good)  # of freeze format 1, with a coin for each attempt
    yield "transcript_with_one_coin.cbor", pack(good)
    yield "transcript_with_another_coin.cbor", but(openings=list(coined))
    yield "transcript_with_a_field_of_the_future.cbor", but(weather="fine")
    yield "transcript_of_a_newer_format.cbor", but(format=2)
    yield "transcript_with_another_share.cbor", but(shares=[another(good.shares[0]), *good.shares[1:]])
    yield "transcript_with_two_openings.cbor", but(openings=list(good.openings[:2]))
    yield "transcript_announced_by_the_release_role.cbor", but(announcement=signed("release", TASK_TYPE, world.task))
    yield "transcript_settling_another_mean.cbor", but(settlement=signed("round", SETTLEMENT_TYPE, other))
