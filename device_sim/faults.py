"""Devices that lie in federated rounds: what they send instead of what they learned.

A transform is a pure function of an honest update and a generator. `tampered` puts one between a device's training and
whatever builds its contribution, and can show every raw update to an observer: the yardstick that a plain average of
the same round needs. Outside a simulation nothing observes a raw update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from model_delta.errors import Malformed
from model_delta.task import RoundTask

Vector = npt.NDArray[np.float32]
Transform = Callable[[Vector, np.random.Generator], Vector]
Contribute = Callable[[Vector, RoundTask], bytes]
Observe = Callable[[str, str, Vector, bool], None]
"""Called with round id, device id, the update as it is sent, and whether the device is hostile."""


def sign_flip(update: Vector, rng: np.random.Generator) -> Vector:
    """u -> -u: passes every test of size."""
    return -update


def scaled(factor: float) -> Transform:
    """u -> -factor * u: a few devices outweigh a plain average."""

    def transform(update: Vector, rng: np.random.Generator) -> Vector:
        return np.asarray(update * np.float32(-factor), dtype=np.float32)

    return transform


def noise(factor: float) -> Transform:
    """u -> Gaussian noise of `factor` times the norm of u."""

    def transform(update: Vector, rng: np.random.Generator) -> Vector:
        drawn = rng.standard_normal(len(update)).astype(np.float32)
        return _with_norm(drawn, factor * float(np.linalg.norm(update)))

    return transform


def collusion(factor: float, shared_seed: int) -> Transform:
    """u -> one random direction that all colluders share, `factor` times the norm of u."""

    def transform(update: Vector, rng: np.random.Generator) -> Vector:
        direction = np.random.default_rng(shared_seed).standard_normal(len(update)).astype(np.float32)
        return _with_norm(direction, factor * float(np.linalg.norm(update)))

    return transform


def _with_norm(vector: Vector, norm: float) -> Vector:
    length = float(np.linalg.norm(vector))
    return np.asarray(vector * (norm / length if length else 0.0), dtype=np.float32)


ATTACKS: Mapping[str, Callable[[float, int], Transform]] = {
    "sign-flip": lambda strength, seed: sign_flip,
    "scaled": lambda strength, seed: scaled(strength),
    "noise": lambda strength, seed: noise(strength),
    "collusion": lambda strength, seed: collusion(strength, seed),
}


def attack(name: str, strength: float, seed: int) -> Transform:
    """The transform called `name`. `strength` multiplies the update's norm; `seed` is what colluders share.

    Raises Malformed for an unknown name.
    """
    if name not in ATTACKS:
        raise Malformed(f"attack: expected one of {', '.join(ATTACKS)}, found {name!r}")
    return ATTACKS[name](strength, seed)


def tampered(
    contribute: Contribute,
    device_id: str,
    rng: np.random.Generator,
    transform: Transform | None = None,
    observe: Observe | None = None,
) -> Contribute:
    """`contribute`, with the update replaced by `transform` (None: an honest device) and shown to `observe`."""

    def tampered_contribute(update: Vector, task: RoundTask) -> bytes:
        sent = update if transform is None else transform(update, rng)
        if observe is not None:
            observe(task.round_id, device_id, sent, transform is not None)
        return contribute(sent, task)

    return tampered_contribute


class ObservedUpdates:
    """Raw updates of a simulated fleet in a folder, for the comparison with a plain average.

    One file an update, `<folder>/<round>/<device>.<honest|hostile>.npy`, complete or absent; several fleet processes
    may write into the same folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, round_id: str, device_id: str, update: Vector, hostile: bool) -> None:
        """Keep one update: the `observe` of `tampered`."""
        folder = self._folder / _plain(round_id)
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"{_plain(device_id)}.{'hostile' if hostile else 'honest'}.npy"
        unfinished = target.with_suffix(".tmp")
        with unfinished.open("wb") as file:
            np.save(file, update)
        unfinished.replace(target)

    def read(self, round_id: str) -> Iterator[tuple[str, Vector, bool]]:
        """Device id, update, and whether it is hostile, for every update of a round, in order of device id."""
        folder = self._folder / _plain(round_id)
        for path in sorted(folder.glob("*.npy")):
            device_id, kind = path.name.removesuffix(".npy").rsplit(".", 1)
            yield device_id, np.load(path, allow_pickle=False).astype(np.float32), kind == "hostile"


def plain_average(updates: list[Vector]) -> Vector:
    """The unweighted mean of raw updates: what FedAvg with equal weights (McMahan et al., 2017) would have applied."""
    if not updates:
        raise Malformed("plain average: no updates were observed in this round")
    return np.asarray(np.mean(np.stack(updates), axis=0, dtype=np.float64), dtype=np.float32)


def _plain(name: str) -> str:
    if not name or not all(letter.isalnum() or letter in "-_" for letter in name):
        raise Malformed(f"observed update: expected a name of letters, digits, - and _, found {name[:80]!r}")
    return name
