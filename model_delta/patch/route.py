"""Which bytes to fetch: the cheapest way from what a device holds to what it wants.

Versions are nodes; a `PatchOffer` is an edge from its base to its version, the whole segments an edge from nothing, and
so are the segments that no file at hand has (`replace`: it heals a damaged file, and takes tensors that did not change
from wherever they are). The route is a shortest path (Dijkstra, 1959, with labels of cost and flash as in Martins,
1984) by bytes received times what the link takes for them; each step costs a little more for the key that it needs, and
for the manifest of a version that is only passed through, which for a large model is not little. Steps that the device
cannot perform (format, memory) are no edges, and a route that does not fit its flash is no route.

Deliveries are not signed: a lie in them can waste bytes and can change nothing else, because each blob is opened under
the version's key and the file is checked against the signed manifest.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Container, Iterator, Mapping
from itertools import count
from typing import Literal

import msgspec

from model_delta.errors import NotFound
from model_delta.manifest import Blob, Delivery, Manifest, manifest_digest
from model_delta.patch.container import FORMATS

STEP_BYTES = 512
"""What a step costs beside its blobs: a key request and its answer."""

MANIFEST_BYTES, MANIFEST_SEGMENT_BYTES = 1_200, 240
"""What the signed manifest of a version takes that is passed through and not at hand: with one golden case, and for
each segment with its tensor."""

OPEN_BYTES = 1 << 19
"""Working memory for opening sealed blobs, in bytes, beside that of unpacking them."""

APPLY_BYTES = {"bsdiff40": 1 << 20, "tp1": 2 << 20}
"""Working memory of an applier by format, in bytes. It does not grow with the model, since files are streams."""

_UNPACK_BLOCK_BYTES = 900_000
_UNPACK_FACTOR = 4

LABELS_MAX = 64
"""How many routes to one version in between are looked at: no delivery can make planning long."""

_DIGEST = re.compile(r"[0-9a-f]{64}")


class LinkCosts(msgspec.Struct, frozen=True):
    """What a byte costs by where it comes from, in any unit; `step` is counted in bytes from the origin.

    `in_region`: blobs that the region's mirror has already; they cost `cached` a byte, others `origin`. `at_hand`:
    blobs that an interrupted attempt left here; they cost nothing. `step`: see STEP_BYTES.
    """

    origin: float = 1.0
    cached: float = 1.0
    in_region: frozenset[str] = frozenset()
    at_hand: frozenset[str] = frozenset()
    step: float = STEP_BYTES

    def of(self, blobs: tuple[Blob, ...], manifest_bytes: int = 0) -> float:
        """What fetching `blobs`, and a manifest of `manifest_bytes`, and taking one step costs."""
        return (self.step + manifest_bytes) * self.origin + sum(
            blob.size * (self.cached if blob.digest in self.in_region else self.origin)
            for blob in blobs
            if blob.digest not in self.at_hand
        )


class DeviceLimits(msgspec.Struct, frozen=True):
    """What a device can do. None is no limit, sizes are bytes.

    `memory_bytes`: for taking a step, over the program that runs anyway. `flash_bytes`: for all blobs of a route and
    each file that is rebuilt on it. `formats`: the patches that it can apply.
    """

    memory_bytes: int | None = None
    flash_bytes: int | None = None
    formats: frozenset[str] = frozenset(FORMATS)


NO_LIMITS = DeviceLimits()
BYTES_ALONE = LinkCosts()


class Step(msgspec.Struct, frozen=True):
    """Make the file of version `target` out of `blobs`: with the file of version `base` for a patch (else ""), with
    segments at hand for a replace, whose blobs are the segments of these numbers. `segment_bytes`: the size of the
    largest segment among the blobs when it is opened, where that is known."""

    kind: Literal["patch", "whole", "replace"]
    base: str
    target: str
    blobs: tuple[Blob, ...]
    segments: tuple[int, ...] = ()
    format: str = ""
    segment_bytes: int = 0

    @property
    def memory_bytes(self) -> int:
        """What taking this step needs (`assembly.write_release`): for a patch the applier, else the opener of sealed
        blobs, whose bz2 decoder takes 4 bytes for each of a block. A patch is packed already, so it is sealed as it
        is."""
        if self.kind == "patch":
            return max(OPEN_BYTES, APPLY_BYTES.get(self.format, 0))
        largest = self.segment_bytes or max((blob.size for blob in self.blobs), default=0)
        return OPEN_BYTES + _UNPACK_FACTOR * min(_UNPACK_BLOCK_BYTES, largest)


class Route(msgspec.Struct, frozen=True):
    """Steps in order, the sum of their blobs' sizes in bytes, and what it amounts to."""

    steps: tuple[Step, ...]
    bytes: int
    kind: Literal["patch", "chain", "whole", "replace", "none"]


def plan_update(
    have: Mapping[str, int],
    want: Manifest,
    deliveries: Mapping[str, Delivery],
    *,
    pieces: Container[str] = frozenset(),
    manifests: Mapping[str, Manifest] | None = None,
    costs: LinkCosts = BYTES_ALONE,
    limits: DeviceLimits = NO_LIMITS,
) -> Route:
    """The cheapest route to `want` that the device can walk.

    `have`: size in bytes by manifest digest of the complete files at hand (empty ones count for nothing). `deliveries`
    by manifest digest: the wanted version's, and those of versions that a chain may pass through. `pieces`: digests of
    plain segments at hand, from complete files or damaged ones. `manifests`: verified manifests by digest of other
    versions whose segments may be replaced, so that a damaged base is healed before it is patched.
    Equal costs: the same answer everywhere. Raises NotFound when no route leads there within the limits.
    """
    goal = manifest_digest(want)
    held = [digest for digest, size in sorted(have.items()) if size > 0]
    if goal in held:
        return Route((), 0, "none")
    known = {**(manifests or {}), goal: want}
    edges: dict[str, list[Step]] = {}
    for step in _edges(known, deliveries, pieces, limits):
        edges.setdefault(step.base, []).append(step)
    order = count()  # decides between equal costs
    queue: list[tuple[float, int, str, int, tuple[Step, ...]]] = [
        (0, next(order), digest, 0, ()) for digest in ("", *held)
    ]
    settled: dict[str, list[int]] = {}
    while queue:
        cost, _, here, flash, steps = heapq.heappop(queue)
        if here == goal:
            return Route(steps, sum(blob.size for step in steps for blob in step.blobs), _kind(steps))
        labels = settled.setdefault(here, [])
        if len(labels) >= LABELS_MAX or any(other <= flash for other in labels):
            continue  # something as cheap that takes no more flash was here before
        labels.append(flash)
        for step in edges.get(here, ()):
            room = flash + sum(blob.size for blob in step.blobs) + _file_bytes(step.target, known, deliveries, want)
            if limits.flash_bytes is None or room <= limits.flash_bytes:
                price = cost + costs.of(step.blobs, _manifest_bytes(step.target, known, deliveries, want))
                heapq.heappush(queue, (price, next(order), step.target, room, (*steps, step)))
    raise NotFound(
        f"version {goal[:16]}… of {want.model}: none of {len(deliveries)} deliveries leads there"
        f"{_limited(limits)}; fetch the delivery again from another region"
    )


def _edges(
    known: Mapping[str, Manifest], deliveries: Mapping[str, Delivery], pieces: Container[str], limits: DeviceLimits
) -> Iterator[Step]:
    for digest, delivery in sorted(deliveries.items()):
        if delivery.manifest != digest:
            continue
        for step in _steps_to(digest, delivery, known.get(digest), pieces, limits):
            if limits.memory_bytes is None or step.memory_bytes <= limits.memory_bytes:
                yield step


def _steps_to(
    digest: str, delivery: Delivery, manifest: Manifest | None, pieces: Container[str], limits: DeviceLimits
) -> Iterator[Step]:
    complete = manifest is None or len(delivery.segments) == len(manifest.segments)
    if delivery.segments and complete and all(map(_is_sound, delivery.segments)):
        sizes = [] if manifest is None else [segment.size for segment in manifest.segments]
        yield Step("whole", "", digest, delivery.segments, segment_bytes=max(sizes, default=0))
        if manifest is not None:
            missing = _missing(manifest, pieces)
            if len(missing) < len(manifest.segments):
                blobs = tuple(delivery.segments[index] for index in missing)
                largest = max((sizes[index] for index in missing), default=0)
                yield Step("replace", "", digest, blobs, missing, segment_bytes=largest)
    cheapest: dict[tuple[str, str], Blob] = {}
    for offer in delivery.offers:
        if offer.format in limits.formats and _is_sound(offer.blob) and _DIGEST.fullmatch(offer.base):
            before = cheapest.get((offer.base, offer.format))
            if before is None or offer.blob.size < before.size:
                cheapest[(offer.base, offer.format)] = offer.blob
    for (base, form), blob in cheapest.items():
        yield Step("patch", base, digest, (blob,), format=form)


def _missing(manifest: Manifest, pieces: Container[str]) -> tuple[int, ...]:
    """Which segments are not at hand; of equal ones the first only, since the others are copies of it."""
    seen: set[str] = set()
    missing = []
    for index, segment in enumerate(manifest.segments):
        if segment.digest not in pieces and segment.digest not in seen:
            missing.append(index)
        seen.add(segment.digest)
    return tuple(missing)


def _file_bytes(target: str, known: Mapping[str, Manifest], deliveries: Mapping[str, Delivery], want: Manifest) -> int:
    """The size of a version's file: by its manifest, else by its sealed segments, else as large as the wanted one."""
    if target in known:
        return known[target].size
    return sum(blob.size for blob in deliveries[target].segments) or want.size


def _manifest_bytes(
    target: str, known: Mapping[str, Manifest], deliveries: Mapping[str, Delivery], want: Manifest
) -> int:
    """What fetching a version's manifest takes: nothing where it is at hand. Its segments are counted by its delivery,
    else it has as many as the wanted one."""
    if target in known:
        return 0
    return MANIFEST_BYTES + MANIFEST_SEGMENT_BYTES * (len(deliveries[target].segments) or len(want.segments))


def _is_sound(blob: Blob) -> bool:
    return blob.size > 0 and _DIGEST.fullmatch(blob.digest) is not None


def _limited(limits: DeviceLimits) -> str:
    parts = [f"{limits.memory_bytes} B of memory"] if limits.memory_bytes is not None else []
    parts += [f"{limits.flash_bytes} B of flash"] if limits.flash_bytes is not None else []
    return f" within {' and '.join(parts)}" if parts else ""


def _kind(steps: tuple[Step, ...]) -> Literal["patch", "chain", "whole", "replace"]:
    if len(steps) > 1:
        return "chain"
    return steps[0].kind
