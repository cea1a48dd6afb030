"""What Uptane lists beyond TUF, tried on the two rules of directing and refused by name.

The director's key is held by the attacker in many of these: what it signs is believed to be from a director, and still
makes no device run anything that the signed rollout plan does not give it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from model_delta import merkle
from model_delta.digest import digest_of
from model_delta.encoding import pack, unpack_plain
from model_delta.errors import AtollError, Expired, Malformed, RolledBack, SignatureInvalid, TooLarge, Untrusted
from model_delta.manifest import Blob, Manifest, Segment, TensorSpec, manifest_digest
from model_delta.patch.route import DeviceLimits, Route
from model_delta.plan import BUCKETS, Cohort, DeviceTraits, RolloutPlan
from model_delta.trust import director
from model_delta.trust.director import (
    DEVICE_PLAN_TYPE,
    REPORT_CLOCK_S,
    VERSION_REPORT_TYPE,
    ChosenStep,
    DevicePlan,
    DirectorState,
    HeldFile,
    Question,
    VersionReport,
    accept_device_plan,
    accept_version_report,
    walkable_route,
)
from model_delta.trust.signing import PrivateKey, public_bytes, seal_envelope, sign
from model_delta.trust.updater import RoleKeys, TrustAnchors

NOW = 1_800_000_000.0
TENANT, MODEL, DEVICE = "acme", "fraud", "pos-0001"
DIRECTOR, STRANGER = ed25519.Ed25519PrivateKey.generate(), ed25519.Ed25519PrivateKey.generate()
PLANNER = ed25519.Ed25519PrivateKey.generate()
OWN, OTHER = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
ANCHORS = TrustAnchors(
    TENANT,
    {
        "director": RoleKeys((public_bytes(DIRECTOR.public_key()),)),
        "plan": RoleKeys((public_bytes(PLANNER.public_key()),)),
    },
)
TRAITS = DeviceTraits(DEVICE, TENANT, "pos", "eu-west")
NONCE = bytes(range(16))
QUESTION = Question(MODEL, NONCE)
OLD, STABLE, BAD = digest_of(b"old"), digest_of(b"stable"), digest_of(b"bad")


def manifest(*segments: bytes) -> Manifest:
    cut = tuple(Segment(f"s{index}", len(data), digest_of(data)) for index, data in enumerate(segments))
    return Manifest(
        tenant=TENANT,
        model=MODEL,
        version={"eu-west": 2},
        release=2,
        size=sum(segment.size for segment in cut),
        file_digest=digest_of(b"".join(segments)),
        segments=cut,
        merkle_root=merkle.root([bytes.fromhex(segment.digest) for segment in cut]),
        inputs=(TensorSpec("features", "float32", (-1, 2)),),
        outputs=(TensorSpec("score", "float32", (-1, 1)),),
        created=int(NOW),
        expires=int(NOW) + 90 * 86_400,
    )


WANT = manifest(b"one", b"two", b"three")
TARGET = manifest_digest(WANT)
ROLLOUT = RolloutPlan(
    tenant=TENANT,
    model=MODEL,
    name="spring",
    serial=7,
    salt="s",
    cohorts=(Cohort("all"),),
    target_buckets=BUCKETS,
    target=TARGET,
    stable=STABLE,
    withdrawn=(BAD,),
    issued=int(NOW),
    expires=int(NOW) + 86_400,
)
PATCH = ChosenStep(kind="patch", base=OLD, target=TARGET, blobs=(Blob(digest_of(b"p"), 5),), format="bsdiff40")
WHOLE = ChosenStep(kind="whole", target=TARGET, blobs=tuple(Blob(digest_of(bytes([n])), 9) for n in range(3)))


def plan(**changes: Any) -> DevicePlan:
    fields: dict[str, Any] = {
        "tenant": TENANT,
        "device_id": DEVICE,
        "model": MODEL,
        "target": TARGET,
        "steps": (PATCH,),
        "nonce": NONCE,
        "serial": 5,
        "issued": int(NOW),
        "expires": int(NOW) + 600,
    }
    return DevicePlan(**{**fields, **changes})


def signed(record: Any, key: PrivateKey = DIRECTOR, kind: str = DEVICE_PLAN_TYPE) -> bytes:
    return seal_envelope(sign(kind, record if isinstance(record, bytes) else pack(record), [key]))


def accept(data: bytes, state: DirectorState = DirectorState(4, 9), now: float = NOW) -> DevicePlan:  # noqa: B008
    accepted, after = accept_device_plan(data, QUESTION, ANCHORS, state, ROLLOUT, TRAITS, now)
    assert after == DirectorState(accepted.serial, state.counter)
    return accepted


def test_an_answer_to_the_question_is_accepted_and_its_serial_kept() -> None:
    assert accept(signed(plan())) == plan()
    assert accept(signed(plan(target=STABLE))).target == STABLE


PLANS: dict[str, tuple[bytes, type[AtollError], str]] = {
    "wrong device": (signed(plan(device_id="pos-0002")), Untrusted, "expected device 'pos-0001', found 'pos-0002'"),
    "wrong tenant": (signed(plan(tenant="other")), Untrusted, "expected tenant 'acme', found 'other'"),
    "wrong model": (signed(plan(model="other")), Untrusted, "expected model 'fraud', found 'other'"),
    "replayed plan": (signed(plan(nonce=bytes(16))), Untrusted, "a repeated answer"),
    "old serial": (signed(plan(serial=4)), RolledBack, "expected a serial above 4, found 4"),
    "fast-forward": (signed(plan(serial=1 << 60)), RolledBack, "expected a serial above 4"),
    "expired": (signed(plan(expires=int(NOW))), Expired, "expired at"),
    "endless validity": (signed(plan(expires=int(NOW) + 86_400)), Untrusted, "expected at most 3600 s of validity"),
    "forged by a stranger": (signed(plan(), STRANGER), SignatureInvalid, "device-plan: expected 1 valid"),
    "signed by the plan role": (signed(plan(), PLANNER), SignatureInvalid, "device-plan: expected 1 valid"),
    "signed as something else": (signed(plan(), kind="plan"), SignatureInvalid, "expected type 'device-plan'"),
    "key compromised, a model of its own": (signed(plan(target=digest_of(b"evil"))), Untrusted, "cannot choose"),
    "key compromised, a release below the floor": (signed(plan(target=OLD)), Untrusted, "cannot choose the version"),
    "key compromised, a withdrawn version": (signed(plan(target=BAD)), Untrusted, "was withdrawn by plan 'spring'"),
    "a target that is a path": (signed(plan(target="../../etc")), Malformed, "expected 64 hexadecimal characters"),
    "a newer format": (signed(pack({**unpack_plain(pack(plan())), "format": 2})), Malformed, "knows up to 1"),
    "steps of a negative kind": (
        signed(pack({**unpack_plain(pack(plan())), "steps": [{"kind": "shell"}]})),
        Malformed,
        "DevicePlan",
    ),
}


@pytest.mark.parametrize("attack", PLANS)
def test_a_plan_that_is_not_for_this_device_now_is_refused_by_name(attack: str) -> None:
    data, error, words = PLANS[attack]
    with pytest.raises(error, match=words) as caught:
        accept(data)
    assert type(caught.value) is error


def test_a_device_without_a_directors_key_believes_no_director() -> None:
    bare = TrustAnchors(TENANT, {"plan": ANCHORS.roles["plan"]})
    with pytest.raises(SignatureInvalid, match="role 'director': no keys"):
        accept_device_plan(signed(plan()), QUESTION, bare, DirectorState(), ROLLOUT, TRAITS, NOW)


def test_a_withdrawn_target_stays_refused_where_the_rollout_still_names_it() -> None:
    rollout = msgspec.structs.replace(ROLLOUT, withdrawn=(TARGET,))
    with pytest.raises(Untrusted, match="was withdrawn"):
        accept_device_plan(signed(plan()), QUESTION, ANCHORS, DirectorState(), rollout, TRAITS, NOW)


def test_nothing_is_directed_under_a_rollout_plan_that_has_run_out() -> None:
    rollout = msgspec.structs.replace(ROLLOUT, expires=int(NOW))
    with pytest.raises(Expired, match="rollout plan 'spring' serial 7 expired at"):
        accept_device_plan(signed(plan()), QUESTION, ANCHORS, DirectorState(), rollout, TRAITS, NOW)


# -- the steps


def walk(
    *steps: ChosenStep,
    want: Manifest = WANT,
    files: tuple[str, ...] = (OLD,),
    pieces: tuple[str, ...] = (),
    manifests: Mapping[str, Manifest] | None = None,
    limits: DeviceLimits | None = None,
    **changes: Any,
) -> Route:
    return walkable_route(
        plan(steps=steps, **changes),
        want,
        files=set(files),
        pieces=set(pieces),
        manifests=manifests or {},
        limits=limits or DeviceLimits(),
    )


def test_a_patch_a_chain_the_whole_and_a_replacement_can_be_walked() -> None:
    assert walk(PATCH).kind == "patch"
    middle = digest_of(b"middle")
    first = msgspec.structs.replace(PATCH, target=middle)
    chain = walk(first, msgspec.structs.replace(PATCH, base=middle))
    assert (chain.kind, chain.bytes, [step.target for step in chain.steps]) == ("chain", 10, [middle, TARGET])
    assert walk(WHOLE).kind == "whole"
    assert director.chosen(walk(WHOLE).steps) == (WHOLE,)
    some = ChosenStep(kind="replace", target=TARGET, blobs=WHOLE.blobs[:1], segments=(1,))
    assert walk(some, pieces=(WANT.segments[0].digest, WANT.segments[2].digest)).kind == "replace"


def _with(step: ChosenStep, **changes: Any) -> ChosenStep:
    return msgspec.structs.replace(step, **changes)


ELSEWHERE = digest_of(b"elsewhere")
STEPS: dict[str, tuple[Callable[[], Route], type[AtollError], str]] = {
    "mixed bundle: steps of another version": (
        lambda: walk(_with(PATCH, target=ELSEWHERE)),
        Untrusted,
        "its last step leads to .*: a mixed bundle",
    ),
    "mixed bundle: a target that is not being fetched": (
        lambda: walk(PATCH, target=STABLE),
        Untrusted,
        "expected steps to .*: a mixed bundle",
    ),
    "mixed bundle: a patch from a file that is not here": (
        lambda: walk(PATCH, files=(STABLE,)),
        Untrusted,
        "expected a patch from a file at hand, .*: a mixed bundle",
    ),
    "mixed bundle: steps that do not follow each other": (
        lambda: walk(_with(PATCH, target=ELSEWHERE), PATCH),
        Untrusted,
        "step 2: expected a patch from .*: a mixed bundle",
    ),
    "mixed bundle: a whole in the middle of a chain": (
        lambda: walk(_with(PATCH, target=ELSEWHERE), WHOLE),
        Untrusted,
        "found a whole: a mixed bundle",
    ),
    "mixed bundle: segments of a version that nobody vouched for here": (
        lambda: walk(_with(WHOLE, kind="replace", target=ELSEWHERE), _with(PATCH, base=ELSEWHERE)),
        Untrusted,
        "expected segments of a version at hand",
    ),
    "partial bundle: two of three segments": (
        lambda: walk(_with(WHOLE, blobs=WHOLE.blobs[:2])),
        Untrusted,
        "expected 3 segments, found 2: a partial bundle",
    ),
    "partial bundle: a replacement that leaves one out": (
        lambda: walk(_with(WHOLE, kind="replace", blobs=WHOLE.blobs[:1], segments=(0,))),
        Untrusted,
        "2 segments are neither at hand nor among its blobs: a partial bundle",
    ),
    "partial bundle: no patch in a patch": (
        lambda: walk(_with(PATCH, blobs=())),
        Untrusted,
        "expected one patch, found 0 blobs: a partial bundle",
    ),
    "no steps": (lambda: walk(), Malformed, "expected 1 to 8 steps, found 0"),
    "endless steps": (lambda: walk(*[PATCH] * 9), Malformed, "expected 1 to 8 steps, found 9"),
    "endless data": (
        lambda: walk(_with(PATCH, blobs=(Blob(OLD, 1 << 40),))),
        TooLarge,
        "expected at most 1048598 bytes for a file of 11",
    ),
    "a format that the device does not know": (
        lambda: walk(_with(PATCH, format="tp9")),
        Untrusted,
        "expected a format of bsdiff40, tp1, found 'tp9'",
    ),
    "more memory than there is": (lambda: walk(PATCH, limits=DeviceLimits(9)), TooLarge, "at most 9 B of memory"),
    "more flash than there is": (lambda: walk(PATCH, limits=DeviceLimits(None, 9)), TooLarge, "at most 9 B of flash"),
    "a blob that is a path": (
        lambda: walk(_with(PATCH, blobs=(Blob("../../etc/passwd", 5),))),
        Malformed,
        "expected 64 hexadecimal characters",
    ),
    "a blob of less than nothing": (lambda: walk(_with(PATCH, blobs=(Blob(OLD, -5),))), Malformed, "found -5"),
    "segments outside the file": (
        lambda: walk(_with(WHOLE, kind="replace", segments=(0, 1, 3))),
        Malformed,
        "expected segments below 3, found 3",
    ),
    "a segment twice": (
        lambda: walk(_with(WHOLE, kind="replace", segments=(0, 1, 1))),
        Malformed,
        "expected ascending segments",
    ),
}


@pytest.mark.parametrize("attack", STEPS)
def test_steps_that_do_not_lead_there_are_refused_by_name(attack: str) -> None:
    call, error, words = STEPS[attack]
    with pytest.raises(error, match=words) as caught:
        call()
    assert type(caught.value) is error


# -- version reports


def report(**changes: Any) -> VersionReport:
    fields: dict[str, Any] = {
        "tenant": TENANT,
        "device_id": DEVICE,
        "model": MODEL,
        "wanted": TARGET,
        "running": OLD,
        "held": (HeldFile(OLD, OLD),),
        "nonce": NONCE,
        "counter": 10,
        "time": int(NOW),
    }
    return VersionReport(**{**fields, **changes})


def hear(data: bytes, seen: int = 9, now: float = NOW) -> VersionReport:
    return accept_version_report(data, TENANT, DEVICE, OWN.public_key(), {MODEL: seen}, now)


def of_device(record: Any, key: PrivateKey = OWN, kind: str = VERSION_REPORT_TYPE) -> bytes:
    return signed(record, key, kind)


def test_a_signed_report_is_heard_once() -> None:
    assert hear(of_device(report())) == report()
    with pytest.raises(RolledBack, match="expected a counter above 10, found 10: a repetition"):
        hear(of_device(report()), seen=10)


REPORTS: dict[str, tuple[bytes, type[AtollError], str]] = {
    "forged by another device": (of_device(report(), OTHER), SignatureInvalid, "version-report: expected 1 valid"),
    "signed as a key request": (of_device(report(), kind="key-request"), SignatureInvalid, "expected type"),
    "of another device": (of_device(report(device_id="pos-0002")), Untrusted, "expected device 'pos-0001'"),
    "of another tenant": (of_device(report(tenant="other")), Untrusted, "expected tenant 'acme'"),
    "replayed": (of_device(report(counter=9)), RolledBack, "a repetition"),
    "held back": (of_device(report(time=int(NOW) - REPORT_CLOCK_S - 1)), Expired, "it was held back, or"),
    "of the future": (of_device(report(time=int(NOW) + REPORT_CLOCK_S + 1)), Expired, "clock is wrong"),
    "with a short nonce": (of_device(report(nonce=b"1")), Malformed, "expected a nonce of 16 bytes, found 1"),
    "with a counter beyond all": (of_device(report(counter=1 << 53)), Malformed, "expected numbers from 0"),
    "with a negative segment": (of_device(report(held=(HeldFile(OLD, OLD, (-1,)),))), Malformed, "numbers from 0"),
    "with too many files": (of_device(report(held=(HeldFile(OLD, OLD),) * 5)), TooLarge, "at most 4 files, found 5"),
    "with a story": (of_device(report(alarm="x" * 301)), TooLarge, "at most 300 characters of alarm"),
    "with a path for a version": (of_device(report(running="../x")), Malformed, "64 hexadecimal characters"),
    "of a newer format": (of_device(report(format=2)), Malformed, "format 2, this reader knows up to 1"),
    "with costs that are no number": (of_device(report(cached_cost=float("nan"))), Malformed, "cached cost from 0"),
    "cut off": (of_device(report())[:-1], Malformed, "CBOR"),
}


@pytest.mark.parametrize("attack", REPORTS)
def test_reports_that_are_not_the_devices_own_news_are_refused_by_name(attack: str) -> None:
    data, error, words = REPORTS[attack]
    with pytest.raises(error, match=words) as caught:
        hear(data)
    assert type(caught.value) is error
