"""Before an aggregator begins an attempt it has a copy of each frozen contribution, and of no other one.

Most it has read from the log by then. The log has a moment to bring what is missing; the rest is fetched one by one.
What the log had and the coordinator did not freeze is dropped, and its devices are named.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from fl_coordinator.copies import Copies, HeldRound
from fl_coordinator.mailbox import Bell
from fl_coordinator.round_command import RoundCommand
from fl_coordinator.shares.contribution import keep, size_max
from fl_coordinator.threads import in_thread
from model_delta.digest import require_match
from model_delta.errors import NotFound, StorageFull, Unavailable
from model_delta.task import RoundTask

_READING_S = 0.3
"""So long the log may bring nothing that is missing before it is fetched elsewhere."""
_RETRY_FIRST_S, _RETRY_MAX_S = 0.05, 1.0

_log = logging.getLogger("atoll.aggregator")

Fetch = Callable[[str, str], Awaitable[bytes]]
"""fetch(round_id, digest): a contribution of a frozen round. Raises Unavailable, NotFound when it is not given out."""


class Completing:
    """Completes the `copies` of the aggregator `name`; `kept` is rung when the log has brought something, and
    `step_timeout_s` is how long fetching may take. `follows` says whether the log is being read."""

    def __init__(self, name: str, *, copies: Copies, kept: Bell, fetch: Fetch, step_timeout_s: float) -> None:
        self.follows = False
        self._name = name
        self._copies = copies
        self._kept = kept
        self._fetch = fetch
        self._step_timeout_s = step_timeout_s

    async def complete(self, command: RoundCommand, task: RoundTask, index: int) -> None:
        """Have a copy of each frozen contribution, and of no other one of the round. The log has a moment to bring what
        is missing; the rest is fetched, until a step's time is over.

        Raises NotFound, Unavailable, DigestMismatch, each with the contribution that is not to be had.
        """
        round_id = command.round_id
        await in_thread(self._copies.begin, HeldRound(round_id, task.deadline))
        while True:
            rings = self._kept.rings
            missing = await in_thread(self._copies.missing, round_id, command.contributions)
            if not missing or not self.follows:
                break
            try:
                async with asyncio.timeout(_READING_S):
                    await self._kept.rung(rings)
            except TimeoutError:
                break
        deadline = asyncio.get_running_loop().time() + self._step_timeout_s
        for digest in missing:
            data = await self._fetched(command, digest, deadline)
            entry = await in_thread(keep, data, size_max(task))
            await in_thread(self._copies.keep, {round_id: [entry.needed_by(index)]})
        if missing:
            _log.info("round %s: %d of its contributions were not read in time and fetched", round_id, len(missing))
        held = await in_thread(self._copies.devices, round_id)
        frozen = set(command.contributions)
        left_out = {digest: device_id for digest, device_id in held.items() if digest not in frozen}
        if left_out:
            names = sorted(set(left_out.values()))
            _log.warning(
                "round %s: the log has contributions that the coordinator did not freeze, of %s%s; dropped",
                *(round_id, ", ".join(names[:8]), " and others" if len(names) > 8 else ""),
            )
            await in_thread(self._copies.drop, round_id, left_out)

    async def _fetched(self, command: RoundCommand, digest: str, deadline: float) -> bytes:
        """One frozen contribution from the coordinator. Raises NotFound, Unavailable, DigestMismatch; each names it."""
        what = f"round {command.round_id!r}: contribution {command.contributions.index(digest)} ({digest[:16]}…)"
        pause = _RETRY_FIRST_S
        while True:
            try:
                data = await self._fetch(command.round_id, digest)
                require_match(data, digest, what)
                return data
            except NotFound as error:
                raise NotFound(f"{what} is frozen, but {self._name} finds it nowhere: {error}") from None
            except StorageFull:
                raise
            except Unavailable as error:
                if asyncio.get_running_loop().time() + pause >= deadline:
                    raise Unavailable(f"{what} does not come: {error}") from None
            await asyncio.sleep(pause)
            pause = min(2 * pause, _RETRY_MAX_S)
