"""Rotation of the wrapping key and shredding of a version, asked of the running coordinator."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from atoll.control_client import ControlClient
from atoll.operate import operator
from atoll.output import show
from model_delta.errors import AtollError

TIMEOUT_S = 600.0
"""A hundred thousand records take seconds with the embedded keyring, and minutes over a network."""
PROGRESS_EVERY_S = 0.5
PROGRESS_TIMEOUT_S = 2.0
"""How long one question may take; a command that has ended waits for no more than this."""


def keys_status(data: Path, *, contact_s: float, as_json: bool) -> None:
    """Show where the keys are and which versions of the wrapping key are kept."""
    found = operator(data, contact_s).get("/v1/keys")
    show(found, _text(found), as_json=as_json)


def rotate_keys(data: Path, *, forget: bool, contact_s: float, as_json: bool) -> None:
    """Give every artifact key a new wrapping key; with `forget` destroy the old ones."""
    client = operator(data, contact_s)
    with rewrapping_shown(client, as_json=as_json):
        found = client.post("/v1/keys/rotate", {"forget": forget}, timeout_s=TIMEOUT_S)
    show(found, _text(found), as_json=as_json)


def shred_release(data: Path, digest: str, *, contact_s: float, as_json: bool) -> None:
    """Destroy a version's key and every wrapping key that an old copy of it was under."""
    client = operator(data, contact_s)
    with rewrapping_shown(client, as_json=as_json):
        found = client.post(f"/v1/releases/{digest}/shred", timeout_s=TIMEOUT_S)
    show(found, f"{digest[:16]}…: shredded; {_text(found)}", as_json=as_json)


@contextlib.contextmanager
def rewrapping_shown(client: ControlClient, *, as_json: bool, every_s: float = PROGRESS_EVERY_S) -> Iterator[None]:
    """Draw on a terminal how far the coordinator is, while the body waits for it. Ctrl-C ends the waiting only: the
    coordinator replaces all records or none."""
    ended = threading.Event()
    drawing = threading.Thread(target=_draw, args=(client, ended, every_s), daemon=True)
    if sys.stderr.isatty() and not as_json:
        drawing.start()
    try:
        yield
    except KeyboardInterrupt:
        print("\nthe coordinator ends what it began; atoll keys status shows how far it is", file=sys.stderr)
        raise
    finally:
        ended.set()
        if drawing.ident is not None:
            drawing.join(PROGRESS_TIMEOUT_S)


def _draw(client: ControlClient, ended: threading.Event, every_s: float) -> None:
    drawn = False
    while not ended.wait(every_s):
        try:
            found = client.get("/v1/keys", timeout_s=PROGRESS_TIMEOUT_S)
        except AtollError:  # whoever waits for the rotation hears why
            continue
        if found.get("to_rewrap"):
            print(f"\r{_progress(found)}", end="", file=sys.stderr, flush=True)
            drawn = True
    if drawn:
        print(file=sys.stderr, flush=True)


def _progress(found: dict[str, Any]) -> str:
    return f"rewrapped {found['rewrapped']} of {found['to_rewrap']}"


def _text(found: dict[str, Any]) -> str:
    text = f"wrapping key: version {found['latest']}, records open from version {found['floor']}"
    return f"{text}; being rotated, {_progress(found)}" if found.get("to_rewrap") else text
