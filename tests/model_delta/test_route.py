"""The planner against an exhaustive search, its limits, and deliveries that lie."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_delta.assembly import segments_root
from model_delta.digest import digest_of
from model_delta.errors import NotFound
from model_delta.manifest import Blob, Delivery, DenseOffer, Manifest, PatchOffer, Segment, manifest_digest
from model_delta.patch.route import (
    APPLY_BYTES,
    OPEN_BYTES,
    STEP_BYTES,
    DeviceLimits,
    LinkCosts,
    Route,
    Step,
    plan_update,
)

BOTH = frozenset({"bsdiff40", "tp1"})


def version(name: str, sizes: tuple[int, ...] = (10,), shared: int = 0) -> Manifest:
    """A version whose segments are its own, except the first `shared` ones."""
    segments = tuple(
        Segment(f"part-{index}", size, digest_of(f"{name if index >= shared else 'shared'} {index} {size}".encode()))
        for index, size in enumerate(sizes)
    )
    return Manifest(
        tenant="acme",
        model=name,
        version={},
        release=1,
        size=sum(sizes),
        file_digest=digest_of(name.encode()),
        segments=segments,
        merkle_root=segments_root(segments),
        inputs=(),
        outputs=(),
        created=0,
        expires=1,
    )


def blob(*parts: object, size: int) -> Blob:
    return Blob(digest_of(repr((*parts, size)).encode()), size)


class World(NamedTuple):
    """Versions of which each may be made from others, and what the device has of them."""

    versions: list[Manifest]
    deliveries: dict[str, Delivery]
    have: dict[str, int]
    pieces: frozenset[str]
    costs: LinkCosts
    limits: DeviceLimits

    @property
    def want(self) -> Manifest:
        return self.versions[-1]

    def plan(self, **changes: object) -> Route:
        given_ = {"pieces": self.pieces, "costs": self.costs, "limits": self.limits, **changes}
        manifests = {manifest_digest(one): one for one in self.versions}
        return plan_update(self.have, self.want, self.deliveries, manifests=manifests, **given_)  # type: ignore[arg-type]


@st.composite
def worlds(draw: st.DrawFn, *, limited: bool = False) -> World:
    sizes = st.integers(1, 20_000)
    versions = [
        version(f"v{number}", tuple(draw(st.lists(sizes, min_size=1, max_size=3))), draw(st.integers(0, 3)))
        for number in range(draw(st.integers(1, 4)))
    ]
    names = [manifest_digest(one) for one in versions]
    deliveries = {}
    for name, one in zip(names, versions, strict=True):
        bases = [base for base in names if base != name and draw(st.booleans())]
        dense = [base for base in bases if draw(st.booleans())]
        deliveries[name] = Delivery(
            name,
            tuple(blob(name, index, size=segment.size + 40) for index, segment in enumerate(one.segments)),
            tuple(PatchOffer(base, blob(name, base, size=draw(sizes))) for base in bases),
            tuple(DenseOffer(base, blob(name, base, "tp1", size=draw(sizes)), "tp1") for base in dense),
        )
    every = sorted(
        {item.digest for one in deliveries.values() for item in one.segments}
        | {offer.blob.digest for one in deliveries.values() for offer in one.offers}
    )
    here = st.frozensets(st.sampled_from(every))
    return World(
        versions,
        deliveries,
        {name: 1 for name in names[:-1] if draw(st.booleans())},
        frozenset(segment.digest for one in versions for segment in one.segments if draw(st.booleans())),
        LinkCosts(
            origin=draw(st.sampled_from([1, 4])),
            cached=draw(st.sampled_from([0, 1, 2])),
            in_region=draw(here),
            at_hand=draw(here) if draw(st.booleans()) else frozenset(),
        ),
        DeviceLimits(
            memory_bytes=draw(st.integers(0, 3 << 20)) if limited else None,
            flash_bytes=draw(st.integers(0, 150_000)) if limited else None,
            formats=draw(st.sampled_from([BOTH, frozenset({"bsdiff40"})])),
        ),
    )


def every_route(world: World) -> Iterator[tuple[Step, ...]]:
    """All routes without a version twice, whatever they cost, within the device's formats and limits."""
    manifests = {manifest_digest(one): one for one in world.versions}

    def to(target: str, seen: tuple[str, ...]) -> Iterator[tuple[Step, ...]]:
        delivery, segments = world.deliveries[target], manifests[target].segments
        if target in world.have:
            yield ()
        sizes = [one.size for one in segments]
        yield (Step("whole", "", target, delivery.segments, segment_bytes=max(sizes)),)
        missing = tuple(index for index, one in enumerate(segments) if one.digest not in world.pieces)
        if len(missing) < len(segments):
            blobs, largest = tuple(delivery.segments[i] for i in missing), max((sizes[i] for i in missing), default=0)
            yield (Step("replace", "", target, blobs, missing, segment_bytes=largest),)
        for offer in delivery.offers:
            if offer.format in world.limits.formats and offer.base not in seen:
                for before in to(offer.base, (*seen, offer.base)):
                    yield (*before, Step("patch", offer.base, target, (offer.blob,), format=offer.format))

    goal = manifest_digest(world.want)
    yield from (route for route in to(goal, (goal,)) if fits(world, route))


def fits(world: World, route: tuple[Step, ...]) -> bool:
    manifests = {manifest_digest(one): one for one in world.versions}
    flash = sum(item.size for step in route for item in step.blobs) + sum(manifests[step.target].size for step in route)
    limits = world.limits
    return (limits.flash_bytes is None or flash <= limits.flash_bytes) and all(
        limits.memory_bytes is None or step.memory_bytes <= limits.memory_bytes for step in route
    )


def cost(world: World, route: tuple[Step, ...]) -> float:
    return sum(world.costs.of(step.blobs) for step in route)


@settings(deadline=None)
@given(worlds())
def test_no_route_is_cheaper(world: World) -> None:
    """So never worse than the cheapest of direct, chain, replace and whole."""
    route = world.plan()
    assert cost(world, route.steps) == min(cost(world, other) for other in every_route(world))
    assert route.bytes == sum(item.size for step in route.steps for item in step.blobs)
    assert route == world.plan()


@settings(deadline=None)
@given(worlds(limited=True))
def test_limits_are_respected_and_the_best_within_them_is_found(world: World) -> None:
    possible = list(every_route(world))
    if not possible:
        with pytest.raises(NotFound, match=r"leads there within .* B of memory and .* B of flash"):
            world.plan()
        return
    route = world.plan()
    assert fits(world, route.steps)
    assert all(step.format in {"", *world.limits.formats} for step in route.steps)
    assert cost(world, route.steps) == min(cost(world, other) for other in possible)


@settings(deadline=None)
@given(worlds(), st.randoms(use_true_random=False))
def test_the_order_in_which_things_are_known_does_not_matter(world: World, random: object) -> None:
    items = list(world.deliveries.items())
    random.shuffle(items)  # type: ignore[attr-defined]
    shuffled = world._replace(deliveries=dict(items), have=dict(reversed(world.have.items())))
    assert shuffled.plan() == world.plan()


@settings(deadline=None)
@given(worlds(), st.data())
def test_what_a_mirror_says_of_other_versions_never_makes_it_worse_than_the_whole(
    world: World, data: st.DataObject
) -> None:
    """Stones of a chain are made up: other sizes, foreign bases, no blobs. The route still ends at the goal."""
    goal, names = manifest_digest(world.want), list(world.deliveries)
    anywhere = st.sampled_from([*names, "", "../../etc/passwd", digest_of(b"nowhere")])
    sizes = st.integers(-5, 2**63)
    told = {
        name: Delivery(
            data.draw(anywhere),
            tuple(blob("lie", n, size=data.draw(sizes)) for n in range(data.draw(st.integers(0, 3)))),
            tuple(PatchOffer(data.draw(anywhere), blob("lie", n, size=data.draw(sizes))) for n in range(3)),
        )
        for name in names
        if name != goal
    }
    route = world._replace(deliveries={**told, goal: world.deliveries[goal]}).plan()
    assert cost(world, route.steps) <= world.costs.of(world.deliveries[goal].segments)
    assert not route.steps or route.steps[-1].target == goal
    assert all(item.size > 0 for step in route.steps for item in step.blobs)


def test_a_thousand_offers_do_not_make_planning_long() -> None:
    """Every version claims patches from every other in both formats, with prices that make all ways look alike."""
    versions = [version(f"v{number}") for number in range(9)]
    names = [manifest_digest(one) for one in versions]
    deliveries = {
        name: Delivery(
            name,
            (blob(name, size=10**9),),
            tuple(
                PatchOffer(base, blob(name, base, n, size=1 + n)) for base in names if base != name for n in range(99)
            ),
        )
        for name in names
    }
    begin = time.process_time()
    route = plan_update({names[0]: 1}, versions[-1], deliveries, limits=DeviceLimits(flash_bytes=10**6))
    assert time.process_time() - begin < 1.0
    assert (route.kind, route.bytes) == ("patch", 1)


def test_blobs_that_the_region_has_make_a_chain_cheaper() -> None:
    first, middle, last = version("first"), version("middle"), version("last")
    base, via, goal = map(manifest_digest, (first, middle, last))
    hops = blob("hop", 1, size=6_000), blob("hop", 2, size=6_000)
    deliveries = {
        goal: Delivery(goal, (blob(size=10**6),), (PatchOffer(base, blob(size=8_000)), PatchOffer(via, hops[1]))),
        via: Delivery(via, (blob(size=10**6),), (PatchOffer(base, hops[0]),)),
    }
    assert plan_update({base: 1}, last, deliveries).kind == "patch"
    cached = LinkCosts(origin=1, cached=0.1, in_region=frozenset(item.digest for item in hops))
    assert plan_update({base: 1}, last, deliveries, costs=cached).kind == "chain"
    started = LinkCosts(at_hand=frozenset(item.digest for item in hops))
    assert plan_update({base: 1}, last, deliveries, costs=started).kind == "chain"


def test_a_device_without_the_format_takes_the_other() -> None:
    want, base = version("want"), digest_of(b"base")
    goal = manifest_digest(want)
    offers = (PatchOffer(base, blob(size=900)),), (DenseOffer(base, blob(size=500), "tp1"),)
    deliveries = {goal: Delivery(goal, (blob(size=10_000),), *offers)}
    for formats, found in ((BOTH, "tp1"), (frozenset({"bsdiff40"}), "bsdiff40"), (frozenset[str](), "")):
        route = plan_update({base: 1}, want, deliveries, limits=DeviceLimits(formats=formats))
        assert route.steps[0].format == found
    small = DeviceLimits(memory_bytes=APPLY_BYTES["bsdiff40"] + 2_000, formats=BOTH)
    assert plan_update({base: 1}, want, deliveries, limits=small).steps[0].format == "bsdiff40"
    unknown = Delivery(goal, (blob(size=10_000),), (), (DenseOffer(base, blob(size=5), "from-the-future"),))
    assert plan_update({base: 1}, want, {goal: unknown}).kind == "whole"


def test_only_what_is_missing_is_fetched() -> None:
    want = version("want", (100, 200, 300))
    goal = manifest_digest(want)
    deliveries = {goal: Delivery(goal, tuple(blob(index, size=9_000) for index in range(3)))}
    held = frozenset(segment.digest for segment in want.segments[::2])
    route = plan_update({}, want, deliveries, pieces=held)
    assert (route.kind, route.bytes, route.steps[0].segments) == ("replace", 9_000, (1,))
    route = plan_update({}, want, deliveries, pieces=frozenset(segment.digest for segment in want.segments))
    assert (route.kind, route.bytes, route.steps[0].blobs) == ("replace", 0, ())
    assert plan_update({}, want, deliveries, pieces=frozenset({digest_of(b"else")})).kind == "whole"


def test_a_damaged_base_is_healed_and_then_patched() -> None:
    base, want = version("base", (10_000, 10_000)), version("want", (10_000, 10_000))
    start, goal = manifest_digest(base), manifest_digest(want)
    deliveries = {
        start: Delivery(start, tuple(blob("base", index, size=10_040) for index in range(2))),
        goal: Delivery(
            goal, tuple(blob("want", i, size=10_040) for i in range(2)), (PatchOffer(start, blob(size=100)),)
        ),
    }
    pieces = frozenset({base.segments[0].digest})
    route = plan_update({}, want, deliveries, pieces=pieces, manifests={start: base})
    assert route.kind == "chain"
    assert [step.kind for step in route.steps] == ["replace", "patch"]
    assert route.bytes == 10_040 + 100
    assert plan_update({}, want, deliveries, pieces=pieces).kind == "whole"
    assert STEP_BYTES * 2 + route.bytes < 20_080


def test_the_manifest_of_a_version_on_the_way_is_paid_for_by_its_size() -> None:
    """A large model's has a hundred kilobytes: two small hops then cost more than one larger patch."""
    first, middle, last = version("first"), version("middle"), version("last")
    base, via, goal = map(manifest_digest, (first, middle, last))

    def kind(segments: int, at_hand: bool = False) -> str:
        parts = tuple(blob("part", index, size=100_000) for index in range(segments))
        deliveries = {
            goal: Delivery(
                goal, (blob(size=10**8),), (PatchOffer(base, blob(size=80_000)), PatchOffer(via, blob(2, size=10_000)))
            ),
            via: Delivery(via, parts, (PatchOffer(base, blob(1, size=10_000)),)),
        }
        known = {via: middle} if at_hand else {}
        return plan_update({base: 1}, last, deliveries, manifests=known).kind

    assert kind(10) == "chain"
    assert kind(400) == "patch"
    assert kind(400, at_hand=True) == "chain"


def test_no_step_s_memory_grows_with_the_model() -> None:
    small, large = (
        Step("patch", "b" * 64, "a" * 64, (blob(size=size),), format="tp1").memory_bytes for size in (1_000, 10**9)
    )
    assert small == large == APPLY_BYTES["tp1"]
    pieces = [Step("whole", "", "a" * 64, (), segment_bytes=size).memory_bytes for size in (0, 1_000_000, 10**9)]
    assert pieces[0] == OPEN_BYTES < pieces[1] == pieces[2] < 5_000_000
