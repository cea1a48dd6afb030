"""Version vectors: the laws of a join semilattice and of its order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_delta.errors import Malformed
from model_delta.version import (
    Dot,
    concurrent,
    dominates,
    dot_of,
    increment,
    is_private,
    joined,
    merge,
    private_branch,
    show,
    siblings,
    winner,
)

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


# Dots, siblings and their join.

named = st.dictionaries(st.text("abcdef", min_size=1, max_size=3), vectors, max_size=6)


def heads(*known: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """What somebody who heard of all these versions still has to join."""
    every = {name: vector for versions in known for name, vector in versions.items()}
    return {name: every[name] for name in siblings(every)}


@st.composite
def histories(draw: st.DrawFn, count: int = 3) -> list[dict[str, dict[str, int]]]:
    """What `count` people have heard of the same releases: a name is one release everywhere."""
    every = draw(named)
    return [{name: every[name] for name in every if draw(st.booleans())} for _ in range(count)]


@given(histories())
def test_hearing_of_versions_is_commutative_associative_and_idempotent(known: list[dict[str, dict[str, int]]]) -> None:
    a, b, c = known
    assert heads(a, b) == heads(b, a)
    assert heads(heads(a, b), c) == heads(a, heads(b, c)) == heads(a, b, c)
    assert heads(a, a) == heads(a) == heads(heads(a))


@given(histories(2))
def test_hearing_of_more_never_goes_back(known: list[dict[str, dict[str, int]]]) -> None:
    """Monotone: every version that was ever heard of is contained in a sibling."""
    a, b = known
    together = heads(a, b)
    for version in (*a.values(), *b.values()):
        assert any(dominates(head, version) for head in together.values())
    assert all(concurrent(x, y) for n, x in together.items() for m, y in together.items() if n != m)


@given(named.filter(bool), st.sampled_from(REGIONS), st.integers(0, 5))
def test_a_join_ends_all_siblings_and_is_named_by_a_new_dot(
    versions: dict[str, dict[str, int]], region: str, counter: int
) -> None:
    vector = joined(versions.values(), region, counter)
    assert siblings({**versions, "join": vector}) == ("join",)
    dot = dot_of(vector, versions.values())
    assert dot.region == region
    assert dot.counter > counter
    assert vector[region] == dot.counter
    assert all(other.get(region, 0) < dot.counter for other in versions.values())


@given(st.permutations(["x", "y", "z"]))
def test_the_winner_is_the_same_whoever_asks(order: list[str]) -> None:
    dots = {"x": Dot("eu-west", 2), "y": Dot("ap-south", 3), "z": Dot("us-east", 3)}
    assert winner({name: dots[name] for name in order}) == "z"
    assert winner({name: dots[name] for name in order if name != "z"}) == "y"
    with pytest.raises(Malformed, match="at least one"):
        winner({})


def test_a_release_is_one_event_of_one_region() -> None:
    assert dot_of({"eu-west": 1}, []) == Dot("eu-west", 1)
    assert dot_of({"eu-west": 2, "ap-south": 1}, [{"eu-west": 2}]) == Dot("ap-south", 1)
    for vector in ({"eu-west": 1}, {"eu-west": 2, "ap-south": 1}, {"ap-south": 1}):
        with pytest.raises(Malformed, match="one region's count to grow"):
            dot_of(vector, [{"eu-west": 1}])


@given(vectors.filter(any), st.sampled_from(REGIONS))
def test_a_device_s_own_branch_is_private_and_contained_in_no_release(base: dict[str, int], region: str) -> None:
    own = private_branch(base, "pos-0001")
    assert is_private(own)
    assert not is_private(base)
    assert dominates(own, base)
    assert concurrent(own, increment(base, region))
