"""Which device gets which version: the published hash, and the edges of the arms."""

from __future__ import annotations

import msgspec
import pytest

from model_delta.plan import BUCKETS, Cohort, DeviceTraits, RolloutPlan, assign, bucket_of, murmur3_x86_32

NEW, OLD = "a" * 64, "b" * 64
DEVICE = DeviceTraits("pos-0001", "acme", "pos", "eu-west")
PLAN = RolloutPlan(
    tenant="acme",
    model="fraud",
    name="canary",
    serial=1,
    salt="salt",
    cohorts=(Cohort("everyone"),),
    target=NEW,
    stable=OLD,
    issued=0,
    expires=1,
)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0),
        (b"hello", 0x248BFA47),
        (b"hello, world", 0x149BBB7F),
        (b"The quick brown fox jumps over the lazy dog", 0x2E4FF723),
        (b"\x00\x00\x00\x00", 0x2362F9DE),
        (b"\xff\xff\xff\xff", 0x76293B50),
    ],
)
def test_the_hash_is_the_published_one(data: bytes, expected: int) -> None:
    """Devices of every age must find the same bucket."""
    assert murmur3_x86_32(data) == expected


def test_an_arm_begins_and_ends_at_its_bucket() -> None:
    bucket = bucket_of(PLAN.salt, DEVICE.device_id)
    assert bucket == 6340

    def arm(**changes: object) -> tuple[str, str]:
        found = assign(msgspec.structs.replace(PLAN, **changes), DEVICE)
        return found.arm, found.manifest

    assert arm(target_buckets=bucket) == ("stable", OLD)
    assert arm(target_buckets=bucket + 1) == ("target", NEW)
    assert arm(target_buckets=bucket + 1, withdrawn=(NEW,)) == ("stable", OLD)
    assert arm(control_buckets=BUCKETS - bucket - 1) == ("stable", OLD)
    assert arm(control_buckets=BUCKETS - bucket) == ("control", OLD)
    assert arm(target_buckets=BUCKETS, tenant="globex") == ("excluded", OLD)
    assert arm(target_buckets=BUCKETS, cohorts=(Cohort("others", {"region": ("ap-south",)}),)) == ("excluded", OLD)
