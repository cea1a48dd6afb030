"""Counts of requests to regions: right after the death of the process that counted them."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from atoll.region_counts import FIELDS, CountedRegions, RegionCounts
from edge_runtime.regions import RegionClient
from model_delta.errors import Malformed, Unavailable

ASKS_FOR_EVER = """
import asyncio, sys
from pathlib import Path
from atoll.region_counts import CountedRegions, RegionCounts
from edge_runtime.regions import RegionClient
from model_delta.errors import Unavailable

async def main():
    with RegionCounts(Path(sys.argv[1])) as counts:
        async with RegionClient({"dead": sys.argv[2]}, "t", try_deadline_s=30.0, total_deadline_s=60.0) as client:
            regions = CountedRegions(client, counts)
            for _ in range(7):
                try:
                    await regions.ask({"a": 1.0}, "pos-1", "dead")
                except Unavailable:
                    pass
            # From here on nobody refuses: the question hangs until the process is killed.
            async with RegionClient({"slow": sys.argv[3]}, "t", try_deadline_s=30.0, total_deadline_s=60.0) as slow:
                print("hangs", flush=True)
                await CountedRegions(slow, counts).ask({"a": 1.0}, "pos-1", "slow")

asyncio.run(main())
"""


@pytest.fixture
def refusing() -> Iterator[str]:
    """An address that nobody listens on."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


@pytest.fixture
def silent() -> Iterator[str]:
    """A server that takes connections and never says a word."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def read(path: Path) -> dict[str, int]:
    with RegionCounts(path) as counts:
        return {name: counts.read(name) for name in FIELDS}


def test_counts_go_on_after_a_killed_process(tmp_path: Path, refusing: str, silent: str) -> None:
    path = tmp_path / "fleet" / "counts"
    for deaths in (1, 2):
        process = subprocess.Popen(
            [sys.executable, "-c", ASKS_FOR_EVER, str(path), refusing, silent], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "hangs\n"
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        requests = 7 * deaths + read(path)["cut_short"]
        assert read(path) == {
            "requests": requests,
            "settled": requests,
            "lost": 7 * deaths,
            "failovers": 0,
            "cut_short": requests - 7 * deaths,
        }
        assert requests - 7 * deaths <= deaths


def test_a_question_that_hangs_when_the_process_dies_is_cut_short_and_not_lost(tmp_path: Path) -> None:
    counts = RegionCounts(tmp_path / "counts")
    counts.add("requests", 5)
    counts.add("settled", 3)
    assert read(tmp_path / "counts") == {"requests": 5, "settled": 5, "lost": 0, "failovers": 0, "cut_short": 2}
    assert read(tmp_path / "counts")["cut_short"] == 2


def test_a_lost_question_is_counted_once(tmp_path: Path, refusing: str) -> None:
    async def ask() -> None:
        with RegionCounts(tmp_path / "counts") as counts:
            async with RegionClient({"dead": refusing}, "t") as client:
                with pytest.raises(Unavailable):
                    await CountedRegions(client, counts).ask({"a": 1.0}, "pos-1", "dead")

    asyncio.run(ask())
    assert read(tmp_path / "counts") == {"requests": 1, "settled": 1, "lost": 1, "failovers": 0, "cut_short": 0}


def test_a_file_that_is_something_else_is_refused_and_a_cut_one_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "counts"
    for other in (b"hello", b"x" * 48, bytes(200)):
        path.write_bytes(other)
        with pytest.raises(Malformed, match="remove the file"):
            RegionCounts(path)
        assert path.read_bytes() == other
    path.write_bytes(b"atollrc1" + bytes(7))
    assert read(path) == dict.fromkeys(FIELDS, 0)
