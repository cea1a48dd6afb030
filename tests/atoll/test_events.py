"""`--json`: what a program says to whoever started it, one object a line, and nothing else on standard output."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from atoll import cli
from atoll.events import Events
from atoll.flower_nodes import prepare_flower
from atoll.platform import Layout, prepare
from atoll.settings import DataFolder
from tests.atoll.platform_process import free_run, lines

PROGRAMS = ("gateway", "coordinator", "aggregator", "broker", "fleet", "device")
READY_S = 40.0


def test_an_event_is_one_object_and_silence_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    Events("broker", as_json=False).say("ready", url="mqtts://127.0.0.1:1")
    assert capsys.readouterr().out == ""
    Events("broker", as_json=True).say("ready", url="mqtts://127.0.0.1:1", folder=Path("/x"))
    (said,) = lines(capsys.readouterr().out)
    assert abs(said.pop("time") - time.time()) < 300
    assert said == {"event": "ready", "process": "broker", "url": "mqtts://127.0.0.1:1", "folder": "/x"}


def test_a_reader_that_has_gone_ends_nobody() -> None:
    program = "from atoll.events import Events\nfor _ in range(9):\n    Events('a', as_json=True).say('b')\n"
    read, write = os.pipe()
    os.close(read)
    ran = subprocess.run([sys.executable, "-c", program], stdout=write, stderr=subprocess.PIPE, text=True, timeout=30)
    os.close(write)
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.parametrize("program", [*(f"{name} run" for name in PROGRAMS), "up", "rollout status", "round run"])
def test_an_error_is_told_to_programs_too(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "format").write_text("9\n")
    monkeypatch.setattr(sys, "argv", ["atoll", *program.split(), "--data", str(tmp_path), "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    (told,) = lines(said.out)
    assert (told["event"], told["exit_code"], ended.value.code) == ("error", 2, 2)
    assert "upgrade atoll" in told["error"]
    assert said.err == f"atoll: {told['error']}\n"


MISUSED = {
    "rollout apply": "Missing argument",
    "rollout aply x.yaml": "No such command 'aply'",
    "publish model.onnx --nmae spring": "No such option '--nmae'",
    "device run --rate often": "Invalid value for '--rate'",
    "device run --rate 0": "Invalid value for '--rate'",
    "round run --data": "Option '--data' requires an argument",
    "delta make old new": "Missing argument 'PATCH'",
    "demo --devices many": "Invalid value for '--devices'",
    "fleet run extra": "Got unexpected extra argument (extra)",
    "upp": "No such command 'upp'",
}


@pytest.mark.parametrize("words", MISUSED)
def test_a_misused_command_is_told_to_programs_too(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = words.split()
    where = given.index("--data") if "--data" in given else len(given)  # behind it, `--json` would be its value
    monkeypatch.setattr(sys, "argv", ["atoll", *given[:where], "--json", *given[where:]])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    (told,) = lines(said.out)
    assert (told["event"], told["exit_code"], ended.value.code) == ("error", 2, 2)
    assert MISUSED[words] in told["error"]
    assert told["error"].endswith("--help`.")
    assert told["error"].count("Did you mean") <= 1  # click and typer would both say it
    assert said.err == f"atoll: {told['error']}\n"


def test_a_misused_command_is_told_to_people_with_its_usage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["atoll", "device", "run", "--rate", "often"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (2, "")
    assert said.err.startswith("Usage: atoll device run")
    assert "Invalid value for '--rate'" in said.err


@pytest.mark.slow
def test_every_program_says_when_it_is_ready_and_when_it_has_stopped(tmp_path: Path) -> None:
    first = free_run(16)
    ports = iter(range(first, first + 16))
    data = DataFolder.open(tmp_path / "data", create=True)
    endpoints = prepare(data, Layout(regions=("eu-west",), broker="embedded", learning=True), lambda what: next(ports))
    prepare_flower(data, endpoints.gateways)
    expected = {
        "broker": {"process": "broker", "url": f"mqtts://127.0.0.1:{endpoints.broker.port}"},
        "coordinator": {"process": "coordinator", "url": endpoints.coordinator},
        "gateway": {"process": "gateway-eu-west", "url": endpoints.gateways["eu-west"]},
        "aggregator": {"process": "aggregator-a0", "url": endpoints.aggregators["a0"]},
        "fleet": {"process": "fleet-0", "devices": 1, "metrics": ""},
        "device": {"process": "pos-0009", "gateways": [endpoints.gateways["eu-west"]]},
    }
    more = {"fleet": ("--devices", "1"), "device": ("--id", "pos-0009")}
    running: dict[str, subprocess.Popen[str]] = {}
    try:
        for name, fields in expected.items():
            command = [sys.executable, "-m", "atoll", name, "run", "--data", str(data.path), "--json"]
            running[name] = subprocess.Popen(
                [*command, *more.get(name, ())], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            told = _first_line(running[name])
            assert told["event"] == "ready", told
            assert {key: told[key] for key in fields} == fields
        for name, process in reversed(running.items()):
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=60)
            said = [line for line in lines(out) if line["event"] in ("ready", "stopped", "error")]
            assert [line["event"] for line in said] == ["stopped"], (name, out, err)
            assert process.returncode == 0
    finally:
        for process in running.values():
            process.kill()
            process.communicate()


def _first_line(process: "subprocess.Popen[str]") -> dict[str, object]:
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], READY_S)
    if not ready:
        process.kill()
    line = process.stdout.readline()
    assert line, process.communicate()[1]
    found: dict[str, object] = json.loads(line)
    return found
