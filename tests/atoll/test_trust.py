"""A key ceremony as three people hold it, and what they do when a holder leaves, a key leaks or a term ends."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from atoll.cli import app
from atoll.settings import ConfigurationError, DataFolder
from atoll.trust_publishing import trust_of
from atoll.trust_sticks import VARIABLE, make_stick, open_stick
from model_delta.digest import digest_of
from model_delta.store import DirectoryStore
from model_delta.trust.client import Trust
from model_delta.trust.fetchers import StoreSource
from model_delta.trust.paths import KIND, version_path
from model_delta.trust.repository import DAY_S, Target

WORDS = "five random words are enough"
ASKING = """
import sys
from pathlib import Path
from atoll.trust_sticks import passphrases
old, new = map(Path, sys.argv[1:])
passphrases([old, new], [], {}, new=[new])
"""


class Ceremony:
    """A data folder and a drawer of sticks, used through the command line."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, folder / "data"
        DataFolder.open(self.data, create=True)
        self.words = folder / "words"
        self.words.write_text(WORDS + "\n")

    def stick(self, name: str) -> str:
        return str(self.folder / "sticks" / name)

    def run(self, *words: str, sticks: str = "", new: str = "") -> Result:
        options = [option for name in sticks.split() for option in ("--stick", self.stick(name))]
        options += [option for name in new.split() for option in ("--new-stick", self.stick(name))]
        if options:
            options += ["--passphrase-file", str(self.words)]
        return CliRunner().invoke(app, ["trust", *words, *options, "--data", str(self.data), "--json"])

    def said(self, *words: str, sticks: str = "", new: str = "") -> dict[str, Any]:
        result = self.run(*words, sticks=sticks, new=new)
        assert result.exception is None, result.exception
        answer: dict[str, Any] = json.loads(result.stdout)
        return answer

    def refused(self, *words: str, sticks: str = "", new: str = "") -> str:
        result = self.run(*words, sticks=sticks, new=new)
        assert isinstance(result.exception, ConfigurationError)
        return str(result.exception)

    @property
    def store(self) -> DirectoryStore:
        return DirectoryStore(self.data / "coordinator" / "store")

    def device(self, name: str = "device") -> Trust:
        root = (self.data / "trust" / "root.json").read_bytes()
        return Trust(self.folder / name, root, StoreSource(self.store, KIND))


@pytest.fixture
def ceremony(tmp_path: Path) -> Ceremony:
    held = Ceremony(tmp_path)
    held.said("init", sticks="ann ben cho")
    return held


def rows(answer: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["role"]: row for row in answer["roles"]}


def test_the_ceremony_puts_a_root_of_trust_in_force(ceremony: Ceremony) -> None:
    found = rows(ceremony.said("status"))
    assert set(found) == {"root", "targets", "core.acme", "snapshot", "timestamp"}
    assert {role: round(row["days_left"]) for role, row in found.items()} == {
        "root": 365,
        "targets": 90,
        "core.acme": 90,
        "snapshot": 7,
        "timestamp": 1,
    }
    assert all(row["in_force"] and row["version"] == 1 for row in found.values())
    assert found["root"]["can_sign"] == ["ann", "ben", "cho"]
    assert (found["root"]["threshold"], found["timestamp"]["threshold"]) == (2, 1)
    for path in (ceremony.data / "trust").glob("*.pem"):
        assert path.stat().st_mode & 0o077 == 0
    assert b"ENCRYPTED" in Path(ceremony.stick("ann"), "root.pem").read_bytes()


def test_a_device_believes_versions_that_the_release_key_vouches_for(ceremony: Ceremony) -> None:
    publishing = trust_of(DataFolder.open(ceremony.data))
    digest = digest_of(b"a manifest")
    path, now = version_path("core", "acme", "fraud", digest), time.time()
    publishing.vouch("core", {path: Target(10, digest)}, now)
    device = ceremony.device()
    device.refresh(now)
    assert device.target(path, now).digest == digest
    assert device.anchors("acme", now) == publishing.anchors()


def test_a_second_ceremony_and_used_sticks_are_refused(ceremony: Ceremony) -> None:
    assert "the ceremony was held" in ceremony.refused("init", sticks="x y z")
    other = Ceremony(ceremony.folder / "other")
    other.folder = ceremony.folder
    assert "expected an empty stick, found stick.json" in other.refused("init", sticks="ann y z")
    assert not Path(other.stick("y")).exists()
    assert "no ceremony was held yet" in other.refused("status")


@pytest.mark.parametrize("sticks", ["ann", "ann ben", "ann ben ben"])
def test_fewer_than_three_holders_are_refused(tmp_path: Path, sticks: str) -> None:
    assert "three or more different sticks" in Ceremony(tmp_path).refused("init", sticks=sticks)
    assert not (tmp_path / "sticks").exists()


def test_a_short_passphrase_is_refused(tmp_path: Path) -> None:
    held = Ceremony(tmp_path)
    held.words.write_text("secret")
    assert "expected a passphrase of 12 characters or more, found 6" in held.refused("init", sticks="a b c")
    assert not (tmp_path / "sticks").exists()


def test_a_file_with_a_passphrase_a_line_is_not_taken_for_one_passphrase(tmp_path: Path) -> None:
    held = Ceremony(tmp_path)
    held.words.write_text("\n".join([WORDS] * 3))
    assert "expected one passphrase on one line, found 3 lines" in held.refused("init", sticks="a b c")
    assert not (tmp_path / "sticks").exists()


def test_a_person_is_asked_twice_for_a_new_sticks_passphrase_alone(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    new.mkdir()
    make_stick(old, WORDS)
    person, terminal = pty.openpty()
    command = [sys.executable, "-c", ASKING, str(old), str(new)]
    with subprocess.Popen(command, stdin=terminal, stderr=subprocess.PIPE, start_new_session=True) as asking:
        assert asking.stderr is not None
        for prompt, line in ((b"old: passphrase: ", b"one"), (b"new: new passphrase: ", b"two"), (b"more: ", b"tow")):
            told = b""
            while not told.endswith(prompt):
                told += asking.stderr.read(1) or pytest.fail(told.decode())
            os.write(person, line + b"\n")
        assert b"the two passphrases differ" in asking.stderr.read()
    os.close(person)
    os.close(terminal)


def test_a_passphrase_that_is_no_text_is_refused(tmp_path: Path) -> None:
    held = Ceremony(tmp_path)
    held.words.write_bytes(b"\xff\xfe\x00")
    assert "expected a passphrase as text" in held.refused("init", sticks="a b c")


def test_a_status_makes_nothing(tmp_path: Path) -> None:
    held = Ceremony(tmp_path)
    held.refused("status")
    assert not (held.data / "keyring").exists()


def test_the_wrong_passphrase_opens_nothing(ceremony: Ceremony) -> None:
    ceremony.words.write_text("not those words at all")
    assert "the passphrase does not open it" in ceremony.refused("rotate", "root", sticks="ann ben")


def test_any_two_holders_renew_the_root(ceremony: Ceremony) -> None:
    answer = ceremony.said("rotate", "root", sticks="cho ann")
    assert rows(answer)["root"]["version"] == 2
    assert ceremony.device().refresh(time.time()).root == 2


def test_signatures_may_come_one_by_one(ceremony: Ceremony) -> None:
    first = ceremony.said("rotate", "root", sticks="ben")
    assert "root 2: 1 more signature(s) needed, of ann, cho." in first["message"]
    assert (rows(first)["root"]["version"], first["waiting"][0]["missing"]) == (1, 1)
    assert ceremony.said("rotate", "root", sticks="ben")["waiting"][0]["missing"] == 1
    assert rows(ceremony.said("rotate", "root", sticks="cho"))["root"]["version"] == 2


def test_what_waits_can_be_dropped(ceremony: Ceremony) -> None:
    ceremony.said("rotate", "online", sticks="ben")
    assert "found one for online" in ceremony.refused("rotate", "root", sticks="ann")
    answer = ceremony.said("rotate", "root", "--discard")
    assert (answer["waiting"], rows(answer)["root"]["version"]) == ([], 1)
    assert not list((ceremony.data / "trust").glob("*.next.pem"))


def test_targets_are_renewed_and_a_region_joins(ceremony: Ceremony) -> None:
    answer = ceremony.said("rotate", "targets", "--region", "eu-west", sticks="ann ben")
    found = rows(answer)
    assert (found["targets"]["version"], found["core.acme"]["version"], found["eu-west.acme"]["version"]) == (2, 2, 1)
    assert ceremony.device().refresh(time.time()).targets == 2


def test_online_keys_are_replaced_under_a_running_fleet(ceremony: Ceremony) -> None:
    device = ceremony.device()
    device.refresh(time.time())
    before = rows(ceremony.said("status"))
    after = rows(ceremony.said("rotate", "online", sticks="ann ben"))
    for role in ("snapshot", "timestamp"):
        assert after[role]["in_force"]
        assert after[role]["keys"] != before[role]["keys"]
    assert device.refresh(time.time()).root == 2
    assert ceremony.device("new").refresh(time.time()).state == "current"


def test_a_holder_leaves_and_the_lost_stick_signs_nothing_any_more(ceremony: Ceremony) -> None:
    device = ceremony.device()
    device.refresh(time.time())
    answer = ceremony.said("rotate", "root", sticks="ann ben", new="dan eve fay")
    found = rows(answer)
    assert found["root"]["can_sign"] == found["targets"]["can_sign"] == ["dan", "eve", "fay"]
    assert all(row["in_force"] for row in found.values())
    assert device.refresh(time.time()).root == 2
    for what in ("root", "targets", "online"):
        assert "have no say any more" in ceremony.refused("rotate", what, sticks="cho")
        assert ceremony.said("status")["waiting"] == []
    assert rows(ceremony.said("rotate", "targets", sticks="dan fay"))["targets"]["version"] == 3
    assert device.refresh(time.time()).targets == 3
    assert ceremony.device("new").refresh(time.time()).root == 2


def test_a_coordinator_keeps_fresh_what_it_may_sign_and_names_the_rest(ceremony: Ceremony) -> None:
    publishing, now = trust_of(DataFolder.open(ceremony.data)), time.time()
    assert publishing.keep_fresh(now) == ()
    assert publishing.repository.status()[-1].version == 1
    publishing.keep_fresh(now + 0.6 * DAY_S)
    assert publishing.repository.status()[-1].version == 2
    later = now + 60 * DAY_S
    assert publishing.keep_fresh(later) == ("targets",)
    found = {status.role: status for status in publishing.repository.status()}
    assert found["core.acme"].expires > later + 89 * DAY_S
    assert ceremony.device().refresh(later).state == "current"


def test_nothing_is_kept_fresh_before_the_ceremony(tmp_path: Path) -> None:
    assert trust_of(DataFolder.open(Ceremony(tmp_path).data)).keep_fresh(time.time()) == ()


def test_a_ceremony_that_broke_off_before_the_online_roles_is_completed(ceremony: Ceremony) -> None:
    publishing = trust_of(DataFolder.open(ceremony.data))
    for name in ("timestamp.json", "1.snapshot.json", "1.core.acme.json"):
        ceremony.store.remove(KIND, name)
    publishing.keep_fresh(time.time())
    assert ceremony.device().refresh(time.time()).state == "current"


def test_the_passphrase_may_come_from_the_environment(tmp_path: Path) -> None:
    held = Ceremony(tmp_path)
    options = [option for name in ("a", "b", "c") for option in ("--stick", held.stick(name))]
    done = CliRunner().invoke(app, ["trust", "init", *options, "--data", str(held.data)], env={VARIABLE: WORDS})
    assert done.exit_code == 0
    assert "2 of a, b, c" in done.stdout
    asked = CliRunner().invoke(app, ["trust", "rotate", "root", *options, "--data", str(held.data)], env={VARIABLE: ""})
    assert "no passphrase; pass --passphrase-file" in str(asked.exception)


def test_a_damaged_stick_says_what_is_wrong(tmp_path: Path) -> None:
    stick = tmp_path / "ann"
    keys = make_stick(stick, WORDS)
    assert open_stick(stick, WORDS)["root"].private_bytes_raw() == keys["root"].private_bytes_raw()
    (stick / "targets.pem").unlink()
    with pytest.raises(ConfigurationError, match="is this the right stick"):
        open_stick(stick, WORDS)
    (stick / "stick.json").write_text("{")
    with pytest.raises(ConfigurationError, match="expected a stick's record"):
        open_stick(stick, WORDS)
    with pytest.raises(ConfigurationError, match="is it plugged in"):
        open_stick(tmp_path / "nobody", WORDS)
