"""Asking the director how to get to a version, and doing as it says within the device's own checks.

When an update is due the device signs what it has (`VersionReport`) and waits a moment for a `DevicePlan`. An answer is
followed if it is signed by the role `director`, for this device, this model and this very question, newer than any
before it and not expired; if the signed rollout plan gives this device the version; and if its steps start from files
that stand here, end at that version and fit this device. Anything else is refused, counted and told as an alarm.

Two ways lead to a version, and which one is taken is no matter of safety:

    directed     the director answered in time: its steps are walked, no delivery is fetched
    by itself    nobody answered (an older coordinator, a broker that drops questions, a line too slow), the answer was
                 refused, or its steps did not lead there: the device plans from the deliveries, as it can without any
                 coordinator

Both end at the version that the rollout plan gives, with a manifest that is vouched for and a file under its digests.
So silencing the director gains nothing but dearer routes, and that it is silent is told as an alarm after
SILENCES_ALARM questions. After an installation the device reports its new state; nobody has to answer.

What must survive is one small file: the serial of the newest plan accepted and the counter of the newest report,
written before the one is followed and the other is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path

import msgspec

from edge_runtime.identity import Identity
from edge_runtime.link import Link
from edge_runtime.slots import replace_file
from model_delta.encoding import pack, unpack
from model_delta.errors import AtollError, Malformed, Unavailable
from model_delta.manifest import Manifest, manifest_digest
from model_delta.patch.route import DeviceLimits, Route
from model_delta.plan import DeviceTraits, RolloutPlan
from model_delta.topics import PlanAnswer, down, up
from model_delta.trust.director import (
    ALARM_CHARACTERS_MAX,
    AT_HAND_MAX,
    DAMAGED_MAX,
    FORMATS_MAX,
    HELD_MAX,
    NONCE_BYTES,
    ROLE_DIRECTOR,
    VERSION_REPORT_TYPE,
    DirectorState,
    HeldFile,
    Question,
    VersionReport,
    accept_device_plan,
    walkable_route,
)
from model_delta.trust.signing import seal_envelope, sign
from model_delta.trust.updater import TrustAnchors

SILENCES_ALARM = 3
ASK_AGAIN_S = 60.0
"""How long a device that heard no answer plans for itself before it asks again."""
ALARM_KEPT_S = 86_400
"""How long an alarm is told while no director is heard to have it: whoever drops reports cannot hide it by that."""
CONNECTION_POLL_S = 0.25
REPORT_AGAIN_S = 1.0
ANSWER_BYTES_MAX = 900_000

_log = logging.getLogger(__name__)


class Standing(msgspec.Struct, frozen=True):
    """What a report says of the device beside its files; the fields are those of `VersionReport`."""

    running: str
    release_floor: int
    plan_serial: int


class DirectionRecord(msgspec.Struct, frozen=True):
    """What survives: how far directing has advanced, and what is yet to be told (`alarmed`: from then on, in s)."""

    state: DirectorState = DirectorState()
    alarm: str = ""
    alarmed: int = 0


class Direction:
    """One model's questions on one device. For one event loop.

    `anchors`, `rollout`, `standing` and `held` are asked whenever they are needed (`held` in a thread, since it reads
    the files): the role keys of the day, the newest accepted rollout plan, the device's state, the files that stand
    there. `offered` takes a sealed rollout plan that the director sent along. `clock` is wall time; `draw` gives bytes
    that nobody can foresee.
    """

    def __init__(
        self,
        *,
        identity: Identity,
        traits: DeviceTraits,
        model: str,
        link: Link,
        path: Path,
        anchors: Callable[[], TrustAnchors],
        rollout: Callable[[], RolloutPlan | None],
        offered: Callable[[bytes], None],
        standing: Callable[[], Standing],
        held: Callable[[], tuple[HeldFile, ...]],
        clock: Callable[[], float],
        limits: DeviceLimits,
        cached_cost: float = 1.0,
        answer_deadline_s: float = 3.0,
        ask_again_s: float = ASK_AGAIN_S,
        draw: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._identity, self._traits, self._model = identity, traits, model
        self._link, self._path, self._anchors = link, path, anchors
        self._rollout, self._offered, self._standing, self._held = rollout, offered, standing, held
        self._clock, self._limits, self._cached_cost = clock, limits, cached_cost
        self._answer_deadline_s, self._ask_again_s, self._draw = answer_deadline_s, ask_again_s, draw
        self._record = _read(path)
        self._waiting: dict[bytes, asyncio.Future[PlanAnswer]] = {}
        self._installed = asyncio.Event()
        self._silences = 0
        self._quiet_until = 0.0
        self.refused = 0
        self.directed = 0

    @property
    def alarm(self) -> str:
        """What looked like an attack in the last day, and was not heard by a director yet; "" when there is nothing."""
        record = self._record
        return record.alarm if self._clock() < record.alarmed + ALARM_KEPT_S else ""

    def start(self) -> None:
        """Subscribe to the answers."""
        self._link.subscribe(down(self._traits.device_id, "plan"), self._answered)

    def installed(self) -> None:
        """Something else runs now: report it soon."""
        self._installed.set()

    async def run(self) -> None:
        """Report after installations, until cancelled. A report that could not be sent is made anew."""
        while True:
            await self._installed.wait()
            if self._has_director() and self._link.connected:
                self._installed.clear()
                try:
                    await self._send(self._report("", await asyncio.to_thread(self._held)))
                except (AtollError, OSError) as error:  # the broker went away, or the disk takes nothing
                    _log.info("%s: version report: %s", self._traits.device_id, error)
                    self._installed.set()
                    await asyncio.sleep(REPORT_AGAIN_S)
            await asyncio.sleep(CONNECTION_POLL_S)

    async def route(
        self,
        want: Manifest,
        *,
        held: tuple[HeldFile, ...],
        files: Container[str],
        pieces: Container[str],
        manifests: Mapping[str, Manifest],
        at_hand: Iterable[str] = (),
    ) -> Route | None:
        """The director's steps to `want`, checked; None when the device has to plan for itself.

        `held`: what the device tells of its files. `files`, `pieces` and `manifests`: what it has, as for
        `patch.route.plan_update`. `at_hand`: sealed blobs on disk. Raises StorageFailed when the
        counter cannot be written down.
        """
        answer, question = await self._ask(manifest_digest(want), held, at_hand)
        if answer is None:
            return None
        if answer.rollout:
            self._offered(answer.rollout)  # judged there, by the keys of the role `plan`
        rollout = self._rollout()
        if answer.error or rollout is None:
            _log.info("%s: no plan from the director: %s", self._traits.device_id, answer.error[:200])
            return None
        try:
            plan, state = accept_device_plan(
                answer.plan, question, self._anchors(), self._record.state, rollout, self._traits, self._clock()
            )
            self._write(DirectionRecord(state))  # the report that carried an alarm was heard
            found = walkable_route(plan, want, files=files, pieces=pieces, manifests=manifests, limits=self._limits)
        except Unavailable:
            raise
        except AtollError as error:
            self.failed(str(error))
            return None
        self.directed += 1
        return found

    def failed(self, reason: str) -> None:
        """The director's answer was refused, or its steps did not lead to the version: an alarm, told with the next
        report."""
        self.refused += 1
        _log.warning("%s: the director's plan: %s", self._traits.device_id, reason)
        self._raise_alarm(reason)

    async def _ask(
        self, wanted: str, held: tuple[HeldFile, ...], at_hand: Iterable[str]
    ) -> tuple[PlanAnswer | None, Question]:
        """The answer to a fresh question, or None when there is nobody to ask, or no answer in time."""
        question = Question(self._model, self._draw(NONCE_BYTES))
        if not self._has_director() or not self._link.connected or time.monotonic() < self._quiet_until:
            return None, question
        report = self._report(wanted, held, question.nonce, at_hand)
        answer: asyncio.Future[PlanAnswer] = asyncio.get_running_loop().create_future()
        self._waiting[question.nonce] = answer
        try:
            async with asyncio.timeout(self._answer_deadline_s):
                await self._send(report)
                found = await answer
        except Unavailable:  # the broker is away: that is not the director's silence
            return None, question
        except TimeoutError:
            self._quiet_until = time.monotonic() + self._ask_again_s
            self._silences += 1
            if self._silences >= SILENCES_ALARM:
                self._raise_alarm(f"no director answered {self._silences} questions in a row")
            return None, question
        finally:
            del self._waiting[question.nonce]
        self._silences = 0
        return found, question

    def _report(
        self, wanted: str, held: tuple[HeldFile, ...], nonce: bytes = b"", at_hand: Iterable[str] = ()
    ) -> VersionReport:
        """The next report, after its counter is on disk. A device whose folder was lost goes on above its old counters
        by the clock."""
        standing = self._standing()
        now, state = self._clock(), self._record.state
        counter = max(state.counter + 1, int(now * 1000))
        self._write(msgspec.structs.replace(self._record, state=msgspec.structs.replace(state, counter=counter)))
        return VersionReport(
            tenant=self._traits.tenant,
            device_id=self._traits.device_id,
            model=self._model,
            wanted=wanted,
            running=standing.running,
            held=held[:HELD_MAX],
            release_floor=standing.release_floor,
            plan_serial=standing.plan_serial,
            director_serial=state.serial,
            at_hand=tuple(sorted(at_hand))[:AT_HAND_MAX],
            memory_bytes=self._limits.memory_bytes or 0,
            flash_bytes=self._limits.flash_bytes or 0,
            formats=tuple(sorted(self._limits.formats))[:FORMATS_MAX],
            cached_cost=self._cached_cost,
            nonce=nonce or self._draw(NONCE_BYTES),
            counter=counter,
            time=int(now),
            alarm=self.alarm,
        )

    async def _send(self, report: VersionReport) -> None:
        envelope = seal_envelope(sign(VERSION_REPORT_TYPE, pack(report), [self._identity.private]))
        await self._link.publish(up(self._traits.device_id, "version"), envelope)

    def _has_director(self) -> bool:
        return ROLE_DIRECTOR in self._anchors().roles

    def _answered(self, _topic: str, payload: bytes) -> None:
        if len(payload) > ANSWER_BYTES_MAX:
            return
        try:
            answer = unpack(payload, PlanAnswer)
        except Malformed:
            return  # the question stays open and runs into its deadline
        found = self._waiting.get(answer.nonce)
        if found is not None and not found.done():
            found.set_result(answer)

    def _raise_alarm(self, text: str) -> None:
        with contextlib.suppress(AtollError):  # a full disk: it is told while this process lives
            alarm, now = text[:ALARM_CHARACTERS_MAX], int(self._clock())
            self._record = msgspec.structs.replace(self._record, alarm=alarm, alarmed=now)
            self._write(self._record)

    def _write(self, record: DirectionRecord) -> None:
        replace_file(self._path, pack(record))
        self._record = record


def held_files(
    manifests: Mapping[str, Manifest],
    files: Container[str],
    pieces: Container[str],
    root_there: Callable[[str], str],
) -> tuple[HeldFile, ...]:
    """What stands on the device, as a report tells it. `root_there` computes the Merkle root of the file of a version
    as it stands; it is asked only about files that are not what their manifest says."""
    found = []
    for digest, manifest in sorted(manifests.items()):
        if digest in files:
            found.append(HeldFile(digest, manifest.merkle_root))
            continue
        damaged = tuple(index for index, item in enumerate(manifest.segments) if item.digest not in pieces)
        found.append(HeldFile(digest, root_there(digest), damaged[:DAMAGED_MAX]))
    return tuple(found)


def _read(path: Path) -> DirectionRecord:
    """The record; a fresh one where there is none. Raises Malformed for a damaged file: starting over would let an old
    plan pass as new."""
    if not path.exists():
        return DirectionRecord()
    try:
        return unpack(path.read_bytes(), DirectionRecord)
    except Malformed as error:
        raise Malformed(f"direction record at {path}: {error}; move the file away to start over") from None
