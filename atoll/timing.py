"""What answers cost in processor time, of several models under the same conditions."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

RUNS_MAX = 200
SECONDS_MAX = 2.0


def medians_us(runs: Sequence[Callable[[], object]], *, seconds: float = SECONDS_MAX) -> list[float]:
    """Median microseconds of each of `runs`, called `RUNS_MAX` times or for about `seconds` of work each.

    Processor time of this thread, not time on the wall: a busy machine must not decide. They are called by turns,
    because neighbours in the same core and cache cost processor time too: what slows one then slows the others. The
    first turn pays for caches and pages and does not count.
    """
    for run in runs:
        run()
    turns: list[list[float]] = []
    spent = 0.0
    while not turns or (len(turns) < RUNS_MAX and spent < seconds * len(runs)):
        turns.append([_seconds(run) for run in runs])
        spent += sum(turns[-1])
    return [1e6 * statistics.median(times) for times in zip(*turns, strict=True)]


def _seconds(run: Callable[[], object]) -> float:
    started = time.thread_time()
    run()
    return time.thread_time() - started
