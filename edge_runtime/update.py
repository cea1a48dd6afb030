"""The life of one update, as a table.

A device is always in one `State`; something happens (`Event`); the table says the next state and what to do
(`Command`). The shell performs the command and feeds what came of it back as an event. A pair that is not in the table
is refused as a value, and the shell logs it. Each state has a row for `BOOTED`: what a power cut looks like afterwards.

    IDLE          runs the committed version, or the safe answer if there is none
    FETCHING      the running version answers while blobs arrive; what has arrived is on disk
    STAGED        the inactive slot is complete and checked; the pointer still names the old one
    ON_PROBATION  the pointer names the new slot; golden inputs, latency and errors are being judged
    RESTORING     the pointer goes back to the old slot
    SAFE          nothing newer can be trusted and nothing older works: the baseline answers

The same table drives hardware, the real fleet and, as arrays, the virtual one: no clock, no files, no network here.
Compatibility promise: values are stored on devices; they are never renamed.
"""

from __future__ import annotations

import enum

import msgspec


class State(enum.StrEnum):
    """Where the update stands; persisted by the holder before the command is performed."""

    IDLE = "idle"
    FETCHING = "fetching"
    STAGED = "staged"
    ON_PROBATION = "on_probation"
    RESTORING = "restoring"
    SAFE = "safe"


class Event(enum.StrEnum):
    """What just happened."""

    OFFERED = "offered"
    FETCHED = "fetched"
    REFUSED = "refused"
    WITHDRAWN = "withdrawn"
    SWITCHED = "switched"
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"
    RESTORED = "restored"
    RESTORE_FAILED = "restore_failed"
    BOOTED = "booted"


class Command(enum.StrEnum):
    """What to do next. Every one may be performed twice, because the power may go off in the middle."""

    RUN = "run"
    FETCH = "fetch"
    SWITCH = "switch"
    JUDGE = "judge"
    COMMIT = "commit"
    RESTORE = "restore"
    FALL_BACK = "fall_back"
    REPORT = "report"


class Transition(msgspec.Struct, frozen=True):
    """The next state and what to do in it."""

    state: State
    command: Command


class Refusal(msgspec.Struct, frozen=True):
    """A pair that the table does not list; the state stays."""

    reason: str


TABLE: dict[tuple[State, Event], Transition] = {
    (State.IDLE, Event.OFFERED): Transition(State.FETCHING, Command.FETCH),
    (State.IDLE, Event.BOOTED): Transition(State.IDLE, Command.RUN),
    (State.FETCHING, Event.FETCHED): Transition(State.STAGED, Command.SWITCH),
    (State.FETCHING, Event.REFUSED): Transition(State.IDLE, Command.REPORT),
    (State.FETCHING, Event.WITHDRAWN): Transition(State.IDLE, Command.REPORT),
    (State.FETCHING, Event.BOOTED): Transition(State.FETCHING, Command.FETCH),
    (State.STAGED, Event.SWITCHED): Transition(State.ON_PROBATION, Command.JUDGE),
    (State.STAGED, Event.WITHDRAWN): Transition(State.IDLE, Command.REPORT),
    (State.STAGED, Event.BOOTED): Transition(State.STAGED, Command.SWITCH),
    (State.ON_PROBATION, Event.HEALTHY): Transition(State.IDLE, Command.COMMIT),
    (State.ON_PROBATION, Event.UNHEALTHY): Transition(State.RESTORING, Command.RESTORE),
    (State.ON_PROBATION, Event.WITHDRAWN): Transition(State.RESTORING, Command.RESTORE),
    (State.ON_PROBATION, Event.BOOTED): Transition(State.ON_PROBATION, Command.JUDGE),
    (State.RESTORING, Event.RESTORED): Transition(State.IDLE, Command.REPORT),
    (State.RESTORING, Event.RESTORE_FAILED): Transition(State.SAFE, Command.FALL_BACK),
    (State.RESTORING, Event.BOOTED): Transition(State.RESTORING, Command.RESTORE),
    (State.SAFE, Event.OFFERED): Transition(State.FETCHING, Command.FETCH),
    (State.SAFE, Event.BOOTED): Transition(State.SAFE, Command.FALL_BACK),
}


def step(state: State, event: Event) -> Transition | Refusal:
    """The row for (`state`, `event`), or a Refusal that names both. Pure."""
    found = TABLE.get((state, event))
    if found is None:
        return Refusal(f"update: {event} does not happen in state {state}; the state stays {state}")
    return found
