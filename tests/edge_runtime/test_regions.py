"""Asking regions over real sockets: keep-alive, failover, set aside, probed again, nothing lost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from edge_runtime.regions import RegionClient
from model_delta.errors import Malformed, NotFound, Unavailable, Untrusted

FEATURES = {"amount": 12.5}


class Region:
    """A gateway that answers `/predict`, on a free port; `status` and `delay_s` make it ill."""

    def __init__(self, name: str) -> None:
        region = self
        self.name, self.status, self.delay_s = name, 200, 0.0
        self.asked = 0
        self.connections = 0
        self.bodies: list[dict[str, Any]] = []
        self._stopping = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                region.connections += 1
                region.lines.append(self.connection)

            def do_POST(self) -> None:
                region.asked += 1
                body = self.rfile.read(int(self.headers["Content-Length"]))
                region.bodies.append({"token": self.headers["Authorization"], **json.loads(body)})
                region._stopping.wait(region.delay_s)
                answer = {"score": 0.75, "decision": "decline", "model_version": "eu-west:1", "reason": "score"}
                data = json.dumps({**answer, "manifest": "f" * 64}).encode()
                with contextlib.suppress(OSError):
                    self.send_response(region.status)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)

            def log_message(self, *arguments: object) -> None:
                pass

        self.lines: list[socket.socket] = []
        self._handler = Handler
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        self._serve()

    def _serve(self) -> None:
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def kill(self) -> None:
        """As SIGKILL does: the port closes, and every connection with it."""
        self._stopping.set()
        self.server.shutdown()
        self.server.server_close()
        for line in self.lines:
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
            line.close()
        self.lines.clear()

    def revive(self) -> None:
        """On the same port again."""
        self._stopping.clear()
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), self._handler)
        self._serve()


@pytest.fixture
def regions() -> Iterator[tuple[Region, Region]]:
    both = Region("eu-west"), Region("ap-south")
    try:
        yield both
    finally:
        for region in both:
            region.kill()


def asking(regions: tuple[Region, ...], story: Callable[[RegionClient], Awaitable[None]], **options: Any) -> None:
    async def run() -> None:
        settings: dict[str, Any] = {"try_deadline_s": 3.0, "total_deadline_s": 10.0, "set_aside_s": 0.15, **options}
        async with RegionClient({region.name: region.url for region in regions}, "token", **settings) as client:
            await story(client)

    asyncio.run(run())


def test_the_nearest_region_is_asked_over_one_kept_connection(regions: tuple[Region, Region]) -> None:
    async def story(client: RegionClient) -> None:
        for _ in range(5):
            answer = await client.ask(FEATURES, "pos-0001", "ap-south")
            assert (answer.score, answer.decision, answer.region) == (0.75, "decline", "ap-south")
        assert answer.manifest == "f" * 64

    asking(regions, story)
    assert (regions[0].asked, regions[1].asked, regions[1].connections) == (0, 5, 1)
    assert regions[1].bodies[0] == {"token": "Bearer token", "features": FEATURES, "device_id": "pos-0001"}


def test_a_model_of_ones_own_is_asked_for_by_name(regions: tuple[Region, Region]) -> None:
    async def story(client: RegionClient) -> None:
        await client.ask(FEATURES, "pos-0001", "eu-west")

    asking(regions, story, model="fraud-csv")
    assert regions[0].bodies[0]["model"] == "fraud-csv"


def test_a_region_that_dies_loses_no_request_and_the_recovery_is_timed(regions: tuple[Region, Region]) -> None:
    near, far = regions
    ahead = [0.0]

    async def story(client: RegionClient) -> None:
        await client.ask(FEATURES, "pos-0001", "eu-west")
        near.kill()
        async with asyncio.TaskGroup() as group:
            for _ in range(20):
                group.create_task(client.ask(FEATURES, "pos-0001", "eu-west"))
        assert client.lost_requests == 0
        assert client.answered_by == {"eu-west": 1, "ap-south": 20}
        assert [(item.region, item.answered_by) for item in client.failovers] == [("eu-west", "ap-south")]
        assert 0 < client.failovers[0].recovery_s < 30.0, "less than what was waited for in between"
        assert client.down() == ("eu-west",)
        near.revive()
        assert (await client.ask(FEATURES, "pos-0001", "eu-west")).region == "ap-south", "it is still set aside"
        ahead[0] = 31.0
        assert (await client.ask(FEATURES, "pos-0001", "eu-west")).region == "eu-west"
        assert client.down() == ()

    asking(regions, story, set_aside_s=30.0, clock=lambda: time.monotonic() + ahead[0])
    assert far.asked == 21


def test_a_region_that_hangs_costs_one_wait_and_is_then_left_alone(regions: tuple[Region, Region]) -> None:
    near, _ = regions
    near.delay_s = 600.0

    async def story(client: RegionClient) -> None:
        for _ in range(4):
            assert (await client.ask(FEATURES, "pos-0001", "eu-west")).region == "ap-south"

    asking(regions, story, set_aside_s=30.0, try_deadline_s=0.3)
    assert near.asked == 1


@pytest.mark.parametrize("status", [500, 503, 429, 404])
def test_an_answer_that_another_region_may_better_is_asked_there(regions: tuple[Region, Region], status: int) -> None:
    regions[0].status = status

    async def story(client: RegionClient) -> None:
        assert (await client.ask(FEATURES, "pos-0001", "eu-west")).region == "ap-south"

    asking(regions, story)


def test_a_refusal_is_not_asked_again_elsewhere(regions: tuple[Region, Region]) -> None:
    async def story(client: RegionClient) -> None:
        regions[0].status = 422
        with pytest.raises(Malformed, match="region eu-west: refused with status 422"):
            await client.ask(FEATURES, "pos-0001", "eu-west")
        regions[0].status = 401
        with pytest.raises(Untrusted, match="refused with status 401"):
            await client.ask(FEATURES, "pos-0001", "eu-west")
        assert client.lost_requests == 0

    asking(regions, story)
    assert regions[1].asked == 0


def test_a_request_is_lost_only_when_nobody_answers(regions: tuple[Region, Region]) -> None:
    async def story(client: RegionClient) -> None:
        for region in regions:
            region.kill()
        with pytest.raises(Unavailable, match=r"no region answered \(tried eu-west, ap-south\)"):
            await client.ask(FEATURES, "pos-0001", "eu-west")
        assert client.lost_requests == 1
        regions[1].revive()
        assert (await client.ask(FEATURES, "pos-0001", "eu-west")).region == "ap-south"

    asking(regions, story)


@pytest.mark.parametrize("stands_still_s", [0.0, 60.0])
def test_a_region_that_was_too_slow_once_is_asked_again_before_a_request_is_lost(
    regions: tuple[Region, Region], stands_still_s: float
) -> None:
    """Also on a machine that stood still meanwhile, for longer than a request may take."""
    near, far = regions
    near.kill()
    far.delay_s, ahead = 600.0, [0.0]

    async def story(client: RegionClient) -> None:
        asking = asyncio.create_task(client.ask(FEATURES, "pos-0001", "eu-west"))
        while not far.asked:  # noqa: ASYNC110 - a thread counts
            await asyncio.sleep(0.005)
        far.delay_s, ahead[0] = 0.0, stands_still_s
        assert (await asking).region == "ap-south"
        assert client.lost_requests == 0

    asking(regions, story, try_deadline_s=0.3, clock=lambda: time.monotonic() + ahead[0])


def test_regions_that_stay_silent_cost_the_whole_time_of_a_request_and_no_more(regions: tuple[Region, Region]) -> None:
    for region in regions:
        region.delay_s = 600.0

    async def story(client: RegionClient) -> None:
        begun = time.monotonic()
        with pytest.raises(Unavailable, match=r"no region answered \(tried "):
            await client.ask(FEATURES, "pos-0001", "eu-west")
        assert 0.3 <= time.monotonic() - begun < 60
        assert client.lost_requests == 1
        assert all(1 <= region.asked <= 3 for region in regions)

    asking(regions, story, try_deadline_s=0.1, total_deadline_s=0.3)


def test_a_connection_the_server_has_closed_is_replaced_silently(regions: tuple[Region, Region]) -> None:
    async def story(client: RegionClient) -> None:
        await client.ask(FEATURES, "pos-0001", "eu-west")
        line = regions[0].lines.pop()
        line.shutdown(socket.SHUT_RDWR)
        assert (await client.ask(FEATURES, "pos-0001", "eu-west")).region == "eu-west"
        assert client.down() == ()

    asking(regions, story)


def test_an_address_that_is_none_is_named() -> None:
    with pytest.raises(Malformed, match="region eu-west: expected an address like http://host:port, found 'nowhere'"):
        RegionClient({"eu-west": "nowhere"}, "token")


def test_before_any_region_has_served_nothing_is_lost_and_afterwards_it_is(regions: tuple[Region, Region]) -> None:
    async def story(client: RegionClient) -> None:
        regions[0].status = regions[1].status = 503
        with pytest.raises(NotFound, match="no region serves this model yet"):
            await client.ask(FEATURES, "pos-0001", "eu-west")
        assert client.lost_requests == 0
        regions[0].status = 200
        await client.ask(FEATURES, "pos-0001", "eu-west")
        regions[0].status = 503
        with pytest.raises(Unavailable, match="no region answered"):
            await client.ask(FEATURES, "pos-0001", "eu-west")
        assert client.lost_requests == 1

    asking(regions, story, set_aside_s=0.0)
