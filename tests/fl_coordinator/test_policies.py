"""Policies on Gram matrices: what they refuse, what they say about it, and that bits do not depend on the machine."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fl_coordinator.rules import doubt, geometry, history, multikrum, outliers, policy, selection, spectral
from fl_coordinator.rules.history import Memory
from model_delta.errors import Malformed

NAMES = tuple(f"pos-{index:02d}" for index in range(24))
HOSTILE = 6


def updates(seed: int = 0, hostile: int = HOSTILE, push: float = -1.0) -> NDArray[np.int64]:
    """24 updates int64[24, 200] around a common direction; the first `hostile` go `push` times that direction."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=200)
    found = common + rng.normal(size=(24, 200))
    found[:hostile] = push * common + rng.normal(size=(hostile, 200))
    return np.asarray(np.rint(found * 1_000).astype(np.int64))


def chosen(name: str, vectors: NDArray[np.int64], memory: Memory | None = None) -> policy.Choice:
    return policy.choose(
        name, vectors @ vectors.T, HOSTILE, NAMES[: len(vectors)], selected_min=8, memory=memory, share_max=0.2
    )


@pytest.mark.parametrize("name", policy.POLICIES)
def test_every_policy_keeps_out_those_who_push_back(name: str) -> None:
    found = chosen(name, updates())
    assert not set(found.selected) & set(range(HOSTILE))
    assert set(found.refused) == set(range(24)) - set(found.selected)
    assert found.weights.sum() == pytest.approx(1, abs=0.1)
    assert found.integers.max() <= 1 << policy.weight_bits(name)
    assert found.refusal == ""


@pytest.mark.parametrize("name", policy.POLICIES)
def test_the_reason_names_what_is_striking(name: str) -> None:
    vectors = updates(push=-9.0)
    found = chosen(name, vectors)
    lengths = np.linalg.norm(vectors.astype(float), axis=1)
    centre = np.median(lengths)
    sigma = (lengths[0] - centre) / (1.4826 * np.median(np.abs(lengths - centre)))
    assert f"norm {sigma:.1f} sigma above the median" in found.refused[0]
    assert found.verdicts[0].cluster != 0
    assert "outside the largest DBSCAN cluster" in found.refused[0]


def test_robust_is_clip_then_dnc() -> None:
    vectors = updates(3, push=0.2)
    lengths = np.linalg.norm(vectors.astype(float), axis=1)
    factors = np.minimum(1, np.median(lengths) / lengths)
    short = vectors * factors[:, None]
    centred = short - short.mean(axis=0)
    top = np.linalg.svd(centred, full_matrices=False)[2][0]
    dropped = np.argsort(-np.abs(centred @ top))[:9]
    found = chosen("robust", vectors)
    assert set(found.refused) == set(dropped.tolist())
    expected = np.where(np.isin(np.arange(24), dropped), 0, factors) / 15
    assert np.abs(found.weights - expected).max() <= 1 / 15 / 256 + 1e-12


def test_who_stands_out_by_far_is_refused_and_who_does_not_keeps_a_quarter() -> None:
    found = chosen("history", updates(3, push=-1.0))
    assert set(found.refused) == set(range(HOSTILE))
    assert found.refused[0].startswith("suspicion ")
    # Nine may be doubted. The six who are refused use them up, and a quarter of the nine remains.
    assert int((found.integers[HOSTILE:] <= policy.WEIGHT_FULL / 4).sum()) == 3
    nobody = chosen("history", updates(3, hostile=0))
    assert not nobody.refused
    assert int((nobody.integers <= policy.WEIGHT_FULL / 4).sum()) == 9


def test_one_round_hides_who_works_against_the_others_and_memory_finds_it() -> None:
    rng = np.random.default_rng(2)
    own = rng.normal(size=(24, 300)) * 3  # Every device differs from the others more than it pushes.
    memory, missed = Memory(), []
    for _ in range(30):
        common = rng.normal(size=300)
        vectors = own + common + 2 * rng.normal(size=(24, 300))
        vectors[:HOSTILE] -= 0.5 * common
        found = chosen("history", np.rint(vectors * 1_000).astype(np.int64), memory)
        memory = found.memory
        highest = np.argsort([-verdict.history for verdict in found.verdicts])[:HOSTILE]
        missed.append(len(set(range(HOSTILE)) - set(highest.tolist())))
    assert missed[0] >= 1
    assert missed[-5:] == [0] * 5


def noisy(rng: np.random.Generator, noise: int) -> NDArray[np.int64]:
    """24 updates int64[24, 2000] of devices that differ more than they agree; the first `noise` are noise as long."""
    found = rng.normal(size=2_000) + 2 * np.repeat(rng.normal(size=(6, 2_000)), 4, axis=0)
    found[:noise] = np.sqrt(5) * rng.normal(size=(noise, 2_000))
    return np.rint((found + 2 * rng.normal(size=(24, 2_000))) * 1_000).astype(np.int64)


def test_noise_is_refused_however_much_devices_differ_and_nobody_is_doubted_on_its_account() -> None:
    rng, memory = np.random.default_rng(4), Memory()
    for _ in range(5):
        found = chosen("history", noisy(rng, HOSTILE), memory)
        memory = found.memory
        assert set(found.refused) == set(range(HOSTILE))
        assert found.refused[0].startswith("nothing in common with any other device over the remembered rounds")
        assert found.integers[HOSTILE:].min() > policy.WEIGHT_FULL / 2


@pytest.mark.parametrize("noise", [0, 9])
def test_at_most_f_are_refused_as_noise(noise: int) -> None:
    vectors = noisy(np.random.default_rng(5), noise)
    past = history.recall(Memory(), NAMES, vectors @ vectors.T)
    assert np.flatnonzero(history.unrelated(past, 24)).tolist() == list(range(noise))
    assert history.unrelated(past, HOSTILE).sum() == min(noise, HOSTILE)


def test_who_has_learned_its_rows_is_no_noise_and_pairs_that_met_in_other_rounds_do_not_overflow() -> None:
    rng, memory = np.random.default_rng(6), Memory()
    for short in (slice(0, 6), slice(6, 12)):
        vectors = noisy(rng, 0)
        vectors[short] = rng.integers(-1, 2, size=(6, 2_000))  # What rounding leaves of an update of length zero.
        past = history.recall(memory, NAMES, vectors @ vectors.T)
        assert not history.unrelated(past, HOSTILE).any()
        memory = past.memory(np.full(24, 128))


def test_copies_are_doubted_as_one_and_refused_together() -> None:
    vectors = updates(9)
    vectors[:HOSTILE] = -vectors[HOSTILE:].mean(axis=0)
    found = chosen("history", vectors)
    assert set(found.refused) == set(range(HOSTILE))
    assert int((found.integers[HOSTILE:] <= policy.WEIGHT_FULL / 4).sum()) == 2


def doubted(found: int, copies: int, noise: int) -> tuple[int, int]:
    """How many of 32 devices have no voice and a quarter, f = 8: the first `found` stand out by far, the first `copies`
    sent the same, the first `noise` are noise."""
    same = np.ones(32, dtype=np.int64)
    same[:copies] = max(copies, 1)
    suspicion = np.where(np.arange(32) < found, 9.0, np.linspace(2, 1, 32))
    voices = doubt.voices(same, suspicion, np.arange(32) < noise, 8).integers
    return int((voices == 0).sum()), int((voices == doubt.VOICE // 4).sum())


@pytest.mark.parametrize(
    ("found", "copies", "noise", "expected"),
    [
        (0, 0, 0, (0, 12)),  # 1.5 f
        (4, 0, 0, (4, 6)),
        (8, 0, 0, (8, 3)),  # Never less than a quarter of it
        (8, 8, 0, (8, 2)),  # of which copies were one.
        (0, 0, 4, (4, 6)),
        (0, 0, 8, (8, 0)),  # unless f are certain.
        (8, 0, 4, (8, 2)),
    ],
)
def test_whoever_is_found_takes_one_and_a_half_of_the_doubted_along(
    found: int, copies: int, noise: int, expected: tuple[int, int]
) -> None:
    assert doubted(found, copies, noise) == expected


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 20), min_size=1, max_size=40), st.integers(0, 12), st.integers(0, 12))
def test_no_more_than_one_and_a_half_f_lose_their_voice(values: list[float], hostile: int, noise: int) -> None:
    count = len(values)
    certain = np.arange(count) < min(noise, hostile)
    ones = np.ones(count, dtype=np.int64)
    voices = doubt.voices(ones, np.array(values), certain, hostile).integers
    assert int((voices == 0).sum()) <= -(-3 * hostile // 2)
    assert int((voices < doubt.VOICE).sum()) <= -(-3 * hostile // 2)
    assert set(voices.tolist()) <= {0, doubt.VOICE // 4, doubt.VOICE}


def test_differences_that_are_tiny_are_no_evidence() -> None:
    values = np.array([1.0, 1.001, 1.002, 1.003, 1.02])
    assert geometry.robust_sigmas(values)[-1] > 6
    assert geometry.robust_sigmas(values, 0.05)[-1] < 0.5


def test_nothing_opened_is_nothing_to_have_gone_along_with() -> None:
    vectors = updates(6)
    refused = policy.choose("history", vectors @ vectors.T, HOSTILE, NAMES, selected_min=100)
    assert refused.refusal
    assert not np.frombuffer(refused.memory.along, dtype="<i8").any()
    assert np.frombuffer(chosen("history", vectors).memory.along, dtype="<i8").any()


def test_copies_count_as_one_voice_and_use_up_the_assumed_attackers() -> None:
    vectors = updates(7, hostile=0)
    vectors[1:5] = vectors[0]
    found = chosen("history", vectors)
    assert [verdict.copies for verdict in found.verdicts[:6]] == [5, 5, 5, 5, 5, 1]
    assert found.weights[:5].sum() <= 1.05 / 18
    others = [index for index in range(5, 24) if found.integers[index] <= policy.WEIGHT_FULL / 4]
    assert len(others) <= 9 - 4
    loud = np.concatenate([90 * vectors[:5], vectors[5:]])
    assert chosen("multikrum", loud).refused[0].endswith("; the same update as 4 others")


def test_a_memory_follows_devices_not_rows() -> None:
    vectors = updates(1)
    order = np.random.default_rng(0).permutation(24)
    first = chosen("history", vectors).memory
    gram = vectors[order] @ vectors[order].T
    moved = policy.choose("history", gram, HOSTILE, [NAMES[i] for i in order], selected_min=8, memory=first)
    straight = chosen("history", vectors, first)
    assert {NAMES[order[i]] for i in moved.selected} == {NAMES[i] for i in straight.selected}


def test_a_memory_is_bounded_and_keeps_those_seen_last() -> None:
    memory = Memory()
    for start in range(0, 3_000, 500):
        names = [f"device-{index}" for index in range(start, start + 500)]
        past = history.recall(memory, names, np.eye(500, dtype=np.int64) * geometry.UNIT)
        memory = past.memory(np.full(500, 128))
    assert len(memory.device_ids) == history.REMEMBERED_MAX
    assert memory.device_ids[0] == "device-2500"
    assert "device-2499" in memory.device_ids


def test_a_broken_memory_is_refused() -> None:
    with pytest.raises(Malformed, match="expected 8 bytes for 1 devices, found 3"):
        history.recall(Memory(("a",), b"abc", b"abc"), ["a"], np.zeros((1, 1), dtype=np.int64))


def test_too_few_too_heavy_and_unknown_open_nothing() -> None:
    few = chosen("robust", updates()[:14])
    assert few.refusal == "policy robust needs 15 usable updates to stand 6 hostile ones, found 14"
    vectors = updates()
    small = policy.choose("robust", vectors @ vectors.T, HOSTILE, NAMES, selected_min=16)
    assert small.refusal == "15 updates selected, a sum of fewer than 16 is not opened"
    heavy = policy.choose("krum", vectors @ vectors.T, HOSTILE, NAMES, selected_min=8, share_max=0.05)
    assert heavy.refusal == "one device would carry 6% of the sum, more than 5% is not opened"
    assert not few.integers.any()
    assert not small.integers.any()
    assert not heavy.integers.any()
    with pytest.raises(Malformed, match=r"expected one of .*krum.*, found 'mean'"):
        chosen("mean", vectors)


@pytest.mark.parametrize("name", policy.POLICIES)
def test_equal_updates_and_zero_updates_are_no_accident(name: str) -> None:
    for vectors in (np.ones((24, 5), dtype=np.int64), np.zeros((24, 5), dtype=np.int64)):
        found = policy.choose(name, vectors @ vectors.T, HOSTILE, NAMES, selected_min=8, share_max=1.0)
        assert len(found.verdicts) == 24
        assert np.isfinite(found.weights).all()


matrices = st.integers(0, 2**32).map(lambda seed: np.random.default_rng(seed))


@settings(max_examples=25, deadline=None)
@given(matrices, st.integers(15, 24), st.integers(0, 5), st.sampled_from(sorted(policy.POLICIES)))
def test_weights_follow_the_devices_when_they_change_places(
    rng: np.random.Generator, count: int, hostile: int, name: str
) -> None:
    vectors = rng.integers(-(1 << 20), 1 << 20, size=(count, 60)) * rng.integers(1, 30, size=(count, 1))
    order = rng.permutation(count)
    names = NAMES[:count]
    straight = policy.choose(name, vectors @ vectors.T, hostile, names, selected_min=1)
    moved = policy.choose(name, vectors[order] @ vectors[order].T, hostile, [names[i] for i in order], selected_min=1)
    assert np.array_equal(straight.integers[order], moved.integers)
    assert moved.divisor == straight.divisor


@settings(max_examples=25, deadline=None)
@given(matrices, st.integers(4, 60))
def test_spectral_scores_do_not_depend_on_the_order_of_addition(rng: np.random.Generator, count: int) -> None:
    vectors = rng.normal(size=(count, 30)) + 2 * rng.normal(size=(count, 1)) * rng.normal(size=30)
    gram = np.rint(vectors @ vectors.T * 1_000).astype(np.int64)
    found = spectral.scores(gram)
    exact = spectral.centred(gram).astype(object)
    power = [[int(value) for value in row] for row in exact]
    _, expected = np.linalg.eigh(np.array(power, dtype=np.float64))
    assert np.allclose(np.sqrt(found / found.sum()), np.abs(expected[:, -1]), atol=2e-3)
    order = rng.permutation(count)
    assert np.array_equal(spectral.scores(gram[np.ix_(order, order)]), found[order])


def test_weight_is_the_diagonal_of_the_fourth_power_in_whatever_order() -> None:
    rng = np.random.default_rng(8)
    vectors = rng.normal(size=(30, 50))
    vectors[:5] += 2 * rng.normal(size=50)
    gram = np.rint(vectors @ vectors.T * 100_000).astype(np.int64)
    found = spectral.weight(gram)
    exact = spectral.centred(gram).astype(np.float64)
    fourth = np.diagonal(np.linalg.matrix_power(exact, 4))
    assert np.allclose(found / found.sum(), fourth / fourth.sum(), rtol=1e-3)
    order = rng.permutation(30)
    assert np.array_equal(spectral.weight(gram[np.ix_(order, order)]), found[order])


@pytest.mark.parametrize("count", [0, 1, 2])
def test_next_to_nobody_is_judged_without_an_accident(count: int) -> None:
    found = policy.choose("history", np.ones((count, count), dtype=np.int64), 0, NAMES[:count], selected_min=1)
    assert len(found.verdicts) == count
    assert found.refusal


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_dbscan_finds_two_groups_and_a_pair_that_is_too_few(metric: str) -> None:
    """Of 23 devices a quarter are 5: so many within the radius make a core."""
    rng = np.random.default_rng(5)
    centres = np.repeat([[9e6, 0, 0], [0, 9e6, 0], [0, 0, 9e6]], [16, 5, 2], axis=0)
    lengths = 1.0 if metric == "euclidean" else rng.uniform(0.1, 10, size=(23, 1))
    spots = np.rint(lengths * (centres + rng.normal(size=(23, 3)) * 1_000)).astype(np.int64)
    order = rng.permutation(23)
    found = outliers.clusters((spots @ spots.T)[np.ix_(order, order)], metric)
    assert found[np.argsort(order)].tolist() == [0] * 16 + [1] * 5 + [-1] * 2


@pytest.mark.parametrize(("names", "hostile"), [(NAMES[:-1], HOSTILE), (NAMES, -1)])
def test_names_that_do_not_fit_the_matrix_are_refused(names: tuple[str, ...], hostile: int) -> None:
    vectors = updates()
    with pytest.raises(Malformed, match="24 rows do not fit"):
        policy.choose("robust", vectors @ vectors.T, hostile, names, selected_min=8)


def test_extreme_entries_are_exact_or_refused() -> None:
    top = np.full((5, 5), 1 << 58, dtype=np.int64)
    assert multikrum.scores(top, 1) == (0,) * 5
    with pytest.raises(Malformed, match="entries up to 2\\^58"):
        policy.choose("robust", top + 1, 1, NAMES[:5], selected_min=1)
    least = np.full((5, 5), np.iinfo(np.int64).min, dtype=np.int64)
    with pytest.raises(Malformed, match="entries up to 2\\^58, found 9223372036854775808"):
        geometry.checked(least)


def test_what_is_longer_than_the_clip_is_refused_first_and_uses_up_one_attacker() -> None:
    vectors = updates(2, hostile=5)
    vectors[5] *= 50
    limit = int(1.5 * np.linalg.norm(vectors[6:].astype(float), axis=1).max())
    judged = selection.decide(
        "robust",
        vectors @ vectors.T,
        NAMES,
        squared_max=limit * limit,
        unit=float(limit),
        clip_norm_l2=1.0,
        hostile_max=6,
        hostile_found=0,
        selected_min=8,
    )
    found = judged.choice
    assert 5 not in judged.kept
    assert found.refused[5].startswith("norm ")
    assert found.refused[5].endswith("exceeds the clip norm 1")
    assert set(range(6)) <= set(found.refused)
    assert len(found.refused) == 1 + 8
    assert len(found.verdicts) == 23
    assert found.integers.shape == (24,)
