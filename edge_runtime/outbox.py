"""What a device has to tell, kept on disk until somebody has it.

A bounded, append-only queue of `Decision`, `Inference`, `Feedback` and `UpdateOutcome` records, numbered from 1 within
an `epoch` (a random number drawn when the queue was created). Records live in segment files named after the first
number in them:

    frame = length (4 bytes, big endian) | CRC-32 of the payload (4 bytes) | payload = pack([kind, record])

A record is one plain `write`: it survives the death of the process; after a power cut a torn or damaged tail is cut off
when the queue is opened. `marks` holds how far the coordinator has acknowledged and the range of the last report, which
is written before that report is sent: a device that dies in between repeats exactly the same range, so the coordinator
can tell a repetition from news. (Marks are not waited for on the disk: a power cut may lose the last of them, and then
the coordinator's acknowledgement puts the numbering right.)

Acknowledged segments stay while there is room (`history_records`), so that the outcome of a payment, which comes weeks
later, can still be joined to its decision. When the queue is full the oldest records go, and the loss is counted.
A disk that is full, read-only or broken costs records, never answers.
"""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from edge_runtime.slots import replace_file
from model_delta.encoding import pack, unpack, unpack_plain
from model_delta.errors import AtollError, Malformed, NotFound
from monitoring.telemetry import (
    Decision,
    Feedback,
    Inference,
    ModelSummary,
    UpdateOutcome,
    Where,
    latency_bucket,
    merge_summaries,
)

Record = Decision | Inference | Feedback | UpdateOutcome

KINDS: dict[str, type[Record]] = {
    "decision": Decision,
    "inference": Inference,
    "feedback": Feedback,
    "outcome": UpdateOutcome,
}
_NAMES = {kind: name for name, kind in KINDS.items()}
_FRAME = struct.Struct(">II")
_RECORD_BYTES_MAX = 65_536


class Marks(msgspec.Struct, frozen=True, kw_only=True):
    """`acked`: the coordinator has everything up to here. `sent`: the last number in the last report. `dropped`:
    unacknowledged records lost to overflow or a full disk, since the epoch began, as are `lost_requests`: requests that
    no region answered."""

    epoch: int
    acked: int = 0
    sent: int = 0
    dropped: int = 0
    lost_requests: int = 0


class Folded(msgspec.Struct, frozen=True):
    """A range of records, folded: per version and place, and the update outcomes in order."""

    summaries: tuple[ModelSummary, ...]
    outcomes: tuple[UpdateOutcome, ...]


def fold(records: Iterable[Record]) -> Folded:
    """Fold records into summaries (sorted by version and place) and outcomes. Pure: one range, one result.

    A feedback counts at the place "device" of its version: where the decision fell does not change what was true.
    """
    found: dict[tuple[str, str], ModelSummary] = {}
    outcomes: list[UpdateOutcome] = []
    for record in records:
        if isinstance(record, UpdateOutcome):
            outcomes.append(record)
            continue
        one = _summary(record)
        key = (one.manifest, one.where)
        found[key] = merge_summaries(found[key], one) if key in found else one
    return Folded(tuple(found[key] for key in sorted(found)), tuple(outcomes))


def _summary(record: Decision | Inference | Feedback) -> ModelSummary:
    if isinstance(record, Decision):
        return _summary_of_decision(record)
    return _summary_of_inference(record) if isinstance(record, Inference) else _summary_of_feedback(record)


def _summary_of_decision(decision: Decision) -> ModelSummary:
    failed = bool(decision.error)
    return ModelSummary(
        manifest=decision.manifest,
        where=decision.where,
        decisions=1,
        declined=int(not decision.approved),
        errors=int(failed),
        fallbacks=int(bool(decision.fallback)),
        latency={latency_bucket(decision.latency_us): 1},
    )


def _summary_of_inference(inference: Inference) -> ModelSummary:
    """A failed one gave no answer, so it has no latency."""
    where: Where = "device"
    failed = bool(inference.error)
    return ModelSummary(
        manifest=inference.manifest,
        where=where,
        inferences=1,
        errors=int(failed),
        latency={} if failed else {latency_bucket(inference.latency_us): 1},
    )


def _summary_of_feedback(feedback: Feedback) -> ModelSummary:
    where: Where = "device"
    return ModelSummary(
        manifest=feedback.manifest,
        where=where,
        labelled_legitimate=int(not feedback.fraud),
        labelled_fraud=int(feedback.fraud),
        false_positives=int(feedback.declined and not feedback.fraud),
        true_positives=int(feedback.declined and feedback.fraud),
    )


class Outbox:
    """The queue in `directory`. `draw_epoch` is used once, when it is created."""

    def __init__(
        self,
        directory: Path,
        draw_epoch: int,
        *,
        records_max: int = 20_000,
        history_records: int = 20_000,
        segment_records: int = 1_000,
    ) -> None:
        self._directory = directory
        self._records_max, self._history, self._segment = records_max, history_records, segment_records
        directory.mkdir(parents=True, exist_ok=True)
        self.marks = self._read_marks(draw_epoch)
        self._firsts = sorted(int(path.stem) for path in directory.glob("*.log") if path.stem.isdigit())
        self._handle = -1
        self._next = 1
        self._count = 0  # records in the newest segment
        self._open_tail()

    # -- writing

    @property
    def last_sequence(self) -> int:
        """The number of the newest record; 0 when there is none."""
        return self._next - 1

    @property
    def next_id(self) -> str:
        """The id of the answer that is appended next."""
        return f"{self.marks.epoch:x}-{self._next}"

    @property
    def pending(self) -> int:
        """How many records the coordinator does not have yet."""
        return self.last_sequence - self.marks.acked

    def append(self, record: Record) -> int:
        """Keep `record`; its number, or 0 when it could not be kept (counted in `marks.dropped`; the number is spent).
        Raises nothing: a full disk must not cost an answer."""
        payload = pack([_NAMES[type(record)], record])
        frame = _FRAME.pack(len(payload), zlib.crc32(payload)) + payload
        try:
            if self._handle < 0 or self._count >= self._segment:
                self._start_segment()
            start = os.fstat(self._handle).st_size
            written = os.write(self._handle, frame)
            if written != len(frame):
                os.ftruncate(self._handle, start)
                raise OSError("short write")
        except (OSError, AtollError):
            self.marks = msgspec.structs.replace(self.marks, dropped=self.marks.dropped + 1)
            self._next += 1
            self._count = self._segment  # numbers follow from positions: behind a hole a new segment begins
            return 0
        sequence = self._next
        self._next += 1
        self._count += 1
        with contextlib.suppress(
            OSError, AtollError
        ):  # no room to note what was dropped: tried again at the next record
            self._shrink()
        return sequence

    def count_lost_request(self) -> None:
        """One request that no region answered."""
        self.marks = msgspec.structs.replace(self.marks, lost_requests=self.marks.lost_requests + 1)
        with contextlib.suppress(OSError, AtollError):
            self._write_marks()

    def close(self) -> None:
        """Make everything durable and close the file."""
        if self._handle >= 0:
            try:
                os.fsync(self._handle)
            finally:
                os.close(self._handle)
                self._handle = -1

    # -- reporting

    def next_range(self, records_max: int = 5_000) -> tuple[int, int]:
        """The range to report now: the last one again while it is unacknowledged, else what is new (marked as sent
        before it is returned). Empty (last < first) when there is nothing. Raises StorageFailed when that cannot be
        marked."""
        first = self.marks.acked + 1
        if self.marks.sent >= first:
            return first, self.marks.sent
        last = min(self.last_sequence, self.marks.acked + records_max)
        if last >= first:
            self._write_marks(sent=last)
        return first, last

    def acknowledge(self, epoch: int, sequence: int) -> bool:
        """The coordinator has everything up to `sequence`. False (and nothing changed) for another epoch or a
        repetition. If it knows more than was ever sent from here, a power cut has taken records that had left already:
        numbering goes on behind them."""
        if epoch != self.marks.epoch or sequence <= self.marks.acked:
            return False
        lost = 0
        if sequence > self.marks.sent:
            # Only what stands here under these numbers may never have been told; the rest of them, the coordinator has.
            lost = min(sequence, self._next - 1) - max(self.marks.sent, self.marks.acked)
            if sequence >= self._next:
                self._next = sequence + 1
                self._count = self._segment
        self._write_marks(acked=sequence, sent=max(self.marks.sent, sequence), dropped=self.marks.dropped + lost)
        self._shrink()
        return True

    def read(self, first: int, last: int) -> Iterator[tuple[int, Record]]:
        """The records [first, last] that are still here, with their numbers."""
        for index, start in enumerate(self._firsts):
            following = self._firsts[index + 1] if index + 1 < len(self._firsts) else self._next
            if following <= first or start > last:
                continue
            for offset, payload in enumerate(_frames(self._path(start))[0]):
                sequence = start + offset
                if first <= sequence <= last and sequence < following:
                    yield sequence, _parse(payload)

    def decision(self, sequence: int) -> Decision:
        """The decision with this number. Raises NotFound when it is too old, or no decision."""
        for _, record in self.read(sequence, sequence):
            if isinstance(record, Decision):
                return record
        raise NotFound(f"decision {sequence}: not in the outbox (the last {self._history} are kept)")

    # -- files

    def _path(self, first: int) -> Path:
        return self._directory / f"{first:016d}.log"

    def _start_segment(self) -> None:
        self.close()
        self._handle = os.open(self._path(self._next), os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        if self._firsts[-1:] != [self._next]:
            self._firsts.append(self._next)
        self._count = 0

    def _open_tail(self) -> None:
        """Cut a torn tail off the newest segment and go on behind it, never below a number that may have been sent."""
        if self._firsts:
            start = self._firsts[-1]
            path = self._path(start)
            payloads, sound = _frames(path)
            self._next, self._count = start + len(payloads), len(payloads)
            try:
                if sound < path.stat().st_size:
                    os.truncate(path, sound)
                self._handle = os.open(path, os.O_RDWR | os.O_APPEND)
            except OSError:
                self._count = self._segment  # nothing goes behind a tail that may be torn
        floor = max(self.marks.sent, self.marks.acked) + 1
        if self._next < floor:  # sent, then lost with the power: leave the numbers to what was sent
            self.close()
            self._next = floor

    def _shrink(self) -> None:
        """Delete oldest segments: acknowledged ones beyond the history, and any beyond the bound (counted)."""
        while len(self._firsts) > 1:
            following = self._firsts[1]
            acked = self.marks.acked >= following - 1
            kept = self._next - self._firsts[0]
            if not (kept > self._history and acked) and not kept > self._records_max + self._segment:
                return
            if not acked:
                lost = following - max(self._firsts[0], self.marks.acked + 1)
                # what a sent but unacknowledged report covered may have arrived; it is counted as lost all the same
                self._write_marks(
                    dropped=self.marks.dropped + lost, acked=following - 1, sent=max(self.marks.sent, following - 1)
                )
            self._path(self._firsts.pop(0)).unlink(missing_ok=True)

    def _read_marks(self, draw_epoch: int) -> Marks:
        path = self._directory / "marks"
        if path.exists():
            try:
                return unpack(path.read_bytes(), Marks)
            except Malformed:  # damaged: the numbers cannot be trusted, so a new epoch begins with an empty queue
                for old in self._directory.glob("*.log"):
                    old.unlink(missing_ok=True)
        marks = Marks(epoch=draw_epoch)
        replace_file(path, pack(marks))
        return marks

    def _write_marks(self, **changes: int) -> None:
        marks = msgspec.structs.replace(self.marks, **changes)
        replace_file(self._directory / "marks", pack(marks), durable=False)
        self.marks = marks


def _frames(path: Path) -> tuple[list[bytes], int]:
    """The sound frames of a segment from its start, and where they end."""
    try:
        data = path.read_bytes()
    except OSError:
        return [], 0
    payloads: list[bytes] = []
    position = 0
    while position + _FRAME.size <= len(data):
        length, checksum = _FRAME.unpack_from(data, position)
        payload = data[position + _FRAME.size : position + _FRAME.size + length]
        if length > _RECORD_BYTES_MAX or len(payload) != length or zlib.crc32(payload) != checksum:
            break
        payloads.append(payload)
        position += _FRAME.size + length
    return payloads, position


def _parse(payload: bytes) -> Record:
    plain = unpack_plain(payload)
    if not isinstance(plain, list) or len(plain) != 2 or plain[0] not in KINDS:
        raise Malformed("outbox record: expected [kind, record] of a known kind")
    return msgspec.convert(plain[1], type=KINDS[plain[0]], builtin_types=(bytes,))
