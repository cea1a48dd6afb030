"""A TUF client follows the repository through a region's mirror, by the same chunks as everything else."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

import pytest

from model_delta.encoding import pack, unpack
from model_delta.errors import NotFound, Unavailable
from model_delta.store import DirectoryStore
from model_delta.topics import ChunkRequest, ChunkResponse, down, up
from model_delta.trust.client import Trust
from model_delta.trust.fetchers import AskSource
from model_delta.trust.paths import KIND
from monitoring.metrics import Metrics
from regional_gateway.mirror import Mirror
from tests.fakes.link import FakeBroker
from tests.fakes.tuf_site import NOW, TENANT, Site

DEVICE, REGION = "pos-0001", "eu-west"


class Line:
    """A device's questions to the mirror, asked from a thread as a TUF client asks them."""

    def __init__(self, broker: FakeBroker) -> None:
        self._link = broker.link(DEVICE)
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[ChunkResponse]] = {}
        self._link.subscribe(down(DEVICE, "res"), self._heard)

    def ask(self, name: str, at: int, length: int, timeout_s: float) -> tuple[int, bytes]:
        answer = asyncio.run_coroutine_threadsafe(self.chunk(name, at, length), self._loop).result(timeout_s)
        if answer.error:
            raise NotFound(answer.error)
        return answer.total, answer.data

    async def chunk(self, name: str, at: int = 0, length: int = 500) -> ChunkResponse:
        number = next(self._numbers)
        self._waiting[number] = self._loop.create_future()
        await self._link.publish(up(DEVICE, f"req/{REGION}"), pack(ChunkRequest(number, "tuf", name, at, length)))
        async with asyncio.timeout(5.0):
            return await self._waiting[number]

    def _heard(self, topic: str, payload: bytes) -> None:
        answer = unpack(payload, ChunkResponse)
        self._waiting[answer.request].set_result(answer)


class Origin:
    """The coordinator as the mirror sees it: the site's files, and it can go away."""

    def __init__(self, site: Site) -> None:
        self.site, self.up = site, True
        self.asked: list[str] = []

    async def fetch(self, kind: str, name: str) -> bytes:
        self.asked.append(name)
        if not self.up:
            raise Unavailable("the coordinator is away")
        return self.site.store.get(kind, name)


@pytest.mark.parametrize("age_s", [0.0, 60.0])
def test_a_client_follows_the_repository_through_the_mirror(tmp_path: Path, age_s: float) -> None:
    site = Site()
    origin = Origin(site)

    async def story() -> None:
        broker = FakeBroker()
        store = DirectoryStore(tmp_path / "mirror")
        mirror = Mirror(
            region=REGION,
            link=broker.link(f"gateway-{REGION}"),
            store=store,
            fetch=origin.fetch,
            metrics=Metrics(),
            timestamp_seconds=age_s,
        )
        serving = asyncio.create_task(mirror.run())
        await asyncio.sleep(0)
        line = Line(broker)
        trust = Trust(tmp_path / "device", site.provisioned(), AskSource(line.ask))
        try:
            assert (await asyncio.to_thread(trust.refresh, NOW)).timestamp == 1
            assert await asyncio.to_thread(trust.anchors, TENANT, NOW) == site.anchors
            newest = site.release(b"the next version")
            site.publish()
            seen = (await asyncio.to_thread(trust.refresh, NOW)).timestamp
            if age_s:
                assert seen == 1  # a mirror's timestamp may be as old as it is allowed to be
                assert origin.asked.count("timestamp.json") == 1
                return
            assert (await asyncio.to_thread(trust.target, newest, NOW)).length == 16
            origin.up = False
            assert (await asyncio.to_thread(trust.refresh, NOW)).timestamp == 2
            for name in ("../secret", "", "x" * 300):
                assert "expected a name" in (await line.chunk(name)).error
            assert store.names(KIND)
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)

    asyncio.run(story())
