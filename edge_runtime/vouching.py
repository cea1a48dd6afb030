"""The device's questions to the TUF repository, over the broker: on every connection, before every update, and now and
then in between.

`Vouching` puts an `Authority` (which blocks, and knows no broker) on the device's line: it asks a region's mirror
whether anything is new, in one small exchange as long as nothing is, and lets the authority fetch what it needs by the
chunk protocol, from a thread of its own. Mirrors are trusted with nothing: one whose metadata does not verify is set
aside for the next. While nobody answers, or what is answered has run out, the device keeps running what it has and
takes nothing new; after a grace it says so in its reports (`alarm`).

A version that is not vouched for yet may be in a moment: the mirror's metadata may be older than the plan that names
the version. So it is refused for good only after PATIENCE_S.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import random
import time
from collections.abc import Callable
from pathlib import Path

from edge_runtime.fetching import Fetcher
from edge_runtime.waiting import wait_at_most
from model_delta.errors import AtollError, Malformed, NotVouchedFor, Unavailable, Untrusted
from model_delta.manifest import Manifest, manifest_digest
from model_delta.trust.authority import Authority
from model_delta.trust.client import TrustStatus
from model_delta.trust.fetchers import AskSource
from model_delta.trust.updater import TrustAnchors

PATIENCE_S = 60.0
FRESH_S = 1.0
"""A refresh that ended less than this ago is repeated only if it leaves a version without anybody's word."""
EVERY_S = 6 * 3600.0
"""A timestamp lasts a day: there is time for three answers that get lost."""
SOON_S = 10.0
WAITING_MAX = 64

_log = logging.getLogger(__name__)


class Vouching:
    """One device's view of the repository, kept in `folder`. `root` and `anchors` come from its enrolment; `clock` is
    wall time as the machine has it."""

    def __init__(
        self,
        *,
        folder: Path,
        tenant: str,
        root: bytes,
        anchors: TrustAnchors,
        fetcher: Fetcher,
        connected: Callable[[], bool],
        clock: Callable[[], float],
        rng: random.Random,
        every_s: float = EVERY_S,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._fetcher, self._connected, self._clock, self._rng = fetcher, connected, clock, rng
        self._every_s, self._patience_s = every_s, patience_s
        self._authority = Authority(folder, tenant, root, anchors, AskSource(self._ask))
        self._thread = concurrent.futures.ThreadPoolExecutor(1, f"{folder.parent.name} trust")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asked: concurrent.futures.Future[tuple[int, bytes]] | None = None
        self._refreshing = asyncio.Lock()
        self._refreshed = -FRESH_S
        self._wanted = asyncio.Event()
        self._unvouched: dict[str, float] = {}
        self._hear: list[Callable[[], None]] = []

    @property
    def anchors(self) -> TrustAnchors:
        """The tenant's role keys, as the repository last had them."""
        return self._authority.anchors

    def now(self) -> float:
        """Wall time, which a clock that was set back cannot move before what was signed."""
        return self._authority.now(self._clock())

    @property
    def status(self) -> TrustStatus:
        """Where the device stands."""
        return self._authority.status(self._clock())

    @property
    def alarm(self) -> str:
        """What the fleet's operators should know; "" when there is nothing."""
        return self._authority.alarm(self._clock())

    def on_new_anchors(self, hear: Callable[[], None]) -> None:
        """Call `hear` in the event loop whenever role keys have changed."""
        self._hear.append(hear)

    def ask_soon(self) -> None:
        """Something came that is signed by keys that are not known: perhaps they are new."""
        self._wanted.set()

    async def run(self) -> None:
        """Refresh on every connection, when asked to, and every interval (an eighth of jitter), until cancelled."""
        try:
            while True:
                if self._connected():
                    try:
                        await self.refresh()
                        pause = self._every_s * (1 + (self._rng.random() - 0.5) / 4)
                    except (AtollError, OSError) as error:
                        _log.warning("repository: %s", error)
                        pause = min(self._every_s, SOON_S)
                    await self._while_connected(pause)
                else:
                    await asyncio.sleep(0.1)
        finally:
            await self._stop()

    async def _stop(self) -> None:
        """End the thread's work and wait for it: it must not write into the folder of the device's next life."""
        self._loop = None
        if self._asked is not None:
            self._asked.cancel()
        await asyncio.shield(asyncio.to_thread(self._thread.shutdown, cancel_futures=True))

    async def _while_connected(self, seconds: float) -> None:
        """Wait, but not longer than the connection lasts; a wish to ask ends it, though not within SOON_S."""
        end = time.monotonic() + seconds
        while self._connected() and (now := time.monotonic()) < end:
            if self._wanted.is_set() and now >= self._refreshed + SOON_S:
                self._wanted.clear()
                return
            if self._wanted.is_set():
                await asyncio.sleep(0.1)
            else:
                await wait_at_most(self._wanted, min(1.0, end - now))

    async def refresh(self, fresh_s: float = 0.0) -> bool:
        """Learn what is newest, unless that was done `fresh_s` ago; whether it was done now.

        Raises Unavailable: a mirror whose metadata does not verify is as good as none, and is set aside.
        """
        async with self._refreshing:
            if time.monotonic() - self._refreshed < fresh_s:
                return False
            self._loop = asyncio.get_running_loop()
            before = self._authority.anchors
            number = self._fetcher.next_request()
            answer = await self._fetcher.check_in(number, self._authority.check_in(number))
            try:
                await self._loop.run_in_executor(self._thread, self._authority.refresh, self._clock(), answer)
            except (Untrusted, Malformed) as error:
                self._fetcher.set_nearest_aside()
                raise Unavailable(f"repository: {error}") from None
            except RuntimeError:  # the thread has ended: so does the device
                raise Unavailable("repository: the device is stopping") from None
            self._refreshed = time.monotonic()
            if self._authority.anchors != before:
                for hear in self._hear:
                    hear()
            return True

    async def require(self, manifest: Manifest, *, patient: bool = True) -> None:
        """Return if the repository vouches for `manifest`, as of now.

        Raises Unavailable while nothing is known or (if `patient`) the word may still be on its way, NotVouchedFor
        when it is not.
        """
        digest, asked = manifest_digest(manifest), await self.refresh(FRESH_S)
        try:
            try:
                await self._require(manifest)
            except NotVouchedFor:
                if asked:
                    raise
                await self.refresh()
                await self._require(manifest)
        except NotVouchedFor as error:
            if len(self._unvouched) >= WAITING_MAX:
                self._unvouched.clear()
            since = self._unvouched.setdefault(digest, time.monotonic())
            if patient and time.monotonic() - since < self._patience_s:
                raise Unavailable(str(error)) from None
            raise
        self._unvouched.pop(digest, None)

    async def _require(self, manifest: Manifest) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, self._authority.require, manifest, self._clock())

    def _ask(self, name: str, offset: int, _length: int, timeout_s: float) -> tuple[int, bytes]:
        """A range of a TUF file, for the authority's thread."""
        loop = self._loop
        if loop is None or loop.is_closed():
            raise Unavailable(f"{name}: the device is not running")
        self._asked = asked = asyncio.run_coroutine_threadsafe(self._fetcher.part("tuf", name, offset), loop)
        if self._loop is None:  # it stopped meanwhile
            asked.cancel()
        try:
            return asked.result(timeout_s)
        except TimeoutError:
            asked.cancel()
            raise
        except concurrent.futures.CancelledError:
            raise Unavailable(f"{name}: the device is stopping") from None
