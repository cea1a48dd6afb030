"""Differential privacy of what rounds open: how much noise, who adds it, what is spent, and when a round is refused.

The mechanism is the Gaussian one on the opened sum: every update is clipped to the clip norm on the device (the range
check holds hostile ones to it), and the sum carries noise of standard deviation `noise_multiplier` * clip norm. Nobody
is trusted with all of the noise: each of three aggregators deals its own part, in shares, with half of that variance.
Whoever colludes with one aggregator can subtract that part, and what is left, from the two others, is exactly the noise
that is accounted for; if all three are honest the sum carries 1.5 times the variance, which is the price.

Accounting is by privacy loss distributions (Koskela, Jälkö and Honkela, 2020; the PLD accountant of dp-accounting), one
opened sum an event: a Gaussian, Poisson-sampled where devices are drawn for a round in secret. Two accounts are kept:
for every device over the rounds that it was frozen into, of whatever model, and for a model's releases over all rounds
they descend from. A device that a round would bring over its budget is not admitted to it. What a round would spend is
written down before it opens, and a round that would overspend does not open.

What this does not cover, so that nobody reads more into an epsilon: the opened distances between updates carry no
noise, and which updates are chosen depends on them; epsilon holds for the opened sums given the choice. Neighbouring
inputs differ by one device's contribution to a round (add or remove one), not by one row of its data.

Compatibility: packed `Spend`s are kept in the ledger and in transcripts; fields are only ever added.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from model_delta.errors import Malformed

PARTIES, HONEST_MIN = 3, 2
STD_UNITS_MIN = 64
"""Below so many fixed-point units, rounding would be visible in the noise's distribution."""

SPENDS_MAX = 1_000_000
EPSILON_SLACK = 1e-6
_INTERVAL = 1e-3
_CLOSE = 1e-2

NO_EPSILON = "no epsilon holds for a device that was in a sum opened without noise, of whatever model"


class Spend(msgspec.Struct, frozen=True):
    """One opened sum. `noise_multiplier`: standard deviation left after one aggregator's part is subtracted, over the
    clip norm; `sampling`: probability with which a device was drawn into the round (1 unless drawn in secret)."""

    noise_multiplier: float
    sampling: float = 1.0


class Spent(msgspec.Struct, frozen=True, kw_only=True):
    """What an opening costs, as aggregators are told before it and sign: its `spend`, those before it of the model's
    releases and of the most burdened device in it, and the epsilons at `delta` after it."""

    spend: Spend
    before_release: tuple[Spend, ...] = ()
    before_device: tuple[Spend, ...] = ()
    delta: float
    epsilon_release: float
    epsilon_device: float


@dataclass(frozen=True)
class Budget:
    """What may be spent: epsilon at `delta`, for each device and for each model's releases."""

    epsilon_device: float
    epsilon_release: float
    delta: float


@dataclass(frozen=True)
class Account:
    """Epsilons after a round, at the budget's delta: of the model's releases, and the highest of any device in the
    round. `refusal`: why the round must not open ("" when it may)."""

    epsilon_release: float
    epsilon_device: float
    refusal: str = ""


def epsilon(spends: Sequence[Spend], delta: float) -> float:
    """The epsilon at `delta` of all `spends` together (adaptive composition, add or remove one); 0.0 for none.

    An upper bound: losses are rounded up to multiples of 1/1000. Infinite for a spend without noise. Raises Malformed
    for a delta outside (0, 1), a negative noise, a sampling outside (0, 1], and more than a million spends.
    """
    if not 0 < delta < 1:
        raise Malformed(f"privacy: expected a delta between 0 and 1, found {delta}")
    if len(spends) > SPENDS_MAX:
        raise Malformed(f"privacy: expected at most {SPENDS_MAX} openings, found {len(spends)}")
    for spend in spends:
        _check(spend)
    if not spends:
        return 0.0
    if any(spend.noise_multiplier == 0 for spend in spends):
        return math.inf
    counts = sorted(Counter(spends).items(), key=lambda item: (item[0].noise_multiplier, item[0].sampling))
    return _composed(tuple(counts), delta)


@functools.lru_cache(maxsize=4_096)
def _composed(counts: tuple[tuple[Spend, int], ...], delta: float) -> float:
    """The account of a round is asked for at each attempt, and devices one by one as their contributions come."""
    # Loading it takes seconds (SciPy comes along); only programs that judge a round with privacy pay for it.
    from dp_accounting import dp_event
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(value_discretization_interval=_INTERVAL)
    for spend, count in counts:
        event: dp_event.DpEvent = dp_event.GaussianDpEvent(spend.noise_multiplier)
        if spend.sampling < 1:
            event = dp_event.PoissonSampledDpEvent(spend.sampling, event)
        accountant.compose(event, count)
    return float(accountant.get_epsilon(delta))


def exceeding(
    devices: Mapping[str, Sequence[Spend]], coming: Spend, delta: float, epsilon_max: float
) -> dict[str, float]:
    """The devices that `coming` brings above `epsilon_max`, by what was spent on each so far, and where to.

    The accountant takes a tenth of a second for each history, and a thousand devices may have a thousand. It is asked
    about those alone that are close to `epsilon_max`; of the others `gaussian_epsilon` says enough. Raises Malformed as
    `epsilon` does."""
    over = {}
    for name, spends in devices.items():
        after = [*spends, coming]
        if any(spend.sampling < 1 for spend in after):
            found = epsilon(after, delta)
        else:
            found = gaussian_epsilon(round(burden(after), 12), delta)
            if found <= epsilon_max <= found + _CLOSE * (1 + found):
                found = epsilon(after, delta)
        if found > epsilon_max:
            over[name] = found
    return over


@functools.lru_cache(maxsize=4_096)
def gaussian_epsilon(burden: float, delta: float) -> float:
    """The exact epsilon at `delta` of Gaussians, none of them sampled, whose sum of 1/noise^2 is `burden`.

    They compose to one Gaussian with mu = sqrt(burden) (Dong, Roth and Su, Gaussian Differential Privacy, 2022,
    corollaries 2.13 and 3.3). `epsilon` is never below it, and at most some 1e-4 above."""
    if not 0 < burden < math.inf:
        return 0.0 if burden == 0 else math.inf
    mu = math.sqrt(burden)

    def delta_at(value: float) -> float:
        return math.exp(_log_normal(mu / 2 - value / mu)) - math.exp(value + _log_normal(-mu / 2 - value / mu))

    low, high = 0.0, mu * mu / 2 + 40 * mu
    if delta_at(low) <= delta:
        return low
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_at(middle) > delta else (low, middle)
    return low


def _log_normal(x: float) -> float:
    """The logarithm of the normal distribution function, also where that is too small for a float."""
    if x > -30:
        return math.log(math.erfc(-x / math.sqrt(2)) / 2)
    return -x * x / 2 - math.log(-x * math.sqrt(2 * math.pi)) + math.log1p(-1 / x**2 + 3 / x**4)


def account(budget: Budget, release: Sequence[Spend], devices: Mapping[str, Sequence[Spend]], coming: Spend) -> Account:
    """Judge a round before it opens: `release` and `devices` (those frozen into it) are what was spent so far.

    Raises Malformed as `epsilon` does.
    """
    of_release = epsilon([*release, coming], budget.delta)
    over = sorted(exceeding(devices, coming, budget.delta, budget.epsilon_device))
    # Of the history that aggregators are told, and work out again: others of the same burden may differ in the noise
    # of the accountant.
    highest = epsilon([*max(devices.values(), key=burden), coming], budget.delta) if devices else 0.0
    at = f"at delta {budget.delta:g}"
    refusal = ""
    if of_release > budget.epsilon_release:
        refusal = f"this opening would bring the release to epsilon {of_release:.2f} {at}, the budget is "
        refusal += f"{budget.epsilon_release:g}; raise the noise or the budget"
    elif over:
        refusal = f"this opening would bring {len(over)} of {len(devices)} devices (first: {over[0]}) to epsilon "
        refusal += f"{highest:.2f} {at}, the budget is {budget.epsilon_device:g}; leave them out of the next round"
        if math.isinf(highest):
            refusal += f" ({NO_EPSILON})"
    return Account(of_release, highest, refusal)


def miscounted(spent: Spent) -> str:
    """Which epsilon of an account does not follow from its spends, in words; "" when both do. Raises Malformed as
    `epsilon` does."""
    alike = Counter(spent.before_release) == Counter(spent.before_device)
    found = epsilon([*spent.before_release, spent.spend], spent.delta)
    for what, told in (("release", spent.epsilon_release), ("device", spent.epsilon_device)):
        if what == "device" and not alike:
            found = epsilon([*spent.before_device, spent.spend], spent.delta)
        if not math.isclose(found, told, rel_tol=EPSILON_SLACK):
            return f"epsilon of the {what} is {found:.6g} at delta {spent.delta:g}, settled was {told:.6g}"
    return ""


def burden(spends: Sequence[Spend]) -> float:
    """The sum of 1/noise^2, which tells the more burdened of two histories without an accountant."""
    return math.fsum(spend.noise_multiplier**-2 if spend.noise_multiplier else math.inf for spend in spends)


def part_std_units(noise_multiplier: float, norm_max_units: int, weight_full: int = 1) -> float:
    """Standard deviation, in fixed-point units, of one aggregator's part of the noise.

    `norm_max_units` is the longest accepted update in these units (`shares.fixed_point.norm_max`, which includes what
    rounding may add), `weight_full` the largest integer weight. Two parts together have `noise_multiplier` times the
    sensitivity. Raises Malformed when rounding to whole units would show.
    """
    std = noise_multiplier * norm_max_units * weight_full / math.sqrt(HONEST_MIN)
    if std < STD_UNITS_MIN:
        raise Malformed(
            f"privacy: noise of {std:.1f} units would show its rounding, expected at least {STD_UNITS_MIN}; raise the "
            "noise multiplier or the fraction bits"
        )
    return std


def headroom_units(part_std: float) -> int:
    """What all three parts of the noise may add to one entry of the sum: 9 standard deviations, int.

    An entry leaves it with probability below 2^-61; the ring must have this room beside n * norm * weights.
    """
    return math.ceil(9 * math.sqrt(PARTIES) * part_std)


def noise(length: int, std_units: float, rng: Callable[[int], bytes]) -> NDArray[np.int64]:
    """One aggregator's part, int64[length]: normal (Box and Muller, 1958), rounded to whole units.

    Rounding to a grid of units, of which the standard deviation holds 64 or more, removes the low bits that give
    floating-point noise away (Mironov, CCS 2012). 53 random bits reach 8.5 standard deviations, beyond which normal
    noise is with probability 1e-17: for a million values an error of 1e-11 in a delta. `rng` returns that many bytes;
    cryptographic in production.
    """
    pairs = (length + 1) // 2
    words = np.frombuffer(rng(16 * pairs), dtype="<u8").reshape(2, pairs) >> np.uint64(11)
    radius = np.sqrt(-2.0 * np.log((words[0] + 1.0) * 2.0**-53))
    angle = words[1] * (2.0 * math.pi * 2.0**-53)
    normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:length]
    return np.asarray(np.rint(normal * std_units).astype(np.int64))


def _check(spend: Spend) -> None:
    if not (math.isfinite(spend.noise_multiplier) and spend.noise_multiplier >= 0):
        raise Malformed(f"privacy: expected a noise multiplier of 0 or more, found {spend.noise_multiplier}")
    if not 0 < spend.sampling <= 1:
        raise Malformed(f"privacy: expected a sampling probability in (0, 1], found {spend.sampling}")
