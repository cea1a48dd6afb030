"""A real aggregator process that follows a coordinator's log, or a topic of Kafka, and is killed while it reads."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from atoll.http_server import serving
from atoll.platform import Layout, port_of, prepare
from atoll.settings import DataFolder, quiet_environment
from atoll.updates import EMBEDDED
from fl_coordinator.control import control_app
from fl_coordinator.copies import Copies
from tests.fakes.ports import free_ports
from tests.fl_coordinator.admitting_process import Place
from tests.fl_coordinator.learning_platform import SPEC, Aggregators, contribute_all
from tests.fl_coordinator.platform_in_memory import adopt_first, fleet

ROOT = Path(__file__).parents[2]


@contextlib.asynccontextmanager
async def aggregator(data: DataFolder, url: str) -> AsyncIterator[None]:
    """The process of a1, once it is ready; leaving kills it."""
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "atoll", "aggregator", "run", "--name", "a1"),
        *("--data", str(data.path), "--updates-log", url, "--json"),
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**quiet_environment(), "PYTHONPATH": str(ROOT)},
    )
    try:
        assert child.stdout is not None
        line = await child.stdout.readline()
        assert b'"ready"' in line, line
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()


async def kept(client: httpx.AsyncClient, url: str, count: int) -> None:
    """Wait until the process says that it has kept so many since its start."""
    end, found = time.monotonic() + 60.0, ""
    while time.monotonic() < end:
        text = (await client.get(f"{url}/metrics")).text
        found = re.findall(r'aggregator_log_records\{result="kept"\} (\S+)', text)[0]
        if float(found) == count:
            return
        await asyncio.sleep(0.05)
    pytest.fail(f"expected {count} kept, found {found}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["embedded", "kafka"])
def test_an_aggregator_that_is_killed_while_it_reads_has_everything_once_in_the_end(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    data = DataFolder.open(tmp_path / "data", create=True)
    ports = iter(free_ports(12))
    endpoints = prepare(data, Layout(regions=("eu-west",), broker="embedded", learning=True), lambda what: next(ports))
    url, log = EMBEDDED, str(tmp_path / "log")
    if kind == "kafka":
        url = log = f"kafka://{request.getfixturevalue('kafka').address}/updates-{uuid.uuid4().hex}"
    platform = Place(data.path, log)
    platform.clock.now = time.time()  # the process has the real time
    devices = fleet(platform)
    Aggregators(platform).members["a1"].close()
    shutil.copytree(data.path / "a1" / "key", data.child("aggregators", "a1") / "key")
    own = endpoints.aggregators["a1"]
    app = control_app(platform.coordinator, tokens=data.tokens(), flower=platform.bridge)

    async def story() -> tuple[str, ...]:
        async with (
            platform.running() as coordinator,
            serving(app, port_of(endpoints.coordinator), "coordinator"),
            httpx.AsyncClient(trust_env=False, timeout=60.0) as client,
        ):
            await adopt_first(platform, devices)
            async with aggregator(data, url):
                opened = await coordinator.open_round(SPEC)
                await contribute_all(devices[:3], opened.round_id)
                await kept(client, own, 3)
            await contribute_all(devices[:6], opened.round_id)
            async with aggregator(data, url):
                await kept(client, own, 3)
                await contribute_all(devices, opened.round_id)
                await kept(client, own, 5)
            return coordinator.round(opened.round_id).frozen

    frozen = asyncio.run(story())
    platform.log.close()
    copies = Copies(data.child("aggregators", "a1") / "copies")
    (held,) = copies.rounds()
    assert tuple(copies.devices(held.round_id)) == frozen
    assert copies.missing(held.round_id, frozen) == []
