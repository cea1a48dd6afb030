"""How processes that judge certificates learn which were revoked: they ask the coordinator again and again.

What was heard once is never forgotten by a running process, whether or not the coordinator can be reached.

Mosquitto asks nobody, but reads a list that the CA has signed. The coordinator writes that list when somebody was
revoked (`keep_list`); whoever started mosquitto watches the file and tells it to read again (`reload_when_changed`).
A connection that is open stays open until it is made anew; what comes over it is refused by the coordinator.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

import httpx

from atoll.settings import write_private
from model_delta.errors import AtollError

EVERY_S = 10.0
TIMEOUT_S = 10.0
LIST_EVERY_S = 1.0

_log = logging.getLogger("atoll.revocation")


async def keep_informed(revoked: set[int], coordinator: str, token: str, every_s: float = EVERY_S) -> None:
    """Add to `revoked` the serial numbers that the coordinator at that URL knows, every `every_s`, until cancelled."""
    headers = {"Authorization": f"Bearer {token}"}
    async with httpx.AsyncClient(headers=headers, timeout=TIMEOUT_S, trust_env=False) as client:
        while True:
            revoked |= await _asked(client, coordinator)
            await asyncio.sleep(every_s)


async def _asked(client: httpx.AsyncClient, coordinator: str) -> set[int]:
    try:
        response = await client.get(f"{coordinator}/v1/revoked")
        response.raise_for_status()
        return {int(serial) for serial in response.json()["serials"]}
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return set()


async def keep_list(
    path: Path,
    revoked: Callable[[], frozenset[int]],
    make_list: Callable[[], bytes],
    every_s: float = LIST_EVERY_S,
) -> None:
    """Write the signed list to `path` at the start and whenever somebody else is `revoked`, until cancelled."""
    written: frozenset[int] | None = None
    while True:
        try:
            now = await asyncio.to_thread(revoked)  # a keyring may have to ask its server
            if now != written:
                await asyncio.to_thread(lambda: write_private(path, make_list()))
                written = now
        except (AtollError, OSError) as error:  # tried again: until then the broker goes by the older list
            _log.warning("list of revoked certificates: %s", error)
        await asyncio.sleep(every_s)


async def reload_when_changed(path: Path, reload: Callable[[], None], every_s: float = LIST_EVERY_S) -> None:
    """Call `reload` now, because its program may have read an older file, and whenever the file at `path` was replaced
    by another one, until cancelled."""
    known: tuple[int, int] | None = None
    while True:
        found = _identity_of(path)
        if found != known:
            known = found
            reload()
        await asyncio.sleep(every_s)


def _identity_of(path: Path) -> tuple[int, int]:
    with contextlib.suppress(FileNotFoundError):
        found = path.stat()
        return found.st_ino, found.st_mtime_ns
    return 0, 0
