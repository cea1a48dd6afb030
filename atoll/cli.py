"""The command line.

The commands are in `atoll.commands`; here they are put together, in the order of the help. Each imports the wiring
module that it calls only when it runs, so that `atoll --help` stays quick. Every command takes `--json`; the programs
of a platform then tell their events (`events`).
Errors are one line on standard error, with exit code 2 for what a person must put right, 3 for what a retry may cure,
4 for a refusal on grounds of trust; with `--json` also one object on standard output, a misspelt option included.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import sys
from typing import Annotated, NoReturn

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # many small products in many processes: threads only spin

import click
import typer
import typer.core

from atoll import __version__
from atoll.commands.devices import device
from atoll.commands.files import delta, model
from atoll.commands.keys import keys, vault
from atoll.commands.platform import demo, up
from atoll.commands.programs import aggregator, broker, coordinator, fleet, gateway
from atoll.commands.rounds import round_
from atoll.commands.trust import trust
from atoll.commands.versions import publish, rollout, store
from model_delta.errors import AtollError

typer.core.HAS_RICH = False  # with rich installed, typer puts backslashes even into plain help

app = typer.Typer(
    name="atoll",
    help="Run fraud models on a fleet of payment devices: publish, roll out, watch, roll back, and learn together.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    suggest_commands=False,
)
OURS = ("atoll", "device_sim", "edge_runtime", "fl_coordinator", "model_delta", "monitoring", "regional_gateway")
FOR_A_PERSON = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What an operating system says that only a person can put right."""
FILES = 8_192
"""Open files and connections that a process may come to need: a fleet has four for each of its devices."""


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"atoll {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of every command."""


for command in (demo, up, publish):
    app.command()(command)
for group in (
    rollout,
    round_,
    device,
    gateway,
    coordinator,
    aggregator,
    fleet,
    trust,
    broker,
    model,
    keys,
    vault,
    store,
    delta,
):
    app.add_typer(group)


def allow_files() -> None:
    """Ask for FILES open files, for this process and those that it starts: macOS allows 256 unless asked."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _interrupted(number: int, frame: object) -> None:
    sys.exit(128 + number)


def _end(error: str, exit_code: int) -> NoReturn:
    """One line for a person; with `--json` also one object on standard output for a program."""
    from atoll.events import Events

    print(f"atoll: {error}", file=sys.stderr)
    Events("atoll", as_json="--json" in sys.argv[1:]).failed(error, exit_code)
    sys.exit(exit_code)


def _misused(error: click.ClickException) -> NoReturn:
    """An option, argument or value that the command line does not take: what typer says, or an error as any other."""
    if "--json" not in sys.argv[1:]:
        error.show()
        sys.exit(error.exit_code)
    said = " ".join(error.format_message().split())
    where = getattr(error, "ctx", None)  # not every kind of error has one
    _end(f"{said} See `{where.command_path if where else 'atoll'} --help`.", error.exit_code)


def main() -> None:
    """Entry point: run the command, turn our errors into one line and an exit code."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # A command that has something to stop installs its own; the others just end, without a traceback.
        signal.signal(signal.SIGINT, _interrupted)
    allow_files()
    try:
        # Not standalone: else typer would print what is wrong with the words of a command, as text, and exit.
        ended = app(prog_name="atoll", standalone_mode=False)
        sys.exit(ended if isinstance(ended, int) else 0)
    except click.ClickException as error:
        _misused(error)
    except AtollError as error:
        from atoll.entry import exit_code

        _end(str(error), exit_code(error))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in OURS:
            raise
        _end(f"{error.name} is not installed: expected the extras of this command; pip install 'atoll[all]'", 2)
    except OSError as error:
        if error.errno not in FOR_A_PERSON or error.filename is None:
            raise
        _end(f"{error.filename}: {error.strerror}; free some space or correct permissions", 2)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)
