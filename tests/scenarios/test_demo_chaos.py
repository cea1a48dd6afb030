"""A demo in which processes are killed.

One disturbed run is enough for three promises, so it happens once: what dies comes back or is named, nothing is left
behind, and (traced by strace) no connection leaves this machine and no file is written outside the demo's folders.
Which process dies when is the seed's choice; `python -m tests.scenarios.chaos` tries others by hand.
"""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.scenarios import trace
from tests.scenarios.chaos import Kill, Outcome, survive
from tests.systems import on_linux

SEED = 4
pytestmark = [on_linux, pytest.mark.slow(seconds=40), pytest.mark.timeout(600)]


@dataclass
class Run:
    """The disturbed demo: what came of it, and what was there afterwards."""

    outcome: Outcome
    trace: Path | None
    home: Path
    cwd: Path
    folder: Path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One demo with a death of each kind of process that keeps state: broker, coordinator, aggregator, fleet."""
    rng = random.Random(SEED)
    folder = tmp_path_factory.mktemp("chaos")
    home, cwd = folder / "home", folder / "cwd"
    home.mkdir()
    cwd.mkdir()
    kills = [
        Kill("broker", "training on history", rng.uniform(0, 3)),
        Kill(f"aggregator-a{rng.randrange(3)}", "round 1 of 1: aggregating", rng.uniform(0, 1)),
        Kill("coordinator", "act 4 of", rng.uniform(0, 8)),
        Kill(f"fleet-{rng.randrange(2)}", "act 7 of", rng.uniform(0, 1)),
    ]
    watched = trace.command(folder / "trace") if shutil.which("strace") else []
    environment = {"HOME": str(home)}
    outcome = survive(folder / "demo", kills, environment=environment, wrapper=watched, cwd=cwd, deadline_s=550)
    return Run(outcome, folder / "trace" if watched else None, home, cwd, folder / "demo")


def test_deaths_end_in_recovery_or_in_a_clear_message(run: Run) -> None:
    told = f"{run.outcome.killed}\n{run.outcome.output}\nlogs below {run.folder}"
    assert run.outcome.wrong() == [], told
    assert len(run.outcome.killed) == 4, told


def test_nothing_is_written_outside_the_demo_folders(run: Run) -> None:
    assert list(run.home.rglob("*")) == []
    assert list(run.cwd.rglob("*")) == []
    assert [path.name.startswith("atoll-demo-") for path in (run.folder / "tmp").iterdir()] == [True]
    assert sorted(path.name for path in (run.folder / "report").iterdir()) == ["report.html", "report.json"]
    if run.trace is not None:
        ours = (str(run.folder / "tmp") + "/", str(run.folder / "report"), "/dev/null", "/dev/tty", "/proc/")
        paths = {path for call in trace.calls(run.trace) if (path := trace.written(call)) is not None}
        assert any(path.startswith(ours[0]) for path in paths)
        assert [path for path in sorted(paths) if not path.startswith(ours) and "__pycache__" not in path] == []


def test_no_connection_leaves_the_machine(run: Run) -> None:
    if run.trace is None:
        if os.environ.get("ATOLL_REQUIRE_SERVERS"):
            pytest.fail("expected strace on the PATH, found none; install strace")
        pytest.skip("strace is not installed")
    network = [call for call in trace.calls(run.trace) if call.name in trace.NETWORK]
    assert sum("127.0.0.1" in call.text for call in network) > 100  # the trace saw the demo at work
    assert {address for call in network if (address := trace.reached(call))} == set()
