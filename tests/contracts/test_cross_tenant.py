"""Two tenants with everything of their own: whatever one holds is tried on the other's side, and refused.

Keys on a shared server are tried operation by operation in `model_delta/keys/test_vault.py`.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from starlette.routing import Route

from fl_coordinator.control import control_app
from model_delta.baseline import BASELINE_TYPE
from model_delta.encoding import pack
from model_delta.errors import AtollError, SignatureInvalid, Untrusted
from model_delta.keys.certificates import device_keys_of, make_request, serial_of
from model_delta.keys.encryption import open_blob, open_sealed, seal_blob, seal_to
from model_delta.keys.keyring import ROLES, Keyring
from model_delta.plan import PLAN_TYPE
from model_delta.task import TASK_TYPE
from model_delta.trust.signing import seal_envelope
from model_delta.trust.updater import TrustState, accept_plan, accept_task
from regional_gateway import mosquitto
from tests.fakes.publisher import MODEL, mlp
from tests.fakes.real_servers import absent
from tests.fl_coordinator.platform_in_memory import Platform, fraud_model
from tests.model_delta.keys.rings import KINDS, Rings, certified, rings
from tests.regional_gateway.mqtt_stage import Authority, BrokerProcess
from tests.regional_gateway.test_region import PAYMENT, World, tensors


class RingAuthority(Authority):
    """The CA of a tenant's keyring, as a broker process takes it."""

    def __init__(self, folder: Path, ring: Keyring) -> None:
        self._folder, self._ring = folder, ring
        self.ca = folder / "ca.pem"
        self.ca.write_bytes(ring.ca_pem())

    def issue(self, name: str, *, server: bool = False) -> tuple[Path, Path]:
        """One file that holds the certificate and its key, named twice."""
        path = _identity(self._ring, self._folder, name, server=server)
        return path, path


@pytest.fixture(scope="module", params=KINDS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rings]:
    with rings(request.param, tmp_path_factory.mktemp(request.param), time.time()) as made:
        yield made


def test_an_artifact_of_one_tenant_opens_with_nothing_of_another(both: Rings) -> None:
    key, wrapped = both.acme.new_key("acme/1")
    sealed = seal_blob(key, "1" * 64, "segment", b"a model" * 1000)
    assert open_blob(both.acme.unwrap("acme/1", wrapped), "1" * 64, "segment", sealed, 10_000) == b"a model" * 1000
    for context in ("acme/1", "globex/1"):
        with pytest.raises(Untrusted):
            both.globex.unwrap(context, wrapped)
        with pytest.raises(Untrusted):
            both.globex.rewrap([(context, wrapped)])
        with pytest.raises(Untrusted):
            open_blob(both.globex.new_key(context)[0], "1" * 64, "segment", sealed, 10_000)


@pytest.mark.parametrize("role", ROLES)
def test_nothing_signed_for_one_tenant_is_believed_by_another(both: Rings, role: str) -> None:
    anchors, state, now = both.globex.anchors(), TrustState(), time.time()
    accept: dict[str, Callable[[bytes], object]] = {
        PLAN_TYPE: lambda data: accept_plan(data, "fraud", anchors, state, now),
        TASK_TYPE: lambda data: accept_task(data, "fraud", anchors, state, now),
    }
    for kind, believe in accept.items():
        with pytest.raises(SignatureInvalid):
            believe(seal_envelope(both.acme.sign(role, kind, pack({}))))
    with pytest.raises(SignatureInvalid):
        both.globex.verify(both.acme.sign(role, BASELINE_TYPE, b""), BASELINE_TYPE, role)
    assert not set(both.acme.anchors().roles[role].keys) & set(anchors.roles[role].keys)


def test_a_device_of_one_tenant_is_a_stranger_to_another(both: Rings) -> None:
    """The same name in both: its certificate, its sealed keys and its revocation stay where they belong."""
    _, sealing, mine = certified(both.acme)
    _, _, theirs = certified(both.globex)
    with pytest.raises(Untrusted, match="not issued by"):
        device_keys_of(mine, both.globex.ca_pem(), time.time())
    with pytest.raises(Untrusted):
        open_sealed(b"\x01" * 32, seal_to(sealing, b"k" * 32, b"acme"), b"acme")
    both.acme.revoke(serial_of(mine))
    assert serial_of(mine) not in both.globex.revoked()
    assert device_keys_of(theirs, both.globex.ca_pem(), time.time(), both.globex.revoked()).common_name == "pos-0001"


@pytest.mark.parametrize("kind", ["embedded", "mosquitto"])
def test_no_topic_of_a_tenants_broker_is_reached_by_anothers_certificate(
    both: Rings, kind: str, tmp_path: Path
) -> None:
    """Neither broker says a word to a stranger, who therefore has no session and no topic."""
    if kind == "mosquitto" and mosquitto.find() is None:
        absent("mosquitto")
    authority = RingAuthority(tmp_path, both.acme)
    broker = BrokerProcess(kind, tmp_path / "broker", authority, ("coordinator",))
    friend, stranger = (_identity(ring, tmp_path, "pos-0001", ring.tenant) for ring in (both.acme, both.globex))
    broker.start()
    try:
        assert asyncio.run(_first_answer(broker.port, authority.ca, friend))[:1] == b"\x20"  # CONNACK
        assert asyncio.run(_first_answer(broker.port, authority.ca, stranger)) == b""
        assert asyncio.run(_first_answer(broker.port, authority.ca, friend))[:1] == b"\x20"  # the broker took no harm
    finally:
        broker.stop()


def test_no_route_of_a_tenants_coordinator_takes_anothers_token(tmp_path: Path) -> None:
    """Every route: store, keys, metrics, state, publication. Nothing changes on the other side."""
    acme, globex = Platform(tmp_path / "acme"), Platform(tmp_path / "globex")
    roles = ("admin", "gateway", "aggregator", "flower", "join")
    tokens = {name: {role: f"{name}-{role}".ljust(32, "x") for role in roles} for name in ("acme", "globex")}
    version = globex.publisher.publish(fraud_model(1), model="fraud", now=globex.clock.now)
    app = control_app(globex.coordinator, tokens=tokens["globex"], flower=globex.bridge)
    routes = [
        (method, route.path)
        for route in app.routes
        if isinstance(route, Route)
        for method in sorted((route.methods or {"GET"}) - {"HEAD"})
    ]
    assert {("GET", "/metrics"), ("GET", "/v1/store/{kind}/{name}"), ("POST", "/v1/keys/rotate")} <= set(routes)

    async def story() -> None:
        transport = httpx.ASGITransport(app, client=("192.0.2.7", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://globex.example") as http:
            for method, path in routes:
                place = path.replace("{digest}", version.manifest).replace("{name}", version.manifest)
                place = place.replace("{kind}", "manifest").replace("{round_id}", "r")
                for token in tokens["acme"].values():
                    answer = await http.request(method, place, headers={"Authorization": f"Bearer {token}"})
                    assert answer.status_code == 401, (method, place, answer.status_code)
                    assert version.manifest not in answer.text
            mine = {"Authorization": f"Bearer {tokens['globex']['admin']}"}
            assert (await http.get(f"/v1/store/manifest/{version.manifest}", headers=mine)).status_code == 200

    asyncio.run(story())
    assert globex.ledger.releases() == [version]
    assert globex.keyring.versions() == (1, 1)
    assert acme.ledger.releases() == []
    with pytest.raises(AtollError):
        acme.publisher.key(version.manifest)


def test_no_inference_path_of_a_tenants_region_takes_anothers_token(tmp_path: Path) -> None:
    """With a good token each answers; with the neighbour's each says 401, and nothing of the model."""
    keys, worlds = _two_regions(tmp_path)
    payment = {"features": PAYMENT}
    asked: list[tuple[str, str, object]] = [
        ("POST", "/predict", payment),
        ("POST", "/predict", {**payment, "model": MODEL}),
        ("POST", f"/v2/models/{MODEL}/infer", tensors()),
        ("GET", "/v2/models", None),
        ("GET", f"/v2/models/{MODEL}", None),
        ("GET", f"/v2/models/{MODEL}/ready", None),
    ]

    async def story() -> None:
        async with worlds["acme"].region() as acme, worlds["globex"].region() as globex:
            for seed, (name, region) in enumerate({"acme": acme, "globex": globex}.items()):
                release = worlds[name].publisher.publish(mlp(seed))
                await worlds[name].publisher.plan(stable=release.digest)
                await region.until_ready()
            for region, own, other in ((acme, "acme", "globex"), (globex, "globex", "acme")):
                (digest,) = {plan.stable for plan in region.supply.plans(own)}
                assert region.supply.plans(other) == ()
                for method, path, body in asked:
                    for key, status in ((keys[own], 200), (keys[other], 401)):
                        headers = {"Authorization": f"Bearer {key}"}
                        answer = await region.client.request(method, path, json=body, headers=headers)
                        assert answer.status_code == status, (method, path, answer.text)
                        assert status == 200 or digest[:12] not in answer.text
                assert {name[-12:]: count for name, count in region.decided().items()} == {digest[:12]: 3}  # no other

    asyncio.run(story())


def test_a_regions_open_metrics_name_no_tenant_device_or_key_and_nothing_of_a_neighbour(tmp_path: Path) -> None:
    """`/metrics` of a gateway asks for no token, as scrapers expect: what it shows are counts of the process's one
    tenant, and whoever asks with the neighbour's token reads the same, none of it the neighbour's."""
    keys, worlds = _two_regions(tmp_path)

    async def story() -> None:
        async with worlds["acme"].region() as acme, worlds["globex"].region() as globex:
            digests = {}
            for seed, (name, region) in enumerate({"acme": acme, "globex": globex}.items()):
                digests[name] = worlds[name].publisher.publish(mlp(seed)).digest
                await worlds[name].publisher.plan(stable=digests[name])
                await region.until_ready()
                for key in keys.values():
                    body = {"features": PAYMENT, "device_id": f"pos-of-{name}", "request_id": f"payment-of-{name}"}
                    headers = {"Authorization": f"Bearer {key}", "X-Atoll-Device": f"pos-of-{name}"}
                    await region.client.post("/predict", json=body, headers=headers)
            for region, own, other in ((acme, "acme", "globex"), (globex, "globex", "acme")):
                bare, asked = [
                    (await region.client.get("/metrics", headers=headers)).text
                    for headers in ({}, {"Authorization": f"Bearer {keys[other]}"})
                ]
                assert [line for line in asked.splitlines() if "atoll_" in line] == [
                    line for line in bare.splitlines() if "atoll_" in line
                ]
                assert digests[own][:12] in asked
                assert 'atoll_gateway_requests_total{route="predict",status="401"} 1.0' in asked
                assert digests[other][:12] not in asked
                for name in (own, other, *keys.values(), "pos-of-", "payment-of-"):
                    assert name not in asked, name

    asyncio.run(story())


def _two_regions(folder: Path) -> tuple[dict[str, str], dict[str, World]]:
    """By tenant: the API key, and a region with everything that it needs."""
    keys = {name: f"{name}-key".ljust(32, "x") for name in ("acme", "globex")}
    for name in keys:
        (folder / name).mkdir()
    return keys, {name: World(folder / name, name, key) for name, key in keys.items()}


def _identity(ring: Keyring, folder: Path, name: str, mark: str = "", *, server: bool = False) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    path = folder / f"{name}{mark}.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(ring.issue_certificate(make_request(key, name), name, b"s" * 32, server=server) + private)
    return path


async def _first_answer(port: int, ca: Path, identity: Path) -> bytes:
    """What the broker says to a CONNECT under this certificate; nothing when it hangs up."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(ca)
    context.load_cert_chain(identity)
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
        client_id = b"pos-0001"
        body = b"\x00\x04MQTT\x05\x02\x00\x3c\x00" + len(client_id).to_bytes(2, "big") + client_id
        writer.write(b"\x10" + bytes([len(body)]) + body)
        async with asyncio.timeout(10):
            answer = await reader.read(64)
        writer.close()
    except (ssl.SSLError, ConnectionError):
        return b""
    return answer
