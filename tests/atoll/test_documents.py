"""The documents tell of the tree, the routes and the commands that there are."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
import typer
from starlette.routing import Route

from atoll.cli import app
from fl_coordinator.control import control_app

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("atoll", "device_sim", "edge_runtime", "fl_coordinator", "model_delta", "monitoring", "regional_gateway")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("tests/**/*.md")])


def architecture() -> str:
    return (ROOT / "docs" / "architecture.md").read_text()


def test_every_module_has_its_line_and_every_line_its_module() -> None:
    there = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if not path.name.startswith("__")
    }
    told, package = set(), ""
    for line in architecture().splitlines():
        if line.startswith("### "):
            package = line[4:].split(":")[0]
        found = re.match(r"\| `([\w/]+\.py)` \|", line)
        if found:
            told.add(found[1] if package not in PACKAGES else f"{package}/{found[1]}")
    assert told == there


def test_every_route_of_the_control_api_is_told() -> None:
    routes = control_app(None, tokens={}, flower=None).routes  # type: ignore[arg-type]
    there = {route.path for route in routes if isinstance(route, Route)}
    told = set(re.findall(r"^\| `[A-Z, ]+ (/\S+)` \|", architecture(), re.MULTILINE)) - {"/"}
    told = {path.replace("/artifact/{name}", "/{kind}/{name}") for path in told}
    assert told == {path.replace("/artifact/{name}", "/{kind}/{name}") for path in there}


def commands() -> list[tuple[str, str]]:
    return [
        (path.name, line.strip())
        for path in DOCUMENTS
        for line in re.findall(r"^\s*(atoll [a-z].*)$", path.read_text(), re.MULTILINE)
        if not line.startswith("atoll  ")
    ]


@pytest.mark.parametrize(("document", "line"), commands())
def test_every_command_in_a_document_exists(document: str, line: str) -> None:
    words = line.split("#")[0].split()[1:]
    command = typer.main.get_command(app)
    while isinstance(command, click.Group):
        name = words.pop(0) if words else "(nothing)"
        assert name in command.commands, f"{document}: {line}"
        command = command.commands[name]
    options = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    assert {word for word in words if word.startswith("--")} <= options, f"{document}: {line}"


def test_every_link_leads_somewhere() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
            if not target.startswith("http"):
                assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_every_test_that_the_threat_model_names_is_there() -> None:
    named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", (ROOT / "docs" / "threat_model.md").read_text())
    assert len(named) > 30
    missing = [(file, test) for file, test in named if f"def {test}(" not in (ROOT / "tests" / file).read_text()]
    assert missing == []
