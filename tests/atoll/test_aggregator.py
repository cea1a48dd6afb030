"""What an aggregator reads of the coordinator: the log in parts, announcements, single contributions; all bounded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

import httpx
import pytest

from atoll import aggregator, aggregator_reading
from atoll.aggregator_reading import CoordinatorClient, CoordinatorLog
from fl_coordinator.updates_log import LogPart, packed_part
from model_delta.errors import Malformed, NotFound, Unavailable
from monitoring.metrics import Metrics

T = TypeVar("T")
Ask = Callable[[CoordinatorClient], Awaitable[T]]


def asked(answer: Callable[[httpx.Request], httpx.Response], ask: Ask[T]) -> T:
    async def story() -> T:
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
            return await ask(CoordinatorClient(client, "http://coordinator"))

    return asyncio.run(story())


@pytest.mark.parametrize(
    "part", [LogPart(0, (), 0), LogPart(40, ((40, b"one"), (51, b""), (60, b"x" * 100_000)), 100_100)]
)
def test_a_part_of_the_log_arrives_as_it_was_sent(part: LogPart) -> None:
    seen: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(f"{request.url.path}?{request.url.query.decode()}")
        return httpx.Response(200, content=packed_part(part))

    assert asked(answer, lambda client: CoordinatorLog(client).read_from(40)) == part
    assert seen == ["/v1/log?from=40&wait=2"]


@pytest.mark.parametrize("cut", [1, 3, 11, 12, 20, 29])
def test_a_part_that_is_cut_off_is_refused(cut: int) -> None:
    data = packed_part(LogPart(0, ((0, b"first"), (5, b"second")), 11))[:-cut]
    with pytest.raises(Malformed, match="part of an updates log"):
        asked(lambda request: httpx.Response(200, content=data), lambda client: client.log_from(0, 0.0))


def test_offsets_that_go_back_or_past_every_number_are_refused() -> None:
    for part in (LogPart(9, ((9, b"a"), (9, b"b")), 20), LogPart(9, ((8, b"a"),), 20), LogPart(0, (), 2**63)):
        data = packed_part(part)
        with pytest.raises(Malformed, match="part of an updates log"):
            asked(lambda request, data=data: httpx.Response(200, content=data), lambda client: client.log_from(0, 0.0))


@pytest.mark.parametrize(("status", "kind"), [(404, NotFound), (503, Unavailable), (400, Malformed)])
def test_what_the_coordinator_says_instead_is_told(status: int, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=f"of round fraud-7: the coordinator answered {status}: no such round"):
        asked(
            lambda request: httpx.Response(status, text="no such round"),
            lambda client: client.contribution("fraud-7", "0" * 64),
        )


def test_an_answer_without_end_is_cut_off() -> None:
    class Endless(httpx.AsyncByteStream):
        sent = 0

        async def __aiter__(self):  # type: ignore[no-untyped-def]
            while True:
                self.sent += 2**20
                yield bytes(2**20)

    stream = Endless()
    with pytest.raises(Malformed, match="announcement of round fraud-7: expected at most"):
        asked(lambda request: httpx.Response(200, stream=stream), lambda client: client.announcement("fraud-7"))
    assert stream.sent <= aggregator_reading.ANNOUNCEMENT_BYTES_MAX + 2**21


def test_what_arrives_at_once_in_a_mailbox_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregator, "ARRIVING_BYTES_MAX", 1_000)

    class Own:
        def deliver(self, sender: str, name: str, data: bytes) -> None:
            raise Malformed("no message")

    async def story() -> list[int]:
        app = aggregator._mailbox(Own(), "secret", Metrics())  # type: ignore[arg-type]
        goes_on = asyncio.Event()

        async def slowly() -> AsyncIterator[bytes]:
            yield bytes(900)
            await goes_on.wait()
            yield bytes(50)

        headers = {"Authorization": "Bearer secret"}
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://own", headers=headers) as client:
            slow = asyncio.create_task(client.post("/v1/messages/a/hello", content=slowly()))
            await asyncio.sleep(0.02)
            refused = await client.post("/v1/messages/b/hello", content=bytes(200))
            goes_on.set()
            return [
                refused.status_code,
                (await slow).status_code,
                (await client.post("/v1/messages/b/hello")).status_code,
            ]

    assert asyncio.run(story()) == [503, 400, 400]
