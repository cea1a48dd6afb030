"""Where a platform keeps model files, as its data folder says."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from atoll import stores
from atoll.cli import app
from atoll.settings import ConfigurationError, DataFolder
from atoll.stores import StorePlaces, choose_gateway_store, choose_store, places_of, require_holds
from fl_coordinator.ledger import Ledger
from fl_coordinator.retention import DAY_S
from model_delta.object_store import ObjectStore
from model_delta.store import DirectoryStore
from tests.atoll.platform_process import answer, atoll, free_run, lines, platform, write_mlp, write_rollout
from tests.fakes import s3_server
from tests.fl_coordinator.test_ledger import release


def test_the_choice_stays_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = DataFolder.open(tmp_path / "data", create=True)
    assert places_of(data) == StorePlaces()
    choose_store(data, "")
    assert not (data.path / "store.json").exists()
    monkeypatch.chdir(tmp_path)
    choose_store(data, "models")
    assert places_of(data).url == str(tmp_path / "models")
    assert not (tmp_path / "models").exists()  # nothing is made before it is used
    choose_store(data, "s3://bucket/models")
    choose_gateway_store(data, "eu-west", "memory://")
    choose_store(data, "")
    assert places_of(data) == StorePlaces(url="s3://bucket/models", gateways={"eu-west": "memory://"})
    assert isinstance(stores.coordinator_store(data), ObjectStore)
    assert isinstance(stores.gateway_store(data, "eu-west"), ObjectStore)
    assert isinstance(stores.gateway_store(data, "ap-south"), DirectoryStore)
    choose_store(data, "default")
    stores.coordinator_store(data).put("blob", "b", b"here")
    assert (data.path / "coordinator" / "store" / "blob" / "b").read_bytes() == b"here"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("memory://", "outlives the process"),
        ("http://host/models", "--store: store http://host/models: expected a folder"),
        ("s3://key:hush@bucket/models", "found a login"),
    ],
)
def test_what_is_no_store_is_refused_before_anything_is_made(tmp_path: Path, url: str, said: str) -> None:
    done = CliRunner().invoke(app, ["up", "--data", str(tmp_path / "data"), "--store", url])
    assert isinstance(done.exception, ConfigurationError)
    assert said in str(done.exception)
    assert "hush" not in str(done.exception)
    assert not (tmp_path / "data").exists()


def test_how_long_things_stay(tmp_path: Path) -> None:
    data = DataFolder.open(tmp_path / "data", create=True)
    path = data.path / "store.json"
    path.write_text('{"window_days": 30, "grace_hours": 2}')
    terms = places_of(data).terms
    assert (terms.window_s, terms.grace_s) == (30 * DAY_S, 7_200.0)
    for text, said in (
        ('{"window_days": 0}', "window_days: expected 1 to 3650, found 0"),
        ('{"grace_hours": 0}', "grace_hours: expected 1"),
        ('{"windowdays": 1}', "expected url, gateways, window_days"),
        ("{", "as JSON"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigurationError, match=said):
            places_of(data)


def test_a_store_without_what_was_published_is_refused(tmp_path: Path) -> None:
    ledger, store = Ledger(tmp_path / "ledger.sqlite"), DirectoryStore(tmp_path / "store")
    require_holds(store, ledger, "here")
    record = release(1)
    ledger.add_release(record)
    with pytest.raises(ConfigurationError, match=r"store here: expected version .* copy the objects"):
        require_holds(store, ledger, "here")
    store.put("manifest", record.manifest, b"envelope")
    require_holds(store, ledger, "here")
    ledger.close()


def test_gc_tells_what_it_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, Any]] = []

    class Client:
        def post(self, path: str, body: Any, *, timeout_s: float) -> Any:
            asked.append((path, body))
            return {
                "dry_run": body["dry_run"],
                "freed_bytes": 1234,
                "removed": {"delivery": 1, "blob": 3},
                "retired": ["a" * 64],
                "kept": {"plan": 5, "window": 2},
                "unreadable": ["b" * 64] if body["dry_run"] else [],
                "trimmed": 2,
            }

    monkeypatch.setattr(stores, "operator", lambda data, contact_s: Client())
    for arguments in (["--dry-run"], [], ["--json"]):
        assert CliRunner().invoke(app, ["store", "gc", "--data", str(tmp_path), *arguments]).exit_code == 0
    stores.clean_store(tmp_path, dry_run=True, contact_s=1, as_json=False)
    text = capsys.readouterr().out
    assert "would remove: 1 delivery, 3 blob (1234 bytes)" in text
    assert "versions given up: 1" in text
    assert "rounds whose mean and shares left the ledger: 2" in text
    assert "kept, by reason: 5 plan, 2 window" in text
    assert "no blob is removed: " + "b" * 64 in text
    stores.clean_store(tmp_path, dry_run=False, contact_s=1, as_json=True)
    assert json.loads(capsys.readouterr().out)["freed_bytes"] == 1234
    assert [body["dry_run"] for _, body in asked] == [True, False, False, True, False]


@pytest.mark.slow
def test_a_platform_on_a_bucket_and_back_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Publish, roll out, decide, clean; after a restart everything is still there, and a bare folder is refused."""
    data = tmp_path / "data"
    with s3_server.running(tmp_path / "s3") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        folder = tmp_path / "s3" / s3_server.BUCKET / "shop"
        with platform(data, port=free_run(4), store=f"s3://{s3_server.BUCKET}/shop"):
            version = answer(data, "publish", str(write_mlp(tmp_path / "m.onnx", 1)), "--name", "first")["manifest"]
            answer(data, "rollout", "apply", str(write_rollout(tmp_path / "one.yaml", "one")))
            ran = atoll(data, "device", "run", "--count", "3", "--rate", "4", "--json")
            assert ran.returncode == 0, ran.stderr
            assert [line.get("version") for line in lines(ran.stdout) if line["event"] == "decision"][1:] == [
                version
            ] * 2
            assert (folder / "manifest" / version).is_file()
            assert not (data / "coordinator" / "store").exists()
            (folder / "blob" / ("f" * 64)).write_bytes(b"left by a crash")
            os.utime(folder / "blob" / ("f" * 64), (1_000_000_000, 1_000_000_000))
            assert answer(data, "store", "gc", "--dry-run")["removed"] == {"blob": 1}
            cleaned = answer(data, "store", "gc")
            assert (cleaned["removed"], cleaned["freed_bytes"], cleaned["retired"]) == ({"blob": 1}, 15, [])
            assert cleaned["kept"]["plan"] > 0
            assert not (folder / "blob" / ("f" * 64)).exists()
        secret = server.environment["AWS_SECRET_ACCESS_KEY"].encode()
        assert not [path for path in data.rglob("*") if path.is_file() and secret in path.read_bytes()]
        with platform(data):
            second = answer(data, "publish", str(write_mlp(tmp_path / "m.onnx", 2)))
            assert second["parents"] == [version]
            assert (folder / "manifest" / second["manifest"]).is_file()
        refused = atoll(data, "coordinator", "run", "--store", "default")
        assert (refused.returncode, "copy the objects" in refused.stderr) == (2, True), refused.stderr
