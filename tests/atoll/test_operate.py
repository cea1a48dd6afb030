"""The operator's commands, against a coordinator that says what the real one says (see `fl_coordinator.control`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from atoll.operate import revoke_identity, show_rollouts
from atoll.rounds import run_round
from tests.fakes.control_api import answering

OPENED = {"round_id": "fraud-1", "state": "ANNOUNCED", "chosen": [], "rejected": {}, "candidate": "", "reason": ""}


class Coordinator:
    """Answers an opened round with its short view, and a question about it with the next of `views`."""

    def __init__(self) -> None:
        self.url = ""
        self.views: list[dict[str, Any]] = []
        self.posted: list[str] = []

    def answer(self, method: str, path: str, body: bytes) -> dict[str, Any]:
        if method == "POST":
            self.posted.append(path)
            return OPENED
        return {} if path == "/v1/health" else self.views.pop(0)


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    made = Coordinator()
    with answering(made, tmp_path / "data"):
        yield made


def run(tmp_path: Path, *, wait: bool) -> None:
    run_round(tmp_path / "data", None, {"quorum": 8, "hostile": 0}, wait=wait, contact_s=2.0, as_json=False)


def view(state: str, admitted: int, **more: Any) -> dict[str, Any]:
    return {**OPENED, "state": state, "admitted": [f"pos-{n:04}" for n in range(admitted)], "refused": {}, **more}


def test_a_rollout_that_waits_for_devices_says_so_in_the_list_and_by_itself(
    tmp_path: Path, coordinator: Coordinator, capsys: pytest.CaptureFixture[str]
) -> None:
    one = {
        "name": "first",
        "model": "ranking",
        "state": "running",
        "standing": "waiting for devices",
        "reason": "waits for devices: none that follows ranking is in this stage yet",
        "stage": 0,
        "stages": ["100%"],
        "in_stage": 0,
        "adopted": 0,
        "target": "a" * 64,
        "stable": "a" * 64,
        "serial": 1,
    }
    coordinator.views = [[one], one]  # type: ignore[list-item]
    show_rollouts(tmp_path / "data", "", contact_s=2.0, as_json=False)
    assert "waiting for devices" in capsys.readouterr().out.splitlines()[1]
    show_rollouts(tmp_path / "data", "first", contact_s=2.0, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "rollout first: waiting for devices, stage 1 of 1"
    assert lines[2] == "reason: waits for devices: none that follows ranking is in this stage yet"


def test_a_round_that_nobody_waits_for_is_shown_as_it_begins(
    tmp_path: Path, coordinator: Coordinator, capsys: pytest.CaptureFixture[str]
) -> None:
    coordinator.views = [view("ANNOUNCED", 0)]
    run(tmp_path, wait=False)
    out, err = capsys.readouterr()
    assert out == "round fraud-1: announced, 0 contributions\n"
    assert err == ""


def test_a_round_that_fails_is_followed_to_its_end_and_fails_the_command(
    tmp_path: Path, coordinator: Coordinator, capsys: pytest.CaptureFixture[str]
) -> None:
    coordinator.views = [view("COLLECTING", 3), view("FAILED", 3, reason="quorum: expected 8, found 3")]
    with pytest.raises(typer.Exit) as ended:
        run(tmp_path, wait=True)
    assert ended.value.exit_code == 1
    out, err = capsys.readouterr()
    assert "reason: quorum: expected 8, found 3" in out
    assert err.splitlines() == ["round fraud-1: collecting, 3 contributions", "round fraud-1: failed, 3 contributions"]


def test_a_name_cannot_lead_to_another_route(
    coordinator: Coordinator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    revoke_identity(tmp_path / "data", "pos-1/../x?y", contact_s=5.0, as_json=False)
    assert coordinator.posted == ["/v1/identities/pos-1%2F..%2Fx%3Fy/revoke"]
    assert "its certificate was revoked" in capsys.readouterr().out
