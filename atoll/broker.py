"""Wiring of the embedded broker: a process of ours for machines without mosquitto, with its metrics."""

from __future__ import annotations

import asyncio
from pathlib import Path

from atoll.entry import run_process
from atoll.events import Events
from atoll.http_server import serving
from atoll.metrics_page import metrics_app
from atoll.platform import BROKER, BROKER_METRICS, port_of
from atoll.revocation import keep_informed
from atoll.settings import DataFolder
from monitoring.metrics import Metrics
from regional_gateway.mqtt.access import FLEET_RULES, access
from regional_gateway.mqtt.broker import MqttBroker, serve, server_tls
from regional_gateway.mqtt.hub import BrokerMetrics


def run_broker(path: Path, *, as_json: bool = False) -> None:
    """Run the embedded broker of the platform in the data folder `path` until it is told to stop."""
    events = Events(BROKER, as_json=as_json)
    run_process(_broker(DataFolder.open(path), events), BROKER, events=events)


async def _broker(data: DataFolder, events: Events) -> None:
    endpoints = data.endpoints()
    identity = data.identity(BROKER)
    metrics = Metrics()
    revoked: set[int] = set()

    def listening(broker: MqttBroker) -> None:
        _measure(metrics, broker)
        events.say("ready", url=f"mqtts://{broker.host}:{broker.port}", metrics=endpoints.broker_metrics)

    running = asyncio.create_task(
        serve(
            host=endpoints.broker.host,
            port=endpoints.broker.port,
            tls=server_tls(identity / "ca.pem", identity / "certificate.pem", identity / "key.pem"),
            folder=data.child("broker"),
            acl=access(FLEET_RULES),
            revoked=revoked.__contains__,
            ready=listening,
        ),
        name=BROKER,
    )
    informed = asyncio.create_task(keep_informed(revoked, endpoints.coordinator, data.tokens()["gateway"]))
    try:
        if not endpoints.broker_metrics:
            await running
            return
        async with serving(metrics_app(metrics), port_of(endpoints.broker_metrics), BROKER_METRICS):
            await running
    finally:
        informed.cancel()


def _measure(metrics: Metrics, broker: MqttBroker) -> None:
    """Publish what the broker counts anyway."""
    for name in BrokerMetrics.__dataclass_fields__:
        gauge = metrics.gauge(f"broker_{name}", f"{name.replace('_', ' ')}, as the broker counts them.")
        gauge.read_from(lambda name=name: float(getattr(broker.metrics, name)))  # type: ignore[misc]
