"""Who the device is: a folder with two private keys that never leave it, and the certificate over their public halves.

    key.pem           P-256: TLS client key, signatures (key requests, contributions)
    sealing.key       X25519, 32 raw bytes: what artifact keys and secrets are sealed to
    request.pem       PKCS #10 request over both, for the enrolment
    certificate.pem   what came back, with the CA in ca.pem

Private files are written with mode 0600. A folder that already has keys keeps them: creating twice is harmless.
"""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from edge_runtime.link import TlsFiles
from edge_runtime.slots import replace_file
from model_delta.encoding import pack
from model_delta.errors import Malformed, NotFound
from model_delta.keys.certificates import make_request, require_identity
from model_delta.topics import KeyRequest
from model_delta.trust.signing import seal_envelope, sign

KEY_REQUEST_TYPE = "key-request"


class Identity:
    """The keys in `folder`. Not enrolled until `certificate` is there."""

    def __init__(self, folder: Path, name: str, private: ec.EllipticCurvePrivateKey, sealing: X25519PrivateKey) -> None:
        self.folder, self.name = folder, name
        self.private, self.sealing = private, sealing

    @classmethod
    def create(cls, folder: Path, name: str) -> Identity:
        """Make the folder, both keys and the request; keys that are there are kept. Raises Malformed for a bad name."""
        require_identity(name)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not (folder / "key.pem").exists():
            _write_private(
                folder / "key.pem",
                ec.generate_private_key(ec.SECP256R1()).private_bytes(
                    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
                ),
            )
        if not (folder / "sealing.key").exists():
            _write_private(folder / "sealing.key", X25519PrivateKey.generate().private_bytes_raw())
        identity = cls.load(folder, name)
        replace_file(folder / "request.pem", identity.request_pem())
        return identity

    @classmethod
    def load(cls, folder: Path, name: str) -> Identity:
        """Read the keys. Raises NotFound when there are none, Malformed when they are not what they should be."""
        try:
            private = serialization.load_pem_private_key((folder / "key.pem").read_bytes(), None)
            sealing = X25519PrivateKey.from_private_bytes((folder / "sealing.key").read_bytes())
        except FileNotFoundError as error:
            raise NotFound(
                f"identity {name}: expected {error.filename}, found none; create and enrol it first"
            ) from None
        except ValueError:
            raise Malformed(f"identity {name}: expected a P-256 and an X25519 private key in {folder}") from None
        if not isinstance(private, ec.EllipticCurvePrivateKey) or not isinstance(private.curve, ec.SECP256R1):
            raise Malformed(f"identity {name}: expected a P-256 key in {folder / 'key.pem'}")
        return cls(folder, name, private, sealing)

    def request_pem(self) -> bytes:
        """The certificate request, which proves possession of the P-256 key."""
        return make_request(self.private, self.name)

    @property
    def sealing_public(self) -> bytes:
        """The X25519 public key, 32 raw bytes."""
        return self.sealing.public_key().public_bytes_raw()

    def enrolled(self, certificate_pem: bytes, ca_pem: bytes) -> None:
        """Keep what the enrolment gave."""
        replace_file(self.folder / "ca.pem", ca_pem)
        replace_file(self.folder / "certificate.pem", certificate_pem)

    @property
    def is_enrolled(self) -> bool:
        """Whether a certificate is there."""
        return (self.folder / "certificate.pem").exists()

    @property
    def certificate_pem(self) -> bytes:
        """The certificate. Raises NotFound before the enrolment."""
        path = self.folder / "certificate.pem"
        if not path.exists():
            raise NotFound(f"identity {self.name}: expected a certificate at {path}, found none; enrol it first")
        return path.read_bytes()

    def tls(self) -> TlsFiles:
        """The files a TLS connection needs."""
        return TlsFiles(self.folder / "ca.pem", self.folder / "certificate.pem", self.folder / "key.pem")

    def sign(self, message: bytes) -> bytes:
        """ECDSA P-256 with SHA-256 (FIPS 186-5) over `message`, DER."""
        return self.private.sign(message, ec.ECDSA(hashes.SHA256()))

    def key_request(self, request: KeyRequest) -> bytes:
        """A packed, signed envelope that asks for an artifact key."""
        return seal_envelope(sign(KEY_REQUEST_TYPE, pack(request), [self.private]))


def _write_private(path: Path, data: bytes) -> None:
    replace_file(path, data)  # creates with 0600
    os.chmod(path, 0o600)  # noqa: PTH101 - also when an older file was wider
