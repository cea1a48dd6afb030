"""How processes that judge certificates learn which were revoked: they ask the coordinator again and again.

What was heard once is never forgotten by a running process, whether or not the coordinator can be reached.
"""

from __future__ import annotations

import asyncio

import httpx

EVERY_S = 10.0
TIMEOUT_S = 10.0


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
