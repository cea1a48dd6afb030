"""Child processes for `atoll demo` and `atoll up`: started in order, kept running, stopped in reverse, never left over.

* Children whose starts overlap do not need each other: they are stopped together, before those that started earlier.

* Every child leads a process group of its own, logs to a file of its own, and is signalled only by the ids that we
  got from starting it.
* A child that dies unexpectedly is started again after a growing pause, until it used up its restarts of one minute;
  then its name, exit code and the last lines of its log are reported.
* When this process ends in any way, SIGKILL included, so do the children and theirs: see `child`.
* Ctrl-C reaches only this process (the children are in other sessions), so that it can stop them in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from atoll.guard import Guard, isolated_child
from atoll.process_tree import others_in_group, tree_memory_bytes
from atoll.settings import ConfigurationError
from model_delta.errors import Malformed, Unavailable

POLL_SECONDS = 0.05
GROUP_SECONDS = 1.0
MEMORY_SAMPLE_SECONDS = 2.0
BACKOFF_SECONDS = 0.2
BACKOFF_SECONDS_MAX = 5.0
LOG_BYTES_MAX = 8_000_000
TAIL_LINES = 12
FOR_A_PERSON = 2
"""The exit code of a program that cannot run until a person has put something right."""

EventKind = Literal["started", "ready", "died", "restarted", "gave up", "stopped"]
Ready = Callable[[], Awaitable[bool]]


@dataclass(frozen=True)
class Program:
    """What to run. `env` is added to this process's environment; `log` takes standard output and error.

    `ready` is asked until it says True, at most `ready_seconds` after a start. Without `restart`, a death is final.
    """

    name: str
    argv: Sequence[str]
    log: Path
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: Path | None = None
    ready: Ready | None = None
    ready_seconds: float = 30.0
    restart: bool = True
    restarts_per_minute_max: int = 5
    stop_seconds: float = 5.0


@dataclass(frozen=True)
class ProcessEvent:
    """Something happened to the child `name`. `exit_code` is negative for a signal, None while it runs."""

    kind: EventKind
    name: str
    pid: int
    exit_code: int | None = None
    message: str = ""


def restart_delay(deaths: Sequence[float], now: float, per_minute_max: int) -> float | None:
    """Seconds to wait before the next start: 0.2, 0.4, 0.8 ... at most 5; None when the minute's restarts are used up.

    `deaths` are the times of all deaths, this one included, on the clock of `now`.
    """
    recent = sum(1 for at in deaths if now - at < 60.0)
    if recent > per_minute_max:
        return None
    return min(BACKOFF_SECONDS_MAX, BACKOFF_SECONDS * 2.0 ** max(0, recent - 1))


def tail(path: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log; "" when there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 8_192))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""


class _Child:
    """One program and its present process."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.process: subprocess.Popen[bytes] | None = None
        self.stopping = asyncio.Event()
        self.deaths: list[float] = []
        self.watcher: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        return self.process.pid if self.process is not None else 0


class Supervisor:
    """Starts, watches and stops children while entered. `on_event` is called in the event loop and must not block."""

    def __init__(self, on_event: Callable[[ProcessEvent], None] = lambda event: None) -> None:
        self._on_event = on_event
        self._children: dict[str, _Child] = {}
        self._waves: list[list[str]] = []
        self._starting = 0
        self._guard = Guard()
        self._memory: asyncio.Task[None] | None = None
        self._peak_memory_bytes = 0
        self._gave_up: asyncio.Future[str] | None = None

    async def __aenter__(self) -> Self:
        self._gave_up = asyncio.get_running_loop().create_future()
        self._guard.start()
        self._memory = asyncio.create_task(self._sample_memory(), name="memory of the children")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for wave in reversed(self._waves):
                await asyncio.gather(*(self.stop(name) for name in wave))
        finally:
            for child in self._children.values():  # somebody lost patience with the block above
                child.stopping.set()
                if child.process is not None and child.process.returncode is None:
                    self._reap(child)
            if self._memory is not None:
                self._memory.cancel()
            if self._gave_up is not None and not self._gave_up.done():
                self._gave_up.cancel()
            # Whatever an interrupted stop left alive is the guard's now: its pipe ends here.
            self._guard.end()

    # --- children ---

    async def start(self, program: Program) -> int:
        """Start `program` and wait until it is ready; returns its process id.

        Raises Unavailable, with the end of its log, when it ends or is not ready before its deadline (it is stopped
        then), ConfigurationError with its last line when it ended with exit code 2, and Malformed when a child of
        this name runs already.
        """
        old = self._children.get(program.name)
        if old is not None and old.watcher is not None and not old.watcher.done():
            raise Malformed(f"process {program.name}: expected a new name, found one that runs as pid {old.pid}")
        child = _Child(program)
        self._children[program.name] = child
        for wave in self._waves:
            if program.name in wave:
                wave.remove(program.name)
        if not self._starting:
            self._waves.append([])
        self._waves[-1].append(program.name)
        self._starting += 1
        try:
            self._spawn(child)
            self._emit("started", child)
            failure = await self._wait_ready(child)
            while failure and await self._was_killed(child):
                failure = await self._wait_ready(child)
        finally:
            self._starting -= 1
        if failure:
            # A program that never worked is not restarted: the same start would fail the same way.
            child.stopping.set()
            await self._end(child)
            if child.process is not None and child.process.returncode == FOR_A_PERSON:
                said = tail(program.log, 1) or "ended with exit code 2"
                raise ConfigurationError(f"process {program.name}: {said}")
            ended = (
                _exit_text(child.process.returncode) if child.process and child.process.returncode else "exit code 0"
            )
            raise Unavailable(_told(f"process {program.name}: {failure} ({ended})", program.log))
        self._emit("ready", child)
        child.watcher = asyncio.create_task(self._watch(child), name=f"watch {program.name}")
        return child.pid

    async def stop(self, name: str) -> None:
        """SIGTERM to the child's process group, `stop_seconds` of patience, SIGKILL. Nothing when it is gone."""
        child = self._children.get(name)
        if child is None:
            return
        was_running = self.running(name)
        child.stopping.set()
        await self._end(child)
        if child.watcher is not None:
            await asyncio.wait([child.watcher])
        if was_running:
            self._emit("stopped", child, child.process.returncode if child.process else None)

    async def kill(self, name: str, *, restart: bool = False) -> None:
        """SIGKILL to the child's process group. With `restart` this is an accident as any other, else it is final."""
        child = self._children[name]
        if not restart:
            child.stopping.set()
        self._signal(child, signal.SIGKILL)
        if not restart:
            await self._end(child)
            if child.watcher is not None:
                await asyncio.wait([child.watcher])

    def hang_up(self, name: str) -> None:
        """SIGHUP to the child alone, for a program that then reads its files again. Nothing when it is gone."""
        child = self._children.get(name)
        # Not reaped yet, so its id belongs to nobody else.
        if child is not None and child.process is not None and child.pid in self._guard.groups and self.running(name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGHUP)

    def running(self, name: str) -> bool:
        """Is there a live process of this name?"""
        child = self._children.get(name)
        return child is not None and child.process is not None and not _has_exited(child.process)

    def pid(self, name: str) -> int:
        """The process id of the child's present process. Raises KeyError for an unknown name."""
        return self._children[name].pid

    async def failed(self) -> None:
        """Wait until a child used up its restarts, or died for good; then raise Unavailable with the end of its log."""
        assert self._gave_up is not None
        raise Unavailable(await asyncio.shield(self._gave_up))

    @property
    def peak_memory_bytes(self) -> int:
        """The largest sum of proportional set sizes seen, of this process and all below it; sampled every 2 s."""
        return self._peak_memory_bytes

    # --- how ---

    def _spawn(self, child: _Child) -> None:
        program = child.program
        program.log.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            if program.log.stat().st_size > LOG_BYTES_MAX:
                program.log.replace(program.log.with_name(program.log.name + ".old"))
        with program.log.open("ab") as log:
            child.process = subprocess.Popen(
                [*isolated_child(), "run", str(os.getpid()), *program.argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **program.env},
                cwd=program.cwd,
                start_new_session=True,
            )
        self._guard.watch(child.pid)

    async def _wait_ready(self, child: _Child) -> str:
        """ "" when ready, else what went wrong."""
        program, process = child.program, child.process
        assert process is not None
        deadline = time.monotonic() + program.ready_seconds
        while not _has_exited(process):
            left = deadline - time.monotonic()
            if left <= 0:
                return f"not ready after {program.ready_seconds:g} s"
            if child.stopping.is_set():
                return "stopped before it was ready"
            try:
                async with asyncio.timeout(min(left, 5.0)):
                    if program.ready is None or await program.ready():
                        return ""
            except (TimeoutError, OSError, Unavailable):
                pass
            await asyncio.sleep(POLL_SECONDS)
        return "ended before it was ready"

    async def _was_killed(self, child: _Child) -> bool:
        """Whether somebody killed a child on its way up, which says nothing about the program: then it is spawned
        again, as long as it has restarts."""
        process, program = child.process, child.program
        if process is None or child.stopping.is_set() or not program.restart or not _has_exited(process):
            return False
        code = self._reap(child)
        if code != -signal.SIGKILL:
            return False
        self._emit("died", child, code, _exit_text(code))
        now = time.monotonic()
        child.deaths.append(now)
        delay = restart_delay(child.deaths, now, program.restarts_per_minute_max)
        if delay is None:
            return False
        await asyncio.sleep(delay)
        if child.stopping.is_set():
            return False
        self._spawn(child)
        self._emit("restarted", child)
        return True

    async def _watch(self, child: _Child) -> None:
        while True:
            process = child.process
            assert process is not None
            await _until(lambda: _has_exited(process) or child.stopping.is_set())  # noqa: B023 (awaited at once)
            if child.stopping.is_set():
                return  # whoever stops it also reaps it
            code = self._reap(child)
            self._emit("died", child, code, _exit_text(code))
            now = time.monotonic()
            child.deaths = [*(at for at in child.deaths if now - at < 60.0), now]
            delay = restart_delay(child.deaths, now, child.program.restarts_per_minute_max)
            if delay is None or not child.program.restart:
                self._give_up(child, code)
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await child.stopping.wait()
                    return
            self._spawn(child)
            self._emit("restarted", child)
            failure = await self._wait_ready(child)
            if not failure:
                self._emit("ready", child)
            elif not child.stopping.is_set():
                self._signal(child, signal.SIGKILL)  # hangs: counts as one more death

    def _give_up(self, child: _Child, code: int) -> None:
        deaths, program = len(child.deaths), child.program
        why = f"died {deaths} times within a minute" if program.restart else "died"
        message = _told(f"process {program.name}: {why}, last with {_exit_text(code)}; not started again", program.log)
        self._emit("gave up", child, code, message)
        if self._gave_up is not None and not self._gave_up.done():
            self._gave_up.set_result(message)

    async def _end(self, child: _Child) -> None:
        """Graceful end of the whole group; cancelled in the middle, it kills."""
        process = child.process
        if process is None:
            return
        try:
            self._signal(child, signal.SIGTERM)
            if await _until(lambda: _has_exited(process), child.program.stop_seconds):
                # The leader is a zombie now; what else is in the group gets a moment to follow it.
                await _until(lambda: not others_in_group(process.pid), GROUP_SECONDS)
        finally:
            self._signal(child, signal.SIGKILL)
            self._reap(child)

    def _signal(self, child: _Child, number: signal.Signals) -> None:
        # Until the leader is reaped its id cannot be given to anybody else, so this can only reach our own.
        if child.process is not None and child.pid in self._guard.groups:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.process.pid, number)

    def _reap(self, child: _Child) -> int:
        """Kill what is left of the group of a dead (or just killed) leader, then collect the leader."""
        process = child.process
        assert process is not None
        self._signal(child, signal.SIGKILL)
        code = process.wait()
        self._guard.leave(process.pid)
        return code

    def _emit(self, kind: EventKind, child: _Child, exit_code: int | None = None, message: str = "") -> None:
        self._on_event(ProcessEvent(kind, child.program.name, child.pid, exit_code, message))

    # --- memory ---

    async def _sample_memory(self) -> None:
        while True:
            self._guard.replace_if_gone()
            used = await asyncio.to_thread(tree_memory_bytes, os.getpid(), frozenset(self._guard.groups))
            self._peak_memory_bytes = max(self._peak_memory_bytes, used)
            await asyncio.sleep(MEMORY_SAMPLE_SECONDS)


async def _until(condition: Callable[[], bool], seconds: float = math.inf) -> bool:
    """Wait until `condition()`; False when `seconds` passed first. The system has no event for what is asked here."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        await asyncio.sleep(POLL_SECONDS)
    return True


def _has_exited(process: subprocess.Popen[bytes]) -> bool:
    """Has it ended? Leaves it to be reaped where the system can (no waitid on macOS), which keeps its id ours."""
    if process.returncode is not None:
        return True
    if not hasattr(os, "waitid"):
        return process.poll() is not None
    try:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def _exit_text(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"


def _told(what: str, log: Path) -> str:
    last = tail(log)
    return f"{what}; the end of {log}:\n{last}" if last else f"{what}; {log} is empty"
