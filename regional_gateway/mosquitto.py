"""Mosquitto, when the machine has it: found, configured for the fleet, never somebody else's running service.

What is written here holds for mosquitto 2.0 and 2.1: one listener with mutual TLS whose certificate names are the
users, access by pattern, persistence in a folder of our own. The settings answer known traps:

* `use_username_as_clientid`: a device cannot take over another one's session by borrowing its client id. So one
  certificate holds one connection.
* `max_inflight_messages 0`: with a limit, 2.0.11 stops delivering a queue whose first 20 messages expired. The
  client's own receive maximum still holds.
* `max_queued_messages` past which it drops silently: chunks are pulled with a small window, never pushed.
* `set_tcp_nodelay`: a factor of nine on 64 KB requests.
* access is checked at delivery, not at SUBSCRIBE: a filter for somebody else's topics is granted and stays silent.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import msgspec

from model_delta.errors import Malformed, Unavailable
from regional_gateway.mqtt.access import FLEET_RULES, AccessRules, valid_identity
from regional_gateway.mqtt.session import Limits

OLDEST = (2, 0)
LOOK_SECONDS = 60.0
"""For a program that only says its version: a machine that is that busy has a mosquitto all the same."""
_ELSEWHERE = ("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin")


class Mosquitto(msgspec.Struct, frozen=True):
    """An installed mosquitto and its version, as (major, minor, patch)."""

    executable: Path
    version: tuple[int, int, int]


class BrokerFiles(msgspec.Struct, frozen=True):
    """PEM files of the broker: who issues client certificates, its own certificate and key, and revoked serials."""

    ca: Path
    certificate: Path
    key: Path
    revoked: Path | None = None


def find(search_path: str | None = None) -> Mosquitto | None:
    """The first mosquitto >= 2.0 on `search_path` (default PATH, then where Debian and Homebrew put it)."""
    if search_path is None:
        search_path = os.pathsep.join((os.environ.get("PATH", os.defpath), *_ELSEWHERE))
    found = shutil.which("mosquitto", path=search_path)
    if found is None:
        return None
    try:
        told = subprocess.run([found, "-h"], capture_output=True, text=True, timeout=LOOK_SECONDS, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    version = version_in(told)
    return Mosquitto(Path(found), version) if version is not None and version[:2] >= OLDEST else None


def version_in(told: str) -> tuple[int, int, int] | None:
    """The version in the first line of `mosquitto -h` ("mosquitto version 2.0.11")."""
    match = re.search(r"mosquitto version (\d+)\.(\d+)\.(\d+)", told)
    return (int(match[1]), int(match[2]), int(match[3])) if match else None


def configuration(
    folder: Path,
    files: BrokerFiles,
    *,
    host: str,
    port: int,
    user: str | None,
    limits: Limits,
    autosave_seconds: int,
) -> str:
    """The text of mosquitto.conf. `user`: whom a broker started by root becomes; None when not started by root.

    Raises Malformed for a path with a line break, which would be read as another setting.
    """
    lines = [
        f"listener {port} {host}",
        f"cafile {files.ca}",
        f"certfile {files.certificate}",
        f"keyfile {files.key}",
        *([f"crlfile {files.revoked}"] if files.revoked else []),
        "tls_version tlsv1.2",
        "require_certificate true",
        "use_identity_as_username true",
        "use_username_as_clientid true",
        "allow_anonymous false",
        f"acl_file {folder / 'acl'}",
        "persistence true",
        f"persistence_location {folder}/",
        "persistence_file sessions.db",
        f"autosave_interval {autosave_seconds}",
        "persistent_client_expiration 120d",
        "max_inflight_messages 0",
        f"max_queued_messages {limits.queued_max}",
        f"max_queued_bytes {limits.queued_bytes_max}",
        "queue_qos0_messages false",
        f"max_packet_size {limits.packet_bytes_max}",
        f"max_keepalive {limits.keep_alive_seconds_max}",
        f"max_connections {limits.clients_max}",
        "max_qos 1",
        "max_topic_alias 0",
        "set_tcp_nodelay true",
        "sys_interval 0",
        f"pid_file {folder / 'mosquitto.pid'}",
        "log_dest stderr",
        "log_type error",
        "log_type warning",
        "log_type notice",
        "connection_messages false",
        *([f"user {user}"] if user else []),
    ]
    for line in lines:
        if "\n" in line or "\r" in line:
            raise Malformed(f"mosquitto.conf: expected a path on one line, found {line!r}; use another folder")
    return "\n".join(lines) + "\n"


def access_file(platform: Sequence[str], rules: AccessRules = FLEET_RULES) -> str:
    """The text of the ACL file. `platform` names every identity with more rights than a device's: mosquitto knows no
    prefixes.

    Raises Malformed for a name that is not one of the platform's, or that cannot stand in a topic.
    """
    lines = []
    for name in platform:
        region = rules.region_of(name)
        if not valid_identity(name) or not (name in rules.platform or region):
            expected = (*rules.platform, f"{rules.region_prefix}…")
            raise Malformed(f"mosquitto access: expected a platform name ({', '.join(expected)}), found {name!r}")
        lines.append(f"user {name}")
        if region:
            lines += [f"topic write {pattern.replace('%r', region)}" for pattern in rules.region_write]
            lines += [f"topic read {pattern.replace('%r', region)}" for pattern in rules.region_read]
        else:
            lines.append(f"topic readwrite {rules.platform_filter}")
        lines.append("")
    lines += [f"pattern write {pattern}" for pattern in rules.write]
    lines += [f"pattern read {pattern}" for pattern in rules.read]
    return "\n".join(lines) + "\n"


def prepare(
    mosquitto: Mosquitto,
    folder: Path,
    files: BrokerFiles,
    *,
    host: str,
    port: int,
    platform: Sequence[str],
    limits: Limits | None = None,
    autosave_seconds: int = 5,
) -> list[str]:
    """Write mosquitto.conf and the ACL file into `folder`, and return the command that starts the broker.

    It runs in the foreground, logs to stderr, writes its sessions to `folder` every `autosave_seconds` and on
    SIGTERM. `port` must be a number of your choice: mosquitto cannot report one that it chose. Raises Unavailable for
    a file that is not there and Malformed as `configuration` and `access_file` do.
    """
    if not 0 < port < 65_536:
        raise Malformed(f"mosquitto: expected a port from 1 to 65535, found {port}")
    for path in (files.ca, files.certificate, files.key):
        if not path.is_file():
            raise Unavailable(
                f"mosquitto: expected a PEM file at {path}, found none; issue the broker's certificate first"
            )
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    # Started by root, mosquitto becomes the user `mosquitto`, who may read neither the key nor the folder.
    user = pwd.getpwuid(0).pw_name if os.geteuid() == 0 else None
    resolved = BrokerFiles(
        files.ca.resolve(),
        files.certificate.resolve(),
        files.key.resolve(),
        files.revoked.resolve() if files.revoked else None,
    )
    text = configuration(
        folder, resolved, host=host, port=port, user=user, limits=limits or Limits(), autosave_seconds=autosave_seconds
    )
    path = folder / "mosquitto.conf"
    _replace(folder / "acl", access_file(platform))
    _replace(path, text)
    return [str(mosquitto.executable), "-c", str(path)]


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text)
    temporary.chmod(0o600)  # mosquitto warns about an access file that others may read
    temporary.replace(path)
