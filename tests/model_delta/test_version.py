"""Version vectors: the laws of a join semilattice and of its order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_delta.version import concurrent, dominates, increment, merge, show

REGIONS = ("eu-west", "ap-south", "us-east")
vectors = st.dictionaries(st.sampled_from(REGIONS), st.integers(0, 4))


def canonical(vector: dict[str, int]) -> dict[str, int]:
    return {region: count for region, count in vector.items() if count}


@given(vectors, vectors, vectors)
def test_merge_is_commutative_associative_and_idempotent(
    a: dict[str, int], b: dict[str, int], c: dict[str, int]
) -> None:
    assert merge(a, b) == merge(b, a)
    assert merge(merge(a, b), c) == merge(a, merge(b, c))
    assert merge(a, a) == canonical(a) == merge(a, {})


@given(vectors, vectors, vectors)
def test_merge_is_the_least_upper_bound(a: dict[str, int], b: dict[str, int], c: dict[str, int]) -> None:
    joined = merge(a, b)
    assert dominates(joined, a)
    assert dominates(joined, b)
    if dominates(c, a) and dominates(c, b):
        assert dominates(c, joined)


@given(vectors, vectors, vectors)
def test_dominates_is_a_partial_order(a: dict[str, int], b: dict[str, int], c: dict[str, int]) -> None:
    assert dominates(a, a)
    if dominates(a, b) and dominates(b, c):
        assert dominates(a, c)
    assert (dominates(a, b) and dominates(b, a)) == (canonical(a) == canonical(b))
    assert concurrent(a, b) == concurrent(b, a) == (not dominates(a, b) and not dominates(b, a))


@given(vectors, st.sampled_from(REGIONS))
def test_an_increment_is_strictly_newer(a: dict[str, int], region: str) -> None:
    newer = increment(a, region)
    assert dominates(newer, a)
    assert not dominates(a, newer)
    assert sum(newer.values()) == sum(a.values()) + 1


@given(vectors)
def test_two_regions_that_release_apart_are_concurrent_until_merged(a: dict[str, int]) -> None:
    first, second = increment(a, "eu-west"), increment(a, "ap-south")
    assert concurrent(first, second)
    assert not concurrent(merge(first, second), second)


@pytest.mark.parametrize(
    ("vector", "text"),
    [
        ({}, "0"),
        ({"eu-west": 0}, "0"),
        ({"eu-west": 3}, "eu-west:3"),
        ({"eu-west": 3, "ap-south": 1}, "ap-south:1+eu-west:3"),
    ],
)
def test_shown(vector: dict[str, int], text: str) -> None:
    assert show(vector) == text
