"""The example model is one that the platform takes, and it has learned something."""

from pathlib import Path

from atoll.examples.fraud_model import make_model
from device_sim.terminal_features import FEATURES
from model_delta.graphs.inspection import inspect, require_features


def test_the_example_model_fits_the_features_and_beats_chance(tmp_path: Path) -> None:
    precision = make_model(tmp_path / "model.onnx", days=9, steps=80)
    require_features(inspect((tmp_path / "model.onnx").read_bytes(), "example"), len(FEATURES), "example")
    assert precision > 0.2  # about 2 % of the payments are fraud
