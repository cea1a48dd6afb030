"""Flower's nodes of one platform: where the SuperLink is, and the keys by which it knows aggregators and relays.

Apart from the coordinator's wiring, because a gateway needs this and has no use for the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from atoll.platform import AGGREGATORS, SUPERLINK, relay_name
from atoll.settings import DataFolder
from fl_coordinator.flower import node_public_key
from fl_coordinator.flower_superlink import SuperLinkPlace


def superlink_place(data: DataFolder) -> SuperLinkPlace:
    """Where this platform's SuperLink keeps its state and listens."""
    identity = data.identity(SUPERLINK)
    return SuperLinkPlace(
        folder=data.child("flower"),
        port=data.endpoints().flower_port,
        certificate=identity / "certificate.pem",
        private_key=identity / "key.pem",
        ca=identity / "ca.pem",
    )


def aggregator_key(data: DataFolder, aggregator: str) -> Path:
    """The key by which Flower knows an aggregator's node."""
    return data.child("aggregators", aggregator) / "flower.pem"


def relay_key(data: DataFolder, region: str) -> Path:
    """The key by which Flower knows the node of a region's relay."""
    return data.child("gateways", region) / "flower.pem"


def node_keys(data: DataFolder, aggregators: Iterable[str], regions: Iterable[str]) -> Mapping[str, bytes]:
    """Public keys by node name; keys that do not exist yet are drawn."""
    keys = {name: node_public_key(aggregator_key(data, name)) for name in aggregators}
    return keys | {relay_name(region): node_public_key(relay_key(data, region)) for region in regions}


def prepare_flower(data: DataFolder, regions: Iterable[str]) -> None:
    """Make the nodes' keys before any process needs them."""
    node_keys(data, AGGREGATORS, regions)
