"""How many lines alike a process writes into its log: who is refused again and again must not fill the disk with it.

Every refusal of something that came from outside is a line in the log, and whoever is refused decides how often that
happens. So of lines that one statement writes the first thousand are written, and after that one a second; the next one
that is written says how many were left out. What matters of each is counted in metrics anyway.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

AT_ONCE, EACH_S = 1_000, 1.0
STATEMENTS_MAX = 4_096


class FewAlike(logging.Filter):
    """Of the records of one statement `at_once` pass, and one more every `each_s` seconds. `clock` is monotonic."""

    def __init__(
        self, at_once: int = AT_ONCE, each_s: float = EACH_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self._at_once, self._each_s, self._clock = at_once, each_s, clock
        self._one = threading.Lock()
        self._seen: dict[tuple[str, int], tuple[float, float, int]] = {}  # lines that may pass, since when; left out

    def filter(self, record: logging.LogRecord) -> bool:
        """See the class. From any thread."""
        statement, now = (record.pathname, record.lineno), self._clock()
        with self._one:
            left, since, out = self._seen.pop(statement, (float(self._at_once), now, 0))
            left = min(self._at_once, left + (now - since) / self._each_s)
            passes = left >= 1
            while len(self._seen) >= STATEMENTS_MAX:
                del self._seen[next(iter(self._seen))]
            self._seen[statement] = (left - 1, now, 0) if passes else (left, now, out + 1)
        if passes and out:
            record.msg, record.args = f"{record.getMessage()} (and {out} more like this were left out)", ()
        return passes
