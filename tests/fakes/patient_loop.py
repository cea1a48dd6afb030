"""An event loop whose clock stands still while the machine does.

A test that gives a peer 0.2 seconds to answer means: before anything else happens here. On a machine that stops for
seconds, or that runs many things at once, those pass although nobody had a chance to do anything, and a deadline
strikes that the test is not about. This loop looks at the clock often and counts no more than a moment between two
looks. Deadlines strike as late as ever where nothing comes; what they are compared with is time that the loop has seen.
"""

from __future__ import annotations

import asyncio
import selectors

LOOK_S = 0.02
COUNTED_S = 0.05


class _Looks(selectors.DefaultSelector):
    """Waits no longer than `LOOK_S` where something is due later."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        return super().select(timeout if timeout is None else min(timeout, LOOK_S))


class PatientLoop(asyncio.SelectorEventLoop):
    """The usual loop; of the time between two looks at its clock it counts `COUNTED_S` at most."""

    def __init__(self) -> None:
        self._counted = self._seen = 0.0
        super().__init__(_Looks())

    def time(self) -> float:
        """Seconds, as `asyncio.timeout`, `sleep` and `call_later` count them here."""
        seen = super().time()
        self._counted += min(seen - self._seen, COUNTED_S)
        self._seen = seen
        return self._counted


class PatientLoops(asyncio.DefaultEventLoopPolicy):
    """Makes `asyncio.run` use such a loop."""

    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        """A new one."""
        return PatientLoop()
