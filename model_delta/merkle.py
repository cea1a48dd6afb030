"""A tree over a model's segments, or a round's contributions.

The hash tree of RFC 9162 section 2.1: SHA-256, leaves prefixed with 0x00 and nodes with 0x01, split at the largest
power of two below the size. One root names the whole; a proof of log2(n) digests shows that one leaf belongs to it.
Digests are 64 hexadecimal characters.

Two trees of the same size are compared from the roots down, a level at a time (`differences`): equal subtrees are
never entered, so finding the k leaves that differ among n costs about 2 k log2(n / k) digests. The other tree may be
anywhere: it is a callable from nodes to digests, and what it answers is checked against the root that is believed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from model_delta.digest import require_digest
from model_delta.errors import DigestMismatch, Malformed


class Node(NamedTuple):
    """The subtree over leaves [start, start + size) of a tree; which ones exist follows from the tree's size."""

    start: int
    size: int


Ask = Callable[[Sequence[Node]], Sequence[str]]
"""The digests of some nodes of a tree that is elsewhere, in the order asked; one call is one trip over a link."""


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


class Tree:
    """All nodes of a tree over `leaves`: 64 bytes a leaf. Answers an `Ask`, and is compared by `differences`."""

    def __init__(self, leaves: Sequence[bytes]) -> None:
        self.size = len(leaves)
        self._nodes: dict[Node, bytes] = {}
        if leaves:
            self._fill([_leaf(leaf) for leaf in leaves], Node(0, len(leaves)))

    @property
    def root(self) -> str:
        """The same as `root(leaves)`."""
        return self._nodes[Node(0, self.size)].hex() if self.size else hashlib.sha256().hexdigest()

    def digests(self, nodes: Sequence[Node]) -> tuple[str, ...]:
        """The digests of `nodes`. Raises Malformed for a node that this tree has not got."""
        missing = next((node for node in nodes if node not in self._nodes), None)
        if missing is not None:
            raise Malformed(
                f"tree of {self.size} leaves: it has no node over {missing.size} leaves from {missing.start} on"
            )
        return tuple(self._nodes[node].hex() for node in nodes)

    def _fill(self, hashes: list[bytes], node: Node) -> bytes:
        if node.size == 1:
            value = hashes[node.start]
        else:
            left, right = children(node)
            value = _node(self._fill(hashes, left), self._fill(hashes, right))
        self._nodes[node] = value
        return value


def children(node: Node) -> tuple[Node, Node]:
    """The two subtrees of a node over more than one leaf (RFC 9162 section 2.1.1)."""
    split = _split(node.size)
    return Node(node.start, split), Node(node.start + split, node.size - split)


def differences(mine: Tree, root: str, ask: Ask) -> tuple[int, ...]:
    """Which leaves of `mine` differ from those of the tree under `root` of the same size, in order.

    `root` is believed, `ask` is not: each pair of answers must hash to the node above. The trips are at most
    log2(size), and equal subtrees are not asked for. Raises DigestMismatch for answers that do not belong under `root`,
    Malformed for answers of the wrong number or form, and whatever `ask` raises.
    """
    require_digest(root, "root")
    if mine.root == root:
        return ()
    if not mine.size:
        raise Malformed("tree without leaves: nothing to compare; fetch the whole")
    level = [(Node(0, mine.size), root)]
    found: list[int] = []
    while level:
        found.extend(node.start for node, _ in level if node.size == 1)
        level = [(node, digest) for node, digest in level if node.size > 1]
        asked = [child for node, _ in level for child in children(node)]
        answers = ask(asked) if asked else ()
        if len(answers) != len(asked):
            raise Malformed(f"tree walk: expected {len(asked)} digests, found {len(answers)}")
        theirs = dict(zip(asked, answers, strict=True))
        own = dict(zip(asked, mine.digests(asked), strict=True))
        for node, digest in level:
            left, right = (bytes.fromhex(require_digest(theirs[child], "tree walk")) for child in children(node))
            if _node(left, right).hex() != digest:
                raise DigestMismatch(
                    f"tree walk: the answers for leaves {node.start} to {node.start + node.size - 1} are not under the "
                    f"root {root[:16]}…; ask another region"
                )
        level = [(child, theirs[child]) for child in asked if theirs[child] != own[child]]
    return tuple(sorted(found))


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
