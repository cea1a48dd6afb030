"""The real SuperLink, SuperExec, ServerApp and nodes: what the three flower modules assume of the pinned Flower.

One platform for the whole scenario, because starting it takes seconds; its processes are killed one after the other,
with a command under way, and after each death the same question must be answered again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fl_coordinator import flower
from fl_coordinator.flower_bridge import CommandFailed, FlowerBridge
from fl_coordinator.flower_node import FlowerNode, Handler
from fl_coordinator.flower_superlink import SuperLink, SuperLinkPlace, processes_of
from fl_coordinator.round_command import stands_s
from fl_coordinator.transcript import decision_in
from model_delta.errors import Malformed, Unavailable, Untrusted
from model_delta.keys.certificates import make_request
from model_delta.keys.keyring import EmbeddedKeyring
from tests.fakes.ports import free_port
from tests.fl_coordinator.flower_round import AGGREGATORS, ROUND, FlowerRound
from tests.fl_coordinator.platform_in_memory import Device
from tests.systems import on_linux

NAMES = ("aggregator-1", "aggregator-2", "aggregator-3")
TOKEN = "a-token-of-this-test"
ANSWER = bytes(range(256)) * 1200  # 307,200 bytes: the shares of an opened sum

NODE_PROCESS = """
import sys, time
from pathlib import Path
from fl_coordinator.flower_node import FlowerNode

def handler(command):
    Path(sys.argv[4]).touch()
    time.sleep(command["seconds"])
    return {"pid": __import__("os").getpid()}

FlowerNode("aggregator-4", sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), handler).run()
"""

DYING_NODE_PROCESS = (
    """
import os
import flwr.supercore.inflatable.inflatable_utils as inflatable

inflatable.push_objects = lambda *args, **options: os._exit(9)  # the answer is announced, its content never comes
"""
    + NODE_PROCESS
)


class Aggregator:
    """Stands where an aggregator will: takes as long as the command says, answers with much data, counts its calls."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.calls: list[str] = []
        self.called, self.release = threading.Event(), threading.Event()

    def __call__(self, command: dict[str, Any]) -> dict[str, Any]:
        self.calls.append(command["question"])
        self.called.set()
        if command["question"] == "refuse":
            raise Untrusted("device pos-0007: its two shares differ")
        if command["question"] == "fail":
            raise KeyError("a secret that must not travel")
        if command["question"] == "wait":
            assert self.release.wait(60.0)
        time.sleep(command.get("seconds", 0.0))
        return {"name": self.name, "digest": hashlib.sha256(command["salt"]).digest(), "sum": ANSWER, "rows": 3}


class WatchedNode(FlowerNode):
    """A node that takes no message while its `gate` is shut, and says when it has sent an answer."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.gate, self.answered = threading.Event(), threading.Event()
        self.gate.set()

    def _serve(self, session: Any) -> None:
        super()._serve(_WatchedSession(session, self))  # type: ignore[arg-type]


class _WatchedSession:
    def __init__(self, session: Any, node: WatchedNode) -> None:
        self._session, self._node = session, node
        self.keep_alive = session.keep_alive

    def pull(self) -> Any:
        return self._session.pull() if self._node.gate.is_set() else None

    def push(self, message: Any, answer: Any) -> None:
        self._session.push(message, answer)
        self._node.answered.set()


class Platform:
    """A certificate authority, a coordinator's two endpoints, a supervised SuperLink and three nodes in threads."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = environment
        self.token = folder / "coordinator.token"
        self.token.write_text(TOKEN)
        self.place = SuperLinkPlace(
            folder / "flower", free_port(), folder / "superlink.pem", folder / "superlink.key", folder / "ca.pem"
        )
        certify(self.place, folder)
        self.keys = {name: flower.node_public_key(folder / f"{name}.key") for name in NAMES}
        self.aggregators = {name: Aggregator(name) for name in NAMES}
        self.nodes = [self.node(name) for name in NAMES]
        self.superlink = SuperLink(self.place, environment)
        self.url = ""

    def node(self, name: str) -> WatchedNode:
        key = self.folder / f"{name}.key"
        return WatchedNode(name, self.place.address, self.place.ca, key, self.aggregators[name], 0.1, 0.2)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[FlowerBridge]:
        bridge = FlowerBridge()
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.serve(bridge)
        for node in self.nodes:
            node.start()
        supervising = asyncio.create_task(
            self.superlink.supervise(lambda: self.keys, lambda: bridge.silent_s, self.url, self.token)
        )
        try:
            yield bridge
        finally:
            supervising.cancel()
            await asyncio.gather(supervising, return_exceptions=True)
            for node in self.nodes:
                await asyncio.to_thread(node.stop)
            await self.stop_serving()

    def serve(self, bridge: FlowerBridge) -> None:
        config = uvicorn.Config(endpoints(bridge), host="127.0.0.1", port=self.port, log_level="warning")
        self.server = uvicorn.Server(config)
        self.serving = asyncio.create_task(self.server.serve())

    async def stop_serving(self) -> None:
        self.server.should_exit = True
        await self.serving

    async def kill(self, name: str, how: signal.Signals = signal.SIGKILL) -> None:
        pids = [pid for pid, command in processes_of(self.place).items() if command == name]
        assert len(pids) == 1, f"expected one {name}"
        os.kill(pids[0], how)

    async def all_called(self) -> None:
        for aggregator in self.aggregators.values():
            assert await asyncio.to_thread(aggregator.called.wait, 60.0)

    def forget_calls(self) -> None:
        for aggregator in self.aggregators.values():
            aggregator.calls.clear()
            aggregator.called.clear()
            aggregator.release.clear()

    def calls(self) -> list[list[str]]:
        return [aggregator.calls for aggregator in self.aggregators.values()]


def endpoints(bridge: FlowerBridge) -> Starlette:
    def refused(request: Request) -> bool:
        return request.headers.get("authorization") != f"Bearer {TOKEN}"

    async def commands(request: Request) -> Response:
        if refused(request):
            return Response(status_code=401)
        holds = request.query_params["holds"].split(",")
        rests = request.query_params["rests"].split(",")
        command = await bridge.next_command(float(request.query_params["wait"]), holds, rests)
        return Response(status_code=204) if command is None else JSONResponse(command)

    async def replies(request: Request) -> Response:
        return Response(status_code=401) if refused(request) else JSONResponse(bridge.reply(await request.json()))

    return Starlette(
        routes=[
            Route("/v1/flower/commands", commands),
            Route("/v1/flower/replies", replies, methods=["POST"]),
        ]
    )


def certify(place: SuperLinkPlace, folder: Path) -> None:
    keyring = EmbeddedKeyring.create(folder / "keyring", "acme")
    key = ec.generate_private_key(ec.SECP256R1())
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    place.private_key.write_bytes(key.private_bytes(pem, pkcs8, serialization.NoEncryption()))
    request = make_request(key, "superlink")
    place.certificate.write_bytes(keyring.issue_certificate(request, "superlink", None, server=True))
    place.ca.write_bytes(keyring.ca_pem())


def sockets_of(pids: set[int]) -> tuple[set[tuple[str, int]], set[str]]:
    """What these processes listen on (hexadecimal address, port), and the hexadecimal addresses they talk to."""
    inodes = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    inodes.add(str(descriptor.readlink()).removeprefix("socket:[").removesuffix("]"))
    listening, talking = set(), set()
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[9] not in inodes:
                continue
            address, port = fields[1].split(":")
            if fields[3] == "0A":
                listening.add((address, int(port, 16)))
            else:
                talking.add(fields[2].split(":")[0])
    return listening, talking


@on_linux
@pytest.mark.slow(seconds=55)
@pytest.mark.timeout(600)  # 52 s on two busy cores, 100 s on two overloaded ones
def test_commands_get_through_whatever_dies(tmp_path: Path) -> None:
    platform = Platform(tmp_path, dict(os.environ))
    before = set(tmp_path.iterdir())

    async def scenario() -> None:
        async with platform.running() as bridge:
            await answers_of_300_kb(platform, bridge)
            await failures_have_names(bridge)
            await asyncio.to_thread(the_control_api_is_closed_and_idempotent, platform)
            loopback = "0100007F"
            pids = set(processes_of(platform.place))
            assert sorted(processes_of(platform.place).values()) == ["flower-superexec", "flwr-serverapp", "superlink"]
            listening, talking = sockets_of(pids)
            assert listening == {(loopback, platform.place.port)}
            assert talking == {loopback}
            await a_coordinator_that_was_away_is_found_again(platform, bridge)
            await a_killed_superlink_costs_nothing(platform, bridge)
            await a_killed_server_app_is_replaced(platform, bridge)
            await a_killed_superexec_is_replaced(platform, bridge)
            await a_killed_aggregator_gets_its_command_again(platform, bridge)
            await a_death_in_the_middle_of_an_answer_costs_seconds(platform, bridge)
            await a_whole_round_survives_and_is_the_same_in_one_process(platform, bridge)

    asyncio.run(scenario())
    assert processes_of(platform.place) == {}
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", platform.place.port), 1.0)
    new = {path.name for path in set(tmp_path.iterdir()) - before if path.suffix != ".node"}
    assert new == {"flower", "started", "aggregator-4.key", "round"}
    everything = b"".join(path.read_bytes() for path in (tmp_path / "flower").glob("superlink.*"))
    assert TOKEN.encode() not in everything


async def answers_of_300_kb(platform: Platform, bridge: FlowerBridge) -> None:
    for salt in (b"one", b"two"):
        replies = await bridge.command({"question": "add", "salt": salt}, NAMES, 60.0)
        digest = hashlib.sha256(salt).digest()
        assert replies == {name: {"name": name, "digest": digest, "sum": ANSWER, "rows": 3} for name in NAMES}
    assert platform.calls() == [["add", "add"]] * 3


async def failures_have_names(bridge: FlowerBridge) -> None:
    with pytest.raises(CommandFailed) as caught:
        await bridge.command({"question": "refuse", "salt": b""}, (NAMES[0], "aggregator-9"), 60.0)
    assert caught.value.failures == {
        NAMES[0]: "Untrusted: device pos-0007: its two shares differ",
        "aggregator-9": "is not online",
    }
    with pytest.raises(CommandFailed) as caught:
        await bridge.command({"question": "fail", "salt": b""}, NAMES[:1], 60.0)
    assert caught.value.failures == {NAMES[0]: "failed with KeyError; see its log"}


def the_control_api_is_closed_and_idempotent(platform: Platform) -> None:
    place = platform.place
    with flower.Control(place.address, place.ca, place.token) as control:
        ids = control.register_nodes(platform.keys)
        assert control.register_nodes(platform.keys) == ids == control.node_names()
        run = control.ensure_run(platform.url, platform.token)
        assert control.ensure_run(platform.url, platform.token) == run
        with pytest.raises(Malformed, match="registered for 'aggregator-1'"):
            control.register_nodes({"aggregator-8": platform.keys[NAMES[0]]})
    wrong = place.folder.parent / "wrong.token"
    wrong.write_text("something-else")
    with (
        flower.Control(place.address, place.ca, wrong) as control,
        pytest.raises(Unavailable, match="HTTP 401"),
    ):
        control.ensure_run(platform.url, platform.token)
    wrong.unlink()


async def a_coordinator_that_was_away_is_found_again(platform: Platform, bridge: FlowerBridge) -> None:
    await platform.stop_serving()
    command = asyncio.create_task(bridge.command({"question": "q", "salt": b"0"}, NAMES, 60.0))
    await asyncio.sleep(0.1)
    platform.serve(bridge)
    assert set(await command) == set(NAMES)


async def a_killed_superlink_costs_nothing(platform: Platform, bridge: FlowerBridge) -> None:
    """It dies with one message that its node has not taken, one that a node works on, and one answer that the ServerApp
    (stopped meanwhile) has not collected. The next one is told of the nodes; nothing is done twice, nothing is lost."""
    platform.forget_calls()
    untaken, working, answering = platform.nodes
    untaken.gate.clear()
    answering.answered.clear()
    command = asyncio.create_task(bridge.command({"question": "wait", "salt": b"3"}, NAMES, 60.0))
    for name in NAMES[1:]:
        assert await asyncio.to_thread(platform.aggregators[name].called.wait, 60.0)
    await platform.kill("flwr-serverapp", signal.SIGSTOP)
    platform.aggregators[answering.name].release.set()
    assert await asyncio.to_thread(answering.answered.wait, 60.0)
    await platform.kill("superlink")
    impatient = asyncio.create_task(bridge.command({"question": "late", "salt": b""}, NAMES[:1], 0.5))
    assert not platform.aggregators[untaken.name].calls
    for aggregator in platform.aggregators.values():
        aggregator.release.set()
    with pytest.raises(CommandFailed) as caught:
        await impatient
    untaken.gate.set()
    assert list(caught.value.failures) == [untaken.name]
    assert "within 0.5 s" in caught.value.failures[untaken.name]
    digest = hashlib.sha256(b"3").digest()
    assert await command == {name: {"name": name, "digest": digest, "sum": ANSWER, "rows": 3} for name in NAMES}
    assert platform.calls() == [["wait"]] * 3
    assert working.connected


async def a_killed_server_app_is_replaced(platform: Platform, bridge: FlowerBridge) -> None:
    """It dies with two commands in its hands, which the nodes work on; the next one gets both; each is done once."""
    platform.forget_calls()
    salts = (b"4", b"5")
    commands = [asyncio.create_task(bridge.command({"question": "wait", "salt": one}, NAMES, 60.0)) for one in salts]
    async with asyncio.timeout(60.0):
        while platform.calls() != [["wait"] * 2] * 3:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    await platform.kill("flwr-serverapp")
    for aggregator in platform.aggregators.values():
        aggregator.release.set()
    for salt, replies in zip(salts, await asyncio.gather(*commands), strict=True):
        assert {reply["digest"] for reply in replies.values()} == {hashlib.sha256(salt).digest()}
        assert set(replies) == set(NAMES)
    assert platform.calls() == [["wait"] * 2] * 3


async def a_killed_superexec_is_replaced(platform: Platform, bridge: FlowerBridge) -> None:
    await platform.kill("flower-superexec")
    assert set(await bridge.command({"question": "q", "salt": b"5"}, NAMES, 60.0)) == set(NAMES)


async def a_killed_aggregator_gets_its_command_again(platform: Platform, bridge: FlowerBridge) -> None:
    """Also: a node that is registered while everything runs."""
    key, started = platform.folder / "aggregator-4.key", platform.folder / "started"
    platform.keys["aggregator-4"] = flower.node_public_key(key)
    words = [sys.executable, "-c", NODE_PROCESS, platform.place.address, *map(str, (platform.place.ca, key, started))]
    process = await asyncio.create_subprocess_exec(*words, env=platform.environment)
    try:
        command = asyncio.create_task(bridge.command({"seconds": 2.0}, ["aggregator-4"], 60.0))
        while not started.exists():
            assert not command.done()
            await asyncio.sleep(0.05)
        process.kill()
        await process.wait()
        process = await asyncio.create_subprocess_exec(*words, env=platform.environment)
        assert await command == {"aggregator-4": {"pid": process.pid}}
    finally:
        process.kill()
        await process.wait()


async def a_death_in_the_middle_of_an_answer_costs_seconds(platform: Platform, bridge: FlowerBridge) -> None:
    """Nobody waits for the rest of that answer: the ServerApp stays, and the others' answers are not held up by it."""
    key, started = platform.folder / "aggregator-4.key", platform.folder / "started"
    words = [platform.place.address, *map(str, (platform.place.ca, key, started))]
    (server_app,) = [pid for pid, name in processes_of(platform.place).items() if name == "flwr-serverapp"]
    dying = await asyncio.create_subprocess_exec(sys.executable, "-c", DYING_NODE_PROCESS, *words)
    process = None
    try:
        command = asyncio.create_task(
            bridge.command({"seconds": 0.0, "question": "q", "salt": b"6"}, (*NAMES[:2], "aggregator-4"), 90.0)
        )
        async with asyncio.timeout(60.0):
            assert await dying.wait() == 9
        died = time.monotonic()
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", NODE_PROCESS, *words)
        assert (await command)["aggregator-4"] == {"pid": process.pid}
        assert time.monotonic() - died < flower.CONTENT_S + 45.0  # Flower by itself: two hours
        assert server_app in processes_of(platform.place)
    finally:
        for one in (dying, process):
            if one is not None and one.returncode is None:
                one.kill()
                await one.wait()


async def a_whole_round_survives_and_is_the_same_in_one_process(platform: Platform, bridge: FlowerBridge) -> None:
    """A coordinator, three aggregators and two relays over this Flower. One relay dies with the announcement in its
    hands, one aggregator while it stands by, the SuperLink when all have begun; they are sent nothing but the command
    to stand by, the one that died once more, and the mean is, byte for byte, what one process makes."""

    def node(name: str, handler: Handler) -> FlowerNode:
        key = platform.folder / "round" / f"{name}.key"
        platform.keys[name] = flower.node_public_key(key)
        return FlowerNode(
            *(name, platform.place.address, platform.place.ca, key, handler, 0.1, 0.2),
            rests=lambda command: stands_s(command) is not None,
        )

    async with FlowerRound(platform.folder / "round", bridge, node) as networked:
        devices = await networked.ready()
        await an_aborted_round_ends_at_once_and_its_answer_is_dropped(networked, devices)
        dying = networked.dies_with_its_first_command("ap-south")
        networked.stood.clear()
        networked.sent.clear()
        opened = await networked.coordinator.open_round(ROUND)
        async with asyncio.timeout(60.0):
            await dying.wait()
        await asyncio.to_thread(networked.nodes["relay-ap-south"].stop)
        networked.start_relay("ap-south")
        async with asyncio.timeout(60.0):
            while not networked.announced_everywhere(opened.round_id):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            while len(networked.stood) < 3:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            await networked.restart_aggregator("a1")
            while len(networked.stood) < 4:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        contributions = await networked.contribute(devices)
        for name in AGGREGATORS:
            assert await asyncio.to_thread(networked.begun[name].wait, 60.0)
        await platform.kill("superlink")
        async with asyncio.timeout(120.0):
            while (ended := networked.coordinator.round(opened.round_id)).live:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert (ended.state, ended.reason, ended.attempt) == ("PUBLISHED", "", 1)
        assert sorted(networked.stood) == ["a0", "a1", "a1", "a2"]
        async with asyncio.timeout(60.0):
            while not networked.over_everywhere(opened.round_id):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert set(networked.sent) == {"relay-eu-west", "relay-ap-south"}
        assert networked.sent.count("relay-eu-west") == 1, "one message each was enough"
        assert {region: told["contributions"] for region, told in ended.figures["relays"].items()} == {
            "eu-west": 4,
            "ap-south": 4,
        }
        result = networked.ledger.round_result(ended.round_id)
        assert result is not None
        inside = networked.local.aggregate(
            [contributions[digest] for digest in ended.frozen],
            ended.task,
            ca_pem=networked.keyring.ca_pem(),
            now=networked.clock(),
            attempt=ended.attempt,
        )
        assert inside.mean is not None
        assert inside.mean.astype("<f4").tobytes() == result[0]
        assert inside.decision.coin == decision_in(result[1]).coin


async def an_aborted_round_ends_at_once_and_its_answer_is_dropped(
    networked: FlowerRound, devices: list[Device]
) -> None:
    """The SuperLink still carries what two aggregators have answered and the third is about to; the next round does not
    wait for any of it."""
    async with asyncio.timeout(60.0), networked.keeps_its_answer("a0") as decided:
        opened = await networked.coordinator.open_round(ROUND)
        while not networked.announced_everywhere(opened.round_id):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        await networked.contribute(devices)
        await decided.wait()
        told = time.monotonic()
        await networked.coordinator.abort_round(opened.round_id)
        while (ended := networked.coordinator.round(opened.round_id)).live:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        assert time.monotonic() - told < 25.0
    assert (ended.state, ended.reason, ended.attempt) == ("FAILED", "an operator aborted it", 1)
    assert networked.ledger.round_result(opened.round_id) is None
    assert networked.ledger.opened_without_noise("fraud") == [opened.round_id], "nobody here can know"


SUPERVISOR = """
import asyncio, os, sys
from pathlib import Path
from fl_coordinator.flower_superlink import SuperLink, SuperLinkPlace

async def main():
    folder = Path(sys.argv[1])
    place = SuperLinkPlace(folder / "flower", int(sys.argv[2]), *(folder / n for n in sys.argv[3:6]))
    await SuperLink(place, os.environ).start()
    print("ready", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@on_linux
@pytest.mark.slow
def test_nothing_outlives_a_killed_supervisor(tmp_path: Path) -> None:
    names = ("superlink.pem", "superlink.key", "ca.pem")
    certificate, key, ca = (tmp_path / name for name in names)
    place = SuperLinkPlace(tmp_path / "flower", free_port(), certificate, key, ca)
    certify(place, tmp_path)
    words = [sys.executable, "-c", SUPERVISOR, str(tmp_path), str(place.port), *names]
    supervisor = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert supervisor.stdout is not None
        assert supervisor.stdout.readline() == "ready\n"
        assert "superlink" in processes_of(place).values()
    finally:
        supervisor.kill()
        supervisor.communicate()
    deadline = time.monotonic() + 60.0
    while processes_of(place):
        assert time.monotonic() < deadline, f"still there: {processes_of(place)}"
        time.sleep(0.1)
