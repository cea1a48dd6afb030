"""Who is in a fleet: devices of four classes with their traits, merchants and compute power, and who of them lies.

A population is a pure function of its arguments: the same seed names the same devices, and growing the count keeps the
devices that were there (each draws from its own stream). Device i is terminal i of the payments generator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from device_sim.payments import CATEGORY_NAMES
from model_delta.plan import DeviceTraits


@dataclass(frozen=True)
class DeviceClass:
    """`share` of the fleet; `compute` is time per inference relative to a POS terminal; `merchants` weighs the
    categories (order of CATEGORY_NAMES) where such devices stand; `trains`: it has the memory for local training."""

    share: float
    compute: float
    merchants: tuple[float, ...]
    trains: bool = True


CLASSES: Mapping[str, DeviceClass] = {
    "pos": DeviceClass(0.5, 1.0, (0.30, 0.05, 0.30, 0.20, 0.10, 0.05)),
    "phone": DeviceClass(0.25, 0.4, (0.15, 0.00, 0.45, 0.10, 0.25, 0.05)),
    "pi": DeviceClass(0.15, 0.6, (0.15, 0.40, 0.05, 0.10, 0.10, 0.20)),
    "mcu": DeviceClass(0.1, 40.0, (0.00, 0.25, 0.00, 0.00, 0.00, 0.75), trains=False),
}
"""The classes of the fleet. Compute factors are orders of magnitude (A53 1.3 GHz, phone SoC, A72, Cortex-M7)."""


@dataclass(frozen=True)
class VirtualDevice:
    """One device: who it is, where it stands, how fast it is, and whether it lies in federated rounds."""

    index: int
    traits: DeviceTraits
    merchant: str
    compute: float
    hostile: bool = False

    @property
    def trains(self) -> bool:
        """Whether it has the memory for local training."""
        return CLASSES[self.traits.device_class].trains

    @property
    def device_id(self) -> str:
        """The device's name, which is also its certificate's common name."""
        return self.traits.device_id


def population(
    count: int,
    seed: int,
    regions: Sequence[str] = ("eu-west", "ap-south"),
    tenant: str = "acme",
    hostile_share: float = 0.0,
) -> tuple[VirtualDevice, ...]:
    """`count` devices in a fixed order, classes dealt by their shares, regions in turn within each class.

    `round(count * hostile_share)` of the devices that can train are hostile. Raises ValueError for an empty fleet, no
    region, or a share outside [0, 0.5).
    """
    if count < 1 or not regions:
        raise ValueError(f"population: expected at least one device and one region, found {count} and {len(regions)}")
    if not 0.0 <= hostile_share < 0.5:
        raise ValueError(f"population: hostile share must lie in [0, 0.5), found {hostile_share}")
    numbers = dict.fromkeys(CLASSES, 0)
    devices = []
    for index in range(count):
        # The class furthest behind its share comes next: any prefix of the fleet holds the classes in proportion.
        name = max(CLASSES, key=lambda c: CLASSES[c].share * (index + 1) - numbers[c])
        numbers[name] += 1
        rng = np.random.default_rng([seed, index])
        merchant = CATEGORY_NAMES[rng.choice(len(CATEGORY_NAMES), p=CLASSES[name].merchants)]
        device_id = f"{name}-{numbers[name]:04d}"
        region = regions[(numbers[name] - 1) % len(regions)]
        traits = DeviceTraits(device_id, tenant, name, region, {"merchant": merchant})
        compute = CLASSES[name].compute * float(rng.lognormal(0.0, 0.2))
        devices.append(VirtualDevice(index, traits, merchant, compute))
    hostile = _pick_hostile(devices, round(count * hostile_share), seed)
    return tuple(VirtualDevice(d.index, d.traits, d.merchant, d.compute, d.index in hostile) for d in devices)


def terminals_of(devices: Sequence[VirtualDevice]) -> tuple[str, ...]:
    """Merchant category of each device's terminal, in order: what `PaymentSpec.categories` wants."""
    return tuple(device.merchant for device in devices)


def _pick_hostile(devices: Sequence[VirtualDevice], count: int, seed: int) -> frozenset[int]:
    able = [device.index for device in devices if CLASSES[device.traits.device_class].trains]
    rng = np.random.default_rng([seed, 0x4057])
    return frozenset(int(index) for index in rng.permutation(able)[:count])
