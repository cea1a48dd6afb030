"""Where contributions are kept until their round is over: in the data folder, or in a topic of Apache Kafka.

The data folder's `updates.json` (0600) names the topic, and how to log in at its brokers; without it the log is
embedded. Offsets in the ledger belong to one log, so it changes only while no round is open. A login is best kept in a
file of its own, which `updates.json` names and which is read at each start; its secrets are copied nowhere.

Aggregators read the same log: a topic directly, the embedded one through the coordinator. An aggregator's own folder
may have an `updates.json` too, with a login of its own, which needs no more than to read the topic.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from atoll.settings import ConfigurationError, DataFolder, write_private
from fl_coordinator.kafka_login import FILES, FROM_FILE, check_properties, parse_login
from fl_coordinator.ledger import Ledger
from fl_coordinator.ports import UpdatesLog
from fl_coordinator.recorded_rounds import every_round
from fl_coordinator.updates_log import SegmentLog
from model_delta.errors import Malformed

EMBEDDED = "embedded"
_FILE = "updates.json"


class UpdatesPlace(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`url` is kafka://host:port/topic or `embedded`; `properties` are librdkafka's for authentication and TLS, and so
    are those in the file `login`, which win."""

    url: str = EMBEDDED
    properties: dict[str, str] = {}
    login: str = ""


def choose_place(data: DataFolder, url: str, login: str = "") -> None:
    """Keep contributions at `url` from the next start on, and log in there as the file `login` says; what is "" stays
    as it is. Raises ConfigurationError."""
    require_place(url)
    require_login(login)
    before = place_of(data)
    found = _changed(before, url, login)
    if found != before:
        write_private(_path(data), msgspec.json.encode(found))


def require_login(login: str) -> None:
    """Raises ConfigurationError when the file `login` is not one; "" is."""
    if login:
        login_properties(UpdatesPlace(login=login))


def login_properties(place: UpdatesPlace) -> dict[str, str]:
    """librdkafka's properties of a login, with the passwords that are in files of their own. Paths in the file `login`
    are relative to its folder. Raises ConfigurationError, which never holds what a file says."""
    folder, found = Path(), dict(place.properties)
    if place.login:
        path = Path(place.login)
        folder = path.parent
        try:
            found |= parse_login(_text(path, "--updates-login"), str(path))
        except Malformed as error:
            raise ConfigurationError(f"--updates-login: {error}") from None
    try:
        check_properties(found)
    except Malformed as error:
        raise ConfigurationError(str(error)) from None
    for name in FROM_FILE:
        file = found.pop(f"{name}.file", "")
        if file:
            found[name] = _text(folder / file, f"{name}.file").strip()
            if not found[name]:
                raise ConfigurationError(f"{name}.file: {folder / file}: expected a password, found nothing")
    return found | _located(found, folder)


def _located(properties: Mapping[str, str], folder: Path) -> dict[str, str]:
    """The properties that name files, each of them there. librdkafka by itself does not say which it lacks."""
    found = {}
    for name in FILES:
        value = properties.get(name, "")
        if not value or (name == "ssl.ca.location" and value == "probe"):
            continue
        path = folder / value
        if not path.exists():
            raise ConfigurationError(f"{name}: {path}: expected a file, found none")
        found[name] = str(path)
    return found


def _text(path: Path, what: str) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not text"
        raise ConfigurationError(f"{what}: {path}: cannot read: {why}") from None


def _changed(place: UpdatesPlace, url: str, login: str) -> UpdatesPlace:
    """`place` with what is not "" instead. Raises ConfigurationError for a login to nowhere."""
    found = msgspec.structs.replace(
        place, url=url or place.url, login=str(Path(login).resolve()) if login else place.login
    )
    if login and found.url == EMBEDDED:
        raise ConfigurationError(
            f"--updates-login {login}: contributions are {EMBEDDED}; name the topic too: "
            "--updates-log kafka://host:port/topic"
        )
    return found


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


def aggregator_place(data: DataFolder, name: str, url: str = "", login: str = "") -> UpdatesPlace:
    """Where the aggregator `name` reads, and how it logs in there: as told, else as its own folder says, else as the
    platform's does. Raises ConfigurationError, ModuleNotFoundError without a Kafka client."""
    own = data.child("aggregators", name) / _FILE
    found = _changed(_read(own if own.exists() else _path(data)), url, login)
    require_place(found.url)
    require_login(login)
    return found


def open_log(place: UpdatesPlace, folder: Path, ledger: Ledger, *, patience_s: float = 10.0) -> UpdatesLog:
    """The log at `place`; the embedded one is in `folder`/updates. Raises Unavailable when no broker answers,
    ConfigurationError for a login that cannot be read, and when a round is open whose contributions are elsewhere."""
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

        log = KafkaLog(place.url, login_properties(place), patience_s=patience_s)
    if before != place.url:
        write_private(marker, place.url.encode())
    return log


def _read(path: Path) -> UpdatesPlace:
    try:
        return msgspec.json.decode(path.read_bytes(), type=UpdatesPlace)
    except FileNotFoundError:
        return UpdatesPlace()
    except (msgspec.DecodeError, OSError) as error:
        raise ConfigurationError(f"{path}: expected url, properties and login as JSON: {error}") from None


def _path(data: DataFolder) -> Path:
    return data.path / _FILE
