"""Nobody between the publisher and the device reads a model: how bytes are sealed.

*Sealed blobs* carry segments and patches through stores, brokers and mirrors. The plaintext is compressed (bz2) where
that helps and split into 64 KiB chunks, each encrypted with AES-256-GCM in the STREAM construction (Hoang,
Reyhanitabar, Rogaway, Vizár: Online Authenticated-Encryption and its Nonce-Reuse Misuse-Resistance, CRYPTO 2015): the
chunk's index and a final flag are in the nonce, so that chunks cannot be dropped, repeated, re-ordered or cut off. The
associated data are the header, the manifest's digest and the label: a blob opens only as what it was sealed as.

    header  = "ATB1" | coding (0 plain, 1 bz2) | salt (16 bytes)
    subkey  = HKDF-SHA256(artifact key, salt, "atoll blob")
    nonce   = 7 zero bytes | chunk index (4 bytes, big endian) | 1 for the last chunk, else 0

The salt is a keyed hash of coding, manifest digest, label and plaintext: sealing is deterministic, and two different
plaintexts never share a nonce under one subkey.

*Sealing to a key* is HPKE (RFC 9180), base mode, DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM.

Compatibility promise: the four magic bytes change with the form.
"""

from __future__ import annotations

import bz2
import hmac
import os
from collections.abc import Iterator

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from model_delta.errors import Malformed, Untrusted
from model_delta.patch.access import BytesAccess, RandomAccess, read_exactly

KEY_BYTES = 32
CHUNK_BYTES = 65_536
_BLOCK_LEVEL = 4
"""Blocks of 400 KB: a device that opens one needs 1.6 MB."""
_MAGIC = b"ATB1"
_TAG_BYTES = 16
_HEADER_BYTES = len(_MAGIC) + 1 + 16
_SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


def new_key() -> bytes:
    """A fresh 256-bit artifact key from the operating system."""
    return os.urandom(KEY_BYTES)


def seal_blob(key: bytes, manifest_digest: str, label: str, plaintext: bytes) -> bytes:
    """Seal `plaintext` under the artifact key, bound to a manifest and a label. Deterministic. Raises Malformed for a
    key of the wrong length."""
    _require_key(key)
    packed = bz2.compress(plaintext, _BLOCK_LEVEL)
    coding, body = (b"\x01", packed) if len(packed) < len(plaintext) else (b"\x00", plaintext)
    bound = _bound(manifest_digest, label)
    purpose = b"atoll blob salt 4" if coding == b"\x01" else b"atoll blob salt"  # 900 KB blocks once had the other one
    salt = hmac.digest(key, purpose + bound + plaintext, "sha256")[:16]
    header = _MAGIC + coding + salt
    cipher = AESGCM(_subkey(key, salt))
    starts = range(0, len(body), CHUNK_BYTES) or range(1)
    chunks = [
        cipher.encrypt(_nonce(index, index == len(starts) - 1), body[start : start + CHUNK_BYTES], header + bound)
        for index, start in enumerate(starts)
    ]
    return header + b"".join(chunks)


def open_blob(key: bytes, manifest_digest: str, label: str, sealed: bytes, size_max: int) -> bytes:
    """The plaintext of a sealed blob, at most `size_max` bytes. Raises as `open_stream`."""
    return b"".join(open_stream(key, manifest_digest, label, BytesAccess(sealed), size_max))


def open_stream(key: bytes, manifest_digest: str, label: str, sealed: RandomAccess, size_max: int) -> Iterator[bytes]:
    """The plaintext of a sealed blob in pieces of at most CHUNK_BYTES, at most `size_max` bytes in all.

    A piece comes from chunks that have opened; that none is missing is only certain when the last piece has come
    without an error, so nothing may be relied on before. Memory: two chunks and, for a compressed blob, a bz2 decoder
    (4 bytes for each byte of a block, which has at most 900,000).
    Raises Malformed for a bad header, a cut-off blob or one that unpacks to more than `size_max`, and Untrusted for a
    chunk that does not open under this key, manifest and label.
    """
    _require_key(key)
    what = f"sealed blob {label!r} of {manifest_digest[:16]}…"
    size = sealed.size
    header = sealed.pread(0, _HEADER_BYTES)
    if size < _HEADER_BYTES + _TAG_BYTES or len(header) < _HEADER_BYTES or header[:4] != _MAGIC or header[4] > 1:
        raise Malformed(f"{what}: expected a blob of at least {_HEADER_BYTES + _TAG_BYTES} bytes that starts with ATB1")
    bound = header + _bound(manifest_digest, label)
    cipher = AESGCM(_subkey(key, header[5:]))
    starts = range(_HEADER_BYTES, size, CHUNK_BYTES + _TAG_BYTES)
    unpacker = bz2.BZ2Decompressor() if header[4] else None
    found = 0
    for index, start in enumerate(starts):
        data = read_exactly(sealed, start, min(CHUNK_BYTES + _TAG_BYTES, size - start), what)
        try:
            chunk = cipher.decrypt(_nonce(index, index == len(starts) - 1), data, bound)
        except InvalidTag:
            raise Untrusted(f"{what}: chunk {index} does not open under this key") from None
        for piece in _unpacked(unpacker, chunk, what) if unpacker else (chunk,):
            found += len(piece)
            if found > size_max:
                raise Malformed(f"{what}: expected at most {size_max} bytes, found more")
            if piece:
                yield piece
    if unpacker is not None and not unpacker.eof:
        raise Malformed(f"{what}: compressed data ends early")


def seal_to(public_x25519_raw: bytes, plaintext: bytes, info: bytes) -> bytes:
    """HPKE: encapsulated key followed by the ciphertext, readable by the holder of the X25519 key, bound to `info`.
    Raises Malformed for bytes that are no usable X25519 key."""
    try:
        return _SUITE.encrypt(plaintext, X25519PublicKey.from_public_bytes(public_x25519_raw), info)
    except ValueError as error:
        raise Malformed(f"X25519 public key: {error}") from None


def open_sealed(private: X25519PrivateKey | bytes, data: bytes, info: bytes) -> bytes:
    """Open what `seal_to` made; `private` is the key or its 32 raw bytes. Raises Untrusted when it does not open."""
    key = private if isinstance(private, X25519PrivateKey) else X25519PrivateKey.from_private_bytes(private)
    try:
        return _SUITE.decrypt(data, key, info)
    except (InvalidTag, ValueError):
        raise Untrusted(f"sealed message of {len(data)} bytes: does not open under this key and context") from None


def _unpacked(unpacker: bz2.BZ2Decompressor, chunk: bytes, what: str) -> Iterator[bytes]:
    """What a chunk adds to the plaintext, in pieces."""
    while True:
        try:
            piece = unpacker.decompress(chunk, CHUNK_BYTES)
        except EOFError:
            raise Malformed(f"{what}: bytes follow the compressed data") from None
        except OSError:
            raise Malformed(f"{what}: compressed data is damaged") from None
        if piece:
            yield piece
        chunk = b""
        if unpacker.eof or unpacker.needs_input:
            break
    if unpacker.unused_data:
        raise Malformed(f"{what}: bytes follow the compressed data")


def _bound(manifest_digest: str, label: str) -> bytes:
    encoded = label.encode()
    return b"|%s|%d|%s|" % (manifest_digest.encode(), len(encoded), encoded)


def _subkey(key: bytes, salt: bytes) -> bytes:
    return HKDF(hashes.SHA256(), KEY_BYTES, salt, b"atoll blob").derive(key)


def _nonce(index: int, final: bool) -> bytes:
    return bytes(7) + index.to_bytes(4, "big") + bytes([final])


def _require_key(key: bytes) -> None:
    if len(key) != KEY_BYTES:
        raise Malformed(f"artifact key: expected {KEY_BYTES} bytes, found {len(key)}")
