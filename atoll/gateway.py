"""Wiring of one region's gateway: its link, its supply from the coordinator, its mirror, its relay, its HTTP server."""

from __future__ import annotations

import asyncio
import itertools
import time
from pathlib import Path

import httpx

from atoll import __version__
from atoll.control_client import ControlClient, retry_until
from atoll.enrolment import enrolled_identity
from atoll.entry import run_process
from atoll.events import Events
from atoll.http_server import serving
from atoll.platform import gateway_name, port_of, read_anchors, read_root
from atoll.relay import relaying
from atoll.settings import MODEL, TENANT, ConfigurationError, DataFolder
from atoll.stores import choose_gateway_store, gateway_store, places_of
from device_sim.payments_csv import CSV_FEATURE_SET, CSV_FEATURES
from device_sim.terminal_features import FEATURE_SET, FEATURES
from edge_runtime.identity import Identity
from edge_runtime.link import MqttLink
from edge_runtime.onnx_model import open_model
from model_delta.digest import digest_of
from model_delta.encoding import unpack
from model_delta.errors import AtollError, Malformed, NotFound, Unavailable, Untrusted
from model_delta.keys.encryption import open_sealed
from model_delta.store import DirectoryStore
from model_delta.topics import KeyRequest, KeyResponse, StoreKind, artifact_key_info, down, up
from monitoring.metrics import Metrics
from regional_gateway.app import create_app
from regional_gateway.cache import BoundedStore
from regional_gateway.mirror import Mirror
from regional_gateway.routing import wanted
from regional_gateway.serving import Gateway
from regional_gateway.supply import Supply
from regional_gateway.tenants import Tenant, Tenants
from regional_gateway.vouching import Vouching

ENROL_DEADLINE_S = 60.0
KEY_DEADLINE_S = 10.0
FETCH_TIMEOUT_S = 20.0
SETTLE_S = 0.5
DRAIN_S = 5.0

FEATURE_SETS = {FEATURE_SET: FEATURES, CSV_FEATURE_SET: CSV_FEATURES}
"""Named features of the payment tables that come with Atoll."""


class KeyDesk:
    """Asks the coordinator for artifact keys over the link, and opens what comes back."""

    def __init__(self, link: MqttLink, identity: Identity) -> None:
        self._link, self._identity = link, identity
        self._numbers = itertools.count(time.time_ns() % (1 << 40))
        self._waiting: dict[int, asyncio.Future[KeyResponse]] = {}
        link.subscribe(down(identity.name, "key"), self._on_response)

    async def artifact_key(self, manifest: str) -> bytes:
        """The artifact key of a manifest digest. Raises Unavailable when nobody answers, Untrusted when refused."""
        number = next(self._numbers)
        request = KeyRequest(number, self._identity.name, manifest, int(time.time()))
        answer: asyncio.Future[KeyResponse] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            async with asyncio.timeout(KEY_DEADLINE_S):
                await self._link.publish(up(self._identity.name, "key"), self._identity.key_request(request))
                response = await answer
        except TimeoutError:
            raise Unavailable(f"key of version {manifest[:12]}: no answer within {KEY_DEADLINE_S:g} s") from None
        finally:
            del self._waiting[number]
        if response.error:
            raise Untrusted(f"key of version {manifest[:12]}: the coordinator refused: {response.error}")
        return open_sealed(self._identity.sealing, response.sealed, artifact_key_info(self._identity.name, manifest))

    def _on_response(self, topic: str, payload: bytes) -> None:
        try:
            response = unpack(payload, KeyResponse)
        except Malformed:
            return
        waiting = self._waiting.get(response.request)
        if waiting is not None and not waiting.done():
            waiting.set_result(response)


def run_gateway(path: Path, region: str, *, store: str = "", as_json: bool = False) -> None:
    """Run the gateway of `region` of the platform in the data folder `path` until it is told to stop; its copies are
    at `store` from now on, unless that is ""."""
    data = DataFolder.open(path)
    endpoints = data.endpoints()
    if region not in endpoints.gateways:
        raise ConfigurationError(f"region {region!r}: expected one of {', '.join(endpoints.gateways)}")
    choose_gateway_store(data, region, store)
    events = Events(gateway_name(region), as_json=as_json)
    run_process(_gateway(data, region, events), events.name, events=events)


async def _gateway(data: DataFolder, region: str, events: Events) -> None:
    endpoints, tokens = data.endpoints(), data.tokens()
    name = gateway_name(region)
    coordinator = ControlClient(endpoints.coordinator, tokens["gateway"])
    identity = await _enrolled(data, name, region, coordinator)
    metrics = Metrics()
    following: list[Supply] = []
    kept = gateway_store(data, region)
    store = BoundedStore(
        kept,
        bytes_max=places_of(data).gateway_mib << 20,
        in_force=lambda: [digest for one in following for plan in one.plans() for digest in wanted(plan)],
        metrics=metrics,
    )
    headers = {"Authorization": f"Bearer {tokens['gateway']}"}
    async with (
        httpx.AsyncClient(base_url=endpoints.coordinator, headers=headers, timeout=FETCH_TIMEOUT_S) as client,
        MqttLink(host=endpoints.broker.host, port=endpoints.broker.port, client_id=name, tls=identity.tls()) as link,
    ):

        async def fetch(kind: StoreKind, object_name: str) -> bytes:
            return await _fetch(client, kind, object_name)

        vouching = Vouching(
            folder=data.child("gateways", region, "trust"),
            tenant=TENANT,
            root=read_root(identity.folder),
            anchors=read_anchors(identity.folder),
            store=store,
            fetch=fetch,
        )
        alarm = metrics.gauge("trust_alarm", "1 while the TUF repository's news are held back or do not verify.")
        alarm.read_from(lambda: float(bool(vouching.alarm())))
        supply = Supply(
            store=store,
            link=link,
            vouching={TENANT: vouching},
            fetch=fetch,
            artifact_key=KeyDesk(link, identity).artifact_key,
            open_model=open_model,
            sealing=identity.sealing,
        )
        following.append(supply)
        gateway = Gateway(
            region=region,
            tenants=Tenants([Tenant(TENANT, (digest_of(tokens["tenant"].encode()),), default_model=MODEL)]),
            versions=supply,
            feature_sets=FEATURE_SETS,
            metrics=metrics,
        )
        distant = not isinstance(kept, DirectoryStore)
        mirror = Mirror(region=region, link=link, store=store, fetch=fetch, metrics=metrics, distant=distant)
        app = create_app(gateway, server_version=__version__)
        announcing = relaying(
            *(data, region),
            link=link,
            client=client,
            vouching=vouching,
            reachable=mirror.reachable,
            metrics=metrics,
        )
        async with serving(app, port_of(endpoints.gateways[region]), name), announcing, asyncio.TaskGroup() as tasks:
            tasks.create_task(vouching.run(), name="vouching")
            tasks.create_task(supply.run(), name="supply")
            tasks.create_task(mirror.run(), name="mirror")
            events.say("ready", region=region, url=endpoints.gateways[region])
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.shield(gateway.drain(SETTLE_S, DRAIN_S))


async def _enrolled(data: DataFolder, name: str, region: str, coordinator: ControlClient) -> Identity:
    """This gateway's identity; asked for once, so that a restart does not need the coordinator."""
    deadline = time.monotonic() + ENROL_DEADLINE_S
    folder, traits = data.identity(name), {"region": region}
    return await asyncio.to_thread(
        retry_until, deadline, lambda: enrolled_identity(folder, name, "gateway", coordinator, traits)
    )


async def _fetch(client: httpx.AsyncClient, kind: StoreKind, name: str) -> bytes:
    what = f"{kind} {name[:12]}"
    try:
        response = await client.get(f"/v1/store/{kind}/{name}")
    except httpx.HTTPError as error:
        raise Unavailable(f"{what}: the coordinator did not answer: {type(error).__name__}") from None
    if response.status_code == 200:
        return response.content
    if response.status_code == 404:
        raise NotFound(f"{what}: the coordinator has not got it")
    refused: type[AtollError] = Unavailable if response.status_code >= 500 else Untrusted
    raise refused(f"{what}: the coordinator answered {response.status_code}")
