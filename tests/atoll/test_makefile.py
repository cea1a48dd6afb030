"""The Makefile's targets exist, are explained, and do what they say; nothing is run or installed for it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TARGETS = {
    "demo": "{venv}/bin/atoll demo --seed 9",
    "test": "{venv}/bin/python -m pytest ",
    "lint": "{venv}/bin/lint-imports",
    "check": "{venv}/bin/python -m pytest ",
    "bench": "{venv}/bin/python -m benchmarks.all",
    "clean": "rm -rf {venv} ",
}
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*words: str) -> str:
    # The suite is itself run by make, which would tell this one to print folders, and what not to remake.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(["make", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_installs_into_its_own_folder_and_runs_its_command(tmp_path: Path, target: str) -> None:
    venv = tmp_path / "venv"
    would_run = make("-n", target, f"VENV={venv}", "DEMO_ARGS=--seed 9").splitlines()
    assert would_run[-1].startswith(TARGETS[target].format(venv=venv))
    assert any(line.startswith(f"{venv}/bin/python -m pip install") for line in would_run) == (target != "clean")
    assert not venv.exists()


def test_every_target_is_explained() -> None:
    named = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert named is not None
    assert set(named[1].split()) == {"help", *TARGETS}
    assert re.findall(r"^make (\w+) ", make("help"), re.MULTILINE) == list(TARGETS)
