"""How the delta benchmark measures, on numbers small enough to check by hand."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from benchmarks import all as all_subjects
from benchmarks import cost, deltas
from benchmarks.claims import at_most_share
from model_delta.graphs.int8 import quantize_weights
from model_delta.graphs.mlp import mlp_model
from model_delta.keys.keyring import EmbeddedKeyring
from tests.model_delta.models import FEATURES, layers, model, nudged


def file(step: float = 0.0) -> bytes:
    weight = np.linspace(1, 2, 64, dtype=np.float32).reshape(64, 1)
    moved = (weight * np.float32(1 + step)).astype(np.float32)
    return mlp_model([(moved, np.ones(1, np.float32))], np.zeros(64, np.float32), np.ones(64, np.float32))


def test_entropy_in_bytes() -> None:
    assert deltas.entropy_bytes(np.zeros(1000, np.uint8)) == 0
    assert deltas.entropy_bytes(np.arange(256, dtype=np.uint8)) == pytest.approx(256)
    assert deltas.entropy_bytes(np.array([0, 0, 0, 255], np.uint8)) == pytest.approx(4 * 0.8113 / 8, rel=1e-3)


def test_float_entropy_is_of_the_steps() -> None:
    assert deltas.float_entropy_bytes(file(), file()) == 0
    assert 0 < deltas.float_entropy_bytes(file(), file(1e-6)) < 64
    assert deltas.float_entropy_bytes(file(), file(1e-6)) < deltas.float_entropy_bytes(file(), file(0.3))


def test_an_update_is_described_by_the_tensors_it_moved() -> None:
    assert deltas.describe(file(), file(0.01)) == "relative norm 1.0e-02, 100.0% of 64 float32 weights"


def test_a_share_of_what_was_measured_beside_it() -> None:
    claim = at_most_share("x", 70.0, "B", 0.7, 100.0)
    assert (claim.ratio, claim.met, claim.target) == (0.7, True, "<= 0.7 x baseline")
    assert not at_most_share("x", 70.1, "B", 0.7, 100.0).met


def test_the_planner_takes_the_direct_patch(tmp_path: Path) -> None:
    sizes = (FEATURES, 96, 48, 1)
    weights = [layers(1, sizes)]
    for seed in range(3):
        weights.append(nudged(weights[-1], seed))
    sources = [model(one) for one in weights]
    versions = [quantize_weights(sources[0])]
    for before, source in pairwise(sources):
        versions.append(quantize_weights(source, versions[-1], before))
    chain, planned = deltas.behind(versions, EmbeddedKeyring.create(tmp_path / "keyring", "acme"))
    assert (planned.kind, len(planned.steps)) == ("patch", 1)
    assert 0 < planned.bytes < chain


def test_everything_of_the_table_is_one_command() -> None:
    assert {"checkin", "rewrap"} <= set(deltas.PARTS)


@pytest.mark.slow
def test_cost_is_that_of_a_process_of_its_own() -> None:
    ballast = bytes(200_000_000)  # the child's peak must not be this process's
    found = cost.of("benchmarks.patching:nothing")
    assert len(ballast) > 1e6 * found.peak_mb
    assert found.result == 0
    assert found.cpu_s < 0.1


def test_drawing_one_subject_keeps_the_sections_of_the_others() -> None:
    page = "# Benchmarks\n\nDrawn.\n\n## a\n\none\n\n## b\n\ntwo\n\n## b, more\n\nthree\n"
    assert all_subjects._kept(page, ("a",)) == ["## b\n\ntwo\n", "## b, more\n\nthree\n"]
    assert all_subjects._kept(page, ("b",)) == ["## a\n\none\n"]
