"""A real Kafka broker in KRaft mode, alone, on free loopback ports, for as long as a test module needs it.

Its jars are fetched by `.ci/kafka/build` into a folder outside the checkout, or are in the folder that
ATOLL_KAFKA_SERVER names.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
import uuid
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.fakes.ports import free_ports
from tests.fakes.real_servers import absent, built

VERSION = "4.1.1"
START_S = 60.0
STOP_S = 30
_HEAP = ("-Xms64m", "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto")


def folder() -> Path:
    """Where the broker's jars are, if they were fetched."""
    named = os.environ.get("ATOLL_KAFKA_SERVER")
    return Path(named) if named else built("kafka", VERSION)


def require_jars() -> Path:
    """The folder of the jars. Skips the test where there is none, unless ATOLL_REQUIRE_SERVERS=1."""
    libs = folder() / "libs"
    if shutil.which("java") is None or not list(libs.glob("kafka_*.jar")):
        absent(f"java, and a Kafka broker's jars in {libs}: run .ci/kafka/build")
    return libs


class Broker:
    """One broker on one folder. It may be killed and started again: the port and what it holds stay."""

    def __init__(self, place: Path, libs: Path) -> None:
        self._place, self._libs = place, libs
        self.port, controller = free_ports(2)
        self._process: subprocess.Popen[bytes] | None = None
        settings = {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": f"1@127.0.0.1:{controller}",
            "listeners": f"PLAINTEXT://127.0.0.1:{self.port},CONTROLLER://127.0.0.1:{controller}",
            "advertised.listeners": f"PLAINTEXT://127.0.0.1:{self.port}",
            "controller.listener.names": "CONTROLLER",
            "log.dirs": str(place / "data"),
            "offsets.topic.replication.factor": "1",
            "default.replication.factor": "1",
            "auto.create.topics.enable": "false",
            "num.network.threads": "1",
            "num.io.threads": "2",
        }
        place.mkdir(parents=True, exist_ok=True)
        (place / "server.properties").write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
        cluster = urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        identity = f"--cluster-id={cluster}"  # one word: it may begin with a dash
        self._java("kafka.tools.StorageTool", "format", identity, "-c", self._properties).check_returncode()

    @property
    def address(self) -> str:
        """host:port for clients."""
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start, and return once it takes connections."""
        with (self._place / "stdout").open("ab") as out:
            self._process = subprocess.Popen(
                self._command("kafka.Kafka", self._properties), stdout=out, stderr=out, cwd=self._place
            )
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 0.2):
                return
            if self._process.poll() is not None:
                break
            time.sleep(0.05)
        pytest.fail(f"the Kafka broker did not start:\n{(self._place / 'stdout').read_text()[-2000:]}")

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Stop or kill it, by its process id, and wait."""
        if self._process is not None:
            self._process.send_signal(how)
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(STOP_S)
            self._process = None

    @property
    def _properties(self) -> str:
        return str(self._place / "server.properties")

    def _command(self, main: str, *arguments: str) -> list[str]:
        java = shutil.which("java") or "java"
        return [java, *_HEAP, "-cp", f"{self._libs}/*", main, *arguments]

    def _java(self, main: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(self._command(main, *arguments), capture_output=True, cwd=self._place, check=False)


@contextmanager
def running(place: Path) -> Iterator[Broker]:
    """A broker that keeps its data in `place`; ended by its process id."""
    broker = Broker(place, require_jars())
    try:
        broker.start()
        yield broker
    finally:
        broker.end(signal.SIGKILL)
