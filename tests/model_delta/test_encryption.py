"""Sealed blobs: round trips, and every way to tamper with one."""

from __future__ import annotations

import bz2
import hashlib
import tracemalloc

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st

from model_delta.errors import Malformed, Untrusted
from model_delta.keys.encryption import CHUNK_BYTES, new_key, open_blob, open_sealed, seal_blob, seal_to

KEY = bytes(range(32))
DIGEST, LABEL = "ab" * 32, "segment:0"
HEADER = 21
FROZEN = "4154423100121483847a21d8dbcdd226f577b4740f08fd7433ec16e66e5ab796a73f5c1648ed9acdc136028c"
"""`weights` sealed by the first release; a later one must still write and read it."""


def noise(size: int) -> bytes:
    """Incompressible bytes, so that a blob has as many chunks as it seems."""
    return hashlib.shake_256(b"noise").digest(size)


@given(st.binary(max_size=5000))
def test_what_is_sealed_opens(plaintext: bytes) -> None:
    sealed = seal_blob(KEY, DIGEST, LABEL, plaintext)
    assert open_blob(KEY, DIGEST, LABEL, sealed, len(plaintext)) == plaintext
    assert seal_blob(KEY, DIGEST, LABEL, plaintext) == sealed


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES])
def test_chunk_borders(size: int) -> None:
    plaintext = noise(size)
    sealed = seal_blob(KEY, DIGEST, LABEL, plaintext)
    chunks = max(1, -(-size // CHUNK_BYTES))
    assert len(sealed) == HEADER + size + 16 * chunks
    assert open_blob(KEY, DIGEST, LABEL, sealed, size) == plaintext


def test_compressible_bytes_travel_small() -> None:
    plaintext = bytes(300_000)
    sealed = seal_blob(KEY, DIGEST, LABEL, plaintext)
    assert len(sealed) < 200
    assert open_blob(KEY, DIGEST, LABEL, sealed, len(plaintext)) == plaintext


@given(st.binary(min_size=1, max_size=400), st.data())
def test_no_flipped_bit_goes_unnoticed(plaintext: bytes, data: st.DataObject) -> None:
    sealed = bytearray(seal_blob(KEY, DIGEST, LABEL, plaintext))
    position = data.draw(st.integers(0, len(sealed) - 1))
    sealed[position] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises((Untrusted, Malformed)):
        open_blob(KEY, DIGEST, LABEL, bytes(sealed), len(plaintext))


@given(st.binary(max_size=400), st.data())
def test_no_cut_goes_unnoticed(plaintext: bytes, data: st.DataObject) -> None:
    sealed = seal_blob(KEY, DIGEST, LABEL, plaintext)
    length = data.draw(st.integers(0, len(sealed) - 1))
    with pytest.raises((Untrusted, Malformed)):
        open_blob(KEY, DIGEST, LABEL, sealed[:length], len(plaintext))


def test_whole_chunks_cannot_be_dropped_swapped_or_repeated() -> None:
    plaintext = noise(3 * CHUNK_BYTES)
    sealed = seal_blob(KEY, DIGEST, LABEL, plaintext)
    step = CHUNK_BYTES + 16
    head, chunks = sealed[:HEADER], [sealed[HEADER + i * step : HEADER + (i + 1) * step] for i in range(3)]
    for order in ([0, 1], [0], [1, 0, 2], [0, 0, 1, 2], [0, 1, 2, 2], [2]):
        with pytest.raises(Untrusted, match="does not open"):
            open_blob(KEY, DIGEST, LABEL, head + b"".join(chunks[i] for i in order), 4 * len(plaintext))


@pytest.mark.parametrize(
    ("key", "digest", "label"),
    [(bytes(32), DIGEST, LABEL), (KEY, "cd" * 32, LABEL), (KEY, DIGEST, "segment:1")],
)
def test_a_blob_opens_only_as_what_it_was_sealed_as(key: bytes, digest: str, label: str) -> None:
    with pytest.raises(Untrusted):
        open_blob(key, digest, label, seal_blob(KEY, DIGEST, LABEL, b"weights"), 100)


def test_digest_and_label_cannot_trade_places() -> None:
    with pytest.raises(Untrusted):
        open_blob(KEY, "a|1", "b", seal_blob(KEY, "a", "1|b", b"weights"), 100)


def test_a_bomb_is_refused_within_bounded_memory() -> None:
    bomb = seal_blob(KEY, DIGEST, LABEL, bytes(50_000_000))
    tracemalloc.start()
    try:
        with pytest.raises(Malformed, match="at most 1000 bytes"):
            open_blob(KEY, DIGEST, LABEL, bomb, 1000)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def handmade(coding: int, body: bytes) -> bytes:
    """A blob of one chunk, sealed by the module docstring's words and not by its code."""
    header = b"ATB1" + bytes([coding]) + b"s" * 16
    subkey = HKDF(hashes.SHA256(), 32, b"s" * 16, b"atoll blob").derive(KEY)
    bound = f"|{DIGEST}|{len(LABEL)}|{LABEL}|".encode()
    return header + AESGCM(subkey).encrypt(bytes(11) + b"\x01", body, header + bound)


def test_the_written_form_is_the_documented_one() -> None:
    assert open_blob(KEY, DIGEST, LABEL, handmade(0, b"weights"), 100) == b"weights"
    assert open_blob(KEY, DIGEST, LABEL, handmade(1, bz2.compress(b"weights")), 100) == b"weights"
    sealed = seal_blob(KEY, DIGEST, LABEL, b"weights")
    assert sealed.hex() == FROZEN


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (bz2.compress(b"weights") + b"junk", "bytes follow"),
        (bz2.compress(b"weights")[:-4], "ends early"),
        (b"not bz2 at all", "damaged"),
        (b"", "ends early"),
    ],
)
def test_a_publisher_that_compresses_badly_is_refused(body: bytes, message: str) -> None:
    with pytest.raises(Malformed, match=message):
        open_blob(KEY, DIGEST, LABEL, handmade(1, body), 100)


def test_an_unknown_coding_is_refused() -> None:
    with pytest.raises(Malformed, match="ATB1"):
        open_blob(KEY, DIGEST, LABEL, handmade(2, b"weights"), 100)


@pytest.mark.parametrize("key", [b"", bytes(16), bytes(33)])
def test_a_key_of_the_wrong_length_is_named(key: bytes) -> None:
    with pytest.raises(Malformed, match=f"expected 32 bytes, found {len(key)}"):
        seal_blob(key, DIGEST, LABEL, b"")


def test_new_keys_differ() -> None:
    assert len({new_key() for _ in range(10)}) == 10
    assert len(new_key()) == 32


def test_sealed_to_one_key_and_context() -> None:
    private, other = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    sealed = seal_to(private.public_key().public_bytes_raw(), b"the key", b"context")
    assert open_sealed(private, sealed, b"context") == b"the key"
    assert open_sealed(private.private_bytes_raw(), sealed, b"context") == b"the key"
    for key, data, info in (
        (other, sealed, b"context"),
        (private, sealed, b"another"),
        (private, sealed[:-1], b"context"),
        (private, b"", b"context"),
    ):
        with pytest.raises(Untrusted):
            open_sealed(key, data, info)


@pytest.mark.parametrize("public", [b"", bytes(32), bytes(31)])
def test_no_sealing_to_a_useless_key(public: bytes) -> None:
    with pytest.raises(Malformed):
        seal_to(public, b"the key", b"context")
