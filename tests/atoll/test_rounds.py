"""`atoll round`, from the command line's side: what is sent, what is shown, what a transcript is worth."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from atoll import cli
from atoll.output import show
from fl_coordinator.rounds import Privacy, Quota, RoundSpec
from model_delta.encoding import pack
from tests.fakes.control_api import answering
from tests.fl_coordinator.test_transcript import Written, another

Run = Callable[..., tuple[int, str, str]]
VIEW: dict[str, Any] = {
    "round_id": "fraud-1",
    "state": "PUBLISHED",
    "base": "b" * 64,
    "root": "c" * 64,
    "policy": "robust",
    "reveal": "distances",
    "attempt": 1,
    "failures": ["a1 is down"],
    "admitted": ["pos-1", "pos-2"],
    "refused": {"late": 3},
    "sat_out": {"training diverged": 2},
    "chosen": ["pos-1"],
    "rejected": {"pos-2": "norm 9.1 sigma above the median"},
    "candidate": "d" * 64,
    "reason": "",
    "seconds": {"COLLECTING": 2.0},
    "figures": {
        "gates": {"precision": "average precision 0.6, stable 0.5, allowed loss 0.01"},
        "autopilot": "rollout fraud-1 began",
        "privacy": {"epsilon_release": 1.99, "epsilon_device": 0.7, "delta": 1e-5, "noise_multiplier": 2.0},
    },
}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run("round", ...)`: exit code, standard output, standard error."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["atoll", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = int(str(ended.code or 0))
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


class Coordinator:
    """Answers what the control API answers about one round that has ended."""

    def __init__(self) -> None:
        self.url = ""
        self.posted: list[dict[str, Any]] = []
        self.transcript = b""
        self.states: list[str] = []

    def answer(self, method: str, path: str, body: bytes) -> dict[str, Any] | list[dict[str, Any]] | bytes:
        if method == "POST":
            self.posted.append(json.loads(body))
        elif path.endswith("/transcript"):
            return self.transcript
        elif path == "/v1/rounds":
            return [VIEW]
        return {**VIEW, "state": self.states.pop(0)} if self.states and "/rounds/" in path else VIEW


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    made = Coordinator()
    with answering(made, tmp_path / "data"):
        yield made


def test_a_file_says_everything_and_its_rollout_travels_with_it(
    run: Run, coordinator: Coordinator, tmp_path: Path
) -> None:
    (tmp_path / "canary.yaml").write_text("kind: Rollout\n")
    file = tmp_path / "round.yaml"
    file.write_text(
        "apiVersion: atoll/v1\nkind: Round\nmetadata: {name: monday}\nspec:\n  model: fraud\n  quorum: 20\n"
        "  policy: krum\n  quota: {per_group: 5}\n  privacy: {epsilon: 8, delta: 0.00001, noise_multiplier: 2}\n"
        "  autopilot: true\n  rollout: canary.yaml\n"
    )
    code, out, _ = run("round", "run", "--file", file, "--data", tmp_path / "data", "--json")
    assert (code, json.loads(out)["round_id"]) == (0, "fraud-1")
    sent = msgspec.convert(coordinator.posted[0], RoundSpec)
    assert sent == RoundSpec(
        model="fraud",
        name="monday",
        quorum=20,
        policy="krum",
        quota=Quota(per_group=5),
        privacy=Privacy(epsilon=8, delta=1e-5, noise_multiplier=2),
        autopilot=True,
        rollout="kind: Rollout\n",
    )


def test_without_a_file_the_options_and_their_defaults_count(
    run: Run, coordinator: Coordinator, tmp_path: Path
) -> None:
    code, _, _ = run("round", "run", "--quorum", 9, "--data", tmp_path / "data", "--no-wait")
    assert code == 0
    assert coordinator.posted == [
        {"model": "fraud", "quorum": 9, "hostile_max": 2, "deadline_s": 60.0, "steps": 40},
    ]


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("kind: Round\nspec: [\n", (), ":3: expected YAML"),
        (
            "apiVersion: atoll/v1\nkind: Round\nmetadata: {name: m}\nspec:\n  model: fraud\n  quorun: 3\n",
            (),
            ":6: spec.quorun: expected one of",
        ),
        (None, (), "expected a readable file"),
        ("x", ("--quorum", "9"), "--quorum: expected it in"),
    ],
)
def test_a_file_that_is_wrong_is_one_line_and_nothing_is_asked(
    run: Run, coordinator: Coordinator, tmp_path: Path, text: str | None, options: tuple[str, ...], words: str
) -> None:
    file = tmp_path / "round.yaml"
    if text is not None:
        file.write_text(text)
    code, out, err = run("round", "run", "--file", file, *options, "--data", tmp_path / "data")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err
    assert coordinator.posted == []


def test_rounds_are_listed_and_shown(run: Run, coordinator: Coordinator, tmp_path: Path) -> None:
    code, out, _ = run("round", "list", "--data", tmp_path / "data")
    assert (code, out.splitlines()[1].split()[:2]) == (0, ["fraud-1", "PUBLISHED"])
    code, out, _ = run("round", "show", "fraud-1", "--data", tmp_path / "data")
    assert code == 0
    for line in (
        "  not used: pos-2: norm 9.1 sigma above the median",
        "  refused at admission: 3 x late",
        "  sat out: 2 x training diverged",
        "  epsilon 1.99 of the releases, 0.7 of the most burdened device, at delta 1e-05; it covers the "
        "opened sums, not what else was opened nor who was chosen",
        "autopilot: rollout fraud-1 began",
        "policy    robust, reveals distances",
        "chosen: 1 devices; opened: their sum, and the distances of all that were measured",
        "  failed: a1 is down",
        "  gate precision: average precision 0.6, stable 0.5, allowed loss 0.01",
    ):
        assert line in out.splitlines()


def test_a_round_is_aborted_and_shown_once_it_has_ended(run: Run, coordinator: Coordinator, tmp_path: Path) -> None:
    code, _, err = run("round", "abort", "fraud-1", "--data", tmp_path / "data")
    assert (code, err) == (2, "atoll: round fraud-1: has ended before, it is PUBLISHED\n")
    coordinator.states = ["AGGREGATING", "FAILED"]
    code, out, _ = run("round", "abort", "fraud-1", "--data", tmp_path / "data")
    assert (code, out.splitlines()[0]) == (0, "round fraud-1: failed, 2 contributions")
    assert coordinator.posted == [{}, {}]


def test_a_transcript_is_exported_and_replayed_without_the_platform(
    run: Run, coordinator: Coordinator, tmp_path: Path
) -> None:
    written = Written()
    coordinator.transcript = pack(written.transcript())
    anchors, file = tmp_path / "anchors.cbor", tmp_path / "round.cbor"
    anchors.write_bytes(pack(written.world.anchors))
    code, out, _ = run("round", "show", "fraud-1", "--transcript", file, "--data", tmp_path / "data", "--json")
    assert (code, json.loads(out)["transcript"]) == (0, str(file))
    assert file.read_bytes() == coordinator.transcript

    code, out, _ = run("round", "verify", file, "--anchors", anchors, "--json")
    assert code == 0
    [told] = json.loads(out)
    assert (told["holds"], told["round_id"], len(told["chosen"])) == (True, "fraud-7", 6)

    shares = written.transcript().shares
    forged = msgspec.structs.replace(written.transcript(), shares=(another(shares[0]), *shares[1:]))
    (tmp_path / "forged.cbor").write_bytes(pack(forged))
    code, out, err = run("round", "verify", file, tmp_path / "forged.cbor", "--anchors", anchors)
    assert code == 4
    assert f"{file}: round fraud-7: holds" in out
    assert "forged.cbor: round fraud-7: DOES NOT HOLD" in out
    assert "forged.cbor: openings: north: share 1 of the sum is not the one it signed" in err
    assert err.count("\n") == 1

    code, _, err = run("round", "verify", tmp_path / "none.cbor", "--anchors", anchors)
    assert (code, "expected a readable file" in err) == (2, True)
    code, _, err = run("round", "verify", file, "--anchors", file)
    assert (code, "expected trust anchors" in err) == (2, True)


def test_what_others_said_does_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    show({}, "relay of eu: \x1b[2J\x07 gone\r\nsecond line \u202e", as_json=False)
    assert capsys.readouterr().out == "relay of eu: ?[2J? gone?\nsecond line ?\n"
