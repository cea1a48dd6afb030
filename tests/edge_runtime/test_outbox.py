"""The outbox: nothing told twice, nothing lost silently, no answer lost to a disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.outbox import Outbox, Record, fold
from model_delta.errors import NotFound
from monitoring.telemetry import Decision, Feedback, ModelSummary, UpdateOutcome, merge_summaries

MANIFEST = "a" * 64


def decision(number: int, **options: object) -> Decision:
    fields: dict[str, object] = {
        "decision_id": str(number),
        "manifest": MANIFEST,
        "where": "device",
        "score": 0.25,
        "approved": number % 3 != 0,
        "latency_us": float(number),
    }
    return Decision(**{**fields, **options})  # type: ignore[arg-type]


def records_of(outbox: Outbox) -> list[Record]:
    return [record for _, record in outbox.read(1, outbox.last_sequence)]


def test_records_come_back_in_order_over_segments_and_restarts(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, 7, segment_records=4)
    written: list[Record] = [decision(number) for number in range(10)]
    written.append(Feedback("3", MANIFEST, True, False))
    written.append(UpdateOutcome(manifest=MANIFEST, event="adopted"))
    assert [outbox.append(record) for record in written] == list(range(1, 13))
    again = Outbox(tmp_path, 8, segment_records=4)
    assert again.marks.epoch == 7
    assert records_of(again) == written
    assert again.append(decision(99)) == 13


def test_a_report_is_repeated_with_the_same_range_until_it_is_acknowledged(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, 7)
    assert outbox.next_range() == (1, 0)
    for number in range(3):
        outbox.append(decision(number))
    assert outbox.next_range() == (1, 3)
    outbox.append(decision(4))
    assert outbox.next_range() == (1, 3)
    outbox = Outbox(tmp_path, 8)  # the process died after sending
    assert outbox.next_range() == (1, 3)
    assert not outbox.acknowledge(6, 3), "another epoch"
    assert outbox.acknowledge(7, 3)
    assert not outbox.acknowledge(7, 3), "a repetition"
    assert outbox.next_range() == (4, 4)
    assert outbox.pending == 1


def test_a_torn_tail_is_cut_off_and_writing_goes_on(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, 7)
    for number in range(5):
        outbox.append(decision(number))
    outbox.close()
    path = next(tmp_path.glob("*.log"))
    os.truncate(path, path.stat().st_size - 3)
    again = Outbox(tmp_path, 8)
    assert records_of(again) == [decision(number) for number in range(4)]
    assert again.append(decision(50)) == 5
    assert records_of(Outbox(tmp_path, 9))[-1] == decision(50)


def test_a_number_that_left_is_never_given_to_another_record(tmp_path: Path) -> None:
    """The power took records that a report had told already: what comes now is counted behind them."""
    outbox = Outbox(tmp_path, 7)
    for number in range(5):
        outbox.append(decision(number))
    assert outbox.next_range() == (1, 5)
    outbox.close()
    path = next(tmp_path.glob("*.log"))
    os.truncate(path, path.stat().st_size * 3 // 5)
    again = Outbox(tmp_path, 8)
    assert [sequence for sequence, _ in again.read(1, 9)] == [1, 2, 3]
    assert again.append(decision(50)) == 6
    assert [sequence for sequence, _ in Outbox(tmp_path, 9).read(1, 9)] == [1, 2, 3, 6]


@settings(max_examples=40, deadline=None)
@given(cut=st.integers(0, 2_000), flip=st.integers(0, 2_000))
def test_whatever_happens_to_the_tail_the_sound_records_before_it_stay(
    tmp_path_factory: pytest.TempPathFactory, cut: int, flip: int
) -> None:
    folder = tmp_path_factory.mktemp("outbox")
    outbox = Outbox(folder, 7)
    for number in range(8):
        outbox.append(decision(number))
    outbox.close()
    path = next(folder.glob("*.log"))
    data = bytearray(path.read_bytes())
    frame = len(data) // 8
    del data[min(cut, len(data)) :]
    if flip < len(data):
        data[flip] ^= 0x10
    path.write_bytes(data)
    found = records_of(Outbox(folder, 8))
    assert found == [decision(number) for number in range(len(found))]
    assert len(found) == min(8, min(cut, flip) // frame)


def test_overflow_drops_the_oldest_and_counts_them(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, 7, records_max=20, history_records=20, segment_records=5)
    for number in range(1, 101):
        outbox.append(decision(number))
    kept = [sequence for sequence, _ in outbox.read(1, 100)]
    assert kept[-1] == 100
    assert len(kept) <= 25
    assert outbox.marks.dropped == kept[0] - 1
    assert outbox.next_range() == (kept[0], 100)
    assert len(list(tmp_path.glob("*.log"))) <= 6


def test_acknowledged_records_stay_for_feedback_and_go_in_time(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, 7, records_max=100, history_records=10, segment_records=5)
    for number in range(1, 13):
        outbox.append(decision(number))
    outbox.next_range()
    assert outbox.acknowledge(7, 12)
    assert outbox.decision(9) == decision(9)
    for number in range(13, 40):
        outbox.append(decision(number))
        outbox.next_range()
        outbox.acknowledge(7, outbox.last_sequence)
    with pytest.raises(NotFound, match="decision 9: not in the outbox"):
        outbox.decision(9)
    assert outbox.marks.dropped == 0


def test_an_acknowledgement_from_a_future_we_lost_puts_the_numbering_right(tmp_path: Path) -> None:
    """A power cut took the last records and marks, but their report had arrived."""
    outbox = Outbox(tmp_path, 7)
    for number in range(3):
        outbox.append(decision(number))
    assert outbox.acknowledge(7, 50)
    assert outbox.marks.dropped == 3
    assert outbox.append(decision(51)) == 51
    assert outbox.next_range() == (51, 51)
    assert [sequence for sequence, _ in Outbox(tmp_path, 8).read(51, 51)] == [51]


def test_a_full_disk_costs_records_and_never_an_exception(tmp_path: Path) -> None:
    script = (
        "import resource, signal, sys, pathlib\n"
        "from edge_runtime.outbox import Outbox\n"
        "from tests.edge_runtime.test_outbox import decision\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "outbox = Outbox(pathlib.Path(sys.argv[1]), 7)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))\n"
        "numbers = [outbox.append(decision(n)) for n in range(30)]\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)\n"
        "print(numbers.count(0), outbox.marks.dropped, outbox.append(decision(100)))\n"
    )
    found = subprocess.run(
        [sys.executable, "-B", "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert found.stdout, found.stderr
    lost, dropped, after = map(int, found.stdout.split())
    assert 0 < lost == dropped < 30
    assert after == 31, "a number that was spent on a lost record is never given again"
    assert records_of(Outbox(tmp_path, 8))[-1] == decision(100)


@pytest.mark.slow
def test_what_was_appended_survives_sigkill(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib\n"
        "from edge_runtime.outbox import Outbox\n"
        "from tests.edge_runtime.test_outbox import decision\n"
        "outbox = Outbox(pathlib.Path(sys.argv[1]), 7, segment_records=50)\n"
        "while True:\n"
        "    print(outbox.append(decision(outbox.last_sequence)), flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = 0
    while said < 500:
        said = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    process.stdout.close()
    found = records_of(Outbox(tmp_path, 8))
    assert len(found) >= said
    assert found == [decision(number) for number in range(len(found))]


def test_folding_in_parts_equals_folding_the_whole() -> None:
    records: list[Record] = [decision(number, where="region" if number % 4 == 0 else "device") for number in range(20)]
    records += [Feedback(str(number), MANIFEST, number % 3 == 0, number % 5 == 0) for number in range(20)]
    records.append(decision(1, error="boom", fallback="model failed", where="baseline"))
    whole = fold(records)
    parts: dict[tuple[str, str], ModelSummary] = {}
    for part in (records[:7], records[7:23], records[23:]):
        for summary in fold(part).summaries:
            key = (summary.manifest, summary.where)
            parts[key] = merge_summaries(parts[key], summary) if key in parts else summary
    assert tuple(parts[key] for key in sorted(parts)) == whole.summaries
    device = next(summary for summary in whole.summaries if summary.where == "device")
    assert (device.decisions, device.labelled_fraud, device.labelled_legitimate) == (15, 4, 16)
    assert (device.true_positives, device.false_positives) == (2, 5)
    baseline = next(summary for summary in whole.summaries if summary.where == "baseline")
    assert (baseline.errors, baseline.fallbacks) == (1, 1)
