"""What the threat model guarantees of a round, tried: who sees an update (nobody), what tells two inputs apart (only
what is opened), and how few may be in an opened sum."""

from __future__ import annotations

import asyncio
import base64
import json
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_coordinator.shares.decision import Decision
from fl_coordinator.shares.streams import Words
from model_delta.encoding import pack
from model_delta.errors import Untrusted
from tests.fakes.secure_round import SecureRound, honest_rows, ones_off_balance, opened_sum
from tests.fl_coordinator.learning_platform import LENGTH, SPEC, Aggregators, asked
from tests.fl_coordinator.platform_in_memory import Platform, adopt_first, fleet

# --- nobody sees an update --------------------------------------------------------------------------------------------

WINDOW = 4
"""So many neighbouring entries of an update count as seen."""


def written(entries: np.ndarray, bits: int) -> Iterator[bytes]:
    """Ways in which a program could write down some entries of an update, exact in fixed point with that many bits."""
    units = np.rint(entries * 2**bits).astype(np.int64)
    for array in (entries.astype("<f4"), entries.astype("<f8"), units.astype("<i4"), units.astype("<i8")):
        data = array.tobytes()
        yield data
        yield array.astype(array.dtype.newbyteorder(">")).tobytes()
        yield data.hex().encode()
        for shift in range(3):
            coded = base64.b64encode(bytes(shift) + data)
            yield coded[4 * (shift > 0) : -4]
    for values in (entries.tolist(), entries.astype(np.float32).tolist(), units.tolist()):
        yield json.dumps(values)[1:-1].encode()
        yield json.dumps(values, separators=(",", ":"))[1:-1].encode()
        yield pack(values)[1:]
    yield str(entries.astype(np.float32))[1:-1].encode()
    yield str(units)[1:-1].encode()


def seen(update: np.ndarray, bits: int, haystack: bytes) -> bool:
    """Whether a part of the update stands anywhere in the haystack."""
    starts = (0, update.size // 2, update.size - WINDOW)
    return any(needle in haystack for start in starts for needle in written(update[start : start + WINDOW], bits))


def exact(update: np.ndarray, bits: int) -> np.ndarray:
    """The next update that fixed point holds exactly, so that random rounding leaves it alone."""
    found: np.ndarray = np.rint(update * 2**bits) / 2**bits
    return found


def test_whoever_searches_for_an_update_would_find_it() -> None:
    update = exact(np.random.default_rng(0).normal(0, 0.1, 40), 16)
    for form in written(update[20 : 20 + WINDOW], 16):
        assert seen(update, 16, b"before " + form + b" behind")
    assert not seen(update, 16, np.random.default_rng(1).bytes(100_000))


@pytest.mark.slow
def test_coordinator_log_broker_and_any_one_aggregator_together_hold_no_update(tmp_path: Path) -> None:
    """All files and messages of a whole round but the keys and files of the two other aggregators, and what a crash
    dump would print of the coordinator and of that aggregator."""
    platform = Platform(tmp_path)
    devices = fleet(platform)
    aggregators = Aggregators(platform)
    messages: list[bytes] = []
    for member in aggregators.members.values():
        given = member.deliver

        def record(sender: str, name: str, data: bytes, given: Any = given) -> None:
            messages.append(data)
            given(sender, name, data)

        member.deliver = record  # type: ignore[method-assign]
    updates: list[np.ndarray] = []
    fraction_bits: list[int] = []
    dumps: dict[str, bytes] = {}

    async def story() -> None:
        async with platform.running() as coordinator, aggregators.serving():
            await adopt_first(platform, devices)
            opened = await coordinator.open_round(asked(policy="robust"))
            fraction_bits.append(opened.task.fraction_bits)
            rng = np.random.default_rng(2)
            for device in devices:
                updates.append(exact(rng.normal(0.01, 0.05, LENGTH), fraction_bits[0]))
                while device.task is None:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                await device.contribute(device.contribution(updates[-1]))
            while coordinator.round(opened.round_id).live:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            ended = coordinator.round(opened.round_id)
            assert ended.state == "PUBLISHED", ended.reason
            assert len(ended.chosen) >= SPEC.selected_min
            for name, program in (("coordinator", coordinator), ("a0", aggregators.members["a0"])):
                parts = [vars(part) for part in vars(program).values() if hasattr(part, "__dict__")]
                dumps[name] = repr([vars(program), parts]).encode()

    asyncio.run(story())
    others = {tmp_path / "a1", tmp_path / "a2"}
    files = [path for path in tmp_path.rglob("*") if path.is_file() and not others & set(path.parents)]
    assert {"a0", "log", "store"} <= {path.relative_to(tmp_path).parts[0] for path in files}
    assert any(path.name.startswith("ledger.sqlite") for path in files)
    view = {str(path.relative_to(tmp_path)): path.read_bytes() for path in files}
    view |= {f"broker {place} {topic}": data for place, (topic, data) in enumerate(platform.broker.log)}
    view |= {f"message {place}": data for place, data in enumerate(messages)}
    view |= {f"command {place}": pack(command) for place, command in enumerate(aggregators.commands)}
    view |= {f"dump of {name}": dump for name, dump in dumps.items()}
    assert len(messages) > 60
    haystack = b"\0".join(view.values())
    (bits,) = fraction_bits
    for update in updates:
        if seen(update, bits, haystack):
            raise AssertionError([name for name, data in view.items() if seen(update, bits, data)])


@pytest.mark.slow
def test_a_crash_in_the_protocol_prints_no_update() -> None:
    world = SecureRound(length=40, selected_min=4)
    updates = [exact(np.random.default_rng(seed).normal(0, 0.05, 40), 16) for seed in range(6)]
    contributions = [world.contribution(f"pos-{place}", update) for place, update in enumerate(updates)]
    _, views = world.run(contributions)
    steps = ("coin", "measured", "range-carry-4", "range-check", "range", "lift", "gram", "gram-sums", "agree")
    assert set(steps) <= {step for step, _ in views[0].received}
    for step in steps:

        def tamper(sender: int, receiver: int, name: str, data: bytes, step: str = step) -> bytes:
            return data[:-1] if (receiver, name) == (0, step) else data

        with pytest.raises(Untrusted) as caught:
            world.run(contributions, tamper)
        # The frames of this test and of the fake devices are left out: devices know their updates.
        frames = traceback.walk_tb(caught.value.__traceback__)
        ours = [frame for frame, _ in frames if "/fl_coordinator/shares/" in frame.f_code.co_filename]
        assert ours, step
        held = [vars(frame.f_locals["self"]) for frame in ours if "self" in frame.f_locals]
        dump = repr([frame.f_locals for frame in ours]) + repr(held)
        assert "holding" in dump, step
        assert not any(seen(update, 16, dump.encode()) for update in updates), step


# --- equal distances, equal view --------------------------------------------------------------------------------------


def with_even_sum(rows: np.ndarray, total: int) -> Words:
    """One row more, so that every column adds up to the same."""
    last = total - rows.sum(axis=0)
    return np.vstack([rows, last]).astype(np.int32).view(np.uint32)


def told(decision: Decision) -> dict[str, Any]:
    """All that is opened and signed, without what is drawn anew or names the contributions."""
    plain = msgspec.to_builtins(decision, builtin_types=(bytes,))
    for name in ("coin", "root", "frozen", "parts"):
        del plain[name]
    for device in plain["devices"]:
        del device["contribution"]
    found: dict[str, Any] = plain
    return found


def test_inputs_with_the_same_distances_and_sum_cannot_be_told_apart() -> None:
    """Columns change places: other updates, the same products, the same sum. What is opened is the same, and every
    message is as long and as even as before (that it can be made from what is opened: `test_secure_round`)."""
    world = SecureRound(length=48, hostile_max=0, selected_min=4)
    rng = np.random.default_rng(3)
    rows = with_even_sum(rng.integers(-3_000, 3_000, size=(7, 48)), 500)
    other = rows[:, rng.permutation(48)]
    assert not np.array_equal(rows, other)
    runs = [world.run_rows(updates) for updates in (rows, other)]
    assert told(runs[0][2]) == told(runs[1][2])
    assert np.array_equal(opened_sum(runs[0][0]), opened_sum(runs[1][0]))
    assert len(runs[0][2].selected) == 8
    for before, after in zip(runs[0][1], runs[1][1], strict=True):
        assert {key: len(data) for key, data in before.received.items()} == {
            key: len(data) for key, data in after.received.items()
        }
        for (step, _), data in after.received.items():
            if step not in ("hello", "compare", "coin", "range", "agree"):
                assert ones_off_balance(data) < 6, step


# --- never too few ----------------------------------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_nothing_is_opened_for_fewer_than_m_min_or_with_one_too_heavy(data: st.DataObject) -> None:
    hostile = data.draw(st.integers(0, 2))
    least = data.draw(st.integers(max(2, hostile + 2), 10))
    policy = data.draw(st.sampled_from(["krum", "robust", "history", "multikrum"]))
    world = SecureRound(length=8, hostile_max=hostile, selected_min=least, policy=policy, contributions_max=16)
    rows = honest_rows(world, data.draw(st.integers(1, 11)), data.draw(st.integers(0, 2**32)))
    for place in data.draw(st.sets(st.integers(0, len(rows) - 1))):
        rows[place] *= np.uint32(data.draw(st.sampled_from([0, 5, 1000, 2**31])))
    try:
        outcomes, views, decision = world.run_rows(rows)
    except Untrusted as error:  # sums of nonsense that no check has to make sense of
        assert "no inner products" in str(error)  # noqa: PT017
        return
    if decision.selected:
        assert len(decision.selected) >= least
        weights = [decision.devices[index].weight for index in decision.selected]
        assert max(weights) <= sum(weights) / 4
        return
    assert decision.refusal
    assert all(outcome.opened is None for outcome in outcomes)
    if sum(device.valid != -1 for device in decision.devices) < least:
        assert not any(step == "gram" for step, _ in views[0].sent)
