"""The attacks of devices, each made on the real protocol: what it does, and by which name it is refused.

Lying aggregators are in `test_lying_aggregators`, what anybody sees in `test_guarantees`; quotas, lateness and expired
or revoked certificates, which admission refuses before the log, are attacked through a whole coordinator at the end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from fl_coordinator.aggregation import combine_openings
from fl_coordinator.rounds import Quota
from fl_coordinator.shares.bounds import bounds_of
from fl_coordinator.shares.contribution import Claim, parse, sealing_info
from fl_coordinator.shares.decision import Decision, read_gram
from fl_coordinator.shares.measuring import Coefficients
from fl_coordinator.shares.streams import Words
from model_delta.digest import digest_of
from model_delta.encoding import pack, unpack
from model_delta.errors import Untrusted
from model_delta.keys.encryption import seal_to
from tests.fakes.secure_round import SecureRound, honest_rows, measure_words, random_holdings, run_parties
from tests.fl_coordinator.learning_platform import asked, contribute_all, honest, learning
from tests.fl_coordinator.platform_in_memory import Platform, on_a_loop, until

# --- malformed updates ------------------------------------------------------------------------------------------------

LENGTH = 200
RANGE = "range check: a random projection is larger than any clipped update allows"


def with_entries(*entries: int) -> Callable[[Words], Words]:
    def change(row: Words) -> Words:
        row = row.copy()
        row[: len(entries)] = np.array([entry % 2**32 for entry in entries], dtype=np.uint32)
        return row

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_entries(2**31), RANGE),
        (with_entries(2**31, 2**31), RANGE),
        (with_entries(2**24), RANGE),
        (with_entries(2**30, -(2**30)), RANGE),
        (with_entries(*([2**31] * (LENGTH // 2))), RANGE),
        (with_entries(*([2**30] * LENGTH)), RANGE),
        (with_entries(*([2**30, -(2**30)] * (LENGTH // 2))), RANGE),
        (with_entries(*([2**15] * LENGTH)), "exceeds the clip norm 4"),
        (lambda row: row * np.uint32(1000), RANGE),
        (lambda row: row + np.uint32(2**28), RANGE),
        (lambda row: np.where(np.arange(LENGTH) % 2, 2**22, -(2**22)).astype(np.int32).view(np.uint32), RANGE),
        (lambda row: row * np.uint32(5), "exceeds the clip norm 4"),
        (with_entries(2**19), "exceeds the clip norm 4"),
    ],
    ids=[
        "entry 2^31",
        "two entries 2^31",
        "entry 2^24",
        "cancelling pair",
        "half of the entries 2^31",
        "all entries 2^30",
        "alternating 2^30",
        "all entries 2^15",
        "scaled 1000 times",
        "shifted by 2^28",
        "alternating 2^22",
        "scaled 5 times",
        "one entry 2^19",
    ],
)
def test_a_malformed_update_is_rejected_by_name_and_costs_no_honest_one(
    change: Callable[[Words], Words], reason: str
) -> None:
    world = SecureRound(length=LENGTH, hostile_max=1, selected_min=5)
    rows = honest_rows(world, 9)
    rows[4] = change(rows[4])
    _, _, decision = world.run_rows(rows)
    assert reason in decision.devices[4].reason
    assert decision.devices[4].device_id == "pos-0004"
    assert decision.selected == (0, 1, 2, 3, 5, 6, 7, 8)


def test_without_the_check_an_entry_of_2_16_would_have_been_invisible() -> None:
    """Why there is a check, and lifting: modulo 2^32 such an entry adds nothing to its sender's norm."""
    row = np.array([2**16, 5, 7], dtype=np.uint32)
    assert int(row @ row) == 25 + 49


# --- made for a coin --------------------------------------------------------------------------------------------------


def blind_spot(projections: np.ndarray) -> Words:
    """A vector with entries 0 and 2^31 that all of these projections take for zero: a kernel modulo 2."""
    rows = (projections.T.astype(np.int64) & 1).astype(np.uint8)
    pivots: list[int] = []
    for column in range(rows.shape[1]):
        below = [place for place in range(len(pivots), len(rows)) if rows[place, column]]
        if not below:
            break
        rows[[len(pivots), below[0]]] = rows[[below[0], len(pivots)]]
        for place in range(len(rows)):
            if place != len(pivots) and rows[place, column]:
                rows[place] ^= rows[len(pivots)]
        pivots.append(column)
    free = len(pivots)
    found = np.zeros(rows.shape[1], dtype=np.uint32)
    found[free] = 1
    found[pivots] = rows[: len(pivots), free]
    return found << np.uint32(31)


def run_with_chance(world: SecureRound, rows: Words, like: Words, seed: int) -> Decision:
    """The round with the secrets of the aggregators from a seed, on `rows` under the digests of `like`: the same
    coin each time."""
    named = random_holdings(like, 0)[0].digests
    holdings = [dataclasses.replace(holding, digests=named) for holding in random_holdings(rows, 0)]
    parties = []
    for index, holding in enumerate(holdings):
        party = world.party(index, [bytes.fromhex(digest) for digest in named], holding=holding)
        party._own_secret = bytes([seed, index]) * 16
        parties.append(party)
    return unpack(run_parties(parties)[0][0].decision, Decision)


def test_an_update_made_for_a_known_coin_passes_and_for_one_drawn_later_fails() -> None:
    """Why the coin comes after the freeze. Each of the 48 projections is blind to what was made for it."""
    world = SecureRound(length=LENGTH, hostile_max=1, selected_min=5, contributions_max=16)
    rows = honest_rows(world, 9)
    known = run_with_chance(world, rows, rows, seed=1).coin
    crafted = rows.copy()
    crafted[4] += blind_spot(Coefficients(known, LENGTH, bounds_of(world.task)).ternary())
    assert np.abs(crafted[4].astype(np.int64) - rows[4].astype(np.int64)).max() >= 2**31
    measured = measure_words(Coefficients(known, LENGTH, bounds_of(world.task)), crafted[4:5]).projections
    assert (np.abs(measured.view(np.int32)) < 2 ** bounds_of(world.task).exponent).all()
    with pytest.raises(Untrusted, match="a lifted sketch is no small integer"):  # past the range check, that is
        run_with_chance(world, crafted, rows, seed=1)
    for seed in (2, 3):
        later = run_with_chance(world, crafted, rows, seed=seed)
        assert later.coin != known
        assert RANGE in later.devices[4].reason
        assert (later.devices[4].valid, later.devices[3].valid) == (0, 1)
        assert later.selected == (0, 1, 2, 3, 5, 6, 7, 8)


# --- contributions that do not belong ---------------------------------------------------------------------------------


def of_another_round(world: SecureRound) -> bytes:
    task = msgspec.structs.replace(world.task, round_id="fraud-6")
    return world.contribution("pos-0004", np.ones(LENGTH), task)


def of_another_base(world: SecureRound) -> bytes:
    task = msgspec.structs.replace(world.task, base=digest_of(b"older"))
    return world.contribution("pos-0004", np.ones(LENGTH), task)


def too_short(world: SecureRound) -> bytes:
    task = msgspec.structs.replace(world.task, length=LENGTH - 1)
    return world.raw("pos-0004", np.zeros(LENGTH - 1, dtype=np.uint32), task)


def too_long(world: SecureRound) -> bytes:
    task = msgspec.structs.replace(world.task, length=100 * LENGTH)
    return world.raw("pos-0004", np.zeros(100 * LENGTH, dtype=np.uint32), task)


def forged(world: SecureRound) -> bytes:
    contribution = parse(world.contribution("pos-0004", np.ones(LENGTH)))
    return pack(msgspec.structs.replace(contribution, signature=world.device("pos-0001").sign(contribution.claim)))


def copied(world: SecureRound) -> bytes:
    """Somebody else's seals and masked vector under one's own signature."""
    contribution = parse(world.contribution("pos-0001", np.ones(LENGTH)))
    device = world.device("pos-0004")
    claim = msgspec.structs.replace(
        unpack(contribution.claim, Claim), device_id="pos-0004", certificate=device.certificate
    )
    return world.signed("pos-0004", claim, contribution.masked)


def same_seal_for_two(world: SecureRound) -> bytes:
    """One ciphertext for two aggregators, as if it could open under both of their keys."""
    contribution = parse(world.contribution("pos-0004", np.ones(LENGTH)))
    claim = unpack(contribution.claim, Claim)
    claim = msgspec.structs.replace(claim, sealed=(claim.sealed[0], claim.sealed[0], claim.sealed[2]))
    return world.signed("pos-0004", claim, contribution.masked)


def half_a_secret(world: SecureRound) -> bytes:
    """Seals that open, to less than two keys."""
    contribution = parse(world.contribution("pos-0004", np.ones(LENGTH)))
    sealed = tuple(
        seal_to(key.sealing, bytes(48), sealing_info(world.task, "pos-0004", index))
        for index, key in enumerate(world.task.aggregators)
    )
    claim = msgspec.structs.replace(unpack(contribution.claim, Claim), sealed=sealed)
    return world.signed("pos-0004", claim, contribution.masked)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (of_another_round, "round: expected 'fraud-7', found 'fraud-6'"),
        (of_another_base, "base version: expected"),
        (too_short, "vector length: expected 200, found 199"),
        (too_long, "contribution: expected at most"),
        (forged, "the signature is not by the certificate's key"),
        (copied, "does not open under this key and context"),
        (lambda w: w.contribution("pos-0001", np.ones(LENGTH)), "a second contribution of this device"),
        (
            lambda w: w.equivocating("pos-0004", np.zeros(LENGTH, dtype=np.uint32), share=0),
            "inconsistent shares: north and south were sealed different values of share 0",
        ),
        (
            lambda w: w.equivocating("pos-0004", np.zeros(LENGTH, dtype=np.uint32), share=1),
            "inconsistent shares: centre and north were sealed different values of share 1",
        ),
        (
            lambda w: w.equivocating("pos-0004", np.zeros(LENGTH, dtype=np.uint32), share=2),
            "inconsistent shares: south and centre were sealed different values of share 2",
        ),
        (same_seal_for_two, "does not open under this key and context"),
        (half_a_secret, "sealed pair: expected 64 bytes, found 48"),
        (lambda w: b"not a contribution", "CBOR"),
    ],
)
def test_a_contribution_that_does_not_belong_is_rejected_by_name(
    make: Callable[[SecureRound], bytes], reason: str
) -> None:
    world = SecureRound(length=LENGTH, selected_min=3)
    contributions = [world.contribution(f"pos-{i:04d}", np.linspace(0, 0.1 * i, LENGTH)) for i in range(4)]
    decision = world.decide([*contributions, make(world)])
    assert reason in decision.devices[4].reason
    assert decision.selected == (0, 1, 2, 3)


def test_a_masked_vector_that_was_exchanged_is_not_the_one_that_was_signed() -> None:
    """The share that all can read has no tag: its digest is in what the device signed."""
    world = SecureRound(length=LENGTH, selected_min=3)
    contributions = [world.contribution(f"pos-{i:04d}", np.linspace(0, 0.1 * i, LENGTH)) for i in range(5)]
    found = parse(contributions[4])
    contributions[4] = pack(msgspec.structs.replace(found, masked=bytes([found.masked[0] ^ 1]) + found.masked[1:]))
    decision = world.decide(contributions)
    assert "masked" in decision.devices[4].reason
    assert decision.selected == (0, 1, 2, 3)


# --- poisoned updates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["krum", "robust", "history"])
@pytest.mark.parametrize("push", [-1.0, -4.0, 4.0, 0.0], ids=["sign flip", "scaled flip", "scaled", "noise"])
def test_poisoned_updates_move_the_opened_mean_little(policy: str, push: float) -> None:
    """Less than a quarter of what they do to a plain mean. Who is merely loud may be clipped instead of refused."""
    world = SecureRound(length=LENGTH, hostile_max=3, selected_min=6, policy=policy, contributions_max=32)
    rng = np.random.default_rng(8)
    common = 0.05 * rng.normal(size=LENGTH)
    updates = [common + 0.03 * rng.normal(size=LENGTH) for _ in range(12)]
    for _ in range(3):
        spoilt = push * common + 0.01 * rng.normal(size=LENGTH)
        updates.append(spoilt if push else 0.2 * rng.normal(size=LENGTH))
    outcomes, _, _ = world.run_rows(np.stack([world.encode(update) for update in updates]))
    mean = combine_openings(world.replies(outcomes), world.task).mean
    assert mean is not None
    honest_mean, plain = np.mean(updates[:12], axis=0), np.mean(updates, axis=0)
    assert np.linalg.norm(mean - honest_mean) < 0.25 * np.linalg.norm(plain - honest_mean)


# --- a device in league with one aggregator ---------------------------------------------------------------------------


def test_a_device_in_league_with_an_aggregator_learns_products_with_its_own_vector_and_no_more() -> None:
    """What the threat model admits, to the letter: exact up to 2,048 parameters, and the same whatever else the others'
    updates are."""
    world = SecureRound(length=LENGTH, hostile_max=1, selected_min=5)
    rows = honest_rows(world, 9)
    probe = np.zeros(LENGTH, dtype=np.uint32)
    probe[17] = 2**16
    rows[8] = probe
    # Other updates with the same products with each other and with the probe: signs turned everywhere but there.
    turned = rows.copy()
    signs = np.where(np.random.default_rng(1).random(LENGTH) < 0.5, -1, 1)
    signs[17] = 1
    turned[:8] = (rows[:8].view(np.int32) * signs.astype(np.int32)).view(np.uint32)
    assert not np.array_equal(turned, rows)
    seen = []
    for updates in (rows, turned):
        _, _, decision = world.run_rows(updates)
        gram = read_gram(decision)
        assert gram[:8, 8].tolist() == (updates[:8, 17].view(np.int32).astype(np.int64) << 16).tolist()
        seen.append((decision.gram, decision.selected, [msgspec.structs.asdict(device) for device in decision.devices]))
    for one in seen:
        for device in one[2]:
            del device["contribution"]
    assert seen[0] == seen[1]


# --- sybils, late, stale: through a whole coordinator -----------------------------------------------------------------


@on_a_loop
async def test_sybils_replays_and_latecomers_do_not_get_in(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    devices = [
        *(platform.device(f"pos-{number:04}", batch=f"shop-{number}") for number in range(6)),
        *(platform.device(f"sybil-{number}", batch="stolen") for number in range(5)),
    ]
    spec = asked(quorum=8, contributions_max=12, quota=Quota(per_group=2, group="batch"), deadline_s=30)
    async with learning(platform, devices) as at:
        opened = await at.coordinator.open_round(spec)
        await contribute_all(devices[6:], opened.round_id)
        assert [device.receipts[-1].accepted for device in devices[6:]] == [True, True, False, False, False]
        assert all(device.receipts[-1].reason.startswith("over quota: ") for device in devices[8:])
        data = [device.contribution(honest(place)) for place, device in enumerate(devices[:6])]
        for device, own in zip(devices, data, strict=False):
            await device.contribute(own)
        await until(lambda: all(device.receipts for device in devices[:6]))
        await devices[0].contribute(data[0])  # its own again: acknowledged, counted once
        await devices[1].contribute(data[0])  # another's under one's own name
        await devices[2].contribute(devices[2].contribution(honest(40)))  # a second one
        await until(lambda: all(len(device.receipts) == 2 for device in devices[:3]))
        assert devices[0].receipts[-1].accepted
        assert devices[1].receipts[-1].reason.startswith("unknown certificate: ")
        assert devices[2].receipts[-1].reason.startswith("duplicate: ")
        platform.clock.now += 31
        first = await at.ended(opened.round_id)
        assert (first.state, len(first.frozen)) == ("PUBLISHED", 8)
        await devices[0].contribute(data[0])  # when all is over, and into the next round
        await until(lambda: len(devices[0].receipts) == 3)
        second = await at.coordinator.open_round(msgspec.structs.replace(spec, name="next", base=first.task.base))
        await until(lambda: devices[0].task is not None and devices[0].task.round_id == second.round_id)
        await devices[3].contribute(data[3])
        await until(lambda: len(devices[3].receipts) == 2)
        assert devices[3].receipts[-1].reason.startswith("wrong round: ")
        assert not at.ledger.contributions(second.round_id)
