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

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, replace
from typing import Annotated

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fl_coordinator.shares.sharing import PARTIES
from fl_coordinator.shares.streams import SEED_BYTES, WORD_BYTES, Octets, Rows, SecretRows
from model_delta.digest import digest_of
from model_delta.encoding import pack, pack_octets, unpack
from model_delta.errors import Malformed, SignatureInvalid, Untrusted
from model_delta.keys.certificates import device_keys_of
from model_delta.keys.encryption import open_sealed
from model_delta.task import AggregatorKey, RoundTask, terms_of
from model_delta.trust.signing import pre_authentication_encoding

CONTRIBUTION_TYPE = "contribution"
FORMAT = 2
OVERHEAD_BYTES = 16_384
"""A contribution is at most this much longer than its vector (certificate, seals, signature, header)."""

NAME_CHARS_MAX = 1_024
"""No name in a claim is longer: names are remembered, asked for and written into logs before anybody is believed."""

_MASKED = PARTIES - 1

_Name = Annotated[str, msgspec.Meta(max_length=NAME_CHARS_MAX)]


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """The signed part. `sealed[i]` opens to the secrets of shares i and i+1 for the holder of `sealing_keys[i]`
    (digests of the aggregators' X25519 keys, in the round's order); `masked` is the digest of the encrypted share 2;
    `terms` is what the device was told of the round (`model_delta.task.terms_of`), "" by an older program."""

    format: int = FORMAT
    tenant: _Name
    model: _Name
    round_id: _Name
    base: _Name
    device_id: _Name
    length: int
    fraction_bits: int
    certificate: bytes
    sealing_keys: tuple[str, ...]
    sealed: tuple[bytes, ...]
    masked: _Name
    terms: _Name = ""


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
class KeptContribution:
    """A contribution that an aggregator keeps, verified or not: `digest` names the bytes that arrived, `masked` is its
    vector of `masked_bytes`, wherever it lies, and has the digest that `claim` says. `flaw` says why its bytes can
    never count ("" if they may); the rest is then as good as the device's word."""

    digest: str
    device_id: str
    claim: bytes = b""
    signature: bytes = b""
    masked: Octets = b""
    masked_bytes: int = 0
    flaw: str = ""

    def needed_by(self, index: int) -> KeptContribution:
        """As the aggregator at place `index` of the round needs it: the first one makes no use of vectors."""
        return replace(self, masked=b"") if index == 0 else self


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
    claim = verify_claim(contribution.claim, contribution.signature, ca_pem, revoked, now)
    _require_vector(contribution, claim)
    return VerifiedContribution(digest_of(data), claim.device_id, claim, contribution.masked)


def verify_claim(claim: bytes, signature: bytes, ca_pem: bytes, revoked: Set[int], now: float) -> Claim:
    """The signed part alone: certificate chain, common name, signature; arguments and errors as in `verify`."""
    found = unpack(claim, Claim)
    if found.format != FORMAT:
        raise Malformed(f"contribution: format {found.format}, this reader knows {FORMAT}")
    name, key, _ = device_keys_of(found.certificate, ca_pem, now, frozenset(revoked))
    if name != found.device_id:
        raise Untrusted(f"contribution of {found.device_id[:64]!r}: its certificate names {name!r}")
    try:
        key.verify(signature, pre_authentication_encoding(CONTRIBUTION_TYPE, claim), ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise SignatureInvalid(f"contribution of {name!r}: the signature is not by the certificate's key") from None
    return found


def mismatch(claim: Claim, masked_bytes: int, task: RoundTask) -> str:
    """Why a verified contribution, its vector of `masked_bytes`, does not belong to `task`, in words; "" if it does."""
    wanted = {
        "tenant": (task.tenant, claim.tenant),
        "model": (task.model, claim.model),
        "round": (task.round_id, claim.round_id),
        "base version": (task.base, claim.base),
        "vector length": (task.length, claim.length),
        "fraction bits": (task.fraction_bits, claim.fraction_bits),
        "aggregator keys": (sealing_keys(task.aggregators), claim.sealing_keys),
        "number of sealed pairs": (PARTIES, len(claim.sealed)),
        "bytes of masked vector": (WORD_BYTES * task.length, masked_bytes),
        "terms that the device was told": (terms_of(task) if claim.terms else "", claim.terms),
    }
    for what, (expected, found) in wanted.items():
        if expected != found:
            return f"{what}: expected {_short(expected)}, found {_short(found)}"
    return ""


def open_secrets(claim: Claim, task: RoundTask, index: int, private: X25519PrivateKey) -> tuple[bytes, bytes]:
    """The secrets of aggregator `index`'s two shares, 32 bytes each. The claim must match the task.

    Raises Untrusted when the seal does not open.
    """
    opened = open_sealed(private, claim.sealed[index], sealing_info(task, claim.device_id, index))
    if len(opened) != 2 * SEED_BYTES:
        raise Untrusted(f"sealed pair: expected {2 * SEED_BYTES} bytes, found {len(opened)}")
    return opened[:SEED_BYTES], opened[SEED_BYTES:]


def keep(data: bytes, bytes_max: int) -> KeptContribution:
    """What is kept of a contribution's bytes, in memory; only their length and the vector's digest are checked.
    Signature, certificate and round are judged by `hold`, at whose time they must hold."""
    digest = digest_of(data)
    try:
        contribution = parse(data, bytes_max)
        claim = unpack(contribution.claim, Claim)
        _require_vector(contribution, claim)
    except (Malformed, Untrusted) as error:
        return KeptContribution(digest, _claimed_device(data), flaw=str(error))
    masked = contribution.masked
    return KeptContribution(
        digest, claim.device_id, contribution.claim, contribution.signature, memoryview(masked), len(masked)
    )


def hold(
    contributions: Iterable[KeptContribution],
    task: RoundTask,
    index: int,
    private: X25519PrivateKey,
    ca_pem: bytes,
    revoked: Set[int],
    now: float,
) -> Holding:
    """Verify every contribution of the frozen list and open aggregator `index`'s secrets; a bad one is only refused.

    Of two contributions of one device the first counts. `now` is Unix seconds. Vectors stay where they are and are
    read when the result is; the first aggregator needs none of them.
    """
    kept: list[_Opened] = []
    refusals: dict[int, str] = {}
    seen: set[str] = set()
    for place, entry in enumerate(contributions):
        try:
            if entry.flaw:
                raise Malformed(entry.flaw)
            claim = verify_claim(entry.claim, entry.signature, ca_pem, revoked, now)
            reason = mismatch(claim, entry.masked_bytes, task)
            if claim.device_id in seen:
                reason = "a second contribution of this device"
            if reason:
                raise Untrusted(reason)
            secrets = open_secrets(claim, task, index, private)
            seen.add(claim.device_id)
            kept.append(_Opened(entry.digest, claim.device_id, secrets, claim.masked, entry.masked))
        except (Malformed, Untrusted) as error:
            refusals[place] = str(error)
            kept.append(_Opened(entry.digest, entry.device_id))
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
class _Opened:
    """What is needed of one contribution later on."""

    digest: str
    device_id: str
    secrets: tuple[bytes, bytes] = (b"", b"")
    label: str = ""
    masked: Octets = b""


def _require_vector(contribution: Contribution, claim: Claim) -> None:
    if digest_of(contribution.masked) != claim.masked:
        raise Untrusted(f"contribution of {claim.device_id[:64]!r}: the masked vector is not the one that was signed")


def _claimed_device(data: bytes) -> str:
    """The device a contribution names, believed or not; "" when it cannot be read."""
    try:
        return unpack(parse(data).claim, Claim).device_id
    except Malformed:
        return ""


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
