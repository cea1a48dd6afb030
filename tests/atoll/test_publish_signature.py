"""`atoll publish MODEL --signature BUNDLE`, against a coordinator that counts what it is sent."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from atoll.operate import publish_model
from atoll.settings import Broker, ConfigurationError, DataFolder, Endpoints
from model_delta.digest import digest_of
from tests.fl_coordinator.test_provenance import Signer

RELEASE = {"model": "fraud", "version": "eu-west:1", "release": 1, "manifest": "a" * 64, "bytes_whole": 9}


class Coordinator:
    """Takes artifacts and models; `sent` has (method, path, body)."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str, bytes]] = []
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.take({**RELEASE, "bytes_patch": {}})

            def do_PUT(self) -> None:
                self.take({})

            def do_GET(self) -> None:
                self.answer({})

            def take(self, body: dict[str, object]) -> None:
                owner.sent.append((self.command, self.path, self.rfile.read(int(self.headers["Content-Length"]))))
                self.answer(body)

            def answer(self, body: dict[str, object]) -> None:
                data = json.dumps(body).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                return

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    made = Coordinator()
    serving = threading.Thread(target=made.http.serve_forever, args=(0.02,))
    serving.start()
    url = f"http://127.0.0.1:{made.http.server_address[1]}"
    data = DataFolder.open(tmp_path / "data", create=True)
    data.write_endpoints(Endpoints(coordinator=url, broker=Broker("127.0.0.1", 1, "embedded"), gateways={}))
    yield made
    made.http.shutdown()
    made.http.server_close()
    serving.join()


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
