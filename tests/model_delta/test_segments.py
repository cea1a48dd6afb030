"""Cutting files and reading weights without the onnx library."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from model_delta.digest import digest_of
from model_delta.encoding import pack
from model_delta.errors import Malformed
from model_delta.graphs.int8 import quantize_weights
from model_delta.manifest import Segment, StoredTensor
from model_delta.segments import (
    ALONE_BYTES,
    CUT_BYTES,
    PART_BYTES,
    SPLIT_BYTES,
    cut,
    operators,
    read_tensor,
    stored_tensors,
)
from tests.model_delta.models import layers, model


def joined(file: bytes, minimum: int = 4096) -> bytes:
    return b"".join(data for _, data in cut(file, minimum))


@given(st.binary(max_size=3000), st.integers(1, 100))
def test_any_bytes_join_again(file: bytes, minimum: int) -> None:
    assert joined(file, minimum) == file
    operators(file)
    for tensor in stored_tensors(file):
        read_tensor(file, tensor)


@given(st.data())
def test_a_damaged_model_joins_again_too(data: st.DataObject) -> None:
    file = bytearray(model(layers(1)))
    for _ in range(data.draw(st.integers(1, 4))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(file[: data.draw(st.integers(0, len(file)))])
    assert joined(damaged, 64) == damaged
    for tensor in stored_tensors(damaged):
        assert read_tensor(damaged, tensor).shape == tensor.shape


@pytest.mark.parametrize("minimum", [1, 100, 1000, 4096, 10**6])
def test_segments_end_at_tensors_and_have_the_minimum(minimum: int) -> None:
    file = quantize_weights(model(layers(1, (6, 64, 64, 1))))
    segments = cut(file, minimum)
    assert b"".join(data for _, data in segments) == file
    assert len({name for name, _ in segments}) == len(segments)
    assert len(segments) == 1 or min(len(data) for _, data in segments) >= minimum
    tensors = stored_tensors(file)
    ends = {tensor.offset + tensor.size for tensor in tensors}
    position = 0
    for _, data in segments[:-1]:
        position += len(data)
        assert position in ends or position < tensors[0].offset  # the bytes before the first tensor are a piece too


def test_a_change_in_one_layer_changes_one_segment() -> None:
    weights = layers(1, (6, 64, 64, 1))
    before = cut(model(weights), 1024)
    changed = weights[1][0].copy()
    changed[0, 0] += 1
    after = cut(model([weights[0], (changed, weights[1][1]), weights[2]]), 1024)
    assert [name for (name, a), (_, b) in zip(before, after, strict=True) if a != b] == ["layer1.weight"]


def with_tensors(sizes: dict[str, int], fill: int = 1) -> bytes:
    """An ONNX file with byte tensors of these sizes, in this order."""
    graph = onnx.GraphProto(name="g")
    graph.node.append(helper.make_node("Identity", ["a"], ["out"]))
    graph.initializer.extend(
        numpy_helper.from_array(np.full(size, fill + number % 100, np.uint8), name)
        for number, (name, size) in enumerate(sizes.items())
    )
    return onnx.ModelProto(ir_version=9, graph=graph).SerializeToString()


def test_large_tensors_stand_alone_and_the_largest_in_parts() -> None:
    sizes = {"scale": 4, "big": ALONE_BYTES, "zero": 1, "huge": SPLIT_BYTES + 1, "small": 5000, "tiny": 10}
    file = with_tensors(sizes)
    segments = cut(file)
    assert b"".join(data for _, data in segments) == file
    names = [name for name, _ in segments]
    assert names == ["graph", "big", "zero", "huge", *(f"huge#{part}" for part in range(2, 6)), "small"]
    found = {name: len(data) for name, data in segments}
    assert [found[name] for name in names[3:7]] == [PART_BYTES] * 4
    assert sizes["big"] < found["big"] < sizes["big"] + 32
    assert 0 < found["huge#5"] < 32 + 1
    assert found["small"] > sizes["small"] + sizes["tiny"]


def test_a_fresh_scale_does_not_mark_the_tensor_beside_it() -> None:
    before = cut(with_tensors({"a_scale": 4, "a": 2 * ALONE_BYTES, "b_scale": 4, "b": SPLIT_BYTES + 5}))
    file = with_tensors({"a_scale": 4, "a": 2 * ALONE_BYTES, "b_scale": 4, "b": SPLIT_BYTES + 5})
    tensors = {tensor.name: tensor for tensor in stored_tensors(file)}
    changed = bytearray(file)
    changed[tensors["b_scale"].offset] ^= 1
    changed[tensors["b"].offset + PART_BYTES] ^= 1
    marked = [name for (name, a), (_, b) in zip(before, cut(bytes(changed)), strict=True) if a != b]
    assert marked == ["b_scale", "b#2"]


def test_the_manifest_of_a_large_model_stays_small() -> None:
    """The shape of MiniLM at int8: 22.6 M parameters in six layers. Segments as they stand in a packed manifest."""
    sizes = {"embeddings.word.weight": 30522 * 384, "embeddings.position.weight": 512 * 384}
    for layer in range(6):
        for part in ("query", "key", "value", "dense"):
            sizes |= {f"layer{layer}.{part}.weight_scale": 1536, f"layer{layer}.{part}.weight": 384 * 384}
        for part in ("intermediate", "output"):
            sizes |= {f"layer{layer}.{part}.weight_scale": 1536, f"layer{layer}.{part}.weight": 384 * 1536}
    segments = tuple(Segment(name, len(data), digest_of(data)) for name, data in cut(with_tensors(sizes)))
    assert sum(segment.size for segment in segments) > 22_500_000
    assert max(segment.size for segment in segments) <= SPLIT_BYTES
    assert len(segments) == 119
    assert len(pack(segments)) < 20_000


def test_what_is_not_onnx_is_cut_at_fixed_places() -> None:
    file = b"\xff" * (2 * CUT_BYTES + 5)
    assert [(name, len(data)) for name, data in cut(file)] == [
        ("part-0000", CUT_BYTES),
        ("part-0001", CUT_BYTES),
        ("part-0002", 5),
    ]
    assert cut(b"") == ()
    assert stored_tensors(file) == ()


@pytest.mark.parametrize(
    "dtype", ["float32", "float64", "float16", "int8", "uint8", "int32", "int64", "bool", "uint16"]
)
@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 3, 4)])
def test_every_tensor_reads_as_onnx_reads_it(dtype: str, shape: tuple[int, ...]) -> None:
    value = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    node = helper.make_node("Identity", ["w"], ["out"])
    output = helper.make_tensor_value_info("out", helper.np_dtype_to_tensor_dtype(value.dtype), list(shape))
    graph = helper.make_graph([node], "g", [], [output], [numpy_helper.from_array(value, "w")])
    file = helper.make_model(graph).SerializeToString()
    (tensor,) = stored_tensors(file)
    assert (tensor.name, tensor.dtype, tensor.shape) == ("w", dtype, shape)
    found = read_tensor(file, tensor)
    assert found.dtype == value.dtype
    np.testing.assert_array_equal(found, value)


def test_only_raw_data_in_the_file_is_stored() -> None:
    graph = onnx.GraphProto(name="g")
    graph.initializer.append(helper.make_tensor("typed", TensorProto.FLOAT, [2], [1.0, 2.0]))
    graph.initializer.append(helper.make_tensor("text", TensorProto.STRING, [1], [b"x"]))
    short = numpy_helper.from_array(np.zeros(4, np.float32), "short")
    short.dims[0] = 5
    graph.initializer.extend([short, numpy_helper.from_array(np.ones(3, np.float32), "good")])
    file = onnx.ModelProto(ir_version=9, graph=graph).SerializeToString()
    assert [tensor.name for tensor in stored_tensors(file)] == ["good"]


@pytest.mark.parametrize(
    "tensor",
    [
        StoredTensor("w", "float32", (2,), 0, 4),
        StoredTensor("w", "float32", (-2, -1), 0, 8),
        StoredTensor("w", "float32", (2,), 96, 8),
        StoredTensor("w", "float32", (2,), -4, 8),
        StoredTensor("w", "object", (2,), 0, 16),
        StoredTensor("w", "S4", (2,), 0, 8),
        StoredTensor("w", "float32", (2**40, 2**40), 0, 8),
    ],
)
def test_a_description_that_does_not_fit_is_malformed(tensor: StoredTensor) -> None:
    with pytest.raises(Malformed, match="tensor 'w'"):
        read_tensor(bytes(100), tensor)


def test_what_is_read_cannot_be_written() -> None:
    file = model(layers(1))
    assert not read_tensor(file, stored_tensors(file)[0]).flags.writeable


def test_operators_are_told_without_onnx() -> None:
    file = model(layers(1))
    assert operators(file) == {"Sub", "Div", "Gemm", "Relu", "Sigmoid"}
    assert operators(quantize_weights(file)) == operators(file) | {"DequantizeLinear"}
    assert operators(b"not a model") == operators(b"") == operators(file[:-1]) == frozenset()


def test_a_device_opens_releases_without_onnx() -> None:
    script = (
        "import sys; sys.modules['onnx'] = None\n"
        "import model_delta.release, model_delta.segments, model_delta.graphs.int8, model_delta.trust.updater\n"
        "assert 'onnxruntime' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
