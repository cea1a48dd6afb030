"""The process that ends what a killed supervisor leaves behind; the supervisor's side of it (`child` is the other).

It holds the reading end of a pipe and is told which process groups live; when the pipe ends, for whatever reason, it
ends what is left. Somebody may kill the guard too: then a new one learns all groups.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

from atoll import child as child_program

GUARD_SECONDS = 3.0
END_SECONDS = 60.0
"""It needs little more than the above, unless the machine stands still."""


class Guard:
    """`groups` are the process groups that live."""

    def __init__(self) -> None:
        self.groups: set[int] = set()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The guard's own process id; 0 when there is none."""
        return 0 if self._process is None else self._process.pid

    def start(self) -> None:
        """Start it, with the groups there are."""
        self._process = subprocess.Popen(
            [*isolated_child(), "guard", str(GUARD_SECONDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for group in self.groups:
            self._tell(f"+{group}\n")

    def watch(self, group: int) -> None:
        """`group` lives."""
        self.groups.add(group)
        self._tell(f"+{group}\n")

    def leave(self, group: int) -> None:
        """`group` is gone, and its id may be given to somebody else."""
        if group in self.groups:
            self.groups.discard(group)
            self._tell(f"-{group}\n")

    def replace_if_gone(self) -> None:
        """Start another one if somebody killed it."""
        if self._process is not None and self._process.poll() is not None:
            self._replace()

    def end(self) -> None:
        """Let it end what is left, and wait for it."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(BrokenPipeError):
            process.communicate(timeout=END_SECONDS)

    def _tell(self, line: str) -> None:
        process = self._process
        if process is None or process.stdin is None:
            return
        try:
            process.stdin.write(line.encode())
            process.stdin.flush()
        except BrokenPipeError:
            self._replace()

    def _replace(self) -> None:
        old, self._process = self._process, None
        if old is not None:
            with contextlib.suppress(BrokenPipeError):
                old.communicate()
        self.start()


def isolated_child() -> list[str]:
    """The command line of `child`, by path and isolated (-I -S): nothing of the user's environment is imported before
    exec, and it starts in 15 ms."""
    return [sys.executable, "-I", "-S", str(Path(child_program.__file__))]
