"""The int8 rule by itself."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_delta.patch.quantization import LEVELS, dequantize, fresh_scales, locked_scales, quantize

matrices = st.integers(0, 2**32 - 1).map(
    lambda seed: np.random.default_rng(seed).normal(0, 10.0 ** (seed % 7 - 4), (5, 4)).astype(np.float32)
)


@given(matrices, st.sampled_from([0, 1]))
def test_the_error_is_half_a_level(weight: np.ndarray, axis: int) -> None:
    scales = fresh_scales(weight, axis)
    found = dequantize(quantize(weight, scales, axis), scales, axis)
    step = scales[None, :] if axis == 1 else scales[:, None]
    assert scales.shape == (weight.shape[axis],)
    assert (np.abs(found - weight) <= step * 0.5001).all()


@given(matrices, st.sampled_from([0, 1]))
def test_quantizing_what_was_dequantized_changes_nothing(weight: np.ndarray, axis: int) -> None:
    scales = fresh_scales(weight, axis)
    levels = quantize(weight, scales, axis)
    again = dequantize(levels, scales, axis)
    assert (locked_scales(again, axis, scales) == scales).all()
    assert (quantize(again, scales, axis) == levels).all()


@pytest.mark.parametrize(("growth", "kept"), [(0.1, True), (1.0, True), (1.04, True), (1.06, False), (2.0, False)])
def test_a_scale_is_kept_up_to_five_percent_of_overflow(growth: float, kept: bool) -> None:
    parent = np.array([0.01, 0.02], np.float32)
    weight = np.array([[0.01 * LEVELS * growth, 0.0], [0.0, 0.02 * LEVELS]], np.float32)
    scales = locked_scales(weight, 1, parent)
    assert (scales[0] == parent[0]) == kept
    assert scales[1] == parent[1]
    assert np.abs(quantize(weight, scales, 1)).max() == LEVELS or growth < 1


@pytest.mark.parametrize("broken", [0.0, -1.0, np.nan, np.inf])
def test_a_parents_useless_scale_is_replaced(broken: float) -> None:
    weight = np.ones((2, 2), np.float32)
    scales = locked_scales(weight, 1, np.array([broken, 0.01], np.float32))
    assert scales.tolist() == [np.float32(1 / LEVELS), np.float32(0.01)]


def test_a_channel_of_zeros_wakes_up() -> None:
    scales = fresh_scales(np.zeros((3, 1), np.float32), 1)
    assert (quantize(np.zeros((3, 1), np.float32), scales, 1) == 0).all()
    weight = np.array([[1e-3], [0], [0]], np.float32)
    woken = locked_scales(weight, 1, scales)
    np.testing.assert_allclose(dequantize(quantize(weight, woken, 1), woken, 1), weight, rtol=1e-2)


def test_a_small_update_moves_few_levels() -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(0, 0.1, (256, 128)).astype(np.float32)
    updated = (weight + rng.normal(0, 1e-4, weight.shape)).astype(np.float32)
    scales = fresh_scales(weight, 1)
    before = quantize(weight, scales, 1)
    locked = quantize(updated, locked_scales(updated, 1, scales), 1)
    fresh = quantize(updated, fresh_scales(updated, 1), 1)
    assert (locked != before).mean() < 0.06
    assert (locked != before).sum() < (fresh != before).sum()
