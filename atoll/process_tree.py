"""What the system says about processes: who descends from whom, who is in which group, how much memory they use."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path


def process_table() -> dict[int, tuple[int, int]]:
    """pid -> (parent's pid, process group) of every process that this user may see; zombies are left out."""
    found: dict[int, tuple[int, int]] = {}
    if sys.platform != "linux":
        told = subprocess.run(["ps", "-axo", "pid=,ppid=,pgid=,stat="], capture_output=True, text=True, check=False)
        for line in told.stdout.splitlines():
            pid, parent, group, state = line.split(None, 3)
            if not state.startswith("Z"):
                found[int(pid)] = (int(parent), int(group))
        return found
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                # The name in parentheses may hold anything, so count from its end: state, ppid, pgrp.
                state, parent, group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
                if state != "Z":
                    found[int(entry.name)] = (int(parent), int(group))
    return found


def members(root: int, groups: Iterable[int] = (), table: Mapping[int, tuple[int, int]] | None = None) -> set[int]:
    """`root`, all its descendants, and everything in `groups` with their descendants."""
    table = process_table() if table is None else table
    wanted = set(groups)
    inside = {pid for pid, (_, group) in table.items() if pid == root or group in wanted}
    while more := {pid for pid, (parent, _) in table.items() if parent in inside} - inside:
        inside |= more
    return inside


def tree_memory_bytes(root: int, groups: Iterable[int] = ()) -> int:
    """Memory of `members(root, groups)` in bytes: proportional set sizes on Linux, so that shared pages count once;
    resident set sizes elsewhere, and where the system does not tell the other."""
    inside = members(root, groups)
    if sys.platform != "linux":
        told = subprocess.run(["ps", "-axo", "pid=,rss="], capture_output=True, text=True, check=False)
        pairs = (line.split() for line in told.stdout.splitlines())
        return sum(int(kilobytes) * 1_024 for pid, kilobytes in pairs if int(pid) in inside)
    return sum(_memory_bytes(pid) for pid in inside)


def _memory_bytes(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1_024
    except OSError:
        pass
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0  # it ended while we looked


def others_in_group(group: int) -> bool:
    """Is a living process other than the leader in the group?"""
    return any(found == group and pid != group for pid, (_, found) in process_table().items())
