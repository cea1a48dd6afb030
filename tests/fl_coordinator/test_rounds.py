import math

import pytest

from fl_coordinator.rounds import ENDED, TABLE, Command, Event, Privacy, Quota, RoundSpec, State, step
from model_delta.errors import Malformed


def test_a_round_that_goes_well() -> None:
    state, seen = State.ANNOUNCED, []
    for event in (Event.HEARD, Event.COLLECTED, Event.BEGUN, Event.OPENED, Event.PASSED, Event.RELEASED):
        state, command = step(state, event)
        seen.append(command)
    assert state is State.PUBLISHED
    assert seen == [
        Command.COLLECT,
        Command.FREEZE,
        Command.AGGREGATE,
        Command.JUDGE,
        Command.PUBLISH,
        Command.REST,
    ]


@pytest.mark.parametrize("state", list(State))
def test_every_state_has_a_row_for_a_crash_and_stays_where_it_was(state: State) -> None:
    after, command = step(state, Event.BOOTED)
    assert after is state
    assert (command is Command.REST) == (state in ENDED)


@pytest.mark.parametrize("state", [state for state in State if state not in ENDED])
def test_every_live_state_can_be_aborted_and_can_break(state: State) -> None:
    assert step(state, Event.ABORTED) == (State.FAILED, Command.REST)
    assert step(state, Event.BROKEN) == (State.FAILED, Command.REST)


def test_what_has_ended_stays_ended() -> None:
    for (before, event), (after, _) in TABLE.items():
        assert before not in ENDED or (event is Event.BOOTED and after is before)


def test_a_frozen_round_never_collects_again() -> None:
    later = {State.FROZEN, State.AGGREGATING, State.OPENED, State.APPLIED}
    for (before, _), (after, _) in TABLE.items():
        assert before not in later or after not in (State.ANNOUNCED, State.COLLECTING)


def test_an_attempt_that_failed_is_repeated_on_the_same_set() -> None:
    assert step(State.AGGREGATING, Event.ATTEMPT_FAILED) == (State.AGGREGATING, Command.AGGREGATE)
    assert step(State.AGGREGATING, Event.EXHAUSTED) == (State.FAILED, Command.REST)


def test_a_pair_that_is_not_listed_is_refused() -> None:
    with pytest.raises(Malformed, match="OPENED cannot happen in state COLLECTING"):
        step(State.COLLECTING, Event.OPENED)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quorum": 7}, "quorum: expected at least 8"),
        ({"quorum": 15, "hostile_max": 5}, "quorum: expected at least 16 .policy robust leaves out 8 of them"),
        ({"quorum": 12, "hostile_max": 5, "policy": "krum"}, "at least 13 .policy krum leaves out 5 of them"),
        ({"quorum": 14, "hostile_max": 6, "selected_min": 2, "policy": "krum"}, "at least 15 .*2 x hostile_max"),
        ({"contributions_max": 4}, "contributions_max: expected at least the quorum"),
        ({"steps": 0}, "steps: expected 1 to 100000, found 0"),
        ({"clip_norm_l2": float("nan")}, "clip_norm_l2"),
        ({"deadline_s": float("inf")}, "deadline_s"),
        ({"policy": "mean"}, "policy: expected .* found 'mean'"),
        ({"reveal": "everything"}, "reveal: expected .* found 'everything'"),
        ({"eps_l2": 1.0}, "eps_l2: expected `reveal: graph`"),
        ({"privacy": Privacy(epsilon=math.inf, delta=1e-5, noise_multiplier=1)}, "privacy: expected a budget"),
        ({"privacy": Privacy(epsilon=0, delta=1e-5, noise_multiplier=1)}, "privacy: expected a budget"),
        (
            {"privacy": Privacy(epsilon=1, epsilon_device=-1, delta=1e-5, noise_multiplier=1)},
            "privacy: expected a budget",
        ),
        ({"privacy": Privacy(epsilon=1, delta=1, noise_multiplier=1)}, "privacy: expected a delta"),
        ({"privacy": Privacy(epsilon=1, delta=1e-5, noise_multiplier=0)}, "privacy: expected a noise_multiplier"),
        ({"quota": Quota(per_group=-1)}, "quota: expected numbers from 0"),
        ({"quota": Quota(group="")}, "quota: expected numbers from 0"),
    ],
)
def test_a_spec_that_cannot_work_is_refused_with_the_number(changes: dict[str, object], words: str) -> None:
    with pytest.raises(Malformed, match=words):
        RoundSpec(model="fraud", **changes).checked()  # type: ignore[arg-type]


def test_the_fewest_to_be_opened_grows_with_the_hostile() -> None:
    assert RoundSpec(model="fraud", quorum=52, hostile_max=20).checked().selected_min == 22
