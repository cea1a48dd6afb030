"""The tree of RFC 9162 against the reference vectors of Certificate Transparency, and proofs against forgeries."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_delta import merkle
from model_delta.errors import Malformed

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
