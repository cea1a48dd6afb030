"""`atoll demo`: the whole platform on this machine, in seven acts, and a report of what was measured.

This module owns the run: folder, processes, progress, report. What happens in each act is in `demo_acts`. An act that
fails is reported with its reason and with what died lately; acts that need it are not tried. Whatever happens, Ctrl-C
included, every process is stopped and the folder is removed (unless `keep`).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import typer
from rich.console import Console
from rich.status import Status

from atoll.control_client import ControlClient
from atoll.demo_acts import ACTS
from atoll.demo_stage import Stage
from atoll.endings import Endings
from atoll.flower_nodes import prepare_flower, superlink_place
from atoll.platform import Layout, prepare, programs
from atoll.ports import held_ports
from atoll.processes import ProcessEvent, Supervisor
from atoll.report import TITLES, ActResult, Report, commit_name, machine_facts, render_table, write_report
from atoll.settings import ConfigurationError, DataFolder
from fl_coordinator.flower_superlink import end_processes
from model_delta.errors import AtollError

REGIONS = ("eu-west", "ap-south")
SHARDS = 2
PORTS = 16
FOLDER_SECONDS = 5.0


def run_demo(*, devices: int, rounds: int, seed: int, broker: str, report: Path, as_json: bool, keep: bool) -> int:
    """Run every act and write the report. Returns the exit code: 0 when every act did what it promises, 1 when one did
    not, 130 after Ctrl-C (128 and its number after any signal). Raises ConfigurationError before anything was
    started or made; the report's folder is made when there is a report."""
    expect_writable(report)
    with Endings() as endings, _folder(keep=keep) as path, held_ports(PORTS) as held:
        data = DataFolder.open(path, create=True)
        ports = iter(held)
        layout = Layout(regions=REGIONS, broker=broker, learning=True)
        endpoints = prepare(data, layout, lambda what: next(ports))
        prepare_flower(data, endpoints.gateways)
        progress = Progress(quiet=as_json)
        stage = Stage(
            data=data,
            endpoints=endpoints,
            client=ControlClient(endpoints.coordinator, data.tokens()["admin"]),
            devices=devices,
            rounds=rounds,
            seed=seed,
            shards=SHARDS,
            metrics_ports=tuple(next(ports) for _ in range(SHARDS)),
            tell=progress.tell,
        )
        progress.say(f"live page: {endpoints.coordinator}/" + (f"   data and logs: {path}" if keep else ""))
        try:
            made = asyncio.run(_run(stage, progress, endings))
        finally:
            # Flower's processes end soon after the coordinator; when it had to be killed, they end here.
            end_processes(superlink_place(data))
    if made is None:
        return 128 + endings.received
    return hand_over(made, report, as_json=as_json)


def hand_over(made: Report, folder: Path, *, as_json: bool) -> int:
    """Write the report into `folder` and print it: the same JSON, or a table. The exit code."""
    written, page = write_report(made, folder)
    if as_json:
        typer.echo(written.read_text())
    else:
        typer.echo(render_table(made))
        typer.echo(f"report: {page} and {written}")
    return 0 if made.ok else 1


async def _run(stage: Stage, progress: Progress, endings: Endings) -> Report | None:
    """All acts under one supervisor; None after Ctrl-C."""
    started = time.monotonic()
    results: list[ActResult] = []

    def heard(event: ProcessEvent) -> None:
        progress.process(event)
        stage.deaths.hear(event)

    try:
        with endings.cancelling():
            async with Supervisor(heard) as supervisor:
                stage.supervisor = supervisor
                stage.programs = {program.name: program for program in programs(stage.data, stage.endpoints)}
                for number, (name, _) in enumerate(ACTS, start=1):
                    progress.act(f"act {number} of {len(ACTS)}: {TITLES[name]}")
                    results.append(await _act(stage, name, results))
                    progress.ended(results[-1])
                memory = supervisor.peak_memory_bytes / 1e6
                progress.act("stopping")
    except asyncio.CancelledError:
        progress.say("stopped by the user")
        return None
    finally:
        progress.close()
    return Report(
        seed=stage.seed,
        commit=commit_name(Path(__file__).parent),
        machine=machine_facts(),
        seconds=round(time.monotonic() - started, 1),
        memory_mb_peak=round(memory, 1),
        acts=tuple(results),
    )


async def _act(stage: Stage, name: str, before: list[ActResult]) -> ActResult:
    act, needs = dict(ACTS)[name]
    failed = [result.name for result in before if not result.ok and result.name in needs]
    if failed:
        return ActResult(name, False, 0.0, {}, f"not tried, because act {failed[0]} failed")
    started = time.monotonic()
    figures: dict[str, object] = {}
    problem = ""
    gave_up = asyncio.ensure_future(stage.supervisor.failed())
    work = asyncio.ensure_future(act(stage, figures))
    try:
        await asyncio.wait([work, gave_up], return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
        else:
            gave_up.result()
    except AtollError as error:
        problem = str(error)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            problem = f"no room left on the disk of {stage.data.path}: free some space, or set TMPDIR"
        else:  # a bug of ours: the report says so, and the other acts still run
            problem = f"{type(error).__name__}: {error}"
            traceback.print_exc()
    finally:
        for task in (work, gave_up):
            task.cancel()
        await asyncio.gather(work, gave_up, return_exceptions=True)
    died = stage.deaths.told()
    if problem and died:
        problem = f"{problem} ({died})"
    return ActResult(name, not problem, round(time.monotonic() - started, 2), figures, problem)


class Progress:
    """What a person sees meanwhile, on standard error: one line that changes on a terminal, plain lines elsewhere."""

    def __init__(self, *, quiet: bool) -> None:
        self._console = Console(stderr=True, quiet=quiet, highlight=False)
        self._status: Status | None = None
        self._act, self._told = "", ""
        self._started = time.monotonic()

    def say(self, text: str) -> None:
        """One line that stays."""
        self._console.print(f"[{time.monotonic() - self._started:6.1f} s] {text}", markup=False)

    def act(self, text: str) -> None:
        """A new act begins."""
        self._act, self._told = text, ""
        if not self._console.is_terminal:
            self.say(text)
        elif self._status is None:
            self._status = self._console.status(text)
            self._status.start()
        else:
            self._status.update(text)

    def tell(self, text: str) -> None:
        """How the act is getting on."""
        if text == self._told:
            return
        self._told = text
        if self._status is not None:
            self._status.update(f"{self._act}: {text}")
        else:
            self.say(f"  {text}")

    def ended(self, result: ActResult) -> None:
        """The act's result."""
        mark = "ok" if result.ok else f"FAILED: {result.problem}"
        self.say(f"{TITLES[result.name]}: {mark} ({result.seconds:.1f} s)")

    def process(self, event: ProcessEvent) -> None:
        """A process died or came back."""
        if event.kind in ("died", "restarted", "gave up"):
            self.say(f"  {event.name} {event.kind}{': ' + event.message if event.message else ''}")

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._status is not None:
            self._status.stop()
            self._status = None


def expect_writable(report: Path) -> None:
    """Look now, not after two minutes, whether a report can be written. Raises ConfigurationError."""
    there = next(path for path in (report.absolute(), *report.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ConfigurationError(f"--report {report}: expected a folder, found that {there} is a file; pass another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigurationError(
            f"--report {report}: expected a folder to write in, found no permission in {there}; pass another"
        )


@contextlib.contextmanager
def _folder(*, keep: bool) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="atoll-demo-"))
    try:
        yield path
    finally:
        if keep:
            print(f"kept: {path}", file=sys.stderr)
        else:
            _remove(path)


def _remove(path: Path) -> None:
    """Delete a folder; a file that a process of ours made while it ended may need a second look."""
    deadline = time.monotonic() + FOLDER_SECONDS
    shutil.rmtree(path, ignore_errors=True)
    while path.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
        shutil.rmtree(path, ignore_errors=True)
    if path.exists():
        print(f"could not remove {path}", file=sys.stderr)
