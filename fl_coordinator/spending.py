"""What a round with privacy costs, written down before it opens; or why it must not open.

`privacy` has the arithmetic, the ledger the history. A round is paid for before its first attempt at opening, once: an
attempt that is repeated opens the same decision with the same noise, or nothing was opened before it. Whether anything
was is known for certain only to the aggregators, so a round that failed counts as if it had opened. No epsilon holds
for a model that was opened without noise before, so such a round is refused too.

A device that the round would bring over its budget is left out before that, at admission or, where another model's
round was paid for since, when the list is frozen; the round goes on with the others. Two rounds that freeze at the same
moment may still both hold a device that has budget for one of them: the one that pays second then does not open.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fl_coordinator.ledger import Ledger
from fl_coordinator.privacy import NO_EPSILON, Account, Budget, Spend, Spent, account, burden, exceeding
from fl_coordinator.rounds import Privacy
from model_delta.errors import Malformed


@dataclass(frozen=True)
class Charge:
    """One opening: its `spend`, all before it of the model's releases and of the most burdened device in it, and the
    account after it."""

    spend: Spend
    before_release: tuple[Spend, ...]
    before_device: tuple[Spend, ...]
    account: Account

    def told(self, delta: float) -> Spent:
        """As the aggregators hear of it, and sign it."""
        return Spent(
            spend=self.spend,
            before_release=self.before_release,
            before_device=self.before_device,
            delta=delta,
            epsilon_release=self.account.epsilon_release,
            epsilon_device=self.account.epsilon_device,
        )


def charge(ledger: Ledger, model: str, privacy: Privacy, round_id: str, device_ids: Sequence[str]) -> Charge:
    """Pay for a round, unless that was done. Blocking. Raises Malformed when it would overspend."""
    _require_noise_so_far(ledger, model, f"privacy: round {round_id!r}")
    release = ledger.privacy_of_release(model, round_id)
    devices = ledger.privacy_of_devices(device_ids, round_id)
    spend = Spend(privacy.noise_multiplier)
    found = account(_budget(privacy), release, devices, spend)
    if found.refusal:
        raise Malformed(f"privacy: round {round_id!r}: {found.refusal}")
    if not ledger.privacy_paid(round_id):
        ledger.spend_privacy(round_id, 1, model, spend, device_ids)
    # The loss of a history falls with its noise: the most burdened device is the one with the largest sum of 1/noise^2.
    heaviest = max(devices.values(), key=burden, default=[])
    return Charge(spend, tuple(release), tuple(heaviest), found)


def over_budget(ledger: Ledger, privacy: Privacy, round_id: str, device_ids: Sequence[str]) -> dict[str, str]:
    """Which of these devices a round would bring over their budget, and the sentence for each. Blocking."""
    budget = _budget(privacy)
    histories = ledger.privacy_of_devices(device_ids, round_id)
    over = exceeding(histories, Spend(privacy.noise_multiplier), budget.delta, budget.epsilon_device)
    return {
        name: f"this round would bring the device to epsilon {value:.2f} at delta {budget.delta:g}, the budget is "
        f"{budget.epsilon_device:g}" + (f" ({NO_EPSILON})" if math.isinf(value) else "")
        for name, value in over.items()
    }


def require_affordable(ledger: Ledger, model: str, privacy: Privacy) -> None:
    """Before a round is announced: would it overspend the budget of the model's releases, or of every device that
    joins? Blocking. Raises Malformed."""
    _require_noise_so_far(ledger, model, "round: privacy")
    spend = Spend(privacy.noise_multiplier)
    found = account(_budget(privacy), ledger.privacy_of_release(model), {"a new device": []}, spend)
    if found.refusal:
        raise Malformed(f"round: privacy: {found.refusal}")


def _require_noise_so_far(ledger: Ledger, model: str, what: str) -> None:
    bare = ledger.opened_without_noise(model)
    if bare:
        raise Malformed(
            f"{what}: {len(bare)} round(s) of {model!r} opened without noise (first: {bare[0]}); no epsilon holds for "
            "releases that descend from them. Leave `privacy` out; it has to be there from a model's first round on"
        )


def _budget(privacy: Privacy) -> Budget:
    return Budget(privacy.epsilon_device or privacy.epsilon, privacy.epsilon, privacy.delta)
