"""What it costs to coordinate a federated round over Flower: control messages, and weights that need not travel.

`python -m benchmarks.flower_control [--rounds N] [--quick] [--json]`. A real SuperLink with TLS and node
authentication, supervised as the product does it, and the product's ServerApp; all on this machine. A round is what
one round sends, one message to each node: the signed announcement to two regional relays, and with it the command to
stand by to three aggregators (`fl_coordinator.standing`). A round goes on as soon as one region knows of it
(`round_driver.RoundDriver._announce`; the devices of the other have until the deadline). No device trains here, so the
list of 32 contributions is put up at the first relay's answer, where the aggregators ask for it over HTTP, and they
answer when they have it: there is nothing to compute. The figure is the time from handing over the announcement to the
last aggregator's answer. Had an aggregator not come for the list it would have been sent a second message; the text
says how many messages there were. That the round is over is not measured and is none of them: a relay asks for it over
HTTP, and is sent a message only if it does not (`fl_coordinator.relaying`). Between rounds lies a pause of two seconds
that is not counted.

    fl.control         p50 with the product's nodes. Each relay checks the announcement and retains it on a real MQTT
                       broker (the embedded one) before it answers; each aggregator checks it before it stands by.
                       After 20 s without a command nodes ask the SuperLink twice a second instead of five times: the
                       text says what a round then takes.
    fl.control.stock   p50 with Flower's own: five `flower-supernode` processes, which start a ClientApp for each
                       message. That of a relay does nothing but answer, that of an aggregator asks for the list, and
                       answers.
    fl.control.stock.exchange   p50 of one exchange, one message to each of those five at once and its answer
    fl.weights         bytes of model weights that the region's mirror handed to devices during a round, on a platform
                       started by `atoll up --learning` with devices that run the base version; the mirror is the only
                       source of weights that a device has. `--quick` leaves this out.

Nothing contacts the internet: see `fl_coordinator.flower_superlink.superlink_environment`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import os
import re
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from atoll.aggregator_reading import CoordinatorClient
from atoll.http_server import serving
from atoll.ports import held_ports
from benchmarks.claims import Claim, at_most, run
from device_sim.terminal_features import FEATURES
from edge_runtime.link import MqttLink
from fl_coordinator.flower import APP_FOLDER, node_key, node_public_key
from fl_coordinator.flower_bridge import FlowerBridge
from fl_coordinator.flower_node import BUSY_S, FlowerNode, Handler
from fl_coordinator.flower_superlink import SuperLink, SuperLinkPlace, superlink_environment
from fl_coordinator.relaying import through
from fl_coordinator.round_command import stands_s
from fl_coordinator.shares.bounds import fitted
from fl_coordinator.standing import Standing
from fl_coordinator.standing_by import StandingBy
from model_delta.digest import digest_of
from model_delta.encoding import pack
from model_delta.errors import NotFound
from model_delta.graphs.mlp import mlp_model
from model_delta.keys.certificates import make_request
from model_delta.keys.keyring import EmbeddedKeyring
from model_delta.merkle import root
from model_delta.task import TASK_TYPE, AggregatorKey, RoundTask
from model_delta.trust.signing import seal_envelope
from regional_gateway.mqtt.access import FLEET_RULES, access
from regional_gateway.mqtt.broker import MqttBroker
from regional_gateway.relay import Relay

AGGREGATORS = ("a0", "a1", "a2")
REGIONS = ("eu-west", "ap-south")
RELAYS = tuple(f"relay-{region}" for region in REGIONS)
STOCK_APP = Path(__file__).resolve().parent / "flower_stock"
PAUSE_S = 2.0
READY_S = 180.0
THIN_S_MAX, STOCK_S_MAX = 1.0, 7.0
CONTRIBUTIONS = 32
FLEET = 12
SIZES = (len(FEATURES), 64, 32)
ROLLOUT = """\
apiVersion: atoll/v1
kind: Rollout
metadata: {name: first}
spec:
  model: fraud
  target: latest
  cohorts: [{name: everyone, match: {}}]
  strategy: {canary: {control: none, stages: [{share: 100%, hold: {minSeconds: 2, minDecisions: 20}}]}}
  guardrails: [{metric: error_rate, max: 1%}]
  rollback: {auto: true}
"""


class Taken(NamedTuple):
    """Seconds: the announcement until the first relay's answer, until the last one's, and from the former to the last
    aggregator's; and how many messages there were in all."""

    first_relay: float
    all_relays: float
    attempt: float
    messages: int

    @property
    def control(self) -> float:
        """What a round waits for."""
        return self.first_relay + self.attempt


class CountingBridge(FlowerBridge):
    """Says how many messages it was asked to send."""

    messages = 0

    async def command(self, payload: Mapping[str, Any], nodes: Sequence[str], *options: Any, **named: Any) -> Any:
        self.messages += len(nodes)
        return await super().command(payload, nodes, *options, **named)


class Stage:
    """A SuperLink with five registered nodes, the queue to its ServerApp, and a keyring that signs announcements."""

    def __init__(self, folder: Path, app: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.keyring = EmbeddedKeyring.create(folder / "keyring", "acme")
        with held_ports(7) as ports:
            self.port, superlink, *self.runtimes = ports
        self.place = SuperLinkPlace(
            folder / "flower", superlink, folder / "superlink.pem", folder / "superlink.key", folder / "ca.pem"
        )
        key = ec.generate_private_key(ec.SECP256R1())
        pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        self.place.private_key.write_bytes(key.private_bytes(pem, pkcs8, serialization.NoEncryption()))
        request = make_request(key, "superlink")
        self.place.certificate.write_bytes(self.keyring.issue_certificate(request, "superlink", None, server=True))
        self.place.ca.write_bytes(self.keyring.ca_pem())
        self.token = folder / "token"
        self.token.write_text(secrets.token_urlsafe(16))
        self.keys = {name: node_public_key(self.key(name)) for name in (*AGGREGATORS, *RELAYS)}
        self.superlink = SuperLink(self.place, dict(os.environ), app)
        self.bridge = CountingBridge()
        self.standing = Standing(self.bridge)
        self.aggregators = tuple(
            AggregatorKey(name, secrets.token_bytes(32), secrets.token_bytes(32)) for name in AGGREGATORS
        )
        self.contributions = [digest_of(b"contribution %d" % number) for number in range(CONTRIBUTIONS)]

    def key(self, name: str) -> Path:
        return self.folder / f"{name}.key"

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        url = f"http://127.0.0.1:{self.port}"
        async with serving(self._endpoints(), self.port, "benchmark"):
            supervising = asyncio.create_task(
                self.superlink.supervise(lambda: self.keys, lambda: self.bridge.silent_s, url, self.token)
            )
            try:
                yield
            finally:
                supervising.cancel()
                await asyncio.gather(supervising, return_exceptions=True)

    async def asked(self) -> None:
        """Wait until the ServerApp runs and asks for work."""
        started = time.monotonic()
        while self.bridge.silent_s >= time.monotonic() - started:  # noqa: ASYNC110
            await asyncio.sleep(0.1)

    def _endpoints(self) -> Starlette:
        def known(request: Request) -> bool:
            return request.headers.get("authorization") == f"Bearer {self.token.read_text()}"

        async def commands(request: Request) -> Response:
            if not known(request):
                return Response(status_code=401)
            holds, rests = (request.query_params[name].split(",") for name in ("holds", "rests"))
            command = await self.bridge.next_command(float(request.query_params["wait"]), holds, rests)
            return Response(status_code=204) if command is None else JSONResponse(command)

        async def replies(request: Request) -> Response:
            return (
                JSONResponse(self.bridge.reply(await request.json())) if known(request) else Response(status_code=401)
            )

        async def attempt(request: Request) -> Response:
            if not known(request):
                return Response(status_code=401)
            name, wait = request.query_params["aggregator"], float(request.query_params["wait"])
            try:
                found = await self.standing.attempt_for(request.path_params["round_id"], name, wait)
            except NotFound:
                return Response(status_code=404)
            return Response(status_code=204) if found is None else Response(found)

        routes = [
            ("/v1/flower/commands", commands, "GET"),
            ("/v1/flower/replies", replies, "POST"),
            ("/v1/rounds/{round_id}/attempt", attempt, "GET"),
        ]
        return Starlette(routes=[Route(path, handle, methods=[method]) for path, handle, method in routes])

    def announcement(self, number: int) -> bytes:
        """Of round `number`, of about the size that a platform's has."""
        task = RoundTask(
            tenant="acme",
            model="fraud",
            round_id=f"fraud-{number}",
            base=digest_of(b"base"),
            training_graph=digest_of(b"graph"),
            parameters=(),
            length=39_937,
            contributions_max=CONTRIBUTIONS,
            aggregators=self.aggregators,
            issued=int(time.time()) + number,
            deadline=int(time.time()) + 3600,
        )
        return seal_envelope(self.keyring.sign("round", TASK_TYPE, pack(fitted(task))))

    async def control(self, number: int) -> Taken:
        """One round: its announcement to both relays, the aggregators told to stand by in the same moment and, when the
        first relay has answered, the list put up for them."""
        round_id, announcement, before = f"fraud-{number}", self.announcement(number), self.bridge.messages
        told = {"announcements": {"fraud": announcement}}
        command = {
            "round_id": round_id,
            "attempt": 1,
            "task": announcement,
            "contributions": self.contributions,
            "root": root([bytes.fromhex(digest) for digest in self.contributions]),
            "deadline_s": READY_S,
        }
        started = time.perf_counter()
        ended: list[float] = []

        async def tell(relay: str) -> None:
            await through(self.bridge, relay, READY_S)(told)
            ended.append(time.perf_counter() - started)

        relays = [asyncio.ensure_future(tell(relay)) for relay in RELAYS]
        self.standing.begin(round_id, announcement, AGGREGATORS, READY_S)
        await asyncio.wait(relays, return_when=asyncio.FIRST_COMPLETED)
        frozen = time.perf_counter()
        await self.standing.command(command, AGGREGATORS, READY_S)
        answered = time.perf_counter() - frozen
        await asyncio.gather(*relays)
        return Taken(ended[0], ended[-1], answered, self.bridge.messages - before)

    async def rounds(self, count: int) -> list[Taken]:
        """Of `count` rounds, after one that finds everything started."""
        found = []
        for number in range(count + 1):
            found.append(await self.control(number))
            await asyncio.sleep(PAUSE_S)
        return found[1:]

    async def exchanges(self, count: int) -> list[float]:
        """Seconds of single exchanges with all five nodes."""
        found = []
        for number in range(count):
            started = time.perf_counter()
            await self.bridge.command({"round_id": f"single-{number}"}, (*AGGREGATORS, *RELAYS), READY_S)
            found.append(time.perf_counter() - started)
            await asyncio.sleep(PAUSE_S)
        return found


def measure(options: argparse.Namespace) -> Sequence[Claim]:
    """All claims."""
    with tempfile.TemporaryDirectory() as folder:
        stock, exchanges = asyncio.run(_stock(Path(folder) / "stock", max(2, options.rounds * 2 // 3)))
        loads = [_load()]
        thin, quiet = asyncio.run(_thin(Path(folder) / "thin", options.rounds, 1 if options.quick else 3))
        loads.append(_load())
        weights = [] if options.quick else [_weights(Path(folder) / "platform")]
    beside, told = _p50(stock), f"s p50 of {_text(thin)}; after quiet {_p50(quiet):.2f}"
    return [
        at_most("fl.control", _p50(thin), f"{told}; {loads[1]}; baseline: stock", THIN_S_MAX, beside),
        at_most("fl.control.stock", beside, f"s p50 of {_text(stock)}, five SuperNodes; {loads[0]}", STOCK_S_MAX),
        at_most(
            "fl.control.stock.exchange",
            statistics.median(exchanges),
            f"s p50 of {len(exchanges)}, five SuperNodes at once (slowest {max(exchanges):.2f})",
            STOCK_S_MAX,
        ),
        *weights,
    ]


def _p50(rounds: Sequence[Taken]) -> float:
    return statistics.median(one.control for one in rounds)


def _text(rounds: Sequence[Taken]) -> str:
    first, everyone, attempt, _ = (statistics.median(part) for part in zip(*rounds, strict=True))
    slowest = max(one.control for one in rounds)
    messages = statistics.mean(one.messages for one in rounds)
    return (
        f"{len(rounds)} rounds (first relay {first:.2f}, then all aggregators {attempt:.2f}, slowest {slowest:.2f}; "
        f"both relays {everyone:.2f}; {messages:g} messages a round)"
    )


def _load() -> str:
    """How many processes wanted a core within the last minute: where others work too, the figures are also theirs."""
    return f"load {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores"


async def _thin(folder: Path, count: int, quiet: int) -> tuple[list[Taken], list[Taken]]:
    """The product's nodes: of rounds that follow each other, and of rounds after a quiet time."""
    stage = Stage(folder, APP_FOLDER)
    loop = asyncio.get_running_loop()

    def in_loop(work: Callable[[Mapping[str, Any]], Awaitable[dict[str, Any]]]) -> Handler:
        async def done(command: Mapping[str, Any]) -> dict[str, Any]:
            return await work(command)

        return lambda command: asyncio.run_coroutine_threadsafe(done(command), loop).result(READY_S)

    def node(name: str, handler: Handler) -> FlowerNode:
        return FlowerNode(
            *(name, stage.place.address, stage.place.ca, stage.key(name), handler),
            rests=lambda command: stands_s(command) is not None,
        )

    async def nothing(command: Mapping[str, Any]) -> dict[str, Any]:
        return {}

    async with contextlib.AsyncExitStack() as life:
        broker = await life.enter_async_context(
            MqttBroker(host="127.0.0.1", port=0, tls=None, folder=folder / "broker", acl=access(FLEET_RULES))
        )
        headers = {"Authorization": f"Bearer {stage.token.read_text()}"}
        client = await life.enter_async_context(httpx.AsyncClient(headers=headers, trust_env=False))
        coordinator = CoordinatorClient(client, f"http://127.0.0.1:{stage.port}")
        nodes = []
        for key in stage.aggregators:
            standing_by = StandingBy(
                anchors=stage.keyring.anchors(),
                key=key,
                fetch=functools.partial(coordinator.attempt, aggregator=key.name),
                run=nothing,
                clock=time.time,
            )
            nodes.append(node(key.name, in_loop(standing_by.answer)))
        for region, name in zip(REGIONS, RELAYS, strict=True):
            link = MqttLink(host="127.0.0.1", port=broker.port, client_id=f"gateway-{region}")
            relay = Relay(
                tenant="acme",
                region=region,
                link=await life.enter_async_context(link),
                folder=folder / region,
                anchors=stage.keyring.anchors,
            )
            nodes.append(node(name, in_loop(relay.carry_out)))
        await life.enter_async_context(stage.running())
        try:
            for one in nodes:
                one.start()
            rounds = await stage.rounds(count)
            rested = []
            for number in range(quiet):
                await asyncio.sleep(BUSY_S + 2.0)
                rested.append(await stage.control(count + 1 + number))
        finally:
            await asyncio.gather(*(asyncio.to_thread(one.stop) for one in nodes))
    return rounds, rested


async def _stock(folder: Path, count: int) -> tuple[list[Taken], list[float]]:
    """The same with Flower's SuperNodes, each a process that starts others; and single exchanges with all of them."""
    stage = Stage(folder, STOCK_APP)
    nodes: list[subprocess.Popen[bytes]] = []
    async with stage.running():
        try:
            await stage.asked()  # a SuperNode that comes too early waits ever longer
            nodes += [_super_node(stage, name, port) for name, port in zip(stage.keys, stage.runtimes, strict=True)]
            return await stage.rounds(count), await stage.exchanges(count)
        finally:
            for one in nodes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(one.pid, signal.SIGTERM)
            for one in nodes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    await asyncio.to_thread(one.wait, 10.0)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(one.pid, signal.SIGKILL)


def _super_node(stage: Stage, name: str, port: int) -> subprocess.Popen[bytes]:
    """One of Flower's own nodes. It is a session of its own, so that what it starts ends with it."""
    key = stage.folder / f"{name}.openssh"  # the form that flower-supernode reads
    form = serialization.PrivateFormat.OpenSSH
    key.write_bytes(
        node_key(stage.key(name)).private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    )
    words = ["--superlink", stage.place.address, "--root-certificates", str(stage.place.ca)]
    words += ["--auth-supernode-private-key", str(key), "--port", str(port), "--node-config", f'name="{name}"']
    environment = superlink_environment(stage.place, os.environ)
    with (stage.folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            [str(Path(sys.executable).parent / "flower-supernode"), *words],
            env={**environment, "FLWR_HOME": str(stage.folder / name)},
            cwd=stage.folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _weights(folder: Path) -> Claim:
    """What the region's mirror hands to devices during a round whose base they hold."""
    folder.mkdir()
    data = folder / "data"
    with contextlib.ExitStack() as life:
        platform = life.enter_context(_program(folder, "up", "--data", str(data), "--learning", "--broker", "embedded"))
        addresses = json.loads(_first_line(platform))
        region = next(iter(addresses["gateways"].values()))
        version = _atoll(data, "publish", str(_model(folder / "model.onnx")))["manifest"]
        (folder / "rollout.yaml").write_text(ROLLOUT)
        _atoll(data, "rollout", "apply", str(folder / "rollout.yaml"))
        life.enter_context(_program(folder, "fleet", "run", "--data", str(data), "--devices", str(FLEET)))
        _until(lambda: _adopted(addresses["coordinator"], version))
        before = _handed_out(region)
        found = _atoll(data, "round", "run", "--quorum", "10", "--hostile", "1", "--deadline", "90")
        after = _handed_out(region)
    came = len(found["admitted"])
    if found["state"] != "PUBLISHED":
        raise RuntimeError(f"the round ended as {found['state']}: {found['reason']}")
    other = sum(after.values()) - sum(before.values()) - after["blob"] + before["blob"]
    text = f"bytes of weights to the {came} of {FLEET} devices that contributed (of anything else: {other:.0f})"
    return at_most("fl.weights", after["blob"] - before["blob"], text, 0)


@contextlib.contextmanager
def _program(folder: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """A program of the platform while the block runs."""
    with (folder / f"{words[0]}.log").open("w") as log:
        command = [sys.executable, "-m", "atoll", *words, "--json"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def _first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def _atoll(data: Path, *words: str) -> Any:
    """What a command prints; it has to succeed."""
    command = [sys.executable, "-m", "atoll", *words, "--data", str(data), "--json"]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)


def _model(path: Path) -> Path:
    """An untrained model of the platform's own kind."""
    rng = np.random.default_rng(1)
    layers = [
        (rng.normal(0, 0.2, (a, b)).astype(np.float32), np.zeros(b, np.float32)) for a, b in pairwise((*SIZES, 1))
    ]
    path.write_bytes(mlp_model(layers, np.zeros(SIZES[0], np.float32), np.ones(SIZES[0], np.float32)))
    return path


def _get(url: str) -> bytes:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=10) as response:
        body: bytes = response.read()
        return body


def _adopted(coordinator: str, version: str) -> bool:
    """Whether the whole fleet runs the version, and its rollout is over."""
    found = json.loads(_get(f"{coordinator}/v1/state"))
    running = sum(device["running"] == version for device in found["devices"])
    return running >= FLEET and all(rollout["state"] == "completed" for rollout in found["rollouts"])


def _handed_out(region: str) -> Counter[str]:
    """Bytes that the mirror has handed to devices, by kind of object."""
    found: Counter[str] = Counter()
    for line in _get(f"{region}/metrics").decode().splitlines():
        match = re.match(r'atoll_mirror_bytes_total\{kind="(\w+)"\} (\S+)', line)
        if match:
            found[match[1]] += int(float(match[2]))
    return found


def _until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + READY_S
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(f"the fleet did not take the version within {READY_S:g} s")
        time.sleep(0.5)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9, help="rounds with the product's nodes")
    parser.add_argument("--quick", action="store_true", help="no round of real devices, fewer quiet ones")
    run(__doc__ or "", measure, parser)
