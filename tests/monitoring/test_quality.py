"""Quality figures against values worked out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitoring.quality import at_threshold, average_precision, threshold_for_false_positives


def test_average_precision_of_a_small_example() -> None:
    # ranks of the frauds: 1 and 3 -> (1/2) * 1/1 + (1/2) * 2/3
    assert average_precision([0.9, 0.8, 0.7, 0.1], [1, 0, 1, 0]) == pytest.approx(0.5 + 1 / 3)


def test_a_perfect_ranking_scores_one_and_the_worst_the_least() -> None:
    assert average_precision([3.0, 2.0, 1.0], [1, 1, 0]) == 1.0
    assert average_precision([3.0, 2.0, 1.0], [0, 0, 1]) == pytest.approx(1 / 3)


def test_all_scores_equal_gives_the_fraud_rate() -> None:
    assert average_precision(np.zeros(50), np.arange(50) < 5) == pytest.approx(0.1)


def test_no_fraud_gives_zero() -> None:
    assert average_precision([0.1, 0.2], [0, 0]) == 0.0
    assert average_precision([], []) == 0.0


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.booleans()), min_size=1, max_size=40), st.randoms()
)
def test_the_order_of_rows_does_not_matter(rows: list[tuple[float, bool]], random: object) -> None:
    shuffled = list(rows)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    first, second = (average_precision(*zip(*r, strict=True)) for r in (rows, shuffled))
    assert first == pytest.approx(second)
    assert 0.0 <= first <= 1.0


def test_rates_at_a_threshold() -> None:
    found = at_threshold([0.9, 0.6, 0.4, 0.2, 0.1], [1, 0, 1, 0, 0], 0.5)
    assert (found.precision, found.recall) == (0.5, 0.5)
    assert found.false_positive_rate == pytest.approx(1 / 3)
    assert found.alert_rate == 0.4


def test_a_threshold_above_all_scores_alerts_nobody() -> None:
    found = at_threshold([0.1, 0.2], [0, 1], 0.5)
    assert (found.precision, found.recall, found.alert_rate) == (0.0, 0.0, 0.0)


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.01, 0.1, 0.5]))
def test_the_chosen_threshold_keeps_its_promise(seed: int, rate: float) -> None:
    rng = np.random.default_rng(seed)
    scores, fraud = rng.random(200), rng.random(200) < 0.1
    threshold = threshold_for_false_positives(scores, fraud, rate)
    assert at_threshold(scores, fraud, threshold).false_positive_rate <= rate


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="3 scores for 2 labels"):
        average_precision([1, 2, 3], [0, 1])
    with pytest.raises(ValueError, match="not a number"):
        average_precision([float("nan")], [1])
