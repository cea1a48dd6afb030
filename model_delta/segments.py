"""A model file as segments cut at tensor boundaries; joined they give the file back, byte for byte.

An ONNX file is a protobuf message, and a protobuf field stands in the file as one contiguous range. This module walks
that wire format (Protocol Buffers, "Encoding") just deep enough to find the initializers of the main graph, so a device
cuts files and reads weights without the onnx library. Nothing is parsed that is not needed, nothing is copied before it
is measured, and bytes that are not ONNX are no error: they are cut every 64 KiB.

Field numbers are those of onnx.proto: ModelProto.graph = 7; GraphProto.node = 1, initializer = 5; NodeProto.op_type =
4; TensorProto.dims = 1, data_type = 2, name = 8, raw_data = 9.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from model_delta.errors import Malformed
from model_delta.manifest import StoredTensor

CUT_BYTES = 65_536
ALONE_BYTES = 65_536
"""From this size on a tensor shares its segment with nothing: a fresh scale beside it must not mark it as changed."""
SPLIT_BYTES = 1 << 20
PART_BYTES = 256 << 10
"""Tensors above SPLIT_BYTES are cut every PART_BYTES, so that little is fetched again for one spoilt byte."""
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_GRAPH, _INITIALIZER, _DIMS, _DATA_TYPE, _NAME, _RAW_DATA = 7, 5, 1, 2, 8, 9
_NODE, _OP_TYPE = 1, 4
_DIMENSIONS_MAX = 16

DTYPES = {
    1: "float32",
    2: "uint8",
    3: "int8",
    4: "uint16",
    5: "int16",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
    12: "uint32",
    13: "uint64",
}
"""TensorProto.DataType to NumPy name, for the types that NumPy has."""


class _Field(NamedTuple):
    """One protobuf field: its number and wire type, where its tag starts, and its value as a range (for bytes) or a
    number (for varints)."""

    number: int
    wire: int
    start: int
    value_start: int
    end: int
    number_value: int


class _Initializer(NamedTuple):
    """An initializer's range in the file, its name, and its weights when they are raw data of a known type."""

    start: int
    end: int
    name: str
    stored: StoredTensor | None


class _NotOnnx(ValueError):
    """The bytes do not walk as an ONNX model."""


def cut(file: bytes, minimum: int = 4096) -> tuple[tuple[str, bytes], ...]:
    """The file's segments as (name, bytes); names are unique, and the bytes joined in order are the file.

    A tensor of ALONE_BYTES or more is a segment, and one above SPLIT_BYTES is several of PART_BYTES, called `tensor`,
    `tensor#2`, ...; what stands before it does not change its digest. Everything else is put together: a segment then
    ends at a tensor's end as soon as it has `minimum` bytes, and is named after the largest tensor in it; the bytes
    around the tensors are called `graph`. What is not ONNX is cut into 64 KiB parts. An empty file has none.
    """
    try:
        tensors = tuple(_initializers(file))
    except _NotOnnx:
        starts = range(0, len(file), CUT_BYTES)
        return tuple((f"part-{index:04d}", file[start : start + CUT_BYTES]) for index, start in enumerate(starts))
    pieces: list[tuple[str, int]] = []  # (name, end), in file order
    position = 0
    for tensor in tensors:
        if tensor.start > position:
            pieces.append(("graph", tensor.start))
        pieces.append((tensor.name, tensor.end))
        position = tensor.end
    if position < len(file):
        pieces.append(("graph", len(file)))
    return _merged(file, pieces, minimum)


def stored_tensors(file: bytes) -> tuple[StoredTensor, ...]:
    """The initializers whose weights stand in the file as raw little-endian bytes, in file order; () if not ONNX.

    Left out: strings, types that NumPy lacks, external data, and a tensor whose size contradicts its shape.
    """
    try:
        found = [tensor.stored for tensor in _initializers(file) if tensor.stored is not None]
    except _NotOnnx:
        return ()
    return tuple({stored.name: stored for stored in reversed(found)}.values())[::-1]


def operators(file: bytes) -> frozenset[str]:
    """The kinds of operator in the main graph (not those inside control flow); empty if not ONNX.

    A runtime asks it how to open a file: weights of a model with DequantizeLinear and without QuantizeLinear are best
    restored once, at load (see `graphs.int8.quantize_weights`)."""
    try:
        return frozenset(
            file[field.value_start : field.end].decode("utf-8", "replace")
            for graph in _graphs(file)
            for node in _fields(file, graph.value_start, graph.end)
            if node.number == _NODE and node.wire == _BYTES
            for field in _fields(file, node.value_start, node.end)
            if field.number == _OP_TYPE and field.wire == _BYTES
        )
    except _NotOnnx:
        return frozenset()


def read_tensor(file: bytes, tensor: StoredTensor) -> npt.NDArray[Any]:
    """The weights of `tensor` as an array of its shape: a read-only view of `file`.

    Raises Malformed when the tensor's description does not fit itself or the file.
    """
    if tensor.dtype not in DTYPES.values():
        raise Malformed(f"tensor {tensor.name!r}: expected one of {', '.join(DTYPES.values())}, found {tensor.dtype!r}")
    dtype = np.dtype(tensor.dtype).newbyteorder("<")
    if min(tensor.shape, default=0) < 0 or _count(tensor.shape) * dtype.itemsize != tensor.size:
        raise Malformed(f"tensor {tensor.name!r}: {tensor.size} bytes do not hold {tensor.shape} of {tensor.dtype}")
    if not 0 <= tensor.offset <= len(file) - tensor.size:
        raise Malformed(
            f"tensor {tensor.name!r}: expected {tensor.size} bytes at {tensor.offset}, the file has {len(file)}"
        )
    flat = np.frombuffer(file, dtype, _count(tensor.shape), tensor.offset)
    return flat.reshape(tensor.shape).astype(dtype.newbyteorder("="), copy=False)


def _merged(file: bytes, pieces: Sequence[tuple[str, int]], minimum: int) -> tuple[tuple[str, bytes], ...]:
    ranges: list[tuple[str, int, int]] = []
    start = position = largest = 0
    name = ""
    alone = True  # whether the segment before must stay as it is
    for piece, end in pieces:
        size = end - position
        if piece != "graph" and size >= max(ALONE_BYTES, minimum):
            if start < position:
                ranges.append((name, start, position))
            part = PART_BYTES if size > SPLIT_BYTES else size
            ranges.extend((piece, at, min(at + part, end)) for at in range(position, end, part))
            start, position, name, largest, alone = end, end, "", 0, True
            continue
        if size > largest or not name:
            name, largest = piece, size
        position = end
        if end - start >= minimum:
            ranges.append((name, start, end))
            start, name, largest, alone = end, "", 0, False
    if start < len(file):  # a short tail joins the segment before it
        if not alone:
            name, start, _ = ranges.pop()
        ranges.append((name, start, len(file)))
    seen: dict[str, int] = {}
    named = []
    for name, start, end in ranges:
        seen[name] = seen.get(name, 0) + 1
        named.append((name if seen[name] == 1 else f"{name}#{seen[name]}", file[start:end]))
    return tuple(named)


def _graphs(file: bytes) -> list[_Field]:
    graphs = [field for field in _fields(file, 0, len(file)) if field.number == _GRAPH]
    if not graphs or any(graph.wire != _BYTES for graph in graphs):
        raise _NotOnnx
    return graphs


def _initializers(file: bytes) -> Iterator[_Initializer]:
    for graph in _graphs(file):
        for field in _fields(file, graph.value_start, graph.end):
            if field.number == _INITIALIZER:
                if field.wire != _BYTES:
                    raise _NotOnnx
                yield _initializer(file, field)


def _initializer(file: bytes, tensor: _Field) -> _Initializer:
    shape: list[int] = []
    data_type, name, raw = 0, "", None
    for field in _fields(file, tensor.value_start, tensor.end):
        if field.number == _DIMS and field.wire == _VARINT:
            shape.append(field.number_value)
        elif field.number == _DIMS and field.wire == _BYTES:  # the packed form
            position = field.value_start
            while position < field.end:
                size, position = _varint(file, position, field.end)
                shape.append(size)
        elif field.number == _DATA_TYPE and field.wire == _VARINT:
            data_type = field.number_value
        elif field.number == _NAME and field.wire == _BYTES:
            name = file[field.value_start : field.end].decode("utf-8", "replace")
        elif field.number == _RAW_DATA and field.wire == _BYTES:
            raw = field
        if len(shape) > _DIMENSIONS_MAX:
            raise _NotOnnx
    stored = None
    if raw is not None and name and data_type in DTYPES:
        dtype, size = DTYPES[data_type], raw.end - raw.value_start
        if _count(shape) * np.dtype(dtype).itemsize == size:
            stored = StoredTensor(name, dtype, tuple(shape), raw.value_start, size)
    return _Initializer(tensor.start, tensor.end, name or "graph", stored)


def _fields(file: bytes, start: int, end: int) -> Iterator[_Field]:
    position = start
    while position < end:
        tag, value_start = _varint(file, position, end)
        number, wire, value = tag >> 3, tag & 7, 0
        if number == 0:
            raise _NotOnnx
        if wire == _VARINT:
            value, stop = _varint(file, value_start, end)
        elif wire == _BYTES:
            size, value_start = _varint(file, value_start, end)
            stop = value_start + size
        elif wire in (_FIXED64, _FIXED32):
            stop = value_start + (8 if wire == _FIXED64 else 4)
        else:  # groups, which ONNX does not use
            raise _NotOnnx
        if stop > end:
            raise _NotOnnx
        yield _Field(number, wire, position, value_start, stop, value)
        position = stop


def _varint(file: bytes, position: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= end:
            raise _NotOnnx
        byte = file[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise _NotOnnx


def _count(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
