"""Version vectors: which version contains which.

A version vector counts the releases each region has made that a version contains (Parker et al., Detection of Mutual
Inconsistency in Distributed Systems, 1983). Two versions neither of which contains the other were made apart and have
to be merged. Under `merge` the vectors are a join semilattice: order, grouping and repetition do not matter. A region
that is not named counts 0.
"""

from __future__ import annotations

from collections.abc import Mapping


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


def show(vector: Mapping[str, int]) -> str:
    """For people: `ap-south:1+eu-west:3`; an empty vector is `0`."""
    return "+".join(f"{region}:{count}" for region, count in sorted(vector.items()) if count > 0) or "0"
