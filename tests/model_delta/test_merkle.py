"""The tree of RFC 9162 against the reference vectors of Certificate Transparency, and proofs against forgeries."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_delta import merkle
from model_delta.errors import DigestMismatch, Malformed

LEAVES = [
    bytes.fromhex(text)
    for text in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
leaves = st.lists(st.binary(max_size=8), min_size=1, max_size=40)


@pytest.mark.parametrize("size", range(1, 9))
def test_reference_roots(size: int) -> None:
    """certificate-transparency's merkletree tests: the roots of the first `size` leaves."""
    assert merkle.root(LEAVES[:size]) == ROOTS[size - 1]


def test_the_root_of_nothing_is_the_hash_of_nothing() -> None:
    assert merkle.root([]) == hashlib.sha256().hexdigest()


@given(leaves, st.data())
def test_every_leaf_is_proved_and_no_other(entries: list[bytes], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(entries) - 1))
    root, proof = merkle.root(entries), merkle.proof(entries, index)
    assert len(proof) <= (len(entries) - 1).bit_length()
    assert merkle.verify_inclusion(root, entries[index], index, len(entries), proof)
    assert not merkle.verify_inclusion(root, entries[index] + b"!", index, len(entries), proof)
    for other in range(len(entries)):
        if entries[other] != entries[index]:
            assert not merkle.verify_inclusion(root, entries[other], index, len(entries), proof)
            assert not merkle.verify_inclusion(root, entries[index], other, len(entries), proof)


@given(leaves, st.data())
def test_altered_proofs_prove_nothing(entries: list[bytes], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(entries) - 1))
    root, proof = merkle.root(entries), merkle.proof(entries, index)
    wrong = hashlib.sha256(b"wrong").hexdigest()
    assert not merkle.verify_inclusion(root, entries[index], index, len(entries), (*proof, wrong))
    for position in range(len(proof)):
        without = (*proof[:position], *proof[position + 1 :])
        altered = (*proof[:position], wrong, *proof[position + 1 :])
        assert not merkle.verify_inclusion(root, entries[index], index, len(entries), without)
        assert not merkle.verify_inclusion(root, entries[index], index, len(entries), altered)


def test_a_node_is_not_a_leaf() -> None:
    """The second pre-image that the two prefixes prevent."""
    left, right = (hashlib.sha256(b"\x00" + leaf).digest() for leaf in (b"a", b"b"))
    assert merkle.root([left + right]) != merkle.root([b"a", b"b"])


@pytest.mark.parametrize(("index", "size"), [(-1, 3), (3, 3), (0, 0)])
def test_an_index_outside_the_tree(index: int, size: int) -> None:
    assert not merkle.verify_inclusion(ROOTS[2], LEAVES[0], index, size, ())
    with pytest.raises(Malformed):
        merkle.proof(LEAVES[:size], index)


def test_a_proof_of_malformed_digests_is_malformed() -> None:
    with pytest.raises(Malformed):
        merkle.verify_inclusion(ROOTS[1], LEAVES[0], 0, 2, ("zz",))


# The walk from the roots down.


@given(leaves)
def test_a_tree_holds_every_level(entries: list[bytes]) -> None:
    tree = merkle.Tree(entries)
    assert tree.root == merkle.root(entries)
    level = [merkle.Node(0, len(entries))]
    while level:
        for node, digest in zip(level, tree.digests(level), strict=True):
            assert digest == merkle.root(entries[node.start : node.start + node.size])
        level = [child for node in level if node.size > 1 for child in merkle.children(node)]


class Remote:
    """A tree at the other end of a link; counts trips and nodes."""

    def __init__(self, entries: list[bytes]) -> None:
        self.tree, self.trips, self.nodes = merkle.Tree(entries), 0, 0

    def __call__(self, nodes: Sequence[merkle.Node]) -> tuple[str, ...]:
        self.trips, self.nodes = self.trips + 1, self.nodes + len(nodes)
        return self.tree.digests(nodes)


@given(leaves, st.data())
def test_the_walk_finds_exactly_what_differs(entries: list[bytes], data: st.DataObject) -> None:
    changed = data.draw(st.sets(st.integers(0, len(entries) - 1)))
    mine = [leaf + b"!" if index in changed else leaf for index, leaf in enumerate(entries)]
    remote = Remote(entries)
    assert merkle.differences(merkle.Tree(mine), remote.tree.root, remote) == tuple(sorted(changed))
    depth = (len(entries) - 1).bit_length()
    assert remote.trips <= depth
    assert remote.nodes <= 2 * depth * len(changed)


def test_the_walk_enters_only_what_differs() -> None:
    entries = [b"%d" % index for index in range(1000)]
    remote = Remote(entries)
    mine = merkle.Tree([*entries[:700], b"other", *entries[701:]])
    assert merkle.differences(mine, remote.tree.root, remote) == (700,)
    assert (remote.trips, remote.nodes) == (10, 20)


@given(leaves.filter(lambda entries: len(entries) > 1), st.data())
def test_a_liar_is_recognised(entries: list[bytes], data: st.DataObject) -> None:
    """Answers that are not under the believed root are refused, at whatever level they stand."""
    honest, mine = merkle.Tree(entries), merkle.Tree([leaf + b"!" for leaf in entries])
    lie_at = data.draw(st.integers(0, (len(entries) - 1).bit_length() - 1))
    trips = 0

    def ask(nodes: Sequence[merkle.Node]) -> tuple[str, ...]:
        nonlocal trips
        answers = list(honest.digests(nodes))
        if trips == lie_at:
            answers[data.draw(st.integers(0, len(answers) - 1))] = hashlib.sha256(b"lie").hexdigest()
        trips += 1
        return tuple(answers)

    with pytest.raises(DigestMismatch, match="not under the root"):
        merkle.differences(mine, honest.root, ask)
    assert trips == lie_at + 1


@pytest.mark.parametrize("answers", [(), ("0" * 64,), ("0" * 64, "x"), ("0" * 64,) * 3])
def test_answers_of_the_wrong_form_are_malformed(answers: tuple[str, ...]) -> None:
    with pytest.raises(Malformed):
        merkle.differences(merkle.Tree([b"a", b"b"]), merkle.root([b"a", b"c"]), lambda nodes: answers)


def test_trees_of_other_shapes() -> None:
    with pytest.raises(Malformed, match="no node over 2 leaves from 1"):
        merkle.Tree([b"a", b"b", b"c"]).digests([merkle.Node(1, 2)])
    with pytest.raises(Malformed, match="fetch the whole"):
        merkle.differences(merkle.Tree([]), merkle.root([b"a"]), lambda nodes: ())
    assert merkle.Tree([]).root == merkle.root([])
