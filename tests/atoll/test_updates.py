from pathlib import Path

import msgspec
import pytest

from atoll.settings import ConfigurationError, DataFolder
from atoll.updates import EMBEDDED, UpdatesPlace, aggregator_place, choose_place, open_log, place_of
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
    with pytest.raises(ConfigurationError, match=r"a1/updates\.json: expected url and properties as JSON"):
        aggregator_place(data, "a1")


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
