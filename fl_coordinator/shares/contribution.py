"""What a device hands in: a signed claim, one masked vector, three sealed pairs of seeds.

x = x0 + x1 + x2 modulo 2^32. x0 and x1 are the key streams of two seeds; x2 is what is left, and travels once,
encrypted under a third secret K. Aggregator i gets the secrets of shares i and i+1, sealed (HPKE) to its key:
A0 (s0, s1), A1 (s1, K), A2 (K, s0). So an upload is as long as one vector of float32, whoever carries it can read
nothing, and one aggregator alone sees two strings that are random and independent of the update. docs/wire_formats.md
has the bytes.

Verify first: `verify` believes the certificate chain and the signature before it looks at anything that was claimed,
and `mismatch` then compares the claim with the round. The ciphertext needs no tag of its own: its digest is signed, and
it is decrypted only after the stored bytes were found to have it. Seals to different aggregators are independent: that
all saw the same secrets is checked later, between the aggregators; with the ciphertext they determine the shares.

Compatibility promise: see `model_delta.encoding`; a field that changes meaning raises `format`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from typing import BinaryIO

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fl_coordinator.shares.sharing import PARTIES
from fl_coordinator.shares.streams import SEED_BYTES, WORD_BYTES, Octets, Rows, SecretRows
from model_delta.digest import digest_of
from model_delta.encoding import pack, pack_octets, unpack
from model_delta.errors import Malformed, SignatureInvalid, Unavailable, Untrusted
from model_delta.keys.certificates import device_keys_of
from model_delta.keys.encryption import open_sealed
from model_delta.task import AggregatorKey, RoundTask
from model_delta.trust.signing import pre_authentication_encoding

CONTRIBUTION_TYPE = "contribution"
FORMAT = 2
OVERHEAD_BYTES = 16_384
"""A contribution is at most this much longer than its vector (certificate, seals, signature, header)."""

_MASKED = PARTIES - 1


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """The signed part. `sealed[i]` opens to the secrets of shares i and i+1 for the holder of `sealing_keys[i]`
    (digests of the aggregators' X25519 keys, in the round's order); `masked` is the digest of the encrypted share 2."""

    format: int = FORMAT
    tenant: str
    model: str
    round_id: str
    base: str
    device_id: str
    length: int
    fraction_bits: int
    certificate: bytes
    sealing_keys: tuple[str, ...]
    sealed: tuple[bytes, ...]
    masked: str


class Contribution(msgspec.Struct, frozen=True):
    """As it travels: `claim` is a packed Claim, `signature` the device's ECDSA P-256 signature over it, `masked` the
    encrypted share 2. Nothing in it is believed yet."""

    claim: bytes
    signature: bytes
    masked: bytes


@dataclass(frozen=True)
class VerifiedContribution:
    """A contribution whose device certificate and signature hold. `digest` names the bytes that arrived."""

    digest: str
    device_id: str
    claim: Claim
    masked: bytes


@dataclass(frozen=True)
class Holding:
    """What one aggregator holds of a frozen list of n contributions: both shares of each as rows (nothing may be read
    where refused), the contributions' digests and device ids in the frozen order, and why it refused some, by index."""

    digests: tuple[str, ...]
    device_ids: tuple[str, ...]
    refusals: Mapping[int, str]
    first: Rows
    second: Rows


def packed(claim: bytes, signature: bytes, masked: memoryview) -> bytes:
    """What `pack` makes of a Contribution of these, with `masked` copied once: on a device that copy is what counts."""
    return pack_octets({"claim": claim, "masked": masked, "signature": signature})


def parse(data: bytes, size_max: int | None = None) -> Contribution:
    """The record in `data`; nothing is verified. Raises Malformed, before parsing for more than `size_max` bytes."""
    if size_max is not None and len(data) > size_max:
        raise Malformed(f"contribution: expected at most {size_max} bytes, found {len(data)}")
    return unpack(data, Contribution)


def size_max(task: RoundTask) -> int:
    """The longest contribution to `task`, in bytes."""
    return WORD_BYTES * task.length + OVERHEAD_BYTES


def verify(data: bytes, ca_pem: bytes, revoked: Set[int], now: float) -> VerifiedContribution:
    """Parse and verify: certificate chain, common name, signature, digest of the masked vector.

    `now` is Unix seconds, `revoked` certificate serial numbers. Raises Malformed, Untrusted and SignatureInvalid.
    """
    contribution = parse(data)
    claim = unpack(contribution.claim, Claim)
    if claim.format != FORMAT:
        raise Malformed(f"contribution: format {claim.format}, this reader knows {FORMAT}")
    name, key, _ = device_keys_of(claim.certificate, ca_pem, now, frozenset(revoked))
    if name != claim.device_id:
        raise Untrusted(f"contribution of {claim.device_id!r}: its certificate names {name!r}")
    try:
        message = pre_authentication_encoding(CONTRIBUTION_TYPE, contribution.claim)
        key.verify(contribution.signature, message, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise SignatureInvalid(f"contribution of {name!r}: the signature is not by the certificate's key") from None
    if digest_of(contribution.masked) != claim.masked:
        raise Untrusted(f"contribution of {name!r}: the masked vector is not the one that was signed")
    return VerifiedContribution(digest_of(data), name, claim, contribution.masked)


def mismatch(verified: VerifiedContribution, task: RoundTask) -> str:
    """Why a verified contribution does not belong to `task`, in words; "" if it does."""
    claim = verified.claim
    wanted = {
        "tenant": (task.tenant, claim.tenant),
        "model": (task.model, claim.model),
        "round": (task.round_id, claim.round_id),
        "base version": (task.base, claim.base),
        "vector length": (task.length, claim.length),
        "fraction bits": (task.fraction_bits, claim.fraction_bits),
        "aggregator keys": (sealing_keys(task.aggregators), claim.sealing_keys),
        "number of sealed pairs": (PARTIES, len(claim.sealed)),
        "bytes of masked vector": (WORD_BYTES * task.length, len(verified.masked)),
    }
    for what, (expected, found) in wanted.items():
        if expected != found:
            return f"{what}: expected {_short(expected)}, found {_short(found)}"
    return ""


def open_secrets(
    verified: VerifiedContribution, task: RoundTask, index: int, private: X25519PrivateKey
) -> tuple[bytes, bytes]:
    """The secrets of aggregator `index`'s two shares, 32 bytes each. The claim must match the task.

    Raises Untrusted when the seal does not open.
    """
    opened = open_sealed(private, verified.claim.sealed[index], sealing_info(task, verified.device_id, index))
    if len(opened) != 2 * SEED_BYTES:
        raise Untrusted(f"sealed pair: expected {2 * SEED_BYTES} bytes, found {len(opened)}")
    return opened[:SEED_BYTES], opened[SEED_BYTES:]


def hold(
    contributions: Iterable[bytes],
    task: RoundTask,
    index: int,
    private: X25519PrivateKey,
    ca_pem: bytes,
    revoked: Set[int],
    now: float,
    spool: BinaryIO | None = None,
) -> Holding:
    """Verify every contribution of the frozen list and open aggregator `index`'s secrets; a bad one is only refused.

    Of two contributions of one device the first counts. `now` is Unix seconds. Raises Unavailable when a disk is
    full. Masked vectors go to `spool` (an
    unbuffered file, open for reading and writing, which must outlive the result) if there is one, and stay in memory
    otherwise; the first aggregator needs none of them.
    """
    kept: list[_Kept] = []
    refusals: dict[int, str] = {}
    seen: set[str] = set()
    for place, data in enumerate(contributions):
        digest = digest_of(data)
        try:
            if len(data) > size_max(task):
                raise Malformed(f"contribution: expected at most {size_max(task)} bytes, found {len(data)}")
            verified = verify(data, ca_pem, revoked, now)
            reason = mismatch(verified, task)
            if verified.device_id in seen:
                reason = "a second contribution of this device"
            if reason:
                raise Untrusted(reason)
            secrets = open_secrets(verified, task, index, private)
            seen.add(verified.device_id)
        except (Malformed, Untrusted) as error:
            refusals[place] = str(error)
            kept.append(_Kept(digest, _claimed_device(data)))
            continue
        masked: Octets = b""
        if index > 0:
            masked = memoryview(verified.masked) if spool is None else _Span.append(spool, verified.masked)
        kept.append(_Kept(digest, verified.device_id, secrets, verified.claim.masked, masked))
    shares: list[Rows] = []
    for number in range(2):
        own = [entry.secrets[number] for entry in kept]
        if (index + number) % PARTIES == _MASKED:
            masks, labels = [entry.masked for entry in kept], [entry.label for entry in kept]
            shares.append(SecretRows(task.length, own, masks, labels))
        else:
            shares.append(SecretRows(task.length, own))
    digests, names = tuple(entry.digest for entry in kept), tuple(entry.device_id for entry in kept)
    return Holding(digests, names, refusals, shares[0], shares[1])


def sealing_info(task: RoundTask, device_id: str, index: int) -> bytes:
    """What a sealed pair is bound to: the round, the base, the device and the aggregator's place."""
    return pack(["atoll shares", task.tenant, task.model, task.round_id, task.base, device_id, index])


def sealing_keys(aggregators: tuple[AggregatorKey, ...]) -> tuple[str, ...]:
    """Digests of the aggregators' X25519 keys, in order."""
    return tuple(digest_of(key.sealing) for key in aggregators)


@dataclass(frozen=True)
class _Kept:
    """What is needed of one contribution later on."""

    digest: str
    device_id: str
    secrets: tuple[bytes, bytes] = (b"", b"")
    label: str = ""
    masked: Octets = b""


@dataclass(frozen=True)
class _Span:
    """`size` bytes of a file from `start`."""

    file: int
    start: int
    size: int

    @classmethod
    def append(cls, spool: BinaryIO, data: bytes) -> _Span:
        start = spool.seek(0, os.SEEK_END)
        left = memoryview(data)
        try:
            while left:
                left = left[spool.write(left) :]
        except OSError as error:
            raise Unavailable(f"contributions cannot be kept for the round: {error.strerror}") from None
        return cls(spool.fileno(), start, len(data))

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(self.size)
        data = os.pread(self.file, stop - start, self.start + start)
        if len(data) != stop - start:
            raise Unavailable(f"spooled contribution: expected {stop - start} bytes, found {len(data)}")
        return data


def _claimed_device(data: bytes) -> str:
    """The device a contribution names, believed or not; "" when it cannot be read."""
    try:
        return unpack(parse(data).claim, Claim).device_id
    except Malformed:
        return ""


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
