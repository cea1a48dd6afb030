"""Waiting with an end.

`asyncio.wait_for` in Python 3.11 loses a cancellation that arrives together with the result (python/cpython #86296):
a task that waits in a loop then lives for ever, and so does the TaskGroup around it. `asyncio.timeout` does not.
"""

from __future__ import annotations

import asyncio


async def wait_at_most(event: asyncio.Event, seconds: float | None) -> bool:
    """Wait until `event` is set (True) or `seconds` are over (False; None: no end)."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True
