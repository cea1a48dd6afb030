"""The gates of a requantized version: honest locking passes, a version that ignores the update does not."""

from __future__ import annotations

import math

import numpy as np
import pytest

from model_delta.patch.fidelity import Carried, Change, Fidelity, carried, distance, refusals
from model_delta.patch.quantization import (
    LEVELS,
    Levels,
    Parent,
    Weights,
    dequantize,
    fresh_scales,
    quantize,
    requantize,
)


class Round:
    """A matrix, its int8, and the matrix after an update that moves weights by a hundredth of a level."""

    def __init__(self, shape: tuple[int, int] = (1024, 512), size: float = 0.01) -> None:
        rng = np.random.default_rng(0)
        self.old: Weights = rng.normal(0, 0.1, shape).astype(np.float32)
        self.scales = fresh_scales(self.old, 1)
        self.levels = quantize(self.old, self.scales, 1)
        step = rng.normal(0, size, shape) * self.scales
        self.new: Weights = (self.old + step).astype(np.float32)

    def carried_by(self, levels: Levels, scales: Weights) -> Carried:
        before = dequantize(self.levels, self.scales, 1)
        fresh = fresh_scales(self.new, 1)
        anew = dequantize(quantize(self.new, fresh, 1), fresh, 1)
        change = Change("w", self.new - self.old, dequantize(levels, scales, 1) - before, anew - before)
        return carried([change])


def test_locked_scales_carry_the_update_as_well_as_fresh_ones() -> None:
    world = Round()
    found = world.carried_by(*requantize(world.new, 1, Parent(world.levels, world.scales, world.old)))
    assert found.moved
    assert found.share == pytest.approx(1, abs=0.1)
    assert found.error < 0.05
    assert refusals(Fidelity(carried=found)) == ()


def test_a_dead_zone_around_the_old_integers_is_refused() -> None:
    world = Round()
    position = world.new / world.scales
    kept = np.abs(position - world.levels) < 0.6
    levels = np.where(kept, world.levels, np.clip(np.rint(position), -LEVELS, LEVELS)).astype(np.int8)
    found = world.carried_by(levels, world.scales)
    assert found.share < 0.02
    (reason,) = refusals(Fidelity(distance=0.16, distance_fresh=0.16, carried=found))
    assert "carried share" in reason
    assert "the integers do not carry the update" in reason


def test_a_version_that_is_the_old_one_is_refused_however_well_it_answers() -> None:
    world = Round()
    found = world.carried_by(world.levels, world.scales)
    assert found.share == 0
    assert refusals(Fidelity(distance=0.0, distance_fresh=0.0, carried=found))


def test_nothing_can_be_said_of_a_handful_of_weights() -> None:
    world = Round((8, 4))
    found = world.carried_by(*requantize(world.new, 1, Parent(world.levels, world.scales, world.old)))
    assert refusals(Fidelity(carried=found)) == ()


def test_nothing_moved_and_nothing_known_are_no_refusal() -> None:
    zero = np.zeros((2, 2), np.float32)
    still = carried([Change("w", zero, zero, zero)])
    assert not still.moved
    assert refusals(Fidelity(carried=still)) == ()
    assert refusals(Fidelity()) == ()


def test_outputs_are_held_against_a_fresh_requantization() -> None:
    assert refusals(Fidelity(distance=0.163, distance_fresh=0.159)) == ()
    (reason,) = refusals(Fidelity(distance=0.165, distance_fresh=0.159))
    assert reason.startswith("outputs: expected 1 - cosine to float32 within 0.005")
    assert refusals(Fidelity(distance=float("nan"), distance_fresh=0.159))


def test_distance_is_one_minus_the_cosine() -> None:
    found = np.array([[1.0, 0.0], [1.0, 1.0]], np.float32)
    expected = np.array([[0.0, 2.0], [3.0, 3.0]], np.float32)
    assert distance(found, expected) == pytest.approx(0.5)
    column = np.array([[0.2], [0.9]], np.float32)
    assert distance(column, column) == pytest.approx(0)
    assert distance(column, column[::-1]) == pytest.approx(1 - 0.36 / 0.85)
    assert distance(np.zeros((1, 3)), np.zeros((1, 3))) == 0
    assert distance(np.zeros((1, 3)), np.ones((1, 3))) == 1
    assert math.isnan(distance(found, expected[:1]))
    assert math.isnan(distance(np.array([[np.nan, 1.0]]), np.array([[1.0, 1.0]])))
