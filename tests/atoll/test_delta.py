"""`atoll delta`: the target's name holds the right file or what it held before, whatever happens."""

from __future__ import annotations

import bz2
import contextlib
import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bsdiff4
import pytest

from atoll import cli
from model_delta.patch.container import FORMATS
from tests.model_delta.models import layers, model, nudged

WEIGHTS = layers(1, (6, 96, 64, 1))
OLD, NEW = model(WEIGHTS), model(nudged(WEIGHTS, 2, 1e-4))
Ran = tuple[int, str, str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Ran]]:
    """`run("make", ...)` in this process: exit code, standard output, standard error."""

    def call(*words: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["atoll", "delta", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return int(str(ended.value.code or 0)), said.out, said.err

    return call  # type: ignore[return-value]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "old").write_bytes(OLD)
    (tmp_path / "new").write_bytes(NEW)
    return tmp_path


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def refused(ran: Ran, code: int, *words: str) -> None:
    """One line, nothing else."""
    assert ran[0] == code, ran
    assert ran[1] == ""
    assert ran[2].count("\n") == 1, ran[2]
    for word in words:
        assert word in ran[2]


def value(ran: Ran) -> Any:
    assert ran[0] == 0, ran
    assert ran[2] == ""
    return json.loads(ran[1])


@pytest.mark.parametrize("format_name", FORMATS)
def test_make_apply_inspect(run: Callable[..., Ran], folder: Path, format_name: str) -> None:
    old, new, patch, out = (folder / name for name in ("old", "new", "patch", "out"))
    made = value(run("make", old, new, patch, "--format", format_name, "--json"))
    assert (made["format"], made["bytes"]) == (format_name, patch.stat().st_size)
    assert made["new"] == {"bytes": len(NEW), "sha256": digest(NEW)}
    if format_name == "bsdiff40":
        assert bsdiff4.patch(OLD, patch.read_bytes()) == NEW
    told = value(run("inspect", patch, "--json"))
    assert (told["format"], told["new_size"]) == (format_name, len(NEW))
    assert told["new_digest"] in (None, digest(NEW))
    told = value(run("inspect", patch, "--old", old, "--json"))
    assert format_name == "bsdiff40" or "layer0.weight" in told["changed"]
    applied = value(run("apply", old, patch, out, "--sha256", digest(NEW).upper(), "--json"))
    assert applied["sha256"] == digest(NEW)
    assert applied["compared"]
    assert out.read_bytes() == NEW
    assert sorted(path.name for path in folder.iterdir()) == ["new", "old", "out", "patch"]
    for words in (("make", old, new, patch), ("inspect", patch), ("apply", old, patch, out)):
        code, text, _ = run(*words)
        assert code == 0
        assert str(words[-1]) in text


def test_a_file_may_be_brought_forward_in_place(run: Callable[..., Ran], folder: Path) -> None:
    value(run("make", folder / "old", folder / "new", folder / "patch", "--json"))
    value(run("apply", folder / "old", folder / "patch", folder / "old", "--json"))
    assert (folder / "old").read_bytes() == NEW


def test_a_wrong_old_file_is_refused_by_what_the_patch_says(run: Callable[..., Ran], folder: Path) -> None:
    value(run("make", folder / "old", folder / "new", folder / "patch", "--format", "tp1", "--json"))
    (folder / "wrong").write_bytes(bytes(len(OLD)))
    refused(run("apply", folder / "wrong", folder / "patch", folder / "out"), 4, "old file")
    refused(run("inspect", folder / "patch", "--old", folder / "wrong"), 4)
    assert not (folder / "out").exists()


def test_a_wrong_digest_leaves_what_was_there(run: Callable[..., Ran], folder: Path) -> None:
    value(run("make", folder / "old", folder / "new", folder / "patch", "--json"))
    wrong = folder / "wrong"
    wrong.write_bytes(bytes(len(OLD)))
    for out in (folder / "out", folder / "new"):
        ran = run("apply", wrong, folder / "patch", out, "--sha256", digest(NEW))
        refused(ran, 4, "not written", digest(NEW), "old file")
    assert sorted(path.name for path in folder.iterdir()) == ["new", "old", "patch", "wrong"]
    assert (folder / "new").read_bytes() == NEW


def test_damaged_patches_are_refused_by_name(run: Callable[..., Ran], folder: Path) -> None:
    value(run("make", folder / "old", folder / "new", folder / "patch", "--json"))
    good = (folder / "patch").read_bytes()
    for bad in (b"", good[:100], good[:-1], good + b"x", good[:40] + b"\xff" + good[41:]):
        (folder / "patch").write_bytes(bad)
        refused(run("apply", folder / "old", folder / "patch", folder / "out"), 2, "patch")
    (folder / "patch").write_bytes(good)
    (folder / "short").write_bytes(OLD[:100])
    refused(run("apply", folder / "short", folder / "patch", folder / "out"), 2, "made for another one")
    (folder / "patch").write_bytes(good[:24] + (1 << 50).to_bytes(8, "little") + good[32:])
    refused(run("apply", folder / "old", folder / "patch", folder / "out"), 2)
    refused(run("inspect", folder / "old"), 2, "old", "expected one of bsdiff40")
    assert sorted(path.name for path in folder.iterdir()) == ["new", "old", "patch", "short"]


def test_names_and_options_that_cannot_be(run: Callable[..., Ran], folder: Path) -> None:
    old, new, patch = folder / "old", folder / "new", folder / "patch"
    os.mkfifo(folder / "pipe")
    refused(run("make", old, folder / "none", patch), 2, "none", "readable file")
    refused(run("make", old, folder, patch), 2, "expected a file")
    refused(run("make", old, folder / "pipe", patch), 2, "expected a file")
    refused(run("make", old, new, new), 2, "a name of its own")
    refused(run("make", old, new, folder / "none" / "patch"), 2, "existing folder")
    refused(run("make", old, new, folder), 2, "expected the name of a file")
    refused(run("make", old, new, patch, "--format", "xdelta"), 2, "--format", "bsdiff40", "'xdelta'")
    value(run("make", old, new, patch, "--json"))
    refused(run("apply", old, patch, patch), 2, "a name of its own")
    refused(run("apply", old, patch, folder / "out", "--sha256", "abc"), 2, "64 hexadecimal digits", "'abc'")
    assert sorted(path.name for path in folder.iterdir()) == ["new", "old", "patch", "pipe"]


SMALL_DISK = """
import resource, signal, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.argv = ["atoll", "delta", *sys.argv[1:]]
from atoll.cli import main
main()
"""


def test_a_full_disk_is_one_line_and_leaves_nothing(run: Callable[..., Ran], folder: Path) -> None:
    value(run("make", folder / "old", folder / "new", folder / "patch", "--json"))
    words = ["apply", str(folder / "old"), str(folder / "patch"), str(folder / "out")]
    ran = subprocess.run([sys.executable, "-B", "-c", SMALL_DISK, *words], capture_output=True, text=True)
    refused((ran.returncode, ran.stdout, ran.stderr), 2, str(folder / "out"), "free some space")
    assert sorted(path.name for path in folder.iterdir()) == ["new", "old", "patch"]


def _something_written(folder: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):  # it has got its name meanwhile
        return any(path.name.endswith(".part") and path.stat().st_size for path in folder.iterdir())
    return True


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_command_leaves_nothing(tmp_path: Path, number: int, code: int) -> None:
    size = 60_000_000
    control, difference, extra = map(bz2.compress, (struct.pack("<QQQ", size, 0, 0), bytes(size), b""))
    header = b"BSDIFF40" + struct.pack("<QQQ", len(control), len(difference), size)
    (tmp_path / "patch").write_bytes(header + control + difference + extra)
    with (tmp_path / "old").open("wb") as old:
        old.truncate(size)
    words = [str(tmp_path / name) for name in ("old", "patch", "out")]
    for _ in range(20):  # on a busy machine it may be done before this process looks again
        running = subprocess.Popen([sys.executable, "-m", "atoll", "delta", "apply", *words], stderr=subprocess.PIPE)
        while running.poll() is None and not _something_written(tmp_path):
            pass
        running.send_signal(number)
        assert running.communicate()[1] == b""
        if running.returncode:
            break
        (tmp_path / "out").unlink()
    assert running.returncode == code
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "patch"]
