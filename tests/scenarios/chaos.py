"""Kill one process of a running `atoll demo`, or interrupt the demo itself, and look at what comes of it.

    python -m tests.scenarios.chaos --victim coordinator --at "act 3" --after 2 [--broker embedded]
    python -m tests.scenarios.chaos --seed 11                    # a victim and a moment from the seed
    python -m tests.scenarios.chaos --gauntlet --seed 3          # one kill in every act, a new victim each time

What has to hold after one kill: the demo ends before its deadline; it ends with exit code 0 and figures that could
have been measured, or with exit code 1 and a problem that names what died. Never a hang, never a wrong figure.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DEADLINE_S = 330.0
ACTS = 7
VICTIMS = {
    "guard": "child.py guard",
    "broker": "mosquitto -c|broker run",
    "coordinator": "atoll coordinator run",
    "superlink": "fl_coordinator.flower ",
    "superexec": "flower-superexec",
    "serverapp": "flwr-serverapp",
    "gateway-eu-west": "gateway run --region eu-west",
    "gateway-ap-south": "gateway run --region ap-south",
    "aggregator-a0": "aggregator run --name a0",
    "aggregator-a1": "aggregator run --name a1",
    "aggregator-a2": "aggregator run --name a2",
    "fleet-0": "--shard 0/2",
    "fleet-1": "--shard 1/2",
}
"""Every kind of process below the demo, and the words by which its command line is known."""


class Demo:
    """One `atoll demo` in a process of its own, its lines of progress, and everything below it."""

    def __init__(
        self,
        folder: Path,
        *,
        devices: int = 20,
        rounds: int = 1,
        broker: str = "auto",
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        wrapper: Sequence[str] = (),
        cwd: Path = ROOT,
    ) -> None:
        """Files go below `folder`: the demo's own (`tmp`), its report, and what it printed. `wrapper` is a command
        that runs it, such as strace; with one, `signal` would reach the wrapper."""
        self.temporary, self.report_folder = folder / "tmp", folder / "report"
        self.temporary.mkdir(parents=True)
        self.lines: list[tuple[float, str]] = []
        self.ports: set[int] = set()
        self.pids: set[int] = set()
        self._heard = threading.Condition()
        self.started = time.monotonic()
        named = {"--devices": devices, "--rounds": rounds, "--broker": broker, "--report": self.report_folder}
        words = (str(word) for pair in named.items() for word in pair)
        self.process = subprocess.Popen(
            [*wrapper, sys.executable, "-m", "atoll", "demo", *words, *options],
            cwd=cwd,
            env={**os.environ, "TMPDIR": str(self.temporary), "PYTHONPATH": str(ROOT), **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=(folder / "stdout").open("wb"),
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a process group of its own, as a shell gives it
        )
        threading.Thread(target=self._listen, args=(folder / "stderr",), daemon=True).start()

    def _listen(self, path: Path) -> None:
        assert self.process.stderr is not None
        with path.open("w") as file:
            for line in self.process.stderr:
                file.write(line)
                file.flush()
                with self._heard:
                    self.lines.append((time.monotonic(), line.rstrip()))
                    self._heard.notify_all()

    def wait_for(self, pattern: str, seconds: float) -> bool:
        """Until a line of progress has matched; False when the demo ended or `seconds` passed before."""
        deadline = time.monotonic() + seconds
        with self._heard:
            while not any(re.search(pattern, line) for _, line in self.lines):
                if self.process.poll() is not None or time.monotonic() > deadline:
                    return False
                self._heard.wait(0.1)
        return True

    def below(self) -> dict[int, str]:
        """Processes below the demo: id and command line. They, and the ports they listen on, are remembered."""
        found = dict(_below(self.process.pid))
        self.pids |= found.keys()
        self.ports |= listening(self.pids)
        return found

    def find(self, victim: str, seconds: float = 60.0) -> int | None:
        """The id of the process called `victim`, waited for: it may be on its way up."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            for pid, line in sorted(self.below().items()):
                if re.search(VICTIMS[victim], line):
                    return pid
            time.sleep(0.05)
        return None

    def signal(self, number: signal.Signals, *, group: bool = False) -> None:
        """To the demo alone, or to its whole process group as a terminal does."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, number) if group else os.kill(self.process.pid, number)

    def end(self, seconds: float) -> int | None:
        """Its exit code; None when it still runs after `seconds`."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def leftovers(self) -> list[str]:
        """What is still there of a demo that has ended."""
        alive = [f"process {pid}: {line[:100]}" for pid, line in _all() if pid in self.pids and _is_ours(pid, self)]
        alive += [f"process {pid}: {line[:100]}" for pid, line in _all() if str(self.temporary) in line]
        open_ports = [f"port {port}" for port in sorted(self.ports) if _answers(port)]
        return [*dict.fromkeys(alive), *open_ports, *(f"folder {path}" for path in self.temporary.iterdir())]

    def destroy(self) -> None:
        """Kill whatever is left of it."""
        for pid in (self.process.pid, *self.below()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def demo(folder: Path, **options: Any) -> Iterator[Demo]:
    """A demo while the block runs."""
    running = Demo(folder, **options)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.destroy()


def _all() -> Iterator[tuple[int, str]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if state != "Z":
                yield int(entry.name), line


def _is_ours(pid: int, of: Demo) -> bool:
    """Whether it carries the demo's temporary folder in its environment: ids are used again by the system."""
    try:
        return os.fsencode(f"TMPDIR={of.temporary}") in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


def _below(root: int) -> Iterator[tuple[int, str]]:
    parents, lines = {}, {}
    for pid, line in _all():
        try:
            parents[pid] = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            lines[pid] = line
        except OSError:
            continue
    inside = {root}
    while more := {pid for pid, parent in parents.items() if parent in inside} - inside:
        inside |= more
    for pid in inside - {root}:
        yield pid, lines[pid]


def listening(pids: set[int]) -> set[int]:
    """The TCP ports on which one of these processes listens."""
    inodes = set()
    for pid in pids:
        try:
            for link in Path(f"/proc/{pid}/fd").iterdir():
                target = str(link.readlink())
                if target.startswith("socket:["):
                    inodes.add(target[8:-1])
        except OSError:
            continue
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for row in Path(table).read_text().splitlines()[1:] if Path(table).exists() else ():
            words = row.split()
            if words[3] == "0A" and words[9] in inodes:
                found.add(int(words[1].rpartition(":")[2], 16))
    return found


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


# --- what has to hold -------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What came of one demo. `killed` names each victim with the line of progress before its death."""

    code: int | None
    seconds: float
    report: dict[str, Any]
    output: str
    killed: list[tuple[str, str]] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """Of the acts that failed, what the report says."""
        return [f"{act['name']}: {act['problem']}" for act in self.report.get("acts", []) if not act["ok"]]

    def wrong(self) -> list[str]:
        """Everything that must not be; empty when the demo recovered, or said clearly what was in its way."""
        if self.code is None:
            return [f"hangs: still running after {self.seconds:.0f} s"]
        found = [f"left over: {what}" for what in self.leftovers]
        if "Traceback" in self.output:
            found.append("a traceback on the terminal")
        if self.code == 0:
            found += implausible(self.report)
        elif self.code == 1:
            failed = [act for act in self.report.get("acts", []) if not act["ok"]]
            first = failed[0]["problem"] if failed else ""
            names = {victim for victim, _ in self.killed}
            if not failed:
                found.append("exit code 1, but no act failed")
            elif not any(name in first for name in names):
                found.append(f"a failure that does not name what died: {first}")
            found += implausible({"acts": [act for act in self.report["acts"] if act["ok"]]})
        else:
            found.append(f"exit code {self.code}")
        return found


def implausible(report: Mapping[str, Any]) -> list[str]:
    """Figures that cannot have been measured on a platform that works."""
    rules: dict[str, dict[str, Any]] = {
        "up": {"devices": lambda v: v == 20, "aggregators": lambda v: v == 3, "hostile_devices": lambda v: v == 2},
        "publish": {
            "decisions_per_second": lambda v: 30 < v < 110,
            "latency_p50_us": lambda v: 50 < v < 50_000,
            "latency_p99_us": lambda v: 50 < v < 2_000_000,
            "seconds_until_all_adopted": lambda v: 0 < v < 60,
            "bytes_int8": lambda v: 30_000 < v < 60_000,
            "average_precision_today": lambda v: 0 < v < 1,
        },
        "learn": {
            "average_precision_after": lambda v: 0.4 < v < 1,
            "average_precision_fedavg": lambda v: 0 < v < 0.55,
            "rejected": lambda v: len(v) >= 2,
            "rounds": lambda v: all(8 <= row["contributions"] <= 17 and row["hostile_rejected"] == 2 for row in v),
        },
        "canary": {
            "canary_devices": lambda v: v == 1,
            "devices_adopted": lambda v: v == 19,
            "share_of_full": lambda v: 0 < v < 1,
            "by_patch": lambda v: v >= 10,
        },
        "bad_version": {
            "devices_ever": lambda v: v == 1,
            "seconds_active": lambda v: 0 < v < 60,
            "false_positive_rate_bad": lambda v: 0.2 < v <= 1,
            "guardrail": lambda v: "false_positive_rate" in v or "latency" in v or "rolled_back" in v,
        },
        "region_loss": {
            "requests_lost": lambda v: v == 0,
            "requests_of_fleet": lambda v: 0 <= v < 400,
            "requests_of_terminal": lambda v: v > 100,
            "failovers": lambda v: v >= 1,
            "recovery_ms": lambda v: 0 < v < 2000,
        },
        "long_absence": {
            "days_away": lambda v: v == 120,
            "why_it_may_not_answer": lambda v: v == "expired",
            "payments_by_baseline": lambda v: v == 20,
            "catch_up_bytes": lambda v: 0 < v < 150_000,
        },
    }
    found = []
    for act in report["acts"]:
        for name, holds in rules[act["name"]].items():
            if name not in act["figures"]:
                found.append(f"{act['name']}: no figure {name}")
            elif not holds(act["figures"][name]):
                found.append(f"{act['name']}: {name} is {act['figures'][name]}")
    return found


# --- kills ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kill:
    """Who dies when: `after` seconds from the first line of progress that matches `at`."""

    victim: str
    at: str
    after: float


def planned(rng: random.Random) -> Kill:
    """One victim and one moment."""
    return Kill(rng.choice(sorted(VICTIMS)), f"act {rng.randint(1, ACTS)} of", round(rng.uniform(0.0, 12.0), 1))


def gauntlet(rng: random.Random) -> list[Kill]:
    """A kill in every act but the first, nobody twice: many deaths in the time of one demo."""
    victims = rng.sample(sorted(VICTIMS), ACTS - 1)
    return [Kill(who, f"act {act} of", round(rng.uniform(0.5, 6.0), 1)) for act, who in enumerate(victims, start=2)]


def survive(folder: Path, kills: Sequence[Kill], *, deadline_s: float = DEADLINE_S, **options: Any) -> Outcome:
    """Run a demo with these deaths in it, to its end or to the deadline; its folder and logs stay in `folder`.
    `options` are those of `Demo`."""
    with demo(folder, options=("--keep",), **options) as running:
        killed = []
        for kill in kills:
            if not running.wait_for(kill.at, running.started + deadline_s - time.monotonic()):
                break
            time.sleep(kill.after)
            pid = running.find(kill.victim)
            if pid is None:
                continue
            os.kill(pid, signal.SIGKILL)
            killed.append((kill.victim, running.lines[-1][1]))
        code = running.end(max(1.0, running.started + deadline_s - time.monotonic()))
        seconds = time.monotonic() - running.started
        if code is None:
            running.destroy()
        path = running.report_folder / "report.json"
        return Outcome(
            code=code,
            seconds=seconds,
            report=json.loads(path.read_text()) if path.exists() else {},
            output="\n".join(line for _, line in running.lines),
            killed=killed,
            leftovers=[what for what in running.leftovers() if not what.startswith("folder ")],
        )


def main() -> int:
    """One run by hand; prints what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--victim", choices=sorted(VICTIMS))
    parser.add_argument("--at", default="act 1 of", help="a line of progress (regular expression)")
    parser.add_argument("--after", type=float, default=0.0, help="seconds after that line")
    parser.add_argument("--gauntlet", action="store_true")
    parser.add_argument("--broker", default="auto")
    parser.add_argument("--folder", type=Path, help="where its files stay; default: a new temporary folder")
    told = parser.parse_args()
    rng = random.Random(told.seed)
    if told.victim:
        kills = [Kill(told.victim, told.at, told.after)]
    else:
        kills = gauntlet(rng) if told.gauntlet else [planned(rng)]
    folder = told.folder or Path(tempfile.mkdtemp(prefix="atoll-chaos-"))
    outcome = survive(folder, kills, broker=told.broker)
    for victim, line in outcome.killed:
        print(f"killed {victim} at: {line}")
    for problem in outcome.problems:
        print(f"failed: {problem}")
    wrong = outcome.wrong()
    for what in wrong:
        print(f"WRONG: {what}")
    print(f"exit code {outcome.code} after {outcome.seconds:.0f} s; files in {folder}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
