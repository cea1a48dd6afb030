"""What is left of a round for whoever doubts it: the transcript.

    announcement   the task as it was announced, signed by the role `round`
    openings       one from each aggregator, signed: the frozen list; what the three signed before the coin, their parts
                   of it and the coin; validity of each contribution, Gram matrix, weights and verdicts; the memory that
                   the policy leaves; and the digests of its two shares of the weighted sum
    shares         the three shares of that sum, each once; together they are the sum, alone they are random
    settlement     signed by the role `round`: the mean's digest, what was spent of a privacy budget, and the epsilons

`replay` checks all of it without any of the programs that ran.

Compatibility promise: see `model_delta.encoding`; packed transcripts are kept in the store, in files and, without the
shares once the round has ended (`trimming`), in the ledger.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from fl_coordinator.aggregation import Opening
from fl_coordinator.privacy import Spend
from fl_coordinator.shares.decision import Decision, read_decision
from fl_coordinator.shares.sharing import PARTIES
from model_delta.digest import digest_of
from model_delta.encoding import pack, unpack
from model_delta.errors import Malformed
from model_delta.trust.signing import open_envelope

SETTLEMENT_TYPE = "round-settlement"
FORMAT = 1
BYTES_MAX = 2 << 30


class Settlement(msgspec.Struct, frozen=True, kw_only=True):
    """What the coordinator vouches for beside the aggregators: `mean` is the digest of the mean update, float32[d]
    little endian ("" when nothing was opened). With privacy: this opening's `spend`, all openings before it that the
    model's releases descend from, those of the most burdened device in it, and the epsilons at `delta` after it."""

    tenant: str
    model: str
    round_id: str
    root: str
    mean: str
    spend: Spend | None = None
    before_release: tuple[Spend, ...] = ()
    before_device: tuple[Spend, ...] = ()
    delta: float = 0.0
    epsilon_release: float = 0.0
    epsilon_device: float = 0.0


class Transcript(msgspec.Struct, frozen=True, kw_only=True):
    """See the module. `openings` in the order of the task's aggregators; `shares` are empty when nothing was opened."""

    format: int = FORMAT
    announcement: bytes
    openings: tuple[bytes, ...]
    shares: tuple[bytes, ...]
    settlement: bytes


def transcript_of(announcement: bytes, replies: Sequence[dict[str, Any]], settlement: bytes) -> Transcript:
    """The transcript of a round from its aggregators' replies, in the order of the task."""
    return Transcript(
        announcement=announcement,
        openings=tuple(bytes(reply["opening"]) for reply in replies),
        shares=tuple(bytes(reply["first"]) for reply in replies),
        settlement=settlement,
    )


def decision_in(data: bytes) -> Decision:
    """The decision in a packed transcript that is our own; nothing is verified. Raises Malformed."""
    return decision_of(unpack(data, Transcript))


def mean_digest(mean: NDArray[np.float32] | None) -> str:
    """How a settlement names a mean update; "" for none."""
    return "" if mean is None else digest_of(mean.astype("<f4").tobytes())


def read_transcript(data: bytes) -> Transcript:
    """A transcript of a format and shape that this program knows; nothing in it is verified. Raises Malformed."""
    if len(data) > BYTES_MAX:
        raise Malformed(f"transcript: expected at most {BYTES_MAX} bytes, found {len(data)}")
    transcript = unpack(data, Transcript)
    if transcript.format != FORMAT:
        raise Malformed(f"transcript: format {transcript.format}, this reader knows {FORMAT}")
    if len(transcript.openings) != PARTIES or len(transcript.shares) != PARTIES:
        raise Malformed(
            f"transcript: expected {PARTIES} openings and shares, found {len(transcript.openings)} and "
            f"{len(transcript.shares)}"
        )
    return transcript


def decision_of(transcript: Transcript) -> Decision:
    """The decision in the first opening; nothing is verified. Raises Malformed."""
    opening = unpack(open_envelope(transcript.openings[0]).payload, Opening)
    return read_decision(opening.decision)


def pack_transcript(transcript: Transcript) -> bytes:
    """As it is kept and exported."""
    return pack(transcript)
