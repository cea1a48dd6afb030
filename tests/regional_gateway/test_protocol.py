"""The tensor codec and its refusals."""

from __future__ import annotations

import contextlib
import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from model_delta.errors import AtollError, Malformed
from model_delta.manifest import TensorSpec
from regional_gateway.protocol import (
    Inference,
    datatype_of,
    encode_infer,
    parse_infer,
    parse_predict,
    require_inputs,
)

SPECS = (TensorSpec("features", "float32", (-1, 2)),)


def request(data: Any, shape: list[int], datatype: str = "FP32", **fields: Any) -> bytes:
    tensor = {"name": "features", "shape": shape, "datatype": datatype, "data": data}
    return json.dumps({"inputs": [tensor], **fields}).encode()


def binary(raw: bytes, shape: list[int], datatype: str = "FP32", size: Any = None) -> tuple[bytes, int]:
    tensor = {
        "name": "features",
        "shape": shape,
        "datatype": datatype,
        "parameters": {"binary_data_size": len(raw) if size is None else size},
    }
    header = json.dumps({"inputs": [tensor]}).encode()
    return header + raw, len(header)


@pytest.mark.parametrize("data", [[1, 2, 3, 4], [[1, 2], [3, 4]]])
def test_data_may_be_flat_or_nested(data: Any) -> None:
    array = parse_infer(request(data, [2, 2])).inputs["features"]
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, [[1, 2], [3, 4]])


def test_white_space_between_brackets_is_legal() -> None:
    body = b'{"inputs":[{"name":"features","shape":[1,2],"datatype":"FP32","data": [ \n [ 1 , 2 ] ] }]}'
    np.testing.assert_array_equal(parse_infer(body).inputs["features"], [[1, 2]])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "expected JSON like"),
        (b"[]", "expected JSON like"),
        (b'{"inputs": []}', "expected 1 to 64 inputs"),
        (request([1, 2, 3], [1, 2]), r"expected 2 values in shape \[1, 2\], found 3"),
        (request([[1], [2]], [1, 2]), r"found 2 in shape \[2, 1\]"),
        (request([[1, 2], [3]], [2, 2]), "even nesting"),
        (request([[[1, 2]]], [1, 2]), "flat or nested 2 deep, found 3 deep"),
        (request(["1", "2"], [1, 2]), "FP32 data"),
        (request([True, False], [1, 2]), "FP32 data"),
        (request([None, 1], [1, 2]), "FP32 data"),
        (request(None, [1, 2]), "flat or nested"),
        (request("12", [1, 2]), "flat or nested"),
        (request([1, 2], [1, -2]), "dimensions of at least 0"),
        (request([1, 2], []), "1 to 8 dimensions"),
        (request([1, 2], [1] * 9), "1 to 8 dimensions"),
        (request([1, 2], [10**30]), "expected"),
        (request([1, 2], [1, 2], "FLOAT"), "expected a datatype of BOOL"),
        (request([1, 300], [1, 2], "UINT8"), "UINT8 data"),
        (request([1, 2], [1, 2], "FP16"), "no JSON form"),
        (request([1, float("nan")], [1, 2]), "expected JSON like"),
        (b'{"inputs":[{"name":"features","shape":[1],"datatype":"FP32","data":[1e999]}]}', "FP32 data|JSON like"),
        (b'{"inputs":[{"name":"features","shape":[1],"datatype":"FP32"}]}', "binary_data_size, found none"),
        (b'{"inputs":[{"name":"f","shape":[1],"datatype":"FP32","data":' + b"[" * 100_000, "expected"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_short_line(body: bytes, message: str) -> None:
    with pytest.raises(Malformed, match=message) as caught:
        parse_infer(body)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("body", "length", "message"),
    [
        (*binary(bytes(8), [1, 3]), "expected 12 bytes of FP32"),
        (*binary(bytes(8), [1, 2], size=9), "within the 8 bytes"),
        (*binary(bytes(8), [1, 2], size=-1), "within the 8 bytes"),
        (*binary(bytes(8), [1, 2], size="8"), "within the 8 bytes"),
        (*binary(bytes(8), [1, 1], size=4), "no bytes after the last tensor, found 4"),
        (*binary(bytes(8), [2**62, 2**62]), "expected .* bytes of FP32"),
        (*binary(b"\x05\0\0\0abc", [1], "BYTES"), "element 0 runs past"),
        (*binary(b"\x01\0\0\0abc", [1], "BYTES"), "found 2 bytes more"),
        (*binary(b"", [10**9], "BYTES"), "expected 1000000000 BYTES elements"),
        (b"{}", 3, "between 1 and the body's 2 bytes, found 3"),
        (b"{}", 0, "between 1 and"),
    ],
)
def test_binary_sizes_are_checked_before_anything_is_made(body: bytes, length: int, message: str) -> None:
    with pytest.raises(Malformed, match=message):
        parse_infer(body, length)


DTYPES = [
    "bool",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "int8",
    "int16",
    "int32",
    "int64",
    "float16",
    "float32",
    "float64",
]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_binary_tensors_come_back_as_they_went(data: st.DataObject) -> None:
    dtype = np.dtype(data.draw(st.sampled_from(DTYPES)))
    array = data.draw(hnp.arrays(dtype, hnp.array_shapes(min_dims=1, max_dims=3, max_side=5)))
    asked = Inference("", {}, {}, binary_default=True)
    body, length = encode_infer("m", "v", asked, {"features": array})
    assert length is not None
    # A response has the form of a request but for the key that names the tensors.
    header = json.loads(body[:length])
    sent = json.dumps({"inputs": header["outputs"]}).encode()
    back = parse_infer(sent + body[length:], len(sent)).inputs["features"]
    assert back.dtype == dtype
    np.testing.assert_array_equal(back, array)


def test_text_travels_both_ways_in_both_forms() -> None:
    words = ["ä", "", "two words"]
    plain = parse_infer(request(words, [3], "BYTES")).inputs["features"]
    raw = b"".join(struct.pack("<I", len(word.encode())) + word.encode() for word in words)
    packed = parse_infer(*binary(raw, [3], "BYTES")).inputs["features"]
    assert plain.tolist() == packed.tolist() == [word.encode() for word in words]
    body, _ = encode_infer("m", "v", Inference("", {}, {}), {"text": plain})
    assert json.loads(body)["outputs"][0]["data"] == words
    body, length = encode_infer("m", "v", Inference("", {}, {}, binary_default=True), {"text": plain})
    assert body[length:] == raw


def test_each_output_is_sent_as_it_was_asked_for() -> None:
    outputs = {"score": np.array([[0.5]], np.float32), "logit": np.array([[0.0]], np.float32)}
    wanted = request(
        [1, 2],
        [1, 2],
        id="7",
        outputs=[{"name": "logit", "parameters": {"binary_data": True}}, {"name": "score"}],
    )
    body, length = encode_infer("m", "v", parse_infer(wanted), outputs)
    assert length is not None
    header = json.loads(body[:length])
    assert header["id"] == "7"
    assert [output["name"] for output in header["outputs"]] == ["logit", "score"]
    assert header["outputs"][0]["parameters"] == {"binary_data_size": 4}
    assert header["outputs"][1]["data"] == [0.5]
    assert body[length:] == bytes(4)
    with pytest.raises(Malformed, match="expected one of 'score', 'logit'"):
        encode_infer("m", "v", parse_infer(request([1, 2], [1, 2], outputs=[{"name": "x"}])), outputs)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"x": np.zeros((1, 2), np.float32)}, "expected inputs 'features', found 'x'"),
        ({"features": np.zeros((1, 2), np.float32), "x": np.zeros(1)}, "found 'features', 'x'"),
        ({"features": np.zeros((1, 2), np.float64)}, "expected datatype FP32, found FP64"),
        ({"features": np.zeros((1, 3), np.float32)}, r"expected shape \[-1, 2\], found \[1, 3\]"),
        ({"features": np.zeros(2, np.float32)}, r"found \[2\]"),
        ({"features": np.zeros((0, 2), np.float32)}, r"found \[0, 2\]"),
        ({"features": np.array([[1, np.inf]], np.float32)}, "NaN or Infinity"),
    ],
)
def test_inputs_must_be_the_models(inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(Malformed, match=message):
        require_inputs(inputs, SPECS, "fraud")


def test_free_batches_must_agree() -> None:
    specs = (*SPECS, TensorSpec("other", "float32", (-1,)))
    inputs = {"features": np.zeros((2, 2), np.float32), "other": np.zeros(3, np.float32)}
    with pytest.raises(Malformed, match="batch of the others, 2, found 3"):
        require_inputs(inputs, specs, "fraud")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.one_of(st.none(), st.integers(-1, 300)))
def test_no_bytes_raise_anything_but_a_refusal(body: bytes, length: int | None) -> None:
    for parse in (lambda: parse_infer(body, length), lambda: parse_predict(body)):
        with contextlib.suppress(AtollError):
            parse()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "expected JSON like"),
        (b'{"device_id": "pos-0001"}', "missing required field `features`"),
        (b'{"features": {"a": "1"}}', "Expected `float`, got `str`"),
        (b'{"features": {"a": true}}', "Expected `float`, got `bool`"),
        (b'{"features": {"a": NaN}}', "invalid character"),
        (b'{"features": {"a": 1}, "device": "pos-0001"}', "unknown field `device`"),
        (b'{"features": [1, 2]}', "Expected `object`"),
    ],
)
def test_a_predict_body_that_does_not_fit_says_why(body: bytes, message: str) -> None:
    with pytest.raises(Malformed, match=message):
        parse_predict(body)


def test_every_numeric_dtype_has_a_name() -> None:
    assert [datatype_of(dtype) for dtype in ("bool", "int8", "float16", "float32", "object")] == [
        "BOOL",
        "INT8",
        "FP16",
        "FP32",
        "BYTES",
    ]
    with pytest.raises(Malformed, match="complex64"):
        datatype_of("complex64")
