"""What a terminal can compute by itself about a payment, from its own past payments alone.

`TerminalHistory` computes the features one payment at a time in constant memory; `table_features` computes the same
numbers for a whole table. Amounts are integer cents and times whole Unix seconds, so that both agree exactly where they
count.
"""

from __future__ import annotations

from collections import deque
from math import cos, log1p, pi, sin, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from device_sim.payments import DAY, ENTRY_MODES, FIRST_MONDAY, IntArray, Payment, Payments

FEATURE_SET = "terminal-26-v1"
FEATURES: tuple[str, ...] = (
    "amount",
    "amount_log",
    "amount_ratio",
    "amount_z",
    "hour_sin",
    "hour_cos",
    "weekday_sin",
    "weekday_cos",
    "entry_chip",
    "entry_contactless",
    "entry_magstripe",
    "entry_keyed",
    "count_1h",
    "count_24h",
    "count_7d",
    "sum_1h",
    "sum_24h",
    "sum_7d",
    "previous_gap",
    "chip_share_24h",
    "contactless_share_24h",
    "magstripe_share_24h",
    "card_new",
    "card_gap",
    "card_count_24h",
    "card_count_7d",
)
"""What a model is fed, in this order. `amount` is in currency units, cut at 2,000; `amount_ratio` and `amount_z`
compare with all earlier payments of this terminal; counts, sums and gaps are log1p of payments, units and minutes."""

HISTORY_PAYMENTS_MAX = 50_000
_HOUR, _WEEK = 3_600, 7 * DAY
_CHIP, _CONTACTLESS, _MAGSTRIPE, _KEYED = range(len(ENTRY_MODES))
_AMOUNT_MAX, _RATIO_MAX, _Z_MAX, _GAP_MAX = 2_000.0, 20.0, 8.0, _WEEK
_LOG_SPREAD_MIN = 0.1

Features = npt.NDArray[np.float32]


class TerminalHistory:
    """What one terminal remembers of its own payments: sums over its life, and the last seven days.

    At most `payments_max` payments are kept; a terminal busier than that undercounts its seven-day features.
    """

    def __init__(self, payments_max: int = HISTORY_PAYMENTS_MAX) -> None:
        self._payments_max = payments_max
        self._count = 0
        self._cents = 0
        self._log_sum = 0.0
        self._log_square_sum = 0.0
        self._recent: deque[tuple[int, int, int, int]] = deque()  # time, customer, cents, entry
        self._cards: dict[int, deque[int]] = {}  # times of the recent payments of each card
        self._day = _Window(DAY)
        self._hour = _Window(_HOUR)
        self._week = _Window(_WEEK)

    @classmethod
    def resumed(cls, past: Payments, terminal: int, payments_max: int = HISTORY_PAYMENTS_MAX) -> TerminalHistory:
        """The history that adding all payments of `terminal` in `past` one by one would have left, computed at once."""
        mine = past.rows(past.terminal == terminal)
        history = cls(payments_max)
        if not len(mine):
            return history
        recent = int(np.searchsorted(mine.time, mine.time[-1] - _WEEK, side="right"))
        logs = np.log1p(mine.amount[:recent])
        history._count = recent
        history._cents = int(mine.amount_cents[:recent].sum())
        history._log_sum = float(logs.sum())
        history._log_square_sum = float((logs**2).sum())
        for payment in mine.rows(slice(recent, None)).replay(terminal):
            history._forget(payment.time)
            history._remember(payment)
        return history

    def __len__(self) -> int:
        return len(self._recent)

    def add(self, payment: Payment) -> dict[str, float]:
        """The payment's features, by name; afterwards it is part of the history.

        Payments must come in order of time; equal times are fine.
        """
        self._forget(payment.time)
        named = self._features(payment)
        self._remember(payment)
        return named

    def _features(self, payment: Payment) -> dict[str, float]:
        amount = payment.amount_cents / 100.0
        amount_log = log1p(amount)
        ratio, z = 1.0, 0.0
        if self._count >= 2:
            ratio = min(amount / (self._cents / 100.0 / self._count), _RATIO_MAX)
            mean = self._log_sum / self._count
            variance = max(self._log_square_sum / self._count - mean * mean, 0.0)
            z = (amount_log - mean) / max(sqrt(variance), _LOG_SPREAD_MIN)
            z = max(-_Z_MAX, min(_Z_MAX, z))
        day = payment.time // DAY
        hour_angle = 2 * pi * (payment.time % DAY) / DAY
        weekday_angle = 2 * pi * ((day - FIRST_MONDAY // DAY) % 7) / 7
        card = self._cards.get(payment.customer)
        previous_gap = min(payment.time - self._recent[-1][0], _GAP_MAX) if self._recent else _GAP_MAX
        card_gap = min(payment.time - card[-1], _GAP_MAX) if card else _GAP_MAX
        card_day = sum(1 for time in card if time > payment.time - DAY) if card else 0
        in_day = max(self._day.count, 1)
        return dict(
            zip(
                FEATURES,
                (
                    min(amount, _AMOUNT_MAX),
                    amount_log,
                    ratio,
                    z,
                    sin(hour_angle),
                    cos(hour_angle),
                    sin(weekday_angle),
                    cos(weekday_angle),
                    float(payment.entry == _CHIP),
                    float(payment.entry == _CONTACTLESS),
                    float(payment.entry == _MAGSTRIPE),
                    float(payment.entry == _KEYED),
                    log1p(self._hour.count),
                    log1p(self._day.count),
                    log1p(self._week.count),
                    log1p(self._hour.cents / 100.0),
                    log1p(self._day.cents / 100.0),
                    log1p(self._week.cents / 100.0),
                    log1p(previous_gap / 60.0),
                    self._day.entries[_CHIP] / in_day,
                    self._day.entries[_CONTACTLESS] / in_day,
                    self._day.entries[_MAGSTRIPE] / in_day,
                    0.0 if card else 1.0,
                    log1p(card_gap / 60.0),
                    log1p(card_day),
                    log1p(len(card) if card else 0),
                ),
                strict=True,
            )
        )

    def _remember(self, payment: Payment) -> None:
        if len(self._recent) >= self._payments_max:
            self._drop_oldest()
        amount_log = log1p(payment.amount_cents / 100.0)
        self._count += 1
        self._cents += payment.amount_cents
        self._log_sum += amount_log
        self._log_square_sum += amount_log * amount_log
        item = (payment.time, payment.customer, payment.amount_cents, payment.entry)
        self._recent.append(item)
        self._cards.setdefault(payment.customer, deque()).append(payment.time)
        for window in (self._hour, self._day, self._week):
            window.enter(item)

    def _forget(self, now: int) -> None:
        for window in (self._hour, self._day):
            while window.items and window.items[0][0] <= now - window.seconds:
                window.leave()
        while self._recent and self._recent[0][0] <= now - _WEEK:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        item = self._recent.popleft()
        times = self._cards[item[1]]
        times.popleft()
        if not times:
            del self._cards[item[1]]
        for window in (self._hour, self._day, self._week):
            if window.items and window.items[0] is item:
                window.leave()


class _Window:
    """Counts and sums over the last `seconds`; the owner calls `enter` and `leave`."""

    def __init__(self, seconds: int) -> None:
        self.seconds = seconds
        self.items: deque[tuple[int, int, int, int]] = deque()
        self.cents = 0
        self.entries = [0, 0, 0, 0]

    @property
    def count(self) -> int:
        return len(self.items)

    def enter(self, item: tuple[int, int, int, int]) -> None:
        self.items.append(item)
        self.cents += item[2]
        self.entries[item[3]] += 1

    def leave(self) -> None:
        _, _, cents, entry = self.items.popleft()
        self.cents -= cents
        self.entries[entry] -= 1


def table_features(payments: Payments) -> Features:
    """The features of a whole table, each row from the rows of its terminal that stand before it: float32[n, F].

    Rows must be in order of time. Windows are half-open: a payment exactly one window ago no longer counts.
    """
    count = len(payments)
    result = np.empty((count, len(FEATURES)), dtype=np.float32)
    if not count:
        return result
    order = np.argsort(payments.terminal, kind="stable")
    sorted_ = payments.rows(order)
    position = np.arange(count)
    start = np.searchsorted(sorted_.terminal, sorted_.terminal, side="left")
    before = position - start
    amount = sorted_.amount
    amount_log = np.log1p(amount)

    earlier_cents = _sum_before(sorted_.amount_cents, start, position)
    mean = np.divide(earlier_cents / 100.0, before, out=np.ones(count), where=before > 0)
    log_mean = np.divide(_sum_before(amount_log, start, position), before, out=np.zeros(count), where=before > 0)
    square = np.divide(_sum_before(amount_log**2, start, position), before, out=np.zeros(count), where=before > 0)
    spread = np.maximum(np.sqrt(np.maximum(square - log_mean**2, 0.0)), _LOG_SPREAD_MIN)
    known = before >= 2

    origin = int(sorted_.time.min())
    stride = int(sorted_.time.max()) - origin + 2 * _WEEK
    clock = sorted_.time - origin + _WEEK
    _, rank = np.unique(sorted_.terminal, return_inverse=True)
    key = rank * stride + clock
    first = {w: np.searchsorted(key, key - w, side="right") for w in (_HOUR, DAY, _WEEK)}
    seen = {w: position - left for w, left in first.items()}
    in_day = np.maximum(seen[DAY], 1)
    share = {
        m: _sum_before((sorted_.entry == m).astype(np.int64), first[DAY], position) / in_day
        for m in (_CHIP, _CONTACTLESS, _MAGSTRIPE)
    }
    gap = np.full(count, _GAP_MAX)
    gap[1:] = np.where(before[1:] > 0, np.minimum(np.diff(sorted_.time), _GAP_MAX), _GAP_MAX)
    gap[seen[_WEEK] == 0] = _GAP_MAX
    card_gap, card_day, card_week = _card_columns(sorted_, rank, clock, stride)
    hour_angle = 2 * np.pi * (sorted_.time % DAY) / DAY
    weekday_angle = 2 * np.pi * ((sorted_.time // DAY - FIRST_MONDAY // DAY) % 7) / 7
    columns = (
        np.minimum(amount, _AMOUNT_MAX),
        amount_log,
        np.where(known, np.minimum(amount / mean, _RATIO_MAX), 1.0),
        np.where(known, np.clip((amount_log - log_mean) / spread, -_Z_MAX, _Z_MAX), 0.0),
        np.sin(hour_angle),
        np.cos(hour_angle),
        np.sin(weekday_angle),
        np.cos(weekday_angle),
        *((sorted_.entry == mode) for mode in range(4)),
        *(np.log1p(seen[w]) for w in (_HOUR, DAY, _WEEK)),
        *(np.log1p(_sum_before(sorted_.amount_cents, first[w], position) / 100.0) for w in (_HOUR, DAY, _WEEK)),
        np.log1p(gap / 60.0),
        share[_CHIP],
        share[_CONTACTLESS],
        share[_MAGSTRIPE],
        card_week == 0,
        np.log1p(card_gap / 60.0),
        np.log1p(card_day),
        np.log1p(card_week),
    )
    for index, column in enumerate(columns):
        result[order, index] = column
    return result


def _sum_before(values: npt.NDArray[Any], first: IntArray, position: IntArray) -> npt.NDArray[Any]:
    """Sum of values[first[i] : position[i]] for every i."""
    total: npt.NDArray[Any] = np.concatenate([np.zeros(1, dtype=values.dtype), np.cumsum(values)])
    return np.asarray(total[position] - total[first])


def _card_columns(
    payments: Payments, rank: IntArray, clock: IntArray, stride: int
) -> tuple[IntArray, IntArray, IntArray]:
    """Per row: seconds since this card's previous payment at this terminal (cut at a week), and its payments there in
    the last day and week."""
    order = np.lexsort((np.arange(len(payments)), payments.customer, rank))
    pair_change = np.ones(len(order), dtype=bool)
    pair_change[1:] = (np.diff(rank[order]) != 0) | (np.diff(payments.customer[order]) != 0)
    key = np.cumsum(pair_change) * stride + clock[order]
    position = np.arange(len(order))
    day = position - np.searchsorted(key, key - DAY, side="right")
    week = position - np.searchsorted(key, key - _WEEK, side="right")
    gap = np.full(len(order), _GAP_MAX)
    gap[1:] = np.where(week[1:] > 0, np.diff(payments.time[order]), _GAP_MAX)
    back = np.empty(len(order), dtype=np.int64)
    back[order] = position
    return gap[back], day[back], week[back]
