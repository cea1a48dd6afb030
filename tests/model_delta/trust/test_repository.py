"""The authority's side: what may be staged, signed and published, and what a crash between two files leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from model_delta.digest import digest_of
from model_delta.errors import Malformed, NotFound, SignatureInvalid, StorageFull, Untrusted
from model_delta.trust.client import Trust
from model_delta.trust.metadata_files import KEEP_VERSIONS
from model_delta.trust.paths import KIND, delegated_role, version_path
from model_delta.trust.repository import Delegation, Repository, Target
from model_delta.trust.signers import CallableSigner, signer_of
from model_delta.trust.updater import RoleKeys
from tests.fakes.tuf_site import DAY, NOW, ROLE, TENANT, MemoryStore, Mirror, Site, keys_of, new_key, signers


@pytest.fixture
def site() -> Site:
    return Site()


def test_terms_are_as_promised(site: Site) -> None:
    left = {status.role: (status.expires - NOW) / DAY for status in site.repository.status()}
    assert left == {"root": 365, "targets": 90, ROLE: 90, "snapshot": 7, "timestamp": 1}


def test_what_has_less_than_half_its_time_is_due(site: Site) -> None:
    due = site.repository.due
    assert due(NOW) == ()
    assert due(NOW + 0.6 * DAY) == ("timestamp",)
    assert due(NOW + 4 * DAY) == ("snapshot", "timestamp")
    assert set(due(NOW + 50 * DAY)) == {"targets", ROLE, "snapshot", "timestamp"}
    assert set(due(NOW + 200 * DAY)) == {"root", "targets", ROLE, "snapshot", "timestamp"}


def test_a_snapshot_is_signed_anew_only_when_it_must(site: Site) -> None:
    def versions() -> tuple[int, int]:
        found = {status.role: status.version for status in site.repository.status()}
        return found["snapshot"], found["timestamp"]

    site.publish()
    assert versions() == (1, 2)
    site.now = NOW + 4 * DAY
    site.publish()
    assert versions() == (2, 3)
    site.release(b"second")
    site.publish()
    assert versions() == (3, 4)


def test_nothing_can_be_done_before_the_ceremony() -> None:
    repository = Repository(MemoryStore())
    with pytest.raises(NotFound, match="hold the ceremony first"):
        repository.status()
    with pytest.raises(NotFound, match="nothing waits to be signed"):
        repository.finish("root")
    with pytest.raises(Malformed, match="found none for targets, snapshot, timestamp"):
        repository.stage_root(NOW, {"root": keys_of([new_key()])})


@pytest.mark.parametrize(
    ("roles", "words"),
    [
        ({"roots": keys_of([new_key()])}, "expected roles root, targets, snapshot, timestamp, found roots"),
        ({"root": keys_of([new_key()], 2)}, "expected a threshold from 1 to 1, found 2"),
        ({"root": keys_of([new_key()], 0)}, "expected a threshold from 1 to 1, found 0"),
        ({"root": RoleKeys((b"no key",))}, "public key"),
    ],
)
def test_a_root_that_could_not_work_is_not_staged(site: Site, roles: dict[str, RoleKeys], words: str) -> None:
    with pytest.raises(Malformed, match=words):
        site.repository.stage_root(NOW, roles)
    assert site.repository.staged() == ()


def test_signatures_are_counted_by_holder(site: Site) -> None:
    repository = site.repository
    assert repository.stage_root(NOW, {}).missing == 2
    first, second = signers(*site.root[:2])
    assert repository.sign_staged("root", first).missing == 1
    assert repository.sign_staged("root", first).missing == 1
    with pytest.raises(SignatureInvalid, match=r"root 2: 1 signature\(s\) missing, 1 there"):
        repository.finish("root")
    with pytest.raises(Untrusted, match="has no say in it"):
        repository.sign_staged("root", signer_of(new_key()))
    assert repository.sign_staged("root", second).missing == 0
    assert repository.finish("root") == 2


def test_new_holders_need_the_old_ones_and_themselves(site: Site) -> None:
    new = [new_key() for _ in range(3)]
    site.repository.stage_root(NOW, {"root": keys_of(new, 2)})
    for signer in signers(*new[:2]):
        assert site.repository.sign_staged("root", signer).missing == 2
    for signer, missing in zip(signers(*site.root[1:]), (1, 0), strict=True):
        assert site.repository.sign_staged("root", signer).missing == missing


def test_a_keyring_signs_by_a_callable(site: Site) -> None:
    key, asked = new_key(), []

    def sign(data: bytes) -> bytes:
        asked.append(data)
        return key.sign(data)

    site.repository.stage_targets(NOW, [Delegation("us-east", TENANT, keys_of([key]))])
    site.finish("targets", site.targets[:2])
    role = delegated_role("us-east", TENANT)
    path = version_path("us-east", TENANT, "m", digest_of(b"x"))
    signer = CallableSigner(key.public_key(), sign)
    assert site.repository.add_targets(role, NOW, [signer], {path: Target(1, digest_of(b"x"))}) == 1
    assert asked[0].startswith(b"{")
    assert site.repository.vouched(role) == {path}
    with pytest.raises(Malformed, match="expected a callable"):
        CallableSigner.from_priv_key_uri("file:key", signer.public_key)


def test_a_role_that_was_dropped_vouches_for_nothing(site: Site, tmp_path: Path) -> None:
    device = Trust(tmp_path, site.provisioned(), Mirror(site))
    device.refresh(NOW)
    site.repository.stage_targets(NOW, without=[ROLE])
    site.finish("targets", site.targets[:2])
    site.publish()
    device.refresh(NOW)
    with pytest.raises(Untrusted, match="no role that may vouch for it does"):
        device.target(site.first, NOW)
    with pytest.raises(NotFound, match="not delegated"):
        site.release(b"more")


@pytest.mark.parametrize(
    "parts",
    [("", "a", "m"), ("a/b", "a", "m"), ("eu.west", "a", "m"), ("*", "a", "m"), ("eu", "[a]", "m"), ("eu", "a", "?")],
)
def test_names_that_would_widen_a_path_are_refused(parts: tuple[str, str, str]) -> None:
    with pytest.raises(Malformed, match="expected 1 to 64 letters"):
        version_path(*parts, digest_of(b""))


def test_old_roots_stay_and_old_snapshots_go(site: Site) -> None:
    for _ in range(KEEP_VERSIONS + 4):
        site.rotate_root()
        site.release(b"next")
        site.publish()
    names = site.store.names(KIND)
    assert len([name for name in names if name.endswith(".root.json")]) == KEEP_VERSIONS + 5
    assert len([name for name in names if name.endswith(".snapshot.json")]) == KEEP_VERSIONS
    assert len([name for name in names if name.endswith(f".{ROLE}.json")]) == KEEP_VERSIONS


def test_online_keys_are_replaced_without_a_moment_in_which_a_client_is_refused(site: Site, tmp_path: Path) -> None:
    """A device looks after every file that the rotation writes, and so does one that is provisioned just then."""
    old = (site.snapshot, site.timestamp)
    new = (new_key(), new_key())
    looks = 0

    class Watched(MemoryStore):
        def put(self, kind: str, name: str, data: bytes) -> None:
            nonlocal looks
            super().put(kind, name, data)
            for folder in (tmp_path / "old", tmp_path / f"new{looks}"):
                assert Trust(folder, site.provisioned(), Mirror(site)).refresh(NOW).state == "current"
            looks += 1

    watched = Watched()
    watched.objects = site.store.objects
    site.store = watched
    repository = site.repository = Repository(watched)
    repository.stage_root(NOW, {"snapshot": keys_of(new[:1]), "timestamp": keys_of(new[1:])})
    for signer in signers(*site.root[:2]):
        repository.sign_staged("root", signer)
    repository.publish(NOW, signers(old[0], new[0]), signers(old[1], new[1]))
    repository.finish("root")
    repository.publish(NOW, signers(new[0]), signers(new[1]))
    assert looks > 4


def test_a_full_disk_at_any_file_leaves_the_old_repository_in_force(site: Site, tmp_path: Path) -> None:
    for room in range(4):

        class Full(MemoryStore):
            left = room

            def put(self, kind: str, name: str, data: bytes) -> None:
                if self.left == 0:
                    raise StorageFull("no room")
                self.left -= 1
                super().put(kind, name, data)

        full = Full()
        full.objects = site.store.objects
        site.repository = Repository(full)
        try:
            site.release(b"%d" % room)
            site.publish()
        except StorageFull:
            pass
        device = Trust(tmp_path / str(room), site.provisioned(), Mirror(site))
        assert device.refresh(NOW).state == "current"
        assert device.target(site.first, NOW).length
    site.repository = Repository(site.store)
    assert site.publish()
