"""Wiring of the coordinator: ledger, store, keyring, link, Flower, the control API and the live page.

Flower's SuperLink is a child of this process, because the two are useless without each other: it is started again when
it dies, and it ends when the coordinator does.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from atoll import stores
from atoll.entry import run_process
from atoll.events import Events
from atoll.flower_nodes import node_keys, superlink_place
from atoll.held_out import evaluation_in
from atoll.http_server import serving
from atoll.platform import COORDINATOR, open_keyring, port_of, relay_name, revocation_list_of
from atoll.revocation import keep_list
from atoll.settings import INT8_WORTH, MODEL, MODEL_OF_CSV, TENANT, DataFolder, quiet_environment, write_private
from atoll.timing import medians_us
from atoll.trust import hold_automatically
from atoll.trust_publishing import trust_of
from atoll.updates import open_log, place_of
from atoll.vouching import Vouching
from device_sim.payments import PaymentSpec, generate
from device_sim.payments_csv import CSV_FEATURES
from device_sim.terminal_features import FEATURES, table_features
from edge_runtime.identity import Identity
from edge_runtime.link import MqttLink
from edge_runtime.onnx_model import open_model
from fl_coordinator.control import control_app
from fl_coordinator.coordinator import Coordinator
from fl_coordinator.distant_keyring import DistantKeyring
from fl_coordinator.flower_bridge import FlowerBridge
from fl_coordinator.flower_superlink import SuperLink
from fl_coordinator.forming import LoadedModel
from fl_coordinator.ledger import Ledger
from fl_coordinator.ports import Tell
from fl_coordinator.publishing import Publisher
from fl_coordinator.relaying import OWN, through
from model_delta.keys.keyring import EmbeddedKeyring
from model_delta.manifest import TensorSpec
from model_delta.patch.quantization import Worth
from model_delta.signature import made_up, size_of
from model_delta.trust.paths import delegated_role
from monitoring.dashboard import page_routes
from regional_gateway.relay import Relay

REGION = "core"
"""Whose counter of the version vector this coordinator raises."""

GOLDEN_ROWS = 16
GOLDEN_BYTES_MAX = 1 << 20
"""Of made-up inputs: they travel in the manifest, to every device."""
GOLDEN_SIZES = ((4, 4), (1, 4), (1, 1), (1, 8), (1, 16), (1, 32), (1, 64), (1, 128), (1, 224), (1, 512))
"""(rows, size of every other free axis) of made-up inputs, in the order in which a model is tried."""

Array = npt.NDArray[np.generic]
_log = logging.getLogger("atoll.coordinator")


def run_coordinator(path: Path, *, store: str = "", as_json: bool = False) -> None:
    """Run the coordinator of the platform in the data folder `path` until it is told to stop; its objects are at
    `store` from now on, unless that is ""."""
    events = Events(COORDINATOR, as_json=as_json)
    data = DataFolder.open(path)
    stores.choose_store(data, store)
    run_process(_coordinator(data, events), COORDINATOR, events=events)


async def _coordinator(data: DataFolder, events: Events) -> None:
    endpoints = data.endpoints()
    folder = data.child("coordinator")
    identity = Identity.load(data.identity(COORDINATOR), COORDINATOR)
    keyring = open_keyring(data)
    if not isinstance(keyring, EmbeddedKeyring):
        keyring = DistantKeyring(keyring)
    ledger = Ledger(folder / "ledger.sqlite")
    places = stores.places_of(data)
    store = stores.coordinator_store(data)
    await asyncio.to_thread(stores.require_holds, store, ledger, places.url or str(folder / "store"))
    log = await asyncio.to_thread(open_log, place_of(data), folder, ledger)
    publishing = trust_of(data, keyring)
    if await asyncio.to_thread(hold_automatically, publishing, data.child("trust"), (REGION,), time.time()):
        _log.info("the root of trust is in %s; `atoll trust init` gives it to people", data.child("trust"))
    vouching = Vouching(publishing, ledger, store, REGION, data.child("trust"))
    bridge = FlowerBridge()
    broker = endpoints.broker
    regions = tuple(endpoints.gateways) if endpoints.flower_port else ()
    async with MqttLink(host=broker.host, port=broker.port, client_id=COORDINATOR, tls=identity.tls()) as link:
        own_relay = Relay(
            tenant=TENANT, region=OWN, link=link, folder=folder / "relay", anchors=keyring.anchors, clock=time.time
        )
        relays: dict[str, Tell] = {region: through(bridge, relay_name(region)) for region in regions}
        coordinator = Coordinator(
            tenant=TENANT,
            model=MODEL,
            ledger=ledger,
            log=log,
            store=store,
            keyring=keyring,
            link=link,
            publisher=Publisher(
                tenant=TENANT,
                region=REGION,
                ledger=ledger,
                store=store,
                keyring=keyring,
                open_model=open_model,
                golden_inputs=golden_inputs,
                feature_counts={MODEL: len(FEATURES), MODEL_OF_CSV: len(CSV_FEATURES)},
                vouch=vouching.published,
                latencies_us=latencies_us,
                worth={name: Worth(**figures) for name, figures in INT8_WORTH.items()},
            ),
            evaluate=evaluation_in(folder),
            bridge=bridge,
            relays=relays or {OWN: own_relay.carry_out},
            terms=places.terms,
            clean_every_s=places.clean_hours * 3600.0,
        )
        app = control_app(coordinator, tokens=data.tokens(), flower=bridge, pages=list(page_routes()))
        async with serving(app, port_of(endpoints.coordinator), COORDINATOR), asyncio.TaskGroup() as tasks:
            tasks.create_task(coordinator.run(), name=COORDINATOR)
            tasks.create_task(vouching.run(), name="vouching")
            if not relays:
                tasks.create_task(own_relay.run(), name="relay")
            _measure(coordinator, vouching)
            events.say("ready", url=endpoints.coordinator, broker=f"mqtts://{broker.host}:{broker.port}")
            if broker.kind == "mosquitto":
                tasks.create_task(
                    keep_list(revocation_list_of(data), keyring.revoked, keyring.revocation_list), name="revoked"
                )
            if endpoints.flower_port:
                tasks.create_task(_flower(data, bridge), name="flower")


def _measure(coordinator: Coordinator, vouching: Vouching) -> None:
    """Publish how long the repository's metadata lasts, and tell the live page what people should know of it."""
    vouching.note = lambda text: coordinator.note("alert", text)
    days = coordinator.metrics.gauge("trust_days_left", "Days until metadata of the TUF repository expires.", ("role",))
    for role in ("root", "targets", "snapshot", "timestamp", delegated_role(REGION, TENANT)):
        days.read_from(lambda role=role: vouching.days_left.get(role, 0.0), role)  # type: ignore[misc]
    failing = coordinator.metrics.gauge("trust_failing", "1 while versions cannot be vouched for.")
    failing.read_from(lambda: float(bool(vouching.failing)))


async def _flower(data: DataFolder, bridge: FlowerBridge) -> None:
    """Keep Flower's SuperLink and our app on it alive."""
    endpoints = data.endpoints()
    token = data.path / "flower.token"
    write_private(token, data.tokens()["flower"].encode())
    nodes = node_keys(data, endpoints.aggregators, endpoints.gateways)
    await SuperLink(superlink_place(data), quiet_environment()).supervise(
        lambda: nodes, lambda: bridge.silent_s, endpoints.coordinator, token
    )


def golden_inputs(model: str, inputs: Sequence[TensorSpec]) -> list[Mapping[str, Array]]:
    """What every device must reproduce: payments for models that take our features, otherwise seeded tensors, in the
    sizes that models most often take, one to be tried after the other."""
    if len(inputs) == 1 and (inputs[0].dtype, inputs[0].shape) == ("float32", (-1, len(FEATURES))):
        table = generate(PaymentSpec(("grocery", "fuel", "electronics", "kiosk"), days=3, seed=1))
        rows = table_features(table)
        chosen = np.linspace(0, len(rows) - 1, GOLDEN_ROWS).astype(int)
        return [{inputs[0].name: rows[chosen].astype(inputs[0].dtype)}]
    sizes = [
        (batch, free) for batch, free in GOLDEN_SIZES if size_of(inputs, batch=batch, free=free) <= GOLDEN_BYTES_MAX
    ]
    made = [made_up(inputs, np.random.default_rng(1), batch=batch, free=free) for batch, free in sizes]
    shapes = [tuple(value.shape for value in tensors.values()) for tensors in made]
    return [tensors for index, tensors in enumerate(made) if shapes[index] not in shapes[:index]]


def latencies_us(models: Sequence[LoadedModel], row: Mapping[str, Array]) -> list[float]:
    """Median processor time of one row, of each model; see `medians_us`."""
    return medians_us([partial(model.run, row) for model in models])
