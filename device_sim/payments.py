"""Card payments as terminals see them: seeded, non-IID across merchants, with fraud that can change its ways.

The generator follows the practice of Le Borgne, Siblini, Lebichot and Bontempi, "Reproducible Machine Learning for
Credit Card Fraud Detection" (2022), chapter 3: customers and terminals have places, a customer pays at the terminals
within reach, with an own frequency and spending level, and three fraud scenarios are laid over it:

    compromised terminal   for some days, cloned cards are used at one terminal
    stolen card            one card, several payments within hours
    unusual amount         one payment that does not fit the terminal

Beyond that source, every terminal belongs to a merchant category with its own amounts, opening hours, entry modes and
fraud mix, so that no two terminals hold the same distribution. From `drift_day` on, the larger part of fraud changes
its pattern: amounts move from large to small (card testing), hours from night to day, entry from magnetic stripe to
contactless and keyed. A model trained before that day loses average precision after it.

Amounts are integer cents and times whole Unix seconds. What a terminal makes of them is in `terminal_features`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

ENTRY_MODES: tuple[str, ...] = ("chip", "contactless", "magstripe", "keyed")
SCENARIOS: tuple[str, ...] = ("legitimate", "compromised_terminal", "stolen_card", "unusual_amount")

DAY = 86_400
FIRST_MONDAY = 1_767_571_200
"""Unix time of day 0: Monday 5 January 2026, 00:00 UTC. Terminals live in UTC."""

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Category:
    """How payments look at one kind of merchant.

    `amount_median` (currency units) and `amount_sigma` of the log amount; `hours` as (centre, spread, weight);
    `weekend` factor on Saturday and Sunday; `entry` shares in the order of ENTRY_MODES; `fraud_rate` as a share of the
    legitimate payments; `fraud_mix` shares in the order of SCENARIOS[1:]."""

    amount_median: float
    amount_sigma: float
    hours: tuple[tuple[float, float, float], ...]
    weekend: float
    entry: tuple[float, float, float, float]
    fraud_rate: float
    fraud_mix: tuple[float, float, float]


CATEGORIES: Mapping[str, Category] = {
    "grocery": Category(
        28, 0.7, ((11, 2.0, 0.4), (18, 2.5, 0.6)), 1.2, (0.36, 0.59, 0.03, 0.02), 0.014, (0.5, 0.3, 0.2)
    ),
    "fuel": Category(52, 0.4, ((8, 1.5, 0.4), (18, 3.0, 0.6)), 0.9, (0.62, 0.28, 0.09, 0.01), 0.024, (0.7, 0.2, 0.1)),
    "restaurant": Category(
        36, 0.6, ((13, 1.0, 0.4), (20, 1.6, 0.6)), 1.4, (0.4, 0.55, 0.04, 0.01), 0.014, (0.4, 0.4, 0.2)
    ),
    "electronics": Category(160, 0.9, ((15, 3.0, 1.0),), 1.3, (0.75, 0.2, 0.03, 0.02), 0.03, (0.15, 0.35, 0.5)),
    "travel": Category(240, 0.8, ((10, 4.0, 0.5), (17, 4.0, 0.5)), 1.0, (0.45, 0.1, 0.05, 0.4), 0.03, (0.1, 0.5, 0.4)),
    "kiosk": Category(9, 0.8, ((9, 2.5, 0.4), (21, 3.5, 0.6)), 1.1, (0.12, 0.5, 0.02, 0.36), 0.028, (0.2, 0.6, 0.2)),
}
CATEGORY_NAMES: tuple[str, ...] = tuple(CATEGORIES)


@dataclass(frozen=True)
class PaymentSpec:
    """What to generate: one terminal per entry of `categories`, over `days` days; `drift_day` (None: never) is the day
    on which `drift_share` of the fraud changes its pattern. `fraud_scale` multiplies every category's fraud rate."""

    categories: tuple[str, ...]
    days: int
    seed: int
    drift_day: int | None = None
    drift_share: float = 0.6
    customers_per_terminal: int = 40
    terminals_in_reach: float = 8.0
    fraud_scale: float = 1.0


@dataclass(frozen=True)
class Payment:
    """One card payment at a terminal. `time` in Unix seconds, `entry` an index into ENTRY_MODES."""

    terminal: int
    customer: int
    time: int
    amount_cents: int
    entry: int
    fraud: bool = False
    scenario: int = 0


@dataclass(frozen=True)
class Payments:
    """A table of payments in order of time; every array has shape [n]. `scenario` indexes SCENARIOS."""

    terminal: IntArray
    customer: IntArray
    time: IntArray
    amount_cents: IntArray
    entry: IntArray
    fraud: npt.NDArray[np.bool_]
    scenario: IntArray

    def __len__(self) -> int:
        return len(self.time)

    @property
    def amount(self) -> FloatArray:
        """Amounts in currency units."""
        return self.amount_cents / 100.0

    def rows(self, choice: npt.NDArray[Any] | slice) -> Payments:
        """The rows that a mask, index array or slice selects. Features of a part count only that part's past."""
        return Payments(**{name: column[choice] for name, column in vars(self).items()})

    def days(self, first: int, last: int) -> npt.NDArray[np.bool_]:
        """Mask of the payments on days [first, last), counted from FIRST_MONDAY."""
        return (self.time >= FIRST_MONDAY + first * DAY) & (self.time < FIRST_MONDAY + last * DAY)

    def replay(self, terminal: int) -> Iterator[Payment]:
        """The payments of one terminal, one after the other."""
        for row in np.flatnonzero(self.terminal == terminal):
            yield Payment(
                terminal,
                int(self.customer[row]),
                int(self.time[row]),
                int(self.amount_cents[row]),
                int(self.entry[row]),
                bool(self.fraud[row]),
                int(self.scenario[row]),
            )


# --- generation -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Fraud:
    """How one scenario's payments look under one regime.

    Amounts are `factor` x the terminal's median (plain currency units if `absolute`) with log spread `sigma`. An event
    is `size` payments (uniform, both ends included) at one terminal, by one card or by as many cards; it starts around
    hour `hour` +- `hour_spread` and lasts `span` seconds."""

    factor: float
    sigma: float
    size: tuple[int, int]
    hour: float
    hour_spread: float
    span: int
    entry: tuple[float, float, float, float]
    one_card: bool
    absolute: bool = False


_BEFORE = (
    _Fraud(2.6, 0.50, (6, 18), 23.0, 3.0, 4 * DAY, (0.05, 0.08, 0.80, 0.07), one_card=False),
    _Fraud(4.0, 0.50, (3, 7), 21.5, 3.0, 4 * 3_600, (0.10, 0.30, 0.40, 0.20), one_card=True),
    _Fraud(9.0, 0.40, (1, 1), 19.0, 5.0, 0, (0.35, 0.10, 0.30, 0.25), one_card=True),
)
_AFTER = (
    _Fraud(0.35, 0.40, (6, 18), 12.0, 2.5, 4 * DAY, (0.03, 0.80, 0.02, 0.15), one_card=False),
    _Fraud(1.8, 0.45, (5, 10), 13.0, 3.0, 1_500, (0.00, 0.45, 0.00, 0.55), one_card=True, absolute=True),
    _Fraud(0.06, 0.50, (1, 3), 14.0, 3.0, 600, (0.05, 0.35, 0.00, 0.60), one_card=True),
)


def generate(spec: PaymentSpec) -> Payments:
    """All payments of `spec`, in order of time. The same spec gives the same table, bit for bit.

    Raises ValueError for an unknown category or a spec without terminals or days.
    """
    unknown = sorted(set(spec.categories) - set(CATEGORY_NAMES))
    if unknown:
        raise ValueError(f"payments: unknown merchant category {unknown[0]!r}; known: {', '.join(CATEGORY_NAMES)}")
    if not spec.categories or spec.days < 1:
        raise ValueError(f"payments: {len(spec.categories)} terminals over {spec.days} days give no payments")
    rng = np.random.default_rng(spec.seed)
    median = np.array([CATEGORIES[name].amount_median for name in spec.categories])
    median = median * rng.lognormal(0.0, 0.25, len(spec.categories))
    legitimate, within_reach = _legitimate(spec, median, rng)
    parts = [legitimate]
    for number in (1, 2, 3):
        parts.append(_fraudulent(spec, number, legitimate, median, within_reach, rng))
    joined = Payments(*(np.concatenate(columns) for columns in zip(*(vars(p).values() for p in parts), strict=True)))
    inside = joined.rows(joined.days(0, spec.days))
    return inside.rows(np.lexsort((inside.terminal, inside.time)))


def _legitimate(spec: PaymentSpec, median: FloatArray, rng: np.random.Generator) -> tuple[Payments, IntArray]:
    """Honest payments, and for every customer the terminals within reach (int[customers, k], nearest first)."""
    terminals = len(spec.categories)
    customers = terminals * spec.customers_per_terminal
    reach = max(1, min(terminals, round(spec.terminals_in_reach)))
    places, homes = rng.random((terminals, 2)), rng.random((customers, 2))
    nearest = np.empty((customers, reach), dtype=np.int64)
    for start in range(0, customers, 4_096):  # bounds the distance matrix
        gap = ((homes[start : start + 4_096, None, :] - places[None, :, :]) ** 2).sum(axis=2)
        nearest[start : start + 4_096] = np.argsort(gap, axis=1, kind="stable")[:, :reach]

    per_day = rng.uniform(0.0, 4.0, customers)
    spending = rng.lognormal(0.0, 0.3, customers)
    counts = rng.poisson(np.repeat(per_day[:, None], spec.days, axis=1))
    customer = np.repeat(np.arange(customers), counts.sum(axis=1))
    day = np.repeat(np.tile(np.arange(spec.days), customers), counts.ravel())
    terminal = nearest[customer, rng.integers(0, reach, len(customer))]

    kept = np.ones(len(customer), dtype=bool)
    second, entry = np.empty(len(customer), dtype=np.int64), np.empty(len(customer), dtype=np.int64)
    log_amount = np.log(median[terminal] * spending[customer])
    kind = np.array([CATEGORY_NAMES.index(name) for name in spec.categories])[terminal]
    for index, category in enumerate(CATEGORIES.values()):
        rows = np.flatnonzero(kind == index)
        weekend = (day[rows] % 7 >= 5) * (category.weekend - 1.0)
        kept[rows] = rng.random(len(rows)) < (1.0 + weekend) / max(1.0, category.weekend)
        centre, spread, weight = (np.array(column) for column in zip(*category.hours, strict=True))
        peak = rng.choice(len(weight), len(rows), p=weight)
        second[rows] = _second_of_day(rng.normal(centre[peak], spread[peak]))
        entry[rows] = rng.choice(4, len(rows), p=category.entry)
        log_amount[rows] += rng.normal(0.0, category.amount_sigma, len(rows))
    log_amount += (rng.random(len(customer)) < 0.02) * rng.uniform(1.0, 2.2, len(customer))  # a rare large purchase
    log_amount -= (rng.random(len(customer)) < 0.03) * rng.uniform(1.0, 2.5, len(customer))  # or only a coffee
    table = _table(terminal, customer, FIRST_MONDAY + day * DAY + second, np.exp(log_amount), entry, 0).rows(kept)
    again = np.flatnonzero(rng.random(len(table)) < 0.015)  # forgot something: the same card again, minutes later
    second_visit = replace(
        table.rows(again),
        time=table.time[again] + rng.integers(60, 2_400, len(again)),
        amount_cents=np.maximum(50, (table.amount_cents[again] * rng.uniform(0.1, 0.8, len(again))).astype(np.int64)),
    )
    joined = (np.concatenate(pair) for pair in zip(vars(table).values(), vars(second_visit).values(), strict=True))
    return Payments(*joined), nearest


def _fraudulent(
    spec: PaymentSpec,
    scenario: int,
    legitimate: Payments,
    median: FloatArray,
    within_reach: IntArray,
    rng: np.random.Generator,
) -> Payments:
    """The payments of one scenario, under the pattern of the day on which each event starts."""
    volume = np.bincount(legitimate.terminal, minlength=len(spec.categories)) / spec.days
    rate = np.array([CATEGORIES[c].fraud_rate * CATEGORIES[c].fraud_mix[scenario - 1] for c in spec.categories])
    drift_day = spec.days if spec.drift_day is None else min(max(spec.drift_day, 0), spec.days)
    before, after = _BEFORE[scenario - 1], _AFTER[scenario - 1]
    parts = []
    for pattern, share, first, last in (
        (before, 1.0, 0, drift_day),
        (before, 1.0 - spec.drift_share, drift_day, spec.days),
        (after, spec.drift_share, drift_day, spec.days),
    ):
        expected = volume * rate * spec.fraud_scale * share * (last - first)
        events = rng.poisson(expected / (sum(pattern.size) / 2))
        where = np.repeat(np.arange(len(events)), events)
        size = rng.integers(pattern.size[0], pattern.size[1] + 1, len(where))
        day = rng.integers(first, max(last, first + 1), len(where))
        second = _second_of_day(rng.normal(pattern.hour, pattern.hour_spread, len(where)))
        thief = rng.integers(0, len(within_reach), len(where))

        event = np.repeat(np.arange(len(where)), size)
        terminal = where[event]
        customer = thief[event] if pattern.one_card else rng.integers(0, len(within_reach), len(event))
        time = FIRST_MONDAY + day[event] * DAY + second[event]
        if pattern.span > DAY:  # spread over days, each at the scenario's hour of the day
            later = rng.integers(0, pattern.span // DAY, len(event)) * DAY
            hour = rng.normal(pattern.hour, pattern.hour_spread, len(event))
            time = FIRST_MONDAY + day[event] * DAY + later + _second_of_day(hour)
        elif pattern.span:
            time = time + rng.integers(0, pattern.span, len(event))
        base = np.ones(len(event)) if pattern.absolute else median[terminal]
        amount = base * pattern.factor * rng.lognormal(0.0, pattern.sigma, len(event))
        entry = rng.choice(4, len(event), p=pattern.entry)
        part = _table(terminal, customer, time, amount, entry, scenario)
        parts.append(part.rows(part.days(first, last)))  # what an event leaves beyond its regime is dropped
    return Payments(*(np.concatenate(pair) for pair in zip(*(vars(p).values() for p in parts), strict=True)))


def _second_of_day(hour: FloatArray) -> IntArray:
    return (np.floor(hour * 3_600).astype(np.int64)) % DAY


def _table(
    terminal: IntArray, customer: IntArray, time: IntArray, amount: FloatArray, entry: IntArray, scenario: int
) -> Payments:
    cents = np.maximum(50, np.round(amount * 100)).astype(np.int64)
    number = np.full(len(time), scenario, dtype=np.int64)
    return Payments(terminal.astype(np.int64), customer.astype(np.int64), time, cents, entry, number > 0, number)
