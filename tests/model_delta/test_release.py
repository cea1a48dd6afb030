"""From a file to a release and back, by every route, with everything that can be wrong on the way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model_delta import merkle
from model_delta.assembly import check_file, pieces_of, root_of, segments_root
from model_delta.digest import digest_of
from model_delta.encoding import pack, unpack
from model_delta.errors import DigestMismatch, Malformed, NotFound, Untrusted
from model_delta.graphs.int8 import quantize_weights
from model_delta.keys.encryption import open_blob, seal_blob
from model_delta.keys.keyring import EmbeddedKeyring
from model_delta.manifest import (
    Blob,
    Delivery,
    DenseOffer,
    GoldenCase,
    Manifest,
    PatchOffer,
    Requirements,
    Segment,
    Tensor,
    TensorSpec,
    manifest_digest,
)
from model_delta.patch.container import FORMATS, make
from model_delta.patch.route import (
    MANIFEST_BYTES,
    MANIFEST_SEGMENT_BYTES,
    STEP_BYTES,
    DeviceLimits,
    Route,
    Step,
    plan_update,
)
from model_delta.release import (
    DENSE_GAIN,
    Release,
    build_release,
    open_release,
    with_offers,
)
from model_delta.segments import read_tensor
from model_delta.trust.signing import open_envelope
from model_delta.trust.updater import read_manifest
from model_delta.version import private_branch
from tests.model_delta.models import NOW, keyring, layers, model, nudged

UNCHECKED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
KEYS = [bytes([number]) * 32 for number in range(4)]


class Publisher:
    """Three versions of one model, each made from the one before."""

    def __init__(self, ring: EmbeddedKeyring) -> None:
        self.ring = ring
        weights = layers(1, (6, 256, 64, 1))
        self.files: list[bytes] = []
        self.releases: list[Release] = []
        for number in range(3):
            weights = nudged(weights, number, 1e-4)
            self.publish(quantize_weights(model(weights), self.files[-1] if self.files else None))

    def publish(self, file: bytes, **options: Any) -> Release:
        number = len(self.releases)
        parents = [(self.releases[-1].manifest, self.files[-1])] if self.releases else []
        values: dict[str, Any] = {"parents": parents, "key": KEYS[number], **options}
        made = build_release(
            file,
            tenant="acme",
            model="fraud",
            version={"eu-west": number + 1},
            release=number + 1,
            keyring=self.ring,
            now=NOW,
            **values,
        )
        self.files.append(file)
        self.releases.append(made)
        return made

    @property
    def deliveries(self) -> dict[str, Delivery]:
        return {release.digest: release.delivery for release in self.releases}

    @property
    def blobs(self) -> dict[str, bytes]:
        return {digest: data for release in self.releases for digest, data in release.blobs.items()}

    @property
    def keys(self) -> dict[str, bytes]:
        return {release.digest: KEYS[number] for number, release in enumerate(self.releases)}

    @property
    def manifests(self) -> dict[str, Manifest]:
        return {release.digest: release.manifest for release in self.releases}


@pytest.fixture(scope="module")
def publisher(tmp_path_factory: pytest.TempPathFactory) -> Publisher:
    return Publisher(keyring(tmp_path_factory.mktemp("release")))


def have(publisher: Publisher, *numbers: int) -> dict[str, int]:
    return {publisher.releases[number].digest: len(publisher.files[number]) for number in numbers}


def test_what_is_published_is_accepted_and_describes_the_file(publisher: Publisher) -> None:
    release, file = publisher.releases[1], publisher.files[1]
    manifest = read_manifest(release.envelope, release.digest, publisher.ring.tenant, NOW)
    assert manifest == release.manifest
    assert manifest.parents == (publisher.releases[0].digest,)
    assert (manifest.size, manifest.file_digest) == (len(file), digest_of(file))
    assert [spec.name for spec in (*manifest.inputs, *manifest.outputs)] == ["features", "score"]
    assert manifest.requirements.opset == 17
    weights = next(tensor for tensor in manifest.tensors if tensor.name == "layer0.weight")
    assert (weights.dtype, weights.shape) == ("int8", (6, 256))
    assert read_tensor(file, weights).shape == (6, 256)
    assert {blob.digest: blob.size for blob in release.delivery.segments} | {
        offer.blob.digest: offer.blob.size for offer in release.delivery.offers
    } == {digest: len(data) for digest, data in release.blobs.items()}


def test_no_plaintext_is_in_what_is_published(publisher: Publisher) -> None:
    file = publisher.files[0]
    published = b"".join(publisher.releases[0].blobs.values())
    for start in range(0, len(file) - 32, 97):
        piece = file[start : start + 32]
        assert piece in (bytes(32),) or piece not in published


def test_building_is_deterministic(publisher: Publisher, tmp_path: Path) -> None:
    again = Publisher(publisher.ring)
    assert again.releases == publisher.releases


def test_one_segment_can_be_proved_alone(publisher: Publisher) -> None:
    manifest = publisher.releases[0].manifest
    leaves = [bytes.fromhex(segment.digest) for segment in manifest.segments]
    assert len(leaves) > 1
    proof = merkle.proof(leaves, 1)
    data = publisher.files[0][manifest.segments[0].size :][: manifest.segments[1].size]
    assert merkle.verify_inclusion(manifest.merkle_root, bytes.fromhex(digest_of(data)), 1, len(leaves), proof)


# Routes.


@pytest.mark.parametrize(
    ("held", "kind", "steps"),
    [((), "whole", 1), ((0,), "chain", 2), ((1,), "patch", 1), ((2,), "none", 0), ((0, 1), "patch", 1)],
)
def test_every_route_opens_to_the_file(publisher: Publisher, held: tuple[int, ...], kind: str, steps: int) -> None:
    want = publisher.releases[2].manifest
    route = plan_update(have(publisher, *held), want, publisher.deliveries)
    assert (route.kind, len(route.steps)) == (kind, steps)
    assert route.bytes == sum(len(publisher.blobs[blob.digest]) for step in route.steps for blob in step.blobs)
    file = open_release(
        want,
        route,
        publisher.blobs,
        publisher.keys,
        held={publisher.releases[number].digest: publisher.files[number] for number in held},
        manifests=publisher.manifests,
    )
    assert file == publisher.files[2]


def test_a_patch_is_much_cheaper_than_the_whole(publisher: Publisher) -> None:
    want = publisher.releases[1].manifest
    patch = plan_update(have(publisher, 0), want, publisher.deliveries)
    whole = plan_update({}, want, publisher.deliveries)
    assert patch.bytes * 4 < whole.bytes


def test_a_version_long_gone_gets_a_direct_patch(publisher: Publisher) -> None:
    first, last = publisher.releases[0], publisher.releases[2]
    made = build_release(
        publisher.files[2],
        tenant="acme",
        model="fraud",
        version={"eu-west": 9},
        release=9,
        parents=[(last.manifest, publisher.files[2])],
        patch_from=[(first.manifest, publisher.files[0])],
        keyring=publisher.ring,
        key=KEYS[3],
        now=NOW,
    )
    assert made.manifest.parents == (last.digest,)
    assert {offer.base for offer in made.delivery.patches} == {first.digest, last.digest}
    route = plan_update(have(publisher, 0), made.manifest, {made.digest: made.delivery})
    assert route.kind == "patch"
    held = {first.digest: publisher.files[0]}
    assert open_release(made.manifest, route, made.blobs, {made.digest: KEYS[3]}, held=held) == publisher.files[2]


def test_a_patch_that_saves_nothing_is_not_offered(publisher: Publisher) -> None:
    other = np.random.default_rng(5).bytes(len(publisher.files[0]))
    made = build_release(
        other,
        tenant="acme",
        model="fraud",
        version={"eu-west": 2},
        release=2,
        parents=[(publisher.releases[0].manifest, publisher.files[0])],
        keyring=publisher.ring,
        key=KEYS[3],
        now=NOW,
        inputs=(),
        outputs=(),
    )
    assert made.delivery.patches == ()
    assert made.manifest.parents == (publisher.releases[0].digest,)


def a_manifest(name: str) -> Manifest:
    segment = Segment("part-0000", 10, digest_of(b"0123456789"))
    return Manifest(
        tenant="acme",
        model=name,
        version={},
        release=1,
        size=10,
        file_digest=segment.digest,
        segments=(segment,),
        merkle_root=segments_root([segment]),
        inputs=(),
        outputs=(),
        created=0,
        expires=1,
    )


def blob(size: int) -> Blob:
    return Blob(digest_of(b"%d" % size), size)


def test_the_cheapest_of_direct_chain_and_whole() -> None:
    want = a_manifest("want")
    goal, base, middle = manifest_digest(want), digest_of(b"base"), digest_of(b"middle")

    def cheapest(direct: int, first: int, second: int, whole: int) -> str:
        deliveries = {
            goal: Delivery(goal, (blob(whole),), (PatchOffer(base, blob(direct)), PatchOffer(middle, blob(second)))),
            middle: Delivery(middle, (blob(10**9),), (PatchOffer(base, blob(first)),)),
        }
        return plan_update({base: 1}, want, deliveries).kind

    assert cheapest(50_000, 20_000, 20_000, 200_000) == "chain"
    assert cheapest(41_000, 20_000, 20_000, 200_000) == "patch"  # a second step costs a manifest and a key
    assert cheapest(50_000, 30_000, 30_000, 40_000) == "whole"


@given(st.data())
def test_the_route_is_as_cheap_as_the_best_of_all_routes(data: st.DataObject) -> None:
    """Against an exhaustive search on small random graphs."""
    want = a_manifest("want")
    nodes = [manifest_digest(want), *(digest_of(b"%d" % number) for number in range(3))]
    sizes = st.integers(1, 10_000)
    deliveries = {
        target: Delivery(
            target,
            (blob(data.draw(sizes)),),
            tuple(
                PatchOffer(base, blob(data.draw(sizes)))
                for base in nodes
                if base != target and data.draw(st.booleans())
            ),
        )
        for target in nodes
    }
    held = [node for node in nodes[1:] if data.draw(st.booleans())]

    def costs(here: str, seen: tuple[str, ...]) -> Iterator[int]:
        if here in held:
            yield 0
        passing = 0 if here == nodes[0] else MANIFEST_BYTES + MANIFEST_SEGMENT_BYTES
        yield STEP_BYTES + passing + deliveries[here].segments[0].size
        for offer in deliveries[here].patches:
            if offer.base not in seen:
                for cost in costs(offer.base, (*seen, offer.base)):
                    yield cost + STEP_BYTES + passing + offer.blob.size

    route = plan_update(dict.fromkeys(held, 1), want, deliveries)
    paid = STEP_BYTES * len(route.steps) + (MANIFEST_BYTES + MANIFEST_SEGMENT_BYTES) * max(0, len(route.steps) - 1)
    assert route.bytes + paid == min(costs(nodes[0], (nodes[0],)))


def test_lies_in_a_delivery_are_not_followed() -> None:
    want = a_manifest("want")
    goal, base = manifest_digest(want), digest_of(b"base")
    honest = blob(1000)
    for lie in (
        Delivery(base, (blob(1),)),
        Delivery(goal, (blob(1), blob(2))),
        Delivery(goal, (Blob(honest.digest, -5),)),
        Delivery(goal, (Blob("../../etc/passwd", 5),)),
        Delivery(goal, (), (PatchOffer(base, Blob("x", 5)), PatchOffer("", blob(1)))),
    ):
        with pytest.raises(NotFound, match="leads there"):
            plan_update({base: 1}, want, {goal: lie})


def test_an_empty_file_at_hand_is_no_base() -> None:
    want = a_manifest("want")
    goal, base = manifest_digest(want), digest_of(b"base")
    delivery = Delivery(goal, (blob(1000),), (PatchOffer(base, blob(10)),))
    assert plan_update({base: 0}, want, {goal: delivery}).kind == "whole"
    assert plan_update({base: 1}, want, {goal: delivery}).kind == "patch"


# What can be wrong.


@settings(suppress_health_check=UNCHECKED, max_examples=60, deadline=None)
@given(st.data())
def test_a_corrupt_blob_never_opens(publisher: Publisher, data: st.DataObject) -> None:
    held = data.draw(st.sampled_from([(), (0,), (1,)]))
    want = publisher.releases[2].manifest
    route = plan_update(have(publisher, *held), want, publisher.deliveries)
    used = [blob.digest for step in route.steps for blob in step.blobs]
    victim = data.draw(st.sampled_from(used))
    damaged = bytearray(publisher.blobs[victim])
    if data.draw(st.booleans()):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    else:
        del damaged[data.draw(st.integers(0, len(damaged) - 1)) :]
    with pytest.raises(DigestMismatch):
        open_release(
            want,
            route,
            {**publisher.blobs, victim: bytes(damaged)},
            publisher.keys,
            held={publisher.releases[number].digest: publisher.files[number] for number in held},
            manifests=publisher.manifests,
        )


def forged(publisher: Publisher, label: str, plaintext: bytes, base: str = "") -> tuple[Route, dict[str, bytes]]:
    """A store that knows the key, which it must not, serves its own bytes for version 1."""
    release = publisher.releases[1]
    sealed = seal_blob(KEYS[1], release.digest, label, plaintext)
    offered = Blob(digest_of(sealed), len(sealed))
    if base:
        step = Step("patch", base, release.digest, (offered,))
    else:
        step = Step("whole", "", release.digest, (offered, *release.delivery.segments[1:]))
    return Route((step,), offered.size, step.kind), {**release.blobs, offered.digest: sealed}


def test_other_bytes_under_the_right_key_are_refused(publisher: Publisher) -> None:
    release, base = publisher.releases[1], publisher.releases[0]
    first = release.manifest.segments[0]
    good = publisher.files[1][: first.size]
    evil = bytes([good[0] ^ 1]) + good[1:]
    held = {base.digest: publisher.files[0]}
    evil_file = evil + publisher.files[1][first.size :]
    cases = [
        (forged(publisher, "segment:0", evil), DigestMismatch),
        (forged(publisher, "segment:0", good[:-1]), DigestMismatch),
        (forged(publisher, "segment:0", good + b"x"), Malformed),
        (forged(publisher, "segment:1", good), Untrusted),
        (
            forged(publisher, f"patch:{base.digest}", make("bsdiff40", publisher.files[0], evil_file), base.digest),
            DigestMismatch,
        ),
        (
            forged(publisher, f"patch:{base.digest}", make("bsdiff40", publisher.files[0], b"x"), base.digest),
            DigestMismatch,
        ),
        (forged(publisher, f"patch:{base.digest}", b"not a patch", base.digest), Malformed),
        (forged(publisher, "patch:other", make("bsdiff40", publisher.files[0], evil_file), base.digest), Untrusted),
    ]
    for (route, blobs), kind in cases:
        with pytest.raises(kind):
            open_release(release.manifest, route, blobs, publisher.keys, held=held)


def test_the_wrong_key_opens_nothing(publisher: Publisher) -> None:
    want = publisher.releases[0].manifest
    route = plan_update({}, want, publisher.deliveries)
    with pytest.raises(Untrusted, match="does not open"):
        open_release(want, route, publisher.blobs, {manifest_digest(want): KEYS[2]})


def test_what_is_missing_is_named_and_may_come_later(publisher: Publisher) -> None:
    want = publisher.releases[2].manifest
    chain = plan_update(have(publisher, 0), want, publisher.deliveries)
    held = {publisher.releases[0].digest: publisher.files[0]}
    for message, blobs, keys, files, manifests in (
        ("not at hand; fetch it", {}, publisher.keys, held, publisher.manifests),
        ("key is not at hand", publisher.blobs, {}, held, publisher.manifests),
        ("base is not at hand", publisher.blobs, publisher.keys, {}, publisher.manifests),
        ("manifest is not at hand", publisher.blobs, publisher.keys, held, {}),
    ):
        with pytest.raises(NotFound, match=message):
            open_release(want, chain, blobs, keys, held=files, manifests=manifests)
    with pytest.raises(NotFound, match="does not lead"):
        open_release(want, Route((), 0, "none"), {}, {})


def test_a_manifest_under_a_wrong_digest_is_not_believed(publisher: Publisher) -> None:
    want = publisher.releases[2].manifest
    chain = plan_update(have(publisher, 0), want, publisher.deliveries)
    swapped = {publisher.releases[1].digest: publisher.releases[0].manifest}
    held = {publisher.releases[0].digest: publisher.files[0]}
    with pytest.raises(NotFound, match="manifest is not at hand"):
        open_release(want, chain, publisher.blobs, publisher.keys, held=held, manifests=swapped)


def test_a_damaged_base_is_told_from_a_damaged_patch(publisher: Publisher) -> None:
    want = publisher.releases[1].manifest
    route = plan_update(have(publisher, 0), want, publisher.deliveries)
    damaged = bytearray(publisher.files[0])
    damaged[500] ^= 1
    held = {publisher.releases[0].digest: bytes(damaged)}
    with pytest.raises(DigestMismatch, match="file of fraud release 1"):
        open_release(want, route, publisher.blobs, publisher.keys, held=held, manifests=publisher.manifests)
    with pytest.raises(DigestMismatch, match=r"file of fraud release 2|made for another old file"):
        open_release(want, route, publisher.blobs, publisher.keys, held=held)


@pytest.mark.parametrize(
    "changes",
    [
        {"size": 11},
        {"file_digest": digest_of(b"other")},
        {"merkle_root": digest_of(b"other")},
        {"segments": (Segment("part-0000", 10, digest_of(b"other")),)},
        {"segments": (Segment("part-0000", 9, digest_of(b"012345678")),)},
        {"segments": ()},
    ],
)
def test_every_part_of_the_description_must_match(changes: dict[str, Any]) -> None:
    manifest = a_manifest("m")
    check_file(manifest, b"0123456789")
    with pytest.raises(DigestMismatch):
        check_file(msgspec.structs.replace(manifest, **changes), b"0123456789")


def test_no_release_from_an_unusable_file(publisher: Publisher) -> None:
    for file in (b"", b"not a model"):
        with pytest.raises(Malformed, match="release 4 of fraud"):
            publisher.publish(file, key=KEYS[3])
    assert len(publisher.releases) == 3


def test_no_release_from_a_parent_with_another_file(publisher: Publisher) -> None:
    wrong = [(publisher.releases[0].manifest, publisher.files[1])]
    with pytest.raises(DigestMismatch):
        publisher.publish(publisher.files[2], parents=wrong, key=KEYS[3])
    assert len(publisher.releases) == 3


def test_a_file_that_is_not_onnx_is_described_by_hand(publisher: Publisher) -> None:
    inputs, outputs = (TensorSpec("features", "int8", (6,)),), (TensorSpec("score", "float32", (1,)),)
    case = GoldenCase({"features": Tensor("int8", (6,), bytes(6))}, {"score": Tensor("float32", (1,), bytes(4))})
    made = build_release(
        b"tiny baseline" * 20,
        tenant="acme",
        model="baseline",
        version={"eu-west": 1},
        release=1,
        parents=(),
        keyring=publisher.ring,
        key=KEYS[0],
        now=NOW,
        inputs=inputs,
        outputs=outputs,
        golden=[case],
        requirements=Requirements(runtime="baseline", opset=0),
        lifetime_s=10,
        role="baseline",
    )
    with pytest.raises(Untrusted):
        publisher.ring.verify(open_envelope(made.envelope), "manifest", "release")
    publisher.ring.verify(open_envelope(made.envelope), "manifest", "baseline")
    manifest = read_manifest(made.envelope, made.digest, publisher.ring.tenant, NOW)
    assert (manifest.inputs, manifest.golden, manifest.expires) == (inputs, (case,), int(NOW) + 10)
    assert manifest.requirements.runtime == "baseline"
    route = plan_update({}, manifest, {made.digest: made.delivery})
    assert open_release(manifest, route, made.blobs, {made.digest: KEYS[0]}) == b"tiny baseline" * 20


def test_a_blob_is_bound_to_its_version(publisher: Publisher) -> None:
    first = publisher.releases[0]
    sealed = first.blobs[first.delivery.segments[0].digest]
    with pytest.raises(Untrusted):
        open_blob(KEYS[0], publisher.releases[1].digest, "segment:0", sealed, 10**6)


# Segments at hand.


@pytest.fixture(scope="module")
def large(publisher: Publisher) -> tuple[Release, bytes]:
    """A release with one segment of its own for each of three large tensors."""
    file = quantize_weights(model(layers(3, (300, 300, 300, 300, 1))))
    return (
        build_release(
            file,
            tenant="acme",
            model="large",
            version={"eu-west": 1},
            release=1,
            parents=[],
            keyring=publisher.ring,
            key=KEYS[0],
            now=NOW,
        ),
        file,
    )


@settings(suppress_health_check=UNCHECKED, max_examples=40, deadline=None)
@given(st.data())
def test_a_damaged_file_is_healed_by_its_damaged_segments_alone(
    large: tuple[Release, bytes], data: st.DataObject
) -> None:
    made, file = large
    sizes = [segment.size for segment in made.manifest.segments]
    assert len(sizes) > 3
    damaged, spoilt = bytearray(file), set()
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(file) - 1))
        damaged[at] ^= 1 + data.draw(st.integers(0, 254))
        spoilt.add(next(index for index in range(len(sizes)) if at < sum(sizes[: index + 1])))
    if data.draw(st.booleans()):
        spoilt.add(len(sizes) - 1)
        del damaged[-data.draw(st.integers(1, sizes[-1])) :]
    spoilt = {index for index in spoilt if bytes(damaged) != file}
    pieces = pieces_of(made.manifest, bytes(damaged))
    route = plan_update({}, made.manifest, {made.digest: made.delivery}, pieces=pieces)
    lost = [made.manifest.segments[index].digest for index in sorted(spoilt)]
    assert all(made.manifest.segments[index].digest in lost for index in route.steps[0].segments)
    if lost and len(pieces):
        assert route.kind == "replace"
        assert route.bytes < sum(blob.size for blob in made.delivery.segments)
    blobs = {blob.digest: made.blobs[blob.digest] for step in route.steps for blob in step.blobs}
    assert open_release(made.manifest, route, blobs, {made.digest: KEYS[0]}, pieces=pieces) == file
    assert (root_of(made.manifest, bytes(damaged)) == made.manifest.merkle_root) == (bytes(damaged) == file)


def test_bytes_behind_the_end_are_found_too(large: tuple[Release, bytes]) -> None:
    made, file = large
    assert root_of(made.manifest, file) == made.manifest.merkle_root
    assert root_of(made.manifest, file + b"x") != made.manifest.merkle_root
    assert len(pieces_of(made.manifest, file + b"x")) == len(pieces_of(made.manifest, file)) - 1
    assert pieces_of(made.manifest, b"") == {}


def test_pieces_that_are_not_what_they_are_called_do_no_harm(large: tuple[Release, bytes]) -> None:
    made, file = large
    pieces = pieces_of(made.manifest, file)
    victim = made.manifest.segments[1].digest
    lying = {**pieces, victim: b"x" * pieces[victim].size}
    route = plan_update({}, made.manifest, {made.digest: made.delivery}, pieces=lying)
    with pytest.raises(DigestMismatch):
        open_release(made.manifest, route, made.blobs, {made.digest: KEYS[0]}, pieces=lying)
    del lying[victim]
    with pytest.raises(NotFound, match="take the whole route"):
        open_release(made.manifest, route, made.blobs, {made.digest: KEYS[0]}, pieces=lying)


def test_equal_segments_come_once(publisher: Publisher) -> None:
    file = bytes(3 * 65_536) + b"end"  # not ONNX: three equal parts and a tail
    made = build_release(
        file,
        tenant="acme",
        model="zeros",
        version={"eu-west": 1},
        release=1,
        parents=[],
        keyring=publisher.ring,
        key=KEYS[0],
        now=NOW,
        inputs=(),
        outputs=(),
    )
    tail = made.manifest.segments[3].digest
    route = plan_update({}, made.manifest, {made.digest: made.delivery}, pieces={tail})
    assert route.steps[0].segments == (0,)
    assert open_release(made.manifest, route, made.blobs, {made.digest: KEYS[0]}, pieces={tail: b"end"}) == file


def test_a_private_branch_is_not_published(publisher: Publisher) -> None:
    with pytest.raises(Malformed, match="own branch, which nobody publishes"):
        build_release(
            publisher.files[0],
            tenant="acme",
            model="fraud",
            version=private_branch({"eu-west": 1}, "pos-0001"),
            release=2,
            parents=[],
            keyring=publisher.ring,
            key=KEYS[0],
            now=NOW,
        )


# Patches in further formats.


def test_a_dense_offer_stays_out_of_an_old_reader_s_way(publisher: Publisher) -> None:
    """A delivery without dense patches is packed as ever; one with them is read by a program that knows only the
    fields of the first release."""

    class OldDelivery(msgspec.Struct, frozen=True):
        manifest: str
        segments: tuple[Blob, ...]
        patches: tuple[PatchOffer, ...] = ()

    plain = publisher.releases[1].delivery
    plain = Delivery(plain.manifest, plain.segments, plain.patches)
    old = OldDelivery(plain.manifest, plain.segments, plain.patches)
    assert pack(plain) == pack(old)
    dense = with_offers(plain, Delivery(plain.manifest, (), (), (DenseOffer(digest_of(b"x"), blob(7), "tp1"),)))
    assert unpack(pack(dense), OldDelivery) == old
    assert unpack(pack(dense), Delivery) == dense
    assert [offer.format for offer in dense.offers][-1] == "tp1"


@pytest.mark.parametrize("formats", [frozenset({"bsdiff40"}), frozenset(FORMATS)])
def test_what_is_offered_opens_in_every_format(publisher: Publisher, formats: frozenset[str]) -> None:
    base, release = publisher.releases[0], publisher.releases[1]
    for offer in release.delivery.dense or ():
        plain = next(other for other in release.delivery.patches if other.base == offer.base)
        assert offer.blob.size < (1 - DENSE_GAIN) * plain.blob.size
    limits = DeviceLimits(formats=formats)
    deliveries = {release.digest: release.delivery}
    route = plan_update(have(publisher, 0), release.manifest, deliveries, limits=limits)
    assert route.steps[0].format in formats
    held = {base.digest: publisher.files[0]}
    assert open_release(release.manifest, route, release.blobs, publisher.keys, held=held) == publisher.files[1]
