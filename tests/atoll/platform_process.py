"""A platform as a user starts it: `atoll up` in a process of its own, and the commands of a second terminal."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from model_delta.graphs.mlp import mlp_model

FEATURES = 26
START_S = 30.0


class Platform:
    """One running `atoll up`. `endpoints` is what it printed."""

    def __init__(
        self, data: Path, broker: str, *, port: int | None = None, store: str = "", more: Sequence[str] = ()
    ) -> None:
        """`more` are further options of `atoll up`."""
        self.data = data
        options = ["--data", str(data), "--broker", broker, "--json"] + (["--port", str(port)] if port else [])
        options += more
        options += ["--store", store] if store else []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "atoll", "up", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(self.process.communicate()[1])
        self.endpoints: dict[str, Any] = json.loads(line)

    @property
    def ports(self) -> list[int]:
        """Every port that the platform listens on."""
        urls = [self.endpoints["coordinator"], *self.endpoints["gateways"].values()]
        return [self.endpoints["broker"]["port"], *(int(url.rsplit(":", 1)[1]) for url in urls)]

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send the signal and wait for the end."""
        self.process.send_signal(number)
        self.process.communicate(timeout=90)
        return self.process.returncode

    def pid_of(self, words: str) -> int:
        """The process of this platform whose command line holds `words`."""
        (found,) = [pid for pid, line in processes_of(self.data) if words in line]
        return found

    def token(self, role: str) -> str:
        """A bearer token of the data folder."""
        found: dict[str, str] = json.loads((self.data / "tokens.json").read_text())
        return found[role]


@contextmanager
def platform(
    data: Path, broker: str = "embedded", *, port: int | None = None, store: str = "", more: Sequence[str] = ()
) -> Iterator[Platform]:
    """A platform while the block runs."""
    running = Platform(data, broker, port=port, store=store, more=more)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.stop()


def processes_of(data: Path) -> list[tuple[int, str]]:
    """(pid, command line) of every process that works on the data folder, except those that only watch over others."""
    return [
        (pid, line) for pid, line in _command_lines() if pid != os.getpid() and str(data) in line and " up " not in line
    ]


def _command_lines() -> Iterator[tuple[int, str]]:
    if sys.platform != "linux":
        told = subprocess.run(["ps", "-axww", "-o", "pid=,command="], capture_output=True, text=True, check=True)
        for line in told.stdout.splitlines():
            pid, _, command = line.strip().partition(" ")
            yield int(pid), command
        return
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                yield int(entry.name), (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")


def atoll(data: Path, *words: str, seconds: float = 100.0) -> subprocess.CompletedProcess[str]:
    """A command in a second terminal."""
    environment = {**os.environ, "ATOLL_DATA": str(data)}
    return subprocess.run(
        [sys.executable, "-m", "atoll", *words], capture_output=True, text=True, timeout=seconds, env=environment
    )


def answer(data: Path, *words: str) -> Any:
    """The JSON that a command prints; it has to succeed."""
    done = atoll(data, *words, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def lines(text: str) -> list[dict[str, Any]]:
    """JSON, one object a line."""
    return [json.loads(line) for line in text.splitlines()]


def http(url: str, body: Any = None, token: str = "") -> tuple[int, bytes]:
    """Status and body of a GET, or of a POST of `body` as JSON."""
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
    data = None if body is None else json.dumps(body).encode()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, data, headers), timeout=60) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def listens(port: int) -> bool:
    """Whether somebody accepts connections on the port."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_run(count: int) -> int:
    """The first of `count` free ports in a row, below the range that the system hands out."""
    # Each worker looks in a block of its own first: the ports are listened on a while after they were found.
    begin, end = 21_000, 32_000
    block = begin + os.getpid() % 22 * 500
    for first in (*range(block, end - count, count), *range(begin, block - count, count)):
        if all(_is_free(port) for port in range(first, first + count)):
            return first
    raise AssertionError("no free ports in a row")


def _is_free(port: int) -> bool:
    """Whether anybody could listen there: the last connections of a server that ended keep its port a minute."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def until(condition: Any, seconds: float, what: str) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.1)


def write_mlp(path: Path, seed: int) -> Path:
    """An untrained model that takes the terminal's features, made as the platform's own models are."""
    rng = np.random.default_rng(seed)
    first = (rng.normal(0, 0.2, (FEATURES, 32)).astype(np.float32), np.zeros(32, np.float32))
    last = (rng.normal(0, 0.2, (32, 1)).astype(np.float32), np.zeros(1, np.float32))
    path.write_bytes(mlp_model([first, last], np.zeros(FEATURES, np.float32), np.ones(FEATURES, np.float32)))
    return path


def write_gemm(path: Path, features: int = FEATURES) -> Path:
    """A logistic regression that a user made with the onnx package alone."""
    from onnx import TensorProto, helper, numpy_helper

    weight = np.random.default_rng(5).normal(0, 0.1, (features, 1)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["features", "w", "b"], ["logit"]),
            helper.make_node("Sigmoid", ["logit"], ["score"]),
        ],
        "regression",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", features])],
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, ["n", 1])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.zeros(1, np.float32), "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path


def write_rollout(path: Path, name: str, target: str = "latest") -> Path:
    """The example rollout under another name."""
    example = Path(__file__).parents[2] / "atoll" / "examples" / "canary.yaml"
    text = example.read_text().replace("fraud-canary", name).replace("target: latest", f"target: {target}")
    path.write_text(text.replace("minSeconds: 5", "minSeconds: 1").replace("minDecisions: 20", "minDecisions: 2"))
    return path
