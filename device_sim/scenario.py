"""One seed, one world: who the devices are, and which payments are history, local data, held out, and live traffic.

The calendar of a world, in days:

    history     before the drift: what the first model is trained on, pooled
    local       after the drift: what each device has seen, labelled, and kept
    held out    after the drift: nobody trains on it; precision is measured here
    live        replayed by the devices, over and over, each round shifted by whole weeks

Every process of a fleet builds the same world from the same scenario, so nothing of it has to be sent around. A user's
own rows take the place of generated payments: their order of time is cut into the same four parts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from device_sim.payments import DAY, FIRST_MONDAY, IntArray, Payments, PaymentSpec, generate
from device_sim.payments_csv import LabelledRows, deal
from device_sim.population import VirtualDevice, population, terminals_of
from device_sim.terminal_features import FEATURE_SET, FEATURES, Features, TerminalHistory, table_features
from model_delta.errors import Malformed

_HISTORY, _LOCAL, _HELD_OUT, _LIVE = range(4)
Labels = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Scenario:
    """What a run is made of. `live_days` is a whole number of weeks, so that the replay can go round."""

    seed: int = 7
    devices: int = 60
    regions: tuple[str, ...] = ("eu-west", "ap-south")
    tenant: str = "acme"
    hostile_share: float = 0.1
    history_days: int = 25
    local_days: int = 17
    held_out_days: int = 8
    live_days: int = 14


@dataclass(frozen=True)
class Sample:
    """One live payment as its terminal sees it, and what it will turn out to be. `time`: Unix seconds of the world."""

    time: int
    features: dict[str, float]
    fraud: bool


@dataclass(frozen=True)
class World:
    """A scenario with its payments. Features are float32[n, F] in the order of `names`, labels bool[n]."""

    devices: tuple[VirtualDevice, ...]
    names: tuple[str, ...]
    feature_set: str
    _features: Features
    _fraud: Labels
    _owner: IntArray
    _part: IntArray
    _live: Callable[[int], Iterator[Sample]]

    def history(self) -> tuple[Features, Labels]:
        """Everybody's payments before the drift."""
        return self._rows(self._part == _HISTORY)

    def held_out(self) -> tuple[Features, Labels]:
        """Everybody's payments of the days on which precision is measured."""
        return self._rows(self._part == _HELD_OUT)

    def held_out_owner(self) -> IntArray:
        """Which device each held-out row is from, int64[n]."""
        owner: IntArray = self._owner[self._part == _HELD_OUT]
        return owner

    def local(self, index: int) -> tuple[Features, Labels]:
        """What device `index` has kept of its own payments since the drift."""
        return self._rows((self._part == _LOCAL) & (self._owner == index))

    def live(self, index: int) -> Iterator[Sample]:
        """The endless stream of payments at device `index`."""
        return self._live(index)

    def _rows(self, mask: npt.NDArray[np.bool_]) -> tuple[Features, Labels]:
        return self._features[mask], self._fraud[mask]


def generated_world(scenario: Scenario, only: Collection[int] | None = None) -> World:
    """The world of generated payments.

    `only` names the devices whose payments are kept (a fleet process needs no others): what is kept is the same as in
    the whole world. Raises ValueError for a scenario without whole weeks of live traffic.
    """
    if scenario.live_days < 7 or scenario.live_days % 7:
        raise ValueError(f"scenario: live days must be whole weeks, found {scenario.live_days}")
    devices = _devices(scenario)
    ends = np.cumsum([scenario.history_days, scenario.local_days, scenario.held_out_days, scenario.live_days])
    table = generate(
        PaymentSpec(terminals_of(devices), days=int(ends[-1]), seed=scenario.seed, drift_day=scenario.history_days)
    )
    if only is not None:
        table = table.rows(np.isin(table.terminal, np.array(sorted(only), dtype=np.int64)))
    start = int(ends[_HELD_OUT])
    known = table.rows(table.days(0, start))
    day = (known.time - FIRST_MONDAY) // DAY
    live = table.rows(table.days(start, int(ends[-1])))
    return World(
        devices=devices,
        names=FEATURES,
        feature_set=FEATURE_SET,
        _features=table_features(known),
        _fraud=known.fraud,
        _owner=known.terminal,
        _part=np.searchsorted(ends, day, side="right"),
        _live=lambda index: _replayed(known, live, index, scenario.live_days * DAY),
    )


def world_of_rows(scenario: Scenario, rows: LabelledRows, alpha: float = 0.5) -> World:
    """The world of a user's own rows, dealt to the devices by a Dirichlet distribution and cut by time: 40 % history,
    30 % local, 15 % held out, 15 % live.

    Raises Malformed when history or the held-out part would hold no fraud.
    """
    devices = _devices(scenario)
    owner = deal(rows, len(devices), scenario.seed, alpha)
    part = np.searchsorted([0.4, 0.7, 0.85], np.arange(len(rows)) / len(rows), side="right")
    for number, name in ((_HISTORY, "first 40 %"), (_HELD_OUT, "part from 70 % to 85 %")):
        if not rows.fraud[part == number].any():
            raise Malformed(f"payments: no fraud in the {name} of {len(rows)} rows; expected some, use more rows")

    def live(index: int) -> Iterator[Sample]:
        mine = np.flatnonzero((owner == index) & (part == _LIVE))
        return replayed_rows(rows, mine if len(mine) else np.flatnonzero(owner == index))

    return World(devices, rows.names, rows.feature_set, rows.features, rows.fraud, owner, part, live)


def replayed_rows(rows: LabelledRows, which: IntArray) -> Iterator[Sample]:
    """The rows with the numbers `which` (int64[k], k > 0) as a terminal sees them, over and over."""
    while True:
        for row in which:
            named = dict(zip(rows.names, map(float, rows.features[row]), strict=True))
            yield Sample(int(rows.time[row]), named, bool(rows.fraud[row]))


def _devices(scenario: Scenario) -> tuple[VirtualDevice, ...]:
    return population(
        scenario.devices, scenario.seed, scenario.regions, scenario.tenant, hostile_share=scenario.hostile_share
    )


def _replayed(known: Payments, live: Payments, terminal: int, round_seconds: int) -> Iterator[Sample]:
    """The live payments of one terminal without end; features are computed one by one, as a terminal does."""
    history = TerminalHistory.resumed(known, terminal)
    payments = list(live.replay(terminal))
    shift = 0
    while payments:
        for payment in payments:
            shifted = replace(payment, time=payment.time + shift)
            yield Sample(shifted.time, history.add(shifted), payment.fraud)
        shift += round_seconds
