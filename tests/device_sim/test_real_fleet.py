"""The fleet's shell with devices that behave: pace, feedback, crashes, and a clean end."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import count

import numpy as np
import pytest

from device_sim.real_fleet import FleetCounts, LabelledHistory, Member, Pace, PaymentDevice, run_fleet
from device_sim.scenario import Sample
from model_delta.errors import Unavailable
from monitoring.telemetry import Decision

NAMES = ("amount", "hour")
FAST = Pace(payments_per_second=400.0, feedback_delay_s=0.01, start_spread_s=0.0, restart_pause_s=0.01)


class FakeDevice:
    """Declines amounts above 100; crashes after `lifetime` decisions when that is set."""

    def __init__(self, lifetime: int = 0) -> None:
        self.lifetime = lifetime
        self.decided: list[str] = []
        self.told: dict[str, bool] = {}
        self.closed = False
        self._crash = asyncio.Event()

    async def run(self) -> None:
        await self._crash.wait()
        raise RuntimeError("flash memory is gone")

    async def decide(self, features: Mapping[str, float]) -> Decision:
        if features["amount"] < 0:
            raise Unavailable("no amount")
        name = f"{id(self)}-{len(self.decided)}"
        self.decided.append(name)
        if self.lifetime and len(self.decided) >= self.lifetime:
            self._crash.set()
        approved = features["amount"] <= 100
        return Decision(
            decision_id=name,
            manifest="m",
            where="device",
            score=0.0 if approved else 1.0,
            approved=approved,
            latency_us=5,
        )

    def feedback(self, decision_id: str, fraud: bool) -> None:
        self.told[decision_id] = fraud


class Shop:
    """Opens devices and remembers them."""

    def __init__(self, lifetimes: Iterator[int]) -> None:
        self.opened: list[FakeDevice] = []
        self._lifetimes = lifetimes

    @asynccontextmanager
    async def open(self) -> AsyncIterator[PaymentDevice]:
        device = FakeDevice(next(self._lifetimes))
        self.opened.append(device)
        try:
            yield device
        finally:
            device.closed = True


def payments() -> Iterator[Sample]:
    for number in count():
        fraud = number % 5 == 0
        yield Sample(number, {"amount": 500.0 if fraud else 20.0, "hour": float(number % 24)}, fraud)


def member(name: str, open_device: Callable[[], AbstractAsyncContextManager[PaymentDevice]]) -> Member:
    return Member(name, open_device, payments(), LabelledHistory(NAMES, rows_max=50))


def run_until(condition: Callable[[], bool], members: list[Member], counts: FleetCounts, **options: object) -> None:
    """Run the fleet until `condition` holds, then cancel it as Ctrl-C does. Fails after a minute."""

    async def main() -> None:
        fleet = asyncio.create_task(run_fleet(members, FAST, 1, counts, **options))  # type: ignore[arg-type]
        async with asyncio.timeout(60):
            while not condition() and not fleet.done():  # noqa: ASYNC110 - counts are plain numbers
                await asyncio.sleep(0.005)
        fleet.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fleet
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_payments_are_answered_told_and_kept_for_training() -> None:
    shops = [Shop(iter([0])) for _ in range(3)]
    counts = FleetCounts()
    members = [member(f"pos-{i:04d}", shop.open) for i, shop in enumerate(shops)]
    seen: list[tuple[str, bool, bool]] = []
    run_until(
        lambda: counts.feedback >= 90,
        members,
        counts,
        note=lambda name, decision, sample: seen.append((name, decision.approved, sample.fraud)),
    )
    assert counts.decisions == len(seen) == sum(len(shop.opened[0].decided) for shop in shops)
    assert counts.frauds == counts.declined == sum(fraud for _, _, fraud in seen)
    for shop, one in zip(shops, members, strict=True):
        device = shop.opened[0]
        assert device.closed
        assert [device.told[name] for name in device.decided[:10]] == [i % 5 == 0 for i in range(10)]
        features, labels = one.history.arrays()
        assert features.shape == (len(one.history), 2)
        np.testing.assert_array_equal(labels == 1, features[:, 0] == 500)


def test_a_crash_is_followed_by_a_restart_and_the_other_device_does_not_notice(
    caplog: pytest.LogCaptureFixture,
) -> None:
    weak, strong = Shop(iter([5, 5, 0])), Shop(iter([0]))
    counts = FleetCounts()
    members = [member("pos-0001", weak.open), member("pos-0002", strong.open)]
    run_until(lambda: len(weak.opened) == 3 and len(weak.opened[2].told) > 12, members, counts)
    assert counts.restarts == {"pos-0001": 2}
    assert "pos-0001: RuntimeError: flash memory is gone" in counts.last_crash
    assert "pos-0001 crashed (RuntimeError: flash memory is gone); restart in" in caplog.text
    assert len(strong.opened) == 1
    assert all(device.closed for device in weak.opened)
    told = {name for device in weak.opened for name in device.told}
    assert set(weak.opened[0].decided) <= told, "feedback for decisions before the crash must still arrive"


class NoBroker:
    """A device whose broker is away."""

    async def __aenter__(self) -> PaymentDevice:
        raise Unavailable("broker 127.0.0.1:1 does not answer")

    async def __aexit__(self, *failure: object) -> None:
        raise AssertionError("was never entered")


def test_a_device_that_cannot_be_opened_is_tried_again_with_growing_pauses(caplog: pytest.LogCaptureFixture) -> None:
    counts = FleetCounts()
    run_until(lambda: counts.restarts.get("pos-0001", 0) >= 3, [member("pos-0001", NoBroker)], counts)
    pauses = [float(record.args[-1]) for record in caplog.records[:3]]  # type: ignore[index, arg-type]
    assert pauses == pytest.approx([0.01, 0.02, 0.04])


def test_a_payment_that_cannot_be_answered_is_counted_and_the_device_goes_on() -> None:
    shop = Shop(iter([0]))
    counts = FleetCounts()
    broken = iter([Sample(0, {"amount": -1.0, "hour": 0.0}, False)])

    def stream() -> Iterator[Sample]:
        yield from broken
        yield from payments()

    one = Member("pos-0001", shop.open, stream(), LabelledHistory(NAMES))
    run_until(lambda: counts.decisions >= 5, [one], counts)
    assert counts.refused == 1
    assert counts.restarts == {}


class Forgetful(FakeDevice):
    """Has dropped every decision from its outbox by the time the feedback comes."""

    def feedback(self, decision_id: str, fraud: bool) -> None:
        raise Unavailable(f"decision {decision_id} is gone")


def test_feedback_that_a_device_cannot_take_is_counted_and_still_trains_it() -> None:
    @asynccontextmanager
    async def open_forgetful() -> AsyncIterator[PaymentDevice]:
        yield Forgetful()

    counts, one = FleetCounts(), member("pos-0001", open_forgetful)
    run_until(lambda: counts.feedback_lost >= 5, [one], counts)
    assert counts.feedback == 0
    assert counts.restarts == {}
    assert len(one.history) == counts.feedback_lost


def test_the_history_keeps_the_newest_rows_in_order() -> None:
    history = LabelledHistory(NAMES, rows_max=4)
    assert history.arrays()[0].shape == (0, 2)
    history.add_rows(np.arange(12, dtype=np.float32).reshape(6, 2), np.array([1, 0, 0, 1, 0, 1], bool))
    history.add({"hour": 9.0, "amount": 8.0, "else": 1.0}, True)
    features, labels = history.arrays()
    np.testing.assert_array_equal(features, [[6, 7], [8, 9], [10, 11], [8, 9]])
    np.testing.assert_array_equal(labels, [1, 0, 1, 1])
    features[:] = 0
    assert history.arrays()[0].any(), "callers get a copy"


def test_a_missing_feature_is_an_error() -> None:
    with pytest.raises(KeyError):
        LabelledHistory(NAMES).add({"amount": 1.0}, False)
