"""The freeze, co-signed, and the coin that comes after it.

An aggregator's first words in an attempt are a statement that it signs: which announcement it was given, the Merkle
root of the contributions it counts, and a commitment to its part of the coin. Nobody opens a part before it holds the
statements of all three, over one announcement and one root. So whoever holds the three statements and the three parts
sees later, too, that the coin was not chosen with the contributions in sight, if one of the three was honest, and that
no two aggregators were told different rounds.

Compatibility: statements are kept in decisions, see `decision.Decision`; fields are only ever added.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

import msgspec

from model_delta.encoding import pack, unpack
from model_delta.errors import AtollError, Untrusted
from model_delta.task import RoundTask
from model_delta.trust.signing import key_id, load_public_key, open_envelope, verify

FROZEN_TYPE = "round-frozen"
FORMAT = 1


class Frozen(msgspec.Struct, frozen=True, kw_only=True):
    """What one aggregator signs before any coin is opened (an Envelope of type `round-frozen` by its Ed25519 key).
    `task` is the digest of the announcement's payload, `root` the Merkle root of `count` contributions, `commitment`
    SHA-256 over round, attempt, root, place and its part of the coin."""

    format: int = FORMAT
    tenant: str
    round_id: str
    attempt: int
    task: str
    root: str
    count: int
    index: int
    commitment: bytes


def statement(task: RoundTask, announced: str, attempt: int, root: str, count: int, index: int, part: bytes) -> Frozen:
    """What aggregator `index` is about to sign, with 32 random bytes as its part of the coin; `announced` is the digest
    of the announcement's payload as it was signed."""
    return Frozen(
        tenant=task.tenant,
        round_id=task.round_id,
        attempt=attempt,
        task=announced,
        root=root,
        count=count,
        index=index,
        commitment=commitment(task.round_id, attempt, root, index, part),
    )


def commitment(round_id: str, attempt: int, root: str, index: int, part: bytes) -> bytes:
    """SHA-256 of a part of the coin and of all that it is for."""
    return hashlib.sha256(pack(["atoll coin", round_id, attempt, root, index, part])).digest()


def joint_coin(round_id: str, attempt: int, root: str, parts: Sequence[bytes]) -> bytes:
    """The coin, 32 bytes: random if one of the parts is."""
    return hashlib.sha256(pack(["atoll joint coin", round_id, attempt, root, *parts])).digest()


def read_statement(sealed: bytes, task: RoundTask, index: int) -> Frozen:
    """The statement of aggregator `index`. Raises Untrusted, naming it, unless its key in `task` signed it."""
    entry = task.aggregators[index]
    try:
        key = load_public_key(entry.verifying)
        found = unpack(verify(open_envelope(sealed), FROZEN_TYPE, {key_id(key): key}), Frozen)
    except AtollError as error:
        raise Untrusted(f"{entry.name}: its signed freeze: {error}") from None
    if found.format > FORMAT:
        raise Untrusted(f"{entry.name}: its signed freeze: format {found.format}, this reader knows up to {FORMAT}")
    if found.index != index:
        raise Untrusted(f"{entry.name}: its signed freeze is of aggregator {found.index}, expected {index}")
    return found


def require_same_freeze(found: Frozen, own: Frozen, name: str) -> None:
    """Raise Untrusted, naming the aggregator, for another round, announcement or list than one's own."""
    for what, theirs, ours in (
        ("tenant", found.tenant, own.tenant),
        ("round", found.round_id, own.round_id),
        ("attempt", found.attempt, own.attempt),
        ("announcement", found.task, own.task),
        ("root", found.root, own.root),
        ("number of contributions", found.count, own.count),
    ):
        if theirs != ours:
            raise Untrusted(
                f"{name}: step 'hello': signed {what} {str(theirs)[:20]}, expected {str(ours)[:20]}; the coordinator "
                "told the aggregators different rounds, or it lies; nothing was opened"
            )


def require_opening(found: Frozen, part: bytes, name: str) -> None:
    """Raise Untrusted, naming the aggregator, for a part of the coin that is not the one it committed to."""
    expected = commitment(found.round_id, found.attempt, found.root, found.index, part)
    if not hmac.compare_digest(expected, found.commitment):
        raise Untrusted(f"{name}: step 'coin': does not open its commitment")
