"""Drives federated rounds: opens them, walks each through the table in `rounds`, and does what the table asks for.

Each command is idempotent and its result durable before the state says so; a coordinator that died continues in the
state in which it was. Blocking work (the ledger, the log, signatures, evaluation) runs in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import msgspec
import numpy as np

from fl_coordinator import masters
from fl_coordinator.aggregation import combine_openings
from fl_coordinator.cohorts import read_rollout
from fl_coordinator.enrolment import AGGREGATORS
from fl_coordinator.intake import Intake
from fl_coordinator.ledger import Ledger
from fl_coordinator.ports import Bridge, Clock, Link, Note, UpdatesLog
from fl_coordinator.promotion import Evaluate, Limits, failed, judge
from fl_coordinator.publishing import Publisher
from fl_coordinator.rollout_driver import AWAKE_S, RolloutDriver
from fl_coordinator.rounds import ATTEMPTS_MAX, Command, Event, Round, RoundSpec, State, newest_of, step
from fl_coordinator.shares.bounds import CONTRIBUTIONS_MAX, fitted, require_announceable
from fl_coordinator.shares.party import Decision
from fl_coordinator.spending import Charge, charge, require_affordable
from fl_coordinator.tables.records import ReleaseRecord
from fl_coordinator.transcript import (
    SETTLEMENT_TYPE,
    Settlement,
    decision_in,
    mean_digest,
    pack_transcript,
    transcript_of,
)
from model_delta import merkle, topics
from model_delta.digest import digest_of
from model_delta.encoding import pack, unpack
from model_delta.errors import AtollError, Malformed, NotFound, Unavailable
from model_delta.keys.keyring import Keyring
from model_delta.manifest import Lineage
from model_delta.store import ArtifactStore
from model_delta.task import TASK_TYPE, RoundTask
from model_delta.trust.signing import open_envelope, seal_envelope
from monitoring.metrics import Counter

ROLE_ROUND = "round"

_log = logging.getLogger("atoll.coordinator")


class Publish(Protocol):
    """How a round's candidate becomes a release; see `Publisher.publish`."""

    async def __call__(self, source: bytes, **options: Any) -> ReleaseRecord:
        """The release. Idempotent. Raises what `Publisher.publish` raises."""


class RoundDriver:
    """Every round of this coordinator. For one event loop. `due` takes the ids of rounds that `run` drives."""

    def __init__(
        self,
        *,
        tenant: str,
        ledger: Ledger,
        log: UpdatesLog,
        store: ArtifactStore,
        keyring: Keyring,
        link: Link,
        publisher: Publisher,
        publish: Publish,
        evaluate: Evaluate | None,
        bridge: Bridge,
        limits: Limits,
        intake: Intake,
        rollouts: RolloutDriver,
        failures: Counter,
        clock: Clock,
        tick_s: float,
        note: Note,
        publish_soon: Callable[[], Awaitable[None]],
    ) -> None:
        self.due: asyncio.Queue[str] = asyncio.Queue()
        self._tenant = tenant
        self._ledger = ledger
        self._log = log
        self._store = store
        self._keyring = keyring
        self._link = link
        self._publisher = publisher
        self._publish = publish
        self._evaluate = evaluate
        self._bridge = bridge
        self._limits = limits
        self._intake = intake
        self._rollouts = rollouts
        self._count_failures = failures
        self._clock = clock
        self._tick_s = tick_s
        self._note = note
        self._publish_soon = publish_soon
        self._aborted: set[str] = set()
        self._driving: set[str] = set()

    def recall(self) -> list[str]:
        """The rounds that a coordinator which starts must go on with. Blocking."""
        every = [unpack(packed, Round) for packed in self._ledger.rounds()]
        return [found.round_id for found in every if found.live]

    async def run(self, tasks: asyncio.TaskGroup) -> None:
        """Give each round that is due a task of its own, until cancelled."""
        while True:
            round_id = await self.due.get()
            if round_id not in self._driving:
                self._driving.add(round_id)
                tasks.create_task(self._drive(round_id), name=f"round {round_id}")

    async def open(self, spec: RoundSpec) -> Round:
        """Announce a federated round, or find the one of this name. Raises Malformed for a spec that cannot work,
        Unavailable while another one is open."""
        opened = await asyncio.to_thread(self._announced, spec.checked())
        self.due.put_nowait(opened.round_id)
        return opened

    def _announced(self, spec: RoundSpec) -> Round:
        if spec.name:
            every = (unpack(packed, Round) for packed in self._ledger.rounds())
            named = next((one for one in every if (one.task.model, one.spec.name) == (spec.model, spec.name)), None)
            if named is not None:
                return named
        open_now = newest_of([unpack(packed, Round) for packed in self._ledger.rounds()], spec.model)
        if open_now is not None and open_now.live:
            raise Unavailable(f"round {open_now.round_id} of {spec.model} is {open_now.state}; wait for its end")
        base = spec.base or self._ledger.stable(spec.model)
        if not base:
            raise Malformed(f"round: model {spec.model!r} has no stable version; publish one and roll it out first")
        self._require_canary(spec)
        if spec.privacy is not None:
            require_affordable(self._ledger, spec.model, spec.privacy)
        manifest, source = self._publisher.manifest(base), self._publisher.source(base)
        parameters = masters.parameters_of(manifest)
        graph = masters.training_graph(source, spec.positive_weight)
        self._store.put("artifact", digest_of(graph), graph)
        now = self._clock()
        aggregators = tuple(record.key for record in self._ledger.aggregators()[:AGGREGATORS])
        issued = int(now)
        if open_now is not None:
            issued = max(issued, open_now.task.issued + 1)
        enrolled = len(self._ledger.devices())
        task = RoundTask(
            tenant=self._tenant,
            model=spec.model,
            round_id=f"{spec.model}-{issued}-{secrets.token_hex(3)}",
            base=base,
            training_graph=digest_of(graph),
            parameters=parameters,
            length=sum(int(np.prod(parameter.shape, dtype=np.int64)) for parameter in parameters),
            steps=spec.steps,
            batch_size=spec.batch_size,
            learning_rate=spec.learning_rate,
            clip_norm_l2=spec.clip_norm_l2,
            hostile_max=spec.hostile_max,
            selected_min=spec.selected_min,
            aggregators=aggregators,
            issued=issued,
            deadline=int(now + spec.deadline_s),
            contributions_max=spec.contributions_max or min(CONTRIBUTIONS_MAX, max(spec.quorum, 2 * enrolled)),
            policy=spec.policy,
            reveal=spec.reveal,
            noise_multiplier=spec.privacy.noise_multiplier if spec.privacy is not None else 0.0,
        )
        task = fitted(task)
        require_announceable(task)
        opened = Round(
            round_id=task.round_id,
            spec=msgspec.structs.replace(spec, base=base),
            task=task,
            announcement=seal_envelope(self._keyring.sign(ROLE_ROUND, TASK_TYPE, pack(task))),
            state=State.ANNOUNCED.value,
            opened=now,
        )
        self._save_round(opened)
        self._note("info", f"round {opened.round_id}: announced on {base[:16]}…, {task.length} parameters")
        return opened

    def _require_canary(self, spec: RoundSpec) -> None:
        """Whether the candidate could start its canary by itself. Raises Malformed."""
        if not spec.autopilot:
            return
        text = spec.rollout or self._rollouts.last_yaml(spec.model)
        if not text:
            raise Malformed(f"round: autopilot: expected a rollout, found none of {spec.model!r} yet; give it one")
        described = read_rollout(text, "rollout")
        if described.model != spec.model:
            raise Malformed(f"round: autopilot: expected a rollout of {spec.model!r}, found one of {described.model!r}")

    def _save_round(self, found: Round) -> None:
        self._ledger.save_round(
            round_id=found.round_id,
            model=found.task.model,
            state=found.state,
            created=found.opened,
            record=pack(found),
            needs=(found.task.base,) if found.at is State.ANNOUNCED else (),
        )

    async def abort(self, round_id: str) -> Round:
        """Stop a round before its result is published. Raises NotFound."""
        found = await asyncio.to_thread(self.round, round_id)
        if found.live:
            self._aborted.add(round_id)
            async with self._intake.admitted:
                self._intake.admitted.notify_all()
        return found

    def round(self, round_id: str) -> Round:
        """A round as it stands. Raises NotFound."""
        return unpack(self._ledger.round(round_id), Round)

    def frozen_offsets(self, round_id: str) -> list[int]:
        """Where the contributions of a round are in the log, in the frozen order. Blocking. NotFound, and Unavailable
        before the freeze."""
        found = self.round(round_id)
        if not found.root:
            raise Unavailable(f"round {round_id}: not frozen yet, it is {found.state}")
        offsets = {entry.digest: entry.log_offset for entry in self._ledger.contributions(round_id)}
        return [offsets[digest] for digest in found.frozen]

    def contribution_at(self, offset: int) -> bytes:
        """One contribution from the log. Blocking. NotFound, also for one of a round whose end is long ago."""
        return self._log.read(offset)

    async def _drive(self, round_id: str) -> None:
        """Walk one round to its end. When its state cannot be written down, the walk starts over from what is there."""
        try:
            while True:
                try:
                    await self._walk(round_id)
                    return
                except Unavailable as error:
                    self._count_failures.add(1, "round")
                    _log.warning("round %s: %s", round_id, error)
                    await asyncio.sleep(self._tick_s)
                except AtollError:
                    self._count_failures.add(1, "round")
                    _log.exception("round %s is left as it is", round_id)
                    return
        finally:
            self._driving.discard(round_id)
            self._aborted.discard(round_id)

    async def _walk(self, round_id: str) -> None:
        """Take a round through the table until it rests. Each command is idempotent, so that BOOTED may repeat it."""
        found = await asyncio.to_thread(self.round, round_id)
        state, command = step(found.at, Event.BOOTED)
        while command is not Command.REST:
            before = self._clock()
            found, event = await self._perform(command, found)
            if round_id in self._aborted:
                event = Event.ABORTED if event is not Event.RELEASED else event
                reason = found.reason or "an operator aborted it"
                found = msgspec.structs.replace(found, reason=reason)
            state, command = step(found.at, event)
            taken = {
                **found.seconds,
                found.state: round(found.seconds.get(found.state, 0.0) + self._clock() - before, 3),
            }
            found = msgspec.structs.replace(found, state=state.value, seconds=taken)
            if not found.live or state is State.FROZEN:
                found = await asyncio.to_thread(self._closed, found)
            await asyncio.to_thread(self._save_round, found)
            if event is not Event.ATTEMPT_FAILED:
                kind = "alert" if state in (State.FAILED, State.REFUSED) else "info"
                told = f": {found.reason}" if found.reason and not found.live else ""
                await asyncio.to_thread(self._note, kind, f"round {round_id}: {state.name.lower()}{told}")
            if not found.live or state is State.FROZEN:
                await self._publish_soon()
        await self._trim_log()

    async def _trim_log(self) -> None:
        """Let go of the contributions of rounds that have ended: their transcripts and means are in the ledger, and
        nobody may open them again. What a batch adds at this moment is not in the ledger yet, so it is waited for."""
        async with self._intake.admitting:
            try:
                await asyncio.to_thread(lambda: self._log.remove_before(self._oldest_needed()))
            except (AtollError, OSError) as error:  # it is tried again after the next round
                _log.warning("updates log: old contributions are still there: %s", error)

    def _oldest_needed(self) -> int:
        live = [found for packed in self._ledger.rounds() if (found := unpack(packed, Round)).live]
        offsets = [entry.log_offset for found in live for entry in self._ledger.contributions(found.round_id)]
        return min(offsets, default=self._log.end)

    def _closed(self, found: Round) -> Round:
        """The round with an announcement that says so; devices stop training and sending."""
        if not unpack(open_envelope(found.announcement).payload, RoundTask).open:
            return found
        task = msgspec.structs.replace(found.task, open=False, issued=max(int(self._clock()), found.task.issued + 1))
        return msgspec.structs.replace(
            found, announcement=seal_envelope(self._keyring.sign(ROLE_ROUND, TASK_TYPE, pack(task)))
        )

    async def _perform(self, command: Command, found: Round) -> tuple[Round, Event]:
        """Do what the table asks for; failures that no retry cures end the round with their name."""
        perform = {
            Command.ANNOUNCE: self._announce,
            Command.COLLECT: self._collect,
            Command.FREEZE: self._freeze,
            Command.AGGREGATE: self._aggregate,
            Command.JUDGE: self._judge,
            Command.PUBLISH: self._release,
        }[command]
        while True:
            try:
                return await perform(found)
            except Unavailable as error:
                # The disk is full or the broker away: nothing is decided, so the same command is tried again.
                self._count_failures.add(1, "round")
                _log.warning("round %s: %s", found.round_id, error)
                if found.round_id in self._aborted:
                    return found, Event.ABORTED
                await asyncio.sleep(self._tick_s)
            except AtollError as error:
                return msgspec.structs.replace(found, reason=f"{type(error).__name__}: {error}"), Event.BROKEN
            except Exception as error:
                _log.exception("round %s failed", found.round_id)
                return msgspec.structs.replace(found, reason=f"{type(error).__name__}: {error}"), Event.BROKEN

    async def _announce(self, found: Round) -> tuple[Round, Event]:
        if self._clock() > found.task.deadline:
            return msgspec.structs.replace(
                found, reason="the deadline passed before it could be announced"
            ), Event.TOO_FEW
        await self._link.publish(topics.round_topic(self._tenant, found.task.model), found.announcement, retain=True)
        return found, Event.HEARD

    async def _collect(self, found: Round) -> tuple[Round, Event]:
        """Wait until all that can come have come, or the deadline."""
        while True:
            admitted = len(await asyncio.to_thread(self._ledger.contributions, found.round_id))
            wanted = found.spec.contributions_max or await asyncio.to_thread(self._able, found)
            left = found.task.deadline - self._clock()
            if found.round_id in self._aborted:
                return found, Event.ABORTED
            if admitted >= found.spec.quorum and (admitted >= wanted or left <= 0):
                return found, Event.COLLECTED
            if left <= 0:
                reason = f"expected a quorum of {found.spec.quorum} contributions, found {admitted} at the deadline"
                return msgspec.structs.replace(found, reason=reason), Event.TOO_FEW
            async with self._intake.admitted:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._intake.admitted.wait(), min(left, self._tick_s))

    def _able(self, found: Round) -> int:
        """How many devices may take part: those heard lately that run the base. The quorum is always waited for."""
        since = self._clock() - AWAKE_S
        able = [record for record in self._ledger.devices() if record.last_seen >= since]
        return max(found.spec.quorum, sum(record.running == found.task.base for record in able))

    async def _freeze(self, found: Round) -> tuple[Round, Event]:
        """Fix the ordered list. The state is FROZEN already, so whatever is not admitted by now is refused as late;
        the lock waits for a batch that began to be admitted before."""
        async with self._intake.admitting:
            admitted = await asyncio.to_thread(self._ledger.contributions, found.round_id)
        frozen = found.frozen or tuple(entry.digest for entry in admitted)
        root = merkle.root([bytes.fromhex(digest) for digest in frozen])
        figures = {**found.figures, "bytes_uploaded": sum(entry.size for entry in admitted)}
        return msgspec.structs.replace(found, frozen=frozen, root=root, figures=figures), Event.BEGUN

    async def _aggregate(self, found: Round) -> tuple[Round, Event]:
        """One attempt on the frozen set. The result is durable before the state says so; a result that is there already
        (the coordinator died in between) is taken instead of a second opening."""
        result = await asyncio.to_thread(self._ledger.round_result, found.round_id)
        if result is not None:
            return _decided(found, decision_in(result[1]))
        if found.attempt >= ATTEMPTS_MAX:
            return msgspec.structs.replace(
                found,
                reason=found.failures[-1] if found.failures else f"{ATTEMPTS_MAX} attempts were begun, none ended",
            ), Event.EXHAUSTED
        # The attempt's number is durable before anybody hears it: a number is used once.
        found = msgspec.structs.replace(found, attempt=found.attempt + 1)
        await asyncio.to_thread(self._save_round, found)
        paid = await asyncio.to_thread(self._pay, found)
        if paid is not None:
            found = msgspec.structs.replace(found, figures={**found.figures, "privacy": _figures(paid, found.spec)})
        announcement = seal_envelope(
            await asyncio.to_thread(self._keyring.sign, ROLE_ROUND, TASK_TYPE, pack(found.task))
        )
        payload = {
            "round_id": found.round_id,
            "attempt": found.attempt,
            "task": announcement,
            "contributions": list(found.frozen),
            "root": found.root,
            "deadline_s": found.spec.aggregation_s,
        }
        names = [key.name for key in found.task.aggregators]
        try:
            replies = await self._bridge.command(payload, names, found.spec.aggregation_s)
        except Unavailable as error:
            failures = (*found.failures, str(error)[:500])
            await asyncio.to_thread(
                self._note, "alert", f"round {found.round_id}: attempt {found.attempt} failed: {error}"
            )
            await asyncio.sleep(self._tick_s * found.attempt)
            return msgspec.structs.replace(found, failures=failures), Event.ATTEMPT_FAILED
        ordered = [replies[name] for name in names]
        aggregate = await asyncio.to_thread(combine_openings, ordered, found.task)
        settled = _settlement(found, mean_digest(aggregate.mean), paid)
        signed = seal_envelope(await asyncio.to_thread(self._keyring.sign, ROLE_ROUND, SETTLEMENT_TYPE, pack(settled)))
        transcript = pack_transcript(transcript_of(announcement, ordered, signed))
        mean = b"" if aggregate.mean is None else aggregate.mean.astype("<f4").tobytes()
        await asyncio.to_thread(self._ledger.save_round_result, found.round_id, mean, transcript)
        return _decided(found, aggregate.decision)

    def _pay(self, found: Round) -> Charge | None:
        """What the opening costs, written down; None without privacy. Raises Malformed when it would overspend."""
        if found.spec.privacy is None:
            return None
        frozen = set(found.frozen)
        entries = self._ledger.contributions(found.round_id)
        names = [entry.device_id for entry in entries if entry.digest in frozen]
        return charge(self._ledger, found.task.model, found.spec.privacy, found.round_id, names)

    def _candidate_source(self, found: Round) -> bytes:
        result = self._ledger.round_result(found.round_id)
        if result is None:
            raise NotFound(f"round {found.round_id}: its result is not in the ledger")
        return masters.apply_mean(self._publisher.source(found.task.base), np.frombuffer(result[0], dtype="<f4"))

    async def _judge(self, found: Round) -> tuple[Round, Event]:
        return await asyncio.to_thread(self._judge_now, found)

    def _judge_now(self, found: Round) -> tuple[Round, Event]:
        source = self._candidate_source(found)
        candidate = self._publisher.prepare(source, model=found.task.model, now=self._clock(), parent=found.task.base)
        if self._evaluate is None:
            return found, Event.PASSED
        base = self._publisher.manifest(found.task.base)
        before = self._evaluate(base, self._publisher.file(found.task.base))
        after = self._evaluate(candidate.draft, candidate.file)
        gates = judge(after, before, found.spec.gates or self._limits)
        figures = {
            **found.figures,
            "average_precision_base": before.average_precision,
            "average_precision_candidate": after.average_precision,
            "gates": {gate.name: gate.reason for gate in gates},
        }
        found = msgspec.structs.replace(found, figures=figures)
        refused = failed(gates)
        if refused:
            return msgspec.structs.replace(found, reason=refused), Event.GATE_CLOSED
        return found, Event.PASSED

    async def _release(self, found: Round) -> tuple[Round, Event]:
        source = await asyncio.to_thread(self._candidate_source, found)
        record = await self._publish(
            source,
            model=found.task.model,
            name=found.round_id,
            parent=found.task.base,
            lineage=Lineage(round_id=found.round_id, contributions_root=found.root),
        )
        found = msgspec.structs.replace(found, candidate=record.manifest)
        if found.spec.autopilot:
            told = await self._begin_canary(found)
            found = msgspec.structs.replace(found, figures={**found.figures, "autopilot": told})
        return found, Event.RELEASED

    async def _begin_canary(self, found: Round) -> str:
        """Roll the candidate out by itself, under the round's name; what came of it. That it cannot begin now (another
        rollout decides) is for an operator to see, and no failure of the round."""
        text = found.spec.rollout or await asyncio.to_thread(self._rollouts.last_yaml, found.task.model)
        try:
            begun = await self._rollouts.start(text, found.candidate, "rollout", found.round_id)
        except Malformed as error:
            await asyncio.to_thread(self._note, "alert", f"round {found.round_id}: its canary did not begin: {error}")
            return f"did not begin: {error}"
        return f"rollout {begun.name} began"


def _settlement(found: Round, mean: str, paid: Charge | None) -> Settlement:
    settled = Settlement(
        tenant=found.task.tenant, model=found.task.model, round_id=found.round_id, root=found.root, mean=mean
    )
    if paid is None or found.spec.privacy is None:
        return settled
    return msgspec.structs.replace(
        settled,
        spend=paid.spend,
        before_release=paid.before_release,
        before_device=paid.before_device,
        delta=found.spec.privacy.delta,
        epsilon_release=paid.account.epsilon_release,
        epsilon_device=paid.account.epsilon_device,
    )


def _figures(paid: Charge, spec: RoundSpec) -> dict[str, float]:
    return {
        "epsilon_release": round(paid.account.epsilon_release, 4),
        "epsilon_device": round(paid.account.epsilon_device, 4),
        "delta": spec.privacy.delta if spec.privacy is not None else 0.0,
        "noise_multiplier": paid.spend.noise_multiplier,
    }


def _decided(found: Round, decision: Decision) -> tuple[Round, Event]:
    """The round with everybody's verdict; it ends here when the aggregators refused to open anything."""
    found = msgspec.structs.replace(
        found,
        chosen=tuple(device.device_id for device in decision.devices if device.selected),
        rejected={device.device_id: device.reason for device in decision.devices if not device.selected},
    )
    if decision.refusal:
        return msgspec.structs.replace(found, reason=f"the aggregators refused: {decision.refusal}"), Event.BROKEN
    return found, Event.OPENED
