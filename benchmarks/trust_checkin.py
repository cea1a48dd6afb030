"""What it costs a device to learn that nothing is new: bytes on the wire both ways, and the time to verify the answer.

`python -m benchmarks.trust_checkin [--rounds N] [--json]`. A device and a mirror hold the product's own MQTT 5 links to
the embedded broker; the device's line goes through a counter of every byte between their sockets (MQTT headers, topics
and acknowledgements included, TLS and TCP not). The repository is signed by real keys: root and targets 2 of 3. Before
each check-in the timestamp is signed anew, so that the answer always carries one, as it does when a device asks a few
times a day; `unchanged` is the answer to a device that has it already. The peer is python-tuf's stock client, which
asks the same repository over HTTP through the same counter.

Verifying is a whole `Trust.refresh` on such an answer: root, both timestamps, snapshot and targets, in milliseconds of
one core. The device's folder is in memory (/dev/shm): how long a durable write of 370 bytes takes is the disk's affair.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import Signer
from tuf.ngclient import Updater

from benchmarks.claims import Claim, at_most, run
from edge_runtime.link import MqttLink
from model_delta.digest import digest_of
from model_delta.errors import NotFound
from model_delta.store import DirectoryStore
from model_delta.topics import device_of, down, up
from model_delta.trust.checkin import answer_check_in
from model_delta.trust.client import Trust
from model_delta.trust.fetchers import StoreSource
from model_delta.trust.paths import KIND, version_path
from model_delta.trust.repository import Delegation, Repository, Target
from model_delta.trust.signers import signer_of
from model_delta.trust.signing import public_bytes
from model_delta.trust.updater import RoleKeys, TrustAnchors
from regional_gateway.mqtt.access import FLEET_RULES, access
from regional_gateway.mqtt.broker import MqttBroker

DEVICE, REGION, TENANT, MODEL = "pos-0001", "eu-west", "acme", "fraud"
MIRROR = "coordinator"
ROUNDS = 40
BYTES_MAX, VERIFY_MS_MAX = 444, 2.0
QUIET_S = 0.05
"""How long the line must be silent before its bytes are counted: longer than an acknowledgement takes on loopback."""


class Site:
    """A repository with one release, and the keys to sign it anew."""

    def __init__(self, folder: Path) -> None:
        self.store = DirectoryStore(folder)
        self.repository = Repository(self.store)
        root, targets = _keys(3), _keys(3)
        online, region = _keys(2), _keys(1)
        self._snapshot, self._timestamp = [signer_of(online[0])], [signer_of(online[1])]
        now = time.time()
        self.repository.stage_root(
            now,
            {
                "root": _public(root, 2),
                "targets": _public(targets, 2),
                "snapshot": _public(online[:1]),
                "timestamp": _public(online[1:]),
            },
        )
        self._finish("root", [signer_of(key) for key in root[:2]])
        delegation = Delegation(REGION, TENANT, _public(region))
        self.repository.stage_targets(now, [delegation], TrustAnchors(TENANT, {}))
        self._finish("targets", [signer_of(key) for key in targets[:2]])
        path = version_path(REGION, TENANT, MODEL, digest_of(b"manifest"))
        target = {path: Target(8, digest_of(b"manifest"))}
        self.repository.add_targets(delegation.role, now, [signer_of(region[0])], target)
        self.publish()

    def publish(self) -> None:
        """A new timestamp."""
        self.repository.publish(time.time(), self._snapshot, self._timestamp)

    def _finish(self, role: str, signers: Sequence[Signer]) -> None:
        for signer in signers:
            self.repository.sign_staged(role, signer)
        self.repository.finish(role)


class Counter:
    """Bytes that passed, both ways."""

    def __init__(self) -> None:
        self.bytes = 0

    async def settled(self) -> int:
        """The count once the line is silent."""
        before = -1
        while before != self.bytes:
            before = self.bytes
            await asyncio.sleep(QUIET_S)
        return self.bytes


@contextlib.asynccontextmanager
async def counted(port: int, counter: Counter) -> AsyncIterator[int]:
    """A loopback port that leads to `port` and counts."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65_536):
                counter.bytes += len(data)
                writer.write(data)
                await writer.drain()
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward_reader, onward_writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.suppress(asyncio.CancelledError):  # the measurement is over
            await asyncio.gather(pump(reader, onward_writer), pump(onward_reader, writer))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    async with server:
        yield int(server.sockets[0].getsockname()[1])


def verifying(site: Site, folder: Path, rounds: int) -> list[float]:
    """Seconds of a core for each refresh on an answer that brings a new timestamp and nothing else."""
    trust = Trust(folder, site.repository.root_bytes(1), StoreSource(site.store, KIND))
    trust.refresh(time.time())
    seconds = []
    for number in range(rounds):
        site.publish()
        answer = answer_check_in(trust.check_in(number), site.store, KIND)
        started = time.thread_time()
        trust.refresh(time.time(), answer)
        seconds.append(time.thread_time() - started)
    return seconds


async def over_mqtt(site: Site, folder: Path, rounds: int) -> tuple[list[int], int]:
    """Bytes of each check-in with a new timestamp, and of one without."""
    counter, sizes = Counter(), []
    trust = Trust(folder / "device", site.repository.root_bytes(1), StoreSource(site.store, KIND))
    trust.refresh(time.time())
    async with (
        MqttBroker(host="127.0.0.1", port=0, tls=None, folder=folder / "broker", acl=access(FLEET_RULES)) as broker,
        counted(broker.port, counter) as port,
        MqttLink(host="127.0.0.1", port=broker.port, client_id=MIRROR) as mirror,
        MqttLink(host="127.0.0.1", port=port, client_id=DEVICE) as device,
    ):
        loop = asyncio.get_running_loop()
        answers: asyncio.Queue[bytes] = asyncio.Queue()
        replies: set[asyncio.Task[None]] = set()

        def reply(topic: str, question: bytes) -> None:
            answer = answer_check_in(question, site.store, KIND)
            task = loop.create_task(mirror.publish(down(device_of(topic), "trust"), answer))
            replies.add(task)
            task.add_done_callback(replies.discard)

        mirror.subscribe(up("+", f"trust/{REGION}"), reply)
        device.subscribe(down(DEVICE, "trust"), lambda topic, answer: answers.put_nowait(answer))
        await mirror.wait_connected(5.0)
        await device.wait_connected(5.0)

        async def ask(number: int) -> tuple[int, bytes]:
            before = await counter.settled()
            await device.publish(up(DEVICE, f"trust/{REGION}"), trust.check_in(number))
            async with asyncio.timeout(5.0):
                answer = await answers.get()
            return await counter.settled() - before, answer

        for number in range(rounds):
            site.publish()
            size, answer = await ask(number)
            sizes.append(size)
            trust.refresh(time.time(), answer)
        unchanged, _ = await ask(rounds)
    return sizes, unchanged


async def over_http(site: Site, folder: Path) -> int:
    """Bytes of one refresh by the stock client, with nothing new but the timestamp."""
    counter = Counter()
    with _http(site) as origin:
        async with counted(origin, counter) as port:
            sizes = []
            for _ in range(2):  # the first fetches everything
                site.publish()
                before = await counter.settled()
                await asyncio.to_thread(_stock_refresh, folder, port, site.repository.root_bytes(1))
                sizes.append(await counter.settled() - before)
    return sizes[-1]


def _stock_refresh(folder: Path, port: int, root: bytes) -> None:
    folder.mkdir(exist_ok=True)
    Updater(str(folder), f"http://127.0.0.1:{port}/", bootstrap=root).refresh()


@contextlib.contextmanager
def _http(site: Site) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                data = site.store.get(KIND, self.path.lstrip("/"))
            except NotFound:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _keys(count: int) -> list[Ed25519PrivateKey]:
    return [Ed25519PrivateKey.generate() for _ in range(count)]


def _public(keys: Sequence[Ed25519PrivateKey], threshold: int = 1) -> RoleKeys:
    return RoleKeys(tuple(public_bytes(key.public_key()) for key in keys), threshold)


def claims(rounds: int = ROUNDS) -> list[Claim]:
    """The largest check-in with a new timestamp, one without, and the median time to verify an answer."""
    memory = Path("/dev/shm")
    with (
        tempfile.TemporaryDirectory() as name,
        tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as in_memory,
    ):
        folder = Path(name)
        site = Site(folder / "repository")
        sizes, unchanged = asyncio.run(over_mqtt(site, folder, rounds))
        seconds = verifying(site, Path(in_memory), 5 * rounds)
        stock = asyncio.run(over_http(site, folder / "stock"))
    return [
        at_most("trust.checkin", max(sizes), "B", BYTES_MAX, stock),
        at_most("trust.checkin.unchanged", unchanged, "B", BYTES_MAX, stock),
        at_most("trust.checkin.verify", 1000 * statistics.median(seconds), "ms of a core", VERIFY_MS_MAX),
    ]


def measure(options: argparse.Namespace) -> list[Claim]:
    """All of it."""
    return claims(options.rounds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="check-ins to measure")
    run(__doc__ or "", measure, parser)
