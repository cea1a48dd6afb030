"""The device's keys on disk, and the ONNX runtime: shared, lean, silent."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_runtime.identity import Identity
from edge_runtime.onnx_model import open_model, run_graph
from model_delta.errors import Malformed, NotFound
from model_delta.keys.certificates import device_keys_of
from model_delta.keys.encryption import open_sealed, seal_to
from model_delta.keys.keyring import EmbeddedKeyring
from model_delta.manifest import TensorSpec
from tests.edge_runtime.world import NOW, World
from tests.systems import on_linux


def test_an_identity_is_created_once_enrolled_and_read_again(tmp_path: Path) -> None:
    folder = tmp_path / "identity"
    identity = Identity.create(folder, "pos-0001")
    assert Identity.create(folder, "pos-0001").sealing_public == identity.sealing_public
    assert not identity.is_enrolled
    with pytest.raises(NotFound, match="identity pos-0001: expected a certificate"):
        _ = identity.certificate_pem
    keyring = EmbeddedKeyring.create(tmp_path / "keys", "acme", clock=lambda: NOW)
    certificate = keyring.issue_certificate(identity.request_pem(), "pos-0001", identity.sealing_public)
    identity.enrolled(certificate, keyring.ca_pem())
    keys = device_keys_of(certificate, keyring.ca_pem(), NOW, frozenset())
    assert (keys.common_name, keys.sealing) == ("pos-0001", identity.sealing_public)
    assert open_sealed(identity.sealing, seal_to(keys.sealing, b"secret", b"info"), b"info") == b"secret"
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert modes["key.pem"] == modes["sealing.key"] == 0o600
    assert identity.tls().certificate.read_bytes() == certificate


def test_missing_and_broken_keys_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"identity pos-0009: .*create and enrol it first"):
        Identity.load(tmp_path / "nowhere", "pos-0009")
    Identity.create(tmp_path / "identity", "pos-0001")
    (tmp_path / "identity" / "key.pem").write_bytes(b"-----BEGIN PRIVATE KEY-----\n-----END PRIVATE KEY-----\n")
    with pytest.raises(Malformed, match="expected a P-256 and an X25519 private key"):
        Identity.load(tmp_path / "identity", "pos-0001")
    with pytest.raises(Malformed, match="identity: expected 1 to 64 letters"):
        Identity.create(tmp_path / "other", "../root")


def test_devices_of_a_process_share_one_session_and_let_it_go(tmp_path: Path) -> None:
    world = World(tmp_path)
    release = world.publish(world.model(seed=1))
    file = world.files[release.digest]
    first, second = open_model(release.manifest, file), open_model(release.manifest, file)
    assert first is second
    assert first.digest == release.digest
    outputs = first.run({"features": np.zeros((3, 4), np.float32)})
    assert outputs["score"].shape == (3, 1)
    watched = weakref.ref(first)
    del first, second
    gc.collect()
    assert watched() is None


def test_a_model_that_is_none_or_does_not_fit_is_named_in_one_line(tmp_path: Path) -> None:
    world = World(tmp_path)
    release = world.publish(world.model(seed=1))
    file = world.files[release.digest]
    inputs = (TensorSpec("pixels", "float32", (-1, 4)),)
    with pytest.raises(Malformed, match=r"graph .*: onnxruntime cannot open it") as caught:
        run_graph(b"no model", {})
    assert "\n" not in str(caught.value)
    with pytest.raises(Malformed, match=r"expected inputs \['pixels'\], found \['features'\]"):
        open_model(msgspec.structs.replace(release.manifest, inputs=inputs), file)
    with pytest.raises(Malformed, match=f"model {release.digest[:12]}"):
        open_model(release.manifest, file).run({"features": np.zeros((1, 9), np.float32)})


@pytest.mark.slow
@on_linux
def test_importing_the_device_loads_no_heavy_library_and_running_a_model_writes_nothing(tmp_path: Path) -> None:
    world = World(tmp_path)
    graph = tmp_path / "model.onnx"
    graph.write_bytes(world.model(seed=1))
    home = tmp_path / "home"
    home.mkdir()
    script = (
        "import sys, pathlib\n"
        "import edge_runtime.device, edge_runtime.onnx_model\n"
        "print(sorted({'onnxruntime', 'onnx', 'flwr', 'fastapi'} & set(sys.modules)))\n"
        "import numpy as np\n"
        "data = pathlib.Path(sys.argv[1]).read_bytes()\n"
        "edge_runtime.onnx_model.run_graph(data, {'features': np.zeros((1, 4), np.float32)})\n"
        "print(len(list(pathlib.Path('/proc/self/task').iterdir())))\n"
    )
    environment = {**os.environ, "HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache"), "OMP_NUM_THREADS": "1"}
    environment["OPENBLAS_NUM_THREADS"] = "1"
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    found = subprocess.run(
        [sys.executable, "-c", script, str(graph)], capture_output=True, text=True, timeout=60, env=environment
    )
    assert found.returncode == 0, found.stderr
    modules, threads = found.stdout.split("\n")[:2]
    assert modules == "[]"
    assert int(threads) == 1, "no telemetry thread, no thread pool"
    assert list(home.rglob("*")) == []
