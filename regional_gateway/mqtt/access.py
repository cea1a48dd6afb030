"""Who may say and hear what on an MQTT 5 broker: topics, filters, and the rules by role.

Pure functions of names; both brokers follow them (`mosquitto` writes them down as an access list). Sections named below
are those of MQTT Version 5.0 (OASIS Standard).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec

from model_delta.topics import ROOT

SHARED_PREFIX = "$share"
LEVELS_MAX = 64

Action = Literal["publish", "subscribe"]
Acl = Callable[[str, Action, str], bool]
"""`acl(identity, action, topic or filter)`: may this identity do this?"""


# --- topics and filters (section 4.7) -------------------------------------------------------------------------------


def valid_topic(topic: str) -> bool:
    """May a message be published to `topic`? No wildcard, no NUL, at most LEVELS_MAX levels."""
    return len(topic) > 0 and not any(c in topic for c in "+#\0") and topic.count("/") < LEVELS_MAX


def valid_filter(pattern: str) -> bool:
    """Is `pattern` a well-formed topic filter? `+` and `#` fill a whole level, `#` only the last (section 4.7.1)."""
    if not pattern or "\0" in pattern or pattern.count("/") >= LEVELS_MAX:
        return False
    levels = pattern.split("/")
    for position, level in enumerate(levels):
        if ("+" in level or "#" in level) and len(level) > 1:
            return False
        if level == "#" and position != len(levels) - 1:
            return False
    return True


def matches(pattern: str, topic: str) -> bool:
    """Does the filter `pattern` match `topic`? A leading wildcard never matches a topic that starts with `$`."""
    return covers(pattern, topic) if valid_topic(topic) else False


def covers(pattern: str, other: str) -> bool:
    """Does the filter `pattern` match every topic that the filter (or topic) `other` matches?

    Decides whether a subscription stays inside what is allowed, so it errs to False.
    """
    wanted, found = pattern.split("/"), other.split("/")
    if found[0].startswith("$") and wanted[0] in ("+", "#"):
        return False
    for position, level in enumerate(wanted):
        if level == "#":
            return True
        if position == len(found) or found[position] == "#":
            return False
        if level not in ("+", found[position]):
            return False
    return len(found) == len(wanted)


# --- who may do what ------------------------------------------------------------------------------------------------


class AccessRules(msgspec.Struct, frozen=True):
    """Filters by role; `%u` stands for the identity. `platform` names may do everything below `platform_filter`. Every
    other identity may write and read only its own branch and read what is for all. A name that begins with
    `region_prefix` is a region's (`%r`: the rest of the name): beside its own branch it hears what devices ask of this
    region, and may answer, and retains this region's copy of what announces a round; it can neither read nor forge a
    device's reports, keys, contributions, or a plan, nor touch what another region hears."""

    write: tuple[str, ...] = (f"{ROOT}/dev/%u/up/#",)
    read: tuple[str, ...] = (f"{ROOT}/dev/%u/down/#", f"{ROOT}/cfg/#")
    platform: tuple[str, ...] = ("coordinator",)
    platform_filter: str = f"{ROOT}/#"
    region_prefix: str = "gateway-"
    region_write: tuple[str, ...] = (
        f"{ROOT}/dev/+/down/res",
        f"{ROOT}/dev/+/down/trust",
        f"{ROOT}/cfg/+/round/+/%r",
    )
    region_read: tuple[str, ...] = (f"{ROOT}/dev/+/up/req/%r", f"{ROOT}/dev/+/up/trust/%r")

    def region_of(self, identity: str) -> str:
        """The region whose gateway `identity` is; "" when it is none."""
        return identity.removeprefix(self.region_prefix) if identity.startswith(self.region_prefix) else ""


FLEET_RULES = AccessRules()


def valid_identity(identity: str) -> bool:
    """May `identity` stand in a topic? A name with a wildcard or a slash would widen the filters made from it."""
    return 0 < len(identity) <= 128 and identity.isprintable() and not any(c in identity for c in "+#/$% ")


def access(rules: AccessRules) -> Acl:
    """The access callable for `rules`. It errs to False: a filter is allowed only if one rule covers all of it."""

    def allowed(identity: str, action: Action, topic: str) -> bool:
        if not valid_identity(identity):
            return False
        if identity in rules.platform:
            return covers(rules.platform_filter, topic)
        patterns = rules.write if action == "publish" else rules.read
        if region := rules.region_of(identity):
            patterns += rules.region_write if action == "publish" else rules.region_read
            return any(covers(pattern.replace("%u", identity).replace("%r", region), topic) for pattern in patterns)
        return any(covers(pattern.replace("%u", identity), topic) for pattern in patterns)

    return allowed
