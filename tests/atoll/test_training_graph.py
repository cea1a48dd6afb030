"""`atoll model training-graph` as a person runs it: with torch it makes a graph, without it says what to do."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from atoll import cli
from model_delta.digest import digest_of
from model_delta.graphs.training import step_of
from model_delta.segments import stored_tensors

Run = Callable[..., tuple[int, str, str]]
PRESENT = importlib.util.find_spec("torch") is not None

MODEL = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    return module, lambda logits, labels: nn.functional.binary_cross_entropy_with_logits(logits[:, 0], labels)
"""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["atoll", "model", "training-graph", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("", "model.py", "expected FILE.py:FUNCTION, such as model.py:make"),
        ("", "model.txt:make", "expected FILE.py:FUNCTION, such as model.py:make"),
        ("", "absent.py:make", "cannot read: no such file"),
        ("x = 1", "model.py:make", "expected a function 'make', found none"),
        ("def make(:", "model.py:make", "make() failed: SyntaxError: "),
        ("def make():\n    raise KeyError('weights')", "model.py:make", "make() failed: KeyError: 'weights'"),
        (
            "import nothing_of_this_name",
            "model.py:make",
            "nothing_of_this_name is not installed: install what the file",
        ),
        ("def make():\n    return 1", "model.py:make", "expected make() to give a model and its loss, found int"),
        ("def make():\n    return 1, print", "model.py:make", "expected a torch.nn.Module or a dict of arrays"),
    ],
)
def test_what_is_no_model_ends_in_one_line(run: Run, tmp_path: Path, text: str, place: str, words: str) -> None:
    (tmp_path / "model.py").write_text(text)
    code, out, err = run(tmp_path / place, tmp_path / "step.onnx")
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1
    assert not (tmp_path / "step.onnx").exists()


@pytest.mark.skipif(PRESENT, reason="torch is installed")
def test_without_torch_the_extra_is_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    code, _, err = run(f"{tmp_path / 'model.py'}:make", tmp_path / "step.onnx")
    assert code == 2
    assert "torch is not installed: pip install 'atoll[train]'" in err


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not PRESENT, reason="torch is not installed (the extra atoll[train])")
def test_a_torch_model_becomes_a_graph(run: Run, tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    out = tmp_path / "step.onnx"
    code, text, _ = run(f"{tmp_path / 'model.py'}:make", out, "--features", 4, "--json")
    told = json.loads(text)
    assert code == 0
    assert told["distance"] <= 1e-6
    assert told["digest"] == digest_of(out.read_bytes())
    assert [one["tensor"] for one in told["tensors"]] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert step_of(out.read_bytes(), "step").length == told["parameters"] == 4 * 8 + 8 + 8 + 1


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not PRESENT, reason="torch is not installed (the extra atoll[train])")
def test_the_documented_model_trains_the_tensors_that_it_is_published_with(run: Run, tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    (tmp_path / "model.py").write_text(text.split("```python\n# model.py", 1)[1].partition("```")[0].partition("\n")[2])
    subprocess.run([sys.executable, "model.py"], cwd=tmp_path, check=True, capture_output=True)
    code, told, _ = run(f"{tmp_path / 'model.py'}:make", tmp_path / "step.onnx", "--features", 30, "--json")
    assert code == 0
    published = {tensor.name: tensor for tensor in stored_tensors((tmp_path / "own.onnx").read_bytes())}
    for one in json.loads(told)["tensors"]:
        assert published[one["tensor"]].shape == tuple(one["shape"])
