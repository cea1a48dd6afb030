"""The key ceremony: who may change the root of trust, and keeping what it vouches for fresh.

`trust_init` is held once, with three people and a stick each; `trust_rotate` whenever a holder, a key or an expiry
changes; any two of three suffice. A rotation may be held in one go or stick by stick, days apart: what waits for
signatures is kept in the store and each call adds what its sticks can sign. `trust_status` says how long everything
lasts and who can sign it. docs/operations.md tells it step by step.

A platform that is started before anybody held the ceremony holds one by itself (`hold_automatically`), so that the
first device meets a repository: three sticks in DATA/trust/automatic, and beside them the passphrase that opens them.
Whoever can read the data folder can then change the root; `trust_init` gives it to people and deletes these sticks.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from atoll.output import columns, show
from atoll.settings import ConfigurationError, DataFolder, write_private
from atoll.stores import coordinator_store
from atoll.trust_publishing import ONLINE_ROLES, Publishing, make_online, read_online, trust_of
from atoll.trust_sticks import (
    OFFLINE_ROLES,
    automatic_passphrase,
    automatic_sticks,
    forget_automatic,
    holder_of,
    make_automatic,
    make_stick,
    open_stick,
    passphrases,
    read_record,
    require_empty,
    require_passphrase,
)
from model_delta.errors import NotFound
from model_delta.trust.repository import DAY_S, Delegation, Progress, Repository, RoleStatus
from model_delta.trust.signers import signer_of, tuf_key_id
from model_delta.trust.signing import public_bytes
from model_delta.trust.updater import RoleKeys

THRESHOLD = 2
WHAT = ("root", "targets", "online")
HOLDERS_MAX = 16


def trust_init(
    path: Path,
    sticks: Sequence[Path],
    regions: Sequence[str],
    files: Sequence[Path],
    *,
    as_json: bool,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Make the holders' keys and the first root. Raises ConfigurationError with nothing written."""
    now = time.time()
    if not DataFolder.exists(path):  # before the first start: what would be refused is refused before there is a folder
        _require_sticks(sticks)
    data = DataFolder.open(path, create=not DataFolder.exists(path))
    publishing, folder = trust_of(data), data.child("trust")
    by_itself = automatic_sticks(folder)
    if _version(publishing.repository) and not by_itself:
        raise ConfigurationError(f"{path}: the ceremony was held; `atoll trust status` shows it, `rotate` changes it")
    _require_sticks(sticks)
    secrets = passphrases(sticks, files, environment, new=sticks)
    for stick in sticks:
        require_empty(stick)
        require_passphrase(secrets[stick], stick)
    if _version(publishing.repository):
        said = _rotate(publishing, folder, "root", by_itself, {**secrets, **_opened(by_itself)}, sticks, regions, now)
        forget_automatic(folder)
        _report(data, publishing.repository, now, as_json=as_json, before=f"{said} The root is in people's hands.")
        return
    hold_ceremony(publishing, folder, secrets, regions, now)
    _report(data, publishing.repository, now, as_json=as_json, before="The root of trust is in force.")


def hold_automatically(publishing: Publishing, folder: Path, regions: Sequence[str], now: float) -> bool:
    """Hold the ceremony with sticks in the data folder, unless one was held; whether it was. `folder` is DATA/trust."""
    if _version(publishing.repository):
        return False
    hold_ceremony(publishing, folder, make_automatic(folder), regions, now)
    return True


def renew_automatically(publishing: Publishing, folder: Path, region: str, due: Sequence[str], now: float) -> bool:
    """Sign anew what people would have to, where the sticks lie in the data folder; whether they do."""
    sticks = automatic_sticks(folder)
    for what in ("targets", "root") if sticks else ():
        if what in due or (what == "targets" and publishing.outdated(region)):
            _rotate(publishing, folder, what, sticks, _opened(sticks), (), (region,), now)
    return bool(sticks)


def hold_ceremony(
    publishing: Publishing, folder: Path, secrets: Mapping[Path, str], regions: Sequence[str], now: float
) -> None:
    """Make the keys of the sticks in `secrets` (by passphrase), the first root, and everything below it."""
    sticks = tuple(secrets)
    delegations = publishing.delegations(regions)
    with publishing.exclusive():
        keys = {stick: make_stick(stick, secrets[stick]) for stick in sticks}
        for role in ONLINE_ROLES:
            make_online(folder / f"{role}.pem")
        offline = {role: _public([held[role] for held in keys.values()], THRESHOLD) for role in OFFLINE_ROLES}
        online = {role: _public([read_online(folder / f"{role}.pem")]) for role in ONLINE_ROLES}
        _remember(folder, keys)
        repository = publishing.repository
        repository.stage_root(now, {**offline, **online})
        repository.stage_targets(now, delegations, publishing.anchors())
        _sign(repository, keys)
        repository.finish("targets")
        repository.finish("root")
        for delegation in delegations:
            repository.add_targets(delegation.role, now, [publishing.release_signer()])
        publishing.publish(now)
        write_private(folder / "root.json", repository.root_bytes(1))


def trust_rotate(
    path: Path,
    what: str,
    sticks: Sequence[Path],
    new_sticks: Sequence[Path],
    regions: Sequence[str],
    files: Sequence[Path],
    *,
    discard: bool,
    as_json: bool,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Replace or renew `what` (root, targets, online), or add signatures to what waits for them."""
    now = time.time()
    data = DataFolder.open(path)
    publishing, folder = trust_of(data), data.child("trust")
    repository = publishing.repository
    if what not in WHAT:
        raise ConfigurationError(f"expected one of {', '.join(WHAT)}, found {what!r}")
    if not _version(repository):
        raise ConfigurationError(f"{path}: no ceremony was held yet; start with `atoll trust init`")
    if discard:
        with publishing.exclusive():
            _discard(repository, folder)
        _report(data, repository, now, as_json=as_json, before="What waited for signatures is forgotten.")
        return
    following = (folder / f"{ONLINE_ROLES[-1]}.next.pem").exists()
    if "root" in repository.staged() and what != "targets" and (what == "online") != following:
        raise ConfigurationError(
            f"rotate {what}: expected no root waiting, found one for {'online' if following else 'root'}; "
            "let its holders sign, or drop it with --discard"
        )
    if new_sticks and (what != "root" or "root" in repository.staged()):
        raise ConfigurationError("--new-stick: expected with `rotate root` when no root waits for signatures")
    if not sticks:
        raise ConfigurationError("expected at least one --stick, whose holder signs")
    secrets = passphrases([*sticks, *new_sticks], files, environment, new=new_sticks)
    if new_sticks:
        _require_sticks(new_sticks)
        for stick in new_sticks:
            require_empty(stick)
            require_passphrase(secrets[stick], stick)
    said = _rotate(publishing, folder, what, sticks, secrets, new_sticks, regions, now)
    _report(data, repository, now, as_json=as_json, before=said)


def _rotate(
    publishing: Publishing,
    folder: Path,
    what: str,
    sticks: Sequence[Path],
    secrets: Mapping[Path, str],
    new_sticks: Sequence[Path],
    regions: Sequence[str],
    now: float,
) -> str:
    """Stage `what` unless it waits already, let `sticks` and `new_sticks` sign, and publish what then has enough
    signatures; what came of it, in words."""
    repository = publishing.repository
    keys = {stick: open_stick(stick, secrets[stick]) for stick in sticks}
    delegations = publishing.delegations(regions)
    with publishing.exclusive():
        _require_say(repository, keys)
        made = {stick: make_stick(stick, secrets[stick]) for stick in new_sticks}
        _remember(folder, {**keys, **made})
        if what == "online" and "root" not in repository.staged():
            for role in ONLINE_ROLES:
                make_online(folder / f"{role}.next.pem")
            online = {role: _public([read_online(folder / f"{role}.next.pem")]) for role in ONLINE_ROLES}
            repository.stage_root(now, online)
        if what == "root" and "root" not in repository.staged():
            roles = {role: _public([held[role] for held in made.values()], THRESHOLD) for role in OFFLINE_ROLES if made}
            repository.stage_root(now, roles)
        if "targets" not in repository.staged() and (what == "targets" or made):
            repository.stage_targets(now, delegations, publishing.anchors())
        _sign(repository, {**keys, **made})
        waiting = [repository.progress(role) for role in repository.staged()]
        if any(progress.missing for progress in waiting):
            return _missing(folder, waiting)
        _take_effect(publishing, folder, now, delegations)
        return f"{' and '.join(f'{progress.role} {progress.version}' for progress in waiting)}: in force."


def trust_status(path: Path, *, as_json: bool) -> None:
    """Versions, expiries, days left, who can sign, and what waits for signatures."""
    data = DataFolder.open(path)
    repository = Repository(coordinator_store(data))
    if not _version(repository):
        raise ConfigurationError(f"{path}: no ceremony was held yet; start with `atoll trust init`")
    _report(data, repository, time.time(), as_json=as_json)


def _take_effect(publishing: Publishing, folder: Path, now: float, delegations: Sequence[Delegation]) -> None:
    """Publish what has its signatures: targets and online roles under old and new keys first, the root last.

    A crash between any two lines leaves a repository that devices accept; calling again finishes the rest.
    """
    repository = publishing.repository
    if "targets" in repository.staged():
        repository.finish("targets")
        for delegation in delegations:
            repository.add_targets(delegation.role, now, [publishing.release_signer()])
    publishing.publish(now)
    if "root" in repository.staged():
        repository.finish("root")
    for role in ONLINE_ROLES:
        following = folder / f"{role}.next.pem"
        if following.exists():
            following.replace(folder / f"{role}.pem")
    publishing.publish(now)


def _opened(sticks: Sequence[Path]) -> dict[Path, str]:
    """The passphrases of sticks that lie in the data folder."""
    return {stick: automatic_passphrase(stick.parent) for stick in sticks}


def _require_say(repository: Repository, keys: Mapping[Path, Mapping[str, Ed25519PrivateKey]]) -> None:
    """Raise ConfigurationError for a stick that nothing in force or waiting counts, before anything is begun."""
    counting = {key for status in repository.status() if status.role in OFFLINE_ROLES for key in status.keys}
    for role in repository.staged():
        progress = repository.progress(role)
        counting.update(progress.may_sign, progress.signed)
    for stick, held in keys.items():
        if counting.isdisjoint(tuf_key_id(key.public_key()) for key in held.values()):
            raise ConfigurationError(
                f"{stick}: the keys of {holder_of(stick)} have no say any more; `atoll trust status` shows whose have"
            )


def _sign(repository: Repository, keys: Mapping[Path, Mapping[str, Ed25519PrivateKey]]) -> None:
    """Let every stick sign what it has a say in. Raises ConfigurationError for one that has none in anything."""
    for stick, held in keys.items():
        useful = False
        for role in repository.staged():
            signer = signer_of(held[role])
            progress = repository.progress(role)
            if signer.public_key.keyid in progress.may_sign:
                repository.sign_staged(role, signer)
                useful = True
            useful = useful or signer.public_key.keyid in progress.signed
        if not useful and repository.staged():
            raise ConfigurationError(f"{stick}: the keys of {holder_of(stick)} have no say in what waits to be signed")


def _require_sticks(sticks: Sequence[Path]) -> None:
    different = {stick.resolve() for stick in sticks}
    if not THRESHOLD < len(different) <= HOLDERS_MAX or len(different) != len(sticks):
        raise ConfigurationError(
            f"expected three or more different sticks, of which {THRESHOLD} sign, so that one may be lost; "
            f"found {len(different)}"
        )


def _discard(repository: Repository, folder: Path) -> None:
    for role in repository.staged():
        repository.discard(role)
    for role in ONLINE_ROLES:
        (folder / f"{role}.next.pem").unlink(missing_ok=True)


def _public(keys: Sequence[Ed25519PrivateKey], threshold: int = 1) -> RoleKeys:
    return RoleKeys(tuple(public_bytes(key.public_key()) for key in keys), threshold)


def _remember(folder: Path, keys: Mapping[Path, Mapping[str, Ed25519PrivateKey]]) -> None:
    """Keep which key is whose, so that a status can tell people apart."""
    names = _holders(folder)
    for stick, held in keys.items():
        holder = read_record(stick).holder
        names.update({tuf_key_id(key.public_key()): holder for key in held.values()})
    write_private(folder / "holders.json", msgspec.json.encode(names))


def _holders(folder: Path) -> dict[str, str]:
    try:
        return msgspec.json.decode((folder / "holders.json").read_bytes(), type=dict[str, str])
    except (FileNotFoundError, msgspec.DecodeError):
        return {}  # names are a convenience: without them key ids are shown


def _version(repository: Repository) -> int:
    try:
        return repository.status()[0].version
    except NotFound:
        return 0


def _missing(folder: Path, waiting: Sequence[Progress]) -> str:
    names = _holders(folder)
    lines = []
    for progress in waiting:
        can = ", ".join(sorted(names.get(key, key[:12]) for key in progress.may_sign))
        lines.append(f"{progress.role} {progress.version}: {progress.missing} more signature(s) needed, of {can}.")
    return "\n".join([*lines, "Run the same command with another --stick."])


def _report(data: DataFolder, repository: Repository, now: float, *, as_json: bool, before: str = "") -> None:
    names = _holders(data.child("trust"))
    rows = [_row(status, names, now) for status in repository.status()]
    waiting = [
        {**msgspec.to_builtins(progress), "may_sign": [names.get(key, key) for key in progress.may_sign]}
        for progress in map(repository.progress, repository.staged())
    ]
    value: dict[str, Any] = {"roles": rows, "waiting": waiting, "due": list(repository.due(now)), "message": before}
    table = columns(
        [{**row, "can_sign": f"{row['threshold']} of {', '.join(map(str, row['can_sign']))}"} for row in rows],
        ("role", "version", "expires", "days_left", "can_sign", "in_force"),
    )
    by_itself = automatic_sticks(data.child("trust"))
    if by_itself:
        value["automatic"] = str(by_itself[0].parent)
    notes = [f"The keys lie in {by_itself[0].parent}; `atoll trust init` gives them to people."] if by_itself else []
    notes += [f"Due soon: {', '.join(value['due'])}."] if value["due"] else []
    notes += [f"{entry['role']} {entry['version']} waits for {entry['missing']} signature(s)." for entry in waiting]
    show(value, "\n".join(filter(None, [before, table, *notes])), as_json=as_json)


def _row(status: RoleStatus, names: Mapping[str, str], now: float) -> dict[str, Any]:
    online = {"snapshot": "DATA/trust", "timestamp": "DATA/trust"}.get(status.role, "keyring")
    shown = [names.get(key, online) for key in status.keys]
    return {
        "role": status.role,
        "version": status.version,
        "expires": datetime.datetime.fromtimestamp(status.expires, datetime.UTC).strftime("%Y-%m-%d %H:%M"),
        "days_left": round((status.expires - now) / DAY_S, 1),
        "threshold": status.threshold,
        "can_sign": shown,
        "keys": list(status.keys),
        "in_force": status.in_force,
    }
