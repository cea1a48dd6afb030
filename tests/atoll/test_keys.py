"""`atoll keys rotate` against a coordinator that takes its time, on a terminal and off it."""

from __future__ import annotations

import io
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from atoll.control_client import ControlClient
from atoll.keys import keys_status, rewrapping_shown, rotate_keys
from tests.fakes.control_api import answering

DONE = {"floor": 1, "latest": 2}


class Coordinator:
    """Answers a rotation after it was asked `questions` times how far it is, 2,000 records further each time."""

    def __init__(self, questions: int = 0) -> None:
        self.url = ""
        self.questions = questions
        self.asked = 0
        self._enough = threading.Event()

    def answer(self, method: str, path: str, body: bytes) -> dict[str, int]:
        if method == "POST":
            assert not self.questions or self._enough.wait(10)
            return DONE
        if path == "/v1/health":
            return {}
        told = {**DONE, "rewrapped": 2_000 * self.asked, "to_rewrap": 6_000}
        self.asked += 1
        if self.asked == self.questions:
            self._enough.set()
        return told


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    made = Coordinator()
    with answering(made, tmp_path / "data"):
        yield made


@pytest.fixture
def data(tmp_path: Path, coordinator: Coordinator) -> Path:
    return tmp_path / "data"


def test_a_terminal_is_shown_how_far_the_rotation_is(coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    client = ControlClient(coordinator.url, "t" * 32)
    coordinator.questions = 3
    with rewrapping_shown(client, as_json=False, every_s=0.01):
        assert client.post("/v1/keys/rotate", {}) == DONE
    assert terminal.getvalue().startswith("\rrewrapped 0 of 6000\rrewrapped 2000 of 6000\rrewrapped 4000 of 6000")
    assert terminal.getvalue().endswith("\n")


def test_ctrl_c_ends_the_waiting_and_says_that_the_rotation_goes_on(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    client = ControlClient(coordinator.url, "t" * 32)
    with pytest.raises(KeyboardInterrupt), rewrapping_shown(client, as_json=False, every_s=0.01):
        raise KeyboardInterrupt
    assert "the coordinator ends what it began; atoll keys status" in terminal.getvalue()
    asked = coordinator.asked
    assert client.get("/v1/health") == {}
    assert coordinator.asked == asked, "nobody asks any more"


def test_neither_a_script_nor_a_log_is_drawn_on(
    coordinator: Coordinator, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rotate_keys(data, forget=False, contact_s=1.0, as_json=False)
    assert capsys.readouterr() == ("wrapping key: version 2, records open from version 1\n", "")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    rotate_keys(data, forget=True, contact_s=1.0, as_json=True)
    assert json.loads(capsys.readouterr().out) == DONE
    assert (terminal.getvalue(), coordinator.asked) == ("", 0)


def test_somebody_else_may_ask_how_far_it_is(
    coordinator: Coordinator, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys_status(data, contact_s=1.0, as_json=False)
    assert "; being rotated, rewrapped 0 of 6000" in capsys.readouterr().out
