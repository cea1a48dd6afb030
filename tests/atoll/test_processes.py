"""Real little processes: restarted when they die, reported when they keep dying, never left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from atoll.ports import port_answers
from atoll.process_tree import process_table, tree_memory_bytes
from atoll.processes import (
    ProcessEvent,
    Program,
    Supervisor,
    restart_delay,
    tail,
)
from atoll.settings import ConfigurationError
from model_delta.errors import Malformed, Unavailable
from tests.fakes.ports import free_port
from tests.systems import on_linux

SLEEP = "import time; time.sleep(600)"
FAMILY = (
    "import subprocess, sys, time\n"
    "grandchild = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(600)'])\n"
    "print('grandchild', grandchild.pid, flush=True)\n"
    "time.sleep(600)\n"
)
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
)

PARENT = """
import asyncio, sys
from pathlib import Path
from atoll.processes import Program, Supervisor

async def main():
    async with Supervisor(lambda event: print(event.kind, event.name, event.pid, flush=True)) as supervisor:
        for index, code in enumerate(sys.argv[2:]):
            log = Path(sys.argv[1]) / f"{index}.log"
            async def said(log=log, code=code):
                return "print" not in code or bool(log.read_text())
            await supervisor.start(Program(f"child{index}", (sys.executable, "-S", "-c", code), log, ready=said))
        print("guard guard", supervisor._guard.pid, flush=True)
        print("up . 0", flush=True)
        await supervisor.failed()

asyncio.run(main())
"""


def python(name: str, code: str, folder: Path, **options: object) -> Program:
    return Program(name, (sys.executable, "-S", "-c", code), folder / f"{name}.log", **options)  # type: ignore[arg-type]


def alive(pid: int) -> bool:
    return pid in process_table()


def gone(pids: list[int], seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.02)
    return False


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 (the condition is another process)
            await asyncio.sleep(0.01)


def play(scene: Callable[[Supervisor, list[ProcessEvent]], Awaitable[None]]) -> list[ProcessEvent]:
    events: list[ProcessEvent] = []

    async def run() -> None:
        async with Supervisor(events.append) as supervisor:
            await scene(supervisor, events)

    asyncio.run(run())
    assert gone([event.pid for event in events])
    return events


def said(events: list[ProcessEvent]) -> list[tuple[str, str]]:
    return [(event.kind, event.name) for event in events]


def test_children_start_in_order_and_stop_in_reverse(tmp_path: Path) -> None:
    async def scene(supervisor: Supervisor, events: list[ProcessEvent]) -> None:
        for name in ("broker", "coordinator"):
            pid = await supervisor.start(python(name, SLEEP, tmp_path))
            assert supervisor.running(name)
            assert supervisor.pid(name) == pid
            assert os.getpgid(pid) == pid  # a group of its own: Ctrl-C at the terminal does not reach it
        with pytest.raises(Malformed, match="broker"):
            await supervisor.start(python("broker", SLEEP, tmp_path))

    assert said(play(scene)) == [
        ("started", "broker"),
        ("ready", "broker"),
        ("started", "coordinator"),
        ("ready", "coordinator"),
        ("stopped", "coordinator"),
        ("stopped", "broker"),
    ]


FAREWELL = """
import pathlib, signal, sys, time
me, folder = sys.argv[1], pathlib.Path(sys.argv[2])
def leave(*_):
    (folder / f"{me}.told").touch()
    for _ in range(3000):
        if len(list(folder.glob("*.told"))) == 3:
            sys.exit()
        time.sleep(0.01)
    sys.exit(1)
signal.signal(signal.SIGTERM, leave)
(folder / f"{me}.up").touch()
time.sleep(600)
"""


def test_children_that_start_together_are_told_together_to_stop(tmp_path: Path) -> None:
    def ready(name: str) -> Callable[[], Awaitable[bool]]:
        async def is_up() -> bool:
            return (tmp_path / f"{name}.up").exists()

        return is_up

    async def scene(supervisor: Supervisor, events: list[ProcessEvent]) -> None:
        await supervisor.start(python("broker", SLEEP, tmp_path))
        await asyncio.gather(
            *(
                supervisor.start(
                    Program(
                        name,
                        (sys.executable, "-S", "-c", FAREWELL, name, str(tmp_path)),
                        tmp_path / f"{name}.log",
                        ready=ready(name),
                        stop_seconds=10.0,
                    )
                )
                for name in ("fleet-0", "fleet-1", "fleet-2")
            )
        )

    stopped = [(event.name, event.exit_code) for event in play(scene) if event.kind == "stopped"]
    assert sorted(stopped[:3]) == [("fleet-0", 0), ("fleet-1", 0), ("fleet-2", 0)]  # 1: it saw nobody else told
    assert [name for name, _ in stopped[3:]] == ["broker"]


def test_a_child_killed_on_its_way_up_is_started_again(tmp_path: Path) -> None:
    port = free_port()
    listen = f"import socket, time; s = socket.create_server(('127.0.0.1', {port})); time.sleep(600)"
    lost = f"import pathlib, time; mark = pathlib.Path({str(tmp_path / 'mark')!r}); first = not mark.exists()\n"
    lost += f"mark.touch()\nif first: time.sleep(600)\n{listen}"

    async def scene(supervisor: Supervisor, events: list[ProcessEvent]) -> None:
        start = asyncio.create_task(supervisor.start(python("fleet", lost, tmp_path, ready=port_answers(port))))
        await until((tmp_path / "mark").exists)
        await supervisor.kill("fleet", restart=True)
        assert await start == supervisor.pid("fleet")

    kinds = [event.kind for event in play(scene)]
    assert kinds == ["started", "died", "restarted", "ready", "stopped"]


def test_whoever_loses_patience_with_the_stop_still_leaves_nothing_behind(tmp_path: Path) -> None:
    pids: list[int] = []

    async def run() -> None:
        async with Supervisor() as supervisor:
            for name in ("broker", "coordinator", "gateway"):
                ready = (tmp_path / f"{name}.log").exists
                child = python(name, STUBBORN, tmp_path, stop_seconds=600.0)
                pids.append(await supervisor.start(child))
                await until(lambda ready=ready: ready())  # type: ignore[misc]
            asyncio.get_running_loop().call_later(0.2, task_of_run[0].cancel)

    task_of_run: list[asyncio.Task[None]] = []

    async def twice() -> None:
        task_of_run.append(asyncio.create_task(run()))
        with pytest.raises(asyncio.CancelledError):
            await task_of_run[0]

    started = time.monotonic()
    asyncio.run(twice())
    assert time.monotonic() - started < 60
    assert not any(alive(pid) for pid in pids)


def test_a_killed_child_is_started_again_and_asked_whether_it_is_ready(tmp_path: Path) -> None:
    port = free_port()
    listen = f"import socket, time; s = socket.create_server(('127.0.0.1', {port})); time.sleep(600)"

    async def scene(supervisor: Supervisor, events: list[ProcessEvent]) -> None:
        first = await supervisor.start(python("gateway", listen, tmp_path, ready=port_answers(port)))
        await supervisor.kill("gateway", restart=True)
        await until(lambda: len(events) == 5)
        second = supervisor.pid("gateway")
        assert second != first
        assert events[2].exit_code == -signal.SIGKILL
        assert "SIGKILL" in events[2].message
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            pass

    kinds = [event.kind for event in play(scene)]
    assert kinds == ["started", "ready", "died", "restarted", "ready", "stopped"]


def test_a_child_killed_for_good_stays_down_and_may_be_started_anew(tmp_path: Path) -> None:
    async def scene(supervisor: Supervisor, events: list[ProcessEvent]) -> None:
        pid = await supervisor.start(
            python("gateway", FAMILY, tmp_path, ready=lambda: has_output(tmp_path / "gateway.log"))
        )
        grandchild = int((tmp_path / "gateway.log").read_text().split()[1])
        await supervisor.kill("gateway")
        assert gone([pid, grandchild])
        assert not supervisor.running("gateway")
        await supervisor.start(python("gateway", SLEEP, tmp_path))

    assert "restarted" not in [event.kind for event in play(scene)]


async def has_output(log: Path) -> bool:
    return bool(tail(log))


def test_a_child_that_keeps_dying_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    flag = tmp_path / "worked once"
    code = (
        "import pathlib, sys, time\n"
        f"flag = pathlib.Path({str(flag)!r})\n"
        "if flag.exists(): print('no disk'); sys.exit(3)\n"
        "flag.touch(); time.sleep(600)\n"
    )

    async def scene(supervisor: Supervisor, events: list[ProcessEvent]) -> None:
        await supervisor.start(python("coordinator", code, tmp_path, restarts_per_minute_max=2))
        await until(flag.exists)
        await supervisor.kill("coordinator", restart=True)
        async with asyncio.timeout(30):
            with pytest.raises(Unavailable, match=r"coordinator: died 3 times.*exit code 3.*\n(.*\n)*no disk"):
                await supervisor.failed()

    events = play(scene)
    assert [event.kind for event in events].count("restarted") == 2
    assert (events[-1].kind, events[-1].exit_code) == ("gave up", 3)


PORT_TAKEN = "print('port taken'); raise SystemExit(2)"


def test_a_child_that_needs_a_person_says_so_in_its_own_words(tmp_path: Path) -> None:
    async def scene(supervisor: Supervisor, events: list[ProcessEvent]) -> None:
        with pytest.raises(ConfigurationError, match=r"process slow: port taken$"):
            await supervisor.start(python("slow", PORT_TAKEN, tmp_path, ready=port_answers(1)))
        assert not supervisor.running("slow")

    play(scene)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("print('no peer'); raise SystemExit(3)", r"ended before it was ready \(exit code 3\)(.|\n)*no peer"),
        ("print('loading', flush=True); " + SLEEP, r"not ready after [\d.]+ s(.|\n)*loading"),
    ],
)
def test_a_child_that_does_not_become_ready_says_why_and_is_gone(tmp_path: Path, code: str, message: str) -> None:
    async def never() -> bool:
        return False

    async def scene(supervisor: Supervisor, events: list[ProcessEvent]) -> None:
        for seconds in (0.5, 5.0, 50.0):  # on a busy machine a child may not have said a word by then
            name = f"slow-{seconds}"
            with pytest.raises(Unavailable, match=rf"not ready after {seconds:g} s|{message}") as caught:
                await supervisor.start(python(name, code, tmp_path, ready=never, ready_seconds=seconds))
            assert not supervisor.running(name)
            if re.search(message, str(caught.value)):
                return
        pytest.fail(f"expected {message!r}, found {caught.value}")

    play(scene)


def test_a_program_that_does_not_exist_is_named(tmp_path: Path) -> None:
    async def scene(supervisor: Supervisor, events: list[ProcessEvent]) -> None:
        with pytest.raises(Unavailable, match="cannot run no-such-broker"):
            await supervisor.start(
                Program("broker", ("no-such-broker",), tmp_path / "log", ready=port_answers(free_port()))
            )

    play(scene)


def test_one_that_ignores_sigterm_is_killed_with_its_family(tmp_path: Path) -> None:
    async def scene(supervisor: Supervisor, events: list[ProcessEvent]) -> None:
        for name, code in (("deaf", STUBBORN), ("family", FAMILY)):
            log = tmp_path / f"{name}.log"
            await supervisor.start(
                python(name, code, tmp_path, stop_seconds=0.2, ready=lambda log=log: has_output(log))
            )

    started = time.monotonic()
    events = play(scene)
    assert time.monotonic() - started < 60.0
    assert {event.name: event.exit_code for event in events if event.kind == "stopped"} == {
        "deaf": -signal.SIGKILL,
        "family": -signal.SIGTERM,
    }
    assert gone([int((tmp_path / "family.log").read_text().split()[1])])


def start_parent(tmp_path: Path, *codes: str) -> tuple[subprocess.Popen[str], dict[str, int]]:
    """A supervisor in a process of its own, once all children are up: names -> process ids."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path), *codes],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        start_new_session=True,
    )
    assert parent.stdout is not None
    pids: dict[str, int] = {}
    for line in parent.stdout:
        kind, name, pid = line.split()
        if kind == "up":
            break
        pids[name] = int(pid)
    for log in tmp_path.glob("*.log"):
        if log.read_text().startswith("grandchild"):
            pids["grandchild"] = int(log.read_text().split()[1])
    return parent, pids


@pytest.mark.parametrize(
    "guarded",
    [True, pytest.param(False, marks=on_linux)],
    ids=["with its guard", "after its guard was killed, too"],
)
def test_nothing_survives_a_parent_that_is_killed(tmp_path: Path, guarded: bool) -> None:
    parent, pids = start_parent(tmp_path, SLEEP, STUBBORN, *([FAMILY] if guarded else []))
    assert ("grandchild" in pids) == guarded
    assert all(alive(pid) for pid in pids.values())
    if not guarded:
        os.kill(parent.pid, signal.SIGSTOP)
        os.kill(pids["guard"], signal.SIGKILL)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait(60)
    assert gone(list(pids.values()))


def test_a_killed_guard_is_replaced(tmp_path: Path) -> None:
    async def scene(supervisor: Supervisor, events: list[ProcessEvent]) -> None:
        killed = supervisor._guard.pid
        os.kill(killed, signal.SIGKILL)
        await until(lambda: not alive(killed))
        await supervisor.start(python("child", SLEEP, tmp_path))
        assert supervisor._guard.pid != killed
        assert alive(supervisor._guard.pid)

    play(scene)


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    parent, pids = start_parent(tmp_path, SLEEP, FAMILY)
    os.kill(parent.pid, signal.SIGINT)
    assert parent.wait(60) != 0
    assert gone(list(pids.values()))


def test_ctrl_c_while_a_child_is_starting_leaves_nothing(tmp_path: Path) -> None:
    late = "print(end='', flush=True); " + SLEEP  # promises output that never comes: the parent waits for it
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path), SLEEP, late],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        start_new_session=True,
    )
    assert parent.stdout is not None
    pids = [int(parent.stdout.readline().split()[2]) for _ in range(3)]
    os.kill(parent.pid, signal.SIGINT)
    assert parent.wait(60) != 0
    assert gone(pids)


def test_restart_delays_grow_and_end() -> None:
    assert [restart_delay([0.0] * count, 1.0, 6) for count in range(1, 8)] == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, None]
    assert restart_delay([0.0] * 20, 61.0, 1) == 0.2  # a minute later all is forgiven


def test_memory_counts_the_whole_tree(tmp_path: Path) -> None:
    hungry = "data = bytearray(30_000_000); print('fed', flush=True); " + SLEEP

    async def scene(supervisor: Supervisor, events: list[ProcessEvent]) -> None:
        before = tree_memory_bytes(os.getpid())
        assert before > 5_000_000
        log = tmp_path / "hungry.log"
        await supervisor.start(python("hungry", hungry, tmp_path, ready=lambda: has_output(log)))
        assert tree_memory_bytes(os.getpid()) - before > 25_000_000
        assert tree_memory_bytes(supervisor.pid("hungry")) > 30_000_000
        await until(lambda: supervisor.peak_memory_bytes > before + 25_000_000)

    play(scene)


def test_tail_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert tail(log) == ""
    log.write_bytes(b"x" * 20_000 + b"\nlast but one\n\xff last\n")
    assert tail(log, 2) == "last but one\n\ufffd last"


def test_a_large_log_is_set_aside_at_the_next_start(tmp_path: Path) -> None:
    log = tmp_path / "child.log"
    log.write_bytes(bytes(8_000_001))

    async def scene(supervisor: Supervisor, events: list[ProcessEvent]) -> None:
        await supervisor.start(python("child", SLEEP, tmp_path))

    play(scene)
    with contextlib.suppress(FileNotFoundError):
        assert log.stat().st_size == 0
    assert (tmp_path / "child.log.old").stat().st_size == 8_000_001
