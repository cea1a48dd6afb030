"""A real server that speaks S3, on a free loopback port, over a folder.

The binary is built by `.ci/s3/build` into a folder outside the checkout, or named by ATOLL_S3_SERVER.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.fakes.ports import free_port
from tests.fakes.real_servers import absent, built

BUCKET = "models"
READY_S = 60
STOP_S = 30
TRIES = 5
VERSION = "1.8.0"


class S3Server(NamedTuple):
    """Where it listens, where it keeps objects, and the environment variables by which a client finds it."""

    url: str
    folder: Path
    environment: dict[str, str]


def binary() -> Path:
    """Where the server's binary is, if it was built."""
    named = os.environ.get("ATOLL_S3_SERVER")
    return Path(named) if named else built("s3", VERSION) / "versitygw"


def require_binary() -> Path:
    """The binary. Skips the test where there is none, unless ATOLL_REQUIRE_SERVERS=1."""
    path = binary()
    if not os.access(path, os.X_OK):
        absent(f"an S3 server at {path}: run .ci/s3/build")
    return path


@contextmanager
def running(folder: Path) -> Iterator[S3Server]:
    """The server over `folder`, with one bucket; ended by its process id."""
    program = require_binary()
    (folder / BUCKET).mkdir(parents=True, exist_ok=True)
    key, secret = "atoll-tests", secrets.token_hex(16)
    for _ in range(TRIES):  # it cannot be asked which port it took, so somebody else may be quicker
        port = free_port()
        process = subprocess.Popen(
            [program, "--quiet", "--port", f"127.0.0.1:{port}", "posix", str(folder)],
            env={**os.environ, "ROOT_ACCESS_KEY": key, "ROOT_SECRET_KEY": secret},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            if _answers(process, port):
                url = f"http://127.0.0.1:{port}"
                environment = {
                    "AWS_ENDPOINT_URL": url,
                    "AWS_ALLOW_HTTP": "true",
                    "AWS_REGION": "us-east-1",
                    "AWS_ACCESS_KEY_ID": key,
                    "AWS_SECRET_ACCESS_KEY": secret,
                }
                yield S3Server(url, folder, environment)
                return
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(STOP_S)
    pytest.fail(f"{program}: did not listen on any of {TRIES} ports")


def _answers(process: subprocess.Popen[bytes], port: int) -> bool:
    until = time.monotonic() + READY_S
    while process.poll() is None and time.monotonic() < until:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1):
                return True
        except OSError:
            time.sleep(0.05)
    return False
