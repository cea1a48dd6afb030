from __future__ import annotations

import time

import numpy as np

from atoll.timing import RUNS_MAX, medians_us


def test_models_are_timed_by_turns_so_that_a_busy_spell_slows_all_alike() -> None:
    calls: list[str] = []
    medians_us([lambda: calls.append("int8"), lambda: calls.append("float32")])
    assert calls == ["int8", "float32"] * (RUNS_MAX + 1)


def test_only_the_work_itself_counts() -> None:
    def work() -> None:
        np.sort(np.arange(1 << 16)[::-1])

    def pause() -> None:
        time.sleep(0.002)

    worked, paused = medians_us([work, pause], seconds=0.02)
    assert 0 < paused < worked


def test_slow_ones_are_not_called_for_ever() -> None:
    calls: list[int] = []

    def slow() -> None:
        calls.append(1)
        np.sort(np.random.default_rng(1).random(1 << 14))

    medians_us([slow], seconds=0.0)
    assert len(calls) == 2
