"""The whole product's weight: the demo's time and memory, install sizes, `atoll --help`, the test suite's time.

`python -m benchmarks.skeleton [--only ID ...] [--json]`. Install sizes are the growth of `site-packages` in fresh
environments by a plain `pip install` from this checkout, the bytecode that pip compiles included; `no_bytecode` is the
same by `pip install --no-compile`, for devices with little storage. The demo's figures are those of its own report.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.claims import ROOT, Claim, at_most, run

HELP_RUNS = 9


def demo() -> list[Claim]:
    """Run the demo once with its defaults."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "atoll", "demo", "--report", folder, "--json"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        report = json.loads((Path(folder) / "report.json").read_text())
    return [
        at_most("demo.seconds", report["seconds"], "s", 180),
        at_most("demo.memory", report["memory_mb_peak"] / 1000, "GB", 2.5),
    ]


def install() -> list[Claim]:
    """Install the device and everything into fresh environments; MB on disk without pip itself."""
    return [
        at_most("install.mb", _installed_mb(), "MB (device)", 160),
        at_most("install.mb.no_bytecode", _installed_mb(options=["--no-compile"]), "MB (device, --no-compile)", 160),
        at_most("install.mb.all", _installed_mb("[all]"), "MB (atoll[all])", 600),
    ]


def _installed_mb(extra: str = "", options: Sequence[str] = ()) -> float:
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder) / "venv"
        venv.create(environment, with_pip=True)
        library = next(environment.glob("lib/python*/site-packages"))
        before = _bytes(library)
        command = [str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        subprocess.run([*command, *options, f"{ROOT}{extra}"], check=True)
        return (_bytes(library) - before) / 1e6


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def cli_help() -> list[Claim]:
    """Median time of `atoll --help` as a whole process, beside an interpreter that only imports typer."""
    return [
        at_most(
            "cli.help",
            _median_s([sys.executable, "-m", "atoll", "--help"]),
            "s",
            0.3,
            _median_s([sys.executable, "-c", "import typer"]),
        )
    ]


def _median_s(command: Sequence[str]) -> float:
    seconds = []
    for _ in range(HELP_RUNS):
        started = time.perf_counter()
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def tests() -> list[Claim]:
    """The whole test suite, as `make test` runs it, without set-up."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-n", "3", "--dist", "loadfile", "--no-loadscope-reorder"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    return [at_most("test.seconds", time.perf_counter() - started, "s", 360)]


PARTS: dict[str, Callable[[], list[Claim]]] = {"demo": demo, "install": install, "cli": cli_help, "test": tests}


def measure(options: argparse.Namespace) -> list[Claim]:
    """The parts asked for, in order."""
    return [claim for part in options.only or PARTS for claim in PARTS[part]()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", choices=sorted(PARTS), help="measure only these parts")
    run(__doc__ or "", measure, parser)
