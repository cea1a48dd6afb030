"""Wiring of the broker: mosquitto's command line, or the embedded broker as a process of ours."""

from __future__ import annotations

from pathlib import Path

from atoll.entry import run_process
from atoll.platform import BROKER, COORDINATOR, gateway_name
from atoll.settings import ConfigurationError, DataFolder, Endpoints
from regional_gateway import mosquitto


def mosquitto_argv(data: DataFolder, endpoints: Endpoints) -> list[str]:
    """Write mosquitto's configuration into the data folder; the command that starts it."""
    found = mosquitto.find()
    if found is None:
        raise ConfigurationError("broker: expected mosquitto 2.0 or newer, found none; pass --broker embedded")
    identity = data.identity(BROKER)
    return mosquitto.prepare(
        found,
        data.child("broker"),
        mosquitto.BrokerFiles(identity / "ca.pem", identity / "certificate.pem", identity / "key.pem"),
        host=endpoints.broker.host,
        port=endpoints.broker.port,
        platform=(COORDINATOR, *map(gateway_name, endpoints.gateways)),
        autosave_seconds=1,
    )


def run_broker(path: Path) -> None:
    """Run the embedded broker of the platform in the data folder `path` until it is told to stop."""
    from regional_gateway.mqtt_broker import serve, server_tls
    from regional_gateway.mqtt_sessions import FLEET_RULES, access

    data = DataFolder.open(path)
    address = data.endpoints().broker
    identity = data.identity(BROKER)
    run_process(
        serve(
            host=address.host,
            port=address.port,
            tls=server_tls(identity / "ca.pem", identity / "certificate.pem", identity / "key.pem"),
            folder=data.child("broker"),
            acl=access(FLEET_RULES),
        ),
        "broker",
    )
