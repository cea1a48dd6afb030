"""One federated round's life as a table.

    ANNOUNCED    the task is signed and durable; publish it
    COLLECTING   contributions come in until the deadline, or until all that are wanted are there
    FROZEN       the ordered list of contributions and its Merkle root are fixed; nothing is added any more
    AGGREGATING  an attempt is running at the three aggregators, always on the same frozen list
    OPENED       the mean update of the chosen devices and the signed transcript are durable
    APPLIED      the candidate passed the gates, or not
    PUBLISHED    the candidate is a release
    REFUSED      the candidate did not pass a gate
    FAILED       no quorum, aggregation failed in every attempt, or an operator stopped it

A pair that is not listed is refused. Every state has a row for BOOTED, which is what a crash of the coordinator looks
like afterwards: the state's command is done again, so each command is idempotent.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from fl_coordinator.promotion import Limits
from fl_coordinator.rules import reveals
from model_delta.errors import Malformed
from model_delta.task import RoundTask

ATTEMPTS_MAX = 3
"""An attempt ends after `aggregation_s` at the latest, and a pause of as many seconds as its number follows: a round is
aggregated or failed within 3 * aggregation_s + 6 s (186 s by default), whoever dies. One aggregator's death is noticed
earlier: by its peers within a step's patience (10 s) and two farewells (4 s), by the ServerApp 3 s later, so that the
next attempt begins after 18 s at most; after 20 s if it died while it stood by, or 26 s where the round was hardly
announced by then (`standing`)."""


class State(enum.Enum):
    """Where a round is."""

    ANNOUNCED = "ANNOUNCED"
    COLLECTING = "COLLECTING"
    FROZEN = "FROZEN"
    AGGREGATING = "AGGREGATING"
    OPENED = "OPENED"
    APPLIED = "APPLIED"
    PUBLISHED = "PUBLISHED"
    REFUSED = "REFUSED"
    FAILED = "FAILED"


class Event(enum.Enum):
    """What just happened."""

    BOOTED = "BOOTED"
    HEARD = "HEARD"
    COLLECTED = "COLLECTED"
    TOO_FEW = "TOO_FEW"
    BEGUN = "BEGUN"
    OPENED = "OPENED"
    ATTEMPT_FAILED = "ATTEMPT_FAILED"
    EXHAUSTED = "EXHAUSTED"
    PASSED = "PASSED"
    GATE_CLOSED = "GATE_CLOSED"
    RELEASED = "RELEASED"
    BROKEN = "BROKEN"
    ABORTED = "ABORTED"


class Command(enum.Enum):
    """What to do next."""

    ANNOUNCE = "announce"
    COLLECT = "collect"
    FREEZE = "freeze"
    AGGREGATE = "aggregate"
    JUDGE = "judge"
    PUBLISH = "publish"
    REST = "rest"


TABLE: Mapping[tuple[State, Event], tuple[State, Command]] = {
    (State.ANNOUNCED, Event.HEARD): (State.COLLECTING, Command.COLLECT),
    (State.ANNOUNCED, Event.BOOTED): (State.ANNOUNCED, Command.ANNOUNCE),
    (State.ANNOUNCED, Event.TOO_FEW): (State.FAILED, Command.REST),
    (State.ANNOUNCED, Event.BROKEN): (State.FAILED, Command.REST),
    (State.ANNOUNCED, Event.ABORTED): (State.FAILED, Command.REST),
    (State.COLLECTING, Event.COLLECTED): (State.FROZEN, Command.FREEZE),
    (State.COLLECTING, Event.TOO_FEW): (State.FAILED, Command.REST),
    (State.COLLECTING, Event.BOOTED): (State.COLLECTING, Command.COLLECT),
    (State.COLLECTING, Event.BROKEN): (State.FAILED, Command.REST),
    (State.COLLECTING, Event.ABORTED): (State.FAILED, Command.REST),
    (State.FROZEN, Event.BEGUN): (State.AGGREGATING, Command.AGGREGATE),
    (State.FROZEN, Event.BOOTED): (State.FROZEN, Command.FREEZE),
    (State.FROZEN, Event.BROKEN): (State.FAILED, Command.REST),
    (State.FROZEN, Event.ABORTED): (State.FAILED, Command.REST),
    (State.AGGREGATING, Event.OPENED): (State.OPENED, Command.JUDGE),
    (State.AGGREGATING, Event.ATTEMPT_FAILED): (State.AGGREGATING, Command.AGGREGATE),
    (State.AGGREGATING, Event.EXHAUSTED): (State.FAILED, Command.REST),
    (State.AGGREGATING, Event.BOOTED): (State.AGGREGATING, Command.AGGREGATE),
    (State.AGGREGATING, Event.BROKEN): (State.FAILED, Command.REST),
    (State.AGGREGATING, Event.ABORTED): (State.FAILED, Command.REST),
    (State.OPENED, Event.PASSED): (State.APPLIED, Command.PUBLISH),
    (State.OPENED, Event.GATE_CLOSED): (State.REFUSED, Command.REST),
    (State.OPENED, Event.BOOTED): (State.OPENED, Command.JUDGE),
    (State.OPENED, Event.BROKEN): (State.FAILED, Command.REST),
    (State.OPENED, Event.ABORTED): (State.FAILED, Command.REST),
    (State.APPLIED, Event.RELEASED): (State.PUBLISHED, Command.REST),
    (State.APPLIED, Event.BOOTED): (State.APPLIED, Command.PUBLISH),
    (State.APPLIED, Event.BROKEN): (State.FAILED, Command.REST),
    (State.APPLIED, Event.ABORTED): (State.FAILED, Command.REST),
    (State.PUBLISHED, Event.BOOTED): (State.PUBLISHED, Command.REST),
    (State.REFUSED, Event.BOOTED): (State.REFUSED, Command.REST),
    (State.FAILED, Event.BOOTED): (State.FAILED, Command.REST),
}

ENDED = frozenset({State.PUBLISHED, State.REFUSED, State.FAILED})


def step(state: State, event: Event) -> tuple[State, Command]:
    """The next state and what to do there. Raises Malformed for a pair that cannot happen."""
    try:
        return TABLE[state, event]
    except KeyError:
        raise Malformed(f"round: {event.name} cannot happen in state {state.name}") from None


REVEALS = tuple(reveals.POLICIES)
POLICIES = tuple(dict.fromkeys(policy for known in reveals.POLICIES.values() for policy in known))
DEVICE_CLASS = "device_class"
"""The trait that makes attestation groups unless a spec names a label of the enrolment."""


class Privacy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A round that opens with noise, within a budget: `epsilon` at `delta` for the model's releases, `epsilon_device`
    (0: as much) for each device. `noise_multiplier`: standard deviation over the clip norm; see `privacy`."""

    epsilon: float
    delta: float
    noise_multiplier: float
    epsilon_device: float = 0.0


class Quota(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many contributions are taken; 0 is no bound. `per_device`: rounds of one device within a day; `per_group`:
    contributions to this round from one attestation group, which is everybody who was enrolled with the same value of
    `group`: a label such as the issuing batch, or the device class."""

    per_device: int = 0
    per_group: int = 0
    group: str = DEVICE_CLASS


class RoundSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an operator asks for. `base` is a manifest digest, by default the stable version. The round closes after
    `deadline_s` seconds, or as soon as `contributions_max` devices are in (by default all enrolled devices that run the
    base); with fewer than `quorum` it fails. Asked twice under the same `name` it is one round, so that a request whose
    answer was lost can be repeated.

    `policy` decides who is chosen, `reveal` what is opened for that, and, where that is a graph, `eps_l2` how far apart
    two updates may be that count as close (0: found on shares, from the distances of the round). `gates` replaces the
    coordinator's own limits. `graph` is a training graph of the operator's own as base64, for a model of another
    layout than ours; the spec that is kept has none. With `autopilot` a published candidate starts its canary by
    itself: by the YAML `rollout`, or the model's last."""

    model: str
    name: str = ""
    base: str = ""
    quorum: int = 8
    contributions_max: int = 0
    deadline_s: float = 60.0
    aggregation_s: float = 60.0
    steps: int = 40
    batch_size: int = 64
    learning_rate: float = 0.05
    momentum: float = 0.9
    clip_norm_l2: float = 4.0
    hostile_max: int = 0
    selected_min: int = 0
    positive_weight: float = 6.0
    graph: str = ""
    policy: str = "robust"
    reveal: str = "distances"
    eps_l2: float = 0.0
    privacy: Privacy | None = None
    gates: Limits | None = None
    quota: Quota = Quota()
    autopilot: bool = False
    rollout: str = ""

    def checked(self) -> RoundSpec:
        """The same spec with `selected_min` filled in. Raises Malformed for numbers out of range."""
        problem = self.problem()
        if problem is not None:
            raise Malformed(f"round: {problem[0]}: {problem[1]}")
        return msgspec.structs.replace(self, selected_min=self._selected_min)

    @property
    def _selected_min(self) -> int:
        return self.selected_min or max(8, self.hostile_max + 2)

    def problem(self) -> tuple[str, str] | None:
        """The first field that cannot work, and why; None when all can."""
        bounds: dict[str, tuple[float, float]] = {
            "quorum": (2, 100_000),
            "contributions_max": (0, 100_000),
            "deadline_s": (1, 30 * 86_400),
            "aggregation_s": (1, 3600),
            "steps": (1, 100_000),
            "batch_size": (1, 100_000),
            "learning_rate": (1e-9, 100),
            "momentum": (0, 0.999),
            "clip_norm_l2": (1e-6, 1e6),
            "hostile_max": (0, 10_000),
            "positive_weight": (1e-3, 1e6),
        }
        for name, (low, high) in bounds.items():
            if not low <= getattr(self, name) <= high:
                return name, f"expected {low:g} to {high:g}, found {getattr(self, name)}"
        # Multi-Krum needs n >= 2f + 3 updates (Blanchard et al., 2017), and an opened sum enough senders to hide in,
        # after Multi-Krum has left out f, `robust` the 1.5 f most conspicuous, and `history` maybe as many.
        dropped = -(-3 * self.hostile_max // 2) if self.policy in ("robust", "history") else self.hostile_max
        least = max(self._selected_min + dropped, 2 * self.hostile_max + 3)
        if self.quorum < least:
            return "quorum", (
                f"expected at least {least} (policy {self.policy} leaves out {dropped} of them, selected_min "
                f"{self._selected_min}, 2 x hostile_max + 3), found {self.quorum}; raise quorum or lower hostile_max"
            )
        if 0 < self.contributions_max < self.quorum:
            return "contributions_max", f"expected at least the quorum {self.quorum}, found {self.contributions_max}"
        return self._problem_of_reveal() or self._problem_of_privacy() or self._problem_of_quota()

    def _problem_of_reveal(self) -> tuple[str, str] | None:
        problem = reveals.problem(self.reveal, self.policy)
        if problem is not None:
            return problem
        if self.reveal == reveals.SELECTION and max(self.quorum, self.contributions_max) > reveals.SELECTION_MAX:
            field = "quorum" if self.quorum > reveals.SELECTION_MAX else "contributions_max"
            found = getattr(self, field)
            return field, f"expected at most {reveals.SELECTION_MAX} with `reveal: {reveals.SELECTION}`, found {found}"
        if self.eps_l2 and self.reveal != reveals.GRAPH:
            return "eps_l2", f"expected `reveal: {reveals.GRAPH}` with it, found {self.reveal}"
        if self.eps_l2 and not 0 < self.eps_l2 < 2 * self.clip_norm_l2:
            return "eps_l2", f"expected less than twice the clip norm {self.clip_norm_l2:g}, found {self.eps_l2:g}"
        return None

    def _problem_of_privacy(self) -> tuple[str, str] | None:
        wanted = self.privacy
        if wanted is None:
            return None
        if not (0 < wanted.epsilon < math.inf and 0 <= wanted.epsilon_device < math.inf):
            return "privacy", f"expected a budget above 0, found epsilon {wanted.epsilon}, {wanted.epsilon_device}"
        if not 0 < wanted.delta < 1:
            return "privacy", f"expected a delta between 0 and 1, found {wanted.delta}"
        if not 0 < wanted.noise_multiplier <= 10_000:
            return "privacy", f"expected a noise_multiplier above 0, up to 10000, found {wanted.noise_multiplier}"
        return None

    def _problem_of_quota(self) -> tuple[str, str] | None:
        quota = self.quota
        if min(quota.per_device, quota.per_group) < 0 or not 0 < len(quota.group) <= 64:
            return "quota", f"expected numbers from 0 and a group of 1 to 64 letters, found {quota}"
        return None


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """One round as it stands. `announcement` is the signed task. `frozen` holds contribution digests in the order of
    the log. `attempt` counts aggregations from 1. `chosen` and `rejected` name devices. `seconds` says how long each
    phase took; `figures` what was measured. `transcript` is its digest, once the aggregators have decided."""

    round_id: str
    spec: RoundSpec
    task: RoundTask
    announcement: bytes
    state: str
    opened: float
    frozen: tuple[str, ...] = ()
    root: str = ""
    attempt: int = 0
    failures: tuple[str, ...] = ()
    chosen: tuple[str, ...] = ()
    rejected: dict[str, str] = {}
    candidate: str = ""
    reason: str = ""
    seconds: dict[str, float] = {}
    figures: dict[str, Any] = {}
    transcript: str = ""

    @property
    def at(self) -> State:
        """The state as a member of the table."""
        return State(self.state)

    @property
    def live(self) -> bool:
        """Whether there is still something to do."""
        return self.at not in ENDED


def newest_of(every: Sequence[Round], model: str) -> Round | None:
    """The round of `model` that was announced last, of rounds in the order of their announcement."""
    return next((found for found in reversed(every) if found.task.model == model), None)
