"""A round begins: from what an operator wants to a signed task that fits what the platform can open and has learned.

Whatever would make it fail for certain is refused here, before any device trains.
"""

from __future__ import annotations

import base64
import secrets
from collections.abc import Sequence

import msgspec
import numpy as np

from fl_coordinator import masters
from fl_coordinator.cohorts import read_rollout
from fl_coordinator.enrolment import AGGREGATORS
from fl_coordinator.ledger import Ledger
from fl_coordinator.ports import Clock, Note
from fl_coordinator.publishing import Publisher
from fl_coordinator.recorded_rounds import every_round, save_round
from fl_coordinator.remembered_rounds import newest_memory
from fl_coordinator.rollout_driver import RolloutDriver
from fl_coordinator.rounds import Round, RoundSpec, State, newest_of
from fl_coordinator.rules.policy import remembers
from fl_coordinator.shares.bounds import fitted, most, require_announceable
from fl_coordinator.shares.contribution import OVERHEAD_BYTES, size_max
from fl_coordinator.shares.remembering import RoundMemory, memory_name
from fl_coordinator.shares.streams import WORD_BYTES
from fl_coordinator.spending import require_affordable
from model_delta.digest import digest_of
from model_delta.encoding import pack, unpack
from model_delta.errors import Malformed, Unavailable
from model_delta.graphs.training import step_of
from model_delta.keys.keyring import Keyring
from model_delta.store import ArtifactStore
from model_delta.task import TASK_TYPE, AggregatorKey, RoundTask
from model_delta.topics import MESSAGE_BYTES_MAX
from model_delta.trust.signing import open_envelope, seal_envelope

ROLE_ROUND = "round"


def signed_task(keyring: Keyring, task: RoundTask) -> bytes:
    """The announcement of a round. Blocking."""
    return seal_envelope(keyring.sign(ROLE_ROUND, TASK_TYPE, pack(task)))


def _graph_of(spec: RoundSpec) -> bytes:
    try:
        graph = base64.b64decode(spec.graph, validate=True)
    except ValueError:
        raise Malformed("round: graph: expected a training graph as base64, found something else") from None
    step = step_of(graph, "round: training graph")
    if step.momentum != (spec.momentum > 0):
        expected = "with momentum" if spec.momentum > 0 else "without momentum"
        raise Malformed(
            f"round: training graph: expected one {expected}, as the round's momentum is {spec.momentum:g}; "
            "set the round's to 0, or make the graph anew"
        )
    return graph


class Announcing:
    """Makes rounds of one tenant. Blocking."""

    def __init__(
        self,
        *,
        tenant: str,
        ledger: Ledger,
        store: ArtifactStore,
        keyring: Keyring,
        publisher: Publisher,
        rollouts: RolloutDriver,
        clock: Clock,
        note: Note,
    ) -> None:
        self._tenant = tenant
        self._ledger = ledger
        self._store = store
        self._keyring = keyring
        self._publisher = publisher
        self._rollouts = rollouts
        self._clock = clock
        self._note = note

    def announced(self, spec: RoundSpec) -> Round:
        """A new round, written down, or the one of this name. Blocking. Raises Malformed for a spec that cannot work,
        Unavailable while another one is open."""
        rounds = every_round(self._ledger)
        if spec.name:
            named = next((one for one in rounds if (one.task.model, one.spec.name) == (spec.model, spec.name)), None)
            if named is not None:
                return named
        open_now = newest_of(rounds, spec.model)
        if open_now is not None and open_now.live:
            raise Unavailable(f"round {open_now.round_id} of {spec.model} is {open_now.state}; wait for its end")
        base = spec.base or self._ledger.stable(spec.model)
        if not base:
            raise Malformed(f"round: model {spec.model!r} has no stable version; publish one and roll it out first")
        self._require_canary(spec)
        budget = spec.privacy
        if budget is not None:
            require_affordable(self._ledger, spec.model, budget)
        manifest, source = self._publisher.manifest(base), self._publisher.source(base)
        if spec.graph:
            graph = _graph_of(spec)
            parameters = masters.parameters_trained(manifest, step_of(graph, "round: training graph"))
        else:
            graph = masters.training_graph(source, spec.positive_weight, spec.momentum)
            parameters = masters.parameters_of(manifest)
        self._store.put("artifact", digest_of(graph), graph)
        now = self._clock()
        aggregators = tuple(record.key for record in self._ledger.aggregators()[:AGGREGATORS])
        memory = self._memory(rounds, spec, aggregators)
        issued = int(now)
        if open_now is not None:  # its end was announced too, and a clock may have been set back since
            issued = max(issued, unpack(open_envelope(open_now.announcement).payload, RoundTask).issued + 1)
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
            momentum=spec.momentum,
            clip_norm_l2=spec.clip_norm_l2,
            hostile_max=spec.hostile_max,
            selected_min=spec.selected_min,
            aggregators=aggregators,
            issued=issued,
            deadline=int(now + spec.deadline_s),
            contributions_max=spec.contributions_max or min(most(spec.reveal), max(spec.quorum, 2 * enrolled)),
            policy=spec.policy,
            reveal=spec.reveal,
            eps_l2=spec.eps_l2,
            noise_multiplier=budget.noise_multiplier if budget is not None else 0.0,
            epsilon=budget.epsilon if budget is not None else 0.0,
            epsilon_device=(budget.epsilon_device or budget.epsilon) if budget is not None else 0.0,
            delta=budget.delta if budget is not None else 0.0,
            memory=memory_name(memory) if memory is not None else "",
            memory_round=memory.round_id if memory is not None else "",
        )
        task = fitted(task)
        require_announceable(task)
        if size_max(task) > MESSAGE_BYTES_MAX:
            raise Malformed(
                f"round {task.round_id!r}: expected at most {(MESSAGE_BYTES_MAX - OVERHEAD_BYTES) // WORD_BYTES} "
                f"parameters, found {task.length}: a contribution is one message of at most {MESSAGE_BYTES_MAX} bytes"
            )
        opened = Round(
            round_id=task.round_id,
            spec=msgspec.structs.replace(spec, base=base, graph=""),
            task=task,
            announcement=signed_task(self._keyring, task),
            state=State.ANNOUNCED.value,
            opened=now,
        )
        save_round(self._ledger, opened)
        self._note("info", f"round {opened.round_id}: announced on {base[:16]}…, {task.length} parameters")
        return opened

    def _memory(
        self, rounds: Sequence[Round], spec: RoundSpec, aggregators: Sequence[AggregatorKey]
    ) -> RoundMemory | None:
        """What a policy that remembers begins with."""
        if not remembers(spec.policy):
            return None
        return newest_memory(self._ledger, rounds, spec.model, spec.policy, aggregators)

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
