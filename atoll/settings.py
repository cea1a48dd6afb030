"""Where a platform's state lives, and on which addresses its processes listen.

A platform is a data folder. Everything it keeps is inside; the folder carries a format number, so that an older program
refuses a newer folder instead of damaging it, and a lock, so that two platforms never share one. Settings are read here
once and passed on as ordinary arguments.

    DATA/
      format                    the folder's format number
      lock                      held by the running `atoll up` or `atoll demo`
      endpoints.json            addresses of the running processes
      keyring                   the embedded keyring (0600)
      vault.json                where the keys are instead, and the coordinator's login there (0600)
      store.json                where model files are kept instead, and for how long
      updates.json              where contributions are kept instead: a Kafka topic, and the login there (0600)
      tokens.json               bearer tokens by role (0600)
      identities/NAME/          key, certificate, trust anchors of one process or device
      trust/                    online TUF keys (0600), the root that devices are provisioned with
      coordinator/ broker/ flower/ aggregators/N/ gateways/REGION/ devices/ID/ logs/
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import msgspec

from model_delta.durable import replace_whole
from model_delta.errors import AtollError, StorageFull

FORMAT = 1
TENANT = "acme"
MODEL = "fraud"
MODEL_OF_CSV = "fraud-csv"
LOOPBACK = "127.0.0.1"

INT8_WORTH = {
    "pos": {"faster": 0.95, "smaller": 0.6, "slower_max": 1.25},
    "phone": {"faster": 0.95, "smaller": 0.7, "slower_max": 1.5},
    "pi": {"faster": 0.9, "smaller": 0.5, "slower_max": 1.25},
    "mcu": {"faster": 0.95, "smaller": 0.9, "slower_max": 3.0},
}
"""When int8 is worth it, by class of device: it takes at most `faster` of float32's time; or its file has at most
`smaller` of float32's bytes, and it takes at most `slower_max` of its time. Of other classes: as for `pos`.

A terminal answers while somebody waits and is sent its model over a line that is shared: both count. A phone pays for
its bytes and has time to spare. A Pi is on a cable: its model has to be half as large, or clearly faster. A controller
has neither flash nor radio to spare and is asked seldom."""

TOKEN_ROLES = ("admin", "gateway", "aggregator", "flower", "join", "tenant")
"""Roles of bearer tokens: operators, gateways, aggregators, the Flower app, enrolment, and the tenant's API key."""


class ConfigurationError(AtollError):
    """Something a person has to put right before the command can run; the command ends with exit code 2."""


class Broker(msgspec.Struct, frozen=True):
    """The MQTT broker's address."""

    host: str
    port: int
    kind: str


class Endpoints(msgspec.Struct, frozen=True, kw_only=True):
    """Addresses of a running platform. `gateways` maps region to base URL, `aggregators` name to base URL;
    `broker_metrics` is the base URL of the embedded broker's metrics ("" for mosquitto, which has none)."""

    coordinator: str
    broker: Broker
    gateways: dict[str, str]
    aggregators: dict[str, str] = {}
    flower_port: int = 0
    broker_metrics: str = ""


class DataFolder:
    """A platform's data folder: paths, format check, tokens, endpoints."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, path: Path, *, create: bool = False) -> DataFolder:
        """Open the folder at `path`; `create` it if it is absent or empty. Raises ConfigurationError, StorageFull."""
        try:
            return cls._open(path, create=create)
        except (PermissionError, NotADirectoryError, IsADirectoryError) as error:
            raise ConfigurationError(
                f"{path}: expected a data folder that this user can read and write, found {error.filename}: "
                f"{error.strerror}; correct its owner or pass another --data"
            ) from None

    @classmethod
    def _open(cls, path: Path, *, create: bool) -> DataFolder:
        folder = cls(path.resolve())
        marker = folder.path / "format"
        if not marker.exists():
            if not create:
                raise ConfigurationError(
                    f"{path}: expected an Atoll data folder, found none; start one with `atoll up --data {path}`"
                )
            if folder.path.exists() and any(folder.path.iterdir()):
                raise ConfigurationError(
                    f"{path}: expected an Atoll data folder or an empty one, found other files; pass another --data"
                )
            try:
                folder.path.mkdir(parents=True, exist_ok=True, mode=0o700)
                folder.path.chmod(0o700)  # also when an empty folder was there, open to others
                write_private(marker, f"{FORMAT}\n".encode())
            except OSError as error:
                raise StorageFull(f"{path}: cannot create the data folder: {error.strerror}") from None
        found = marker.read_bytes()[:32].decode(errors="replace").strip()
        if not found.isdecimal():
            raise ConfigurationError(
                f"{marker}: expected a format number, found {found!r}; this is no Atoll data folder, or it is damaged"
            )
        if int(found) > FORMAT:
            raise ConfigurationError(
                f"{path}: expected a data folder of format {FORMAT} or older, found {found}; upgrade atoll"
            )
        return folder

    @staticmethod
    def exists(path: Path) -> bool:
        """Whether there is a data folder at `path`, or something else in its place."""
        return os.path.lexists(path / "format") or (path.is_dir() and any(path.iterdir()))

    @property
    def was_started(self) -> bool:
        """Whether a platform was ever started here."""
        return (self.path / "endpoints.json").exists()

    @contextmanager
    def locked(
        self, name: str = "lock", who: str = "another atoll is running on", way: str = "--data"
    ) -> Iterator[None]:
        """Hold the folder's lock `name`: for one platform, or for one device. Raises ConfigurationError when another
        process has it, StorageFull when it cannot be made."""
        try:
            handle = _under_a_high_number((self.path / name).open("a+"))
        except OSError as error:
            raise StorageFull(f"{self.path / name}: cannot be made: {error.strerror}") from None
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ConfigurationError(
                    f"{self.path}: {who} this data folder; stop it or pass another {way}"
                ) from None
            yield

    def child(self, *parts: str) -> Path:
        """A folder inside, created when absent."""
        path = self.path.joinpath(*parts)
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        return path

    @property
    def keyring_path(self) -> Path:
        """The embedded keyring's file."""
        return self.path / "keyring"

    @property
    def vault_path(self) -> Path:
        """The file that says on which Vault server the keys are instead; see `vault`."""
        return self.path / "vault.json"

    def identity(self, name: str) -> Path:
        """The folder of one identity."""
        return self.child("identities", name)

    def tokens(self) -> dict[str, str]:
        """Bearer tokens by role; made on first use, kept in a file that only the owner reads."""
        path = self.path / "tokens.json"
        if not path.exists():
            write_private(path, json.dumps({role: secrets.token_urlsafe(24) for role in TOKEN_ROLES}).encode())
        try:
            found = msgspec.json.decode(path.read_bytes(), type=dict[str, str])
        except msgspec.DecodeError:
            found = {}
        missing = [role for role in TOKEN_ROLES if not found.get(role)]
        if missing:
            raise ConfigurationError(
                f"{path}: expected tokens of {', '.join(TOKEN_ROLES)} as JSON, found none for {', '.join(missing)}; "
                "restore the file, or delete it and start `atoll up` again"
            )
        return found

    def write_endpoints(self, endpoints: Endpoints) -> None:
        """Publish the addresses of the running platform to the folder's other users."""
        write_private(self.path / "endpoints.json", msgspec.json.encode(endpoints))

    def endpoints(self) -> Endpoints:
        """The addresses of the running platform. Raises ConfigurationError when none was ever started here."""
        path = self.path / "endpoints.json"
        if not self.was_started:
            raise ConfigurationError(f"{self.path}: no platform was started here; run `atoll up --data {self.path}`")
        try:
            return msgspec.json.decode(path.read_bytes(), type=Endpoints)
        except msgspec.DecodeError as error:
            raise ConfigurationError(f"{path}: expected addresses as JSON: {error}; start `atoll up` again") from None


def _under_a_high_number(file: TextIO) -> TextIO:
    """The same open file as a number that is in nobody's way: a fleet holds many locks, and the `select` in which its
    connections wait takes numbers below 1,024 only. As it was where the system does not allow so high numbers."""
    try:
        number = fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 1_024)
    except OSError:
        return file
    file.close()
    return os.fdopen(number, "a+")


def write_private(path: Path, data: bytes) -> None:
    """Replace the file at `path` atomically, readable by its owner alone. Raises StorageFull."""
    try:
        replace_whole(path, data, aside=path.with_name(f".{path.name}.{os.getpid()}.tmp"))
    except OSError as error:
        raise StorageFull(f"{path}: cannot write: {error.strerror}; free some space and try again") from None


def require_free_port(port: int, what: str, option: str, host: str = LOOPBACK) -> int:
    """Return `port` if it can be bound now. Raises ConfigurationError naming who wanted it and what option moves it."""
    if not 0 < port < 65_536:
        raise ConfigurationError(f"port {port} ({what}): expected 1 to 65535; pass a lower {option}")
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            raise ConfigurationError(
                f"port {port} ({what}): expected it free, found it taken; stop what listens there or pass {option}"
            ) from None
    return port


def quiet_environment() -> dict[str, str]:
    """This process's environment with every dependency's telemetry and update check switched off."""
    return {
        **os.environ,
        "ORT_DISABLE_TELEMETRY": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "DO_NOT_TRACK": "1",
        "PYTHONDONTWRITEBYTECODE": os.environ.get("PYTHONDONTWRITEBYTECODE", ""),
    }
