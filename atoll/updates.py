"""Where contributions are kept until their round is over: in the data folder, or in a topic of Apache Kafka.

The data folder's `updates.json` (0600) names the topic, and how to log in at its brokers; without it the log is
embedded. Offsets in the ledger belong to one log, so it changes only while no round is open.

Aggregators read the same log: a topic directly, the embedded one through the coordinator. An aggregator's own folder
may have an `updates.json` too, with a login of its own, which needs no more than to read the topic.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from atoll.settings import ConfigurationError, DataFolder, write_private
from fl_coordinator.ledger import Ledger
from fl_coordinator.ports import UpdatesLog
from fl_coordinator.recorded_rounds import every_round
from fl_coordinator.updates_log import SegmentLog
from model_delta.errors import Malformed

EMBEDDED = "embedded"
_FILE = "updates.json"


class UpdatesPlace(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`url` is kafka://host:port/topic or `embedded`; `properties` are librdkafka's for authentication and TLS."""

    url: str = EMBEDDED
    properties: dict[str, str] = {}


def choose_place(data: DataFolder, url: str) -> None:
    """Keep contributions at `url` from the next start on; "" leaves the choice as it is. Raises ConfigurationError."""
    if not url:
        return
    require_place(url)
    found = place_of(data)
    if found.url != url:
        write_private(_path(data), msgspec.json.encode(UpdatesPlace(url=url, properties=found.properties)))


def require_place(url: str) -> None:
    """Raises ConfigurationError for neither `embedded` nor a topic, ModuleNotFoundError without a Kafka client."""
    if url in ("", EMBEDDED):
        return
    from fl_coordinator.kafka_log import place_of as topic_of

    try:
        topic_of(url)
    except Malformed as error:
        raise ConfigurationError(f"--updates-log: {error}, or `{EMBEDDED}`") from None


def place_of(data: DataFolder) -> UpdatesPlace:
    """What the data folder says. Raises ConfigurationError."""
    return _read(_path(data))


def aggregator_place(data: DataFolder, name: str, url: str = "") -> UpdatesPlace:
    """Where the aggregator `name` reads: at `url` if there is one, else where its own folder says, else where the
    platform's does. Raises ConfigurationError, ModuleNotFoundError without a Kafka client."""
    own = data.child("aggregators", name) / _FILE
    found = _read(own if own.exists() else _path(data))
    require_place(url or found.url)
    return UpdatesPlace(url=url, properties=found.properties) if url else found


def open_log(place: UpdatesPlace, folder: Path, ledger: Ledger, *, patience_s: float = 10.0) -> UpdatesLog:
    """The log at `place`; the embedded one is in `folder`/updates. Raises Unavailable when no broker answers,
    ConfigurationError when a round is open whose contributions are in another log."""
    marker = folder / "updates.place"
    before = marker.read_text() if marker.exists() else EMBEDDED
    if before != place.url:
        for found in every_round(ledger):
            if found.live:
                raise ConfigurationError(
                    f"updates log: round {found.round_id} is {found.state} and has its contributions at {before}, "
                    f"found {place.url}; go back to --updates-log {before} until it has ended"
                )
    if place.url == EMBEDDED:
        log: UpdatesLog = SegmentLog(folder / "updates")
    else:
        from fl_coordinator.kafka_log import KafkaLog

        log = KafkaLog(place.url, place.properties, patience_s=patience_s)
    if before != place.url:
        write_private(marker, place.url.encode())
    return log


def _read(path: Path) -> UpdatesPlace:
    try:
        return msgspec.json.decode(path.read_bytes(), type=UpdatesPlace)
    except FileNotFoundError:
        return UpdatesPlace()
    except (msgspec.DecodeError, OSError) as error:
        raise ConfigurationError(f"{path}: expected url and properties as JSON: {error}") from None


def _path(data: DataFolder) -> Path:
    return data.path / _FILE
