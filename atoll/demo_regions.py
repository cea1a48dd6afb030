"""The demo's act about a region that dies, told by a terminal that puts every payment to its region."""

from __future__ import annotations

import asyncio
import time
import urllib.request
from collections.abc import Mapping, Sequence

from atoll.demo_stage import (
    POLL_S,
    ActFailed,
    Figures,
    Stage,
)
from atoll.platform import gateway_name
from edge_runtime.regions import RegionClient
from model_delta.errors import Unavailable

REGION_DOWN_S = 5.0
TERMINAL_RATE = 25.0


async def region_loss(stage: Stage, figures: Figures) -> None:
    """A gateway is killed; whoever asks that region is answered by the next, and nothing is lost."""
    await stage.note("act 6: a region dies")
    dead = next(iter(stage.endpoints.gateways))
    name = gateway_name(dead)
    before = await _region_metrics(stage)
    terminal = AskingTerminal(stage, dead)
    async with terminal:
        await asyncio.sleep(2.0)
        killed = time.monotonic()
        await stage.supervisor.kill(name)
        while time.monotonic() - killed < REGION_DOWN_S:
            stage.tell(f"{dead} is dead, {time.monotonic() - killed:.0f} of {REGION_DOWN_S:.0f} s")
            await asyncio.sleep(POLL_S)
        stage.tell(f"starting {dead} again")
        await stage.supervisor.start(stage.programs[name])
        await _answers(stage.endpoints.gateways[dead])
        back = time.monotonic() - killed
        await asyncio.sleep(3.0)
    after = await _region_metrics(stage)
    fleet, restarted = increase(before, after)
    lost = terminal.lost + fleet["requests_lost"]
    if fleet["requests_cut_short"]:
        figures["requests_cut_short"] = fleet["requests_cut_short"]  # their devices died, not their regions
    figures.update(
        region=dead,
        seconds_dead=round(back, 2),
        requests_of_terminal=terminal.asked,
        requests_of_fleet=fleet["requests"],
        fleet_processes_restarted=restarted,
        answered_by=dict(terminal.answered_by),
        failovers=terminal.failovers + fleet["failovers"],
        requests_lost=lost,
        recovery_ms=round(terminal.recovery_s * 1000, 1),
        slowest_request_ms=round(terminal.slowest_s * 1000, 1),
    )
    if lost:
        raise ActFailed(f"expected no lost request, found {lost}")
    if not terminal.failovers:
        raise ActFailed(f"nobody asked {dead} while it was dead: {terminal.asked} requests")


class AskingTerminal:
    """A terminal that puts every payment to its region, before, while and after that region is dead."""

    def __init__(self, stage: Stage, home: str) -> None:
        device = stage.world.devices[0]
        self._home, self._device_id = home, device.device_id
        self._payments = stage.world.live(device.index)
        self._client = RegionClient(stage.endpoints.gateways, stage.data.tokens()["tenant"])
        self._task: asyncio.Task[None] | None = None
        self.asked = self.lost = 0
        self.slowest_s = 0.0

    async def __aenter__(self) -> None:
        await self._client.__aenter__()
        self._task = asyncio.create_task(self._pay(), name="asking terminal")

    async def __aexit__(self, *error: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._client.__aexit__(None, None, None)

    async def _pay(self) -> None:
        for sample in self._payments:
            started = time.monotonic()
            self.asked += 1
            try:
                await self._client.ask(sample.features, self._device_id, self._home)
            except Unavailable:
                self.lost += 1
            self.slowest_s = max(self.slowest_s, time.monotonic() - started)
            await asyncio.sleep(1 / TERMINAL_RATE)

    @property
    def answered_by(self) -> Mapping[str, int]:
        """Answers by region."""
        return self._client.answered_by

    @property
    def failovers(self) -> int:
        """How often another region answered for one that had failed."""
        return len(self._client.failovers)

    @property
    def recovery_s(self) -> float:
        """The longest time from a region's first failure to the first answer elsewhere."""
        return max((failover.recovery_s for failover in self._client.failovers), default=0.0)


async def _region_metrics(stage: Stage) -> list[Mapping[str, float]]:
    """The metrics of each of the fleet's processes."""
    return [
        await stage.call(lambda port=port: scrape(f"http://127.0.0.1:{port}/metrics"))  # type: ignore[misc]
        for port in stage.metrics_ports
    ]


def increase(before: Sequence[Mapping[str, float]], after: Sequence[Mapping[str, float]]) -> tuple[dict[str, int], int]:
    """By how much the counts of requests grew over all processes, and how many processes were started anew meanwhile;
    the counts outlive their process. Raises ActFailed when they did not, because nothing is known then."""
    total, restarted = dict.fromkeys(("requests", "requests_lost", "requests_cut_short", "failovers"), 0), 0
    for number, (first, last) in enumerate(zip(before, after, strict=True)):
        restarted += first["process_start_time_seconds"] != last["process_start_time_seconds"]
        for key in total:
            grown = int(last[f"atoll_region_{key}"] - first[f"atoll_region_{key}"])
            if grown < 0:
                raise ActFailed(
                    f"{key} of fleet-{number} are not known: its counts were lost, {grown} since act 6 began"
                )
            total[key] += grown
    return total, restarted


def scrape(url: str) -> Mapping[str, float]:
    """Unlabelled samples of a Prometheus text page by name. Raises Unavailable."""
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5) as answer:
            lines = answer.read().decode().splitlines()
    except OSError as error:
        raise Unavailable(f"{url}: {error}") from None
    samples = {}
    for line in lines:
        if line and not line.startswith("#") and "{" not in line:
            name, _, value = line.partition(" ")
            samples[name] = float(value)
    return samples


async def _answers(url: str) -> None:
    """Wait until a gateway is ready to infer."""
    deadline = time.monotonic() + 30
    while True:
        try:
            await asyncio.to_thread(_get_ready, url)
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ActFailed(f"{url}: not ready again within 30 s: {error}") from None
            await asyncio.sleep(0.2)


def _get_ready(url: str) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{url}/v2/health/ready", timeout=2) as answer:
        answer.read()
