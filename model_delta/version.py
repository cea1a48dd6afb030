"""Version vectors: which version contains which.

A version vector counts the releases each region has made that a version contains (Parker et al., Detection of Mutual
Inconsistency in Distributed Systems, 1983). Two versions neither of which contains the other were made apart and have
to be merged. Under `merge` the vectors are a join semilattice: order, grouping and repetition do not matter. A region
that is not named counts 0.

A *dot* `region:counter` names one release: the event by which a region's count grew (Preguiça et al., Dotted Version
Vectors, 2010). A region's coordinator publishes one release after the other, so its dots need no more than the vector.
Releases that two coordinators made apart are *siblings*. Everybody who knows the same releases finds the same siblings
and the same winner, in whatever order they heard of them; joining publishes a new dot that contains them all:

1. where all of them changed only the weights of one common parent, their updates are added (`fl_coordinator.joining`);
2. else the sibling of the higher counter wins, between equal counters the one of the later region name, and the others
   are recorded as parents.

A device that trains for itself makes a *private branch*: its base's vector and one dot `device:NAME`. Devices are
readers: a private branch is never published and never merged. It ends when the device takes its next release, which
replaces it; what it learned comes back only as a contribution to a round.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from model_delta.errors import Malformed

_PRIVATE = "device:"


class Dot(NamedTuple):
    """One release by its maker's count, from 1. `str` writes it as `region:counter`."""

    region: str
    counter: int

    def __str__(self) -> str:
        return f"{self.region}:{self.counter}"


def dominates(vector: Mapping[str, int], other: Mapping[str, int]) -> bool:
    """Whether `vector` contains everything in `other`; equal vectors dominate each other."""
    return all(vector.get(region, 0) >= count for region, count in other.items())


def concurrent(vector: Mapping[str, int], other: Mapping[str, int]) -> bool:
    """Whether the two were made apart: neither contains the other."""
    return not dominates(vector, other) and not dominates(other, vector)


def merge(vector: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    """The smallest vector that dominates both; zeros are left out."""
    joined = {region: max(vector.get(region, 0), other.get(region, 0)) for region in vector.keys() | other.keys()}
    return {region: count for region, count in sorted(joined.items()) if count > 0}


def increment(vector: Mapping[str, int], region: str) -> dict[str, int]:
    """The version that `region` makes next out of `vector`."""
    return merge(vector, {region: vector.get(region, 0) + 1})


def dot_of(vector: Mapping[str, int], parents: Iterable[Mapping[str, int]]) -> Dot:
    """The dot that names the release `vector`, made from `parents`. Raises Malformed unless exactly one region's count
    grew: a release is one event of one region."""
    before: Mapping[str, int] = {}
    for parent in parents:
        before = merge(before, parent)
    grown = [region for region, count in sorted(vector.items()) if count > before.get(region, 0)]
    if len(grown) != 1 or not dominates(vector, before):
        raise Malformed(
            f"version {show(vector)}: expected one region's count to grow from {show(before)}, "
            f"found {', '.join(grown) or 'none'}"
        )
    return Dot(grown[0], vector[grown[0]])


def siblings(versions: Mapping[str, Mapping[str, int]]) -> tuple[str, ...]:
    """The names of those versions that no other one contains, sorted; one name where all is joined.

    Of equal vectors the first name stands for all. Adding versions in any order and more than once gives the same.
    """
    names = sorted(versions)
    return tuple(
        name
        for position, name in enumerate(names)
        if not any(
            dominates(versions[other], versions[name])
            and (not dominates(versions[name], versions[other]) or names.index(other) < position)
            for other in names
            if other != name
        )
    )


def winner(dots: Mapping[str, Dot]) -> str:
    """Which of some siblings, given by name with their dots, wins: the highest counter, then the last region name.

    Raises Malformed when there are none.
    """
    if not dots:
        raise Malformed("join: expected at least one version, found none")
    return max(dots, key=lambda name: (dots[name].counter, dots[name].region, name))


def joined(vectors: Iterable[Mapping[str, int]], region: str, counter_min: int = 0) -> dict[str, int]:
    """The vector of the release by which `region` joins `vectors`: it contains all of them and one dot more. The new
    counter is above `counter_min` too, the region's highest so far."""
    together: dict[str, int] = {}
    for vector in vectors:
        together = merge(together, vector)
    return increment(merge(together, {region: counter_min}), region)


def private_branch(base: Mapping[str, int], device: str) -> dict[str, int]:
    """The vector of what `device` made for itself out of version `base`."""
    return merge(base, {f"{_PRIVATE}{device}": 1})


def is_private(vector: Mapping[str, int]) -> bool:
    """Whether a vector is a device's own branch, which nobody publishes."""
    return any(region.startswith(_PRIVATE) and count > 0 for region, count in vector.items())


def show(vector: Mapping[str, int]) -> str:
    """For people: `ap-south:1+eu-west:3`; an empty vector is `0`."""
    return "+".join(f"{region}:{count}" for region, count in sorted(vector.items()) if count > 0) or "0"
