"""What runs between the supervisor and a child, so that no child outlives its parent. Standard library only.

    child.py run PARENT_PID PROGRAM [ARGUMENT...]   become PROGRAM, to be killed by the kernel when the parent dies
    child.py guard SECONDS                          kill the process groups named on standard input when it ends

`run` sets PR_SET_PDEATHSIG (Linux, prctl(2)) on itself and then replaces itself: it survives exec, and unlike a
function between fork and exec it cannot deadlock. It does not reach the child's own children, and macOS has no such
thing. `guard` closes both gaps: one process per supervisor holds the reading end of a pipe; lines `+PGID` and `-PGID`
tell it which process groups live; when the pipe ends, for whatever reason, it ends what is left, politely for SECONDS.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time

PR_SET_PDEATHSIG = 1


def run(parent: int, argv: list[str]) -> None:
    """Replace this process by `argv`. Exit code 127 when there is no such program."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above
        sys.exit(1)
    try:
        os.execvp(argv[0], argv)
    except OSError as error:
        print(f"cannot run {argv[0]}: {error.strerror}", file=sys.stderr)
        sys.exit(127)


def guard(seconds: float) -> None:
    """Read group ids until standard input ends; then SIGTERM, at most `seconds` of patience, SIGKILL."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)  # it ends when the supervisor does, not before
    groups: set[int] = set()
    for line in sys.stdin:
        group = int(line[1:])
        if line[0] == "+":
            groups.add(group)
        else:
            groups.discard(group)
    send(groups, signal.SIGTERM)
    deadline = time.monotonic() + seconds
    while groups and time.monotonic() < deadline:
        time.sleep(0.05)
        send(groups, 0)
    send(groups, signal.SIGKILL)


def send(groups: set[int], number: int) -> None:
    """Signal every group (0: only look); groups that have ended leave the set."""
    for group in list(groups):
        try:
            os.killpg(group, number)
        except ProcessLookupError:
            groups.discard(group)
        except PermissionError:  # macOS says so of a group of zombies
            with contextlib.suppress(KeyError):
                groups.remove(group)


if __name__ == "__main__":
    if sys.argv[1] == "guard":
        guard(float(sys.argv[2]))
    else:
        run(int(sys.argv[2]), sys.argv[3:])
