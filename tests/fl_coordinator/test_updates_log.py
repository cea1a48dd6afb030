import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_coordinator.updates_log import RECORD_BYTES_MAX, LogPart, SegmentLog
from model_delta.errors import Malformed, NotFound, StorageFull, Unavailable
from tests.systems import on_linux


def only_file(folder: Path) -> Path:
    [path] = folder.glob("*.log")
    return path


def test_what_is_appended_is_read_at_its_offset_also_after_opening_again(tmp_path: Path) -> None:
    log = SegmentLog(tmp_path)
    offsets = log.append([b"one", b"", b"three"])
    more = log.append([b"four"])
    log.close()
    again = SegmentLog(tmp_path)
    assert again.torn_bytes == 0
    assert [again.read(offset) for offset in (*offsets, *more)] == [b"one", b"", b"three", b"four"]
    assert again.append([b"five"]) == [log.end]


@settings(max_examples=30, deadline=None)
@given(cut=st.integers(0, 60))
def test_a_torn_tail_is_cut_off_and_the_rest_stays(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    folder = tmp_path_factory.mktemp("log")
    log = SegmentLog(folder)
    offsets = log.append([b"a" * 10, b"b" * 12, b"c" * 14])
    end = log.end
    log.close()
    os.truncate(only_file(folder), end - min(cut, end))
    again = SegmentLog(folder)
    whole = [offset for offset, following in zip(offsets, [*offsets[1:], end], strict=True) if following <= end - cut]
    assert again.end == (0 if not whole else [*offsets[1:], end][len(whole) - 1])
    for offset, record in zip(whole, (b"a" * 10, b"b" * 12, b"c" * 14), strict=False):
        assert again.read(offset) == record
    [offset] = again.append([b"new"])
    again.close()
    assert SegmentLog(folder).read(offset) == b"new"


def test_damage_in_the_middle_is_said_and_not_repaired(tmp_path: Path) -> None:
    log = SegmentLog(tmp_path, segment_bytes=30)
    first = log.append([b"a" * 30])
    second = log.append([b"b" * 30])
    assert len(list(tmp_path.glob("*.log"))) == 2
    damaged = sorted(tmp_path.glob("*.log"))[0]
    data = bytearray(damaged.read_bytes())
    data[20] ^= 1
    damaged.write_bytes(bytes(data))
    log.close()
    again = SegmentLog(tmp_path, segment_bytes=30)
    with pytest.raises(Malformed, match="damaged"):
        again.read(first[0])
    assert again.read(second[0]) == b"b" * 30


def test_old_files_go_whole_and_offsets_stay(tmp_path: Path) -> None:
    log = SegmentLog(tmp_path, segment_bytes=50)
    offsets = [log.append([bytes([number]) * 40])[0] for number in range(5)]
    assert log.remove_before(offsets[3]) > 0
    assert log.read(offsets[3]) == b"\x03" * 40
    with pytest.raises(NotFound, match="no record at offset"):
        log.read(offsets[0])
    log.close()
    again = SegmentLog(tmp_path, segment_bytes=50)
    assert again.read(offsets[4]) == b"\x04" * 40
    with pytest.raises(NotFound):
        again.read(again.end)


@on_linux
def test_a_full_disk_adds_nothing(tmp_path: Path) -> None:
    log = SegmentLog(tmp_path)
    [offset] = log.append([b"before"])
    end = log.end
    log._file = open("/dev/full", "ab")  # noqa: SIM115, PTH123 - a device that is always full
    with pytest.raises(StorageFull, match="no room left"):
        log.append([b"x" * 100_000])
    assert log.end == end
    assert log.append([b"after"]) == [end]
    assert (log.read(offset), log.read(end)) == (b"before", b"after")


def test_a_record_that_is_too_long_is_refused_whole(tmp_path: Path) -> None:
    log = SegmentLog(tmp_path)
    with pytest.raises(Malformed, match="at most"):
        log.append([b"small", bytes(RECORD_BYTES_MAX + 1)])
    assert log.end == 0
    log.close()
    assert SegmentLog(tmp_path).end == 0


CHILD = """
import sys
from pathlib import Path
from fl_coordinator.updates_log import SegmentLog
log = SegmentLog(Path(sys.argv[1]), segment_bytes=20_000)
number = 0
while True:
    number += 1
    [offset] = log.append([str(number).encode() * 500])
    print(offset, number, flush=True)
"""


def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    lines = [child.stdout.readline() for _ in range(40)]
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    lines += child.stdout.read().splitlines(keepends=True)
    child.stdout.close()
    log = SegmentLog(tmp_path)
    for line in lines:
        if line.endswith("\n"):
            offset, number = line.split()
            assert log.read(int(offset)) == number.encode() * 500


def test_a_follower_is_told_of_damage_and_goes_on_with_the_next_file(tmp_path: Path) -> None:
    log = SegmentLog(tmp_path, segment_bytes=50)
    offsets = log.append([b"a" * 20, b"b" * 20]) + log.append([b"c" * 20]) + log.append([b"d" * 20])
    first = tmp_path / f"{0:020d}.log"
    data = bytearray(first.read_bytes())
    data[offsets[1] + 10] ^= 1
    first.write_bytes(data)
    assert log.read_from(0) == LogPart(0, ((0, b"a" * 20),), offsets[1])
    rest = LogPart(offsets[2], ((offsets[2], b"c" * 20), (offsets[3], b"d" * 20)), log.end)
    assert log.read_from(offsets[1]) == rest
    assert log.read_from(3) == rest
    with pytest.raises(Malformed, match=f"the record at offset {offsets[2] + 1} is damaged"):
        log.read_from(offsets[2] + 1)
    log.close()


def test_a_file_that_cannot_be_begun_costs_nothing_once_it_can(tmp_path: Path) -> None:
    """No room for another file, or no handle for it: a folder of that name stands for both."""
    log = SegmentLog(tmp_path, segment_bytes=30)
    [first] = log.append([b"a" * 40])
    obstacle = tmp_path / f"{log.end:020d}.log"
    obstacle.mkdir()
    for _ in range(2):
        with pytest.raises(Unavailable, match="updates log"):
            log.append([b"b"])
    obstacle.rmdir()
    [second] = log.append([b"b"])
    log.close()
    again = SegmentLog(tmp_path, segment_bytes=30)
    assert (again.read(first), again.read(second)) == (b"a" * 40, b"b")


def test_zeros_behind_the_end_are_no_records(tmp_path: Path) -> None:
    log = SegmentLog(tmp_path)
    log.append([b"one", b""])
    end = log.end
    log.close()
    os.truncate(only_file(tmp_path), end + 4096)  # what some file systems leave after a power cut
    again = SegmentLog(tmp_path)
    assert (again.end, again.torn_bytes) == (end, 4096)
    assert [record for _, record in again.read_from(0).records] == [b"one", b""]
