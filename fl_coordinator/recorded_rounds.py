"""Rounds in the ledger, as values: the ledger keeps them packed and does not look inside."""

from __future__ import annotations

from fl_coordinator.ledger import Ledger
from fl_coordinator.rounds import Round, State
from model_delta.encoding import pack, unpack


def every_round(ledger: Ledger) -> list[Round]:
    """All rounds, oldest first. Blocking."""
    return [unpack(packed, Round) for packed in ledger.rounds()]


def newest_round(ledger: Ledger, model: str) -> Round | None:
    """The round of `model` that was announced last. Blocking, and as quick after a thousand rounds as after one."""
    packed = ledger.newest_round(model)
    return unpack(packed, Round) if packed is not None else None


def recorded_round(ledger: Ledger, round_id: str) -> Round:
    """A round as it stands. Blocking. Raises NotFound."""
    return unpack(ledger.round(round_id), Round)


def save_round(ledger: Ledger, found: Round) -> None:
    """Write a round's state. Blocking. Raises Malformed when its base was given up before it was announced."""
    ledger.save_round(
        round_id=found.round_id,
        model=found.task.model,
        state=found.state,
        created=found.opened,
        record=pack(found),
        needs=(found.task.base,) if found.at is State.ANNOUNCED else (),
    )
