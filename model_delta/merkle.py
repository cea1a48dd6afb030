"""A tree over a model's segments, or a round's contributions.

The hash tree of RFC 9162 section 2.1: SHA-256, leaves prefixed with 0x00 and nodes with 0x01, split at the largest
power of two below the size. One root names the whole; a proof of log2(n) digests shows that one leaf belongs to it.
Digests are 64 hexadecimal characters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from model_delta.digest import require_digest
from model_delta.errors import Malformed


def root(leaves: Sequence[bytes]) -> str:
    """The tree's root (RFC 9162 section 2.1.1); of no leaves, the hash of nothing."""
    return _root([_leaf(leaf) for leaf in leaves]).hex()


def proof(leaves: Sequence[bytes], index: int) -> tuple[str, ...]:
    """The inclusion proof of leaf `index` (RFC 9162 section 2.1.3.1), from the leaf upwards. Raises Malformed."""
    if not 0 <= index < len(leaves):
        raise Malformed(f"inclusion proof: expected a leaf below {len(leaves)}, found {index}")
    hashes = [_leaf(leaf) for leaf in leaves]
    path: list[str] = []
    while len(hashes) > 1:
        split = _split(len(hashes))
        if index < split:
            path.append(_root(hashes[split:]).hex())
            hashes = hashes[:split]
        else:
            path.append(_root(hashes[:split]).hex())
            hashes, index = hashes[split:], index - split
    return tuple(reversed(path))


def verify_inclusion(root: str, leaf: bytes, index: int, size: int, proof: Sequence[str]) -> bool:
    """Whether `leaf` is number `index` of the `size` leaves under `root` (RFC 9162 section 2.1.3.2).

    Raises Malformed for a digest of the wrong form.
    """
    if not 0 <= index < size:
        return False
    here, last, value = index, size - 1, _leaf(leaf)
    for digest in proof:
        sibling = bytes.fromhex(require_digest(digest, "inclusion proof"))
        if last == 0:
            return False
        if here & 1 or here == last:
            value = _node(sibling, value)
            while not here & 1 and here:
                here, last = here >> 1, last >> 1
        else:
            value = _node(value, sibling)
        here, last = here >> 1, last >> 1
    return last == 0 and value.hex() == root


def _root(hashes: Sequence[bytes]) -> bytes:
    if not hashes:
        return hashlib.sha256().digest()
    if len(hashes) == 1:
        return hashes[0]
    split = _split(len(hashes))
    return _node(_root(hashes[:split]), _root(hashes[split:]))


def _split(size: int) -> int:
    return 1 << (size - 1).bit_length() - 1


def _leaf(data: bytes) -> bytes:
    return hashlib.sha256(b"\x00" + data).digest()


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()
