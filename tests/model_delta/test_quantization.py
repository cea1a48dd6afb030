"""The int8 rule by itself."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_delta.patch.quantization import (
    LEVELS,
    Measured,
    Parent,
    Worth,
    choose,
    dequantize,
    fresh_scales,
    locked_scales,
    on_grid,
    quantize,
    requantize,
)

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


def test_one_scale_for_the_whole_tensor() -> None:
    weight = np.array([[1.0, -2.0], [0.5, 0.25]], np.float32)
    scales = fresh_scales(weight, None)
    assert scales.shape == ()
    assert scales == np.float32(2 / LEVELS)
    assert (locked_scales(weight * np.float32(1.04), None, scales) == scales).all()
    assert (locked_scales(weight * np.float32(1.06), None, scales) > scales).all()
    assert (np.abs(dequantize(quantize(weight, scales, None), scales, None) - weight) <= scales * 0.5001).all()


@pytest.mark.parametrize("axis", [0, 1, None])
def test_an_integer_stays_where_the_weight_did_not_move(axis: int | None) -> None:
    rng = np.random.default_rng(1)
    old = rng.normal(0, 1, (16, 8)).astype(np.float32)
    scales = fresh_scales(old, axis)
    levels = quantize(old, scales, axis)
    levels[3, 3] += 1  # another rounding's tie
    new = old.copy()
    new[0] *= np.float32(1.02)
    found, kept = requantize(new, axis, Parent(levels, scales, old))
    assert (found[1:] == levels[1:]).all()
    assert (found[0] == quantize(new, scales, axis)[0]).all()
    assert (kept == scales).all()
    without, _ = requantize(new, axis, Parent(levels, scales))
    assert without[3, 3] != levels[3, 3]


def test_a_frozen_channel_keeps_even_a_scale_that_it_overflows() -> None:
    old = np.array([[2.0, 1.0]], np.float32)
    scales = np.array([0.01, 0.01], np.float32)  # 127 levels hold 1.27
    parent = Parent(np.array([[127, 100]], np.int8), scales, old)
    levels, kept = requantize(old, 1, parent)
    assert levels.tolist() == [[127, 100]]
    assert (kept == scales).all()
    moved, fresh = requantize(old + np.float32(0.1), 1, parent)
    assert fresh[0] > scales[0]
    assert moved[0, 0] == 127


def test_a_whole_dead_parent_scale_is_no_reason_to_keep_integers() -> None:
    old = np.ones((2, 2), np.float32)
    levels, scales = requantize(old, None, Parent(np.zeros((2, 2), np.int8), np.float32(0).reshape(()), old))
    assert (levels == LEVELS).all()
    assert scales > 0


steps = st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed))


@given(steps, st.sampled_from([1e-7, 1e-4, 1e-2, 1.0, 100.0]))
def test_the_grid_rounds_by_at_most_a_hundredth_and_a_step(rng: np.random.Generator, size: float) -> None:
    old = rng.normal(0, 1, 200).astype(np.float32)
    new = (old + old * rng.normal(0, size, 200)).astype(np.float32)
    found = on_grid(new, old)
    typical = np.median(np.abs(new / old - 1))
    assert (np.abs(found / new - 1) <= min(1 / 128, 8 * typical) + 1e-6).all()


def test_the_grid_leaves_what_did_not_move_and_carries_the_step() -> None:
    rng = np.random.default_rng(3)
    old = rng.normal(0, 1, 4096).astype(np.float32)
    new = (old * (1 + rng.normal(2e-4, 1e-3, 4096))).astype(np.float32)
    new[::4] = old[::4]
    found = on_grid(new, old)
    assert found[::4].tobytes() == old[::4].tobytes()
    low = (found.view(np.int32) - old.view(np.int32))[(found != old)] & 0xFFF
    assert (low == 0).all(), "the last bits stay the parent's"
    step, carried = (new - old).astype(np.float64), (found - old).astype(np.float64)
    assert 0.9 < step @ carried / (step @ step) < 1.1


def test_a_deployed_parent_that_was_rounded_keeps_its_numbers_where_training_moved_none() -> None:
    rng = np.random.default_rng(4)
    source = rng.normal(0, 1, 100).astype(np.float32)
    deployed = (source * np.float32(1.0001)).astype(np.float32)
    new = source.copy()
    new[:50] *= np.float32(1.01)
    found = on_grid(new, deployed, source)
    assert found[50:].tobytes() == deployed[50:].tobytes()
    assert (np.abs(found[:50] / new[:50] - 1) < 0.011).all()


def test_numbers_that_are_not_finite_and_few_steps_are_taken_as_they_are() -> None:
    old = np.linspace(1, 2, 100).astype(np.float32)
    new = (old * np.float32(1.001)).astype(np.float32)
    new[5], new[6] = np.nan, np.inf
    found = on_grid(new, old)
    assert np.isnan(found[5])
    assert found[6] == np.inf
    few = old.copy()
    few[:3] += np.float32(0.01)
    assert on_grid(few, old).tobytes() == few.tobytes()


def test_int8_only_where_it_measures_faster_or_smaller_enough() -> None:
    plain = Measured(1000, 100.0)
    assert choose(Measured(900, 90.0), plain).int8
    assert choose(Measured(300, 120.0), plain).int8
    assert not choose(Measured(300, 130.0), plain).int8
    assert not choose(Measured(900, 99.0), plain).int8
    assert not choose(Measured(300, float("nan")), plain).int8
    assert choose(Measured(300, 130.0), plain, Worth(slower_max=2.0)).int8, "a class may weigh bytes more"
    assert choose(Measured(500, 50.0), plain).reason == "int8 is faster: 0.50 of the bytes, 0.50 of the time"


@pytest.mark.parametrize("shape", [(), (1,), (64,), (8, 8), (2, 4, 8)])
def test_the_grid_keeps_the_shape(shape: tuple[int, ...]) -> None:
    old = np.full(shape, 2.0, np.float32)
    assert on_grid(old, old).shape == shape
    assert on_grid(np.full(shape, 2.5, np.float32), old).shape == shape


def test_many_rounds_on_the_grid_do_not_drift_away() -> None:
    rng = np.random.default_rng(6)
    source = rng.normal(0, 1, 1000).astype(np.float32)
    deployed = source
    for _ in range(50):
        trained = (source * (1 + rng.normal(1e-4, 1e-3, 1000))).astype(np.float32)
        deployed, source = on_grid(trained, deployed, source), trained
    assert np.abs(deployed / source - 1).max() < 2.5e-3, "a step or two, however many rounds"
    assert abs((deployed / source - 1).mean()) < 1e-4
