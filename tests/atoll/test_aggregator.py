"""How an aggregator fetches the frozen contributions: one after the other, and nothing that is cut off."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx
import pytest

from atoll.aggregator import _fetch_contributions
from model_delta.errors import Malformed, Unavailable

Fetch = Callable[[httpx.Response], list[bytes]]


@pytest.fixture
def fetched(tmp_path: Path) -> Fetch:
    async def story(answer: httpx.Response) -> list[bytes]:
        async with httpx.AsyncClient(transport=httpx.MockTransport(lambda request: answer)) as client:
            return list(await _fetch_contributions(client, "http://coordinator", "fraud-7", tmp_path))

    return lambda answer: asyncio.run(story(answer))


def framed(contributions: Sequence[bytes]) -> bytes:
    return b"".join(struct.pack(">I", len(data)) + data for data in contributions)


@pytest.mark.parametrize("contributions", [[], [b"one"], [b"", b"x" * 100_000, b"three"]])
def test_contributions_arrive_as_they_were_frozen(fetched: Fetch, contributions: list[bytes]) -> None:
    assert fetched(httpx.Response(200, content=framed(contributions))) == contributions


@pytest.mark.parametrize("cut", [1, 3, 6, 12])
def test_an_answer_that_is_cut_off_is_refused(fetched: Fetch, cut: int) -> None:
    with pytest.raises(Malformed, match="contributions of round fraud-7: expected"):
        fetched(httpx.Response(200, content=framed([b"first one", b"second one"])[:-cut]))


def test_a_coordinator_that_has_none_is_named(fetched: Fetch) -> None:
    with pytest.raises(Unavailable, match="the coordinator answered 404: no such round"):
        fetched(httpx.Response(404, text="no such round"))
