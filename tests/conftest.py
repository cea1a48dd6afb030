"""What every test may count on, however the suite was started."""

import asyncio
import os
import shutil
import signal
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from tests.fakes.patient_loop import PatientLoops

if TYPE_CHECKING:
    from tests.fakes.kafka_server import Broker

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts a background job (`make test &`, nohup, some CI) with Ctrl-C ignored, and programs that tests start
    # and interrupt would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # under nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

asyncio.set_event_loop_policy(PatientLoops())

# An example is as slow as the machine is busy. The same code meets the same examples, unless somebody asks for others.
settings.register_profile(
    "atoll",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize="ATOLL_TESTS_OTHER_EXAMPLES" not in os.environ,
)
settings.load_profile("atoll")

MEMORY = Path("/dev/shm")
MEMORY_BYTES_MIN = 4 << 30


def _fit_for_tests(folder: Path) -> bool:
    """Whether there is room in this file system, for files that may be executed too."""
    return (
        os.access(folder, os.W_OK)
        and not os.statvfs(folder).f_flag & os.ST_NOEXEC
        and shutil.disk_usage(folder).free >= MEMORY_BYTES_MIN
    )


if _fit_for_tests(MEMORY):
    # Everything here flushes its files, thousands of times in a run, and a disk takes milliseconds for each. The power
    # cuts that tests play are deaths of processes, which files in memory outlive as well.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

COMPILED = "ATOLL_TESTS_COMPILED"
if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
    # Who sets that wants no files beside the sources. The hundreds of processes that tests start would each compile all
    # that they import, so they share what they compile elsewhere, in a folder that goes with the session.
    os.environ[COMPILED] = tempfile.mkdtemp(prefix="atoll-tests-", dir=os.environ.get("PYTEST_DEBUG_TEMPROOT"))
    os.environ["PYTHONPYCACHEPREFIX"] = str(Path(os.environ[COMPILED]) / "__pycache__")


def pytest_unconfigure(config: pytest.Config) -> None:
    """The session is over; only the process that began it removes what its workers shared."""
    if COMPILED in os.environ and not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ[COMPILED], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that at the end no worker is alone with one while the other waits.
    (A file's tests stay together, in their order.)"""
    seconds: dict[Path, float] = defaultdict(float)
    for item in items:
        marks = list(item.iter_markers("slow"))
        seconds[item.path] += max((mark.kwargs.get("seconds", 3.0) for mark in marks), default=0.02)
    items.sort(key=lambda item: -seconds[item.path])


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Broker]":
    """A real Kafka broker, one for all tests of a worker: each has topics of its own."""
    from tests.fakes.kafka_server import running

    with running(tmp_path_factory.mktemp("kafka")) as found:
        yield found
