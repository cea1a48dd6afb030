"""Candidates are measured on the held-out payments of their own model."""

from pathlib import Path

import numpy as np
import pytest

from atoll.held_out import ANY_MODEL, evaluation_in, write_rows
from model_delta.digest import digest_of
from model_delta.errors import Malformed
from model_delta.manifest import Manifest, TensorSpec
from tests.model_delta.models import layers, model


def version(features: int, name: str = "fraud") -> tuple[Manifest, bytes]:
    file = model(layers(3, (features, 4, 1)))
    manifest = Manifest(
        tenant="acme",
        model=name,
        version={"core": 1},
        release=1,
        size=len(file),
        file_digest=digest_of(file),
        segments=(),
        merkle_root="",
        inputs=(TensorSpec("features", "float32", (-1, features)),),
        outputs=(TensorSpec("score", "float32", (-1,)),),
        created=0,
        expires=1,
    )
    return manifest, file


def write(path: Path, features: int, frauds: int) -> None:
    rng = np.random.default_rng(1)
    fraud = np.arange(60) < frauds
    write_rows(path, rng.standard_normal((60, features)).astype(np.float32), fraud, np.array(["a", "b"] * 30))


def test_without_a_file_only_size_and_latency_are_measured_whatever_the_model_takes(tmp_path: Path) -> None:
    for features in (26, 30):
        manifest, file = version(features)
        found = evaluation_in(tmp_path)(manifest, file)
        assert (found.average_precision, found.slices, found.size_bytes) == (0.0, {}, len(file))
        assert found.latency_p95_us > 0


def test_each_model_has_its_own_payments_or_those_that_fit_it(tmp_path: Path) -> None:
    write(tmp_path / ANY_MODEL, 26, frauds=20)
    evaluate = evaluation_in(tmp_path)
    assert evaluate(*version(26)).slice_frauds == {"a": 10, "b": 10}
    assert evaluate(*version(30, "fraud-csv")).slices == {}, "these rows are another model's"
    write(tmp_path / "held_out-fraud-csv.npz", 30, frauds=8)
    assert evaluate(*version(30, "fraud-csv")).slice_frauds == {"a": 4, "b": 4}
    assert 0 < evaluate(*version(26)).average_precision <= 1


def test_a_file_that_does_not_fit_or_is_none_is_named(tmp_path: Path) -> None:
    evaluate = evaluation_in(tmp_path)
    write(tmp_path / "held_out-fraud.npz", 30, frauds=8)
    with pytest.raises(Malformed, match=r"held_out-fraud\.npz: expected 26 features a row.*found 30; write it anew"):
        evaluate(*version(26))
    np.savez(tmp_path / "held_out-fraud.npz", features=np.zeros((3, 26), np.float32))
    with pytest.raises(Malformed, match=r"held_out-fraud\.npz: expected finite features"):
        evaluate(*version(26))
    (tmp_path / "held_out-fraud.npz").write_bytes(b"not a file of arrays")
    with pytest.raises(Malformed, match=r"held_out-fraud\.npz: expected finite features"):
        evaluate(*version(26))
    np.savez_compressed(tmp_path / "held_out-fraud.npz", features=np.zeros((60, 26)))
    whole = (tmp_path / "held_out-fraud.npz").read_bytes()
    encrypted = whole.index(b"PK\x01\x02") + 8
    (tmp_path / "held_out-fraud.npz").write_bytes(whole[:encrypted] + b"\xff" + whole[encrypted + 1 :])
    with pytest.raises(Malformed, match=r"held_out-fraud\.npz: expected finite features"):
        evaluate(*version(26))
