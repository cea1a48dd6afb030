"""What `make bench` runs: every script that prints claims, and nothing else."""

from __future__ import annotations

import pytest

from benchmarks.all import FOLDER, every_subject, main


def test_every_script_that_prints_claims_is_a_subject() -> None:
    assert {"deltas", "flower_control", "robustness", "secure_aggregation", "skeleton", "training"} <= set(
        every_subject()
    )
    for subject in every_subject():
        text = (FOLDER / f"{subject}.py").read_text()
        assert "from benchmarks.claims import" in text
        assert "    run(" in text, f"benchmarks.{subject} prints nothing that could be drawn"


def test_a_subject_that_is_none_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("tasks", "training") == 2
    assert "found tasks" in capsys.readouterr().err
