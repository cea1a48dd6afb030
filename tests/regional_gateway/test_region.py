"""The region as its clients see it: real releases, real models, the ASGI application called in process."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import random
import re
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from onnx import TensorProto, helper

from edge_runtime.onnx_model import open_model
from model_delta.digest import digest_of
from model_delta.encoding import pack, unpack
from model_delta.keys.keyring import EmbeddedKeyring
from model_delta.plan import BUCKETS, DeviceTraits, assign
from model_delta.store import DirectoryStore
from model_delta.topics import ChunkRequest, ChunkResponse, down, plan_topic, up
from model_delta.trust.signing import open_envelope
from monitoring.metrics import Metrics
from regional_gateway.app import create_app
from regional_gateway.limits import Limit
from regional_gateway.mirror import MISSING_SECONDS, WINDOW_MAX, Mirror
from regional_gateway.serving import Gateway
from regional_gateway.supply import KIND_PLAN, KIND_VOUCHED, Followed, Supply
from regional_gateway.tenants import Tenant, Tenants
from regional_gateway.vouching import Vouching
from tests.fakes.any_signature import model_bytes
from tests.fakes.link import FakeBroker
from tests.fakes.publisher import MODEL, NAMES, TENANT, Publisher, mlp, run_file

KEY = "a-long-random-api-key"
AUTHORIZED = {"authorization": f"Bearer {KEY}"}
PAYMENT = {"amount": 0.5, "hour": -1.0, "distance": 2.0, "count": 0.25}
ROW = np.array([[PAYMENT[name] for name in NAMES]], np.float32)


class World:
    """One broker, one publisher, and a region that can be stopped and started on the same folder."""

    def __init__(self, path: Path, tenant: str = TENANT, key: str = KEY) -> None:
        self.path, self.tenant, self.key = path, tenant, key
        self.broker = FakeBroker()
        self.publisher = Publisher(path, self.broker, tenant=tenant)
        self.sealing = X25519PrivateKey.generate()

    def vouching(self, store: DirectoryStore) -> Vouching:
        return Vouching(
            folder=self.path / "trust",
            tenant=self.tenant,
            root=self.publisher.site.provisioned(),
            anchors=self.publisher.keyring.anchors(),
            store=store,
            fetch=self.publisher.fetch,
            clock=lambda: self.publisher.now,
        )

    def noted_as_vouched_for(self, digest: str) -> bool:
        """Whether the region has it on disk that a version is vouched for."""
        return DirectoryStore(self.path / "region").has(KIND_VOUCHED, digest)

    @contextlib.asynccontextmanager
    async def region(
        self, limit: Limit | None = None, store: DirectoryStore | None = None, **settings: Any
    ) -> AsyncIterator[Region]:
        link = self.broker.link("gateway-eu-west")
        store = store or DirectoryStore(self.path / "region")
        metrics = Metrics()
        supply = Supply(
            store=store,
            link=link,
            vouching={self.tenant: self.vouching(store)},
            fetch=self.publisher.fetch,
            artifact_key=self.publisher.artifact_key,
            open_model=open_model,
            sealing=self.sealing,
            clock=lambda: self.publisher.now,
        )
        gateway = Gateway(
            region="eu-west",
            tenants=Tenants([Tenant(self.tenant, (digest_of(self.key.encode()),), MODEL, limit or Limit())]),
            versions=supply,
            feature_sets={"payments": NAMES},
            metrics=metrics,
            **settings,
        )
        mirror = Mirror(region="eu-west", link=link, store=store, fetch=self.publisher.fetch, metrics=metrics)
        transport = httpx.ASGITransport(create_app(gateway, server_version="0.1.0"))
        tasks = [asyncio.create_task(supply.run()), asyncio.create_task(mirror.run())]
        await asyncio.sleep(0)  # both have subscribed
        try:
            async with httpx.AsyncClient(transport=transport, base_url="http://region") as client:
                yield Region(client, gateway, supply, tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            link.close()


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not true():  # noqa: ASYNC110 (what is waited for has no event to offer)
            await asyncio.sleep(0.002)


class Region:
    def __init__(
        self, client: httpx.AsyncClient, gateway: Gateway, supply: Supply, tasks: list[asyncio.Task[None]]
    ) -> None:
        self.client, self.gateway, self.supply, self.tasks = client, gateway, supply, tasks

    async def until(self, true: Callable[[], bool]) -> None:
        await until(true)
        assert not any(task.done() for task in self.tasks)

    async def until_ready(self) -> None:
        await self.until(self.gateway.ready)

    def decided(self) -> dict[str, int]:
        """How many payments each version has scored here."""
        text = self.gateway.metrics.render().decode()
        found: dict[str, int] = {}
        for version, count in re.findall(r'gateway_decisions_total\{.*version="(.*)"\} (\d+)', text):
            found[version] = found.get(version, 0) + int(count)
        return found

    async def predict(self, **body: Any) -> httpx.Response:
        return await self.client.post("/predict", json={"features": PAYMENT, **body}, headers=AUTHORIZED)

    async def infer(self, body: Any, path: str = f"/v2/models/{MODEL}/infer", **headers: str) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.client.post(path, content=content, headers={**AUTHORIZED, **headers})


def run_in(world: World, story: Callable[[Region], Awaitable[None]], **settings: Any) -> None:
    async def whole() -> None:
        async with world.region(**settings) as region:
            await story(region)

    asyncio.run(whole())


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def tensors(rows: np.ndarray[Any, Any] = ROW, **fields: Any) -> dict[str, Any]:
    data = rows.ravel().tolist()
    return {"inputs": [{"name": "features", "shape": list(rows.shape), "datatype": "FP32", "data": data}], **fields}


# --- a decision ---


def test_a_payment_is_scored_by_the_released_model(world: World) -> None:
    file = mlp(1)

    async def story(region: Region) -> None:
        release = world.publisher.publish(file)
        await world.publisher.plan(stable=release.digest)
        await region.until_ready()
        answer = await region.predict(request_id="r-1", device_id="pos-0001")
        assert answer.status_code == 200, answer.text
        body = answer.json()
        expected = float(run_file(file, ROW)[0, 0])
        assert body["score"] == pytest.approx(expected, abs=1e-6)
        assert body["decision"] == ("approve" if expected < 0.5 else "decline")
        assert body["model_version"] == f"eu-west:1@{release.digest[:12]}"
        assert body["manifest"] == release.digest
        assert body["region"] == "eu-west"
        assert body["request_id"] == "r-1"
        assert 0 < body["latency_ms"] < 1_000
        assert "threshold 0.5" in body["reason"]
        assert region.decided() == {f"eu-west:1@{release.digest[:12]}": 1}

    run_in(world, story)


@pytest.mark.parametrize(("bias", "decision"), [(-6.0, "approve"), (6.0, "decline")])
def test_the_versions_threshold_decides(world: World, bias: float, decision: str) -> None:
    async def story(region: Region) -> None:
        await world.publisher.plan(stable=world.publisher.publish(mlp(1, bias)).digest)
        await region.until_ready()
        assert (await region.predict()).json()["decision"] == decision

    run_in(world, story)


def test_refusals_have_their_status_and_one_line(world: World) -> None:
    async def story(region: Region) -> None:
        client = region.client
        early = await region.predict()
        assert early.status_code == 503
        assert early.headers["retry-after"] == "1"
        assert "no model of tenant acme is known here yet" in early.json()["error"]

        await world.publisher.plan(stable=world.publisher.publish(mlp(1)).digest)
        await region.until_ready()
        few = await client.post("/predict", json={"features": {"amount": 1.0}}, headers=AUTHORIZED)
        unknown = await client.post("/predict", json={"features": PAYMENT}, headers={"authorization": "Bearer guess"})
        absent = await client.post("/predict", json={"features": PAYMENT})
        large = await client.post("/predict", content=b" " * 70_000, headers=AUTHORIZED)
        model = await region.infer(tensors(), "/v2/models/nosuch/infer")
        version = await region.infer(tensors(), f"/v2/models/{MODEL}/versions/{'c' * 64}/infer")
        route = await client.get("/nosuch")
        method = await client.get("/predict")
        shape = await region.infer(tensors(ROW[:, :3]))
        nested = await region.infer(b"[" * 100_000)
        length = await region.infer(b"{}", **{"inference-header-content-length": "x"})
        zipped = await region.infer(gzip.compress(b"{}"), **{"content-encoding": "gzip"})
        for answer, status, text in (
            (zipped, 400, "Content-Encoding: expected none, found 'gzip'"),
            (few, 400, "missing hour, distance, count"),
            (unknown, 401, "API key"),
            (absent, 401, "Bearer"),
            (large, 413, "at most 65536 bytes"),
            (model, 404, "expected one of fraud, found 'nosuch'"),
            (version, 404, "expected one of the versions"),
            (route, 404, "openapi"),
            (method, 404, "openapi"),
            (shape, 400, "expected shape [-1, 4], found [1, 3]"),
            (nested, 400, "expected JSON like"),
            (length, 400, "Inference-Header-Content-Length"),
        ):
            assert answer.status_code == status, answer.text
            assert list(answer.json()) == ["error"]
            assert text in answer.json()["error"]
            assert "\n" not in answer.json()["error"]
        assert unknown.headers["www-authenticate"] == "Bearer"
        assert region.decided() == {}

    run_in(world, story)


def test_a_model_without_named_features_takes_tensors_only(world: World) -> None:
    async def story(region: Region) -> None:
        await world.publisher.plan(stable=world.publisher.publish(mlp(1), feature_set="").digest)
        await region.until_ready()
        answer = await region.predict()
        assert answer.status_code == 400
        assert "/v2/models/fraud/infer" in answer.json()["error"]
        assert (await region.infer(tensors())).status_code == 200

    run_in(world, story)


def test_a_tenant_over_its_limit_is_told_when_to_return(world: World) -> None:
    async def story(region: Region) -> None:
        await world.publisher.plan(stable=world.publisher.publish(mlp(1)).digest)
        await region.until_ready()
        statuses = [(await region.predict()).status_code for _ in range(4)]
        assert statuses == [200, 200, 200, 429]
        answer = await region.predict()
        assert answer.headers["retry-after"] == "100"
        assert "expected at most 0.01 requests/s in bursts of 3" in answer.json()["error"]

    run_in(world, story, limit=Limit(rate_per_second=0.01, burst=3))


# --- Open Inference Protocol ---


def test_metadata_and_health(world: World) -> None:
    async def story(region: Region) -> None:
        client = region.client
        assert (await client.get("/healthz")).json() == {"status": "ok", "region": "eu-west"}
        assert (await client.get("/v2")).json() == {
            "name": "atoll",
            "version": "0.1.0",
            "extensions": ["binary_tensor_data"],
        }
        assert (await client.get("/v2/health/live")).json() == {"live": True}
        assert (await client.get("/v2/health/ready")).status_code == 503
        release = world.publisher.publish(mlp(1))
        await world.publisher.plan(stable=release.digest)
        await region.until_ready()
        assert (await client.get("/v2/health/ready")).json() == {"ready": True}
        name = f"eu-west:1@{release.digest[:12]}"
        for path in (f"/v2/models/{MODEL}", f"/v2/models/{MODEL}/versions/{name}"):
            assert (await client.get(path, headers=AUTHORIZED)).json() == {
                "name": MODEL,
                "versions": [name],
                "platform": "onnx_onnxv1",
                "inputs": [{"name": "features", "datatype": "FP32", "shape": [-1, 4]}],
                "outputs": [{"name": "score", "datatype": "FP32", "shape": [-1, 1]}],
            }
            ready = await client.get(f"{path}/ready", headers=AUTHORIZED)
            assert (ready.status_code, ready.json()) == (200, {"name": MODEL, "ready": True})
        assert (await client.get(f"/v2/models/{MODEL}")).status_code == 401
        assert (await client.get("/v2/models/x", headers=AUTHORIZED)).status_code == 404
        assert (await client.get(f"/v2/models/{MODEL}/versions/beef", headers=AUTHORIZED)).status_code == 404
        (listed,) = (await client.get("/v2/models", headers=AUTHORIZED)).json()
        assert (listed["name"], listed["ready"]) == (MODEL, True)
        document = (await client.get("/openapi.json")).json()
        assert {"/predict", "/v2/models/{model}/infer", "/v2/health/ready"} <= document["paths"].keys()
        assert "PredictRequest" in document["components"]["schemas"]

    run_in(world, story)


def test_inference_in_json_and_binary_gives_the_models_own_numbers(world: World) -> None:
    file = mlp(3)
    rows = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    expected = run_file(file, rows)

    async def story(region: Region) -> None:
        release = world.publisher.publish(file)
        await world.publisher.plan(stable=release.digest)
        await region.until_ready()
        plain = await region.infer(tensors(rows, id="42"))
        assert plain.status_code == 200, plain.text
        body = plain.json()
        assert (body["id"], body["model_name"]) == ("42", MODEL)
        assert body["model_version"] == f"eu-west:1@{release.digest[:12]}"
        (output,) = body["outputs"]
        assert (output["name"], output["datatype"], output["shape"]) == ("score", "FP32", [5, 1])
        np.testing.assert_allclose(output["data"], expected.ravel(), atol=1e-6)

        header = json.dumps(
            {
                "inputs": [
                    {
                        "name": "features",
                        "shape": [5, 4],
                        "datatype": "FP32",
                        "parameters": {"binary_data_size": rows.nbytes},
                    }
                ],
                "parameters": {"binary_data_output": True},
            }
        ).encode()
        for path in (f"/v2/models/{MODEL}/infer", f"/v2/models/{MODEL}/versions/{release.digest[:16]}/infer"):
            packed = await region.infer(
                header + rows.tobytes(), path, **{"inference-header-content-length": str(len(header))}
            )
            assert packed.status_code == 200, packed.text
            assert packed.headers["content-type"] == "application/octet-stream"
            length = int(packed.headers["inference-header-content-length"])
            assert json.loads(packed.content[:length])["outputs"][0]["parameters"] == {"binary_data_size": 20}
            found = np.frombuffer(packed.content[length:], "<f4").reshape(5, 1)
            np.testing.assert_allclose(found, expected, atol=1e-6)
        assert sum(region.decided().values()) == 15

    run_in(world, story)


def test_no_body_makes_the_region_fail(world: World) -> None:
    chance = random.Random(7)
    plain = json.dumps({"features": PAYMENT, "device_id": "pos-0001"}).encode()
    flat = json.dumps(tensors(id="1", outputs=[{"name": "score"}])).encode()
    pieces = [b"null", b"-1", b"1e400", b"[]", b"{}", b'"x"', b"[[", b"\xff", b"9" * 30, b"true", b",", b""]

    def broken(body: bytes) -> bytes:
        for _ in range(chance.randint(1, 3)):
            start = chance.randrange(len(body) + 1)
            end = min(len(body), start + chance.choice((0, 1, 2, 8, 40)))
            body = body[:start] + chance.choice(pieces) + body[end:]
        return body

    async def story(region: Region) -> None:
        await world.publisher.plan(stable=world.publisher.publish(mlp(1)).digest)
        await region.until_ready()
        statuses = set()
        for _ in range(400):
            headers = {"inference-header-content-length": str(chance.randint(-1, 200))} if chance.random() < 0.3 else {}
            for answer in (
                await region.client.post("/predict", content=broken(plain), headers=AUTHORIZED),
                await region.infer(broken(flat), **headers),
            ):
                statuses.add(answer.status_code)
                assert answer.status_code in (200, 400, 404), answer.text
                assert answer.status_code == 200 or list(answer.json()) == ["error"]
        assert {200, 400} <= statuses

    run_in(world, story)


# --- following the plan ---


def test_a_canary_answers_for_its_devices_and_no_others(world: World) -> None:
    async def story(region: Region) -> None:
        stable, target = (world.publisher.publish(mlp(seed)).digest for seed in (1, 2))
        plan = await world.publisher.plan(stable=stable, target=target, buckets=BUCKETS // 2)
        await region.until(lambda: len(region.supply.pool) == 2)
        seen = set()
        for number in range(40):
            device = f"pos-{number:04d}"
            expected = assign(plan, DeviceTraits(device, TENANT, "pos", "eu-west")).manifest
            assert (await region.predict(device_id=device, device_class="pos")).json()["manifest"] == expected
            by_header = await region.infer(tensors(), **{"x-atoll-device": device})
            assert by_header.json()["model_version"].endswith(expected[:12])
            seen.add(expected)
        assert seen == {stable, target}
        assert (await region.predict()).json()["manifest"] == stable
        await world.publisher.plan(stable=stable, target=target, buckets=BUCKETS)
        await region.until(lambda: bool(region.supply.plans()) and region.supply.plans()[0].serial == 2)
        assert (await region.predict()).json()["manifest"] == target
        await world.publisher.plan(stable=stable, target=target, buckets=BUCKETS, withdrawn=(target,))
        await region.until(lambda: region.supply.plans()[0].serial == 3)
        assert (await region.predict(device_id="pos-0001")).json()["manifest"] == stable
        gone = await region.infer(tensors(), f"/v2/models/{MODEL}/versions/{target}/infer")
        assert gone.status_code == 404
        await region.until(lambda: len(region.supply.pool) == 1)

    run_in(world, story)


def test_an_older_or_foreign_plan_changes_nothing(world: World) -> None:
    async def story(region: Region) -> None:
        first, second = (world.publisher.publish(mlp(seed)).digest for seed in (1, 2))
        await world.publisher.plan(stable=second, serial=7)
        await region.until_ready()
        older = world.publisher.make_plan(stable=first, serial=6)
        forged = world.publisher.make_plan(stable=first, serial=8)
        topic = plan_topic(TENANT, MODEL)
        await world.publisher.link.publish(topic, world.publisher.sign(older), retain=True)
        await asyncio.sleep(0.05)
        await world.publisher.link.publish(topic, world.publisher.sign(forged)[:-1] + b"\0", retain=True)
        await asyncio.sleep(0.05)
        assert (await region.predict()).json()["manifest"] == second
        assert [plan.serial for plan in region.supply.plans()] == [7]

    run_in(world, story)


def test_a_target_that_cannot_be_trusted_leaves_the_stable_version_answering(world: World) -> None:
    async def story(region: Region) -> None:
        stable = world.publisher.publish(mlp(1)).digest
        faulty = world.publisher.publish(mlp(2), golden_shift=0.2).digest
        await world.publisher.plan(stable=stable, target=faulty, buckets=BUCKETS)
        await region.until_ready()
        answer = (await region.predict()).json()
        assert answer["manifest"] == stable
        assert f"while {faulty[:12]} is not loaded" in answer["reason"]
        asked = await region.infer(tensors(), f"/v2/models/{MODEL}/versions/{faulty}/infer")
        assert asked.status_code == 503
        assert "golden case 0: expected 'score' within 0.0001" in asked.json()["error"]
        assert region.decided() == {f"eu-west:1@{stable[:12]}": 1}

    run_in(world, story)


def test_the_first_requests_wait_for_the_load_and_cause_one(world: World) -> None:
    async def story(region: Region) -> None:
        release = world.publisher.publish(mlp(1))
        gate = asyncio.Event()
        fetch = world.publisher.fetch

        async def slow(kind: str, name: str) -> bytes:
            await gate.wait()
            return await fetch(kind, name)

        region.supply._fetch = slow
        await world.publisher.plan(stable=release.digest)
        await region.until(lambda: bool(region.supply.plans()))
        requests = [asyncio.create_task(region.predict()) for _ in range(20)]
        await asyncio.sleep(0.02)
        assert (await region.client.get("/v2/health/ready")).status_code == 503
        gate.set()
        assert {answer.status_code for answer in await asyncio.gather(*requests)} == {200}
        assert world.publisher.fetched["manifest", release.digest] == 1

    run_in(world, story)


def test_a_load_that_takes_too_long_is_a_503_and_goes_on(world: World) -> None:
    async def story(region: Region) -> None:
        release = world.publisher.publish(mlp(1))
        world.publisher.up = False
        await world.publisher.plan(stable=release.digest)
        await region.until(lambda: bool(region.supply.plans()))
        answer = await region.predict()
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        world.publisher.up = True
        await region.until_ready()
        assert (await region.predict()).status_code == 200

    run_in(world, story, wait_seconds_max=0.05)


# --- alone ---


def test_the_region_answers_while_broker_and_coordinator_are_away_and_after_its_own_restart(world: World) -> None:
    async def story() -> None:
        release = world.publisher.publish(mlp(1))
        async with world.region() as region:
            await world.publisher.plan(stable=release.digest)
            await region.until_ready()
            world.publisher.up = False
            world.broker.up = False
            assert (await region.predict()).status_code == 200
        asked = objects_asked_for(world), world.publisher.keys_given.total()
        world.publisher.now += 30 * 86_400  # the plan has expired meanwhile; nobody said anything newer
        async with world.region() as region:
            await region.until_ready()
            assert (await region.predict()).json()["manifest"] == release.digest
        assert (objects_asked_for(world), world.publisher.keys_given.total()) == asked

    asyncio.run(story())


def objects_asked_for(world: World) -> int:
    """Without the repository's files, of which a region asks for newer ones."""
    return sum(count for (kind, _), count in world.publisher.fetched.items() if kind != "tuf")


def test_a_version_that_nobody_vouches_for_is_not_taken_whoever_signed_the_plan(world: World) -> None:
    async def story() -> None:
        first = world.publisher.publish(mlp(1))
        async with world.region() as region:
            await world.publisher.plan(stable=first.digest)
            await region.until_ready()
            invented = world.publisher.publish(mlp(2), vouched=False)
            await world.publisher.plan(stable=first.digest, target=invented.digest, buckets=BUCKETS)
            await region.until(lambda: world.publisher.fetched["manifest", invented.digest] > 0)
            await region.until(lambda: world.publisher.fetched["tuf", "timestamp.json"] > 1)
            await asyncio.sleep(0.05)
            assert (await region.predict()).json()["manifest"] == first.digest
            assert not world.publisher.keys_given[invented.digest]

    asyncio.run(story())


def test_a_version_that_was_withdrawn_does_not_come_back_with_a_plan(world: World) -> None:
    async def story() -> None:
        first, second = (world.publisher.publish(mlp(seed)) for seed in (1, 2))
        async with world.region() as region:
            await world.publisher.plan(stable=first.digest)
            await region.until_ready()
        world.publisher.site.withdraw(open_envelope(first.envelope).payload)
        world.publisher.site.publish()
        async with world.region() as region:
            await region.until(lambda: not world.noted_as_vouched_for(first.digest))
            assert (await region.predict()).status_code == 503
            await world.publisher.plan(stable=second.digest)
            await region.until_ready()

    asyncio.run(story())


def test_a_region_learns_new_plan_keys_when_it_meets_an_unknown_signature(world: World) -> None:
    async def story() -> None:
        first, second = (world.publisher.publish(mlp(seed)) for seed in (1, 2))
        async with world.region() as region:
            await world.publisher.plan(stable=first.digest)
            await region.until_ready()
            world.publisher.keyring = EmbeddedKeyring.create(world.path / "other-keys", TENANT)
            world.publisher.site.rotate_anchors(world.publisher.keyring.anchors())
            region.supply._vouching[TENANT]._refreshed -= 60.0  # type: ignore[attr-defined]
            await world.publisher.plan(stable=second.digest)
            await region.until(lambda: world.publisher.keys_given[second.digest] == 1)

    asyncio.run(story())


def test_a_region_says_when_news_are_held_back(world: World) -> None:
    async def story() -> None:
        vouching = world.vouching(DirectoryStore(world.path / "region"))
        await vouching.refresh()
        assert vouching.alarm() == ""
        asking = asyncio.create_task(vouching.run(every_s=0.01))
        world.publisher.up = False
        world.publisher.now += 9 * 86_400  # a timestamp lasts a day, and the grace is seven
        assert "holding news back" in vouching.alarm()
        world.publisher.up = True
        world.publisher.site.keep_fresh(world.publisher.now)
        await until(lambda: vouching.alarm() == "")
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)

    asyncio.run(story())


def test_a_kept_key_is_worth_nothing_without_the_regions_own(world: World) -> None:
    async def story() -> None:
        release = world.publisher.publish(mlp(1))
        async with world.region() as region:
            await world.publisher.plan(stable=release.digest)
            await region.until_ready()
        world.sealing = X25519PrivateKey.generate()
        async with world.region() as region:
            await region.until_ready()
        assert world.publisher.keys_given[release.digest] == 2

    asyncio.run(story())


def test_a_rollback_is_refused_across_a_restart(world: World) -> None:
    async def story() -> None:
        first, second = (world.publisher.publish(mlp(seed)).digest for seed in (1, 2))
        async with world.region() as region:
            await world.publisher.plan(stable=second, serial=5)
            await region.until_ready()
        world.broker.retained.clear()
        await world.publisher.plan(stable=first, serial=4)
        async with world.region() as region:
            await region.until_ready()
            await asyncio.sleep(0.05)
            assert (await region.predict()).json()["manifest"] == second

    asyncio.run(story())


# --- leaving ---


def test_draining_says_so_first_and_finishes_what_is_in_flight(world: World) -> None:
    async def story(region: Region) -> None:
        await world.publisher.plan(stable=world.publisher.publish(mlp(1)).digest)
        await region.until_ready()
        sent, release_body = asyncio.Event(), asyncio.Event()

        async def slow_body() -> AsyncIterator[bytes]:
            body = json.dumps({"features": PAYMENT}).encode()
            yield body[:10]
            sent.set()
            await release_body.wait()
            yield body[10:]

        # ASGITransport reads the body as the application does, so the request is in flight while it is held.
        slow = asyncio.create_task(region.client.post("/predict", content=slow_body(), headers=AUTHORIZED))
        await sent.wait()
        leaving = asyncio.create_task(region.gateway.drain(settle_seconds=0.1, deadline_seconds=5))
        await asyncio.sleep(0.01)
        assert (await region.client.get("/v2/health/ready")).status_code == 503
        assert (await region.client.get("/v2/health/live")).status_code == 200
        late = await region.predict()
        assert late.status_code == 200
        assert late.headers["connection"] == "close"
        await asyncio.sleep(0.12)
        assert not leaving.done()
        release_body.set()
        assert (await slow).status_code == 200
        assert await leaving is True

    run_in(world, story)


def test_too_many_at_once_are_refused_not_queued(world: World) -> None:
    async def story(region: Region) -> None:
        await world.publisher.plan(stable=world.publisher.publish(mlp(1)).digest)
        await region.until_ready()
        with region.gateway.flight():
            answer = await region.predict()
        assert answer.status_code == 503
        assert "at most 1 requests at once" in answer.json()["error"]
        assert (await region.predict()).status_code == 200

    run_in(world, story, in_flight_max=1)


# --- metrics ---


def test_what_happened_is_counted(world: World) -> None:
    async def story(region: Region) -> None:
        release = world.publisher.publish(mlp(1, bias=-6))
        await world.publisher.plan(stable=release.digest)
        await region.until_ready()
        for _ in range(3):
            await region.predict()
        await region.client.post("/predict", content=b"{", headers=AUTHORIZED)
        text = (await region.client.get("/metrics")).text
        assert 'atoll_gateway_requests_total{route="predict",status="200"} 3.0' in text
        assert 'atoll_gateway_requests_total{route="predict",status="400"} 1.0' in text
        name = f"eu-west:1@{release.digest[:12]}"
        assert f'atoll_gateway_decisions_total{{arm="stable",decision="approve",version="{name}"}} 3.0' in text
        assert "atoll_gateway_models_loaded 1.0" in text
        assert "atoll_gateway_ready 1.0" in text
        assert "atoll_gateway_cold_load_seconds_count 1.0" in text

    run_in(world, story)


def test_a_score_of_a_model_that_decides_no_payments_counts_as_no_decision(world: World) -> None:
    ports = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", len(NAMES)]) for name in ("features", "score")
    )
    other = model_bytes([helper.make_node("Neg", ["features"], ["score"])], [next(ports)], [next(ports)], {})

    async def story(region: Region) -> None:
        await world.publisher.plan(stable=world.publisher.publish(other, feature_set="").digest)
        await region.until_ready()
        answer = await region.infer(tensors())
        assert (answer.status_code, answer.json()["outputs"][0]["data"]) == (200, (-ROW).ravel().tolist())
        assert region.decided() == {}

    run_in(world, story)


# --- the mirror ---


class Device:
    """A device that asks its region for bytes."""

    def __init__(self, world: World, name: str = "pos-0001") -> None:
        self.name, self.link = name, world.broker.link(name)
        self.answers: dict[int, ChunkResponse] = {}
        self.link.subscribe(down(name, "res"), self._on_answer)

    def _on_answer(self, topic: str, payload: bytes) -> None:
        answer = unpack(payload, ChunkResponse)
        self.answers[answer.request] = answer

    async def ask(self, request: ChunkRequest) -> None:
        await self.link.publish(up(self.name, "req/eu-west"), pack(request))

    async def read(self, kind: Any, name: str, length: int = 1_000) -> bytes:
        data, total, number = b"", 1, 0
        while len(data) < total:
            number += 1
            self.answers.pop(number, None)
            await self.ask(ChunkRequest(number, kind, name, len(data), length))
            await until(lambda number=number: number in self.answers)  # type: ignore[misc]
            answer = self.answers[number]
            assert not answer.error, answer.error
            data, total = data + answer.data, answer.total
        return data


def test_devices_get_every_object_of_a_release_and_the_coordinator_is_asked_once(world: World) -> None:
    async def story(region: Region) -> None:
        release = world.publisher.publish(mlp(1))
        devices = [Device(world, f"pos-{number:04d}") for number in range(5)]
        for kind, name in world.publisher.objects:
            copies = await asyncio.gather(*(device.read(kind, name) for device in devices))
            assert set(copies) == {world.publisher.objects[kind, name]}
            assert world.publisher.fetched[kind, name] == 1
        assert await devices[0].read("manifest", release.digest) == release.envelope
        sent = sum(len(data) for data in world.publisher.objects.values()) * 5 + len(release.envelope)
        counted = sum(
            region.gateway.metrics.value("atoll_mirror_bytes_total", kind=kind)
            for kind in ("manifest", "delivery", "blob")
        )
        assert counted == sent
        world.publisher.up = False
        assert await devices[0].read("delivery", release.digest) == pack(release.delivery)

    run_in(world, story)


def test_the_mirror_says_what_it_has_not_got_and_remembers_for_a_moment(world: World) -> None:
    async def story(region: Region) -> None:
        device = Device(world)
        missing = "d" * 64
        for number in range(1, 4):
            await device.ask(ChunkRequest(number, "blob", missing))
            await region.until(lambda number=number: number in device.answers)  # type: ignore[misc]
        assert all("blob dddddddddddd" in device.answers[number].error for number in (1, 2, 3))
        assert world.publisher.fetched["blob", missing] == 1
        assert MISSING_SECONDS < 10
        await device.ask(ChunkRequest(4, "blob", "../../etc/passwd"))
        await region.until(lambda: 4 in device.answers)
        assert "expected 64 hexadecimal characters" in device.answers[4].error
        world.publisher.up = False
        await device.ask(ChunkRequest(5, "blob", "e" * 64))
        await region.until(lambda: 5 in device.answers)
        assert "away" in device.answers[5].error

    run_in(world, story)


def test_a_device_may_ask_what_is_kept_without_having_it_fetched(world: World) -> None:
    async def story(region: Region) -> None:
        release = world.publisher.publish(mlp(1))
        name = next(iter(release.blobs))
        device = Device(world)
        await device.ask(ChunkRequest(1, "blob", name, 0, 0, kept_only=True))
        await region.until(lambda: 1 in device.answers)
        assert f"no blob named {name[:16]}" in device.answers[1].error
        assert world.publisher.fetched["blob", name] == 0
        await device.ask(ChunkRequest(2, "blob", name))
        await region.until(lambda: 2 in device.answers)
        await device.ask(ChunkRequest(3, "blob", name, 0, 0, kept_only=True))
        await region.until(lambda: 3 in device.answers)
        answer = device.answers[3]
        assert (answer.error, answer.total, answer.data) == ("", len(release.blobs[name]), b"")
        assert world.publisher.fetched["blob", name] == 1

    run_in(world, story)


def test_a_damaged_copy_is_not_kept(world: World) -> None:
    async def story(region: Region) -> None:
        release = world.publisher.publish(mlp(1))
        name = next(iter(release.blobs))
        good = world.publisher.objects["blob", name]
        world.publisher.objects["blob", name] = good[:-1] + b"\0\0"
        device = Device(world)
        await device.ask(ChunkRequest(1, "blob", name))
        await region.until(lambda: 1 in device.answers)
        assert "expected sha256" in device.answers[1].error
        world.publisher.objects["blob", name] = good
        assert await device.read("blob", name) == good

    run_in(world, story)


def test_plans_and_keys_of_the_region_are_not_handed_out(world: World) -> None:
    async def story(region: Region) -> None:
        release = world.publisher.publish(mlp(1))
        await world.publisher.plan(stable=release.digest)
        await region.until_ready()
        device = Device(world)
        for number, kind in enumerate(("key", "plan"), start=1):
            payload = pack({"request": number, "kind": kind, "name": release.digest, "offset": 0, "length": 1_000})
            await device.link.publish(up(device.name, "req/eu-west"), payload)
        await region.until(lambda: region.gateway.metrics.value("atoll_mirror_requests_total", result="malformed") == 2)
        assert device.answers == {}

    run_in(world, story)


def test_one_device_cannot_crowd_out_the_others(world: World) -> None:
    async def story(region: Region) -> None:
        world.publisher.publish(mlp(1))
        kind, name = next(iter(world.publisher.objects))
        greedy, modest = Device(world, "pos-0001"), Device(world, "pos-0002")
        for number in range(200):
            world.broker.deliver(up(greedy.name, "req/eu-west"), pack(ChunkRequest(number, kind, name)))  # type: ignore[arg-type]
        world.broker.deliver(up(modest.name, "req/eu-west"), pack(ChunkRequest(1, kind, name)))  # type: ignore[arg-type]
        await region.until(lambda: 1 in modest.answers)
        value = region.gateway.metrics.value
        assert value("atoll_mirror_requests_total", result="over_window") == 200 - WINDOW_MAX
        await region.until(lambda: len(greedy.answers) == WINDOW_MAX)
        await greedy.read(kind, name)

    run_in(world, story)


def test_a_withdrawal_that_was_heard_outlives_the_coordinators_silence(world: World) -> None:
    async def story() -> None:
        first = world.publisher.publish(mlp(1))
        async with world.region() as region:
            await world.publisher.plan(stable=first.digest)
            await region.until_ready()
        world.publisher.site.withdraw(open_envelope(first.envelope).payload)
        world.publisher.site.publish()
        assert world.noted_as_vouched_for(first.digest)
        async with world.region() as region:
            await region.until(lambda: not world.noted_as_vouched_for(first.digest))
        world.publisher.up = False
        async with world.region() as region:
            await region.until(lambda: bool(region.supply.plans()))
            assert (await region.predict()).status_code == 503

    asyncio.run(story())


class SlowToRaiseTheFloor(DirectoryStore):
    """A disk that takes its time for a plan whose floor was just raised."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.raising, self.raised, self._long = threading.Event(), threading.Event(), threading.Event()

    def put(self, kind: str, name: str, data: bytes) -> None:
        if kind == KIND_PLAN and unpack(data, Followed).state.release_floor:
            self.raising.set()
            self._long.wait(0.2)
            super().put(kind, name, data)
            self.raised.set()
        else:
            super().put(kind, name, data)

    def kept(self) -> list[tuple[int, bool]]:
        """The plans on disk: each one's serial, and whether its floor was raised."""
        every = [unpack(self.get(KIND_PLAN, name), Followed) for name in self.names(KIND_PLAN)]
        return [(one.state.plan_serial, one.state.release_floor > 0) for one in every]


def test_a_floor_that_is_written_next_to_a_newer_plan_does_not_bring_the_older_one_back(world: World) -> None:
    async def story() -> None:
        store = SlowToRaiseTheFloor(world.path / "region")
        first = world.publisher.publish(mlp(1))
        async with world.region(store=store) as region:
            await world.publisher.plan(stable=first.digest)
            await region.until(store.raising.is_set)
            newer = await world.publisher.plan(stable=first.digest)
            await region.until_ready()
            await region.until(lambda: region.supply.plan(TENANT, MODEL) == newer)
            await region.until(store.raised.is_set)
            await region.until(lambda: store.kept() == [(newer.serial, True)])
            await asyncio.sleep(0.05)
        assert store.kept() == [(newer.serial, True)]

    asyncio.run(story())
