"""What a device hands in: a signed claim, one masked vector, three sealed pairs of seeds.

x = x0 + x1 + x2 modulo 2^64. x0 and x1 are the key streams of two seeds; x2 is what is left, and travels once,
encrypted under a third secret K. Aggregator i gets the secrets of shares i and i+1, sealed (HPKE) to its key:
A0 (s0, s1), A1 (s1, K), A2 (K, s0). So an upload is as long as one vector, whoever carries it can read nothing, and one
aggregator alone sees two strings that are random and independent of the update. docs/wire_formats.md has the bytes.

Verify first: `verify` believes the certificate chain and the signature before it looks at anything that was claimed,
and `mismatch` then compares the claim with the round. AES-GCM does not commit to its key, and seals to different
aggregators are independent: that all saw the same shares is checked later, between the aggregators.

Compatibility promise: see `model_delta.encoding`; a field that changes meaning raises `format`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import msgspec
import numpy as np
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fl_coordinator.shares.fixed_point import WORD_BYTES, Words
from fl_coordinator.shares.sharing import PARTIES, SEED_BYTES, Pair, expand
from model_delta.digest import digest_of
from model_delta.encoding import pack, unpack
from model_delta.errors import Malformed, SignatureInvalid, Untrusted
from model_delta.keys.certificates import device_keys_of
from model_delta.keys.encryption import open_sealed
from model_delta.task import AggregatorKey, RoundTask
from model_delta.trust.signing import pre_authentication_encoding

CONTRIBUTION_TYPE = "contribution"
FORMAT = 1
CONTRIBUTIONS_MAX = 1_024
"""The most that one round takes: the aggregators hold all of them in memory at once."""

OVERHEAD_BYTES = 16_384
"""A contribution is at most this much longer than its vector (certificate, seals, signature, header)."""

_NONCE = bytes(12)


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
    """What one aggregator holds of a frozen list of n contributions: `shares` uint64[n, d] twice (zeros where refused),
    the contributions' digests and device ids in the frozen order, and why it refused some, by index."""

    digests: tuple[str, ...]
    device_ids: tuple[str, ...]
    refusals: Mapping[int, str]
    shares: Pair


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
    if claim.format > FORMAT:
        raise Malformed(f"contribution: format {claim.format}, this reader knows up to {FORMAT}")
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
        "bytes of masked vector": (WORD_BYTES * task.length + 16, len(verified.masked)),
    }
    for what, (expected, found) in wanted.items():
        if expected != found:
            return f"{what}: expected {_short(expected)}, found {_short(found)}"
    return ""


def open_shares(verified: VerifiedContribution, task: RoundTask, index: int, private: X25519PrivateKey) -> Pair:
    """Aggregator `index`'s two shares of the update, uint64[d] each. The claim must match the task.

    Raises Untrusted when the seal or the masked vector does not open.
    """
    info = sealing_info(task, verified.device_id, index)
    opened = open_sealed(private, verified.claim.sealed[index], info)
    if len(opened) != 2 * SEED_BYTES:
        raise Untrusted(f"sealed pair: expected {2 * SEED_BYTES} bytes, found {len(opened)}")
    return Pair(
        _share(verified, task, index, opened[:SEED_BYTES]),
        _share(verified, task, (index + 1) % PARTIES, opened[SEED_BYTES:]),
    )


def hold(
    contributions: Sequence[bytes],
    task: RoundTask,
    index: int,
    private: X25519PrivateKey,
    ca_pem: bytes,
    revoked: Set[int],
    now: float,
) -> Holding:
    """Verify every contribution of the frozen list and open aggregator `index`'s shares; a bad one is only refused.

    Of two contributions of one device the first counts. `now` is Unix seconds.
    """
    first = np.zeros((len(contributions), task.length), dtype=np.uint64)
    second = np.zeros_like(first)
    refusals: dict[int, str] = {}
    seen: set[str] = set()
    for place, data in enumerate(contributions):
        try:
            if len(data) > size_max(task):
                raise Malformed(f"contribution: expected at most {size_max(task)} bytes, found {len(data)}")
            verified = verify(data, ca_pem, revoked, now)
            reason = mismatch(verified, task)
            if verified.device_id in seen:
                reason = "a second contribution of this device"
            if reason:
                raise Untrusted(reason)
            seen.add(verified.device_id)
            pair = open_shares(verified, task, index, private)
        except (Malformed, Untrusted) as error:
            refusals[place] = str(error)
            continue
        first[place], second[place] = pair.first, pair.second
    digests = tuple(digest_of(data) for data in contributions)
    return Holding(digests, tuple(_claimed_device(data) for data in contributions), refusals, Pair(first, second))


def sealing_info(task: RoundTask, device_id: str, index: int) -> bytes:
    """What a sealed pair is bound to: the round, the base, the device and the aggregator's place."""
    return pack(["atoll shares", task.tenant, task.model, task.round_id, task.base, device_id, index])


def sealing_keys(aggregators: tuple[AggregatorKey, ...]) -> tuple[str, ...]:
    """Digests of the aggregators' X25519 keys, in order."""
    return tuple(digest_of(key.sealing) for key in aggregators)


def mask_share(secret: bytes, task: RoundTask, device_id: str, share: Words) -> bytes:
    """Share 2 encrypted with AES-256-GCM under a secret that is used once."""
    bound = pack(["atoll masked", task.round_id, device_id])
    return AESGCM(secret).encrypt(_NONCE, np.ascontiguousarray(share, dtype="<u8").tobytes(), bound)


def _share(verified: VerifiedContribution, task: RoundTask, number: int, secret: bytes) -> Words:
    if number < PARTIES - 1:
        return expand(secret, task.length)
    bound = pack(["atoll masked", task.round_id, verified.device_id])
    try:
        return np.frombuffer(AESGCM(secret).decrypt(_NONCE, verified.masked, bound), dtype="<u8")
    except InvalidTag:
        raise Untrusted("the masked vector does not open under the sealed secret") from None


def _claimed_device(data: bytes) -> str:
    """The device a contribution names, believed or not; "" when it cannot be read."""
    try:
        return unpack(parse(data).claim, Claim).device_id
    except Malformed:
        return ""


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
