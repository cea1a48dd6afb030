"""Every reason to refuse a contribution, in the order in which they are asked.

The order matters: nothing that a contribution claims is looked at before its signature and its certificate hold, and a
device learns only the first reason. Each reason has a short name, which is counted, and a sentence, which is sent back.
A device that sends the same bytes again (its receipt was lost) is not refused: it gets its receipt.

An attestation group is everybody who was enrolled with the same value of a trait (the device class, or a label such as
the batch that devices were issued in), so that one leaked batch of join tokens cannot fill a round. It is as good as
the enrolment: who enrols a device decides what is written down of it, and a device cannot change it later.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

OVER_QUOTA, OVER_BUDGET = "over quota", "over privacy budget"
REASONS = (
    "bad signature",
    "unknown certificate",
    "expired certificate",
    "revoked certificate",
    "wrong round",
    "wrong base",
    "wrong length",
    "duplicate",
    "late",
    OVER_QUOTA,
    OVER_BUDGET,
    "malformed",
)


class Offered(msgspec.Struct, frozen=True, kw_only=True):
    """A contribution as the checks of its bytes left it. `flaw` is the first of the signature and certificate reasons
    that applies ("" when none does), `mismatch` says what else does not belong to the round. `group` is the device's
    attestation group, `lately` how many other rounds took it within the last day, `over_budget` why the round's privacy
    leaves the device out ("" when it does not)."""

    device_id: str
    digest: str
    flaw: str = ""
    flaw_text: str = ""
    round_id: str = ""
    base: str = ""
    length: int = 0
    mismatch: str = ""
    group: str = ""
    lately: int = 0
    over_budget: str = ""


class OpenRound(msgspec.Struct, frozen=True, kw_only=True):
    """What admission needs to know of the round. `admitted` maps device to digest, `groups` attestation group to its
    number of contributions; `per_device` and `per_group` are the quotas (0: none). Times are Unix seconds."""

    round_id: str
    base: str
    length: int
    collecting: bool
    deadline: float
    contributions_max: int
    admitted: Mapping[str, str]
    per_device: int = 0
    per_group: int = 0
    groups: Mapping[str, int] = {}


class Refusal(msgspec.Struct, frozen=True):
    """One of `REASONS`, and the sentence for the device."""

    reason: str
    text: str


def refuse(offered: Offered, round_: OpenRound | None, now: float) -> Refusal | None:
    """Why `offered` is not admitted to the model's newest round (None: there is none), or None when it is.

    The caller appends an admitted contribution unless `already_in` holds.
    """
    if offered.flaw:
        return Refusal(offered.flaw, offered.flaw_text)
    if round_ is None or offered.round_id != round_.round_id:
        wanted = "no round is open" if round_ is None else f"the round is {round_.round_id}"
        return Refusal("wrong round", f"contribution to {offered.round_id[:200]!r}: {wanted}")
    if offered.base != round_.base:
        return Refusal("wrong base", f"trained on {offered.base[:16]!r}…, the round is on {round_.base[:16]}…")
    if offered.length != round_.length:
        return Refusal("wrong length", f"expected {round_.length} parameters, found {offered.length}")
    if offered.mismatch:
        return Refusal("malformed", offered.mismatch)
    before = round_.admitted.get(offered.device_id)
    if before == offered.digest:
        return None
    if before is not None:
        return Refusal("duplicate", "another contribution of this device is in the round already")
    if not round_.collecting or now > round_.deadline:
        return Refusal("late", f"round {round_.round_id} no longer takes contributions")
    if len(round_.admitted) >= round_.contributions_max:
        return Refusal(OVER_QUOTA, f"round {round_.round_id} has its {round_.contributions_max} contributions")
    if 0 < round_.per_device <= offered.lately:
        return over_quota_of(offered.lately, round_.per_device)
    if 0 < round_.per_group <= round_.groups.get(offered.group, 0):
        return Refusal(
            OVER_QUOTA, f"round {round_.round_id} has its {round_.per_group} contributions of group {offered.group!r}"
        )
    if offered.over_budget:
        return Refusal(OVER_BUDGET, offered.over_budget)
    return None


def over_quota_of(lately: int, per_device: int) -> Refusal:
    """The refusal of a device that `lately` rounds took within a day."""
    return Refusal(OVER_QUOTA, f"{lately} rounds took this device within a day, {per_device} may")


def already_in(offered: Offered, round_: OpenRound) -> bool:
    """Whether these very bytes were admitted before: acknowledge again, append nothing."""
    return round_.admitted.get(offered.device_id) == offered.digest
