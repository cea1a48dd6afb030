"""A demo that is interrupted, on its way up or in its middle, by whoever started it: nothing is left behind."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.scenarios.chaos import Demo, demo
from tests.systems import on_linux

pytestmark = [on_linux, pytest.mark.slow(seconds=20)]


@pytest.mark.parametrize(
    ("at", "presses", "code"),
    [
        (None, [(signal.SIGINT, True)], 130),
        ("starting regions", [(signal.SIGTERM, False)], 143),
        ("training on history", [(signal.SIGINT, True), (signal.SIGINT, True)], 130),
    ],
    ids=["while it starts", "SIGTERM with half of the processes up", "Ctrl-C twice"],
)
def test_an_interrupted_demo_leaves_nothing_behind(
    tmp_path: Path, at: str | None, presses: list[tuple[signal.Signals, bool]], code: int
) -> None:
    with demo(tmp_path, options=("--seed", "11")) as running:
        _reach(running, at)
        if at == "starting regions":
            fleets = [line for line in running.below().values() if "fleet run" in line]
            assert fleets, "they start with the regions"
            assert all(" --seed 11 " in line for line in fleets)
        for number, group in presses:
            running.signal(number, group=group)
            time.sleep(0.3)
            running.below()
        # Death by the signal is what a shell shows as 130, too: the last one came when everything was tidied up.
        assert running.end(90.0) in (code, -signal.SIGINT)
        assert running.leftovers() == []
        assert not any("Traceback" in line for _, line in running.lines[5:])


def _reach(running: Demo, at: str | None) -> None:
    if at is None:
        time.sleep(0.5)
        return
    if not running.wait_for(at, 150):
        pytest.fail(f"the demo did not come to {at!r}:\n" + "\n".join(line for _, line in running.lines))
    end = time.monotonic() + 0.7
    while time.monotonic() < end:
        running.below()
        time.sleep(0.05)
