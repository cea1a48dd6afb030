"""Dense patches: any pair of files, exactly; small where models move a little; and nothing believed."""

from __future__ import annotations

import contextlib
import hashlib
import io
import tracemalloc
from typing import Any

import bsdiff4
import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_delta.errors import DigestMismatch, Malformed, Untrusted
from model_delta.graphs.int8 import quantize_weights
from model_delta.patch import tp1
from model_delta.patch.access import BytesAccess
from model_delta.patch.coding import squeezed_whole
from model_delta.patch.dense import apply_dense, changed_tensors, inspect_dense, make_dense
from model_delta.patch.tp1 import HEADER_BYTES, Body, Coded, Drafted, Header, Kind, Operation
from model_delta.segments import stored_tensors
from tests.model_delta.models import Layers, layers, model, nudged


def applied(old: bytes, patch: bytes, size_max: int = 1 << 24) -> bytes:
    new = io.BytesIO()
    assert apply_dense(BytesAccess(old), BytesAccess(patch), new, size_max) == len(new.getvalue())
    return new.getvalue()


def patch_of(old: bytes, new: bytes, body: bytes, kind: int = Body.SEGMENTS, window: int = 18, **sizes: int) -> bytes:
    """A header that tells the truth, unless `sizes` say otherwise, and any body."""
    digests = hashlib.sha256(old).digest(), hashlib.sha256(new).digest()
    header = tp1.pack_header(
        Header(Body.SEGMENTS, window, sizes.get("old_size", len(old)), sizes.get("new_size", len(new)), *digests)
    )
    return header[:4] + bytes([kind]) + header[5:] + body


def weights_file(tensors: dict[str, npt.NDArray[Any]]) -> bytes:
    """An ONNX file that holds these tensors."""
    value = onnx.helper.make_tensor_value_info("x", 1, [1])
    held = [onnx.numpy_helper.from_array(tensor, name) for name, tensor in tensors.items()]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["x2"])], "g", [value], [value], held)
    return bytes(onnx.helper.make_model(graph).SerializeToString(deterministic=True))


def segment(*operations: Coded) -> bytes:
    draft = Drafted(0)
    for coded in operations:
        draft.add(coded)
    return draft.packed(18)


def head(size: int, streams: dict[int, bytes], old_start: int = 0) -> bytes:
    """A segment whose streams are stored as they are."""
    numbers = [size, old_start, sum(1 << index for index in streams)]
    for data in streams.values():
        numbers += [len(data), len(data)]
    return b"".join(map(tp1.varint, numbers)) + b"".join(streams.values())


def mlp_pair(seed: int, sizes: tuple[int, ...] = (6, 256, 128, 1), step: float = 1e-4) -> tuple[bytes, bytes]:
    weights = layers(seed, sizes)
    old = quantize_weights(model(weights))
    return old, quantize_weights(model(nudged(weights, seed + 1, step)), old)


OLD, NEW = mlp_pair(1, (6, 64, 32, 1))
PATCH = make_dense(OLD, NEW)


@given(st.binary(max_size=600), st.binary(max_size=600))
def test_any_two_files(old: bytes, new: bytes) -> None:
    assert applied(old, make_dense(old, new)) == new


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_an_edited_model(data: st.DataObject) -> None:
    """Cut, moved, grown and stepped parts: every coding and every seek."""
    new = bytearray(OLD)
    for _ in range(data.draw(st.integers(1, 6))):
        start = data.draw(st.integers(0, len(new)))
        end = data.draw(st.integers(start, min(len(new), start + 5000)))
        kind = data.draw(st.sampled_from(["cut", "insert", "step", "move"]))
        if kind == "cut":
            del new[start:end]
        elif kind == "insert":
            new[start:start] = data.draw(st.binary(max_size=300))
        elif kind == "move":
            new += new[start:end]
        else:
            change = data.draw(st.integers(1, 255))
            new[start:end:7] = bytes((byte + change) % 256 for byte in new[start:end:7])
    assert applied(OLD, make_dense(OLD, bytes(new))) == bytes(new)
    assert applied(bytes(new), make_dense(bytes(new), OLD)) == OLD


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "float16", "float32", "float64", "int64"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 1.0])
def test_tensors_of_every_type(dtype: str, share: float) -> None:
    rng = np.random.default_rng(3)
    values = (rng.normal(0, 20, 10_000)).astype(dtype)
    moved = np.where(rng.random(values.shape) < share, values + rng.normal(0, 2, values.shape).astype(dtype), values)
    old, new = (weights_file({"w": array.astype(dtype)}) for array in (values, moved))
    assert applied(old, make_dense(old, new)) == new


def test_a_small_round_takes_a_fraction_of_what_bsdiff_takes() -> None:
    old, new = mlp_pair(4)
    patch = make_dense(old, new)
    assert applied(old, patch) == new
    assert len(patch) < 0.9 * len(bsdiff4.diff(old, new))


def sparse_pair(share: float, size: int = 2_000_000) -> tuple[bytes, bytes]:
    rng = np.random.default_rng(5)
    old = np.clip(np.rint(rng.normal(0, 25, size)), -126, 126).astype(np.int8)
    new = old + (rng.random(size) < share) * rng.choice(np.array([-1, 1], np.int8), size)
    return weights_file({"w": old}), weights_file({"w": new.astype(np.int8)})


@pytest.mark.parametrize("share", [0.002, 0.0058, 0.03, 0.16, 0.28])
def test_sparse_integers_take_at_most_one_percent_over_their_entropy(share: float) -> None:
    old, new = sparse_pair(share)
    (tensor,) = stored_tensors(old)
    cut = slice(tensor.offset, tensor.offset + tensor.size)
    difference = np.frombuffer(new, np.uint8)[cut] - np.frombuffer(old, np.uint8)[cut]
    counts = np.unique(difference, return_counts=True)[1]
    entropy = float((counts * -np.log2(counts / counts.sum())).sum()) / 8
    streams = inspect_dense(BytesAccess(make_dense(old, new))).streams
    assert sum(coded for _, coded, _ in streams) < 1.01 * entropy + 60


def test_weights_that_decay_take_less_than_weights_that_step_either_way() -> None:
    rng = np.random.default_rng(8)
    old = rng.normal(0, 0.1, 150_000).astype(np.float32)
    steps = rng.integers(20, 60, old.shape).astype(np.int32)
    sizes = []
    for way in (steps, steps * rng.choice(np.array([-1, 1], np.int32), old.shape)):
        before, after = (weights_file({"w": array}) for array in (old, (old.view(np.int32) - way).view(np.float32)))
        patch = make_dense(before, after)
        assert applied(before, patch) == after
        sizes.append(len(patch))
    assert sizes[0] < 0.9 * sizes[1]


def test_only_tensors_that_changed_are_marked() -> None:
    weights = layers(6, (6, 256, 128, 1))
    old = model(weights)
    last: Layers = [*weights[:-1], nudged(weights[-1:], 7)[0]]
    new = model(last)
    patch = make_dense(old, new)
    names = [tensor.name for tensor in stored_tensors(old)]
    changed = [
        name for name, before, after in zip(names, _contents(old), _contents(new), strict=True) if before != after
    ]
    assert 0 < len(changed) < len(names)
    assert changed_tensors(BytesAccess(patch), old) == tuple(changed)
    with pytest.raises(DigestMismatch):
        changed_tensors(BytesAccess(patch), new)


def _contents(file: bytes) -> list[bytes]:
    return [file[tensor.offset : tensor.offset + tensor.size] for tensor in stored_tensors(file)]


@pytest.mark.parametrize("seed", range(4))
def test_files_that_do_not_align_cost_no_more_than_bsdiff_or_the_packed_file(seed: int) -> None:
    rng = np.random.default_rng(seed)
    text = b" ".join(rng.choice([b"edge", b"model", b"round", b"share"], 3000).tolist())
    pairs = [
        (b"", text),
        (text, b""),
        (rng.bytes(20_000), rng.bytes(20_000)),
        (text, text[5000:] + b"one more" + text[:9000]),
        (mlp_pair(seed)[0], model(layers(seed + 9, (6, 200, 1)))),
    ]
    for old, new in pairs:
        patch = make_dense(old, new)
        assert applied(old, patch) == new
        best = min(len(bsdiff4.diff(old, new)), len(new) + 8)
        assert len(patch) <= 1.02 * best + HEADER_BYTES + 8


def test_every_body_is_applied() -> None:
    text = b"the same words " * 500
    for kind, body in ((Body.BSDIFF40, bsdiff4.diff(OLD, text)), (Body.BROTLI, squeezed_whole(text, 18))):
        patch = patch_of(OLD, text, body, kind)
        assert applied(OLD, patch) == text
        info = inspect_dense(BytesAccess(patch))
        assert (info.header.body, info.unchanged) == (kind, None)
        for wrong in (patch[:-1], patch + b"x"):
            with pytest.raises(Malformed):
                applied(OLD, wrong)


def test_a_wrong_old_file_is_refused_before_a_byte_is_written() -> None:
    for wrong in (OLD[:-1], OLD[:-1] + bytes([OLD[-1] ^ 1]), b""):
        new = io.BytesIO()
        with pytest.raises(DigestMismatch, match="made for an"):
            apply_dense(BytesAccess(wrong), BytesAccess(PATCH), new, len(NEW))
        assert new.getvalue() == b""


@pytest.mark.parametrize("done", [0, 1, 2000, len(NEW) - 1, len(NEW)])
def test_an_interrupted_run_goes_on_where_it_stopped(done: int) -> None:
    new = io.BytesIO(NEW[:done] + b"torn page")
    assert apply_dense(BytesAccess(OLD), BytesAccess(PATCH), new, len(NEW), done) == len(NEW)
    assert new.getvalue()[: len(NEW)] == NEW
    if done:
        with pytest.raises((Malformed, DigestMismatch)):
            apply_dense(BytesAccess(OLD), BytesAccess(PATCH), io.BytesIO(b"x" + NEW[1:done]), len(NEW), done)
    with pytest.raises(Malformed, match="written already"):
        apply_dense(BytesAccess(OLD), BytesAccess(PATCH), io.BytesIO(), len(NEW), len(NEW) + 1)


@settings(max_examples=200)
@given(st.data())
def test_a_damaged_patch_is_refused(data: st.DataObject) -> None:
    patch = bytearray(PATCH)
    for _ in range(data.draw(st.integers(1, 3))):
        patch[data.draw(st.integers(0, len(patch) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(patch[: data.draw(st.integers(0, len(patch)))]) if data.draw(st.booleans()) else bytes(patch)
    with contextlib.suppress(Malformed, Untrusted):
        assert applied(OLD, damaged, len(NEW)) == NEW
    with contextlib.suppress(Malformed):
        inspect_dense(BytesAccess(damaged))


@given(st.binary(max_size=300), st.sampled_from(list(Body)))
def test_any_bytes_as_a_body_are_refused(body: bytes, kind: Body) -> None:
    with pytest.raises((Malformed, DigestMismatch)):
        applied(OLD, patch_of(OLD, NEW, body, kind), len(NEW))


def test_every_truncation_is_malformed() -> None:
    for length in range(0, len(PATCH), 7):
        with pytest.raises(Malformed):
            applied(OLD, PATCH[:length])
    with pytest.raises(Malformed, match="more bytes"):
        applied(OLD, PATCH + b"x")


SAME = bytes([Kind.SAME])
TEN = b"0123456789"


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        (patch_of(TEN, TEN, b"", window=19), r"window of 2\*\*10 to 2\*\*18"),
        (patch_of(TEN, TEN, b"", window=9), "window"),
        (patch_of(TEN, TEN, b"", kind=3), "newer version"),
        (patch_of(TEN, TEN, b"", new_size=2**31), "at most 100"),
        (patch_of(TEN, TEN, b"", new_size=2**63), "sizes of files"),
        (patch_of(TEN, TEN, head(11, {0: SAME + b"\x0b"})), "10 are missing"),
        (patch_of(TEN, TEN, head(10, {0: SAME + b"\x0b"})), "an operation makes 11"),
        (patch_of(TEN, TEN, head(10, {0: SAME + b"\x00"})), "an operation makes 0"),
        (patch_of(TEN, TEN, head(10, {0: SAME + b"\x0a"}, 1)), "outside an old file"),
        (patch_of(TEN, TEN, head(10, {0: bytes([0x40]) + b"\x01\x0a"})), "outside an old file"),
        (patch_of(TEN, TEN, head(10, {0: bytes([0x40]) + b"\x02\x0a"})), "outside an old file"),
        (patch_of(TEN, TEN, head(10, {0: SAME + b"\x0a" + SAME})), "left over"),
        (patch_of(TEN, TEN, head(10, {0: SAME + b"\x05"})), "1 more bytes"),
        (patch_of(TEN, TEN, head(10, {0: b"\x80\x0a"})), "expected an operation"),
        (patch_of(TEN, TEN, head(10, {0: b"\x07\x0a"})), "expected an operation"),
        (patch_of(TEN, TEN, head(10, {0: b"\x82\x0a", 6: TEN[:9]})), "10 more bytes of its literal stream"),
        (patch_of(TEN, TEN, head(10, {0: b"\x82\x0a", 6: TEN + b"!"})), "left over"),
        (patch_of(TEN, TEN, head(10, {0: b"\x05\x0a\x02"})), "expected an operation|an operation makes|more bytes"),
        (patch_of(TEN, TEN, head(10, {0: b"\x06\x0a\x02"})), "an operation makes 10"),
        (patch_of(TEN, TEN, head(10, {0: b"\x05\x0a\x00"})), "common divisor of 0"),
        (patch_of(TEN, TEN, head(10, {12: b"??"})), "unknown kinds"),
        (patch_of(TEN, TEN, b"\x0a\x00\x01\x80\x80\x80\x80\x08\x05hello"), "segments of at most"),
        (patch_of(TEN, TEN, b"\x0a\x00\x01\x05\x06hello!"), "is coded in 6"),
        (patch_of(TEN, TEN, b"\x0a\x00\x01\x05\x05hell"), "the patch at"),
        (patch_of(TEN, TEN, b"\x0a"), "more bytes of its segment's head"),
    ],
)
def test_hostile_patches(patch: bytes, message: str) -> None:
    with pytest.raises(Malformed, match=message):
        applied(TEN, patch, 100)


def test_the_hostile_patches_are_hostile_only_where_they_say() -> None:
    assert applied(TEN, patch_of(TEN, TEN, head(10, {0: SAME + b"\x0a"}))) == TEN
    assert applied(TEN, patch_of(TEN, TEN, head(10, {0: b"\x82\x0a", 6: TEN}))) == TEN
    assert applied(TEN, patch_of(TEN, TEN[5:], head(5, {0: bytes([0x40]) + b"\x0a\x05"}))) == TEN[5:]
    with pytest.raises(DigestMismatch, match="not the new file"):
        applied(TEN, patch_of(TEN, TEN, head(10, {0: b"\x82\x0a", 6: TEN[::-1]})))


def test_a_patch_that_declares_two_gibibytes_allocates_nothing() -> None:
    operation = Coded(Operation(Kind.BYTES, True, 0, 100), (), {tp1.LITERAL: bytes(100)})
    patches = [
        patch_of(TEN, TEN, segment(operation), new_size=2**31),
        patch_of(TEN, TEN, squeezed_whole(bytes(100), 18), Body.BROTLI, new_size=2**31),
        patch_of(TEN, TEN, head(2**31, {0: b"\x82\x80\x80\x80\x80\x08"}), new_size=2**31),
        patch_of(TEN, TEN, head(2**31, {0: SAME + b"\x80\x80\x80\x80\x08"}), new_size=2**31),
        patch_of(TEN, TEN, head(2**22, {0: b"\x01\x80\x80\x80\x02\xff\x7f\x00"}), new_size=2**31),
    ]
    tracemalloc.start()
    try:
        for patch in patches:
            with pytest.raises((Malformed, DigestMismatch)):
                applied(TEN, patch, 2**32)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file() -> None:
    peaks = []
    for size in (4_000_000, 16_000_000):
        old, new = sparse_pair(0.02, size)
        patch = make_dense(old, new)
        sink = io.BytesIO(bytes(len(new)))
        tracemalloc.start()
        apply_dense(BytesAccess(old), BytesAccess(patch), sink, len(new))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert sink.getvalue() == new
    assert max(peaks) < 2_000_000  # one segment and its arrays
