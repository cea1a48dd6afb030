"""Releases that two regions made apart: told from each other, joined, and reached by devices on either side."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_coordinator.joining import merge_updates
from fl_coordinator.publishing import Publisher
from fl_coordinator.tables.records import ReleaseRecord
from model_delta.assembly import pieces_of
from model_delta.errors import Malformed
from model_delta.manifest import late_delivery_name
from model_delta.patch.route import plan_update
from model_delta.release import open_release
from model_delta.segments import read_tensor, stored_tensors
from model_delta.version import concurrent, dominates, dot_of, show
from tests.fl_coordinator.control_calls import calling
from tests.fl_coordinator.platform_in_memory import (
    FEATURES,
    Platform,
    SumModel,
    fraud_model,
    golden_inputs,
    on_a_loop,
    until,
)

ALL = """
apiVersion: atoll/v1
kind: Rollout
metadata: {name: spring}
spec:
  model: fraud
  cohorts: [{name: everyone}]
  strategy: {canary: {stages: [{share: 100%}]}}
"""


def moved(source: bytes, name: str, by: float, *, at: int | None = None) -> bytes:
    """The model with one tensor (or one weight of it) moved."""
    tensor = next(tensor for tensor in stored_tensors(source) if tensor.name == name)
    values = read_tensor(source, tensor).copy()
    if at is None:
        values += np.float32(by)
    else:
        values.reshape(-1)[at] += np.float32(by)
    return source[: tensor.offset] + values.tobytes() + source[tensor.offset + tensor.size :]


def weights(source: bytes, name: str) -> np.ndarray:
    return read_tensor(source, next(tensor for tensor in stored_tensors(source) if tensor.name == name))


# Weights.


def test_updates_are_added_and_a_weight_moved_once_is_kept_to_the_bit() -> None:
    parent = fraud_model()
    a = moved(moved(parent, "layer0.weight", 0.25), "layer1.bias", 0.1)
    b = moved(parent, "layer0.weight", -0.125, at=3)
    merged = merge_updates(parent, [a, b])
    assert merged is not None
    expected = weights(parent, "layer0.weight").astype(np.float64) + 0.25
    expected.reshape(-1)[3] += -0.125
    np.testing.assert_allclose(weights(merged, "layer0.weight"), expected, rtol=1e-6)
    assert (weights(merged, "layer1.bias") == weights(a, "layer1.bias")).all()
    assert (weights(merged, "layer1.weight") == weights(parent, "layer1.weight")).all()


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 23), st.floats(-1, 1, width=32)), min_size=1, max_size=4), st.randoms())
def test_the_order_of_siblings_does_not_matter(changes: list[tuple[int, float]], random: object) -> None:
    parent = fraud_model()
    every = [moved(parent, "layer0.weight", by, at=at) for at, by in changes]
    every.append(moved(parent, "layer0.bias", 1.0))
    merged = merge_updates(parent, every)
    random.shuffle(every)  # type: ignore[attr-defined]
    assert merge_updates(parent, every) == merged is not None
    assert merge_updates(parent, [parent, every[0]]) == every[0]
    assert merge_updates(parent, [every[0], every[0]]) == every[0]


def test_what_cannot_be_added_is_said_so() -> None:
    parent = fraud_model()
    a = moved(parent, "layer0.weight", 1.0)
    assert merge_updates(parent, [a]) is None
    assert merge_updates(parent, [a, fraud_model(hidden=5)]) is None
    assert merge_updates(b"no model", [b"no model", b"no model"]) is None
    huge = moved(parent, "layer0.weight", 3e38)
    assert merge_updates(parent, [huge, moved(parent, "layer0.weight", 2.9e38)]) is None
    edited = [parent[:20] + bytes([byte]) + parent[21:] for byte in (1, 2)]
    assert merge_updates(parent, edited) is None


# Two regions.


def two_regions(folder: Path) -> tuple[Platform, Publisher, Publisher]:
    """Two coordinators' publishers on one ledger and store; devices run what eu-west published first."""
    platform = Platform(folder)
    other = Publisher(
        tenant="acme",
        region="ap-south",
        ledger=platform.ledger,
        store=platform.store,
        keyring=platform.keyring,
        open_model=lambda manifest, file: SumModel(manifest),
        golden_inputs=golden_inputs,
        feature_counts={"fraud": FEATURES},
    )
    return platform, platform.publisher, other


def publish(publisher: Publisher, source: bytes, parent: ReleaseRecord | None = None) -> ReleaseRecord:
    return publisher.publish(source, model="fraud", now=1.8e9, parent=parent.manifest if parent else None)


def test_two_coordinators_release_at_once_and_one_joins_them(tmp_path: Path) -> None:
    platform, eu, ap = two_regions(tmp_path)
    parent = fraud_model()
    base = publish(eu, parent)
    a = publish(eu, moved(parent, "layer0.weight", 0.05), base)
    b = publish(ap, moved(parent, "layer1.weight", -0.05), base)
    assert concurrent(a.version, b.version)
    assert (show(a.version), show(b.version)) == ("eu-west:2", "ap-south:1+eu-west:1")
    record = ap.join_siblings(model="fraud", now=1.8e9 + 1)
    assert dominates(record.version, a.version)
    assert dominates(record.version, b.version)
    assert str(dot_of(record.version, [a.version, b.version])) == "ap-south:2"
    assert record.parents == (a.manifest, b.manifest), "the higher counter first"
    source = ap.source(record.manifest)
    assert (weights(source, "layer0.weight") == weights(ap.source(a.manifest), "layer0.weight")).all()
    assert (weights(source, "layer1.weight") == weights(ap.source(b.manifest), "layer1.weight")).all()
    manifest = eu.manifest(record.manifest)
    assert manifest.lineage.code == "join of eu-west:2, ap-south:1: updates added"
    for side in (a, b):  # a device on either side has a small step to take
        route = plan_update({side.manifest: 1}, manifest, {record.manifest: eu.delivery(record.manifest)})
        assert route.kind == "patch"
        assert route.bytes < record.bytes_whole
        blobs = {blob.digest: platform.store.get("blob", blob.digest) for step in route.steps for blob in step.blobs}
        keys, held = {record.manifest: eu.key(record.manifest)}, {side.manifest: eu.file(side.manifest)}
        assert open_release(manifest, route, blobs, keys, held=held) == eu.file(record.manifest)
    with pytest.raises(Malformed, match=r"found one that contains all: ap-south:2\+eu-west:2"):
        eu.join_siblings(model="fraud", now=1.8e9 + 2)


def test_siblings_of_other_shapes_have_a_winner_that_everybody_finds(tmp_path: Path) -> None:
    _, eu, ap = two_regions(tmp_path)
    base = publish(eu, fraud_model())
    first = publish(ap, fraud_model(hidden=5), base)
    second = publish(ap, fraud_model(seed=1, hidden=6), first)
    other = publish(eu, fraud_model(seed=2, hidden=7), base)
    record = eu.join_siblings(model="fraud", now=1.8e9 + 1, name="joined")
    assert record.parents == (other.manifest, second.manifest)  # eu-west:2 against ap-south:2: the later name
    assert record.name == "joined"
    manifest = eu.manifest(record.manifest)
    assert manifest.merkle_root == eu.manifest(other.manifest).merkle_root
    assert manifest.lineage.code == "join of eu-west:2, ap-south:2: the first one's file"
    route = plan_update(
        {},
        manifest,
        {record.manifest: eu.delivery(record.manifest)},
        pieces=pieces_of(manifest, eu.file(other.manifest)),
    )
    assert (route.kind, route.bytes) == ("replace", 0), "devices on the winner fetch nothing"


def test_a_withdrawn_sibling_is_not_joined(tmp_path: Path) -> None:
    platform, eu, ap = two_regions(tmp_path)
    base = publish(eu, fraud_model())
    publish(eu, moved(fraud_model(), "layer0.weight", 0.1), base)
    bad = publish(ap, moved(fraud_model(), "layer0.weight", 9.0), base)
    with platform.ledger._write() as db:
        db.execute("UPDATE releases SET withdrawn = 'bad' WHERE manifest = ?", (bad.manifest,))
    with pytest.raises(Malformed, match="expected releases made apart"):
        eu.join_siblings(model="fraud", now=1.8e9 + 1)
    with pytest.raises(Malformed, match="found one that contains all: none"):
        eu.join_siblings(model="unheard-of", now=1.8e9)


@on_a_loop
async def test_siblings_are_joined_over_http_once(tmp_path: Path) -> None:
    platform, eu, ap = two_regions(tmp_path)
    base = publish(eu, fraud_model())
    for publisher, name in ((eu, "layer0.weight"), (ap, "layer1.weight")):
        publish(publisher, moved(fraud_model(), name, 0.1), base)
    async with calling(platform) as call:
        assert (await call("POST", "/v1/releases/join", "gateway", json={"model": "fraud"})).status_code == 403
        assert (await call("POST", "/v1/releases/join", json={})).status_code == 400
        answer = await call("POST", "/v1/releases/join", json={"model": "fraud", "name": "both"})
        assert (answer.status_code, answer.json()["version"], answer.json()["name"]) == (
            200,
            "ap-south:1+eu-west:3",
            "both",
        )
        again = await call("POST", "/v1/releases/join", json={"model": "fraud"})
        assert again.status_code == 400
        assert "expected releases made apart" in again.json()["error"]
        assert (
            platform.ledger.events()[-1].text
            == "join of eu-west:2, ap-south:1: updates added is fraud ap-south:1+eu-west:3"
        )


# Roots and late devices.


def test_a_root_names_its_release_by_a_look_up(tmp_path: Path) -> None:
    _, eu, _ = two_regions(tmp_path)
    base = publish(eu, fraud_model())
    root = eu.manifest(base.manifest).merkle_root
    assert eu.release_of_root(root) == base
    for wrong in ("", "0" * 64, "../../etc/passwd", "x" * 500):
        assert eu.release_of_root(wrong) is None


def many(publisher: Publisher, count: int) -> list[ReleaseRecord]:
    source, records = fraud_model(hidden=200), []
    for number in range(count):
        source = moved(source, "layer0.weight", 0.001, at=number)
        records.append(publish(publisher, source, records[-1] if records else None))
    return records


def test_releases_far_behind_get_a_direct_patch_beside_the_delivery(tmp_path: Path) -> None:
    _, eu, _ = two_regions(tmp_path)
    records = many(eu, 7)
    delivery = eu.delivery(records[-1].manifest)
    offered = {offer.base for offer in delivery.patches}
    assert offered == {record.manifest for record in records[-4:-1]}
    assert eu.late_bases(records[-1].manifest) == tuple(record.manifest for record in records[:3])
    for record in records[:3]:
        assert eu.offer_direct(record.manifest, records[-1].manifest)
        (offer, *dense) = eu.delivery(late_delivery_name(records[-1].manifest, record.manifest)).offers
        assert {offer.base, *(other.base for other in dense)} == {record.manifest}
        assert max(other.blob.size for other in (offer, *dense)) < records[-1].bytes_whole
        assert not eu.offer_direct(record.manifest, records[-1].manifest), "made already"
    assert not eu.offer_direct(records[-2].manifest, records[-1].manifest), "the delivery has it"
    assert eu.offer_direct(records[-1].manifest, records[0].manifest), "on demand, also backwards"


@on_a_loop
async def test_a_device_that_greets_from_far_behind_finds_a_direct_patch(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    records = many(platform.publisher, 6)
    base, target = records[0].manifest, records[-1].manifest
    async with platform.running() as coordinator:
        device = platform.device("pos-0001")
        await coordinator.start_rollout(ALL, target)
        device.running = base
        await device.hello()
        await until(lambda: platform.store.has("delivery", late_delivery_name(target, base)))


@on_a_loop
async def test_direct_patches_are_made_soon_after_publication(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    records = many(platform.publisher, 5)
    async with platform.running() as coordinator:
        source = moved(platform.publisher.source(records[-1].manifest), "layer0.weight", 0.001, at=9)
        record = await coordinator.publish(source, model="fraud", parent=records[-1].manifest)
        late = [late_delivery_name(record.manifest, other.manifest) for other in records[:2]]
        await until(lambda: all(platform.store.has("delivery", name) for name in late))


@on_a_loop
async def test_a_changed_file_and_a_device_set_back_are_noticed(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    old, new = many(platform.publisher, 2)
    roots = [platform.publisher.manifest(record.manifest).merkle_root for record in (old, new)]
    async with platform.running():
        device = platform.device("pos-0001")

        async def says(running: ReleaseRecord, root: str, events: int = 0) -> list[str]:
            device.running, device.root = running.manifest, root
            before = len(platform.ledger.events(1000))
            await device.hello()
            await until(lambda: platform.ledger.device("pos-0001").running == running.manifest)
            await until(lambda: len(platform.ledger.events(1000)) >= before + events)
            await asyncio.sleep(0.02)  # for what should not be there
            return [event.text for event in platform.ledger.events(1000)[before:]]

        assert await says(new, roots[1]) == []
        (changed,) = await says(new, "ab" * 32, events=1)
        assert changed == "pos-0001: its file is no release but device:pos-0001:1+eu-west:2: damaged, or changed there"
        (back,) = await says(old, roots[0], events=1)
        assert back == "pos-0001: back with release 1 after 2: set back?"
        assert await says(old, "") == []
