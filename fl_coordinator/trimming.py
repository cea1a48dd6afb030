"""What stays in the ledger of a round that has ended: its transcript without the shares, and that something was opened.

A result is written once, in the ledger, with all that a coordinator which dies needs to go on: the mean update, and the
transcript with the three shares of the sum, each as long as the model. Once the round has ended its candidate is a
release, or none, and the store holds the whole transcript. Later rounds need of it who was measured and chosen (the
memory that a policy goes on with, and its proof), and the accounts of privacy that a sum was opened: neither needs a
share. So those go from the ledger, whose room is used again; the store keeps the whole transcript for as long as
`retention.Terms` say.
"""

from __future__ import annotations

import msgspec

from fl_coordinator.ledger import Ledger
from fl_coordinator.recorded_rounds import recorded_round
from fl_coordinator.retention import TRANSCRIPT
from fl_coordinator.transcript import Transcript, pack_transcript
from model_delta.digest import digest_of
from model_delta.encoding import unpack
from model_delta.store import ArtifactStore


def trim_results(ledger: Ledger, store: ArtifactStore) -> int:
    """Take the means and shares of ended rounds out of the ledger; of how many. Blocking. Raises StorageFull.

    A round whose record does not name its transcript is older than the store's copies: it keeps all it has.
    """
    trimmed = 0
    for round_id in ledger.whole_results():
        name, result = recorded_round(ledger, round_id).transcript, ledger.round_result(round_id)
        if result is None or not name or digest_of(result[1]) != name:
            continue
        if not store.has(TRANSCRIPT, name):
            store.put(TRANSCRIPT, name, result[1])
        whole = unpack(result[1], Transcript)
        ledger.trim_round_result(round_id, pack_transcript(msgspec.structs.replace(whole, shares=(b"",) * 3)))
        trimmed += 1
    return trimmed


def whole_transcript(ledger: Ledger, store: ArtifactStore, round_id: str) -> bytes | None:
    """The packed transcript of a decided round with its shares; None when it is not kept any more. Blocking. Raises
    NotFound for a round that is none."""
    result, name = ledger.round_result(round_id), recorded_round(ledger, round_id).transcript
    if result is None or not name or digest_of(result[1]) == name:
        return None if result is None else result[1]
    return store.get(TRANSCRIPT, name) if store.has(TRANSCRIPT, name) else None
