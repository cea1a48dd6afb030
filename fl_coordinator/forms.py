"""In which form a version is released: as float32, or with int8 weights; and why.

int8 is worth it where it measures faster, or smaller enough and hardly slower. What is enough depends on the class of
the devices (`quantization.Worth`: what a byte and a microsecond are worth there), while a version is one file for all
of them. So each class is asked, and the form that is right for more of the enrolled devices is released; in a fleet
without devices each class that is known counts once. Where as many want the one as the other it is int8, which every
device runs and which costs the region less to carry. What each class would have wanted stays in the record.

A version keeps its parent's form unless somebody asks for another: a patch between the forms is as large as the file,
and a decision by the clock that is close would fall differently from version to version.

Pure: what is measured comes in as figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, cast, get_args

import msgspec
import numpy as np

from model_delta.errors import Malformed
from model_delta.patch.fidelity import Carried
from model_delta.patch.quantization import Measured, Worth, choose

Asked = Literal["", "auto", "int8", "none"]
"""What the publisher wants: the parent's form (without one, as `auto`), what measures better, int8, or float32."""


class ClassChoice(msgspec.Struct, frozen=True):
    """What would be right for one class of devices, of which so many are enrolled."""

    devices: int
    int8: bool
    reason: str


class Form(msgspec.Struct, frozen=True, kw_only=True):
    """The form of a version and what it was decided by; recorded with the release.

    `measured`: bytes of the file, and median microseconds of one row on the coordinator's machine, of float32 and int8
    (empty where nothing was measured; a latency of None where the model did not answer). `distance` and `carried` of
    the int8 file, beside those of a fresh quantization, are what `fidelity` looks at (None without a parent).
    `fresh_because`: why it does not have its parent's scales though there is a parent. `untried`: why it came without a
    golden case, so that devices judge it by their own answers alone ("" with one).
    """

    int8: bool
    reason: str
    measured: dict[str, tuple[int, float | None]] = {}
    classes: dict[str, ClassChoice] = {}
    distance: float | None = None
    distance_fresh: float | None = None
    carried: Carried | None = None
    fresh_because: tuple[str, ...] = ()
    untried: str = ""


def asked(text: str) -> Asked:
    """The text as one of the things to ask for. Raises Malformed."""
    if text not in get_args(Asked):
        raise Malformed(f"quantize: expected auto, int8 or none, found {text[:32]!r}")
    return cast(Asked, text)


def decide(
    int8: Measured, float32: Measured, worth: Mapping[str, Worth], devices: Mapping[str, int]
) -> tuple[bool, str, dict[str, ClassChoice]]:
    """Whether int8 is released, the rule's outcome in words, and what each class wants.

    `worth` by device class; a class that is not in it has the usual one. `devices`: how many are enrolled, by class."""
    known = {name: count for name, count in devices.items() if count > 0} or dict.fromkeys(worth or ("",), 0)
    classes: dict[str, ClassChoice] = {}
    for name in sorted(known):
        choice = choose(int8, float32, worth.get(name, Worth()))
        classes[name] = ClassChoice(known[name], choice.int8, choice.reason)
    weights = {name: max(1, choice.devices) for name, choice in classes.items()}
    for_int8 = sum(weights[name] for name, choice in classes.items() if choice.int8)
    total = sum(weights.values())
    what = "devices" if any(choice.devices for choice in classes.values()) else "device classes"
    return 2 * for_int8 >= total, f"int8 is right for {for_int8} of {total} {what}", classes


def recorded(found: Measured) -> tuple[int, float | None]:
    """Figures as they are kept: a number, or None."""
    return found.size_bytes, round(found.latency_us, 3) if np.isfinite(found.latency_us) else None
