"""Tensors from a file of the user's own: read in every form, and refused in one line that names what is wrong."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atoll.tensor_rows import listed, made_up_like_golden, read_rows, shown_short, tensors_of
from model_delta.errors import Malformed
from model_delta.manifest import GoldenCase, Manifest, Tensor, TensorSpec
from model_delta.signature import require_tensors

PIXELS = (TensorSpec("pixels", "float32", (-1, 2)),)
EVERY = (
    TensorSpec("tokens", "int64", (-1, -1)),
    TensorSpec("small", "uint8", (2,)),
    TensorSpec("half", "float16", ()),
    TensorSpec("on", "bool", (-1,)),
)
ONE = {"tokens": [[1, 2, 3]], "small": [0, 255], "half": 0.5, "on": [True, False]}


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        (json.dumps(ONE), 1),
        (json.dumps(ONE, indent=2), 1),
        (json.dumps([ONE, ONE]), 2),
        ("\n".join([json.dumps(ONE), "", json.dumps(ONE), json.dumps(ONE)]), 3),
    ],
    ids=["one", "indented", "list", "lines"],
)
def test_plain_lists_get_the_dtypes_of_the_signature(tmp_path: Path, text: str, rows: int) -> None:
    read = read_rows(written(tmp_path / "rows.json", text))
    assert len(read) == rows
    for row in read:
        found = tensors_of(row, EVERY, "rows.json")
        assert {name: value.dtype.name for name, value in found.items()} == {one.name: one.dtype for one in EVERY}
        assert {name: value.tolist() for name, value in found.items()} == ONE


def test_the_open_inference_protocol_brings_its_own_dtypes(tmp_path: Path) -> None:
    inputs = [{"name": "pixels", "shape": [1, 2], "datatype": "FP32", "data": [0.5, 1.0]}]
    (row,) = read_rows(written(tmp_path / "one.json", json.dumps({"inputs": inputs})))
    np.testing.assert_array_equal(tensors_of(row, PIXELS, "x")["pixels"], np.array([[0.5, 1.0]], np.float32))
    inputs[0]["datatype"] = "FP64"
    (row,) = read_rows(written(tmp_path / "two.json", json.dumps({"inputs": inputs})))
    with pytest.raises(Malformed, match=r"two: input 'pixels': expected float32\[\?, 2\], found dtype float64"):
        tensors_of(row, PIXELS, "two")


def test_arrays_of_a_numpy_archive_are_one_row(tmp_path: Path) -> None:
    path = tmp_path / "one.npz"
    np.savez(path, pixels=np.ones((3, 2), np.float32))
    (row,) = read_rows(path)
    assert tensors_of(row, PIXELS, "x")["pixels"].shape == (3, 2)


def test_an_input_may_be_called_inputs(tmp_path: Path) -> None:
    (row,) = read_rows(written(tmp_path / "one.json", '{"inputs": [[1, 2]]}'))
    assert tensors_of(row, (TensorSpec("inputs", "float32", (-1, 2)),), "x")["inputs"].tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "expected JSON or .npz, found"),
        ("pixels: [1]", "expected JSON or .npz, found"),
        ("[]", "expected at least one object, found an empty list"),
        ("{}", "expected an object of tensors by name, found an empty object"),
        ("[[1, 2]]", "bad.json, item 1: expected an object of tensors by name, found a list"),
        ('{"pixels": [[1, 2]]}\n{"pixels": [[1,', "bad.json, line 2: expected one JSON object a line"),
        ('{"inputs": [{"name": "pixels", "shape": [1, 2], "datatype": "FP32", "data": [1]}]}', "expected 2 values"),
        (b"PK\x03\x04" + bytes(40), "expected arrays of numbers as numpy.savez writes them, found: File is not a zip"),
        ("[" * 100_000, "expected JSON or .npz, found"),
    ],
)
def test_what_is_no_such_file_is_refused_in_one_line(tmp_path: Path, text: str | bytes, says: str) -> None:
    with pytest.raises(Malformed) as refused:
        read_rows(written(tmp_path / "bad.json", text))
    assert says in str(refused.value)
    assert str(refused.value).startswith(str(tmp_path / "bad.json"))
    assert "\n" not in str(refused.value)


def test_objects_in_a_numpy_archive_are_not_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", pixels=np.array([{}], dtype=object))
    with pytest.raises(Malformed, match="expected arrays of numbers"):
        read_rows(tmp_path / "bad.npz")


def test_a_damaged_numpy_archive_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    np.savez_compressed(path, pixels=np.zeros(500))
    whole = path.read_bytes()
    packed = 30 + int.from_bytes(whole[26:28], "little") + int.from_bytes(whole[28:30], "little")  # behind the header
    encrypted = whole.index(b"PK\x01\x02") + 8
    for place in (packed, encrypted):
        path.write_bytes(whole[:place] + b"\xff" * 2 + whole[place + 2 :])
        with pytest.raises(Malformed, match=r"bad\.npz: expected arrays of numbers as numpy\.savez writes them, found"):
            read_rows(path)
    with zipfile.ZipFile(path, "w") as archive:
        header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (10000000000000,)}".ljust(117) + b"\n"
        archive.writestr("pixels.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(Malformed, match="found: Unable to allocate"):
        read_rows(path)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"tokens": [[1.5]]}, r"input 'tokens': expected int64\[\?, \?\], found no whole numbers"),
        ({"tokens": [["a"]]}, "found no whole numbers"),
        ({"tokens": [[2**63]]}, "found numbers that are out of its range"),
        ({"tokens": [[1], [1, 2]]}, "found lists of uneven lengths"),
        ({"tokens": [1]}, r"expected int64\[\?, \?\], found shape \[1\]"),
        ({"small": [0, 256]}, "input 'small': expected uint8.2., found numbers that are out of its range"),
        ({"half": 1e6}, "input 'half': expected float16.., found numbers that are out of its range"),
        ({"on": [0, 1]}, "input 'on': expected bool.*, found no booleans"),
        ({"more": [0, 1]}, "expected the inputs 'half', 'on', 'small', 'tokens', found 'half', 'more', 'on'"),
    ],
)
def test_tensors_that_lose_something_or_do_not_fit_are_refused(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(Malformed, match=says):
        tensors_of({**ONE, **changed}, EVERY, "rows.json")


def manifest(*golden: GoldenCase) -> Manifest:
    return Manifest(
        tenant="t",
        model="digits",
        version={"core": 1},
        release=1,
        size=0,
        file_digest="",
        segments=(),
        merkle_root="",
        inputs=EVERY,
        outputs=(),
        golden=golden,
        created=0,
        expires=1,
    )


def test_made_up_tensors_have_the_sizes_that_the_version_is_known_to_answer() -> None:
    sizes = {"tokens": (1, 7), "small": (2,), "half": (), "on": (5,)}
    zeros = {spec.name: np.zeros(sizes[spec.name], spec.dtype) for spec in EVERY}
    case = GoldenCase(
        {name: Tensor(value.dtype.name, value.shape, value.tobytes()) for name, value in zeros.items()}, {}
    )
    made = [made_up_like_golden(manifest(case), np.random.default_rng(seed)) for seed in (1, 1, 2)]
    require_tensors(made[0], EVERY, "x")
    assert {name: value.shape for name, value in made[0].items()} == sizes
    assert all(np.array_equal(made[0][name], made[1][name]) for name in sizes)
    assert [name for name in sizes if not np.array_equal(made[0][name], made[2][name])] == ["half"]
    assert not made[2]["tokens"].any(), "an index stays what it was"
    with pytest.raises(Malformed, match=r"model digits: its inputs cannot be made up.*pass --inputs FILE"):
        made_up_like_golden(manifest(), np.random.default_rng(1))


def test_outputs_are_shown_short_and_told_whole() -> None:
    outputs = {"label": np.array([3]), "p": np.array([[0.25, np.nan, np.inf, 1, 2]], np.float32), "ok": np.array(True)}
    assert shown_short(outputs) == "label int64[1]: 3; p float32[1, 5]: 0.25 nan inf 1 ...; ok bool[]: True"
    assert json.loads(json.dumps(listed(outputs), allow_nan=False)) == {
        "label": [3],
        "p": [[0.25, None, None, 1.0, 2.0]],
        "ok": True,
    }
