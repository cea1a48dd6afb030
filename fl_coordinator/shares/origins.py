"""Do both holders of a share hold the same? The three compare what each share follows from, and say what they refuse.

A share follows from a secret and the signed ciphertext, so that equal origins are equal shares; what is compared are
hashes under keys that only the two holders of a share have.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

import msgspec

from fl_coordinator.shares.contribution import Holding
from fl_coordinator.shares.sharing import PARTIES, Session
from fl_coordinator.shares.streams import Rows
from model_delta.errors import Untrusted

_TAG_BYTES = 32
_REASON_MAX = 300


class Compared(msgspec.Struct, frozen=True):
    """One party's complaints, by place in the frozen list, and a hash of each origin of its first and second share."""

    refusals: tuple[tuple[int, str], ...]
    first: bytes
    second: bytes


def compared(session: Session, holding: Holding) -> Compared:
    """What this party says of the contributions that it holds."""
    return Compared(
        tuple((index, reason[:_REASON_MAX]) for index, reason in sorted(holding.refusals.items())),
        _tags(session, session.preceding, session.index, holding, holding.first),
        _tags(session, session.following, session.following, holding, holding.second),
    )


def _tags(session: Session, holder: int, share: int, holding: Holding, rows: Rows) -> bytes:
    """A keyed hash (BLAKE2b, RFC 7693) of each row's origin, which only `holder` can recompute; zeros if refused.

    Rows are equal where their origins are: hashing the rows themselves would cost more than all the rest.
    """
    key = session.key(holder, f"tags-{share}")
    tags = []
    for index in range(len(holding.digests)):
        if index in holding.refusals:
            tags.append(bytes(_TAG_BYTES))
            continue
        named = index.to_bytes(8, "little") + rows.origin(index)
        tags.append(hashlib.blake2b(named, key=key, digest_size=_TAG_BYTES).digest())
    return b"".join(tags)


def refused_after(session: Session, compares: Sequence[Compared], count: int) -> dict[int, str]:
    """Which of `count` contributions are refused and why, from everybody's complaints, in party order, and the hashes
    that differ. Raises Untrusted for what no honest party says, by name."""
    complaints: dict[int, dict[str, list[str]]] = {}
    for name, compare in zip(session.names, compares, strict=True):
        if len(compare.first) != _TAG_BYTES * count or len(compare.second) != _TAG_BYTES * count:
            raise Untrusted(f"{name}: step 'compare': expected {count} hashes twice, found another number")
        for index, reason in compare.refusals:
            if not 0 <= index < count:
                raise Untrusted(f"{name}: step 'compare': no contribution {index} among {count}")
            complaints.setdefault(index, {}).setdefault(reason[:_REASON_MAX], []).append(name)
    refused = {
        index: "; ".join(
            reason if len(names) == PARTIES else f"{' and '.join(names)}: {reason}"
            for reason, names in sorted(reasons.items())
        )
        for index, reasons in complaints.items()
    }
    for index in range(count):
        if index in refused:
            continue
        part = slice(index * _TAG_BYTES, (index + 1) * _TAG_BYTES)
        for share in range(PARTIES):
            if not hmac.compare_digest(compares[share].first[part], compares[share - 1].second[part]):
                pair = f"{session.names[share]} and {session.names[share - 1]}"
                refused[index] = f"inconsistent shares: {pair} were sealed different values of share {share}"
                break
    return refused
