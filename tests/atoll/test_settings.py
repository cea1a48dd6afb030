import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from atoll.settings import (
    INT8_WORTH,
    Broker,
    ConfigurationError,
    DataFolder,
    Endpoints,
    quiet_environment,
    require_free_port,
    write_private,
)
from device_sim.population import CLASSES
from model_delta.errors import StorageFull
from model_delta.patch.quantization import Worth


def test_a_folder_is_created_once_and_opened_again(tmp_path: Path) -> None:
    first = DataFolder.open(tmp_path / "data", create=True)
    tokens = first.tokens()
    again = DataFolder.open(tmp_path / "data")
    assert again.tokens() == tokens
    assert len(set(tokens.values())) == len(tokens)


def test_an_empty_folder_that_others_may_read_is_closed_to_them(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    DataFolder.open(tmp_path, create=True)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700


def test_a_folder_of_a_newer_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    DataFolder.open(tmp_path, create=True)
    (tmp_path / "format").write_text("7\n")
    with pytest.raises(ConfigurationError, match=r"format 1 or older, found 7; upgrade atoll"):
        DataFolder.open(tmp_path, create=True)
    assert (tmp_path / "format").read_text() == "7\n"


def test_somebody_elses_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigurationError, match="found other files; pass another --data"):
        DataFolder.open(tmp_path, create=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thesis.tex"]


def test_a_missing_folder_says_how_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="atoll up --data"):
        DataFolder.open(tmp_path / "nowhere")


def test_private_files_are_private(tmp_path: Path) -> None:
    folder = DataFolder.open(tmp_path / "data", create=True)
    folder.tokens()
    assert stat.S_IMODE((folder.path / "tokens.json").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.child("logs").stat().st_mode) & 0o077 == 0


def test_two_platforms_do_not_share_a_folder(tmp_path: Path) -> None:
    folder = DataFolder.open(tmp_path, create=True)
    with (
        folder.locked(),
        pytest.raises(ConfigurationError, match="another atoll is running"),
        DataFolder.open(tmp_path).locked(),
    ):
        pass
    with folder.locked():
        pass


def test_endpoints_come_back_as_written(tmp_path: Path) -> None:
    folder = DataFolder.open(tmp_path, create=True)
    with pytest.raises(ConfigurationError, match="no platform was started here"):
        folder.endpoints()
    endpoints = Endpoints(
        coordinator="http://127.0.0.1:1", broker=Broker("127.0.0.1", 2, "embedded"), gateways={"eu-west": "http://x:3"}
    )
    folder.write_endpoints(endpoints)
    assert folder.endpoints() == endpoints


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    write_private(path, b"old")
    (tmp_path / "full").mkdir()
    with pytest.raises(StorageFull, match="cannot write"):
        write_private(tmp_path / "full", b"a file cannot replace a folder")
    assert path.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "kept"]


def test_a_taken_port_is_named_with_its_option() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=rf"port {port} \(broker\).*taken.*--port"):
            require_free_port(port, "broker", "--port")
    assert require_free_port(port, "broker", "--port") == port


def test_the_environment_of_children_is_quiet() -> None:
    environment = quiet_environment()
    assert environment["ORT_DISABLE_TELEMETRY"] == "1"
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert environment["PATH"] == os.environ["PATH"]


def test_what_a_process_writes_is_its_own_whatever_the_umask(tmp_path: Path) -> None:
    program = (
        "import os, sys; os.umask(0)\n"
        "from pathlib import Path\n"
        "from atoll.entry import run_process\n"
        "async def main(): Path(sys.argv[1]).write_text('figures')\n"
        "run_process(main(), 'test')\n"
    )
    written = tmp_path / "ledger"
    subprocess.run([sys.executable, "-c", program, str(written)], check=True, timeout=30)
    assert stat.S_IMODE(written.stat().st_mode) == 0o600


def test_what_int8_is_worth_is_told_for_every_class_of_device() -> None:
    assert INT8_WORTH.keys() == CLASSES.keys()
    for figures in INT8_WORTH.values():
        worth = Worth(**figures)
        assert 0 < worth.smaller < 1
        assert worth.faster < 1 < worth.slower_max
