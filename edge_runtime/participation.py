"""The device's part in a federated round: one step on local payments, one contribution, sent until it is receipted.

What must never happen is a second, different contribution to a round: the two would differ by noise an attacker can
use, and count twice. So the contribution is on disk before it is sent for the first time, and from then on the same
bytes are sent, also after the power was off, until a receipt comes or the round closes. The raw update is never stored.

Momentum outlives a round: the velocity that training left is kept, as long as the vector and in the same file, written
in one piece with the contribution. So after a power cut either both are there or neither, and a round counts in the
velocity once. It says as much about the device's payments as an update does; it stays where they are. A device that
sits a round out begins anew from zeros, so that no velocity can make training fail for ever.

Deciding does not depend on learning: whatever goes wrong in a round, be it a disk that is full or a step that nobody
can compute, the device sits that round out and goes on answering. Its reports name the reason while the round is open:
one word of a short list (`SatOut`), nothing that was computed.

A round's base need not be the version that answers: a device that runs another version of the model fetches the base
as it would fetch an update (a patch, as a rule), trains from it, and goes on answering with its own. A device without a
version that may answer sits the round out.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_runtime.fetching import Fetcher
from edge_runtime.inference import RunGraph
from edge_runtime.link import Link
from edge_runtime.running import Running
from edge_runtime.slots import replace_file
from edge_runtime.training import Diverged, LocalUpdate
from edge_runtime.vouching import Vouching
from edge_runtime.waiting import wait_at_most
from model_delta.digest import digest_of, require_match
from model_delta.encoding import pack, unpack
from model_delta.errors import AtollError, Expired, Malformed, SignatureInvalid, StorageFailed, StorageFull, Unavailable
from model_delta.task import RoundTask, SatOut
from model_delta.topics import ContributionReceipt, down, up
from model_delta.trust.sitting_out import sitting_out_message
from model_delta.trust.updater import TrustState, accept_task
from monitoring.telemetry import SittingOut

Data = tuple[NDArray[np.float32], NDArray[np.float32]]
Contribute = Callable[[NDArray[np.float32], RoundTask], bytes]
Floats = NDArray[np.float32]
Train = Callable[[bytes, RoundTask, bytes, Floats, Floats, Floats, np.random.Generator, RunGraph], LocalUpdate]

BaseFile = Callable[[str, Mapping[str, bytes]], Awaitable[bytes]]
"""The checked file of a version by digest, given files at hand besides those installed."""

STEPS_MAX = 100_000
BATCH_MAX = 100_000
"""The most of either that a coordinator announces (`rounds.RoundSpec`); whoever announces more means to keep devices
busy."""

DISK_AGAIN_S = 0.5
"""When an announcement is heard again that the disk did not take."""

_log = logging.getLogger(__name__)


class RoundRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The last round this device sent to: its bytes, and how it ended ("" while waiting for the receipt). `sat_out` is
    the reason where it sat the round out. `velocity` is what the next round begins with, float32 little endian, if it
    trains the same tensors (`layout`)."""

    round_id: str = ""
    contribution: bytes = b""
    ended: str = ""
    loss_before: float = 0.0
    loss_after: float = 0.0
    velocity: bytes = b""
    layout: str = ""
    sat_out: str = ""


@dataclass
class Learning:
    """What a device has that trains: its labelled rows, the training, what makes a contribution of an update, and what
    runs a graph."""

    data: Callable[[], Data]
    train: Train
    contribute: Contribute
    run_graph: RunGraph


class Participation:
    """Follows round announcements for one device and model. Without `learning` it only says that it sits them out, so
    that no round waits for it. `told` is called when `sitting_out` has something to say that will not change any
    more."""

    def __init__(
        self,
        *,
        device_id: str,
        model: str,
        path: Path,
        link: Link,
        fetcher: Fetcher,
        running: Running,
        base_file: BaseFile,
        vouching: Vouching,
        clock: Callable[[], float],
        rng: np.random.Generator,
        learning: Learning | None,
        sign: Callable[[bytes], bytes],
        trust: Callable[[], TrustState],
        keep_trust: Callable[[TrustState], None],
        told: Callable[[], None] = lambda: None,
        receipt_deadline_s: float = 5.0,
    ) -> None:
        self._device_id, self._model, self._path = device_id, model, path
        self._link, self._fetcher, self._running, self._base_file = link, fetcher, running, base_file
        self._vouching, self._clock, self._rng = vouching, clock, rng
        self._learning, self._sign = learning, sign
        self._trust, self._keep_trust = trust, keep_trust
        self._told, self._receipt_deadline_s = told, receipt_deadline_s
        self._jitter = random.Random(int(rng.integers(1 << 62)))
        self._task: RoundTask | None = None
        self._unjudged: tuple[str, bytes] | None = None
        self._untaken = b""
        self._heard = b""
        vouching.on_new_anchors(self._announced_again)
        self._changed = asyncio.Event()
        self._graphs: dict[str, bytes] = {}
        self._last_base: dict[str, bytes] = {}
        self._doing = SatOut.OTHER
        self._passing = ("", SatOut.OTHER)
        self._said: SittingOut | None = None
        self._left_out: ContributionReceipt | None = None
        self._disk_failed = False
        self.refused = 0
        self.last_refusal = ""
        self.record, self._forgot = _read(path)

    def announced(self, topic: str, payload: bytes) -> None:
        """A round announcement has arrived; an unbelievable one is counted and otherwise ignored. One that is signed by
        unknown keys is judged again when there are new ones. The last one again, from another relay or after a
        reconnection, is nothing new."""
        if payload == self._heard:
            return
        anchors, self._unjudged, self._untaken = self._vouching.anchors, None, b""
        try:
            task, trust = accept_task(payload, self._model, anchors, self._trust(), self._clock())
            if trust != self._trust():
                self._keep_trust(trust)
        except Expired:
            return  # a round that closed while we were away
        except StorageFailed as error:  # a retained message does not come again by itself
            _log.info("%s: round announcement: %s", self._device_id, error)
            self._untaken = payload
            asyncio.get_running_loop().call_later(DISK_AGAIN_S, self._announced_untaken, topic, payload)
            return
        except AtollError as error:
            self.refused += 1
            self.last_refusal = str(error)
            _log.warning("%s: round announcement refused: %s", self._device_id, error)
            if isinstance(error, SignatureInvalid):
                self._unjudged = (topic, payload)
                self._vouching.ask_soon()
            return
        self._task, self._heard = task, payload
        self._changed.set()

    def _announced_again(self) -> None:
        if self._unjudged is not None:
            self.announced(*self._unjudged)

    def _announced_untaken(self, topic: str, payload: bytes) -> None:
        if payload == self._untaken:  # a later one did not come instead
            self.announced(topic, payload)

    def receipted(self, _topic: str, payload: bytes) -> None:
        """The coordinator has the contribution, or refuses it for good; maybe before there is one, or even before the
        announcement comes."""
        try:
            receipt = unpack(payload, ContributionReceipt)
        except AtollError:
            return
        if receipt.round_id != self.record.round_id:
            if not receipt.accepted:
                self._left_out = receipt
                self._changed.set()
        elif not self.record.ended:
            ended = "accepted" if receipt.accepted else f"refused: {receipt.reason}"[:300]
            self._end(msgspec.structs.replace(self.record, ended=ended, contribution=b""))
            self._changed.set()

    def start(self) -> None:
        """Subscribe to the receipts (announcements are the caller's subscription)."""
        self._link.subscribe(down(self._device_id, "receipt"), self.receipted)

    @property
    def sitting_out(self) -> SittingOut | None:
        """The open round that this device takes no part in, at the moment or for good, and why, signed; None when there
        is none."""
        task, record = self._task, self.record
        if task is None or not task.open or self._clock() >= task.deadline:
            return None
        if record.round_id == task.round_id:
            reason = record.sat_out
        else:
            reason = self._passing[1].value if self._passing[0] == task.round_id else ""
        if not reason:
            return None
        said = self._said
        if said is None or (said.round_id, said.reason) != (task.round_id, reason):  # every report tells it anew
            signature = self._sign(sitting_out_message(task, self._device_id, reason))
            self._said = said = SittingOut(task.round_id, reason, signature)
        return said

    async def run(self) -> None:
        """Take part in every announced round, until cancelled."""
        while True:
            self._changed.clear()
            pause = None
            task = self._task
            if task is not None and task.open and self._clock() < task.deadline:
                try:
                    pause = await self._take_part(task)
                except Unavailable as error:
                    pause = 0.5 + self._jitter.random()
                    self._disk_failed = self._disk_failed or isinstance(error, StorageFailed)
                    self._passing = (task.round_id, _reason(self._doing, error))
                    _log.info("%s: round %s: %s", self._device_id, task.round_id, error)
                except AtollError as error:
                    self._give_up(task, str(error), _reason(self._doing, error))
                except Exception as error:  # of the step, the disk, the data: no reason to stop deciding
                    _log.exception("%s: round %s", self._device_id, task.round_id)
                    self._give_up(task, f"{type(error).__name__}: {error}", _reason(self._doing, error))
            await wait_at_most(self._changed, pause)

    async def _take_part(self, task: RoundTask) -> float | None:
        """One attempt; seconds until the next is due, or None when there is nothing left to do."""
        if self._learning is None:  # the next report says so; a fleet that tells it at once would be a herd
            self._passing = (task.round_id, SatOut.NO_TRAINING)
            return None
        self._doing = SatOut.FORGOTTEN
        if self._forgot:
            raise Malformed(f"{self._path}: {self._forgot}; what was sent to this round is not known any more")
        if self.record.round_id != task.round_id:
            if self._is_left_out(task):
                return None
            if self._running.blocked(self._clock()):
                self._passing = (task.round_id, SatOut.NO_VERSION)
                return 1.0  # a version may still be adopted before the round closes
            await self._prepare(task, self._learning)
        if self.record.ended:
            return None
        self._doing = SatOut.TOO_LARGE
        await self._link.publish(up(self._device_id, "contribution"), self.record.contribution)
        return self._receipt_deadline_s * (0.75 + self._jitter.random() / 2)

    async def _prepare(self, task: RoundTask, learning: Learning) -> None:
        """Train, share and store the one contribution to this round."""
        if self._disk_failed:  # it is asked first, before training in vain again
            self._doing = SatOut.CONTRIBUTION
            self._write(self.record)
            self._disk_failed = False
        self._doing = SatOut.TERMS
        if not (0 <= task.steps <= STEPS_MAX and 0 < task.batch_size <= BATCH_MAX):
            raise Malformed(
                f"round {task.round_id}: expected up to {STEPS_MAX} steps of up to {BATCH_MAX} payments, found "
                f"{task.steps} of {task.batch_size}"
            )
        self._doing = SatOut.GRAPH
        graph = await self._graph(task.training_graph)
        self._doing = SatOut.BASE
        file = await self._base_file(task.base, self._last_base)
        self._last_base = {task.base: file}
        self._doing = SatOut.NO_DATA
        features, labels = learning.data()
        rng = np.random.default_rng(self._rng.integers(1 << 62))
        layout = _layout(task)
        velocity = np.frombuffer(self.record.velocity if self.record.layout == layout else b"", "<f4")

        def compute() -> tuple[bytes, LocalUpdate]:
            self._doing = SatOut.TRAINING
            local = learning.train(file, task, graph, features, labels, velocity, rng, learning.run_graph)
            self._doing = SatOut.CONTRIBUTION
            return learning.contribute(local.update, task), local

        contribution, local = await asyncio.to_thread(compute)
        if self._is_left_out(task):
            return
        self._write(
            RoundRecord(
                round_id=task.round_id,
                contribution=contribution,
                loss_before=local.loss_before,
                loss_after=local.loss_after,
                velocity=local.velocity.astype("<f4").tobytes(),
                layout=layout if local.velocity.size else "",
            )
        )

    def _is_left_out(self, task: RoundTask) -> bool:
        """Whether the coordinator said it would refuse any contribution: then the round is over for this device."""
        receipt = self._left_out
        if receipt is None or receipt.round_id != task.round_id:
            return False
        self._end(RoundRecord(round_id=task.round_id, ended=f"refused: {receipt.reason}"[:300]))
        return True

    async def _graph(self, digest: str) -> bytes:
        if digest not in self._graphs:
            graph = await self._fetcher.object("artifact", digest)
            require_match(graph, digest, f"training graph {digest[:16]}…")
            self._graphs = {digest: graph}
        return self._graphs[digest]

    def _give_up(self, task: RoundTask, reason: str, sat_out: SatOut) -> None:
        _log.warning("%s: sits out round %s: %s", self._device_id, task.round_id, reason[:300])
        self._end(RoundRecord(round_id=task.round_id, ended=f"sat out: {reason}"[:300], sat_out=sat_out.value))
        self._told()

    def _end(self, record: RoundRecord) -> None:
        """The round is over for this device: as long as this process lives that is so, whatever the disk takes."""
        try:
            self._write(record)
        except (AtollError, OSError) as error:
            self.record = record
            _log.warning("%s: round %s: %s", self._device_id, record.round_id, error)

    def _write(self, record: RoundRecord) -> None:
        replace_file(self._path, pack(record))
        self.record, self._forgot = record, ""


def _reason(doing: SatOut, error: Exception) -> SatOut:
    """The reason to tell of an `error` that came up while `doing`."""
    if isinstance(error, Diverged):
        return SatOut.DIVERGED
    if isinstance(error, StorageFull):
        return SatOut.NO_ROOM
    if isinstance(error, Unavailable) and doing in (SatOut.GRAPH, SatOut.BASE):
        return SatOut.UNREACHABLE
    if isinstance(error, Unavailable) and doing is SatOut.TRAINING:
        return SatOut.NO_DATA  # all that `Train` may lack
    return doing


def _layout(task: RoundTask) -> str:
    """Names the flat vector: equal for rounds whose vectors mean the same, number by number."""
    return digest_of(pack([[parameter.tensor, list(parameter.shape)] for parameter in task.parameters]))


def _read(path: Path) -> tuple[RoundRecord, str]:
    """The record, and what is wrong with the file where it cannot be read. The round that is open then is sat out: a
    second, different contribution must not leave the device."""
    try:
        return unpack(path.read_bytes(), RoundRecord), ""
    except FileNotFoundError:
        return RoundRecord(), ""
    except (Malformed, OSError) as error:
        _log.error("%s: %s; the next round is sat out", path, error)
        return RoundRecord(), str(error)[:200]
