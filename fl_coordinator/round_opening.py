"""The aggregators open the mean of a frozen round: attempts, what they cost in privacy, and the signed transcript.

An attempt's number, its price and its result are each durable before anybody hears of them. A round opens once.

A round that is aborted ends at once, whatever the aggregators are doing: the answers that they still give are dropped
unread, and no sum is put together here. They are not called back, for whether they have decided by then nobody can tell
from here; each stops by itself, when it is done or its attempt's time is over. Two shares that leave two of them are a
sum all the same, so every attempt counts as opened in the accounts of privacy from before anybody is asked, and no
longer only once it is known that none of them let go of anything. An abort, a power cut, a full disk and an answer that
never comes need nothing written down for that.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from fl_coordinator.aggregation import combine_openings
from fl_coordinator.flower_bridge import CommandFailed
from fl_coordinator.ledger import Ledger
from fl_coordinator.ports import Bridge, Note, UpdatesLog
from fl_coordinator.privacy import Spent
from fl_coordinator.recorded_rounds import save_round
from fl_coordinator.remembered_rounds import memory_of, memory_record
from fl_coordinator.retention import TRANSCRIPT
from fl_coordinator.round_announcing import ROLE_ROUND, signed_task
from fl_coordinator.rounds import ATTEMPTS_MAX, Event, Round, RoundSpec
from fl_coordinator.shares.contribution import parse
from fl_coordinator.shares.decision import Decision, restated
from fl_coordinator.spending import Charge, charge
from fl_coordinator.threads import in_thread
from fl_coordinator.transcript import (
    SETTLEMENT_TYPE,
    Settlement,
    decision_in,
    mean_digest,
    pack_transcript,
    transcript_of,
)
from model_delta.digest import digest_of
from model_delta.encoding import pack
from model_delta.errors import AtollError, Malformed, NotFound, Untrusted
from model_delta.keys.keyring import Keyring
from model_delta.store import ArtifactStore
from model_delta.task import RoundTask
from model_delta.trust.signing import seal_envelope

EVIDENCE = "evidence"
"""A kind in the store that is never cleaned away."""

_log = logging.getLogger("atoll.coordinator")


class Opening:
    """Has rounds opened by the aggregators that the bridge reaches."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        log: UpdatesLog,
        store: ArtifactStore,
        keyring: Keyring,
        bridge: Bridge,
        tick_s: float,
        note: Note,
    ) -> None:
        self._ledger = ledger
        self._log = log
        self._store = store
        self._keyring = keyring
        self._bridge = bridge
        self._tick_s = tick_s
        self._note = note
        self._paying = asyncio.Lock()

    async def attempt(self, found: Round, stop: asyncio.Event) -> tuple[Round, Event]:
        """One attempt on the frozen set, which ends early when `stop` is set. The result is durable before the state
        says so; a result that is there already (the coordinator died in between) is taken instead of a second
        opening."""
        result = await asyncio.to_thread(self._ledger.round_result, found.round_id)
        if result is not None:
            return await self._decided(found, decision_in(result[1]), result[1])
        if stop.is_set():
            return found, Event.ABORTED
        if found.attempt >= ATTEMPTS_MAX:
            return msgspec.structs.replace(
                found,
                reason=found.failures[-1] if found.failures else f"{ATTEMPTS_MAX} attempts were begun, none ended",
            ), Event.EXHAUSTED
        # The attempt's number is durable before anybody hears it: a number is used once.
        found = msgspec.structs.replace(found, attempt=found.attempt + 1)
        await asyncio.to_thread(save_round, self._ledger, found)
        async with self._paying:  # rounds of other models have the same devices: what one pays the next one counts
            paid = await asyncio.to_thread(self._pay, found)
        if paid is not None:
            found = msgspec.structs.replace(found, figures={**found.figures, "privacy": _figures(paid, found.spec)})
        announcement = await asyncio.to_thread(signed_task, self._keyring, found.task)
        payload = {
            "round_id": found.round_id,
            "attempt": found.attempt,
            "task": announcement,
            "contributions": list(found.frozen),
            "root": found.root,
            "deadline_s": found.spec.aggregation_s,
        }
        if paid is not None and found.spec.privacy is not None:
            payload["spent"] = msgspec.to_builtins(paid.told(found.spec.privacy.delta))
        names = [key.name for key in found.task.aggregators]
        first_to = await in_thread(self._ledger.may_open, found.round_id)
        replies: Mapping[str, dict[str, Any]] | None = {}
        try:
            replies = await self._asked(payload, names, found.spec.aggregation_s, stop, fetched := asyncio.Event())
            if replies is None:
                if first_to and not fetched.is_set():
                    await in_thread(self._ledger.did_not_open, found.round_id)
                return found, Event.ABORTED
            ordered = [replies[name] for name in names]
            aggregate = await asyncio.to_thread(combine_openings, ordered, found.task)
            await asyncio.to_thread(self._require_rules, found.task, aggregate.decision)
        except AtollError as error:  # somebody is down, or lies, or was spoken for: the error names who
            if first_to and _none_opened(error, replies):
                await in_thread(self._ledger.did_not_open, found.round_id)
            failures = (*found.failures, str(error)[:500])
            await asyncio.to_thread(
                self._note, "alert", f"round {found.round_id}: attempt {found.attempt} failed: {error}"
            )
            await asyncio.sleep(self._tick_s * found.attempt)
            return msgspec.structs.replace(found, failures=failures), Event.ATTEMPT_FAILED
        settled = _settlement(found, mean_digest(aggregate.mean), aggregate.decision)
        signed = seal_envelope(await asyncio.to_thread(self._keyring.sign, ROLE_ROUND, SETTLEMENT_TYPE, pack(settled)))
        transcript = pack_transcript(transcript_of(announcement, ordered, signed))
        mean = b"" if aggregate.mean is None else aggregate.mean.astype("<f4").tobytes()
        memory = await asyncio.to_thread(memory_record, self._ledger, found.task, aggregate.decision)
        await asyncio.to_thread(self._ledger.save_round_result, found.round_id, mean, transcript, memory)
        return await self._decided(found, aggregate.decision, transcript)

    async def _asked(
        self,
        payload: Mapping[str, Any],
        names: Sequence[str],
        deadline_s: float,
        stop: asyncio.Event,
        fetched: asyncio.Event,
    ) -> Mapping[str, dict[str, Any]] | None:
        """What the aggregators answer; None as soon as `stop` is set. Raises CommandFailed."""
        asking = asyncio.ensure_future(self._bridge.command(payload, names, deadline_s, fetched))
        stopping = asyncio.ensure_future(stop.wait())
        try:
            await asyncio.wait((asking, stopping), return_when=asyncio.FIRST_COMPLETED)
            return asking.result() if asking.done() else None
        finally:
            for task in (asking, stopping):
                task.cancel()
            await asyncio.gather(asking, stopping, return_exceptions=True)

    async def _decided(self, found: Round, decision: Decision, transcript: bytes) -> tuple[Round, Event]:
        """The round with everybody's verdict and its transcript's digest, under which the store has it from now on."""
        if not decision.selected:  # signed by all three: there is no sum that any of them could let go of
            await in_thread(self._ledger.did_not_open, found.round_id)
        name = digest_of(transcript)
        await asyncio.to_thread(self._store.put, TRANSCRIPT, name, transcript)
        kept = await asyncio.to_thread(self._evidence, found, decision)
        figures = {**found.figures, "evidence": kept} if kept else found.figures
        return _with_verdicts(msgspec.structs.replace(found, transcript=name, figures=figures), decision)

    def _require_rules(self, task: RoundTask, decision: Decision) -> None:
        """The rules again, as each aggregator has computed them. Raises Untrusted for another choice than they make."""
        rules = restated(task, decision, memory_of(self._ledger, task).memory)
        for name in ("selected", "divisor", "refusal"):
            if getattr(decision, name) != getattr(rules, name):
                raise Untrusted(f"round {task.round_id!r}: the aggregators' {name} is not what the rules give")
        if [device.weight for device in decision.devices] != [device.weight for device in rules.devices]:
            raise Untrusted(f"round {task.round_id!r}: the aggregators' weights are not what the rules give")

    def _evidence(self, found: Round, decision: Decision) -> dict[str, str]:
        """Keep what a device signed whose contribution the aggregators dropped before they measured it, because its
        shares differ or its seals do not open: without the vector, since the log lets go of it soon. Two aggregators
        who open their seals in it show who is to blame. By device: the contribution's digest, its name in the store."""
        offsets = {entry.digest: entry.log_offset for entry in self._ledger.contributions(found.round_id)}
        kept = {}
        for device in decision.devices:
            if device.valid != -1 or device.reason in ("", decision.refusal) or device.contribution not in offsets:
                continue
            try:
                signed = parse(self._log.read(offsets[device.contribution]))
            except (NotFound, Malformed) as error:
                _log.warning("round %s: no evidence against %s: %s", found.round_id, device.device_id, error)
                continue
            self._store.put(EVIDENCE, device.contribution, pack(msgspec.structs.replace(signed, masked=b"")))
            kept[device.device_id] = device.contribution
        return kept

    def _pay(self, found: Round) -> Charge | None:
        """What the opening costs, written down; None without privacy. Raises Malformed when it would overspend."""
        if found.spec.privacy is None:
            return None
        frozen = set(found.frozen)
        entries = self._ledger.contributions(found.round_id)
        names = [entry.device_id for entry in entries if entry.digest in frozen]
        return charge(self._ledger, found.task.model, found.spec.privacy, found.round_id, names)


def _settlement(found: Round, mean: str, decision: Decision) -> Settlement:
    """With the account that the aggregators signed: that of the attempt that decided, which another model's opening may
    have overtaken since."""
    settled = Settlement(
        tenant=found.task.tenant, model=found.task.model, round_id=found.round_id, root=found.root, mean=mean
    )
    if decision.spent is None:
        return settled
    return msgspec.structs.replace(settled, **{name: getattr(decision.spent, name) for name in Spent.__struct_fields__})


def _none_opened(error: AtollError, replies: Mapping[str, dict[str, Any]] | None) -> bool:
    """Whether it is known that no aggregator let go of its shares of a sum in an attempt that failed."""
    if isinstance(error, CommandFailed):
        if error.undone != error.failures.keys():
            return False  # of the others nobody knows; one that opened its part counts the devices as opened for ever
        replies = error.replies
    return not any(reply.get("first") for reply in (replies or {}).values())


def _figures(paid: Charge, spec: RoundSpec) -> dict[str, float]:
    return {
        "epsilon_release": round(paid.account.epsilon_release, 4),
        "epsilon_device": round(paid.account.epsilon_device, 4),
        "delta": spec.privacy.delta if spec.privacy is not None else 0.0,
        "noise_multiplier": paid.spend.noise_multiplier,
    }


def _with_verdicts(found: Round, decision: Decision) -> tuple[Round, Event]:
    """The round with everybody's verdict; it ends here when the aggregators refused to open anything."""
    found = msgspec.structs.replace(
        found,
        chosen=tuple(device.device_id for device in decision.devices if device.selected),
        rejected={
            **found.rejected,
            **{device.device_id: device.reason for device in decision.devices if not device.selected},
        },
    )
    if decision.refusal:
        return msgspec.structs.replace(found, reason=f"the aggregators refused: {decision.refusal}"), Event.BROKEN
    return found, Event.OPENED
