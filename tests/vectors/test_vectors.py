"""Old formats stay readable, and what was refused once stays refused, for the same reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from model_delta import errors
from model_delta.encoding import unpack
from model_delta.manifest import Delivery, manifest_digest
from model_delta.trust.signing import verify
from model_delta.trust.updater import read_manifest, role_keys
from tests.vectors.reading import FOLDER, NOW, anchors, bytes_of, keyring, read

CASES: list[dict[str, Any]] = json.loads(bytes_of("cases.json"))
GOOD = [case for case in CASES if "error" not in case]
BAD = [case for case in CASES if "error" in case]
KEYS = {"anchors.cbor", "keyring.cbor"}


@pytest.fixture(scope="module")
def ca_pem(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return keyring(tmp_path_factory.mktemp("keyring")).ca_pem()


@pytest.mark.parametrize("case", GOOD, ids=lambda case: case["file"])
def test_what_was_written_is_still_read(case: dict[str, Any], ca_pem: bytes) -> None:
    expected = next(one for one in GOOD if one["file"] == case.get("same_as", case["file"]))["expect"]
    found = read(case["kind"], case["file"], case.get("now", NOW), ca_pem)
    assert _as_told(found, expected) == expected


def _as_told(found: Any, expected: Any) -> Any:
    """What was found, without the fields that came to records after the file was written."""
    if isinstance(found, dict) and isinstance(expected, dict):
        return {key: _as_told(value, expected[key]) for key, value in found.items() if key in expected}
    if isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        return [_as_told(one, other) for one, other in zip(found, expected, strict=True)]
    return found


@pytest.mark.parametrize("case", BAD, ids=lambda case: f"{case['file']}-{case['error']}")
def test_what_is_wrong_is_refused_by_name(case: dict[str, Any], ca_pem: bytes) -> None:
    with pytest.raises(errors.AtollError) as caught:
        read(case["kind"], case["file"], case.get("now", NOW), ca_pem)
    assert type(caught.value).__name__ == case["error"]
    assert case["says"] in str(caught.value)


def test_every_frozen_file_is_a_case() -> None:
    frozen = {path.name for path in FOLDER.iterdir() if path.suffix in (".cbor", ".bin", ".frames", ".patch")}
    assert frozen - KEYS == {case["file"] for case in CASES}


def test_a_version_keeps_its_identity() -> None:
    named = unpack(bytes_of("delivery.cbor"), Delivery).manifest
    assert manifest_digest(read_manifest(bytes_of("manifest.cbor"), named, anchors().tenant, NOW)) == named


def test_a_keyring_file_still_opens_and_signs_for_the_same_anchors(tmp_path: Path) -> None:
    opened = keyring(tmp_path)
    assert opened.anchors() == anchors()
    keys, threshold = role_keys(anchors(), "plan")
    assert verify(opened.sign("plan", "plan", b"p"), "plan", keys, threshold) == b"p"
