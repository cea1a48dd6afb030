"""Hostile transforms do what their names say, and what was observed can be read back."""

from pathlib import Path

import numpy as np
import pytest

from device_sim.faults import (
    ATTACKS,
    ObservedUpdates,
    Vector,
    attack,
    collusion,
    noise,
    plain_average,
    scaled,
    sign_flip,
    tampered,
)
from model_delta.errors import Malformed
from model_delta.task import RoundTask

RNG = np.random.default_rng(1)
UPDATE = RNG.standard_normal(500).astype(np.float32)
TASK = RoundTask(
    tenant="acme",
    model="fraud",
    round_id="round-1",
    base="",
    training_graph="",
    parameters=(),
    length=500,
    issued=0,
    deadline=1,
)


def test_sign_flip_keeps_the_norm_and_turns_the_direction() -> None:
    np.testing.assert_array_equal(sign_flip(UPDATE, RNG), -UPDATE)


def test_scaled_turns_and_enlarges() -> None:
    np.testing.assert_allclose(scaled(5.0)(UPDATE, RNG), -5 * UPDATE, rtol=1e-6)


def test_noise_has_the_asked_norm_and_no_direction() -> None:
    sent = noise(2.0)(UPDATE, np.random.default_rng(0))
    assert np.linalg.norm(sent) == pytest.approx(2 * np.linalg.norm(UPDATE), rel=1e-4)
    assert abs(float(sent @ UPDATE)) < 0.2 * np.linalg.norm(sent) * np.linalg.norm(UPDATE)


def test_colluders_send_one_direction_whatever_they_learned() -> None:
    first, second = (collusion(1.0, 9)(u, np.random.default_rng(i)) for i, u in enumerate((UPDATE, -3 * UPDATE)))
    cosine = float(first @ second) / float(np.linalg.norm(first) * np.linalg.norm(second))
    assert cosine == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("name", list(ATTACKS))
def test_every_attack_keeps_shape_and_type_and_is_seeded(name: str) -> None:
    sent = [attack(name, 3.0, 5)(UPDATE, np.random.default_rng(2)) for _ in range(2)]
    assert sent[0].shape == UPDATE.shape
    assert sent[0].dtype == np.float32
    np.testing.assert_array_equal(sent[0], sent[1])
    assert not np.allclose(sent[0], UPDATE)
    assert np.array_equal(attack(name, 3.0, 5)(np.zeros(4, np.float32), np.random.default_rng(2)), np.zeros(4))


def test_an_unknown_attack_is_named() -> None:
    with pytest.raises(Malformed, match="expected one of sign-flip, scaled, noise, collusion, found 'magic'"):
        attack("magic", 1.0, 0)


def test_a_tampered_device_sends_and_shows_the_same_vector(tmp_path: Path) -> None:
    seen: list[Vector] = []

    def contribute(update: Vector, task: RoundTask) -> bytes:
        seen.append(update)
        return task.round_id.encode()

    kept = ObservedUpdates(tmp_path)
    honest = tampered(contribute, "pos-0002", np.random.default_rng(0), None, kept.write)
    hostile = tampered(contribute, "pos-0001", np.random.default_rng(0), scaled(4.0), kept.write)
    assert honest(UPDATE, TASK) == hostile(UPDATE, TASK) == b"round-1"
    read = list(kept.read("round-1"))
    assert [(name, lies) for name, _, lies in read] == [("pos-0001", True), ("pos-0002", False)]
    np.testing.assert_array_equal(read[0][1], seen[1])
    np.testing.assert_array_equal(read[1][1], seen[0])
    np.testing.assert_allclose(plain_average([update for _, update, _ in read]), -1.5 * UPDATE, rtol=1e-5)


def test_nothing_is_written_when_nobody_observes(tmp_path: Path) -> None:
    tampered(lambda update, task: b"", "pos-0001", np.random.default_rng(0), sign_flip)(UPDATE, TASK)
    assert list(tmp_path.iterdir()) == []
    assert list(ObservedUpdates(tmp_path).read("round-1")) == []


def test_a_name_cannot_leave_the_folder(tmp_path: Path) -> None:
    with pytest.raises(Malformed, match="observed update"):
        ObservedUpdates(tmp_path).write("../x", "pos-0001", UPDATE, False)


def test_an_average_of_nothing_is_refused() -> None:
    with pytest.raises(Malformed, match="no updates"):
        plain_average([])
