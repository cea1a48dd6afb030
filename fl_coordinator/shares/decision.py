"""What three aggregators agree on about a round, and what its policy says again of what they opened.

`party` comes to a decision on shares; whoever holds one, an aggregator after a crash, the coordinator or an auditor,
computes weights and memory again with the functions here, from the opened numbers alone.

Compatibility: packed decisions are signed, kept, and replayed years later; fields are only ever added.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from fl_coordinator.privacy import Spent
from fl_coordinator.rules import reveals, selection
from fl_coordinator.rules.history import Memory
from fl_coordinator.rules.policy import Verdicts, remembers
from fl_coordinator.shares.bounds import bounds_of
from fl_coordinator.shares.remembering import RoundMemory, memory_name, moved
from fl_coordinator.shares.revealing import Revealed, judge_kept, spread
from model_delta.encoding import unpack
from model_delta.errors import Malformed
from model_delta.task import RoundTask

FORMAT = 3


class DeviceVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one contribution. `weight` is its integer weight in the sum, `reason` "" for the selected. `norm`
    is the update's l2 norm in model units; -1 when the contribution did not get as far as the Gram matrix. `valid` is
    the bit that the range check opened: 1 inside, 0 outside, -1 when it was refused before. The rest are the verdicts
    of `rules.policy.Verdicts`, `krum_score` in squared model units; -1, 0 or 1 where there are none. None is what the
    round did not reveal."""

    device_id: str
    contribution: str
    selected: bool
    reason: str
    weight: int = 0
    valid: int = -1
    norm: float | None = -1.0
    norm_sigma: float | None = 0.0
    distance_sigma: float | None = 0.0
    krum_score: float | None = -1.0
    cluster: int | None = -1
    cosine_cluster: int | None = -1
    spectral: float | None = 0.0
    history: float | None = 0.0
    copies: int | None = 1


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """All that a round's three aggregators agreed on, the same bytes at each.

    `gram` holds the upper triangle, row by row, of the Gram matrix of the devices `measured` (indices into `devices`),
    int64 little endian: `scale` times their inner products in units of 2^(-2 fraction_bits), estimated by sketches when
    `scale` is above 1. Where `reveal` is not `distances` it is empty; then `kept` are those of the measured within the
    clip norm, `near` the bits of their pairs (of `graph`), and `doubled_norm` twice the squared norm of the sum of the
    chosen sketches modulo 2^64, 0 in a round with noise (see `revealing.Revealed`). The mean is the sum of weight times
    update over `divisor`. `refusal` says why nothing was opened ("" if the sum over `selected` was).

    `task` is the digest of the announcement's payload; `frozen` holds the statements that the three signed before the
    coin, `parts` what each then opened, see `freezing`; `memory` names the memory that the policy leaves, see
    `remembering`; `spent` is the account of an opening with noise. These are there from format 3 on."""

    format: int = FORMAT
    tenant: str
    model: str
    round_id: str
    attempt: int
    base: str
    root: str
    aggregators: tuple[str, ...]
    coin: bytes
    policy: str
    devices: tuple[DeviceVerdict, ...]
    measured: tuple[int, ...]
    scale: int
    gram: bytes
    selected: tuple[int, ...]
    divisor: int
    refusal: str
    task: str = ""
    frozen: tuple[bytes, ...] = ()
    parts: tuple[bytes, ...] = ()
    memory: str = ""
    spent: Spent | None = None
    reveal: str = reveals.DISTANCES
    kept: tuple[int, ...] = ()
    near: bytes = b""
    doubled_norm: int = 0


OUT_OF_RANGE = "range check: a random projection is larger than any clipped update allows"
VERDICTS = ("norm", "norm_sigma", "distance_sigma", "krum_score", "cosine_cluster", "spectral", "history", "copies")
"""Fields of a DeviceVerdict that follow from a Gram matrix alone."""


def read_decision(data: bytes) -> Decision:
    """A packed decision; nothing in it is verified. Raises Malformed, by name for a format of the future."""
    found = unpack(data, Decision)
    if found.format > FORMAT:
        raise Malformed(f"decision: format {found.format}, this reader knows up to {FORMAT}")
    return found


def judge(
    task: RoundTask,
    gram: NDArray[np.int64],
    device_ids: Sequence[str],
    hostile_found: int,
    memory: Memory | None = None,
) -> selection.Judged:
    """What the round's policy says of an opened Gram matrix, after `hostile_found` devices failed the range check, with
    what it remembers of earlier rounds."""
    bounds = bounds_of(task)
    return selection.decide(
        task.policy,
        gram,
        device_ids,
        squared_max=bounds.squared_max,
        unit=math.sqrt(bounds.scale) * 2**task.fraction_bits,
        clip_norm_l2=task.clip_norm_l2,
        hostile_max=task.hostile_max,
        hostile_found=hostile_found,
        selected_min=task.selected_min,
        memory=memory,
    )


def too_few(task: RoundTask, usable: int) -> str:
    """Why nothing is looked at, let alone opened, of so few usable contributions."""
    return f"{usable} usable contributions, a sum of fewer than {task.selected_min} is not opened"


def verdicts_on(
    task: RoundTask,
    named: Sequence[tuple[str, str]],
    refused: Mapping[int, str],
    bits: Mapping[int, bool],
    measured: Sequence[int],
    gram: NDArray[np.int64],
    judged: selection.Judged | None,
    refusal: str,
) -> tuple[DeviceVerdict, ...]:
    """What a decision says of each contribution: `named` are device and digest in the frozen order, `refused` reasons
    and `bits` the range check's by index, `gram` that of the `measured` (empty where it was not opened)."""
    unit = math.sqrt(bounds_of(task).scale) * 2**task.fraction_bits
    devices = [
        DeviceVerdict(
            device_id=name,
            contribution=digest,
            selected=False,
            reason=refused.get(index, refusal),
            valid=int(bits.get(index, -1)),
        )
        for index, (name, digest) in enumerate(named)
    ]
    if judged is not None:
        verdicts = dict(zip(judged.kept, judged.choice.verdicts, strict=True))
        for place, index in enumerate(measured):
            weight = int(judged.choice.integers[place])
            devices[index] = msgspec.structs.replace(
                devices[index],
                selected=weight > 0,
                reason="" if weight else judged.choice.refused.get(place, refusal),
                weight=weight,
                norm=math.sqrt(int(gram[place, place])) / unit if gram.size else None,
                **(_fields(verdicts[place], unit) if place in verdicts else {}),
            )
    return tuple(devices)


def memory_after(before: RoundMemory, task: RoundTask, judged: selection.Judged | None) -> str:
    """The name of the memory that a round leaves: the one it began with when no distances were opened."""
    if judged is None or not remembers(task.policy):
        return memory_name(before)
    return memory_name(moved(before, task, judged.choice.memory))


def failed_checks(decision: Decision) -> int:
    """How many devices of a decision did not pass the range check; before format 3 only their reasons say so."""
    if decision.format < 3:
        return sum(device.reason.startswith("range check") for device in decision.devices)
    return sum(device.valid == 0 for device in decision.devices)


def judge_hidden(task: RoundTask, decision: Decision, hostile_found: int) -> Revealed:
    """What the round's policy says of a decision that reveals less than distances: of a graph all, of a selection that
    it is as large as it should be. Raises Malformed for a decision that contradicts itself."""
    if decision.gram:
        raise Malformed(f"decision: reveals {decision.reveal}, and {len(decision.gram)} bytes of a Gram matrix")
    measured, kept = list(decision.measured), list(decision.kept)
    if sorted(set(kept)) != kept or not set(kept) <= set(measured):
        raise Malformed("decision: those within the clip norm are no ascending part of the measured")
    hostile = max(0, task.hostile_max - hostile_found - (len(measured) - len(kept)))
    chosen = [kept.index(index) for index in decision.selected]
    choice, clusters = judge_kept(task, hostile, len(kept), decision.near, chosen)
    places = [measured.index(index) for index in kept]
    norm = decision.doubled_norm if choice.selected and task.noise_multiplier == 0 else 0
    spread_out = spread(choice, places, len(measured), task.clip_norm_l2)
    return Revealed(tuple(places), decision.near, spread_out, clusters, norm)


def restated(task: RoundTask, decision: Decision, memory: Memory | None) -> Decision:
    """A decision of format 3 once more, from what it alone can tell: the list, the coin and its proof, who was refused
    before the check and why, the bits of the check, and what was opened. All the rest has to follow from that, by the
    rules and what they remember. Raises Malformed for a decision that contradicts itself."""
    named = [(device.device_id, device.contribution) for device in decision.devices]
    bits = {index: device.valid == 1 for index, device in enumerate(decision.devices) if device.valid != -1}
    refused = {index: OUT_OF_RANGE for index, inside in bits.items() if not inside}
    measured = decision.measured
    before = {index: device.reason for index, device in enumerate(decision.devices) if device.valid == -1}
    gram, hidden, judged = np.zeros((0, 0), dtype=np.int64), None, None
    if not measured:
        # Without a single bit the check was not begun: who has the round's refusal for a reason was usable.
        refused |= {index: why for index, why in before.items() if bits or why != decision.refusal}
        usable = len(named) - len(refused)
        if usable >= task.selected_min:
            raise Malformed(f"decision: {usable} contributions were usable, and none was measured")
        refusal = too_few(task, usable)
    else:
        refused |= before
        if task.reveal == reveals.DISTANCES:
            gram = read_gram(decision)
            judged = judge(task, gram, [named[index][0] for index in measured], failed_checks(decision), memory)
        else:
            hidden = judge_hidden(task, decision, failed_checks(decision))
            judged = selection.Judged(hidden.choice, ())
        refusal = judged.choice.refusal
    devices = verdicts_on(task, named, refused, bits, measured, gram, judged, refusal)
    found = msgspec.structs.replace(
        decision,
        model=task.model,
        base=task.base,
        aggregators=tuple(key.name for key in task.aggregators),
        policy=task.policy,
        reveal=task.reveal,
        devices=devices,
        scale=bounds_of(task).scale,
        gram=decision.gram if measured else b"",
        selected=tuple(index for index, device in enumerate(devices) if device.selected),
        divisor=judged.choice.divisor if judged is not None else 0,
        refusal=refusal,
        kept=(),
        near=b"",
        doubled_norm=0,
    )
    return told_of(found, hidden) if hidden is not None else found


def told_of(decision: Decision, hidden: Revealed) -> Decision:
    """The decision of a round that revealed less, with what it did reveal, and nothing that looks like a verdict."""
    places = {decision.measured[place]: at for at, place in enumerate(hidden.kept)}
    devices = list(decision.devices)
    for index in decision.measured:
        at = places.get(index)
        cluster = hidden.clusters[at] if at is not None and hidden.clusters else None
        devices[index] = msgspec.structs.replace(devices[index], **dict.fromkeys(VERDICTS), cluster=cluster)
    return msgspec.structs.replace(
        decision,
        devices=tuple(devices),
        kept=tuple(places),
        near=hidden.near,
        doubled_norm=hidden.doubled_norm,
    )


def read_gram(decision: Decision) -> NDArray[np.int64]:
    """The opened Gram matrix, int64[n, n] over `decision.measured`. Raises Malformed for another length."""
    count = len(decision.measured)
    size = 4 * count * (count + 1)
    if len(decision.gram) != size:
        raise Malformed(f"Gram matrix: expected {size} bytes, found {len(decision.gram)}")
    upper = np.triu_indices(count)
    gram = np.zeros((count, count), dtype=np.int64)
    gram[upper] = np.frombuffer(decision.gram, dtype="<i8")
    return gram + np.triu(gram, 1).T


def _fields(verdict: Verdicts, unit: float) -> dict[str, Any]:
    """A device's verdicts as its DeviceVerdict has them; `unit` is the norm of an update of length 1."""
    return {
        "norm_sigma": verdict.norm_sigma,
        "distance_sigma": verdict.distance_sigma,
        "krum_score": verdict.krum_score / (unit * unit),
        "cluster": verdict.cluster,
        "cosine_cluster": verdict.cosine_cluster,
        "spectral": verdict.spectral,
        "history": verdict.history,
        "copies": verdict.copies,
    }
