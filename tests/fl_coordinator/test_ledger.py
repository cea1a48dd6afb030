import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from fl_coordinator.ledger import Ledger
from fl_coordinator.privacy import Spend
from fl_coordinator.tables.records import AdmittedContribution, DeviceRecord, Directed, ReleaseRecord, StageEvent
from model_delta.errors import Malformed, NotFound, Unavailable
from monitoring.telemetry import ModelSummary, Report, UpdateOutcome

MANIFEST = "a" * 64


def device(device_id: str = "pos-0001") -> DeviceRecord:
    return DeviceRecord(
        device_id=device_id,
        kind="device",
        tenant="acme",
        device_class="pos",
        region="eu-west",
        labels={"merchant": "grocery"},
        certificate=b"PEM",
        certificate_serial="7",
        enrolled=100.0,
    )


def report(first: int, last: int, *, epoch: int = 2**64 - 1, decisions: int = 10, **more: object) -> Report:
    fields: dict[str, object] = {
        "device_id": "pos-0001",
        "epoch": epoch,
        "first_sequence": first,
        "last_sequence": last,
        "time": 1.0,
        "state": "IDLE",
        "running": MANIFEST,
        "plan_serial": 3,
        "summaries": (ModelSummary(manifest=MANIFEST, where="device", decisions=decisions, latency={4: decisions}),),
        "outcomes": (UpdateOutcome(manifest=MANIFEST, event="adopted"),),
    }
    return Report(**{**fields, **more})  # type: ignore[arg-type]


def total(ledger: Ledger) -> int:
    return sum(row.summary.decisions for row in ledger.summaries())


def release(number: int, source: str = "s", parent: str = "") -> ReleaseRecord:
    return ReleaseRecord(
        manifest=f"{number:064x}",
        model="fraud",
        name="",
        version={"eu-west": number},
        release=number,
        parents=(parent,) if parent else (),
        created=1.0,
        source=source,
        source_blob="b",
        wrapped_key=b"w",
        file_bytes=10,
        bytes_whole=10,
        bytes_patch={},
    )


def test_a_report_counts_once_however_often_it_arrives(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.enrol(device())
    first = ledger.fold([report(1, 10)], 5.0, 9)
    again = ledger.fold([report(1, 10), report(11, 15, decisions=5), report(11, 15, decisions=5)], 6.0, 9)
    assert [(fold.kind, acked) for _, fold, acked in [*first, *again]] == [
        ("new", 10),
        ("duplicate", 10),
        ("new", 15),
        ("duplicate", 15),
    ]
    assert total(ledger) == 15
    assert [entry.device_id for entry in ledger.outcomes(MANIFEST)] == ["pos-0001"] * 2


def test_an_overlap_is_not_folded_and_the_device_is_told_where_to_go_on(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.enrol(device())
    ledger.fold([report(1, 10)], 5.0, 9)
    [(_, fold, acked)] = ledger.fold([report(5, 20)], 6.0, 9)
    assert (fold.kind, acked, total(ledger)) == ("overlap", 10, 10)


def test_a_gap_is_counted_and_a_new_outbox_starts_over(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.enrol(device())
    ledger.fold([report(1, 10), report(16, 20, decisions=5), report(1, 3, epoch=4, decisions=3)], 5.0, 9)
    assert ledger.missing_records() == 5
    assert total(ledger) == 18


def test_counters_since_boot_add_up_over_reports_and_outboxes(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.enrol(device())
    ledger.fold(
        [report(1, 2, lost_requests=2), report(3, 4, lost_requests=5), report(1, 2, epoch=9, lost_requests=1)], 5.0, 9
    )
    assert ledger.device("pos-0001").lost_requests == 6


def test_a_report_without_records_updates_the_state_and_never_the_totals(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.enrol(device())
    ledger.fold([report(1, 10)], 5.0, 9)
    for now in (6.0, 7.0):
        [(_, fold, acked)] = ledger.fold([report(11, 10, state="SAFE", safe_mode=True)], now, 9)
        assert (fold.kind, acked) == ("empty", 10)
    assert total(ledger) == 10
    found = ledger.device("pos-0001")
    assert (found.state, found.safe_mode, found.last_seen) == ("SAFE", True, 7.0)


def test_a_device_cannot_claim_a_plan_that_was_never_issued(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.enrol(device())
    ledger.fold([report(1, 10, plan_serial=10**9)], 5.0, 4)
    assert [row.plan_serial for row in ledger.summaries()] == [4]
    assert ledger.summaries(plan_serial_min=5) == []


def test_enrolling_again_keeps_the_history(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.enrol(device())
    ledger.heard("pos-0001", 50.0, running=MANIFEST, state="IDLE")
    ledger.enrol(device())
    assert ledger.device("pos-0001").last_seen == 50.0
    assert ledger.device("pos-0001").traits.labels == {"merchant": "grocery"}
    with pytest.raises(NotFound, match="not enrolled"):
        ledger.device("pos-9999")


def test_release_counters_and_sources_are_unique(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.add_release(release(1))
    ledger.add_release(release(2, parent=f"{1:064x}"))
    with pytest.raises(Malformed, match="already recorded"):
        ledger.add_release(release(2, source="t"))
    assert ledger.release_from("fraud", "s", f"{1:064x}") == release(2, parent=f"{1:064x}")
    assert ledger.release_from("fraud", "t", "") is None
    assert [record.release for record in ledger.releases("fraud")] == [1, 2]


def test_a_rollout_step_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.add_release(release(1))
    step = {"name": "r", "model": "fraud", "state": "running", "created": 1.0}
    history = StageEvent(2.0, 0, 1, "stage", "one device")
    ledger.save_rollout(**step, record=b"one", history=history, plan=(1, b"plan"), stable=f"{1:064x}")  # type: ignore[arg-type]
    with pytest.raises(sqlite3.IntegrityError):  # serial 1 is taken
        ledger.save_rollout(**step, record=b"two", history=history, plan=(1, b"other"), withdrawn={f"{1:064x}": "bad"})  # type: ignore[arg-type]
    assert ledger.rollout("r") == b"one"
    assert ledger.plan("fraud") == (1, b"plan")
    assert ledger.stage_history("r") == [history]
    assert ledger.withdrawn("fraud") == {}
    assert ledger.stable("fraud") == f"{1:064x}"


def test_one_contribution_a_device_and_round(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.admit("r1", [AdmittedContribution("b", "d2", 90, 5, 1.0), AdmittedContribution("a", "d1", 10, 5, 1.0)])
    ledger.admit("r1", [AdmittedContribution("a", "other", 200, 5, 2.0)])
    assert [c.digest for c in ledger.contributions("r1")] == ["d1", "d2"]
    ledger.count_refusal("r1", "late")
    ledger.count_refusal("r1", "late")
    assert ledger.refusals("r1") == {"late": 2}


def test_a_round_opens_once(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.save_round_result("r1", b"first", b"t")
    ledger.save_round_result("r1", b"second", b"t")
    assert ledger.round_result("r1") == (b"first", b"t")


def test_a_newer_schema_and_a_stranger_file_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    Ledger(path).close()
    raw = sqlite3.connect(path)
    raw.execute("PRAGMA user_version = 99")
    raw.close()
    with pytest.raises(Malformed, match=r"schema 99 .*newer"):
        Ledger(path)
    other = tmp_path / "other"
    other.write_bytes(b"not a database " * 100)
    with pytest.raises(Malformed, match="not a ledger"):
        Ledger(other)


def test_a_ledger_of_the_first_schema_opens_and_gains_what_came_later(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    first = Ledger(path)
    first.save_round(round_id="r1", model="fraud", state="OPENED", created=1.0, record=b"r")
    first.close()
    raw = sqlite3.connect(path)
    raw.execute("DROP TABLE privacy_openings")
    raw.execute("DROP TABLE privacy_devices")
    raw.execute("DROP TABLE version_reports")
    raw.execute("DROP TABLE retired")
    raw.execute("DROP TABLE identity")
    raw.execute("DROP INDEX contributions_by_device")
    raw.execute("DROP TABLE round_memories")
    raw.execute("ALTER TABLE devices DROP COLUMN model")
    raw.execute("DROP TABLE aborted_rounds")
    raw.execute("DROP TABLE sitting_out")
    raw.execute("DROP TABLE maybe_opened")
    raw.execute("DROP TABLE sat_out")
    raw.execute("PRAGMA user_version = 1")
    raw.close()
    ledger = Ledger(path)
    assert ledger.rounds() == [b"r"]
    ledger.spend_privacy("r1", 1, "fraud", Spend(4.0), ["pos-1"])
    assert ledger.privacy_of_release("fraud") == [Spend(4.0)]
    assert ledger.all_directed() == []
    assert ledger.retired() == frozenset()
    assert len(ledger.identity()) == 32
    assert ledger.round_memory("none") is None
    assert ledger.devices() == []
    assert ledger.aborted_rounds() == set()
    assert ledger.sitting_out("r1") == {}
    assert ledger.may_open("r1")
    ledger.close()


def test_a_ledger_from_before_devices_said_why_they_sit_out_keeps_what_it_had(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    before = Ledger(path)
    before.save_round(round_id="r1", model="fraud", state="COLLECTING", created=1.0, record=b"r")
    before.abort_round("r1")
    before.save_round_result("r0", b"mean", b"transcript")
    before.close()
    raw = sqlite3.connect(path)
    raw.execute("DROP TABLE sitting_out")
    raw.execute("DROP TABLE maybe_opened")
    raw.execute("DROP TABLE sat_out")
    raw.execute("PRAGMA user_version = 8")
    raw.close()
    ledger = Ledger(path)
    assert (ledger.aborted_rounds(), ledger.round_result("r0")) == ({"r1"}, (b"mean", b"transcript"))
    ledger.sit_out([("r1", "a", "no data")])
    assert ledger.sitting_out("r1") == {"a": "no data"}
    assert ledger.may_open("r1")
    assert not ledger.may_open("r1"), "an earlier attempt may have"
    assert ledger.opened_without_noise("fraud") == ["r1"]
    ledger.did_not_open("r1")
    assert ledger.opened_without_noise("fraud") == []
    ledger.close()


def test_a_device_sits_a_round_out_for_one_reason_while_the_round_collects(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.save_round(round_id="r1", model="fraud", state="COLLECTING", created=1.0, record=b"r")
    ledger.save_round(round_id="r2", model="digits", state="FROZEN", created=1.0, record=b"r")
    ledger.sit_out(
        [("r1", "a", "no data"), ("r1", "b", "disk full"), ("r1", "c", "over privacy budget"), ("r1", "d", "no data")]
    )
    ledger.sit_out([("r1", "a", "disk full"), ("r1", "b", "training diverged"), ("r1", "c", "no data")])
    ledger.sit_out([("r2", "a", "no data"), ("r3", "a", "no data")])
    ledger.admit("r1", [AdmittedContribution("d", "d" * 64, 0, 9, 1.0)])
    assert ledger.sitting_out("r1") == {"a": "no data", "b": "training diverged", "c": "over privacy budget"}
    assert ledger.sitting_out("r2") == ledger.sitting_out("r3") == {}
    ledger.close()


def test_of_a_round_that_has_ended_the_counts_of_those_that_sat_it_out_stay(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    for name in ("r1", "r2"):
        ledger.save_round(round_id=name, model="fraud", state="COLLECTING", created=1.0, record=b"r")
        ledger.sit_out([(name, "a", "no data"), (name, "b", "no data"), (name, "c", "training diverged")])
    ledger.admit("r1", [AdmittedContribution("b", "b" * 64, 0, 9, 1.0)])
    ledger.save_round(round_id="r1", model="fraud", state="FAILED", created=1.0, record=b"r")
    for _ in range(2):
        ledger.count_sat_out()
        assert ledger.sat_out("r1") == {"no data": 1, "training diverged": 1}
        assert ledger.sitting_out("r1") == {}
        assert ledger.sat_out("r2") == {"no data": 2, "training diverged": 1}
        assert set(ledger.sitting_out("r2")) == {"a", "b", "c"}
    ledger.close()


def test_the_newest_round_is_the_one_announced_last_whatever_the_clock_said(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    for name, model, created in (
        ("r1", "fraud", 9.0),
        ("r2", "fraud", 3.0),
        ("r3", "other", 5.0),
        ("r1", "fraud", 9.0),
    ):
        ledger.save_round(round_id=name, model=model, state="OPENED", created=created, record=name.encode())
    assert ledger.rounds() == [b"r1", b"r2", b"r3"]
    assert (ledger.newest_round("fraud"), ledger.newest_round("none")) == (b"r2", None)


def test_versions_are_given_up_only_while_nothing_was_added(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.add_release(release(1))
    standing = ledger.standing()
    ledger.add_release(release(2, source="t"))
    first, second = (one.manifest for one in ledger.releases())
    assert not ledger.retire([first], standing, 1.0)
    assert ledger.retired() == frozenset()
    assert ledger.retire([first], ledger.standing(), 1.0)
    assert ledger.retire([first], ledger.standing(), 2.0)
    fields = {"model": "fraud", "state": "running", "created": 1.0, "record": b"r"}
    with pytest.raises(Malformed, match="removed from the store"):
        ledger.save_rollout(name="r", plan=(1, b"p"), needs=(second, first), **fields)  # type: ignore[arg-type]
    with pytest.raises(Malformed, match="removed from the store"):
        ledger.save_round(round_id="r", needs=(first,), **fields)  # type: ignore[arg-type]
    assert ledger.plans() == ledger.rollouts() == ledger.rounds() == []
    before = ledger.standing()
    ledger.save_rollout(name="r", plan=(1, b"p"), needs=(second,), **fields)  # type: ignore[arg-type]
    assert ledger.plans() == [b"p"]
    assert ledger.standing() != before
    ledger.close()


def test_an_older_version_report_changes_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    newer = Directed(device_id="pos-1", model="fraud", counter=7, serial=3, heard=2.0, report=b"r", plan=b"p")
    ledger.save_directed([newer])
    ledger.save_directed([msgspec.structs.replace(newer, counter=7, report=b"again")])
    ledger.save_directed([msgspec.structs.replace(newer, counter=8, serial=2, plan=b"older")])
    ledger.close()
    ledger = Ledger(tmp_path / "ledger.sqlite")
    assert ledger.directed("pos-1") == {"fraud": newer}
    assert ledger.directed("pos-2") == {}
    assert ledger.all_directed() == [newer]
    ledger.close()


def test_a_second_coordinator_is_told_who_holds_the_ledger(tmp_path: Path) -> None:
    first = Ledger(tmp_path / "ledger.sqlite")
    with pytest.raises(Unavailable, match="another process"):
        Ledger(tmp_path / "ledger.sqlite")
    first.close()
    Ledger(tmp_path / "ledger.sqlite").close()


def test_a_full_disk_is_said_and_changes_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.enrol(device())
    pages = ledger._db.execute("PRAGMA page_count").fetchone()[0]
    ledger._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(Unavailable, match="no room left"):
        ledger.save_round_result("r1", b"x" * 100_000, b"")
    ledger._db.execute("PRAGMA max_page_count = 1000000")
    assert ledger.round_result("r1") is None
    ledger.add_event(1.0, "note", "still usable")
    assert [event.text for event in ledger.events()] == ["still usable"]


CHILD = """
import sys
from pathlib import Path
from fl_coordinator.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]))
number = 0
while True:
    number += 1
    ledger.add_event(float(number), "n", str(number))
    print(number, flush=True)
"""


def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    acknowledged = 0
    while acknowledged < 25:
        acknowledged = int(child.stdout.readline())
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    acknowledged = max([acknowledged, *(int(line) for line in child.stdout.read().split())])
    child.stdout.close()
    survived = {int(event.text) for event in Ledger(path).events(1_000_000)}
    assert set(range(1, acknowledged + 1)) <= survived


def test_contributions_are_counted_by_device_and_by_what_devices_were_enrolled_with(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    for number, labels in enumerate(({"batch": "b-1"}, {"batch": "b-1"}, {"batch": "b-2"}, {})):
        ledger.enrol(msgspec.structs.replace(device(f"pos-{number}"), labels=labels))
    for round_id, time, numbers in (("r1", 100.0, (0, 1)), ("r2", 200.0, (0, 1, 2, 3))):
        ledger.admit(round_id, [AdmittedContribution(f"pos-{n}", f"{round_id}-{n}", 10 * n, 5, time) for n in numbers])
    assert ledger.groups_of("r2", "batch") == {"b-1": 2, "b-2": 1, "": 1}
    assert ledger.groups_of("r2", "device_class") == {"pos": 4}
    assert [ledger.contributions_of("pos-0", since, "r3") for since in (50.0, 150.0, 250.0)] == [2, 1, 0]
    assert ledger.contributions_of("pos-0", 50.0, "r2") == 1
    ledger.close()
