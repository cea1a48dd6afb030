"""The robustness benchmark measures what it says: gradients, splits, attacks, and the report's arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.attacks import BACKDOORS, UNTARGETED, Scene, dnc_aware, ipm, mimic, min_max, norm_edge
from benchmarks.robustness import NAMES, RULES, train
from benchmarks.robustness_report import Run, Runs, behind, claims, complete, plot, tables
from benchmarks.tasks import load, split


def scene(seed: int = 0) -> Scene:
    rng = np.random.default_rng(seed)
    honest = 1 + rng.normal(size=(24, 80))
    return Scene(honest, 1 + rng.normal(size=(8, 80)), 0, 10, lambda u: np.full(len(u), 1 / len(u)), rng)


def test_gradients_are_those_of_the_loss() -> None:
    task = load("cancer", 0)
    w = task.start(np.random.default_rng(0))
    x, y = task.x[:24].reshape(2, 12, -1), task.y[:24].reshape(2, 12)
    found = task.gradients(w, x, y)

    def loss(point: np.ndarray, device: int) -> float:
        scores = task.scores(point.astype(np.float32), x[device]).astype(np.float64)
        return float(-np.log(scores[np.arange(12), y[device]]).mean())

    rng = np.random.default_rng(1)
    for device in range(2):
        for _ in range(5):
            way = rng.normal(size=w.size)
            slope = (loss(w + 1e-3 * way, device) - loss(w - 1e-3 * way, device)) / 2e-3
            assert slope == pytest.approx(float(found[device] @ way), rel=0.02, abs=2e-3)


@pytest.mark.parametrize("alpha", [math.inf, 0.3])
def test_a_split_gives_every_row_to_one_device(alpha: float) -> None:
    task = load("cancer", 0)
    parts = split(task, 32, alpha, np.random.default_rng(0))
    rows = np.concatenate(parts)
    assert set(rows.tolist()) == set(range(400))
    assert min(part.size for part in parts) >= 8
    skew = np.std([task.y[part].mean() for part in parts])
    assert skew < 0.2 if math.isinf(alpha) else skew > 0.25


def test_attacks_keep_to_their_definitions() -> None:
    one = scene()
    far = np.linalg.norm(one.honest[:, None] - one.honest[None], axis=2).max()
    assert np.linalg.norm(min_max(one)[0] - one.honest, axis=1).max() <= far * 1.001
    assert np.allclose(ipm(0.5)(one), -0.5 * one.mean)
    assert (mimic(one)[0] == one.honest).all(axis=1).sum() == 1
    edge = norm_edge(one)[0]
    assert np.linalg.norm(edge) <= np.median(np.linalg.norm(one.honest, axis=1)) * 1.0001
    assert edge @ one.mean < 0
    centred = one.honest - one.mean
    top = np.linalg.svd(centred, full_matrices=False)[2][0]
    shift = dnc_aware(one).mean(axis=0) - one.mean
    assert abs(shift @ top) < 1e-6 * np.linalg.norm(shift)


@pytest.mark.parametrize("name", UNTARGETED | BACKDOORS)
def test_every_attack_answers_with_one_finite_vector_for_each_attacker(name: str) -> None:
    found = (UNTARGETED | BACKDOORS)[name](scene())
    assert found.shape == (8, 80)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("rule", RULES)
def test_the_same_order_gives_the_same_run(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.robustness.ROUNDS", 12)
    order = Run("cancer", 0.3, "search", rule, 8, 8, 1)
    assert train(order) == train(order)
    assert len(NAMES) == 32


def made_up() -> list[Run]:
    levels = {"FedAvg": 90.0, "Multi-Krum": 70.0, "robust": 85.0, "history": 88.0}
    found = []
    for seed in (1, 2):
        for alpha in (math.inf, 0.3):
            for rule, level in levels.items():
                found += [Run("digits", alpha, "", rule, 0, f, seed, level + 1) for f in (2, 8)]
                for attack in UNTARGETED:
                    less = 9.0 if (rule, attack) == ("history", "mimic") else 0.0
                    found.append(Run("digits", alpha, attack, rule, 8, 8, seed, level - less + seed))
                found += [Run("digits", alpha, attack, rule, 6, 8, seed, 0.0, 50.0) for attack in BACKDOORS]
        found.append(Run("digits", math.inf, "", "centralised", 0, 0, seed, 97.0))
    return found


def test_claims_are_losses_on_the_worst_task_and_a_lost_cell_is_named() -> None:
    values = {claim.id: claim for claim in claims(made_up())}
    assert values["robust.clean_loss"].value == 2
    assert values["robust.worst_iid"].value == 91 - 80.5
    assert not values["robust.worst_iid"].met
    assert values["robust.worst_0.3"].baseline == 91 - 86.5
    count, cells = behind(Runs(made_up()), "history", [0.3])
    assert count == len(UNTARGETED)
    assert cells == [(-6.0, "digits 0.3 mimic")]


def test_losses_are_paired_by_seed() -> None:
    easy = [Run("digits", alpha, "", "FedAvg", 0, 8, 3, 99.0) for alpha in (math.inf, 0.3)]
    values = {claim.id: claim for claim in claims([*made_up(), *easy])}
    assert values["robust.clean_loss"].value == 2, "seed 3 was trained by FedAvg alone"
    assert values["robust.worst_iid"].value == 91 - 80.5


def test_tables_and_plots_come_from_the_runs() -> None:
    runs = Runs(made_up())
    text = tables(runs)
    assert "| digits IID | 97.0 ± 0.0 |" in text
    assert "80.5 ± 0.5 mimic" in text
    assert plot(runs, "digits").count("<polyline") == 3


def test_a_seed_that_one_rule_lacks_is_left_out_of_the_cell_for_all() -> None:
    found = [Run("digits", 0.3, "mimic", rule, 8, 8, seed) for rule in ("Multi-Krum", "robust") for seed in (1, 2)]
    found += [Run("digits", 0.3, "mimic", "history", 8, 8, 1), Run("digits", 0.3, "mimic", "FedAdam", 8, 8, 2)]
    assert [(one.rule, one.seed) for one in complete(found)] == [
        ("Multi-Krum", 1),
        ("robust", 1),
        ("history", 1),
        ("FedAdam", 2),
    ]
