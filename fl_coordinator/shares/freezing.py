"""The freeze, co-signed, and the coin that comes after it.

An aggregator's first words in an attempt are a statement that it signs: which announcement it was given, the Merkle
root of the contributions it counts, and a commitment to its part of the coin. Nobody opens a part before it holds the
statements of all three, over one announcement and one root. So whoever holds the three statements and the three parts
sees later, too, that the coin was not chosen with the contributions in sight, if one of the three was honest, and that
no two aggregators were told different rounds.

A list has one coin, however many attempts there are. An aggregator's part follows from a secret of its own, the round
and the root, and it remembers what the others committed to before it opens its own. With a coin for each attempt, who
makes attempts fail after the distances were opened would see every update through one more sketch, and could average.

Compatibility: statements are kept in decisions, see `decision.Decision`; fields are only ever added.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

import msgspec
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from model_delta.encoding import pack, unpack
from model_delta.errors import AtollError, Untrusted
from model_delta.task import RoundTask
from model_delta.trust.signing import key_id, load_public_key, open_envelope, verify

FROZEN_TYPE = "round-frozen"
FORMAT = 3
"""Before format 2 there was a coin for each attempt, before format 3 the parties did not check each other's products:
those who sign different formats do not take the same steps."""


class Frozen(msgspec.Struct, frozen=True, kw_only=True):
    """What one aggregator signs before any coin is opened (an Envelope of type `round-frozen` by its Ed25519 key).
    `task` is the digest of the announcement's payload, `root` the Merkle root of `count` contributions, `commitment`
    SHA-256 over round, root, place and its part of the coin (in format 1 over the attempt too)."""

    format: int = FORMAT
    tenant: str
    round_id: str
    attempt: int
    task: str
    root: str
    count: int
    index: int
    commitment: bytes

    @property
    def toss(self) -> int:
        """Which attempt its coin is of; 0: of all."""
        return self.attempt if self.format == 1 else 0


def coin_part(own_secret: bytes, task: RoundTask, root: str) -> bytes:
    """An aggregator's part of the coin, 32 bytes, from a secret that nobody else knows."""
    info = pack(["atoll coin part", task.tenant, task.round_id, root])
    return HKDF(hashes.SHA256(), 32, None, info).derive(own_secret)


def statement(task: RoundTask, announced: str, attempt: int, root: str, count: int, index: int, part: bytes) -> Frozen:
    """What aggregator `index` is about to sign; `part` is its part of the coin, `announced` the digest of the
    announcement's payload as it was signed."""
    return Frozen(
        tenant=task.tenant,
        round_id=task.round_id,
        attempt=attempt,
        task=announced,
        root=root,
        count=count,
        index=index,
        commitment=commitment(task.round_id, root, index, part),
    )


def commitment(round_id: str, root: str, index: int, part: bytes, toss: int = 0) -> bytes:
    """SHA-256 of a part of the coin and of all that it is for; `toss`: see `Frozen.toss`."""
    return hashlib.sha256(pack(["atoll coin", round_id, toss, root, index, part])).digest()


def joint_coin(round_id: str, root: str, parts: Sequence[bytes], toss: int = 0) -> bytes:
    """The coin, 32 bytes: random if one of the parts is."""
    return hashlib.sha256(pack(["atoll joint coin", round_id, toss, root, *parts])).digest()


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
        ("format", found.format, own.format),
        ("announcement", found.task, own.task),
        ("root", found.root, own.root),
        ("number of contributions", found.count, own.count),
    ):
        if theirs != ours:
            raise Untrusted(
                f"{name}: step 'hello': signed {what} {str(theirs)[:20]}, expected {str(ours)[:20]}; the coordinator "
                "told the aggregators different rounds, or it lies; nothing was opened"
            )


def require_one_coin(found: Sequence[Frozen], before: Sequence[bytes], names: Sequence[str]) -> tuple[bytes, ...]:
    """What all committed to. Raises Untrusted, with names, for other commitments than `before`, in an earlier attempt
    on the same list (none: there was none)."""
    now = tuple(said.commitment for said in found)
    odd = [name for name, one, other in zip(names, now, before, strict=False) if one != other]
    if odd:
        raise Untrusted(
            f"{' and '.join(odd)}: step 'coin': committed to another part of the coin than in an earlier attempt; a "
            "frozen list has one coin"
        )
    return now


def require_opening(found: Frozen, part: bytes, name: str) -> None:
    """Raise Untrusted, naming the aggregator, for a part of the coin that is not the one it committed to."""
    expected = commitment(found.round_id, found.root, found.index, part, found.toss)
    if not hmac.compare_digest(expected, found.commitment):
        raise Untrusted(f"{name}: step 'coin': does not open its commitment")
