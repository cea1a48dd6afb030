"""Runs lay tensors against their namesakes, wherever both stand."""

from __future__ import annotations

import bsdiff4
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_delta.graphs.int8 import quantize_weights
from model_delta.patch.align import Run, align
from model_delta.patch.bsdiff import make_patch
from model_delta.patch.container import apply_bytes
from model_delta.segments import stored_tensors
from tests.model_delta.models import Layers, layers, model, nudged

SIZES = (6, 96, 64, 1)


def reach(runs: tuple[Run, ...]) -> int:
    return sum(run.size for run in runs)


def check(old: bytes, new: bytes, runs: tuple[Run, ...]) -> None:
    """What every alignment promises."""
    position = 0
    for run in runs:
        assert run.size > 0
        assert run.size % np.dtype(run.dtype).itemsize == 0
        assert run.new_start >= position
        position = run.new_start + run.size
        assert position <= len(new)
        assert 0 <= run.old_start <= len(old) - run.size


def partner(old: bytes, new: bytes, runs: tuple[Run, ...], name: str) -> str:
    """The old tensor that a new one is laid against."""
    there = {tensor.name: tensor for tensor in stored_tensors(new)}[name]
    run = next(run for run in runs if run.new_start == there.offset)
    return next(tensor.name for tensor in stored_tensors(old) if tensor.offset == run.old_start)


def field(number: int, value: int | bytes) -> bytes:
    """One protobuf field: a varint or bytes."""

    def varint(number: int) -> bytes:
        return (b"" if number < 0x80 else bytes([number & 0x7F | 0x80])) + (
            bytes([number]) if number < 0x80 else varint(number >> 7)
        )

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """ONNX as a stranger may write it: any names (also twice), any order, types that nobody knows, shapes that do not
    fit their bytes, fields between and after."""
    graph = b""
    for _ in range(draw(st.integers(0, 6))):
        data_type, width = draw(st.sampled_from([(1, 4), (3, 1), (2, 1), (11, 8), (99, 1)]))
        count = draw(st.sampled_from([1, 7, 300, 1500]))
        rng = np.random.default_rng(draw(st.integers(0, 3)))
        raw = rng.integers(0, draw(st.sampled_from([4, 256])), count * width, np.uint8).tobytes()
        tensor = field(1, count + draw(st.sampled_from([0, 0, 0, 1]))) + field(2, data_type)
        tensor += field(8, draw(st.sampled_from([b"a", b"b", b"c", b"d", b""]))) + field(9, raw)
        graph += field(draw(st.sampled_from([5, 5, 5, 1])), tensor) + field(2, draw(st.binary(max_size=60)))
    return field(1, 9) + field(7, graph) + field(2, draw(st.binary(max_size=20)))


@settings(max_examples=40)
@given(files(), files())
def test_runs_of_any_models_give_the_new_file_both_ways(first: bytes, second: bytes) -> None:
    for old, new in ((first, second), (second, first), (first, first)):
        check(old, new, align(old, new))
        assert apply_bytes(old, make_patch(old, new, search_bytes_max=0), len(new)) == new
        assert bsdiff4.patch(old, make_patch(old, new)) == new


@given(st.binary(max_size=3000), st.binary(max_size=3000), st.binary(max_size=3000))
def test_runs_of_any_bytes_are_disjoint_and_inside_both_files(first: bytes, second: bytes, third: bytes) -> None:
    old, new = first + second, first + third
    check(old, new, align(old, new))


def test_a_round_of_the_same_model_aligns_whole() -> None:
    weights = layers(1, SIZES)
    old, new = model(weights), model(nudged(weights, 2, 1e-4))
    runs = align(old, new)
    check(old, new, runs)
    assert reach(runs) == len(new)
    assert {run.dtype for run in runs} == {"float32", "uint8"}


def test_int8_weights_are_seen_as_int8() -> None:
    weights = layers(1, SIZES)
    old = quantize_weights(model(weights))
    new = quantize_weights(model(nudged(weights, 2, 1e-4)), old)
    runs = align(old, new)
    check(old, new, runs)
    assert "int8" in {run.dtype for run in runs}
    assert reach(runs) > 0.99 * len(new)


def reordered(file: bytes, order: list[int]) -> bytes:
    import onnx

    loaded = onnx.ModelProto.FromString(file)
    tensors = list(loaded.graph.initializer)
    del loaded.graph.initializer[:]
    loaded.graph.initializer.extend(tensors[index] for index in order)
    return bytes(loaded.SerializeToString(deterministic=True))


def test_tensors_in_another_order_are_found_by_name() -> None:
    weights = layers(1, SIZES)
    old = model(weights)
    names = [tensor.name for tensor in stored_tensors(old)]
    new = reordered(model(nudged(weights, 2, 1e-4)), list(range(len(names)))[::-1])
    runs = align(old, new)
    check(old, new, runs)
    assert reach(runs) > 0.99 * len(new)
    assert partner(old, new, runs, "layer1.weight") == "layer1.weight"


def test_a_layer_more_leaves_only_that_layer_without_a_counterpart() -> None:
    weights = layers(1, (6, 96, 96, 1))
    more: Layers = [*weights[:2], layers(9, (96, 96))[0], weights[2]]
    old, new = model(weights), model(more)
    runs = align(old, new)
    check(old, new, runs)
    assert len(new) - reach(runs) < 96 * 96 * 4 + 96 * 4 + 1000


def test_weights_under_another_name_are_found_by_their_form_and_their_bytes() -> None:
    weights = layers(1, (6, 96, 96, 96, 1))
    swapped = [weights[0], weights[2], weights[1], weights[3]]
    old, new = model(weights), model(nudged(swapped, 3, 1e-4))
    runs = align(old, new)
    check(old, new, runs)
    assert partner(old, new, runs, "layer1.weight") == "layer2.weight"
    assert partner(old, new, runs, "layer2.weight") == "layer1.weight"


def test_another_model_of_the_same_form_gives_no_runs_for_its_weights() -> None:
    old, new = (quantize_weights(model(layers(seed, SIZES))) for seed in (1, 2))
    runs = align(old, new)
    check(old, new, runs)
    assert all(run.dtype != "int8" or run.size < 1024 for run in runs)


@pytest.mark.parametrize("size", [0, 1, 5000])
def test_files_of_one_size_are_one_run(size: int) -> None:
    old = np.random.default_rng(1).integers(0, 50, size, np.uint8)
    new = old.copy()
    new[: size // 100] += 1
    runs = align(old.tobytes(), new.tobytes())
    assert runs == ((Run(0, 0, size, "uint8"),) if size else ())


def test_other_files_share_their_ends() -> None:
    rng = np.random.default_rng(1)
    head, tail = rng.bytes(3000), rng.bytes(2000)
    runs = align(head + b"old" + tail, head + b"newer" + tail)
    assert runs == (Run(0, 0, 3000, "uint8"), Run(3003, 3005, 2000, "uint8"))


def test_unrelated_bytes_of_one_size_give_no_runs() -> None:
    words = [b"apple", b"pear", b"cherry", b"plum"]
    rng = np.random.default_rng(1)
    old, new = (b" ".join(words[i] for i in rng.integers(0, 4, 40_000))[:150_000] for _ in range(2))
    assert reach(align(old, new)) < 2 * 1024
