"""The region's pure rules: limits, features, routing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_delta.digest import digest_of
from model_delta.errors import Malformed
from model_delta.plan import BUCKETS, Cohort, DeviceTraits, RolloutPlan, assign
from regional_gateway.features import vector_of
from regional_gateway.limits import Limit, take
from regional_gateway.protocol import Unauthorized
from regional_gateway.routing import Refusal, Route, choose, wanted
from regional_gateway.tenants import API_KEY_LENGTH_MAX, Tenant, Tenants

STABLE, TARGET = "a" * 64, "b" * 64


def plan(buckets: int = 0, target: str = TARGET, withdrawn: tuple[str, ...] = ()) -> RolloutPlan:
    return RolloutPlan(
        tenant="acme",
        model="fraud",
        name="r",
        serial=1,
        salt="salt",
        cohorts=(Cohort("pos", {"device_class": ("pos",)}),),
        target_buckets=buckets,
        target=target,
        stable=STABLE,
        withdrawn=withdrawn,
        issued=0,
        expires=1,
    )


def device(name: str = "") -> DeviceTraits:
    return DeviceTraits(name, "acme", "pos", "eu-west")


# --- limits ---


def admitted(limit: Limit, times: list[float]) -> list[bool]:
    full_at, answers = 0.0, []
    for now in times:
        full_at, wait = take(full_at, limit, now)
        answers.append(wait == 0.0)
    return answers


def test_a_burst_passes_and_the_next_waits_one_interval() -> None:
    limit = Limit(rate_per_second=10, burst=5)
    assert admitted(limit, [100.0] * 6) == [True] * 5 + [False]
    full_at = 0.0
    for _ in range(5):
        full_at, _ = take(full_at, limit, 100.0)
    _, wait = take(full_at, limit, 100.0)
    assert wait == pytest.approx(0.1)
    assert take(full_at, limit, 100.0 + wait)[1] == 0.0


@given(
    st.lists(st.floats(0, 0.2), min_size=1, max_size=200),
    st.floats(1, 1_000),
    st.integers(1, 50),
)
def test_no_window_ever_sees_more_than_burst_plus_rate(gaps: list[float], rate: float, burst: int) -> None:
    times = list(np.cumsum(gaps) + 1_000.0)
    passed = [now for now, good in zip(times, admitted(Limit(rate, burst), times), strict=True) if good]
    for start in range(len(passed)):
        for end in range(start, len(passed)):
            assert end - start + 1 <= burst + rate * (passed[end] - passed[start]) + 1e-6 * rate + 1e-3


# --- features ---


def test_features_are_put_in_the_models_order() -> None:
    vector = vector_of({"b": 2, "a": 1.5, "c": -3}, ("a", "b", "c"))
    assert vector.dtype == np.float32
    np.testing.assert_array_equal(vector, [[1.5, 2, -3]])


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"a": 1.0}, "expected 2 names, found missing b"),
        ({"a": 1.0, "b": 1.0, "hour": 3.0}, "expected 2 names, found unknown hour"),
        ({"a": 1.0, "B": 1.0}, "missing b; unknown B"),
        ({}, "missing a, b"),
        ({"a": 1.0, "b": 1e300}, "finite float32 numbers, found another kind in b"),
        ({"a": 1.0, "b": float("nan")}, "found another kind in b"),
    ],
)
def test_features_that_do_not_fit_are_named(features: dict[str, float], message: str) -> None:
    with pytest.raises(Malformed, match=message):
        vector_of(features, ("a", "b"))


def test_a_refusal_holds_no_value_and_stays_short() -> None:
    with pytest.raises(Malformed) as caught:
        vector_of({f"n{i}": 31337.0 for i in range(500)}, tuple(f"m{i}" for i in range(500)))
    assert "31337" not in str(caught.value)
    assert "and 492 more" in str(caught.value)
    assert len(str(caught.value)) < 400


# --- routing ---


def test_without_a_device_the_region_serves_stable_until_the_stage_covers_everybody() -> None:
    for buckets in (0, 1, 5_000, BUCKETS - 1):
        assert choose(plan(buckets), device()) == Route(STABLE, "", "stable")
    assert choose(plan(BUCKETS), device()) == Route(TARGET, STABLE, "target")


@given(st.integers(0, BUCKETS), st.text(min_size=1, max_size=20))
def test_a_device_and_its_region_agree(buckets: int, name: str) -> None:
    route = choose(plan(buckets), device(name))
    assert isinstance(route, Route)
    assert route.manifest == assign(plan(buckets), device(name)).manifest


def test_who_is_outside_the_cohorts_gets_stable() -> None:
    phone = DeviceTraits("phone-0001", "acme", "phone", "eu-west")
    assert choose(plan(BUCKETS), phone) == Route(STABLE, "", "excluded")


def test_a_withdrawn_version_never_answers() -> None:
    withdrawn = plan(BUCKETS, withdrawn=(TARGET,))
    for asker in (device(), device("pos-0001")):
        route = choose(withdrawn, asker)
        assert isinstance(route, Route)
        assert route.manifest == STABLE
        assert route.fallback == ""
    assert isinstance(choose(withdrawn, device(), TARGET), Refusal)
    assert wanted(withdrawn) == (STABLE,)
    refusal = choose(plan(withdrawn=(STABLE,)), device())
    assert isinstance(refusal, Refusal)
    assert "withdrawn" in refusal.reason


def test_a_version_can_be_asked_for_by_digest_or_a_long_prefix() -> None:
    assert choose(plan(), device(), TARGET) == Route(TARGET, "")
    assert choose(plan(), device(), TARGET[:12]) == Route(TARGET, "")
    for asked in (TARGET[:11], "c" * 64, "latest"):
        refusal = choose(plan(), device(), asked)
        assert isinstance(refusal, Refusal)
        assert STABLE[:12] in refusal.reason
        assert TARGET[:12] in refusal.reason


def test_a_tenant_is_known_by_any_of_its_keys_and_by_nothing_else() -> None:
    long = "k" * API_KEY_LENGTH_MAX
    tenants = Tenants(
        [Tenant("acme", (digest_of(b"one"), digest_of(long.encode()))), Tenant("globex", (digest_of(b"two"),))]
    )
    assert tenants.of("Bearer one") == tenants.of("bearer  one ") == tenants.of(f"Bearer {long}")
    assert (tenants.of("Bearer one").name, tenants.of("Bearer two").name) == ("acme", "globex")
    for nothing in ("", "Bearer", "Bearer ", "one", "Basic one", "Bearerone"):
        with pytest.raises(Unauthorized, match="found none"):
            tenants.of(nothing)
    for unknown in (
        "Bearer three",
        f"Bearer {digest_of(b'one')}",
        f"Bearer {long}k",
        f"Bearer one{' ' * 600}",
        "Bearer é",
    ):
        with pytest.raises(Unauthorized, match="found an unknown one"):
            tenants.of(unknown)
