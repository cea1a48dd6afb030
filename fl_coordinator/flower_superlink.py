"""The SuperLink, Flower's server process: its folder, its command line, its environment, and its supervisor.

One process, one port on one address, one folder. The supervisor starts it, keeps the nodes registered and our run
alive, and replaces whatever dies. What a SuperLink knows is in its memory and goes with it: its ServerApp dies with it
in any case, and then registrations, run and commands are handed to the next one anew. (In SQLite they would survive,
and each request would cost three times the processor time.) Telemetry, update checks, package installation and proxies
are switched off by `superlink_environment` and `superlink_argv`; everything that is written goes into the folder.

How processes die. The SuperLink starts `flower-superexec` (in a session of its own), which starts `flwr-serverapp`;
both look for their parent every 0.2 s and end when it is gone. The SuperLink itself ends when its supervisor is gone
or its SuperExec has ended. None of this is immediate, so `SuperLink.stop` and every start also kill whatever carries
this folder's FLWR_HOME in its environment (Linux; elsewhere only the first three hold).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.util
import logging
import os
import re
import secrets
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fl_coordinator.flower import APP_FOLDER, Control, write_private
from model_delta.errors import Malformed, Unavailable

_log = logging.getLogger("atoll.flower")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class SuperLinkPlace:
    """Where a SuperLink lives: its folder, its one port, and PEM files. The certificate must be valid for `host`."""

    folder: Path
    port: int
    certificate: Path
    private_key: Path
    ca: Path
    host: str = "127.0.0.1"

    @property
    def address(self) -> str:
        """`host:port` of all three of its APIs."""
        return f"{self.host}:{self.port}"

    @property
    def home(self) -> Path:
        """FLWR_HOME; also the mark by which its processes are recognised."""
        return self.folder.resolve() / "home"

    @property
    def log(self) -> Path:
        """What the SuperLink, its SuperExec and the ServerApp print, since the last start."""
        return self.folder / "superlink.log"

    @property
    def token(self) -> Path:
        """The file with the Control API's bearer token."""
        return self.folder / "control.token"


def prepare(place: SuperLinkPlace) -> None:
    """Create the folder, the control token (0600) and what the environment points to; harmless when they exist."""
    for folder in (place.folder, place.home, place.home.parent / "tmp"):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not place.token.exists():
        write_private(place.token, secrets.token_urlsafe(32).encode("ascii"))


def superlink_argv(place: SuperLinkPlace) -> list[str]:
    """The command line of the SuperLink process (Flower's own server, started through `run_superlink`)."""
    return [
        *(sys.executable, "-P", "-m", "fl_coordinator.flower", str(place.token.resolve())),
        *("--host", place.host, "--port", str(place.port)),
        *("--ssl-certfile", str(place.certificate.resolve()), "--ssl-keyfile", str(place.private_key.resolve())),
        *("--ssl-ca-certfile", str(place.ca.resolve())),
        *("--database", ":flwr-in-memory:"),
        *("--isolation", "subprocess", "--enable-supernode-auth", "--disable-runtime-dependency-installation"),
    ]


def superlink_environment(place: SuperLinkPlace, inherited: Mapping[str, str]) -> dict[str, str]:
    """The environment of the SuperLink and what it starts, made from the supervisor's own (`inherited`).

    Telemetry and update checks off, no proxies, every file inside the folder, the commands of this interpreter's
    environment first on PATH, and our packages importable.
    """
    dropped = {"http_proxy", "https_proxy", "all_proxy", "ssl_cert_file", "ssl_cert_dir", "pythondontwritebytecode"}
    kept = {
        name: value
        for name, value in inherited.items()
        if name.lower() not in dropped and not name.startswith(("FLWR_", "OTEL_"))
    }
    commands = dict.fromkeys((sysconfig.get_path("scripts"), str(Path(sys.executable).parent)))
    temporary = str(place.home.parent / "tmp")
    if "PYTHONPYCACHEPREFIX" in inherited:
        bytecode = {}
    elif _has_bytecode("flwr"):
        bytecode = {"PYTHONDONTWRITEBYTECODE": "1"}
    else:  # compiling Flower and what it needs would take each of its processes 3 s at every start
        bytecode = {"PYTHONPYCACHEPREFIX": str(place.home.parent / "pycache")}
    return (
        kept
        | bytecode
        | {
            "FLWR_HOME": str(place.home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5",
            "ORT_DISABLE_TELEMETRY": "1",
            "MALLOC_ARENA_MAX": "2",
            "NO_PROXY": "*",
            "TMPDIR": temporary,
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join(
                part for part in (str(Path(__file__).resolve().parent.parent), inherited.get("PYTHONPATH", "")) if part
            ),
            "PATH": os.pathsep.join((*commands, inherited.get("PATH", os.defpath))),
        }
    )


def _has_bytecode(package: str) -> bool:
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise Unavailable(f"the package {package} is not installed: install atoll[coordinator]")
    return Path(importlib.util.cache_from_source(found.origin)).exists()


def processes_of(place: SuperLinkPlace) -> dict[int, str]:
    """Processes that carry this folder's FLWR_HOME, by id: the base name of the command. Empty where /proc is not.

    flower-superexec lets nobody but root look into it (PR_SET_DUMPABLE 0); its command line tells whose it is."""
    mark = b"FLWR_HOME=" + os.fsencode(place.home)
    found: dict[int, str] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            script = words[1] if len(words) > 1 and b"python" in Path(os.fsdecode(words[0])).name.encode() else words[0]
            name = "superlink" if b"fl_coordinator.flower" in words else Path(os.fsdecode(script)).name
            try:
                ours = mark in (entry / "environ").read_bytes().split(b"\0")
            except PermissionError:
                ours = name == "flower-superexec" and serves(place, words)
        except OSError:  # it ended
            continue
        if ours and int(entry.name) != os.getpid():
            found[int(entry.name)] = name
    return found


def serves(place: SuperLinkPlace, words: Sequence[bytes]) -> bool:
    """Whether a command line names this SuperLink's certificate authority and address."""
    return os.fsencode(place.ca.resolve()) in words and place.address.encode() in words


def end_processes(place: SuperLinkPlace) -> list[int]:
    """Kill every process of this folder, and return their ids."""
    ended: list[int] = []
    for _ in range(20):  # a dying parent may just have started a child
        alive = processes_of(place)
        if not alive:
            break
        for pid in alive:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
            ended.append(pid)
        time.sleep(0.05)
    return sorted(set(ended))


class SuperLink:
    """Supervises one SuperLink process and the run of our app on it. Belongs to one event loop."""

    def __init__(self, place: SuperLinkPlace, environment: Mapping[str, str], app: Path = APP_FOLDER) -> None:
        """`app` is the folder of the bundle to run: ours, unless its nodes are stock SuperNodes."""
        self._place, self._app = place, app
        self._environment = superlink_environment(place, environment)
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    def _control(self) -> Control:
        return Control(self._place.address, self._place.ca, self._place.token)

    async def start(self, ready_s: float = 60.0) -> None:
        """Start the process and return when its Control API answers.

        Raises Unavailable with the log's last line when it ends before that or takes longer than `ready_s` seconds.
        """
        place = self._place
        await self.stop()
        try:
            await asyncio.to_thread(prepare, place)
            output = await asyncio.to_thread(_fresh_log, place.log)
        except OSError as error:
            raise Unavailable(f"SuperLink folder {place.folder}: {error.strerror}") from None
        with output as log:
            self._process = await asyncio.create_subprocess_exec(
                *superlink_argv(place),
                env=self._environment,
                cwd=place.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C in the terminal is for the supervisor to interpret
            )
        deadline = time.monotonic() + ready_s
        while True:
            if self._process.returncode is not None or time.monotonic() > deadline:
                why = f"ended with {self._process.returncode}" if self.pid is None else f"not ready in {ready_s:g} s"
                await self.stop()
                raise Unavailable(f"SuperLink at {place.address}: {why}: {_last_line(place.log)} (log: {place.log})")
            try:
                await asyncio.to_thread(self._probe)
                return
            except Unavailable:
                await asyncio.sleep(0.1)

    def _probe(self) -> None:
        with self._control() as control:
            control.node_names()

    async def stop(self) -> None:
        """End the process and everything it started; returns when nothing is left."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()  # it has nothing to save, and would take seconds to say goodbye
            await process.wait()
        await asyncio.to_thread(end_processes, self._place)

    async def supervise(
        self,
        nodes: Callable[[], Mapping[str, bytes]],
        silent_s: Callable[[], float],
        coordinator_url: str,
        coordinator_token: Path,
        silent_max_s: float = 15.0,
        start_max_s: float = 45.0,
    ) -> None:
        """Keep the SuperLink, the registrations and the ServerApp alive until cancelled, then stop them.

        `nodes` says which public keys (as `node_public_key` gives them) belong to which name, and may grow;
        `silent_s` is the bridge's. A ServerApp that has gone, or was silent for `silent_max_s` seconds (`start_max_s`
        while it starts), is replaced by a new run; when that does not help, the SuperLink is restarted.
        """
        ensure = functools.partial(self._ensure, nodes, coordinator_url, coordinator_token)
        pause_s = 0.5
        try:
            while True:
                try:
                    await self.start()
                    await asyncio.to_thread(ensure, True)
                    if await self._watch(ensure, nodes, silent_s, silent_max_s, start_max_s):
                        pause_s = 0.5
                except (Unavailable, OSError) as error:  # OSError: no process or file handle is left
                    _log.warning("%s; trying again in %.1f s", error, pause_s)
                await asyncio.sleep(pause_s)
                pause_s = min(10.0, pause_s * 2)
        finally:
            await self.stop()

    def _ensure(
        self,
        nodes: Callable[[], Mapping[str, bytes]],
        url: str,
        token: Path,
        fresh: bool,
    ) -> None:
        with self._control() as control:
            for name, key in nodes().items():
                try:
                    control.register_nodes({name: key})
                except Malformed as error:  # the other nodes can still work
                    _log.error("%s", error)
            control.ensure_run(url, token, fresh=fresh, app=self._app)

    async def _watch(
        self,
        ensure: Callable[[bool], None],
        nodes: Callable[[], Mapping[str, bytes]],
        silent_s: Callable[[], float],
        silent_max_s: float,
        start_max_s: float,
    ) -> bool:
        """Until the SuperLink must be started anew; says whether the ServerApp was ever heard."""
        started, known = time.monotonic(), dict(nodes())
        heard = seen = replaced = False
        while self.pid is not None:
            await asyncio.sleep(0.5)
            if dict(nodes()) != known:
                known = dict(nodes())
                await asyncio.to_thread(ensure, False)
            running_s = time.monotonic() - started
            in_touch = silent_s() < running_s
            heard = heard or in_touch
            alive = await asyncio.to_thread(processes_of, self._place)
            apps = [pid for pid, name in alive.items() if name == "flwr-serverapp"]
            gone = seen and not apps
            seen = seen or bool(apps)
            if in_touch and not gone and silent_s() < silent_max_s:
                replaced = False
            elif gone or in_touch or running_s > start_max_s:
                if replaced and not in_touch:
                    _log.warning("SuperLink %s: no ServerApp after a second run; restarting it", self._place.address)
                    return heard
                _log.warning("ServerApp %s; starting a new run", "has gone" if gone else "is silent")
                for pid in apps:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                await asyncio.to_thread(ensure, True)
                started, seen, replaced = time.monotonic(), False, True
        _log.warning("SuperLink %s ended: %s", self._place.address, _last_line(self._place.log))
        return heard


def _fresh_log(path: Path) -> IO[bytes]:
    if path.exists():
        path.replace(path.with_suffix(".log.1"))
    return path.open("ab")


def _last_line(path: Path) -> str:
    try:
        lines = path.read_text("utf-8", "replace")[-4000:].splitlines()
    except OSError:
        return "no log"
    plain = (_COLOURS.sub("", line).strip() for line in reversed(lines))
    return next((line[:300] for line in plain if line), "empty log")
