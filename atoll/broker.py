"""Wiring of the embedded broker: a process of ours for machines without mosquitto."""

from __future__ import annotations

from pathlib import Path

from atoll.entry import run_process
from atoll.platform import BROKER
from atoll.settings import DataFolder


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
