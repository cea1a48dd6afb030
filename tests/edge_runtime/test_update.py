"""The update table: transcripts of whole lives, power cuts included, and the refusal of everything else."""

from __future__ import annotations

import itertools

import pytest

from edge_runtime.update import TABLE, Command, Event, Refusal, State, Transition, step

ADOPTED = "offered fetch, fetched switch, switched judge, healthy commit"
ROWS_IN_THE_SPECIFICATION = 18


def live(start: State, script: str) -> State:
    """Play `event command, event command, ...` and return the last state; each command must be the table's."""
    state = start
    for line in script.split(", "):
        event, command = line.split()
        found = step(state, Event(event))
        assert isinstance(found, Transition), f"{state} {event} was refused"
        assert found.command == Command(command), f"{state} {event}: {found.command}"
        state = found.state
    return state


@pytest.mark.parametrize(
    ("start", "script", "end"),
    [
        (State.IDLE, ADOPTED, State.IDLE),
        (State.SAFE, ADOPTED, State.IDLE),
        (State.IDLE, "offered fetch, refused report", State.IDLE),
        (State.IDLE, "offered fetch, withdrawn report", State.IDLE),
        (State.IDLE, "offered fetch, fetched switch, withdrawn report", State.IDLE),
        (State.IDLE, "offered fetch, fetched switch, switched judge, unhealthy restore, restored report", State.IDLE),
        (State.IDLE, "offered fetch, fetched switch, switched judge, withdrawn restore, restored report", State.IDLE),
        (State.ON_PROBATION, "unhealthy restore, restore_failed fall_back, booted fall_back", State.SAFE),
    ],
)
def test_whole_lives(start: State, script: str, end: State) -> None:
    assert live(start, script) is end


def test_power_cuts_everywhere_still_end_in_adoption() -> None:
    """The power goes off one to three times in every state; the life goes on where it stood."""
    for cuts in range(4):
        script: list[str] = []
        for line in ADOPTED.split(", "):
            state = live(State.IDLE, ", ".join(script)) if script else State.IDLE
            again = {State.IDLE: "run", State.FETCHING: "fetch", State.STAGED: "switch", State.ON_PROBATION: "judge"}
            script += [f"booted {again[state]}"] * cuts + [line]
        assert live(State.IDLE, ", ".join(script)) is State.IDLE


def test_a_power_cut_never_changes_the_state() -> None:
    for state in State:
        found = step(state, Event.BOOTED)
        assert isinstance(found, Transition)
        assert found.state is state


def test_every_other_pair_is_refused_and_named() -> None:
    assert len(TABLE) == ROWS_IN_THE_SPECIFICATION
    for state, event in itertools.product(State, Event):
        found = step(state, event)
        if (state, event) in TABLE:
            assert isinstance(found, Transition)
        else:
            assert isinstance(found, Refusal)
            assert state in found.reason
            assert event in found.reason


def test_every_state_is_reachable_and_none_is_a_trap() -> None:
    def reachable(start: State) -> set[State]:
        seen, edge = {start}, [start]
        while edge:
            state = edge.pop()
            for (source, _), transition in TABLE.items():
                if source is state and transition.state not in seen:
                    seen.add(transition.state)
                    edge.append(transition.state)
        return seen

    assert reachable(State.IDLE) == set(State)
    assert all(State.IDLE in reachable(state) for state in State)
