"""The root of trust changes hands under a running platform, and its devices follow by themselves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.atoll.platform_process import answer, atoll, free_run, platform, write_mlp, write_rollout


def decided_by(device: subprocess.Popen[str], version: str) -> dict[str, Any]:
    """The device's first decision by `version`."""
    assert device.stdout is not None
    for line in device.stdout:
        told: dict[str, Any] = json.loads(line)
        if told["event"] == "decision" and told["version"] == version:
            return told
    raise AssertionError(f"the device ended without {version}: {device.communicate()[1]}")


@pytest.mark.slow
def test_a_device_follows_a_root_that_changes_hands_and_new_online_keys(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (tmp_path / "words").write_text("five random words are enough")
    words = ("--passphrase-file", str(tmp_path / "words"))
    sticks = [option for name in ("ann", "ben", "cho") for option in ("--stick", str(tmp_path / name))]
    with platform(data, "embedded", port=free_run(4)):
        first = answer(data, "publish", str(write_mlp(tmp_path / "first.onnx", 1)))["manifest"]
        answer(data, "rollout", "apply", str(write_rollout(tmp_path / "one.yaml", "one")))
        device = subprocess.Popen(
            [sys.executable, "-m", "atoll", "device", "run", "--data", str(data), "--rate", "5", "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            decided_by(device, first)
            assert answer(data, "trust", "status")["automatic"] == str(data / "trust" / "automatic")
            taken = answer(data, "trust", "init", *sticks, *words)
            assert taken["roles"][0]["can_sign"] == ["ann", "ben", "cho"]
            assert "automatic" not in answer(data, "trust", "status")
            answer(data, "trust", "rotate", "online", *sticks[:4], *words)
            second = answer(data, "publish", str(write_mlp(tmp_path / "second.onnx", 2)))["manifest"]
            assert atoll(data, "rollout", "abort", "one").returncode == 0
            answer(data, "rollout", "apply", str(write_rollout(tmp_path / "two.yaml", "two")))
            decided_by(device, second)
        finally:
            device.kill()
            device.communicate()
