"""Keys and signatures as TUF metadata has them.

A repository signs through `Signer`s: over a private key in memory, or over a callable, so that a keyring signs whose
keys nobody sees.
"""

from __future__ import annotations

from collections.abc import Callable

from securesystemslib.signer import CryptoSigner, Key, SecretsHandler, Signature, Signer, SSlibKey

from model_delta.errors import Malformed
from model_delta.trust.signing import PrivateKey, PublicKey, load_public_key


class CallableSigner(Signer):
    """Signs by asking: `sign` takes bytes and returns the raw signature of the key `public` (Ed25519, or ECDSA P-256
    with SHA-256 in DER)."""

    def __init__(self, public: PublicKey, sign: Callable[[bytes], bytes]) -> None:
        self._key = SSlibKey.from_crypto(public)
        self._sign = sign

    @property
    def public_key(self) -> Key:
        """The key in TUF's form."""
        return self._key

    def sign(self, payload: bytes) -> Signature:
        """A signature over `payload`."""
        return Signature(self._key.keyid, self._sign(payload).hex())

    @classmethod
    def from_priv_key_uri(
        cls, priv_key_uri: str, public_key: Key, secrets_handler: SecretsHandler | None = None
    ) -> Signer:
        """There is no such address: whoever holds the keys hands over a callable. Raises Malformed."""
        raise Malformed("signer: expected a callable that signs, found a key address")


def signer_of(private: PrivateKey) -> Signer:
    """A signer over a private key in memory."""
    return CryptoSigner(private)


def tuf_key_id(public: PublicKey) -> str:
    """The key's name in TUF metadata: SHA-256 of its canonical JSON (not the name that envelopes use)."""
    return SSlibKey.from_crypto(public).keyid


def tuf_key(der: bytes) -> Key:
    """A key in TUF's form, from its DER SubjectPublicKeyInfo. Raises Malformed."""
    return SSlibKey.from_crypto(load_public_key(der))
