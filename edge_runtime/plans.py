"""Which rollout plan this device follows.

What cannot be believed is counted and otherwise ignored; a believable plan is stored before it is followed, and an
expired one has no say.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from edge_runtime.journal import Journal
from edge_runtime.running import Running
from edge_runtime.vouching import Vouching
from model_delta.errors import AtollError, SignatureInvalid, StorageFailed
from model_delta.plan import DeviceTraits, RolloutPlan, assign
from model_delta.trust.updater import accept_plan

_log = logging.getLogger(__name__)


class Plans:
    """The plan in force for one model, and what it wants of this device. `changed` is set when another one is followed,
    `refused` counts those that were not believed. One that the disk did not take is tried again `retry_s` later;
    what it withdraws stops answering at once."""

    def __init__(
        self,
        *,
        traits: DeviceTraits,
        model: str,
        journal: Journal,
        vouching: Vouching,
        running: Running,
        clock: Callable[[], float],
        retry_s: float,
    ) -> None:
        self._traits, self._model, self._clock = traits, model, clock
        self._journal, self._vouching, self._running = journal, vouching, running
        self._retry_s = retry_s
        self._unjudged: tuple[str, bytes] | None = None
        self.refused = 0
        self.current: RolloutPlan | None = None
        self.changed = asyncio.Event()
        vouching.on_new_anchors(self._offer_again)
        self._remember()

    def offered(self, topic: str, payload: bytes) -> None:
        """A rollout plan has arrived. One that is signed by unknown keys is judged again when there are new ones."""
        anchors, self._unjudged = self._vouching.anchors, None
        record = self._journal.record
        try:
            plan, trust = accept_plan(payload, self._model, anchors, record.trust, self._clock())
            if trust != record.trust or payload != record.plan:
                self._journal.write(trust=trust, plan=payload)
        except StorageFailed:  # a retained message does not come again by itself
            self._running.withdrawn |= frozenset(plan.withdrawn)  # that much needs no disk
            asyncio.get_running_loop().call_later(self._retry_s, self.offered, topic, payload)
        except SignatureInvalid as error:
            self._refuse(error)
            self._unjudged = (topic, payload)
            self._vouching.ask_soon()
        except AtollError as error:
            self._refuse(error)
        else:
            self._follow(plan)

    @property
    def serial(self) -> int:
        """The serial of the newest accepted plan."""
        return self._journal.record.trust.plan_serial

    def wanted(self) -> str:
        """The version this device should run by the newest plan; "" when no valid plan says anything."""
        plan = self.current
        if plan is None or self._clock() >= plan.expires:
            return ""
        return assign(plan, self._traits).manifest

    def _refuse(self, error: AtollError) -> None:
        self.refused += 1
        _log.warning("%s: plan refused: %s", self._traits.device_id, error)

    def _offer_again(self) -> None:
        if self._unjudged is not None:
            self.offered(*self._unjudged)

    def _follow(self, plan: RolloutPlan) -> None:
        self.current = plan
        self._running.withdrawn = frozenset(plan.withdrawn)
        self.changed.set()

    def _remember(self) -> None:
        """Follow the plan that was accepted before the power went off."""
        record = self._journal.record
        if record.plan:
            with contextlib.suppress(AtollError):
                anchors, now = self._vouching.anchors, self._clock()
                plan, _ = accept_plan(record.plan, self._model, anchors, record.trust, now)
                self._follow(plan)
