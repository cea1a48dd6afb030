"""The in-process round gives, byte for byte, what three aggregators that talk to each other give."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_coordinator.aggregation import combine_openings
from fl_coordinator.aggregator import Aggregator
from fl_coordinator.local_round import LocalAggregators
from fl_coordinator.shares.bounds import bounds_of, fitted
from fl_coordinator.shares.fixed_point import Rng
from model_delta.digest import digest_of
from model_delta.errors import Malformed
from model_delta.merkle import root
from tests.fakes.secure_round import NAMES, NOW, SecureRound


def drawing(number: int) -> Rng:
    """Keys and coins (32 bytes) are always the same ones, everything else is random."""
    return lambda count: bytes([number + 1]) * count if count == 32 else os.urandom(count)


RNGS = [drawing(number) for number in range(3)]


def over_a_network(folder: Path, world: SecureRound, data: Sequence[bytes]) -> list[dict[str, Any]]:
    """The three answers of real aggregators."""
    members: dict[str, Aggregator] = {}

    async def fetch(round_id: str, digest: str) -> bytes:
        return data[[digest_of(one) for one in data].index(digest)]

    def sender(name: str) -> Any:
        async def send(peer: str, step: str, message: bytes) -> None:
            members[peer].deliver(name, step, message)

        return send

    for number, name in enumerate(NAMES):
        members[name] = Aggregator(
            name,
            folder / name,
            anchors=world.anchors,
            ca_pem=world.ca_pem,
            revoked=lambda: frozenset(),
            fetch=fetch,
            send=sender(name),
            clock=lambda: NOW,
            rng=RNGS[number],
        )
    digests = [digest_of(one) for one in data]
    command = {
        "round_id": world.task.round_id,
        "attempt": 1,
        "task": world.announcement(),
        "contributions": digests,
        "root": root([bytes.fromhex(digest) for digest in digests]),
    }

    async def all_of_them() -> list[dict[str, Any]]:
        return list(await asyncio.gather(*(member.run_round(command) for member in members.values())))

    return asyncio.run(all_of_them())


@pytest.mark.parametrize(("length", "policy"), [(120, "robust"), (120, "krum"), (4_000, "robust")])
def test_the_same_contributions_give_the_same_bytes(tmp_path: Path, length: int, policy: str) -> None:
    local = LocalAggregators(RNGS, NAMES)
    world = SecureRound(length=length, policy=policy, hostile_max=1, contributions_max=16, aggregators=local.keys)
    world.task = fitted(world.task)
    assert (bounds_of(world.task).copies > 0) == (length > 2_000), "one case is to estimate distances by sketches"
    rng = np.random.default_rng(5)
    common = rng.normal(size=length)
    scale = 2.0 / np.sqrt(length)
    updates = [scale * (common + 0.5 * rng.normal(size=length)) for _ in range(7)] + [-9 * scale * common]
    data = [world.contribution(f"pos-{number}", update) for number, update in enumerate(updates)]
    networked = combine_openings(over_a_network(tmp_path, world, data), world.task)
    inside = local.aggregate(data, world.task, ca_pem=world.ca_pem, now=NOW)
    assert networked.mean is not None
    assert inside.mean is not None
    assert inside.mean.tobytes() == networked.mean.tobytes()
    assert inside.decision == networked.decision
    assert not inside.decision.devices[7].selected
    other = local.aggregate(data[:-1], world.task, ca_pem=world.ca_pem, now=NOW)
    assert other.decision != inside.decision


def test_too_few_are_not_opened_and_others_rounds_are_refused() -> None:
    local = LocalAggregators()
    world = SecureRound(length=16, aggregators=local.keys)
    data = [world.contribution(f"pos-{number}", np.full(16, 0.1)) for number in range(2)]
    assert local.aggregate(data, world.task, ca_pem=world.ca_pem, now=NOW).mean is None
    with pytest.raises(Malformed, match="other aggregators"):
        LocalAggregators().aggregate(data, world.task, ca_pem=world.ca_pem, now=NOW)
    with pytest.raises(Malformed, match="expected 3"):
        LocalAggregators(RNGS[:2])
