"""The benchmark's own reference step, and that it notices another one."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from benchmarks import secure_aggregation, training
from device_sim.fraud_model import initial_layers
from model_delta.graphs.mlp import mlp_training_graph


def test_the_graph_is_the_reference_step_and_another_is_not() -> None:
    rng = np.random.default_rng(1)
    mean, scale = np.zeros(32, np.float32), np.ones(32, np.float32)
    start = training._flat([part for layer in initial_layers(training.SIZES, rng) for part in layer])
    batch = training._batch(rng)
    graph = mlp_training_graph(training.SIZES, mean, scale, training.POSITIVE, momentum=True)
    assert training._distance(graph, mean, scale, start, rng, *batch) <= 1e-6
    other = mlp_training_graph(training.SIZES, mean, scale, training.POSITIVE + 0.01, momentum=True)
    assert training._distance(other, mean, scale, start, rng, *batch) > 1e-5


def test_the_steps_that_are_timed_are_steps() -> None:
    rng = np.random.default_rng(1)
    mean, scale = np.zeros(32, np.float32), np.ones(32, np.float32)
    start = training._flat([part for layer in initial_layers(training.SIZES, rng) for part in layer])
    graph = mlp_training_graph(training.SIZES, mean, scale, training.POSITIVE, momentum=True)
    batches = [training._batch(rng) for _ in range(4)]
    by_runtime = training._by_runtime(graph, start, batches, 10)
    np.testing.assert_allclose(by_runtime, training._by_numpy(mean, scale, start, batches, 10), atol=1e-4)
    assert np.abs(by_runtime - start).max() > 0.01


def test_what_is_sent_is_clipped_and_rounded_to_the_bits() -> None:
    update = np.array([3.0, 4.0], np.float32)
    np.testing.assert_allclose(training._sent(update, None, 1.0, os.urandom), [0.6, 0.8])
    rounded = training._sent(update, 4, 1.0, os.urandom) * 16
    assert rounded.tolist() == np.rint(rounded).tolist()
    assert np.abs(rounded - [9.6, 12.8]).max() < 1
    assert 6 <= training._fewest_bits() <= 12


@pytest.mark.parametrize("last", [0.4, 9.9])
def test_the_plot_of_growth_shows_every_point_inside_its_frame(last: float) -> None:
    lines = {32: [(10_000, 0.02), (100_000, 0.07), (1_000_000, last)]}
    root = ElementTree.fromstring(secure_aggregation._plot(lines))
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    circles = root.findall("{http://www.w3.org/2000/svg}circle")
    assert len(circles) == 3
    assert all(0 < float(one.attrib["cx"]) < width and 0 < float(one.attrib["cy"]) < height for one in circles)
    assert f"n = 32: {last} s" in {one.text for one in root.iter("{http://www.w3.org/2000/svg}text")}
