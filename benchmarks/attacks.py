"""What hostile devices send: published attacks, attacks that know the defence, and backdoors.

All attackers collude and see every honest update of the round. `own` are the updates they would have sent honestly.
A poisoning attack (label flip, backdoors) changes the rows that a hostile device trains on, in `robustness`; everything
else is a function here. The norm bound holds for attackers too: whatever is longer is clipped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

SEARCH_PERIOD = 10


@dataclass
class Scene:
    """One round as the attackers see it: `honest` float64[h, d], `own` float64[f, d], the round's number out of
    `rounds`, `weigh` (their copy of the rule with its memory: updates [n, d], hostile ones first, to weights [n]), and
    `notes`, which they keep from round to round."""

    honest: Floats
    own: Floats
    number: int
    rounds: int
    weigh: Callable[[Floats], Floats]
    rng: np.random.Generator
    notes: dict[str, object] = field(default_factory=dict)

    @property
    def hostile(self) -> int:
        """Number of attackers."""
        return len(self.own)

    @property
    def mean(self) -> Floats:
        """Mean of the honest updates, float64[d]."""
        return np.asarray(self.honest.mean(axis=0), dtype=np.float64)

    @property
    def norm(self) -> float:
        """Median norm of the honest updates."""
        return float(np.median(np.linalg.norm(self.honest, axis=1)))

    def same(self, vector: Floats) -> Floats:
        """Every attacker sends `vector`."""
        return np.asarray(np.repeat(vector[None, :], self.hostile, axis=0), dtype=np.float64)


def sign_flip(scene: Scene) -> Floats:
    """The opposite of what was learned."""
    return -scene.own


def scaling(scene: Scene) -> Floats:
    """The opposite, five times as long."""
    return -5 * scene.own


def gaussian(scene: Scene) -> Floats:
    """Noise of three times a typical norm."""
    noise = scene.rng.normal(size=scene.own.shape)
    return np.asarray(3 * scene.norm * noise / np.linalg.norm(noise, axis=1, keepdims=True), dtype=np.float64)


def ipm(strength: float) -> Callable[[Scene], Floats]:
    """Inner product manipulation: -strength times the honest mean (Xie, Koyejo and Gupta, 2019)."""
    return lambda scene: scene.same(-strength * scene.mean)


def ipm_hidden(scene: Scene) -> Floats:
    """IPM of strength 0.5 with the attackers' own deviations added: no two send the same, each looks like a device."""
    return np.asarray(scene.own - scene.own.mean(axis=0) - 0.5 * scene.mean)


def alie(z: float | None) -> Callable[[Scene], Floats]:
    """A little is enough: z standard deviations off the mean, z by formula if None (Baruch et al., 2019)."""

    def act(scene: Scene) -> Floats:
        count = len(scene.honest) + scene.hostile
        supporters = count // 2 + 1 - scene.hostile
        depth = NormalDist().inv_cdf((count - scene.hostile - supporters) / (count - scene.hostile)) if z is None else z
        return scene.same(scene.mean - depth * scene.honest.std(axis=0))

    return act


def _spread_out(scene: Scene, inside: Callable[[Floats], bool]) -> Floats:
    """mean - gamma * direction with the largest gamma that is `inside`, by bisection (Shejwalkar and Houmansadr)."""
    direction = scene.honest.std(axis=0)
    direction = direction * (scene.norm / max(float(np.linalg.norm(direction)), 1e-12))
    low, high = 0.0, 10.0
    for _ in range(14):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(scene.mean - middle * direction) else (low, middle)
    return scene.same(scene.mean - low * direction)


def _distances(scene: Scene) -> tuple[Floats, Floats, Floats]:
    norms = np.einsum("ij,ij->i", scene.honest, scene.honest)
    return norms, norms[:, None] + norms[None, :] - 2 * scene.honest @ scene.honest.T, scene.honest


def min_max(scene: Scene) -> Floats:
    """As far as the two most distant honest updates are from each other (Shejwalkar and Houmansadr, NDSS 2021)."""
    norms, squared, honest = _distances(scene)
    bound = squared.max()
    return _spread_out(scene, lambda v: bool((norms + v @ v - 2 * honest @ v).max() <= bound))


def min_sum(scene: Scene) -> Floats:
    """As far in sum as the most distant honest update is from all others (Shejwalkar and Houmansadr, NDSS 2021)."""
    norms, squared, honest = _distances(scene)
    bound = squared.sum(axis=1).max()
    return _spread_out(scene, lambda v: bool((norms + v @ v - 2 * honest @ v).sum() <= bound))


def mimic(scene: Scene) -> Floats:
    """All repeat one honest device, so that its data count too much (Karimireddy, He and Jaggi, 2022)."""
    chosen = scene.notes.setdefault("mimic", _most_extreme(scene))
    assert isinstance(chosen, int)
    return scene.same(scene.honest[chosen])


def _most_extreme(scene: Scene) -> int:
    centred = scene.honest - scene.mean
    _, vectors = np.linalg.eigh(centred @ centred.T)
    return int(np.abs(vectors[:, -1]).argmax())


def norm_edge(scene: Scene) -> Floats:
    """Against the honest mean, inside the 3-sigma norm test and not above the median norm that clipping allows."""
    norms = np.linalg.norm(scene.honest, axis=1)
    edge = min(float(norms.mean() + 2.9 * norms.std()), float(np.median(norms)))
    return scene.same(-edge * scene.mean / max(float(np.linalg.norm(scene.mean)), 1e-12))


def dnc_aware(scene: Scene) -> Floats:
    """Orthogonal to the top singular direction of the honest updates, scatter kept below it, private residuals."""
    centred = scene.honest - scene.mean
    values, vectors = np.linalg.eigh(centred @ centred.T)
    top = centred.T @ vectors[:, -1] / np.sqrt(max(float(values[-1]), 1e-24))
    push = scene.mean - (scene.mean @ top) * top
    push /= max(float(np.linalg.norm(push)), 1e-12)
    # f (1 - f/n) a^2 is what the attackers add along `push`; 0.8 of the top eigenvalue keeps them out of its sight.
    share = scene.hostile / (scene.hostile + len(scene.honest))
    reach = np.sqrt(0.8 * float(values[-1]) / (scene.hostile * (1 - share)))
    residual = scene.own - scene.own.mean(axis=0)
    return np.asarray(scene.mean - reach * push + residual)


def search(scene: Scene) -> Floats:
    """White box: 40 choices of direction, size and spread tried on the rule itself; the most harmful is used for the
    next ten rounds. Harm: the part of the aggregate that points along the honest mean."""
    if scene.number % SEARCH_PERIOD == 0 or "choice" not in scene.notes:
        norm = max(float(scene.mean @ scene.mean), 1e-24)
        best, choice = np.inf, (0, 0.5, 0.0)
        for direction in range(4):
            for size in (0.3, 0.6, 1.0, 1.5, 3.0):
                for spread in (0.0, 1.0):
                    updates = np.concatenate([_crafted(scene, direction, size, spread), scene.honest])
                    weights = scene.weigh(updates)
                    left = float(weights @ (updates @ scene.mean)) / norm
                    if left < best:
                        best, choice = left, (direction, size, spread)
        scene.notes["choice"] = choice
    direction, size, spread = scene.notes["choice"]  # type: ignore[misc]
    return _crafted(scene, direction, size, spread)


def _crafted(scene: Scene, direction: int, size: float, spread: float) -> Floats:
    """Direction 0: against the mean; 1: against it, orthogonal to the top singular direction; 2: against the signs of
    the mean, scaled by the spread; 3: from the mean along minus the standard deviation. `size` in median norms."""
    mean = scene.mean
    if direction == 1:
        centred = scene.honest - mean
        _, vectors = np.linalg.eigh(centred @ centred.T)
        top = centred.T @ vectors[:, -1]
        top /= max(float(np.linalg.norm(top)), 1e-12)
        push = mean - (mean @ top) * top
    elif direction == 2:
        push = np.sign(mean) * scene.honest.std(axis=0)
    elif direction == 3:
        push = scene.honest.std(axis=0)
    else:
        push = mean
    push = push / max(float(np.linalg.norm(push)), 1e-12)
    base = mean if direction == 3 else 0.0
    residual = spread * (scene.own - scene.own.mean(axis=0))
    return np.asarray(base - size * scene.norm * push + residual)


def sleeper(scene: Scene) -> Floats:
    """Honest for half of the rounds, to earn a good name, then at the edge of the norm."""
    return scene.own if 2 * scene.number < scene.rounds else norm_edge(scene)


UNTARGETED: dict[str, Callable[[Scene], Floats]] = {
    "label flip": lambda scene: scene.own,
    "sign flip": sign_flip,
    "scaling x5": scaling,
    "gaussian": gaussian,
    "IPM 0.5": ipm(0.5),
    "IPM hidden": ipm_hidden,
    "IPM 100": ipm(100.0),
    "ALIE": alie(None),
    "ALIE 1.5": alie(1.5),
    "Min-Max": min_max,
    "Min-Sum": min_sum,
    "mimic": mimic,
    "norm-edge": norm_edge,
    "DnC-aware": dnc_aware,
    "search": search,
    "sleeper": sleeper,
}
BACKDOORS: dict[str, Callable[[Scene], Floats]] = {
    "quiet backdoor": lambda scene: scene.own,
    "scaled backdoor": lambda scene: 5 * scene.own,
}
