"""The example model is one that the platform takes, and it has learned something."""

import sys
from pathlib import Path

import numpy as np
import pytest

from atoll.examples import fraud_model
from atoll.examples.fraud_model import make_model, make_model_of_rows
from device_sim.payments_csv import CSV_FEATURE_SET, CSV_FEATURES, LabelledRows
from device_sim.terminal_features import FEATURES
from model_delta.errors import Malformed
from model_delta.graphs.inspection import inspect, require_features


def test_the_example_model_fits_the_features_and_beats_chance(tmp_path: Path) -> None:
    made = make_model(tmp_path / "model.onnx", days=9, steps=80)
    require_features(inspect((tmp_path / "model.onnx").read_bytes(), "example"), len(FEATURES), "example")
    assert made.average_precision > 0.2  # about 2 % of the payments are fraud


def rows(fraud_share: float) -> LabelledRows:
    rng = np.random.default_rng(3)
    fraud = rng.random(2_000) < fraud_share
    features = rng.standard_normal((2_000, len(CSV_FEATURES))).astype(np.float32)
    features[:, CSV_FEATURES.index("amount")] = np.linspace(0, 400, 2_000)
    features[fraud, :5] += 2.0
    return LabelledRows(CSV_FEATURES, CSV_FEATURE_SET, features, fraud, np.arange(2_000))


def test_a_model_of_ones_own_rows_learns_from_the_first_and_is_measured_on_later_ones(tmp_path: Path) -> None:
    made = make_model_of_rows(tmp_path / "m.onnx", rows(0.05), held_out=tmp_path / "held.npz", steps_max=60)
    require_features(inspect((tmp_path / "m.onnx").read_bytes(), "own"), len(CSV_FEATURES), "own")
    assert made.average_precision > 0.5
    with np.load(tmp_path / "held.npz") as held:
        assert held["features"].shape == (300, 30)
        assert held["fraud"].any()
        assert set(held["slice"]) == {"amount 200 and more"}, "from 70 % of the rows to 85 %"


def test_rows_with_too_little_fraud_make_nothing(tmp_path: Path) -> None:
    with pytest.raises(Malformed, match="no fraud in the first 40 %"):
        make_model_of_rows(tmp_path / "m.onnx", rows(0.0))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_not_there_ends_the_example_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(tmp_path / "m.onnx"), "--payments", str(tmp_path / "none.csv")]
    monkeypatch.setattr(sys, "argv", ["fraud_model", *words])
    with pytest.raises(SystemExit) as ended:
        fraud_model.main()
    said = capsys.readouterr().err
    assert (ended.value.code, said.count("\n"), "none.csv: cannot be read" in said) == (2, 1, True)
