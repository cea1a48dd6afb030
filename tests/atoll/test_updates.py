from pathlib import Path

import msgspec
import pytest

from atoll.settings import ConfigurationError, DataFolder
from atoll.updates import (
    EMBEDDED,
    UpdatesPlace,
    aggregator_place,
    choose_place,
    login_properties,
    open_log,
    place_of,
    require_login,
)
from fl_coordinator.ledger import Ledger
from fl_coordinator.rounds import Round, RoundSpec, State
from fl_coordinator.updates_log import SegmentLog
from model_delta.encoding import pack
from model_delta.errors import Unavailable
from model_delta.task import RoundTask


def test_the_choice_stays_in_the_folder_with_its_login(tmp_path: Path) -> None:
    data = DataFolder.open(tmp_path, create=True)
    assert place_of(data) == UpdatesPlace()
    choose_place(data, "kafka://broker:9092/updates")
    choose_place(data, "")
    assert place_of(data).url == "kafka://broker:9092/updates"
    (tmp_path / "updates.json").write_text(
        '{"url": "kafka://broker:9092/updates", "properties": {"security.protocol": "ssl"}}'
    )
    choose_place(data, "kafka://broker:9092/others")
    assert place_of(data) == UpdatesPlace(url="kafka://broker:9092/others", properties={"security.protocol": "ssl"})
    choose_place(data, EMBEDDED)
    assert place_of(data).url == EMBEDDED


@pytest.mark.parametrize("url", ["/tmp/log", "http://broker:9092/updates", "kafka://broker:9092"])
def test_another_place_is_refused_by_name(tmp_path: Path, url: str) -> None:
    data = DataFolder.open(tmp_path, create=True)
    with pytest.raises(ConfigurationError, match=r"--updates-log: .*expected kafka://host:port/topic.*or `embedded`"):
        choose_place(data, url)
    assert not (tmp_path / "updates.json").exists()


def test_an_aggregator_reads_where_it_is_told_then_where_its_folder_says_then_where_the_platform_does(
    tmp_path: Path,
) -> None:
    data = DataFolder.open(tmp_path, create=True)
    assert aggregator_place(data, "a1").url == EMBEDDED
    login = {"url": "kafka://broker:9092/updates", "properties": {"sasl.username": "coordinator"}}
    (tmp_path / "updates.json").write_bytes(msgspec.json.encode(login))
    assert aggregator_place(data, "a1") == UpdatesPlace(**login)
    assert aggregator_place(data, "a1", "kafka://other:9092/updates") == UpdatesPlace(
        url="kafka://other:9092/updates", properties={"sasl.username": "coordinator"}
    )
    own = {"url": "kafka://broker:9092/updates", "properties": {"sasl.username": "reader"}}
    (data.child("aggregators", "a1") / "updates.json").write_bytes(msgspec.json.encode(own))
    assert aggregator_place(data, "a1") == UpdatesPlace(**own)
    assert aggregator_place(data, "a2") == UpdatesPlace(**login)
    assert aggregator_place(data, "a1", EMBEDDED).url == EMBEDDED
    with pytest.raises(ConfigurationError, match="--updates-log"):
        aggregator_place(data, "a1", "kafka://broker")
    (data.child("aggregators", "a1") / "updates.json").write_text("{")
    with pytest.raises(ConfigurationError, match=r"a1/updates\.json: expected url, properties and login as JSON"):
        aggregator_place(data, "a1")


def write_login(folder: Path, *lines: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "ca.pem").touch()
    (folder / "secret").write_text("hunter2\n")
    path = folder / "kafka.properties"
    path.write_text("\n".join(lines))
    return path


def test_a_login_is_read_from_its_own_files_at_each_start_and_copied_nowhere(tmp_path: Path) -> None:
    data = DataFolder.open(tmp_path / "data", create=True)
    lines = ("security.protocol=sasl_ssl", "ssl.ca.location=ca.pem", "sasl.password.file=secret")
    login = write_login(tmp_path / "own", *lines)
    choose_place(data, "kafka://broker:9092/updates", str(login))
    assert "hunter2" not in (data.path / "updates.json").read_text()
    expected = {
        "security.protocol": "sasl_ssl",
        "ssl.ca.location": str(tmp_path / "own" / "ca.pem"),
        "sasl.password": "hunter2",
    }
    assert login_properties(place_of(data)) == expected
    (tmp_path / "own" / "secret").write_text("rotated")
    assert login_properties(place_of(data)) == {**expected, "sasl.password": "rotated"}
    choose_place(data, "kafka://broker:9092/others")
    assert place_of(data).login == str(login)
    reading = write_login(tmp_path / "reader", "sasl.username=reader")
    assert aggregator_place(data, "a1", login=str(reading)).login == str(reading)
    assert aggregator_place(data, "a1").login == str(login)


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (("hunter2",), r"--updates-login: .*kafka\.properties:1: expected name=value"),
        (("acks=0",), r"kafka\.properties:1: expected a property of security\.protocol"),
        (("sasl.password.file=none",), r"^sasl\.password\.file: .*none: cannot read: No such file"),
        (("ssl.ca.location=none.pem",), r"^ssl\.ca\.location: .*none\.pem: expected a file, found none"),
        (("ssl.key.password.file=ca.pem",), r"^ssl\.key\.password\.file: .*expected a password, found nothing"),
    ],
)
def test_a_login_that_will_not_do_is_refused_before_anything_is_kept(
    tmp_path: Path, lines: tuple[str, ...], told: str
) -> None:
    data = DataFolder.open(tmp_path / "data", create=True)
    login = write_login(tmp_path / "own", *lines)
    with pytest.raises(ConfigurationError, match=told) as caught:
        choose_place(data, "kafka://broker:9092/updates", str(login))
    assert "hunter2" not in str(caught.value)
    assert not (data.path / "updates.json").exists()


def test_a_login_needs_a_file_and_somewhere_to_log_in(tmp_path: Path) -> None:
    data = DataFolder.open(tmp_path / "data", create=True)
    with pytest.raises(ConfigurationError, match=r"--updates-login: .*/none: cannot read: No such file"):
        require_login(str(tmp_path / "none"))
    with pytest.raises(ConfigurationError, match="contributions are embedded; name the topic too: --updates-log"):
        choose_place(data, "", str(write_login(tmp_path / "own")))


def test_the_log_does_not_change_under_an_open_round(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    log = open_log(UpdatesPlace(), tmp_path, ledger)
    assert isinstance(log, SegmentLog)
    log.close()
    task = RoundTask(
        tenant="acme",
        model="fraud",
        round_id="fraud-1",
        base="",
        training_graph="",
        parameters=(),
        length=1,
        issued=1,
        deadline=2,
    )
    spec = RoundSpec(model="fraud")
    held = Round(round_id="fraud-1", spec=spec, task=task, announcement=b"", state=State.FROZEN.value, opened=1.0)
    ledger.save_round(round_id="fraud-1", model="fraud", state=held.state, created=1.0, record=pack(held))
    elsewhere = UpdatesPlace(url="kafka://127.0.0.1:1/updates")
    with pytest.raises(ConfigurationError, match="round fraud-1 is FROZEN and has its contributions at embedded"):
        open_log(elsewhere, tmp_path, ledger)
    open_log(UpdatesPlace(), tmp_path, ledger).close()
    ledger.close()


def test_a_broker_that_does_not_answer_leaves_the_choice_open(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    with pytest.raises(Unavailable, match="kafka://127"):
        open_log(UpdatesPlace(url="kafka://127.0.0.1:1/updates"), tmp_path, ledger, patience_s=0.3)
    open_log(UpdatesPlace(), tmp_path, ledger).close()
    ledger.close()
