"""`atoll publish MODEL --signature BUNDLE`, against a coordinator that counts what it is sent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from atoll.operate import publish_model
from atoll.settings import ConfigurationError
from model_delta.digest import digest_of
from tests.fakes.control_api import answering
from tests.fl_coordinator.test_provenance import Signer

RELEASE = {"model": "fraud", "version": "eu-west:1", "release": 1, "manifest": "a" * 64, "bytes_whole": 9}


class Coordinator:
    """Takes artifacts and models; `sent` has (method, path, body)."""

    def __init__(self) -> None:
        self.url = ""
        self.sent: list[tuple[str, str, bytes]] = []

    def answer(self, method: str, path: str, body: bytes) -> dict[str, object]:
        if method == "GET":
            return {}
        self.sent.append((method, path, body))
        return {**RELEASE, "bytes_patch": {}} if method == "POST" else {}


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    made = Coordinator()
    with answering(made, tmp_path / "data"):
        yield made


def publish(folder: Path, signer: Signer, signature: Path | None = None, key: Path | None = None) -> None:
    publish_model(
        folder / "data",
        signer.model,
        "fraud",
        "",
        None,
        "",
        signature=signature,
        signer_key=key,
        contact_s=1,
        as_json=True,
    )


def test_a_signed_model_is_sent_with_its_bundle(
    tmp_path: Path, coordinator: Coordinator, capsys: pytest.CaptureFixture[str]
) -> None:
    signer = Signer(tmp_path)
    publish(tmp_path, signer, signer.bundle, signer.public)
    (put, put_path, bundle), (post, post_path, model) = coordinator.sent
    assert (put, put_path) == ("PUT", f"/v1/store/artifact/{digest_of(bundle)}")
    assert bundle == signer.bundle.read_bytes()
    assert (post, model) == ("POST", signer.model.read_bytes())
    assert f"provenance={digest_of(bundle)}" in post_path
    assert json.loads(capsys.readouterr().out)["release"] == 1


def test_a_model_that_was_changed_after_signing_is_not_sent(tmp_path: Path, coordinator: Coordinator) -> None:
    signer = Signer(tmp_path)
    signer.model.write_bytes(b"something else")
    with pytest.raises(ConfigurationError, match=r"does not vouch for .*; nothing was published"):
        publish(tmp_path, signer, signer.bundle, signer.public)
    assert coordinator.sent == []


def test_a_signature_needs_a_signer_and_a_signer_a_signature(tmp_path: Path, coordinator: Coordinator) -> None:
    signer = Signer(tmp_path)
    with pytest.raises(ConfigurationError, match="expected the signer's --signer-key"):
        publish(tmp_path, signer, signer.bundle)
    with pytest.raises(ConfigurationError, match="expected --signature BUNDLE too"):
        publish(tmp_path, signer, None, signer.public)
    assert coordinator.sent == []
