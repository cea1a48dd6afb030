"""`atoll up`: a platform whose state outlives it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import typer

from atoll.platform import BROKER, Layout, check, ports_of, prepare, programs, revocation_list_of, urls
from atoll.processes import ProcessEvent, Supervisor
from atoll.revocation import reload_when_changed
from atoll.settings import DataFolder, Endpoints, require_free_port
from atoll.stores import choose_store, require_store
from atoll.updates import choose_place, require_login, require_place
from model_delta.errors import StorageFull

FIRST_PORT = 7400


def run_up(
    path: Path,
    *,
    port: int | None,
    region: str,
    broker: str,
    learning: bool,
    updates_log: str = "",
    updates_login: str = "",
    store: str = "",
    as_json: bool,
) -> int:
    """Start everything, say where it is, and keep it running until Ctrl-C. Returns the exit code.

    Without a `port`, a folder's processes come back where they were, so that devices find them again. Raises
    ConfigurationError before anything was started or made, and Unavailable when a process keeps dying.
    """
    require_place(updates_log)
    require_login(updates_login)
    store = require_store(store) or store
    layout = Layout(regions=(region,), broker=broker, learning=learning)
    existed, new = path.is_dir(), not DataFolder.exists(path)
    if new:
        check(layout, _ports(None, port))  # what would be refused is refused before there is a folder
    try:
        data = DataFolder.open(path, create=True)
    except StorageFull:
        if not existed:
            with contextlib.suppress(OSError):  # where somebody else made one meanwhile, it is not empty
                path.rmdir()
        raise
    with data.locked():
        with _nothing_half_made(data, new=new, existed=existed):
            choose_place(data, updates_log, updates_login)
            choose_store(data, store)
            before = data.endpoints() if data.was_started else None
            endpoints = prepare(data, layout, _ports(before, port))
            if learning:
                from atoll.flower_nodes import prepare_flower

                prepare_flower(data, endpoints.gateways)
        return asyncio.run(_up(data, endpoints, as_json=as_json))


@contextlib.contextmanager
def _nothing_half_made(data: DataFolder, *, new: bool, existed: bool) -> Iterator[None]:
    """Take away again what the block wrote into a `new` folder before it failed, and the folder unless it `existed`.

    Call it with the folder's lock: another platform may have been started here since `new` was looked up, and stays."""
    removable = new and not data.was_started
    try:
        yield
    except BaseException:
        if removable:
            for entry in data.path.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            if not existed:
                data.path.rmdir()
        raise


def _ports(before: Endpoints | None, first: int | None) -> Callable[[str], int]:
    """Gives each process its port: in turn from `first`, or the one it had before. Each is checked to be free."""
    had = ports_of(before) if before is not None and first is None else {}
    others = itertools.count(max(had.values(), default=(first or FIRST_PORT) - 1) + 1)
    return lambda what: require_free_port(had[what] if what in had else next(others), what, "--port")


async def _up(data: DataFolder, endpoints: Endpoints, *, as_json: bool) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with Supervisor(lambda event: _tell(event, quiet=as_json)) as supervisor:
        for program in programs(data, endpoints):
            started = asyncio.ensure_future(supervisor.start(program))
            await _first_of(started, asyncio.ensure_future(stop.wait()))
            if stop.is_set():
                started.cancel()
                return 130
            await started
        if as_json:
            typer.echo(json.dumps({"data": str(data.path), **msgspec.to_builtins(endpoints)}))
        else:
            _welcome(data, endpoints)
        reloading = None
        if endpoints.broker.kind == "mosquitto":
            list_of_revoked = revocation_list_of(data)
            reloading = asyncio.create_task(reload_when_changed(list_of_revoked, lambda: supervisor.hang_up(BROKER)))
        failed = asyncio.ensure_future(supervisor.failed())
        await _first_of(failed, asyncio.ensure_future(stop.wait()))
        if failed.done():
            failed.result()
        failed.cancel()
        if reloading is not None:
            reloading.cancel()
    return 0


async def _first_of(first: asyncio.Future[Any], second: asyncio.Future[Any]) -> None:
    await asyncio.wait([first, second], return_when=asyncio.FIRST_COMPLETED)
    second.cancel()


def _welcome(data: DataFolder, endpoints: Endpoints) -> None:
    for name, url in urls(endpoints).items():
        typer.echo(f"{name:<20} {url}")
    typer.echo(f"{'broker':<20} mqtts://{endpoints.broker.host}:{endpoints.broker.port} ({endpoints.broker.kind})")
    typer.echo(f"live page            {endpoints.coordinator}/")
    typer.echo(
        f"\nIn a second terminal:  atoll publish MODEL.onnx --data {data.path}\n"
        f"                       atoll device run --data {data.path}\n"
        f"Logs: {data.path / 'logs'}. Ctrl-C stops everything; the data folder stays."
    )


def _tell(event: ProcessEvent, *, quiet: bool) -> None:
    if event.kind in ("died", "restarted", "gave up") and not quiet:
        typer.echo(f"{event.name} {event.kind}{': ' + event.message if event.message else ''}", err=True)
