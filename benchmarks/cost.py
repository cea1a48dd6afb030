"""What a function costs in a process of its own: CPU seconds and the most memory it held.

`python -m benchmarks.cost MODULE:FUNCTION [ARGUMENT ...]` imports the module, calls the function with the words given
and prints one JSON line. The peak is VmHWM of /proc/self/status; `ru_maxrss` would be wrong, because a child started by
vfork inherits its parent's high-water mark. CPU seconds are the call's alone, all threads, without the imports.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from benchmarks.claims import ROOT


class Cost(msgspec.Struct, frozen=True):
    """CPU seconds of the call, peak memory of the process in MB (10**6 bytes), and what the function returned."""

    cpu_s: float
    peak_mb: float
    result: int


def of(function: str, *arguments: object) -> Cost:
    """Run `module:function` in a fresh interpreter. Raises CalledProcessError when it fails."""
    command = [sys.executable, "-m", "benchmarks.cost", function, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE)
    return msgspec.json.decode(done.stdout, type=Cost)


def main(function: str, *arguments: str) -> None:
    """Call and print."""
    module, name = function.split(":")
    called = getattr(importlib.import_module(module), name)
    started = time.process_time()
    result = called(*arguments)
    spent = time.process_time() - started
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    print(json.dumps({"cpu_s": spent, "peak_mb": peak / 1e6, "result": int(result or 0)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
