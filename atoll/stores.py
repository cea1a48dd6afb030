"""Where model files are kept: in the data folder, or in a bucket; and how long what nothing needs stays there.

The data folder's `store.json` says it. Without it the coordinator's objects lie in DATA/coordinator/store and a
gateway's copies in DATA/gateways/REGION/store. A bucket's credentials are never written there: they come from the
environment variables that the provider's own tools read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from atoll.operate import operator
from atoll.output import show
from atoll.settings import ConfigurationError, DataFolder, write_private
from fl_coordinator.ledger import Ledger
from fl_coordinator.retention import DAY_S, Terms
from model_delta.errors import Malformed
from model_delta.store import InventoriedStore
from model_delta.store_url import open_store

CLEAN_TIMEOUT_S = 600.0
DEFAULT = "default"
"""What `--store` takes for the place in the data folder."""


class StorePlaces(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`url` of the coordinator's store and of `gateways` by region, "" for the place in the data folder. Versions of
    the last `window_days` stay, transcripts of the rounds of the last `transcript_days`, and whatever is younger than
    `grace_hours`; every `clean_hours` the rest is removed. A gateway's copies take `gateway_mib` at most."""

    url: str = ""
    gateways: dict[str, str] = {}
    window_days: float = 90.0
    transcript_days: float = 400.0
    grace_hours: float = 24.0
    clean_hours: float = 6.0
    gateway_mib: int = 4_096

    @property
    def terms(self) -> Terms:
        """For the cleaning."""
        return Terms(
            window_s=self.window_days * DAY_S,
            grace_s=self.grace_hours * 3600.0,
            transcripts_s=self.transcript_days * DAY_S,
        )


BOUNDS = {
    "window_days": (1, 3650),
    "transcript_days": (1, 36_500),
    "grace_hours": (1, 24 * 365),
    "clean_hours": (0.1, 24 * 365),
    "gateway_mib": (64, 1 << 30),
}


def require_store(url: str, *, lasting: bool = True) -> str:
    """`url` with a relative folder made absolute; nothing is made or asked yet. Raises ConfigurationError for what is
    no store, and for one that ends with the process where it should be `lasting`."""
    if url in ("", DEFAULT):
        return ""
    if "://" not in url:
        url = str(Path(url).resolve())
    if lasting and url.startswith("memory:"):
        raise ConfigurationError(
            f"--store {url}: expected a store that outlives the process; name a folder or a bucket"
        )
    if "://" in url and not url.startswith("file:"):  # a folder would be made by this
        try:
            open_store(url)
        except Malformed as error:
            raise ConfigurationError(f"--store: {error}") from None
    return url


def choose_store(data: DataFolder, url: str) -> None:
    """Keep the coordinator's objects at `url` from the next start on; "" leaves the choice as it is."""
    if url:
        _write(data, msgspec.structs.replace(places_of(data), url=require_store(url)))


def choose_gateway_store(data: DataFolder, region: str, url: str) -> None:
    """Keep a gateway's copies at `url` from now on; "" leaves the choice as it is."""
    if url:
        found = places_of(data)
        chosen = {**found.gateways, region: require_store(url, lasting=False)}
        _write(data, msgspec.structs.replace(found, gateways=chosen))


def places_of(data: DataFolder) -> StorePlaces:
    """What the data folder says. Raises ConfigurationError."""
    path = _path(data)
    try:
        found = msgspec.json.decode(path.read_bytes(), type=StorePlaces)
    except FileNotFoundError:
        return StorePlaces()
    except (msgspec.DecodeError, OSError) as error:
        raise ConfigurationError(
            f"{path}: expected {', '.join(StorePlaces.__struct_fields__)} as JSON: {error}"
        ) from None
    for name, (low, high) in BOUNDS.items():
        if not low <= getattr(found, name) <= high:
            raise ConfigurationError(f"{path}: {name}: expected {low:g} to {high:g}, found {getattr(found, name)}")
    return found


def coordinator_store(data: DataFolder) -> InventoriedStore:
    """The coordinator's store."""
    return _open(places_of(data).url or str(data.child("coordinator") / "store"))


def gateway_store(data: DataFolder, region: str) -> InventoriedStore:
    """Where a region's gateway keeps its copies."""
    return _open(places_of(data).gateways.get(region) or str(data.child("gateways", region, "store")))


def require_holds(store: InventoriedStore, ledger: Ledger, where: str) -> None:
    """Refuse a store without what the ledger says is published. Raises ConfigurationError, Unavailable."""
    every = ledger.releases()
    missing = next((one for one in reversed(every[-1:]) if not store.has("manifest", one.manifest)), None)
    if missing is not None:
        raise ConfigurationError(
            f"store {where}: expected version {missing.manifest[:16]}…, which the ledger has, found none: copy the "
            "objects KIND/NAME of the old store there first, or go back to it with --store"
        )


def clean_store(data: Path, *, dry_run: bool, contact_s: float, as_json: bool) -> None:
    """Have the running coordinator remove what nothing needs any more; with `dry_run` only say what that is."""
    body = {"dry_run": dry_run}
    found = operator(data, contact_s).post("/v1/store/clean", body, timeout_s=CLEAN_TIMEOUT_S)
    show(found, _text(found), as_json=as_json)


def _text(found: dict[str, Any]) -> str:
    removed = ", ".join(f"{count} {kind}" for kind, count in found["removed"].items()) or "nothing"
    kept = ", ".join(f"{count} {reason}" for reason, count in found["kept"].items()) or "nothing"
    lines = [f"{'would remove' if found['dry_run'] else 'removed'}: {removed} ({found['freed_bytes']} bytes)"]
    lines += [f"versions given up: {len(found['retired'])}", f"kept, by reason: {kept}"]
    if found.get("trimmed"):
        lines.append(f"rounds whose mean and shares left the ledger: {found['trimmed']}")
    if found["unreadable"]:
        lines.append(f"unreadable deliveries, for whose sake no blob is removed: {', '.join(found['unreadable'])}")
    return "\n".join(lines)


def _open(url: str) -> InventoriedStore:
    try:
        return open_store(url)
    except Malformed as error:
        raise ConfigurationError(str(error)) from None


def _path(data: DataFolder) -> Path:
    return data.path / "store.json"


def _write(data: DataFolder, places: StorePlaces) -> None:
    if places != places_of(data):
        write_private(_path(data), msgspec.json.format(msgspec.json.encode(places)))
