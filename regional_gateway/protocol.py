"""What clients say and hear: requests, responses, tensors and refusals, without a web framework.

Two dialects. `PredictRequest` is ours: named features in, a decision out. The other is the Open Inference Protocol v2
over REST (kserve/open-inference-protocol, `inference_rest.md`) with the binary tensor data extension (Triton Inference
Server, `extension_binary_data.md`): JSON first, then raw little-endian tensors in the order in which they are named,
the JSON's length in `Inference-Header-Content-Length`. FP16 exists only in binary form there, and so it does here.

Every fault of a client is an `AtollError` with one line that names what was expected and what was found; which HTTP
status that becomes is decided in `app`, nowhere else.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from model_delta.errors import AtollError, Malformed, NotFound, Unavailable, Untrusted
from model_delta.manifest import TensorSpec

Array = NDArray[Any]
PREDICT_BODY_BYTES_MAX = 64 * 1024
INFER_BODY_BYTES_MAX = 4 * 1024 * 1024
TENSORS_MAX = 64
DIMENSIONS_MAX = 8
BINARY_EXTENSION = "binary_tensor_data"


class Unauthorized(Untrusted):
    """No tenant of this region asked."""


class TooMuch(Malformed):
    """A body larger than its route takes."""


class TooSlow(Malformed):
    """A body that did not arrive within its deadline."""


class UnknownModel(NotFound):
    """No such model, or not in the version asked for."""


class NotReady(Unavailable):
    """The model is not loaded yet, or the region is full or leaving: try again in `retry_after_seconds`."""

    def __init__(self, message: str, retry_after_seconds: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class TooMany(NotReady):
    """The tenant's limit is used up."""


class ModelFault(AtollError):
    """The model itself failed on input that fits its signature."""


# --- /predict ---------------------------------------------------------------------------------------------------------


class PredictRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Named features of one payment. `model` "" means the tenant's default; `device_id` puts the request into the
    cohort of that device."""

    features: dict[str, float]
    device_id: str = ""
    device_class: str = ""
    request_id: str = ""
    model: str = ""


class PredictResponse(msgspec.Struct, frozen=True):
    """`score` in [0, 1]; `model_version` is the version vector and the manifest digest's first 12 characters."""

    score: float
    decision: Literal["approve", "decline"]
    model_version: str
    manifest: str
    reason: str
    region: str
    latency_ms: float
    request_id: str


def parse_predict(body: bytes) -> PredictRequest:
    """Decode a `/predict` body. Raises Malformed."""
    try:
        return _predict_decoder.decode(body)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise Malformed(
            f'predict: expected JSON like {{"features": {{"name": 1.5}}, "device_id": "pos-0001"}}, found: {error}'
        ) from None


_predict_decoder = msgspec.json.Decoder(PredictRequest)

# --- Open Inference Protocol v2 ---------------------------------------------------------------------------------------


class InferInput(msgspec.Struct, frozen=True):
    """One tensor of a request; `data` is absent when `parameters.binary_data_size` says that it follows the JSON."""

    name: str
    shape: tuple[int, ...]
    datatype: str
    parameters: dict[str, Any] = {}
    data: msgspec.Raw = msgspec.Raw()


class InferOutput(msgspec.Struct, frozen=True):
    """An output that the client asks for."""

    name: str
    parameters: dict[str, Any] = {}


class InferRequest(msgspec.Struct, frozen=True):
    """An inference request as it came; tensors are not decoded yet."""

    inputs: tuple[InferInput, ...]
    id: str = ""
    parameters: dict[str, Any] = {}
    outputs: tuple[InferOutput, ...] = ()


class Inference(msgspec.Struct, frozen=True):
    """A decoded inference request: arrays by name, and the outputs wanted with whether each is wanted in binary
    (empty: all outputs, `binary_default`)."""

    id: str
    inputs: dict[str, Array]
    outputs: dict[str, bool]
    binary_default: bool = False


_DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype(object),
}
_DATATYPES = {dtype: name for name, dtype in _DTYPES.items()}
_infer_decoder = msgspec.json.Decoder(InferRequest)
_LEAVES: dict[str, Any] = {"b": bool, "u": int, "i": int, "f": float, "O": str}


@functools.cache
def datatype_of(dtype: str) -> str:
    """The protocol's name of a NumPy dtype name (`float32` -> `FP32`). Raises Malformed for one it has no name for."""
    name = _DATATYPES.get(np.dtype(object) if dtype in ("object", "str", "string") else np.dtype(dtype))
    if name is None:
        raise Malformed(f"dtype {dtype}: expected one of {', '.join(_DTYPES)}")
    return name


def parse_infer(body: bytes, header_length: int | None = None) -> Inference:
    """Decode an inference request. `header_length` is `Inference-Header-Content-Length` (None: the body is all JSON).

    Raises Malformed. Nothing is allocated by a declared shape before the declared size was checked.
    """
    if header_length is None:
        header, rest = body, memoryview(b"")
    elif 0 < header_length <= len(body):
        header, rest = body[:header_length], memoryview(body)[header_length:]
    else:
        raise Malformed(
            f"infer: expected Inference-Header-Content-Length between 1 and the body's {len(body)} bytes, "
            f"found {header_length}"
        )
    try:
        request = _infer_decoder.decode(header)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise Malformed(
            f'infer: expected JSON like {{"inputs": [{{"name", "shape", "datatype", "data"}}]}}, found: {error}'
        ) from None
    if not 0 < len(request.inputs) <= TENSORS_MAX or len(request.outputs) > TENSORS_MAX:
        raise Malformed(f"infer: expected 1 to {TENSORS_MAX} inputs and outputs, found {len(request.inputs)} inputs")
    inputs: dict[str, Array] = {}
    for tensor in request.inputs:
        if tensor.name in inputs:
            raise Malformed(f"input {tensor.name[:64]!r}: expected once, found twice")
        size = tensor.parameters.get("binary_data_size")
        if size is None:
            inputs[tensor.name] = _from_json(tensor)
        else:
            if type(size) is not int or not 0 <= size <= len(rest):
                raise Malformed(
                    f"input {tensor.name[:64]!r}: expected binary_data_size within the {len(rest)} bytes that follow "
                    f"the JSON, found {str(size)[:32]}"
                )
            inputs[tensor.name] = _from_binary(tensor, rest[:size])
            rest = rest[size:]
    if len(rest):
        raise Malformed(f"infer: expected no bytes after the last tensor, found {len(rest)}")
    default = request.parameters.get("binary_data_output") is True
    outputs = {
        output.name: output.parameters["binary_data"] is True if "binary_data" in output.parameters else default
        for output in request.outputs
    }
    return Inference(request.id, inputs, outputs, default)


def require_inputs(inputs: Mapping[str, Array], specs: Sequence[TensorSpec], model: str) -> None:
    """Raise Malformed unless `inputs` are exactly the tensors that `specs` promise, finite, with equal free batches."""
    expected = {spec.name: spec for spec in specs}
    if inputs.keys() != expected.keys():
        raise Malformed(f"model {model}: expected inputs {_names(expected)}, found {_names(inputs)}")
    batch: int | None = None
    for name, array in inputs.items():
        spec = expected[name]
        found, wanted = datatype_of_array(array), datatype_of(spec.dtype)
        if found != wanted:
            raise Malformed(f"input {name!r}: expected datatype {wanted}, found {found}")
        fits = len(array.shape) == len(spec.shape) and all(
            size in (-1, given) for size, given in zip(spec.shape, array.shape, strict=True)
        )
        if not fits or 0 in array.shape:
            raise Malformed(f"input {name!r}: expected shape {list(spec.shape)}, found {list(array.shape)}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise Malformed(f"input {name!r}: expected finite numbers, found NaN or Infinity")
        if spec.shape and spec.shape[0] == -1:
            if batch is not None and array.shape[0] != batch:
                raise Malformed(f"input {name!r}: expected the batch of the others, {batch}, found {array.shape[0]}")
            batch = array.shape[0]


def datatype_of_array(array: Array) -> str:
    """The protocol's name of the array's type. Raises Malformed for one it has no name for."""
    return _DATATYPES.get(array.dtype) or datatype_of(array.dtype.name)


def encode_infer(
    model: str, version: str, request: Inference, outputs: Mapping[str, Array]
) -> tuple[bytes, int | None]:
    """The response body, and its `Inference-Header-Content-Length` when a tensor is in binary form (None: all JSON).

    Raises Malformed when the request names an output that the model has not got.
    """
    wanted = request.outputs or dict.fromkeys(outputs, request.binary_default)
    tensors: list[dict[str, Any]] = []
    raw: list[bytes] = []
    for name, binary in wanted.items():
        if name not in outputs:
            raise Malformed(f"output {name[:64]!r}: expected one of {_names(outputs)}")
        array = outputs[name]
        entry: dict[str, Any] = {
            "name": name,
            "datatype": datatype_of_array(array),
            "shape": list(array.shape),
        }
        if binary:
            data = _to_binary(array)
            raw.append(data)
            entry["parameters"] = {"binary_data_size": len(data)}
        elif array.dtype == np.float16:
            raise Malformed(f"output {name!r}: FP16 has no JSON form; ask for it with binary_data")
        else:
            entry["data"] = (
                [_text(item) for item in array.ravel()] if array.dtype.kind in "OSU" else array.ravel().tolist()
            )
        tensors.append(entry)
    response: dict[str, Any] = {"model_name": model, "model_version": version, "outputs": tensors}
    if request.id:
        response["id"] = request.id
    header = msgspec.json.encode(response)
    if not raw:
        return header, None
    return b"".join([header, *raw]), len(header)


def _from_json(tensor: InferInput) -> Array:
    """The tensor from flat or nested JSON numbers, in the type that it declares."""
    dtype, count = _promised(tensor)
    raw = bytes(tensor.data)
    if not raw or tensor.datatype == "FP16":
        how = "binary data (FP16 has no JSON form)" if tensor.datatype == "FP16" else "data, or binary_data_size"
        raise Malformed(f"input {tensor.name[:64]!r}: expected {how}, found none")
    depth = _depth(raw)
    if depth != 1 and depth != len(tensor.shape):
        raise Malformed(
            f"input {tensor.name[:64]!r}: expected data flat or nested {len(tensor.shape)} deep, found {depth} deep"
        )
    kind: Any = _LEAVES[dtype.kind]
    for _ in range(depth):
        kind = list[kind]
    try:
        values = msgspec.json.decode(raw, type=kind)
        with np.errstate(over="ignore"):
            array: Array = _strings(values) if dtype.kind == "O" else np.array(values, dtype=dtype)
    except (msgspec.DecodeError, ValueError, OverflowError) as error:
        raise Malformed(
            f"input {tensor.name[:64]!r}: expected {tensor.datatype} data in an even nesting, "
            f"found: {_first_line(error)}"
        ) from None
    if (depth > 1 and array.shape != tensor.shape) or array.size != count:
        raise Malformed(
            f"input {tensor.name[:64]!r}: expected {count} values in shape {list(tensor.shape)}, "
            f"found {array.size} in shape {list(array.shape)}"
        )
    return array.reshape(tensor.shape)


def _from_binary(tensor: InferInput, data: memoryview) -> Array:
    """The tensor from little-endian C-order bytes; BYTES elements each have a 4-byte length in front."""
    dtype, count = _promised(tensor)
    if bytes(tensor.data):
        raise Malformed(f"input {tensor.name[:64]!r}: expected data or binary_data_size, found both")
    if dtype.kind == "O":
        return _read_strings(tensor, data, count)
    if len(data) != count * dtype.itemsize:
        raise Malformed(
            f"input {tensor.name[:64]!r}: expected {count * dtype.itemsize} bytes of {tensor.datatype} "
            f"for shape {list(tensor.shape)}, found {len(data)}"
        )
    # The bytes stand at any offset behind the JSON; a runtime may want its numbers aligned.
    array: Array = np.require(np.frombuffer(data, dtype=np.uint8 if dtype.kind == "b" else dtype), requirements="A")
    if dtype.kind == "b":
        array = array != 0
    return array.reshape(tensor.shape)


def _promised(tensor: InferInput) -> tuple[np.dtype[Any], int]:
    """The declared type and number of elements."""
    dtype = _DTYPES.get(tensor.datatype)
    if dtype is None:
        raise Malformed(
            f"input {tensor.name[:64]!r}: expected a datatype of {', '.join(_DTYPES)}, found {tensor.datatype[:32]!r}"
        )
    if not 0 < len(tensor.shape) <= DIMENSIONS_MAX or min(tensor.shape) < 0:
        raise Malformed(
            f"input {tensor.name[:64]!r}: expected 1 to {DIMENSIONS_MAX} dimensions of at least 0, "
            f"found {list(tensor.shape[: DIMENSIONS_MAX + 1])}"
        )
    return dtype, math.prod(tensor.shape)


def _depth(raw: bytes) -> int:
    """How deep the first element of a JSON array is nested."""
    depth = 0
    for character in raw[:4_096]:
        if character == 0x5B:
            depth += 1
        elif character not in b" \t\r\n":
            break
    return depth


def _strings(values: Any) -> Array:
    """Nested lists of text as an object array of UTF-8 bytes; ValueError when the nesting is uneven."""
    array = np.array(values, dtype=np.str_)
    flat = np.empty(array.size, dtype=object)
    flat[:] = [text.encode() for text in _flat(values)]
    return flat.reshape(array.shape)


def _flat(values: Any) -> Iterable[str]:
    for value in values:
        if isinstance(value, str):
            yield value
        else:
            yield from _flat(value)


def _read_strings(tensor: InferInput, data: memoryview, count: int) -> Array:
    if count * 4 > len(data):
        raise Malformed(f"input {tensor.name[:64]!r}: expected {count} BYTES elements, found {len(data)} bytes in all")
    flat = np.empty(count, dtype=object)
    position = 0
    for index in range(count):
        end = position + 4
        length = int.from_bytes(data[position:end], "little") if end <= len(data) else len(data)
        if end + length > len(data):
            raise Malformed(f"input {tensor.name[:64]!r}: BYTES element {index} runs past the {len(data)} bytes given")
        flat[index] = bytes(data[end : end + length])
        position = end + length
    if position != len(data):
        raise Malformed(
            f"input {tensor.name[:64]!r}: expected {count} BYTES elements, found {len(data) - position} bytes more"
        )
    return flat.reshape(tensor.shape)


def _to_binary(array: Array) -> bytes:
    if array.dtype.kind in "OSU":
        items = [item.encode() if isinstance(item, str) else bytes(item) for item in array.ravel()]
        return b"".join(struct.pack("<I", len(item)) + item for item in items)
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes()


def _text(item: Any) -> str:
    return item if isinstance(item, str) else bytes(item).decode(errors="replace")


def _names(names: Iterable[str]) -> str:
    return ", ".join(repr(name[:64]) for name in list(names)[:8]) or "none"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:160] if str(error) else type(error).__name__
