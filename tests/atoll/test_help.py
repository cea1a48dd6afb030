"""Help is part of the product: every command and option explains itself, and `--help` is quick."""

import subprocess
import sys
from collections.abc import Iterator

import click
import pytest
import typer

from atoll.cli import app


def commands(group: click.Command, path: str = "") -> Iterator[tuple[str, click.Command]]:
    if isinstance(group, click.Group):
        for name, command in group.commands.items():
            yield from commands(command, f"{path} {name}".strip())
    else:
        yield path, group


EVERY = dict(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("name", EVERY)
def test_every_command_and_option_explains_itself(name: str) -> None:
    command = EVERY[name]
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option) and parameter.name != "help":
            assert parameter.help, f"{name} {parameter.opts}"
    options = {option for parameter in command.params for option in parameter.opts}
    assert "--json" in options
    assert f"\nExample: atoll {name}" in command.help


@pytest.mark.parametrize("name", EVERY)
def test_help_is_plain_text(name: str) -> None:
    text = EVERY[name].get_help(click.Context(EVERY[name], info_name=f"atoll {name}"))
    assert "\\" not in text


def test_help_loads_nothing_heavy() -> None:
    heavy = ("numpy", "onnxruntime", "onnx", "flwr", "fastapi", "paho", "cryptography")
    program = (
        "import sys; sys.argv = ['atoll', '--help']\n"
        "from atoll.cli import main\n"
        "try: main()\n"
        f"except SystemExit: print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "device" in done.stdout


def test_a_process_may_open_as_many_files_as_a_fleet_needs() -> None:
    program = (
        "import resource, sys; sys.argv = ['atoll', '--version']\n"
        "_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))\n"
        "from atoll.cli import main\n"
        "try: main()\n"
        "except SystemExit: print(resource.getrlimit(resource.RLIMIT_NOFILE)[0], hard)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    allowed, hard = map(int, done.stdout.splitlines()[-1].split())
    assert allowed >= (8_192 if hard < 0 else min(8_192, hard))
