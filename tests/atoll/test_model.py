"""`atoll model quantize` as a person runs it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from atoll import cli
from model_delta.graphs.int8 import form_of
from model_delta.graphs.mlp import mlp_model

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["atoll", "model", "quantize", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return call


def write_model(path: Path, nudge: float = 0.0) -> Path:
    rng, sizes = np.random.default_rng(1), (32, 256, 128, 1)
    weights = [
        (rng.normal(0, 1 / np.sqrt(rows), (rows, columns)).astype(np.float32), np.zeros(columns, np.float32))
        for rows, columns in pairwise(sizes)
    ]
    step = np.random.default_rng(2)
    moved = [((weight + nudge * step.normal(size=weight.shape)).astype(np.float32), bias) for weight, bias in weights]
    path.write_bytes(mlp_model(moved, np.zeros(32, np.float32), np.ones(32, np.float32)))
    return path


def test_a_version_follows_its_parent_and_says_what_moved(run: Run, tmp_path: Path) -> None:
    old, new = write_model(tmp_path / "old.onnx"), write_model(tmp_path / "new.onnx", 1e-4)
    parent, out = tmp_path / "parent.onnx", tmp_path / "out.onnx"
    code, text, _ = run(old, parent, "--json")
    first = json.loads(text)
    assert code == 0
    assert (first["tensors"], first["integers_moved"], first["carried"]) == (3, None, None)
    assert first["bytes"] == parent.stat().st_size < first["float32_bytes"] / 3
    code, text, _ = run(new, out, "--parent", parent, "--parent-fp32", old, "--json")
    second = json.loads(text)
    assert code == 0
    assert 0 < second["integers_moved"] < 0.1
    assert second["scales_not_the_parents"] == 0
    assert second["carried"] == pytest.approx(1, abs=0.15)
    assert second["distance"] - second["distance_fresh"] < 0.005
    assert isinstance(second["int8_here"], bool)
    code, text, _ = run(new, out, "--parent", parent, "--parent-fp32", old)
    assert "carried share of the update: " in text
    assert "0 of 385 scales are new" in text


def test_a_version_that_would_not_answer_alike_is_not_written(run: Run, tmp_path: Path) -> None:
    """A parent whose scales are far too coarse: locked to them, nearly every integer is zero."""
    new = write_model(tmp_path / "new.onnx")
    parent, out = tmp_path / "parent.onnx", tmp_path / "out.onnx"
    run(new, parent)
    proto = onnx.ModelProto.FromString(parent.read_bytes())
    for tensor in proto.graph.initializer:
        if tensor.name.endswith("_scale"):
            coarse = numpy_helper.to_array(tensor) * np.float32(60)
            tensor.CopyFrom(numpy_helper.from_array(coarse, tensor.name))
    parent.write_bytes(proto.SerializeToString())
    out.write_bytes(b"before")
    code, text, error = run(new, out, "--parent", parent)
    assert (code, text) == (2, "")
    assert error.startswith(f"atoll: {out}: not written; outputs: expected 1 - cosine to float32 within 0.005")
    assert error.count("\n") == 1
    assert out.read_bytes() == b"before"


def test_what_cannot_be_quantized_is_said_in_one_line(run: Run, tmp_path: Path) -> None:
    model, parent, out = write_model(tmp_path / "m.onnx"), tmp_path / "parent.onnx", tmp_path / "out.onnx"
    text = tmp_path / "text.onnx"
    text.write_text("hello")
    run(model, parent, "--form", "dynamic", "--per-tensor")
    for words, expected in (
        ((tmp_path / "none.onnx", out), "cannot read: No such file"),
        ((text, out), "expected an ONNX model, found plain text"),
        ((parent, out), "found none that could be int8"),
        ((model, out, "--form", "int4"), "--form: expected weights, dynamic or static, found 'int4'"),
        ((model, out, "--parent-fp32", model), "expected --parent with it"),
        ((model, out, "--parent", model), "expected a file that `atoll model quantize` made"),
        ((model, out, "--parent", parent, "--form", "weights"), "found dynamic with one scale a tensor"),
    ):
        code, printed, error = run(*words)
        assert (code, printed) == (2, ""), words
        assert expected in error
        assert error.count("\n") == 1
        assert not out.exists()
    code, printed, _ = run(model, out, "--parent", parent, "--json")
    assert json.loads(printed)["scales"] == 3


def test_fixed_activation_scales_from_rows_or_made_up_ones(run: Run, tmp_path: Path) -> None:
    old, new = write_model(tmp_path / "old.onnx"), write_model(tmp_path / "new.onnx", 1e-4)
    rows, parent, out = tmp_path / "rows.npz", tmp_path / "parent.onnx", tmp_path / "out.onnx"
    np.savez(rows, features=np.random.default_rng(3).normal(size=(64, 32)))
    code, text, _ = run(old, parent, "--form", "static", "--calibration", rows, "--json")
    assert code == 0
    assert json.loads(text)["distance"] < 0.01
    code, text, _ = run(new, out, "--parent", parent, "--parent-fp32", old, "--calibration", rows, "--json")
    second = json.loads(text)
    assert (code, second["scales_not_the_parents"]) == (0, 0)
    assert second["distance"] - second["distance_fresh"] < 0.005
    assert form_of(out.read_bytes()) == ("static", True)
    made_up = tmp_path / "made_up.onnx"
    assert run(old, made_up, "--form", "static", "--seed", 1)[0] == 0
    again = tmp_path / "again.onnx"
    assert run(old, again, "--form", "static", "--seed", 1)[0] == 0
    assert made_up.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("wrong", ["absent", "text", "names", "nan", "form"])
def test_calibration_rows_that_do_not_fit_are_told_in_one_line(run: Run, tmp_path: Path, wrong: str) -> None:
    model, rows, out = write_model(tmp_path / "m.onnx"), tmp_path / "rows.npz", tmp_path / "out.onnx"
    values = np.ones((4, 32), np.float32)
    if wrong == "text":
        rows.write_text("1,2,3")
    elif wrong != "absent":
        values[1, 1] = np.nan if wrong == "nan" else 1
        np.savez(rows, **{"other" if wrong == "names" else "features": values})
    form = "dynamic" if wrong == "form" else "static"
    code, text, error = run(model, out, "--form", form, "--calibration", rows)
    assert (code, text, error.count("\n")) == (2, "", 1)
    assert error.startswith("atoll: --calibration")
    assert not out.exists()
