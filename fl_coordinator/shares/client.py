"""The device's half of a secure round: clip, encode, split, seal, sign. Needs only NumPy and cryptography.

The raw update is the caller's to forget. What this returns may be shown to anybody: two of the three aggregators would
have to conspire to read it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from fl_coordinator.shares.bounds import require_announceable
from fl_coordinator.shares.contribution import CONTRIBUTION_TYPE, Claim, packed, sealing_info, sealing_keys
from fl_coordinator.shares.fixed_point import BLOCK, Rng, encode_blocks, norm_of
from fl_coordinator.shares.sharing import PARTIES
from fl_coordinator.shares.streams import SEED_BYTES, KeyStream, Words
from model_delta.encoding import pack
from model_delta.errors import Malformed
from model_delta.keys.encryption import seal_to
from model_delta.task import RoundTask, terms_of
from model_delta.trust.signing import pre_authentication_encoding


def make_contribution(
    update: NDArray[np.float32],
    task: RoundTask,
    identity_sign: Callable[[bytes], bytes],
    certificate_pem: bytes,
    device_id: str,
    rng: Rng,
) -> bytes:
    """A packed Contribution from a local update, float32[d], clipped here to the task's norm.

    `identity_sign` makes an ECDSA P-256 SHA-256 signature (DER) over a message; `rng` must be cryptographic. Raises
    Malformed for another length, for values that are not finite, and for a round that no device should join.
    """
    require_announceable(task)
    if update.size != task.length:
        raise Malformed(f"update for round {task.round_id!r}: expected {task.length} values, found {update.size}")
    norm = norm_of(update)
    factor = task.clip_norm_l2 / norm if norm > task.clip_norm_l2 else 1.0
    encoded = encode_blocks(update, task.fraction_bits, rng, factor, norm)
    return _shared(encoded, update.size, task, identity_sign, certificate_pem, device_id, rng)


def share_out(
    encoded: Words,
    task: RoundTask,
    identity_sign: Callable[[bytes], bytes],
    certificate_pem: bytes,
    device_id: str,
    rng: Rng,
) -> bytes:
    """A packed Contribution from ring elements, uint32[d], as they are: nothing is clipped or checked here."""
    blocks = (encoded[start : start + BLOCK].copy() for start in range(0, encoded.size, BLOCK))
    return _shared(blocks, encoded.size, task, identity_sign, certificate_pem, device_id, rng)


def _shared(
    blocks: Iterable[Words],
    length: int,
    task: RoundTask,
    identity_sign: Callable[[bytes], bytes],
    certificate_pem: bytes,
    device_id: str,
    rng: Rng,
) -> bytes:
    secrets = [rng(SEED_BYTES) for _ in range(PARTIES)]
    masked, digest = _masked(blocks, length, secrets)
    sealed = tuple(
        seal_to(key.sealing, secrets[index] + secrets[(index + 1) % PARTIES], sealing_info(task, device_id, index))
        for index, key in enumerate(task.aggregators)
    )
    claim = pack(
        Claim(
            tenant=task.tenant,
            model=task.model,
            round_id=task.round_id,
            base=task.base,
            device_id=device_id,
            length=length,
            fraction_bits=task.fraction_bits,
            certificate=certificate_pem,
            sealing_keys=sealing_keys(task.aggregators),
            sealed=sealed,
            masked=digest,
            terms=terms_of(task),
        )
    )
    signature = identity_sign(pre_authentication_encoding(CONTRIBUTION_TYPE, claim))
    return packed(claim, signature, masked)


def _masked(blocks: Iterable[Words], length: int, secrets: Sequence[bytes]) -> tuple[memoryview, str]:
    """Share 2 under the last secret, and its digest. Block by block: a device has little cache and less memory.

    Blocks are changed in place."""
    first, second, cover = (KeyStream(secret) for secret in secrets)
    masked, hashed, done = np.empty(length, dtype="<u4"), hashlib.sha256(), 0
    for block in blocks:
        block -= first.words(block.size)
        block -= second.words(block.size)
        part = masked[done : done + block.size]
        part[:] = cover.masked(block)
        hashed.update(part.data)
        done += block.size
    return masked.data.cast("B"), hashed.hexdigest()
