"""A region's questions to the TUF repository: the coordinator is asked, and what it once said is kept.

`Vouching` gives an `Authority` (which blocks) the files it asks for: those that never change from the region's store,
which the mirror shares, and the timestamp from the coordinator; while that is away, the timestamp that is kept, which
is believed until it runs out. So a region that restarts alone finds the versions it had, and takes nothing that is
not vouched for.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import time
from collections.abc import Callable
from pathlib import Path

from model_delta.errors import AtollError, Malformed, NotFound, Unavailable, Untrusted
from model_delta.manifest import Manifest
from model_delta.store import ArtifactStore
from model_delta.trust.authority import Authority
from model_delta.trust.fetchers import AskSource
from model_delta.trust.paths import KIND
from model_delta.trust.updater import TrustAnchors
from regional_gateway.mirror import TIMESTAMP
from regional_gateway.supply import Fetch

log = logging.getLogger(__name__)

EVERY_S = 6 * 3600.0
RETRY_S = 60.0
FRESH_S = 1.0
"""A refresh that ended less than this ago is not repeated."""


class Vouching:
    """A region's view of one tenant's repository, kept in `folder`. `root` and `anchors` come from its enrolment."""

    def __init__(
        self,
        *,
        folder: Path,
        tenant: str,
        root: bytes,
        anchors: TrustAnchors,
        store: ArtifactStore,
        fetch: Fetch,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store, self._fetch, self._clock = store, fetch, clock
        self._authority = Authority(folder, tenant, root, anchors, AskSource(self._ask))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._refreshing = asyncio.Lock()
        self._refreshed = -FRESH_S

    @property
    def anchors(self) -> TrustAnchors:
        """The tenant's role keys, as the repository last had them."""
        return self._authority.anchors

    def alarm(self) -> str:
        """What a person should know; "" when there is nothing."""
        return self._authority.alarm(self._clock())

    async def run(self, every_s: float = EVERY_S) -> None:
        """Refresh at the start and every interval until cancelled, so that `alarm` means something."""
        while True:
            try:
                await self.refresh()
                pause = every_s
            except AtollError as error:
                log.warning("%s", error)
                pause = min(every_s, RETRY_S)
            await asyncio.sleep(pause)

    async def refresh(self) -> None:
        """Learn what is newest. Raises Unavailable, also for metadata that does not verify: another may, later."""
        async with self._refreshing:
            if time.monotonic() - self._refreshed < FRESH_S:
                return
            self._loop = asyncio.get_running_loop()
            try:
                await asyncio.to_thread(self._authority.refresh, self._clock())
            except (Untrusted, Malformed) as error:
                raise Unavailable(f"repository: {error}") from None
            self._refreshed = time.monotonic()

    async def require(self, manifest: Manifest) -> None:
        """Return if the repository vouches for `manifest` now. Raises NotVouchedFor, Unavailable."""
        await self.refresh()
        await asyncio.to_thread(self._authority.require, manifest, self._clock())

    def _ask(self, name: str, offset: int, length: int, timeout_s: float) -> tuple[int, bytes]:
        """A range of a TUF file, for the authority's thread."""
        assert self._loop is not None
        if offset == 0:
            asked = asyncio.run_coroutine_threadsafe(self._have(name), self._loop)
            try:
                asked.result(timeout_s)
            except TimeoutError:
                asked.cancel()
                raise
            except concurrent.futures.CancelledError:
                raise Unavailable(f"{name}: the gateway is stopping") from None
        return self._store.read(KIND, name, offset, length)

    async def _have(self, name: str) -> None:
        """Bring a file into the store. Raises NotFound when there is none, or nobody to ask for it."""
        kept = await asyncio.to_thread(self._store.has, KIND, name)
        if kept and name != TIMESTAMP:
            return
        try:
            data = await self._fetch("tuf", name)
        except NotFound:
            raise
        except Unavailable as error:
            if not kept:
                raise NotFound(str(error)) from None
        else:
            await asyncio.to_thread(self._store.put, KIND, name, data)
