"""What is on disk: two slots, one pointer, the record, and blobs on their way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from edge_runtime.slots import Slots, UpdateRecord, replace_file
from edge_runtime.update import State
from model_delta.digest import digest_of
from model_delta.errors import DigestMismatch, Malformed, NotFound, StorageFull
from tests.edge_runtime.world import World


def test_a_new_device_has_nothing(tmp_path: Path) -> None:
    slots = Slots(tmp_path)
    assert slots.pointer() is None
    assert slots.installed("a") is None
    assert slots.installed(None) is None
    assert slots.read_record() == UpdateRecord()


def test_a_slot_in_use_is_never_written_and_a_wrong_file_never_kept(tmp_path: Path) -> None:
    world = World(tmp_path)
    release = world.publish(world.model(seed=1))
    slots = Slots(tmp_path / "state")
    file = world.files[release.digest]
    with pytest.raises(DigestMismatch, match="model file for slot a"):
        slots.write_slot("a", release.envelope, file + b"x")
    assert slots.installed("a") is None
    slots.write_slot("a", release.envelope, file)
    slots.point_to("a")
    assert (slots.pointer(), slots.inactive()) == ("a", "b")
    with pytest.raises(Malformed, match="slot a: in use"):
        slots.write_slot("a", release.envelope, file)
    again = Slots(tmp_path / "state")
    version = again.installed("a")
    assert version is not None
    assert version.digest == release.digest
    assert again.model_file(version).read_bytes() == file


def test_a_damaged_or_missing_model_file_is_found_when_it_is_read(tmp_path: Path) -> None:
    world = World(tmp_path)
    release = world.publish(world.model(seed=1))
    slots = Slots(tmp_path / "state")
    slots.write_slot("a", release.envelope, world.files[release.digest])
    version = slots.installed("a")
    assert version is not None
    path = tmp_path / "state" / "slots" / "a" / "model.bin"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(DigestMismatch, match="model file of slot a"):
        slots.model_file(version)
    path.unlink()
    with pytest.raises(NotFound, match=r"expected .*model.bin, found none"):
        slots.model_file(version)


def test_a_slot_without_its_manifest_is_empty(tmp_path: Path) -> None:
    """The power went off between the model file and the manifest."""
    world = World(tmp_path)
    release = world.publish(world.model(seed=1))
    slots = Slots(tmp_path / "state")
    slots.write_slot("b", release.envelope, world.files[release.digest])
    (tmp_path / "state" / "slots" / "b" / "manifest.envelope").unlink()
    assert Slots(tmp_path / "state").installed("b") is None


def test_blobs_resume_at_the_first_missing_chunk(tmp_path: Path) -> None:
    slots = Slots(tmp_path)
    data = bytes(range(256)) * 40
    digest = digest_of(data)
    slots.append(digest, 0, data[:4096])
    assert Slots(tmp_path).received(digest) == 4096
    with pytest.raises(Malformed, match="expected the chunk at 4096, found one at 8192"):
        slots.append(digest, 8192, data[8192:])
    slots.append(digest, 4096, data[4096:])
    assert not slots.has(digest)
    blob = slots.complete(digest)
    assert blob.pread(0, blob.size) == data
    assert Slots(tmp_path).has(digest)
    slots.clear_incoming()
    assert not slots.has(digest)


def test_a_part_spoilt_by_a_power_cut_is_dropped_when_it_is_complete(tmp_path: Path) -> None:
    slots = Slots(tmp_path)
    data = os.urandom(5000)
    slots.append(digest_of(data), 0, data[:4000] + bytes(1000))
    with pytest.raises(DigestMismatch):
        slots.complete(digest_of(data))
    assert slots.received(digest_of(data)) == 0


def test_names_from_outside_cannot_leave_the_folder(tmp_path: Path) -> None:
    with pytest.raises(Malformed, match="64 hexadecimal"):
        Slots(tmp_path).append("../../etc/passwd", 0, b"")


def test_a_damaged_record_is_named_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "update.record").write_bytes(b"\xff\x00")
    with pytest.raises(Malformed, match=r"update record at .*update.record: .*move the file away to start over"):
        Slots(tmp_path).read_record()


def test_a_full_disk_leaves_the_old_content(tmp_path: Path) -> None:
    slots = Slots(tmp_path)
    slots.write_record(UpdateRecord(target="a" * 64, state=State.FETCHING))
    script = (
        "import resource, signal, sys, pathlib\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "from edge_runtime.slots import replace_file\n"
        "from model_delta.errors import StorageFull\n"
        "try:\n"
        "    replace_file(pathlib.Path(sys.argv[1]), bytes(5000))\n"
        "except StorageFull as error:\n"
        "    print(error)\n"
    )
    found = subprocess.run(
        [sys.executable, "-B", "-c", script, str(tmp_path / "update.record")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "no room left for" in found.stdout, found.stderr
    assert slots.read_record().target == "a" * 64
    assert not list(tmp_path.glob("*.new"))
    assert issubclass(StorageFull, Exception)


@pytest.mark.slow
def test_a_process_killed_while_it_writes_leaves_a_whole_record(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib, msgspec\n"
        "from edge_runtime.slots import Slots, UpdateRecord\n"
        "slots = Slots(pathlib.Path(sys.argv[1]))\n"
        "number = 0\n"
        "while True:\n"
        "    number += 1\n"
        "    if number == 5: print('four are written', flush=True)\n"
        "    slots.write_record(UpdateRecord(adopted=number, rolled_back=number, plan=bytes(20000)))\n"
    )
    for _ in range(5):
        process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        process.stdout.close()
        record = Slots(tmp_path).read_record()
        assert record.adopted == record.rolled_back > 3


def test_the_record_comes_back_as_it_was(tmp_path: Path) -> None:
    record = msgspec.structs.replace(UpdateRecord(), state=State.RESTORING, given_up={"b" * 64: "bad"}, slot="b")
    Slots(tmp_path).write_record(record)
    assert Slots(tmp_path).read_record() == record
    replace_file(tmp_path / "other", b"x", durable=False)
    assert (tmp_path / "other").read_bytes() == b"x"
