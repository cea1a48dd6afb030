"""Rotation of the wrapping key and shredding of a version, asked of the running coordinator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from atoll.operate import operator
from atoll.output import show

TIMEOUT_S = 600.0
"""A hundred thousand records take seconds with the embedded keyring, and minutes over a network."""


def keys_status(data: Path, *, contact_s: float, as_json: bool) -> None:
    """Show where the keys are and which versions of the wrapping key are kept."""
    found = operator(data, contact_s).get("/v1/keys")
    show(found, _text(found), as_json=as_json)


def rotate_keys(data: Path, *, forget: bool, contact_s: float, as_json: bool) -> None:
    """Give every artifact key a new wrapping key; with `forget` destroy the old ones."""
    found = operator(data, contact_s).post("/v1/keys/rotate", {"forget": forget}, timeout_s=TIMEOUT_S)
    show(found, _text(found), as_json=as_json)


def shred_release(data: Path, digest: str, *, contact_s: float, as_json: bool) -> None:
    """Destroy a version's key and every wrapping key that an old copy of it was under."""
    found = operator(data, contact_s).post(f"/v1/releases/{digest}/shred", timeout_s=TIMEOUT_S)
    show(found, f"{digest[:16]}…: shredded; {_text(found)}", as_json=as_json)


def _text(found: dict[str, Any]) -> str:
    return f"wrapping key: version {found['latest']}, records open from version {found['floor']}"
