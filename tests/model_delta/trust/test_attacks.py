"""What the TUF specification (1.0.31, section 1.5.2) lists, tried on a device and refused by name.

Each attack stands between a device that knows the first release and a repository that has moved on, and may rewrite
every byte on the way. The error's kind and words are asserted, because an operator reads them; and after each refusal
the device still has, and takes, what is genuine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from tuf.api.metadata import MetaFile, TargetFile

from model_delta.digest import digest_of
from model_delta.errors import (
    DigestMismatch,
    Expired,
    Malformed,
    RolledBack,
    SignatureInvalid,
    TooLarge,
    TooSlow,
    Untrusted,
)
from model_delta.trust.authority import Authority
from model_delta.trust.client import LIMITS, Trust, VouchedTarget
from model_delta.trust.fetchers import Patience
from model_delta.trust.paths import KIND, delegated_role, version_path
from model_delta.trust.repository import Delegation, Target
from model_delta.trust.updater import TrustAnchors
from tests.fakes.tuf_site import (
    DAY,
    MODEL,
    NOW,
    REGION,
    ROLE,
    TENANT,
    Mirror,
    Site,
    keys_of,
    new_key,
    signers,
)

EVIL = b"a model that approves everything"
EVIL_PATH = version_path(REGION, TENANT, MODEL, digest_of(EVIL))


class Attack:
    """A device that holds the first release, the mirror between, and a repository that may have moved on."""

    def __init__(self, folder: Path) -> None:
        self.site = Site()
        self.mirror = Mirror(self.site)
        self.device = Trust(folder / "trust", self.site.provisioned(), self.mirror)
        self.device.refresh(NOW)
        self.device.target(self.site.first, NOW)
        self.folder = folder

    def look_up(self, path: str) -> VouchedTarget:
        self.device.refresh(NOW)
        return self.device.target(path, NOW)

    def refused(self, error: type[Exception], words: str, path: str = "") -> None:
        """The refresh (or the look-up of `path` after it) fails with `error` and `words`, and the device recovers."""
        with pytest.raises(error, match=words) as caught:
            self.look_up(path or self.site.first)
        assert type(caught.value) is error
        self.mirror.instead.clear()
        self.device.refresh(NOW)
        assert self.device.target(self.site.first, NOW).length


@pytest.fixture
def attack(tmp_path: Path) -> Attack:
    return Attack(tmp_path)


def vouch(path: str, data: bytes) -> Callable[[Any], None]:
    def edit(signed: Any) -> None:
        signed.version += 1
        signed.targets[path] = TargetFile(len(data), {"sha256": digest_of(data)}, path)

    return edit


def swap(signed: Any) -> None:
    """Another file in the genuine one's place, with not a byte more."""
    _, target = signed.targets.popitem()
    signed.targets[EVIL_PATH] = TargetFile(target.length, {"sha256": digest_of(EVIL)}, EVIL_PATH)


def newer(signed: Any) -> None:
    signed.version += 1


# -- arbitrary software


def test_arbitrary_software_signed_by_a_stranger(attack: Attack) -> None:
    attack.site.release(b"genuine")
    attack.site.publish()
    attack.mirror.instead[f"2.{ROLE}.json"] = attack.site.forged(ROLE, swap, new_key()).to_bytes()
    attack.refused(DigestMismatch, "does not match expected hash")


def test_arbitrary_software_under_a_genuine_name(attack: Attack) -> None:
    site = attack.site
    folder, _, base = site.first.rpartition("/")
    attack.mirror.instead[f"{folder}/{base}.{base}"] = EVIL[: len(site.files[site.first])]
    with pytest.raises(DigestMismatch, match="Observed"):
        attack.device.download(site.first, NOW, attack.folder)
    assert not list(attack.folder.glob("*fraud*"))


def test_arbitrary_software_by_whoever_took_the_online_keys(attack: Attack) -> None:
    """Snapshot and timestamp together still cannot vouch for a model."""
    site = attack.site
    forged = site.forged(ROLE, vouch(EVIL_PATH, EVIL), site.snapshot, site.timestamp).to_bytes()

    def point_at_it(signed: Any) -> None:
        signed.version += 1
        signed.meta[f"{ROLE}.json"] = MetaFile.from_data(2, forged, ["sha256"])

    def point_at_that(signed: Any) -> None:
        signed.version += 1
        signed.snapshot_meta = MetaFile(2)

    attack.mirror.instead[f"2.{ROLE}.json"] = forged
    attack.mirror.put(site.forged("snapshot", point_at_it, site.snapshot))
    attack.mirror.put(site.forged("timestamp", point_at_that, site.timestamp))
    with pytest.raises(SignatureInvalid, match="was signed by 0/1 keys"):
        attack.look_up(EVIL_PATH)


def test_arbitrary_software_by_another_metadata_type(attack: Attack) -> None:
    attack.mirror.instead["timestamp.json"] = attack.site.store.get(KIND, "1.snapshot.json")
    attack.refused(Untrusted, "Expected 'timestamp', got 'snapshot'")


# -- wrong software


def test_wrong_software_a_genuine_model_under_another_name(attack: Attack) -> None:
    other = version_path(REGION, TENANT, "another-model", attack.site.first.rpartition("/")[2])
    attack.refused(Untrusted, "no role that may vouch for it does", other)


@pytest.mark.parametrize(
    "path",
    [
        f"us-east/{TENANT}/{MODEL}/{digest_of(EVIL)}",
        f"{REGION}/rival/{MODEL}/{digest_of(EVIL)}",
        f"{REGION}/{TENANT}/{MODEL}/deeper/{digest_of(EVIL)}",
        f"{REGION}/{TENANT}/{digest_of(EVIL)}",
        f"{TENANT}/anchors-of-mine",
    ],
)
def test_delegation_outside_its_paths(attack: Attack, path: str) -> None:
    """A coordinator that was taken over vouches for other regions, tenants and the tenant's anchors."""
    site = attack.site
    with pytest.raises(Untrusted, match=f"role '{ROLE}': expected a path like {REGION}/{TENANT}"):
        site.repository.add_targets(ROLE, NOW, signers(site.region), {path: Target(1, digest_of(EVIL))})
    forged = site.forged(ROLE, vouch(path, EVIL), site.region)
    site.store.put(KIND, f"2.{ROLE}.json", forged.to_bytes())
    site.publish()
    attack.refused(Untrusted, "no role that may vouch for it does", path)


def test_delegation_to_another_region_does_not_help_it(attack: Attack) -> None:
    """Two regions: the second signs a file under the first one's name and paths."""
    site, thief = attack.site, new_key()
    site.repository.stage_targets(NOW, [Delegation("us-east", TENANT, keys_of([thief]))])
    site.finish("targets", site.targets[:2])
    site.repository.add_targets(delegated_role("us-east", TENANT), NOW, signers(thief))
    forged = site.forged(ROLE, vouch(EVIL_PATH, EVIL), thief)
    with pytest.raises(SignatureInvalid, match="expected 1 signature"):
        site.repository.add_targets(ROLE, NOW, signers(thief), {EVIL_PATH: Target(1, digest_of(EVIL))})
    site.publish()
    good = site.store.get(KIND, f"1.{ROLE}.json")
    site.store.put(KIND, f"2.{ROLE}.json", forged.to_bytes())
    site.publish()
    with pytest.raises(SignatureInvalid, match=r"eu-west\.acme was signed by 0/1 keys"):
        attack.look_up(EVIL_PATH)
    assert good != forged.to_bytes()


# -- rollback


def test_rollback_of_the_timestamp(attack: Attack) -> None:
    old = attack.site.store.get(KIND, "timestamp.json")
    attack.site.publish()
    attack.device.refresh(NOW)
    attack.mirror.instead["timestamp.json"] = old
    attack.refused(RolledBack, "New timestamp version 1 must be >= 2")


def test_rollback_of_the_snapshot_by_a_newer_timestamp(attack: Attack) -> None:
    site = attack.site
    site.release(b"second")
    site.publish()
    attack.device.refresh(NOW)

    def back(signed: Any) -> None:
        signed.version += 1
        signed.snapshot_meta = MetaFile(1)

    attack.mirror.put(site.forged("timestamp", back, site.timestamp))
    attack.refused(RolledBack, "New snapshot version must be >= 2, got version 1")


@pytest.mark.parametrize("role", ["targets", ROLE])
def test_rollback_of_targets_by_a_newer_snapshot(attack: Attack, role: str) -> None:
    site = attack.site
    site.release(b"second")
    site.repository.stage_targets(NOW)
    site.finish("targets", site.targets[:2])
    site.publish()
    attack.device.refresh(NOW)

    def back(signed: Any) -> None:
        signed.version += 1
        signed.meta[f"{role}.json"] = MetaFile(1)

    def point(signed: Any) -> None:
        signed.version += 1
        signed.snapshot_meta = MetaFile(3)

    attack.mirror.put(site.forged("snapshot", back, site.snapshot))
    attack.mirror.put(site.forged("timestamp", point, site.timestamp))
    with pytest.raises(RolledBack, match=f"Expected {role}.json version 1, got 2"):
        attack.device.refresh(NOW)


def test_rollback_of_one_file_behind_its_name(attack: Attack) -> None:
    site = attack.site
    site.release(b"second")
    site.publish()
    attack.mirror.instead[f"2.{ROLE}.json"] = site.store.get(KIND, f"1.{ROLE}.json")
    attack.refused(DigestMismatch, "Observed length")


@pytest.mark.parametrize("version", [1, 3])
def test_rollback_and_skip_of_the_root(attack: Attack, version: int) -> None:
    site = attack.site

    def renumber(signed: Any) -> None:
        signed.version = version

    attack.mirror.instead["2.root.json"] = site.forged("root", renumber, *site.root).to_bytes()
    attack.refused(RolledBack, f"Expected root version 2 instead got version {version}")


# -- freeze and expiry


def test_indefinite_freeze(attack: Attack) -> None:
    """The mirror repeats what it has: from the timestamp's expiry on that is refused, and an alarm tells."""
    later = NOW + 8 * DAY
    with pytest.raises(Expired, match=r"timestamp\.json is expired"):
        attack.device.refresh(later)
    assert "is somebody holding news back?" in attack.device.status(later).alarm
    attack.device.refresh(NOW)
    with pytest.raises(Expired, match="nothing new is taken"):
        attack.device.target(attack.site.first, later)


@pytest.mark.parametrize(
    ("days", "words"),
    [(8, r"snapshot\.json is expired"), (91, "New targets is expired"), (366, r"Final root\.json is expired")],
)
def test_expired_metadata_behind_a_fresh_timestamp(attack: Attack, days: int, words: str) -> None:
    """The online keys (or only the timestamp's) go on signing; what lies behind ran out."""
    site = attack.site
    later = NOW + days * DAY

    def renew(signed: Any) -> None:
        signed.version += 1
        signed.expires = signed.expires.replace(year=signed.expires.year + 2)

    def point(signed: Any) -> None:
        renew(signed)
        signed.snapshot_meta = MetaFile(2)

    if days == 8:
        attack.mirror.put(site.forged("timestamp", renew, site.timestamp))
    else:
        attack.mirror.put(site.forged("snapshot", renew, site.snapshot))
        attack.mirror.put(site.forged("timestamp", point, site.timestamp))
    with pytest.raises(Expired, match=words):
        attack.device.refresh(later)


def test_expired_delegated_role(attack: Attack) -> None:
    site = attack.site
    site.now = NOW + 91 * DAY
    site.repository.stage_targets(site.now)
    site.finish("targets", site.targets[:2])
    site.publish()
    attack.device.refresh(site.now)
    with pytest.raises(Expired, match=f"New {ROLE} is expired"):
        attack.device.target(site.first, site.now)


# -- mix and match


def test_mix_and_match_of_a_snapshot(attack: Attack) -> None:
    site = attack.site
    site.release(b"second")
    site.publish()
    attack.mirror.instead["2.snapshot.json"] = site.store.get(KIND, "1.snapshot.json")
    attack.refused(RolledBack, "Expected snapshot version 2, got 1")


def test_mix_and_match_of_targets_with_another_content(attack: Attack) -> None:
    """Two files of one version, both signed by the coordinator: only the one in the snapshot counts."""
    site = attack.site
    site.release(b"second")
    site.publish()
    attack.mirror.instead[f"2.{ROLE}.json"] = site.forged(ROLE, swap, site.region).to_bytes()
    attack.refused(DigestMismatch, "does not match expected hash")


def test_snapshot_that_forgets_a_role(attack: Attack) -> None:
    site = attack.site

    def forget(signed: Any) -> None:
        signed.version += 1
        del signed.meta[f"{ROLE}.json"]

    def point(signed: Any) -> None:
        signed.version += 1
        signed.snapshot_meta = MetaFile(2)

    attack.mirror.put(site.forged("snapshot", forget, site.snapshot))
    attack.mirror.put(site.forged("timestamp", point, site.timestamp))
    with pytest.raises(Untrusted, match=f"New snapshot is missing info for '{ROLE}.json'"):
        attack.device.refresh(NOW)


# -- fast-forward


def test_fast_forward_is_undone_by_rotating_the_online_keys(attack: Attack) -> None:
    site = attack.site

    def far(signed: Any) -> None:
        signed.version = 2**31 - 1

    def far_too(signed: Any) -> None:
        signed.version = 2**31 - 1
        signed.snapshot_meta = MetaFile(2**31 - 1)

    def all_far(signed: Any) -> None:
        far(signed)
        signed.meta["targets.json"] = MetaFile(1)

    attack.mirror.put(site.forged("snapshot", all_far, site.snapshot))
    attack.mirror.put(site.forged("timestamp", far_too, site.timestamp))
    attack.device.refresh(NOW)
    attack.mirror.instead.clear()
    with pytest.raises(RolledBack, match="New timestamp version 1 must be >= 2147483647"):
        attack.device.refresh(NOW)
    site.rotate_root(snapshot=[new_key()], timestamp=[new_key()])
    newest = site.release(b"after the attack")
    site.publish()
    status = attack.device.refresh(NOW)
    assert (status.root, status.timestamp, status.snapshot) == (2, 2, 2)
    assert attack.device.target(newest, NOW).length


def test_fast_forward_of_a_devices_clock_ends_with_the_keys_that_did_it(attack: Attack) -> None:
    """What is signed moves a clock forward: by a thief's timestamp of the year 2200 the root looks expired."""
    site, known = attack.site, TrustAnchors(TENANT, {})
    device = Authority(attack.folder / "authority", TENANT, site.provisioned(), known, attack.mirror)
    device.refresh(NOW)

    def far(signed: Any) -> None:
        signed.version += 1
        signed.expires = datetime(2200, 1, 1, tzinfo=UTC)

    attack.mirror.put(site.forged("timestamp", far, site.timestamp))
    device.refresh(NOW)
    attack.mirror.instead.clear()
    with pytest.raises(Expired, match="Final root"):
        device.refresh(NOW)
    site.rotate_root(snapshot=[new_key()], timestamp=[new_key()])
    site.publish()
    with pytest.raises(Expired, match="Final root"):
        device.refresh(NOW)
    assert device.now(NOW) == NOW, "the new root's keys do not vouch for the thief's time"
    assert device.refresh(NOW).state == "current"
    assert device.status(NOW).root == 2


# -- endless data and slow retrieval


@pytest.mark.parametrize("name", ["2.root.json", "timestamp.json", "2.snapshot.json", f"2.{ROLE}.json"])
def test_endless_data(attack: Attack, name: str) -> None:
    """A file without end costs no more than the role's limit."""
    read = 0
    site = attack.site
    site.release(b"second")
    site.publish()

    class Endless(Mirror):
        def open(self, asked: str, timeout_s: float) -> Iterator[bytes]:
            nonlocal read
            if asked != name:
                yield from super().open(asked, timeout_s)
                return
            while True:
                read += 4096
                yield bytes(4096)

    attack.device = Trust(attack.folder / "trust", site.provisioned(), Endless(site))
    with pytest.raises(TooLarge, match="expected at most"):
        attack.look_up(site.first)
    assert read <= LIMITS.targets_max_length + 8192


def test_endless_target(attack: Attack) -> None:
    site = attack.site
    folder, _, base = site.first.rpartition("/")
    attack.mirror.instead[f"{folder}/{base}.{base}"] = bytes(10_000_000)
    with pytest.raises(TooLarge, match=f"expected at most {len(site.files[site.first])} bytes, found more"):
        attack.device.download(site.first, NOW, attack.folder)


@pytest.mark.parametrize(("every_s", "words"), [(1.0, "bytes a second, found"), (90.0, "expected within 60 s")])
def test_slow_retrieval(attack: Attack, every_s: float, words: str) -> None:
    """A byte a second would hold the library's own client for ever."""
    clock = 0.0
    site = attack.site
    site.publish()

    class Slow(Mirror):
        def open(self, name: str, timeout_s: float) -> Iterator[bytes]:
            nonlocal clock
            for piece in super().open(name, timeout_s):
                for at in range(len(piece)):
                    clock += every_s
                    yield piece[at : at + 1]

    device = Trust(attack.folder / "trust", site.provisioned(), Slow(site), monotonic=lambda: clock)
    with pytest.raises(TooSlow, match=words):
        device.refresh(NOW)
    assert clock <= 100


def test_slow_retrieval_by_many_roots(attack: Attack) -> None:
    """Each file comes in time, and there is always one more: the refresh as a whole has an end too."""
    clock = 0.0
    site = attack.site
    for _ in range(6):
        site.rotate_root()

    class Slow(Mirror):
        def open(self, name: str, timeout_s: float) -> Iterator[bytes]:
            nonlocal clock
            clock += 4.0
            yield from super().open(name, timeout_s)

    patience = Patience(refresh_s=10.0)
    device = Trust(attack.folder / "trust", site.provisioned(), Slow(site), patience=patience, monotonic=lambda: clock)
    for _ in range(3):  # what was verified is kept: each attempt goes on from there
        with pytest.raises(TooSlow, match=r"expected (within 2|a refresh within 10) s"):
            device.refresh(NOW)
    assert device.refresh(NOW).root == 7


# -- keys


@pytest.mark.parametrize("role", ["root", "targets"])
def test_key_compromise_below_the_threshold(attack: Attack, role: str) -> None:
    """One of three holders, signing alone or twice."""
    site = attack.site
    stolen = getattr(site, role)[0]
    forged = site.forged(role, newer, stolen)
    if role == "root":
        attack.mirror.put(forged)
        attack.refused(SignatureInvalid, "root was signed by 1/2 keys")
        return
    site.store.put(KIND, "2.targets.json", forged.to_bytes())
    site.publish()
    with pytest.raises(SignatureInvalid, match="targets was signed by 1/2 keys"):
        attack.device.refresh(NOW)


def test_root_that_its_predecessors_did_not_sign(attack: Attack) -> None:
    """A whole new set of holders agrees with itself."""
    thieves = [new_key() for _ in range(3)]

    def take_over(signed: Any) -> None:
        signed.version += 1
        for key_id in list(signed.roles["root"].keyids):
            signed.revoke_key(key_id, "root")
        for signer in signers(*thieves):
            signed.add_key(signer.public_key, "root")

    attack.mirror.put(attack.site.forged("root", take_over, *thieves))
    attack.refused(SignatureInvalid, "root was signed by 0/2 keys")


def test_root_that_does_not_sign_itself(attack: Attack) -> None:
    """The old holders hand over to keys that never signed: a typing error, or a trap."""
    site = attack.site
    strangers = [new_key() for _ in range(3)]

    def hand_over(signed: Any) -> None:
        signed.version += 1
        for key_id in list(signed.roles["root"].keyids):
            signed.revoke_key(key_id, "root")
        for signer in signers(*strangers):
            signed.add_key(signer.public_key, "root")

    attack.mirror.put(site.forged("root", hand_over, *site.root))
    attack.refused(SignatureInvalid, "root was signed by 0/2 keys")


def test_signature_under_another_keys_id(attack: Attack) -> None:
    site = attack.site
    forged = site.forged("timestamp", newer, new_key())
    signature = forged.signatures.popitem()[1]
    signature.keyid = signers(site.timestamp)[0].public_key.keyid
    forged.signatures[signature.keyid] = signature
    attack.mirror.put(forged)
    attack.refused(SignatureInvalid, "timestamp was signed by 0/1 keys")


def test_unsigned_metadata(attack: Attack) -> None:
    attack.mirror.put(attack.site.forged("timestamp", newer))
    attack.refused(SignatureInvalid, "timestamp was signed by 0/1 keys")


def test_one_signature_listed_twice(attack: Attack) -> None:
    """Twice the same key id is refused as a form, so that it cannot count as two."""
    site = attack.site
    forged = json.loads(site.forged("root", newer, site.root[0]).to_bytes())
    forged["signatures"] *= 2
    attack.mirror.instead["2.root.json"] = json.dumps(forged).encode()
    attack.refused(Malformed, "Failed to deserialize")


def test_one_key_listed_twice_in_a_threshold(attack: Attack) -> None:
    """The same key must not fill two places of a threshold, neither by mistake in a ceremony nor in a file."""
    site = attack.site
    with pytest.raises(Malformed, match="expected a threshold from 1 to 1, found 2"):
        site.repository.stage_root(NOW, {"root": keys_of([site.root[0], site.root[0]], 2)})

    def twice(signed: Any) -> None:
        signed.version += 1
        signed.roles["root"].keyids = [signed.roles["root"].keyids[0]] * 2

    forged = site.metadata("root")
    twice(forged.signed)
    attack.mirror.instead["2.root.json"] = json.dumps(forged.to_dict()).encode()
    attack.refused(Malformed, "Failed to deserialize")


# -- form


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[" * 100_000, b"\xff\xfe", b'{"signatures": [], "signed": 5}', b'{"signed": 1e999999}']
)
def test_what_is_no_metadata(attack: Attack, data: bytes) -> None:
    for name in ("2.root.json", "timestamp.json"):
        attack.mirror.instead[name] = data[: LIMITS.timestamp_max_length]
        attack.refused(Malformed, "Failed to deserialize")


def test_one_bit_changed(attack: Attack) -> None:
    attack.site.publish()
    good = attack.site.store.get(KIND, "timestamp.json")
    attack.mirror.instead["timestamp.json"] = good.replace(b'"version":2}}', b'"version":3}}')
    assert attack.mirror.instead["timestamp.json"] != good
    attack.refused(SignatureInvalid, "timestamp was signed by 0/1 keys")
