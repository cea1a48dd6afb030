"""What the coordinator asks of an aggregator, and what an aggregator must find before it does anything about it.

A round's `StandingCommand` comes with its announcement; what it announces, the frozen list, is then a `RoundCommand`
that the aggregator asks for itself (`standing_by`). A `RoundCommand` may also come by itself.

Whoever sends a command, the round must be signed by the role `round`, name this aggregator with its keys, be announced
with numbers that cannot overflow, and be one that is still remembered.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from fl_coordinator.privacy import Spent
from fl_coordinator.rounds import ATTEMPTS_MAX
from fl_coordinator.shares.bounds import contributions_max, require_announceable
from model_delta.digest import require_digest
from model_delta.encoding import unpack
from model_delta.errors import DigestMismatch, Expired, Malformed, Untrusted
from model_delta.merkle import root as merkle_root
from model_delta.task import TASK_TYPE, AggregatorKey, RoundTask
from model_delta.trust.signing import open_envelope
from model_delta.trust.signing import verify as verify_envelope
from model_delta.trust.updater import TrustAnchors, role_keys

KEPT_S = 30 * 86_400
"""How long after its deadline a round is remembered; an older one is refused."""


WAITS_MAX_S = 3_600.0
"""How long after a round's deadline its frozen list is waited for at most, whatever the coordinator says: as long as an
attempt may take."""


class StandingCommand(msgspec.Struct, frozen=True, kw_only=True):
    """What the coordinator asks when it announces a round: to stand by for its frozen list. `task` is the packed signed
    announcement, `stands_s` how long the list may take to come. The answer is that of the attempt."""

    round_id: str
    task: bytes
    stands_s: float


class RoundCommand(msgspec.Struct, frozen=True, kw_only=True):
    """What the coordinator asks: `task` is the packed signed announcement, `contributions` the frozen digests in order,
    `root` the Merkle root over the digests' 32 raw bytes, `attempt` counts from 1 and never repeats. `deadline_s` is
    how long the attempt may take, because later nobody waits for it; 0: as long as its steps do. `spent` is the account
    of an opening with noise."""

    round_id: str
    attempt: int
    task: bytes
    contributions: tuple[str, ...]
    root: str
    deadline_s: float = 0.0
    spent: Spent | None = None


def stands_s(command: Mapping[str, Any]) -> float | None:
    """How long a command asks to stand by, in seconds, at most as long as that of any round; None for another one."""
    asked = command.get("stands_s")
    return min(max(0.0, float(asked)), KEPT_S + WAITS_MAX_S) if isinstance(asked, int | float) else None


def announced_round(
    envelope: bytes, round_id: str, anchors: TrustAnchors, key: AggregatorKey, now: float
) -> tuple[RoundTask, int]:
    """The round that a packed signed announcement is of, and the place of the aggregator with this `key` in it.

    `now` is Unix seconds. Raises Untrusted, SignatureInvalid, Malformed, and Expired for a round of long ago.
    """
    what = f"round {round_id!r}"
    keys, threshold = role_keys(anchors, "round")
    task = unpack(verify_envelope(open_envelope(envelope), TASK_TYPE, keys, threshold), RoundTask)
    if task.tenant != anchors.tenant or task.round_id != round_id:
        raise Untrusted(f"{what}: the signed announcement is of {task.tenant!r}, round {task.round_id!r}")
    require_announceable(task)
    if now > task.deadline + KEPT_S:
        raise Expired(f"{what}: closed more than {KEPT_S // 86_400} days ago; it is no longer remembered")
    if key not in task.aggregators:
        raise Untrusted(f"{what}: was announced without {key.name}, or with other keys of it")
    return task, task.aggregators.index(key)


def accepted(command: RoundCommand, anchors: TrustAnchors, key: AggregatorKey, now: float) -> tuple[RoundTask, int]:
    """The round of a command, and the place of the aggregator with this `key` in it; arguments and errors as for
    `announced_round`, and DigestMismatch for a frozen list that does not have its root."""
    what = f"round {command.round_id!r}"
    task, index = announced_round(command.task, command.round_id, anchors, key, now)
    if not 1 <= command.attempt <= ATTEMPTS_MAX or not 1 <= len(command.contributions) <= contributions_max(task):
        raise Malformed(
            f"{what}: expected attempt 1 to {ATTEMPTS_MAX} and 1 to {contributions_max(task)} contributions, found "
            f"attempt {command.attempt} and {len(command.contributions)}"
        )
    leaves = [bytes.fromhex(require_digest(digest, f"{what}: contribution")) for digest in command.contributions]
    found = merkle_root(leaves)
    if found != command.root:
        raise DigestMismatch(f"{what}: expected a frozen list with root {command.root[:16]}…, found {found[:16]}…")
    return task, index
