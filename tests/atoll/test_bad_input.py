"""What a person gets wrong: one line says what was found, what was expected and what to do; nothing is half-done."""

import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from atoll import cli
from atoll.platform import Layout, prepare
from atoll.settings import DataFolder
from device_sim.payments_csv import COLUMNS
from tests.atoll.platform_process import Platform, answer, atoll, free_run, platform, write_gemm, write_rollout

Run = tuple[int, str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[object]:
    """`run("publish", ...)` in this process: its exit code and what it said on standard error, one line."""

    def call(*words: object) -> Run:
        monkeypatch.setattr(sys, "argv", ["atoll", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr().err
        assert said.count("\n") == 1, said
        return int(str(ended.value.code)), said

    yield call  # noqa: PT022 - the fixtures it uses end after it


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """The data folder of a platform that is not running."""
    first = free_run(4)
    ports = iter(range(first, first + 4))
    folder = DataFolder.open(tmp_path / "data", create=True)
    prepare(folder, Layout(regions=("eu-west",), broker="embedded"), lambda what: next(ports))
    return folder.path


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_port_that_is_taken_leaves_no_folder(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, said = run("up", "--data", tmp_path / "new", "--port", port)
    assert code == 2
    assert f"port {port} (coordinator): expected it free, found it taken" in said
    assert "--port" in said
    assert not (tmp_path / "new").exists()


def test_a_folder_keeps_its_ports_and_says_when_one_was_taken(run, stopped: Path) -> None:  # type: ignore[no-untyped-def]
    before = everything(stopped)
    port = DataFolder.open(stopped).endpoints().broker.port
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        code, said = run("up", "--data", stopped, "--broker", "embedded")
    assert (code, f"port {port} (broker)" in said) == (2, True), said
    assert {name: data for name, data in everything(stopped).items() if name != "lock"} == before


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--report", "FILE"), "FILE: expected a folder, found that FILE is a file; pass another"),
        (("--report", "FILE/below"), "FILE/below: expected a folder, found that FILE is a file"),
        (("--report", "NEW/report", "--broker", "rabbit"), "--broker: expected auto, mosquitto or embedded"),
    ],
)
def test_a_demo_that_cannot_begin_makes_nothing(  # type: ignore[no-untyped-def]
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], expected: str
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    file = tmp_path / "file"
    file.write_text("mine")
    placed = [word.replace("FILE", str(file)).replace("NEW", str(tmp_path / "new")) for word in words]
    code, said = run("demo", *placed)
    assert (code, expected.replace("FILE", str(file)) in said) == (2, True), said
    assert {path.name for path in tmp_path.rglob("*")} == {"tmp", "file"}
    assert file.read_text() == "mine"


@pytest.mark.parametrize("words", [(), ("m.onnx", "--join"), ("--join", "--threshold", "0.5")])
def test_publishing_takes_a_file_or_joins(run, stopped: Path, words: tuple[str, ...]) -> None:  # type: ignore[no-untyped-def]
    code, said = run("publish", *words, "--data", stopped)
    assert (code, "expected MODEL.onnx, or --join alone" in said) == (2, True), said


def test_a_command_whose_extras_are_not_installed(stopped: Path) -> None:
    program = (
        "import sys; sys.modules['uvicorn'] = None; sys.argv = ['atoll', 'gateway', 'run', '--data', sys.argv[1]]\n"
        "from atoll.cli import main; main()"
    )
    ran = subprocess.run([sys.executable, "-c", program, str(stopped)], capture_output=True, text=True, timeout=60)
    expected = "atoll: uvicorn is not installed: expected the extras of this command; pip install 'atoll[all]'\n"
    assert (ran.returncode, ran.stdout, ran.stderr) == (2, "", expected)


def test_options_that_name_what_does_not_exist(run, stopped: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for words, expected in (
        (("up", "--data", tmp_path / "new", "--broker", "rabbit"), "--broker: expected auto, mosquitto or embedded"),
        (("up", "--data", tmp_path / "new", "--region", "a b"), "found 'gateway-a b'"),
        (("gateway", "run", "--region", "mars"), "region 'mars': expected one of eu-west"),
        (("device", "run", "--region", "mars"), "region 'mars': expected one of eu-west; pass --region"),
        (("device", "run", "--class", "toaster"), "--class: expected one of pos, phone, pi, mcu, found 'toaster'"),
        (("device", "run", "--id", "a b"), "found 'a b'"),
        (("device", "run", "--id", "coordinator"), "expected a device's name, such as pos-0001"),
        (("fleet", "run", "--shard", "2"), "--shard: expected I/N with I below N, such as 0/2, found '2'"),
        (("fleet", "run", "--shard", "2/2"), "found '2/2'"),
        (("device", "run", "--model", "fraud#"), "model: expected a name of lower-case letters, digits, '-' and '.'"),
        (("fleet", "run", "--model", "My Fraud"), "found 'My Fraud'; pass another"),
        (("aggregator", "run"), "started without aggregators; use `atoll up --learning`"),
        (("publish", tmp_path / "none.onnx"), "none.onnx: expected a readable file, found: No such file or directory"),
        (("publish", tmp_path), "Is a directory"),
        (("publish", tmp_path / "none.onnx", "--feature-set", "x"), "--feature-set: expected terminal-26-v1 or"),
        (("rollout", "apply", tmp_path / "none.yaml"), "none.yaml: expected a readable file"),
        (("device", "run", "--payments", tmp_path / "none.csv"), "none.csv: cannot be read"),
        (("fleet", "run", "--payments", tmp_path / "none.csv"), "none.csv: cannot be read"),
        (("device", "run", "--model", "m", "--inputs", tmp_path / "none.json"), "none.json: cannot be read"),
        (("device", "run", "--payments", tmp_path, "--inputs", tmp_path), "--inputs: expected without --payments"),
    ):
        more = () if words[0] == "up" else ("--data", stopped)
        code, said = run(*words, *more)
        assert code == 2, (words, said)
        assert expected in said
    assert not (tmp_path / "new").exists()
    assert {path.name for path in (stopped / "identities").iterdir()} == {"broker", "coordinator"}


def test_a_device_that_runs_is_not_run_a_second_time_by_a_fleet(run, stopped: Path) -> None:  # type: ignore[no-untyped-def]
    """The fleet's first terminal has the name that `atoll device run` takes by default."""
    with DataFolder.open(stopped).locked("device-pos-0001.lock"):
        code, said = run("fleet", "run", "--devices", "2", "--data", stopped)
    assert (code, "device pos-0001 runs on this data folder; stop it or pass another --data, or --absent" in said) == (
        2,
        True,
    ), said


def test_a_rollout_that_is_not_text_names_file_and_line(run, stopped: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "latin.yaml"
    file.write_bytes(b"apiVersion: atoll/v1\nkind: \xe9\n")
    code, said = run("rollout", "apply", file, "--data", stopped)
    assert (code, f"{file}:2: expected text in UTF-8, found byte 0xe9" in said) == (2, True), said


def test_payments_without_some_columns(run, stopped: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "payments.csv"
    file.write_text("Time,V1,Amount\n0,1.0,3.5\n")
    before = everything(stopped)
    for command in ("device", "fleet"):
        code, said = run(command, "run", "--payments", file, "--data", stopped)
        assert code == 2
        assert f"{file}: missing columns V2, V3" in said
        assert "found Time, V1, Amount; expected Time, V1..V28, Amount, Class" in said
    assert everything(stopped) == before


def test_payments_that_cannot_be_dealt(run, stopped: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "payments.csv"
    before = everything(stopped)
    for frauds, devices, expected in (
        (0, 4, "payments: no fraud in the first 40 % of 12 rows; expected some, use more rows"),
        (12, 20, "payments: 12 rows cannot be dealt to 20 devices; use fewer devices"),
    ):
        rows = [f"{second},{','.join(['0.5'] * 28)},9.5,{int(second < frauds)}" for second in range(12)]
        file.write_text("\n".join([",".join(COLUMNS), *rows]))
        code, said = run("fleet", "run", "--payments", file, "--devices", devices, "--data", stopped)
        assert (code, expected in said) == (2, True), said
    assert everything(stopped) == before


def test_a_folder_of_a_newer_atoll(run, stopped: Path) -> None:  # type: ignore[no-untyped-def]
    (stopped / "format").write_text("9\n")
    before = everything(stopped)
    for words in (("up",), ("device", "run"), ("rollout", "status"), ("coordinator", "run")):
        code, said = run(*words, "--data", stopped)
        assert (code, "expected a data folder of format 1 or older, found 9; upgrade atoll" in said) == (2, True), said
    assert everything(stopped) == before


def test_folders_that_are_none_or_damaged(run, stopped: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "file"
    file.write_text("hello")
    for path, expected in (
        (tmp_path / "nothing", "start one with `atoll up --data"),
        (file, "expected an Atoll data folder"),
    ):
        code, said = run("rollout", "status", "--data", path)
        assert (code, expected in said) == (2, True), said
    code, said = run("up", "--data", file)
    assert (code, file.read_text()) == (2, "hello"), said
    (stopped / "tokens.json").write_text("{}")
    code, said = run("rollout", "status", "--data", stopped)
    assert (code, "tokens.json: expected tokens of admin" in said) == (2, True), said
    (stopped / "format").write_bytes(b"\xff\xfe")
    code, said = run("rollout", "status", "--data", stopped)
    assert (code, "expected a format number" in said) == (2, True), said


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user who may not read")
def test_a_folder_that_this_user_may_not_read(run, stopped: Path) -> None:  # type: ignore[no-untyped-def]
    stopped.chmod(0o700)
    os.seteuid(65534)
    try:
        code, said = run("rollout", "status", "--data", stopped)
    finally:
        os.seteuid(0)
    assert code == 2
    assert "Permission denied" in said
    assert "--data" in said


def test_a_platform_that_is_away_is_tried_and_then_said(run, stopped: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model = write_gemm(tmp_path / "m.onnx")
    for words in (("publish", model), ("rollout", "status"), ("round", "status"), ("device", "run")):
        began = time.monotonic()
        code, said = run(*words, "--data", stopped, "--contact", "0.5")
        assert time.monotonic() - began > 0.4
        assert code == 2
        assert "Connection refused" in said
        assert "tried for 0.5 s; is `atoll up` running" in said


@pytest.mark.slow
@pytest.mark.parametrize("bytes_left", [1, 100, 1_000])
def test_a_full_disk_under_a_new_platform(tmp_path: Path, bytes_left: int) -> None:
    """RLIMIT_FSIZE is the kernel's own refusal of a write; Python gets it as an OSError as from a full disk.

    Python itself would leave half a bytecode file behind under such a limit, for all later processes to stumble over.
    """
    done = subprocess.run(
        [sys.executable, "-m", "atoll", "up", "--data", str(tmp_path / "d"), "--port", str(free_run(4))],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, bytes_left)),
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "File too large" in done.stderr
    assert "free some space" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 2.5 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2500k", "none", str(place)], capture_output=True)
    if done.returncode:
        pytest.skip("no permission to mount a small file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.slow
def test_a_full_disk_under_a_running_platform(run, small_disk: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    large = tmp_path / "large.onnx"
    large.write_bytes(write_gemm(tmp_path / "m.onnx").read_bytes())
    with platform(small_disk / "data", port=free_run(4)) as running:
        (small_disk / "ballast").write_bytes(b"x" * 1_000)
        free = os.statvfs(small_disk)
        (small_disk / "ballast").write_bytes(bytes(free.f_bavail * free.f_frsize - 8_192))
        code, said = run("publish", large, "--data", running.data)
        assert (code, "free some space" in said) == (2, True), said
        (small_disk / "ballast").unlink()
        assert answer(running.data, "publish", str(large))["release"] == 1


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with platform(tmp_path_factory.mktemp("bad") / "data", port=free_run(4)) as found:
        yield found


@pytest.mark.slow
def test_what_only_the_coordinator_can_tell(run, running: Platform, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    text, few, broken = tmp_path / "notes.onnx", write_gemm(tmp_path / "few.onnx", 7), tmp_path / "canary.yaml"
    text.write_text("not a model\n" * 50)
    write_rollout(broken, "bad")
    broken.write_text(broken.read_text().replace("share: 25%", "share: 250%"))
    for words, expected in (
        (("publish", text), f"{text}: model fraud: expected an ONNX model, found plain text; export it with"),
        (("publish", few), "expected the one input 'features' float32[batch, 26], found 'features' float32[?, 7]"),
        (("rollout", "apply", broken), "canary.yaml:20: "),
        (("rollout", "status", "none"), "rollout 'none': there is none of that name"),
        (("round", "status", "none"), "none"),
        (("round", "run"), "no stable version"),
    ):
        code, said = run(*words, "--data", running.data)
        assert code == 2, (words, said)
        assert expected in said, said
    assert answer(running.data, "rollout", "status") == []
    assert answer(running.data, "round", "status") == []


@pytest.mark.slow
def test_a_broker_that_is_away(run, running: Platform) -> None:  # type: ignore[no-untyped-def]
    """The device is enrolled; then its folder says that the broker is where nobody listens."""
    assert atoll(running.data, "device", "run", "--id", "pos-0009", "--count", "1").returncode == 0
    folder = DataFolder.open(running.data)
    before = (running.data / "endpoints.json").read_bytes()
    port = folder.endpoints().broker.port
    (running.data / "endpoints.json").write_bytes(before.replace(str(port).encode(), b"9"))
    try:
        done = atoll(running.data, "device", "run", "--id", "pos-0009", "--contact", "1")
    finally:
        (running.data / "endpoints.json").write_bytes(before)
    assert done.returncode == 2, done.stderr
    assert "broker 127.0.0.1:9: no connection as pos-0009 within 1 s; is it running" in done.stderr
    assert done.stderr.count("\n") == 1
