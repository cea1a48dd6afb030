"""Which bytes to fetch: the cheapest way from what a device holds to what it wants.

Versions are nodes; a `PatchOffer` is an edge from its base to its version, the whole segments an edge from nothing.
The route is a shortest path (Dijkstra, 1959) by bytes received, where each step costs a little more for the manifest
and the key that it needs. Deliveries are not signed: a lie in them can waste bytes and can change nothing else, because
each blob is opened under the version's key and the file is checked against the signed manifest.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Literal

import msgspec

from model_delta.errors import NotFound
from model_delta.manifest import Blob, Delivery, Manifest, manifest_digest

STEP_BYTES = 2048
"""What a step costs beside its blobs: a signed manifest and a key request."""

_DIGEST = re.compile(r"[0-9a-f]{64}")


class Step(msgspec.Struct, frozen=True):
    """Make the file of version `target` out of `blobs`, and the file of version `base` for a patch (else "")."""

    kind: Literal["patch", "whole"]
    base: str
    target: str
    blobs: tuple[Blob, ...]


class Route(msgspec.Struct, frozen=True):
    """Steps in order, the sum of their blobs' sizes in bytes, and what it amounts to."""

    steps: tuple[Step, ...]
    bytes: int
    kind: Literal["patch", "chain", "whole", "none"]


def plan_update(have: Mapping[str, int], want: Manifest, deliveries: Mapping[str, Delivery]) -> Route:
    """The cheapest route to `want`.

    `have`: size in bytes by manifest digest of the complete files at hand (empty ones count for nothing). `deliveries`
    by manifest digest: the wanted version's, and those of versions that a chain may pass through. Raises NotFound when
    no combination leads there.
    """
    goal = manifest_digest(want)
    held = [digest for digest, size in sorted(have.items()) if size > 0]
    if goal in held:
        return Route((), 0, "none")
    edges: dict[str, list[Step]] = {}
    for step in _edges(goal, want, deliveries):
        edges.setdefault(step.base, []).append(step)
    order = count()  # decides between equal costs: first found, so the same answer everywhere
    queue: list[tuple[int, int, str, tuple[Step, ...]]] = [(0, next(order), digest, ()) for digest in ("", *held)]
    settled: set[str] = set()
    while queue:
        cost, _, here, steps = heapq.heappop(queue)
        if here in settled:
            continue
        settled.add(here)
        if here == goal:
            return Route(steps, sum(blob.size for step in steps for blob in step.blobs), _kind(steps))
        for step in edges.get(here, ()):
            if step.target not in settled:
                price = cost + STEP_BYTES + sum(blob.size for blob in step.blobs)
                heapq.heappush(queue, (price, next(order), step.target, (*steps, step)))
    raise NotFound(
        f"version {goal[:16]}… of {want.model}: none of {len(deliveries)} deliveries leads there; "
        "fetch the delivery again from another region"
    )


def _edges(goal: str, want: Manifest, deliveries: Mapping[str, Delivery]) -> Iterator[Step]:
    for digest, delivery in sorted(deliveries.items()):
        if delivery.manifest != digest:
            continue
        complete = digest != goal or [blob.size > 0 for blob in delivery.segments] == [True] * len(want.segments)
        if delivery.segments and complete and all(map(_is_sound, delivery.segments)):
            yield Step("whole", "", digest, delivery.segments)
        for offer in delivery.patches:
            if offer.format == "bsdiff40" and _is_sound(offer.blob) and _DIGEST.fullmatch(offer.base):
                yield Step("patch", offer.base, digest, (offer.blob,))


def _is_sound(blob: Blob) -> bool:
    return blob.size > 0 and _DIGEST.fullmatch(blob.digest) is not None


def _kind(steps: tuple[Step, ...]) -> Literal["patch", "chain", "whole"]:
    if len(steps) > 1:
        return "chain"
    return steps[0].kind
