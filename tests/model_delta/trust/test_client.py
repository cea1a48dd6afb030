"""A device learns what is in force, keeps it through kills and absences, and tells when it has not heard for long."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tuf.api.metadata import TargetFile

from model_delta.digest import digest_of
from model_delta.encoding import pack
from model_delta.errors import Expired, Malformed, NotFound, TooLarge, Unavailable, Untrusted
from model_delta.trust.checkin import CheckInAnswer, answer_check_in, read_answer
from model_delta.trust.client import GRACE_S, Trust
from model_delta.trust.paths import KIND, anchors_path
from model_delta.trust.updater import TrustAnchors
from tests.fakes.tuf_site import DAY, NOW, ROLE, TENANT, Mirror, Site, new_key, signers


@pytest.fixture
def site() -> Site:
    return Site()


@pytest.fixture
def mirror(site: Site) -> Mirror:
    return Mirror(site)


def device(folder: Path, mirror: Mirror) -> Trust:
    return Trust(folder / "trust", mirror.site.provisioned(), mirror)


def test_a_new_device_believes_what_is_in_force(tmp_path: Path, site: Site, mirror: Mirror) -> None:
    trust = device(tmp_path, mirror)
    assert trust.status(NOW).state == "unknown"
    status = trust.refresh(NOW)
    assert (status.state, status.root, status.timestamp, status.snapshot, status.targets) == ("current", 1, 1, 1, 1)
    data = site.files[site.first]
    target = trust.target(site.first, NOW)
    assert (target.length, target.digest) == (len(data), digest_of(data))
    assert trust.download(site.first, NOW, tmp_path).read_bytes() == data
    assert trust.anchors(TENANT, NOW) == site.anchors


def test_nothing_is_known_before_the_first_refresh(tmp_path: Path, site: Site, mirror: Mirror) -> None:
    with pytest.raises(Unavailable, match="refresh first"):
        device(tmp_path, mirror).target(site.first, NOW)


def test_a_release_is_seen_and_an_unchanged_repository_costs_two_questions(
    tmp_path: Path, site: Site, mirror: Mirror
) -> None:
    trust = device(tmp_path, mirror)
    trust.refresh(NOW)
    second = site.release(b"the second version's manifest")
    site.publish()
    trust.refresh(NOW)
    assert trust.target(second, NOW).digest == digest_of(site.files[second])
    mirror.asked.clear()
    trust.refresh(NOW)
    assert mirror.asked == ["2.root.json", "timestamp.json"]


def test_a_revoked_version_is_vouched_for_by_nobody(tmp_path: Path, site: Site, mirror: Mirror) -> None:
    trust = device(tmp_path, mirror)
    site.repository.add_targets(ROLE, NOW, signers(site.region), revoke=[site.first])
    site.publish()
    trust.refresh(NOW)
    with pytest.raises(Untrusted, match="no role that may vouch for it does"):
        trust.target(site.first, NOW)


def test_anchors_rotate_with_the_repository(tmp_path: Path, site: Site, mirror: Mirror) -> None:
    trust = device(tmp_path, mirror)
    trust.refresh(NOW)
    changed = TrustAnchors(TENANT, {})
    site.repository.stage_targets(NOW, anchors=changed)
    site.finish("targets", site.targets[1:])
    site.publish()
    trust.refresh(NOW)
    assert trust.anchors(TENANT, NOW) == changed


@pytest.mark.parametrize(
    ("tenant", "algorithm", "kind", "words"),
    [
        ("globex", "sha256", Untrusted, "expected the anchors of 'acme', found those of 'globex'"),
        (TENANT, "sha512", Malformed, "expected a sha256, found sha512"),
    ],
)
def test_anchors_that_the_holders_signed_by_mistake_are_not_taken(
    tmp_path: Path, site: Site, mirror: Mirror, tenant: str, algorithm: str, kind: type[Exception], words: str
) -> None:
    data = pack(TrustAnchors(tenant, {}))

    def mistake(signed: Any) -> None:
        signed.version += 1
        path, digest = anchors_path(TENANT), hashlib.new(algorithm, data).hexdigest()
        signed.targets[path] = TargetFile(len(data), {algorithm: digest}, path)

    site.store.put(KIND, f"{digest_of(data)}.anchors", data)
    site.store.put(KIND, "2.targets.json", site.forged("targets", mistake, *site.targets[:2]).to_bytes())
    site.publish()
    trust = device(tmp_path, mirror)
    trust.refresh(NOW)
    with pytest.raises(kind, match=words):
        trust.anchors(TENANT, NOW)


def test_past_expiry_nothing_new_is_taken_and_the_alarm_grows(tmp_path: Path, site: Site, mirror: Mirror) -> None:
    trust = device(tmp_path, mirror)
    trust.refresh(NOW)
    assert trust.status(NOW + DAY - 1).alarm == ""
    stale = trust.status(NOW + DAY + 60)
    assert stale.state == "stale"
    assert "expired 60 s ago; nothing new is taken" in stale.alarm
    with pytest.raises(Expired, match="nothing new is taken"):
        trust.target(site.first, NOW + DAY + 60)
    with pytest.raises(Expired, match=r"timestamp\.json is expired"):
        trust.refresh(NOW + DAY + 60)
    frozen = trust.status(NOW + DAY + GRACE_S)
    assert frozen.state == "frozen"
    assert "holding news back" in frozen.alarm


def test_a_device_away_for_400_days_and_12_root_rotations_comes_back_by_itself(tmp_path: Path, site: Site) -> None:
    mirror = Mirror(site)
    trust = device(tmp_path, mirror)
    trust.refresh(NOW)
    for month in range(12):
        site.now = NOW + (month + 1) * 33 * DAY
        site.rotate_root(root=[new_key() for _ in range(3)], timestamp=[new_key()])
        site.repository.stage_targets(site.now)
        site.finish("targets", site.targets[:2])
        site.publish()
    later = site.now = NOW + 400 * DAY
    with pytest.raises(Expired, match=r"timestamp\.json is expired"):
        device(tmp_path, mirror).refresh(later)
    newest = site.release(b"a version of today")
    site.publish()
    for back in (device(tmp_path, mirror), device(tmp_path / "new", mirror)):
        status = back.refresh(later)
        assert (status.state, status.root) == ("current", 13)
        assert back.target(newest, later).digest == digest_of(b"a version of today")


def test_the_check_in_asks_nothing_else_when_nothing_else_is_new(tmp_path: Path, site: Site, mirror: Mirror) -> None:
    trust = device(tmp_path, mirror)
    trust.refresh(NOW)
    mirror.asked.clear()
    answer = answer_check_in(trust.check_in(7), site.store, KIND)
    assert read_answer(answer) == (CheckInAnswer(7, 1), None)
    assert trust.refresh(NOW, answer).timestamp == 1
    site.publish()
    assert trust.refresh(NOW, answer_check_in(trust.check_in(8), site.store, KIND)).timestamp == 2
    assert mirror.asked == []
    site.rotate_root()
    second = site.release(b"another")
    site.publish()
    status = trust.refresh(NOW, answer_check_in(trust.check_in(9), site.store, KIND))
    assert (status.root, status.timestamp) == (2, 3)
    assert trust.target(second, NOW).length == 7
    assert mirror.asked == ["2.root.json", "2.snapshot.json", f"2.{ROLE}.json"]


def test_a_check_in_without_a_timestamp_held_fetches_it(tmp_path: Path, site: Site, mirror: Mirror) -> None:
    trust = device(tmp_path, mirror)
    assert trust.refresh(NOW, pack(CheckInAnswer(1, 1))).timestamp == 1
    assert "timestamp.json" in mirror.asked


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", Malformed),
        (pack([1, 1, 2, b"x"]), Malformed),
        (pack([1, 1, 1, b"not deflated"]), Malformed),
        (pack([1, 1, 0, b"x" * 20_000]), TooLarge),
        (pack([1, 1, 1, zlib.compress(bytes(50_000_000), 9)]), TooLarge),
        (pack([1, 1, 0, b"{}"]), Malformed),
    ],
)
def test_a_hostile_answer_to_the_check_in_is_refused(
    tmp_path: Path, mirror: Mirror, answer: bytes, error: type[Exception]
) -> None:
    with pytest.raises(error):
        device(tmp_path, mirror).refresh(NOW, answer)


def test_a_mirror_without_a_timestamp_says_so(site: Site) -> None:
    site.store.remove(KIND, "timestamp.json")
    with pytest.raises(NotFound):
        answer_check_in(pack([1, 1, 1]), site.store, KIND)


class Deadly(Mirror):
    """A mirror during whose n-th piece of bytes the process that reads is killed."""

    def __init__(self, site: Site, fatal: int) -> None:
        super().__init__(site)
        self._left = fatal

    def open(self, name: str, timeout_s: float) -> Iterator[bytes]:
        for piece in super().open(name, timeout_s):
            self._left -= 1
            if not self._left:
                os.kill(os.getpid(), signal.SIGKILL)
            yield piece


def test_a_kill_at_any_moment_is_healed_by_the_next_refresh(tmp_path: Path, site: Site) -> None:
    trust = device(tmp_path / "old", Mirror(site))
    trust.refresh(NOW)
    site.rotate_root()
    site.rotate_root()
    newest = site.release(b"while somebody pulls the plug")
    site.publish()
    for fatal in range(1, 30):
        folder = tmp_path / str(fatal)
        shutil.copytree(tmp_path / "old", folder, symlinks=True)
        child = os.fork()
        if not child:
            dying = device(folder, Deadly(site, fatal))
            dying.refresh(NOW)
            dying.target(newest, NOW)
            os._exit(0)
        _, ended = os.waitpid(child, 0)
        (folder / "trust" / ".timestamp.json.part").write_bytes(b"half a ti")
        again = device(folder, Mirror(site))
        assert again.refresh(NOW).root == 3
        assert again.target(newest, NOW).length
        assert not list(folder.rglob("*.part"))
        if not ended:
            break
    assert fatal > 6


@pytest.mark.parametrize("name", ["root.json", "timestamp.json", "snapshot.json", "targets.json", f"{ROLE}.json"])
@pytest.mark.parametrize("damage", ["cut", "empty", "other", "gone"])
def test_a_damaged_file_is_fetched_again(tmp_path: Path, site: Site, mirror: Mirror, name: str, damage: str) -> None:
    trust = device(tmp_path, mirror)
    trust.refresh(NOW)
    trust.target(site.first, NOW)
    path = tmp_path / "trust" / name
    good = path.read_bytes()
    path.unlink() if damage == "gone" else path.write_bytes({"cut": good[:90], "empty": b"", "other": b"{}"}[damage])
    again = device(tmp_path, mirror)
    assert again.refresh(NOW).state == "current"
    assert again.target(site.first, NOW).length
    assert path.read_bytes() == good


def test_a_mirror_that_breaks_off_leaves_what_was_verified(tmp_path: Path, site: Site) -> None:
    class Breaking(Mirror):
        def open(self, name: str, timeout_s: float) -> Iterator[bytes]:
            if name.endswith("snapshot.json"):
                raise Unavailable(f"{name}: the line broke")
            yield from super().open(name, timeout_s)

    trust = device(tmp_path, Mirror(site))
    trust.refresh(NOW)
    site.release(b"more")
    site.publish()
    broken = device(tmp_path, Breaking(site))
    with pytest.raises(Unavailable, match="the line broke"):
        broken.refresh(NOW)
    with pytest.raises(Unavailable, match="refresh first"):
        broken.target(site.first, NOW)
    assert trust.target(site.first, NOW).length
    assert device(tmp_path, Mirror(site)).refresh(NOW).snapshot == 2
