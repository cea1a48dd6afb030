"""Where a model comes from, as its signer said it: OpenSSF model-signing bundles (only importer of model_signing).

A bundle (a Sigstore bundle, version 0.3, around a DSSE envelope with an in-toto statement) lists the files of a model
with their digests. It is checked offline, against a public key or certificates that the operator names: keyless
Sigstore signatures need the network and an identity provider, and are not taken. Two things must hold: the library
verifies the bundle over the file or folder as it lies there, and the statement in it names the very bytes that are
about to be published, since files on disk may change and a signer may have left some out.

The library is an extra (`atoll[provenance]`) and takes two seconds to import: it is loaded when a bundle is there.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model_delta.digest import digest_of
from model_delta.errors import Malformed, SignatureInvalid

BUNDLE_BYTES_MAX = 4 << 20
STATEMENT = "https://model_signing/signature/v1.0"


def verified_bundle(
    model: Path,
    source: bytes,
    bundle: Path,
    *,
    key: Path | None = None,
    chain: Sequence[Path] = (),
    folder: Path | None = None,
) -> bytes:
    """The bytes of `bundle`, if it vouches for `source`, which was read from `model`.

    `key`: the signer's public key, PEM (P-256, P-384 or P-521); or `chain`: certificates, PEM, that the signer's must
    lead to. That certificate is judged at the time from which it was valid, as the library does: a bundle says nothing
    of when it was signed. `folder`: what the bundle covers, where that is more than the one file. Raises Malformed for
    what cannot be read, for a missing library and for neither key nor chain, SignatureInvalid for everything that does
    not verify.
    """
    if (key is None) == (not chain):
        raise Malformed("--signature: expected the signer's --signer-key PUB.pem, or --signer-chain CERT.pem")
    data = _read(bundle, BUNDLE_BYTES_MAX)
    for path in (*([key] if key is not None else []), *chain):
        _read(path, BUNDLE_BYTES_MAX)
    what = f"signature {bundle}"
    name = "." if folder is None else _name_in(folder, model)
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "bundle"  # what is verified is what was read, and is kept
        copy.write_bytes(data)
        _verify(what, folder or model, copy, key, chain)
    found = _digests(what, data).get(name)
    if found != digest_of(source):
        there = f"sha256 {found[:16]}…" if found else "no digest of it"
        raise SignatureInvalid(f"{what}: expected sha256 {digest_of(source)[:16]}… for {model}, found {there}")
    return data


def _verify(what: str, signed: Path, bundle: Path, key: Path | None, chain: Sequence[Path]) -> None:
    try:
        from model_signing import verifying
    except ModuleNotFoundError as error:
        raise Malformed(f"{what}: {error.name} is not installed; pip install 'atoll[provenance]'") from None
    try:
        with contextlib.redirect_stdout(sys.stderr):  # the library warns with print
            config = verifying.Config()
            if key is not None:
                config.use_elliptic_key_verifier(public_key=key)
            else:
                config.use_certificate_verifier(certificate_chain=chain)
            config.verify(signed, bundle)
    except Exception as error:  # whatever the library, its parsers and OpenSSL raise on a hostile bundle
        reason = " ".join(str(error).split()).partition(": Expected ")[0][:200]  # which file; not its digests' bytes
        raise SignatureInvalid(f"{what}: does not vouch for {signed}: {reason or type(error).__name__}") from None


def _digests(what: str, bundle: bytes) -> dict[str, str]:
    """SHA-256 by name from the statement of a bundle whose signature was verified."""
    try:
        statement: Any = json.loads(base64.b64decode(json.loads(bundle)["dsseEnvelope"]["payload"], validate=True))
        kind, predicate = statement["predicateType"], statement["predicate"]
        method, listed = predicate["serialization"]["method"], predicate["resources"]
        if kind != STATEMENT or method != "files":
            raise SignatureInvalid(f"{what}: expected {STATEMENT} over whole files, found {kind} over {method}")
        return {entry["name"]: entry["digest"] for entry in listed if entry["algorithm"] == "sha256"}
    except (ValueError, KeyError, TypeError, binascii.Error) as error:
        raise SignatureInvalid(f"{what}: expected a statement of model-signing, found none ({error})") from None


def _name_in(folder: Path, model: Path) -> str:
    try:
        return model.resolve().relative_to(folder.resolve()).as_posix()
    except ValueError:
        raise Malformed(f"--signed-folder {folder}: expected it to hold {model}") from None


def _read(path: Path, most: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise Malformed(f"{path}: {error.strerror}") from None
    if len(data) > most:
        raise Malformed(f"{path}: expected at most {most} bytes")
    return data
