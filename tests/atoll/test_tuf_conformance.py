"""The program that the TUF conformance suite starts, tried in its spirit: exit codes, files kept, requests made."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from tuf.api.metadata import DelegatedRole, Metadata, MetaFile, Snapshot, Targets, Timestamp

from atoll.tuf_conformance import main
from model_delta.trust.paths import KIND
from tests.fakes.http_mirror import HttpMirror, served
from tests.fakes.tuf_site import DAY, Mirror, Site, new_key, signers


class Suite:
    """What the suite does around a client: start it, look at its folders, count its requests."""

    def __init__(self, folder: Path, http: HttpMirror) -> None:
        self.http, self.site = http, http.mirror.site
        self.metadata, self.targets, self.root = folder / "metadata", folder / "targets", folder / "initial_root.json"
        self.metadata.mkdir()
        self.targets.mkdir()
        self.root.write_bytes(self.site.provisioned())

    def init(self) -> int:
        return main(["--metadata-dir", str(self.metadata), "init", str(self.root)])

    def refresh(self) -> int:
        return main(["--metadata-url", f"{self.http.url}metadata/", "--metadata-dir", str(self.metadata), "refresh"])

    def download(self, name: str) -> int:
        return main(
            [
                *("--metadata-url", f"{self.http.url}metadata/", "--metadata-dir", str(self.metadata)),
                *("--target-name", name, "--target-dir", str(self.targets)),
                *("--target-base-url", f"{self.http.url}targets/", "download"),
            ]
        )

    def version(self, role: str) -> int:
        return int(Metadata.from_file(str(self.metadata / f"{role}.json")).signed.version)

    def downloaded(self) -> list[bytes]:
        return [path.read_bytes() for path in self.targets.rglob("*") if path.is_file()]


@pytest.fixture
def suite(tmp_path: Path) -> Iterator[Suite]:
    with served(Mirror(Site(now=time.time()))) as http:
        yield Suite(tmp_path, http)


def test_init_asks_nobody(suite: Suite) -> None:
    assert suite.init() == 0
    assert suite.http.asked == []
    assert (suite.metadata / "root.json").read_bytes() == suite.site.provisioned()


def test_init_without_a_root_fails(suite: Suite) -> None:
    suite.root.unlink()
    assert suite.init() == 1


def test_refresh_keeps_metadata_under_plain_names_in_the_workflows_order(suite: Suite) -> None:
    suite.init()
    assert suite.refresh() == 0
    assert [suite.version(role) for role in ("root", "timestamp", "snapshot", "targets")] == [1, 1, 1, 1]
    order = ["2.root.json", "timestamp.json", "1.snapshot.json", "1.targets.json"]
    assert suite.http.asked == [f"/metadata/{name}" for name in order]


def test_refresh_without_init_fails(suite: Suite) -> None:
    assert suite.refresh() == 1


def test_options_that_are_missing_fail(suite: Suite) -> None:
    suite.init()
    assert main(["--metadata-dir", str(suite.metadata), "refresh"]) == 1


def test_a_download_is_kept_once_and_not_asked_for_again(suite: Suite) -> None:
    suite.init()
    assert suite.download(suite.site.first) == 0
    assert suite.downloaded() == [suite.site.files[suite.site.first]]
    asked = len([path for path in suite.http.asked if "/targets/" in path])
    assert suite.download(suite.site.first) == 0
    assert len([path for path in suite.http.asked if "/targets/" in path]) == asked == 1


def test_a_target_that_is_not_there_or_altered_is_not_kept(suite: Suite) -> None:
    suite.init()
    assert suite.download("no/such/target/file") == 1
    suite.site.files[suite.site.first] += b"."
    assert suite.download(suite.site.first) == 1
    assert suite.downloaded() == []


def test_what_was_trusted_stays_when_the_news_is_bad(suite: Suite) -> None:
    suite.init()
    suite.refresh()
    suite.site.release(b"next")
    suite.site.publish()
    suite.http.mirror.instead["2.snapshot.json"] = suite.site.forged("snapshot", lambda signed: None).to_bytes()
    assert suite.refresh() == 1
    assert (suite.version("timestamp"), suite.version("snapshot")) == (2, 1)
    suite.http.mirror.instead.clear()
    assert suite.refresh() == 0
    assert suite.version("snapshot") == 2


def test_root_is_followed_even_when_the_rest_is_refused(suite: Suite) -> None:
    suite.init()
    suite.refresh()
    suite.site.rotate_root(timestamp=[new_key()])
    assert suite.refresh() == 1
    assert suite.version("root") == 2


def test_expiry_counts_for_the_newest_root_alone(suite: Suite) -> None:
    site = suite.site
    suite.init()
    now, site.now = site.now, site.now - 400 * DAY
    site.rotate_root()
    assert suite.refresh() == 1
    site.now = now
    site.rotate_root()
    assert suite.refresh() == 0
    assert suite.version("root") == 3


@pytest.mark.parametrize("role", ["?", "#", "/delegated", "../delegated"])
def test_unusual_role_names_are_quoted_in_requests_and_files(suite: Suite, role: str) -> None:
    site, key = suite.site, new_key()
    delegated = Targets(1, None, None, {}, None)
    delegated.expires = site.metadata("targets").signed.expires

    def delegate(signed: Targets) -> None:
        signed.version += 1
        assert signed.delegations is not None
        assert signed.delegations.roles is not None
        signed.delegations.roles.clear()
        signed.delegations.roles[role] = DelegatedRole(role, [], 1, False, ["*"])
        signed.add_key(signers(key)[0].public_key, role)

    targets = site.forged("targets", delegate, *site.targets)
    site.store.put(KIND, "2.targets.json", targets.to_bytes())
    metadata = Metadata(delegated)
    metadata.sign(signers(key)[0])
    name = quote(role, "")
    suite.http.mirror.instead[f"1.{name}.json"] = metadata.to_bytes()

    def list_it(signed: object) -> None:
        if isinstance(signed, Snapshot):
            signed.version = 2
            signed.meta["targets.json"] = MetaFile(2)
            signed.meta[f"{role}.json"] = MetaFile(1)
        elif isinstance(signed, Timestamp):
            signed.version = 2
            signed.snapshot_meta = MetaFile(2)

    suite.http.mirror.put(site.forged("snapshot", list_it, site.snapshot))
    suite.http.mirror.put(site.forged("timestamp", list_it, site.timestamp))
    suite.init()
    assert suite.download("nonexistent target") == 1
    assert f"/metadata/1.{name}.json" in suite.http.asked
    assert len(list(suite.metadata.glob("*.json"))) == 5


def test_it_is_a_program(suite: Suite) -> None:
    command = [sys.executable, "-m", "atoll.tuf_conformance", "--metadata-dir", str(suite.metadata)]
    assert subprocess.run([*command, "init", str(suite.root)], check=False).returncode == 0
    url = ["--metadata-url", f"{suite.http.url}metadata/"]
    assert subprocess.run([*command, *url, "refresh"], check=False).returncode == 0
    suite.http.mirror.instead["timestamp.json"] = b"{}"
    done = subprocess.run([*command, *url, "refresh"], check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("refresh: refresh: Failed to deserialize")
