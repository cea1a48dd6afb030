"""Ctrl-C, SIGTERM and a closed terminal, for a program that must leave nothing behind.

A signal is remembered and, while there is a task to cancel, cancels it; it never raises in the middle of something.
So what was begun (a folder made, a process started) always reaches the block that undoes it, however often and
however late somebody presses Ctrl-C.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Self

ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Endings:
    """Hears the signals that ask this process to end, while entered (in the main thread). What the process was told
    to ignore when it started (as `nohup` does) stays ignored."""

    def __init__(self) -> None:
        self.received = 0
        """The number of the first signal; 0 when there was none."""
        self._cancel: Callable[[], object] | None = None
        self._before: list[tuple[signal.Signals, object]] = []

    def __enter__(self) -> Self:
        for number in ENDINGS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before.append((number, signal.signal(number, self._hear)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before:
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before.clear()

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        if self._cancel is not None:
            self._cancel()

    @contextlib.contextmanager
    def cancelling(self) -> Iterator[None]:
        """In the block, each signal cancels the task that runs it; so does one that came before."""
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        self._cancel = lambda: loop.call_soon_threadsafe(task.cancel)
        if self.received:
            self._cancel()
        try:
            yield
        finally:
            self._cancel = None
