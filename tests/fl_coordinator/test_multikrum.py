"""Multi-Krum on integers, against a slow transcription of the paper, and the norm gate before it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_coordinator.rules import multikrum, selection
from fl_coordinator.rules.policy import Choice
from model_delta.errors import Malformed


def plain_multikrum(vectors: list[list[int]], hostile: int) -> tuple[list[int], list[int]]:
    """Scores and selection, by sums of squared differences in Python integers."""
    count = len(vectors)
    scores = []
    for i in range(count):
        distances = sorted(
            sum((a - b) ** 2 for a, b in zip(vectors[i], vectors[j], strict=True)) for j in range(count) if j != i
        )
        scores.append(sum(distances[: count - hostile - 2]))
    return scores, sorted(sorted(range(count), key=lambda i: (scores[i], i))[: count - hostile])


@given(
    st.integers(0, 3).flatmap(
        lambda hostile: st.tuples(
            st.just(hostile),
            st.lists(
                st.lists(st.integers(-1000, 1000), min_size=3, max_size=3),
                min_size=2 * hostile + 3,
                max_size=2 * hostile + 6,
            ),
        )
    )
)
@settings(max_examples=80, deadline=None)
def test_scores_and_selection_are_the_papers(case: tuple[int, list[list[int]]]) -> None:
    hostile, vectors = case
    matrix = np.array(vectors, dtype=np.int64)
    verdict = multikrum.select(matrix @ matrix.T, hostile)
    scores, selected = plain_multikrum(vectors, hostile)
    assert list(verdict.scores) == scores
    assert list(verdict.selected) == selected
    assert set(verdict.rejected) == set(range(len(vectors))) - set(selected)


def test_ties_go_to_the_lower_index() -> None:
    verdict = multikrum.select(np.ones((5, 5), dtype=np.int64), 1)
    assert verdict.selected == (0, 1, 2, 3)


def test_a_reason_says_how_far_off_the_score_was() -> None:
    vectors = np.array([[10, 0], [11, 0], [10, 1], [11, 1], [10, 2], [1000, 1000]], dtype=np.int64)
    verdict = multikrum.select(vectors @ vectors.T, 1)
    assert list(verdict.rejected) == [5]
    assert "x the median; the 5 lowest of 6 are kept" in verdict.rejected[5]


@pytest.mark.parametrize("count", [0, 1, 4])
def test_too_few_updates_are_refused_with_the_numbers(count: int) -> None:
    with pytest.raises(Malformed, match=f"at least 5 updates for 1 hostile ones, found {count}"):
        multikrum.select(np.eye(count, dtype=np.int64), 1)


def test_an_asymmetric_matrix_is_refused() -> None:
    with pytest.raises(Malformed, match="symmetric"):
        multikrum.select(np.arange(25).reshape(5, 5), 1)


def judged(vectors: np.ndarray, hostile_max: int, selected_min: int) -> Choice:
    names = [f"pos-{place}" for place in range(len(vectors))]
    return selection.decide(
        "krum",
        vectors @ vectors.T,
        names,
        squared_max=400,
        unit=10.0,
        clip_norm_l2=2.0,
        hostile_max=hostile_max,
        hostile_found=0,
        selected_min=selected_min,
    ).choice


def test_a_long_update_uses_up_one_of_the_hostile() -> None:
    vectors = np.array([[10, 0], [11, 0], [10, 1], [11, 1], [10, 2], [500, 0]], dtype=np.int64)
    found = judged(vectors, 1, 3)
    assert found.selected == (0, 1, 2, 3, 4)
    assert found.refused == {5: "norm 50 exceeds the clip norm 2"}
    assert len(found.verdicts) == 5


def test_fewer_selected_than_the_minimum_open_nothing() -> None:
    found = judged(np.array([[10, 0], [11, 0], [10, 1], [11, 1]], dtype=np.int64), 0, 5)
    assert found.selected == ()
    assert found.refusal == "4 updates selected, a sum of fewer than 5 is not opened"


def test_too_few_for_krum_open_nothing() -> None:
    found = judged(np.array([[10, 0], [11, 0], [10, 1], [11, 1]], dtype=np.int64), 1, 3)
    assert found.selected == ()
    assert found.refusal == "policy krum needs 5 usable updates to stand 1 hostile ones, found 4"
