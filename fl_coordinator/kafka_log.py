"""Admitted contributions in a topic of Apache Kafka, for platforms whose updates must outlive one machine's disk.

It does what the embedded log does (`ports.UpdatesLog`; one suite of tests holds both to it). The topic has a single
partition, so that its offsets are one order of admission; they never change, and are what the ledger keeps. A record
counts once it is on all in-sync replicas (`acks=all`) and the producer is idempotent, so that what it sends again after
a lost answer is stored once. A coordinator that starts again goes on at the end of the topic: what a crash left there
unnamed, the ledger does not know, and nobody counts; a record that the ledger does know is never appended again.

An aggregator reads the topic by itself (`TopicReader`), at its own pace, and needs no more than the right to read it.
It joins no consumer group: how far it has come is written down beside what it read, not at the brokers.

Records are contributions: signed by devices and encrypted for the aggregators. Whoever runs the broker learns who sent
how much and when, and can withhold, but neither read nor change one unnoticed (the ledger holds every digest).
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic, ResourceType  # type: ignore[attr-defined]

from fl_coordinator.kafka_login import advice, check_properties
from fl_coordinator.updates_log import PART_BYTES, RECORD_BYTES_MAX, RECORD_COST, LogPart
from model_delta.errors import Malformed, NotFound, Unavailable

PATIENCE_S = 10.0
_SLACK_BYTES = 2**20
_PREFETCHED_S = 0.05
_FIRST_LOOK_S = 1.0
"""A login that is refused stays refused: whoever waits for the brokers looks so early whether it was."""
_LAST_WORD_S = 0.1
_NO_ANSWER = (KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN, KafkaError._TIMED_OUT)
_NO_LEADER = (
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.OFFSET_NOT_AVAILABLE,
)
"""What brokers say for a moment: a topic is new, or one of them came, went or stood still."""
_NOT_HEARD_OF_YET = (KafkaError._UNKNOWN_PARTITION,)
"""What a client says of a topic for as long as a broker that has just started, or just made it, does."""
_ELECTION_PAUSE_S = 0.1
_NO_TOPIC = (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC)

_log = logging.getLogger("atoll.kafka")

T = TypeVar("T")


def place_of(url: str) -> tuple[str, str]:
    """Brokers and topic of `kafka://host:port[,host:port]/topic`. Raises Malformed."""
    parts = urlsplit(url)
    topic = parts.path.removeprefix("/")
    allowed = topic and len(topic) <= 249 and all(c.isascii() and (c.isalnum() or c in "._-") for c in topic)
    if parts.scheme != "kafka" or not parts.netloc or not allowed or parts.query or "@" in parts.netloc:
        raise Malformed(f"updates log: expected kafka://host:port/topic, found {url[:200]!r}")
    return parts.netloc, topic


class TopicReader:
    """Reads the one partition of a topic by offset. Safe to call from several threads, one at a time."""

    def __init__(
        self,
        url: str,
        properties: Mapping[str, str] | None = None,
        *,
        patience_s: float = PATIENCE_S,
        known: bool = False,
    ) -> None:
        """Nothing is asked of the brokers yet. `properties` are librdkafka's for authentication and TLS; every call
        ends within about `patience_s`. `known` says that the topic is there, so a broker that has not heard of it is
        waited for. Raises Malformed for a URL or a property that will not do."""
        self._url = url
        brokers, self._topic = place_of(url)
        self._patience_s = patience_s
        self._lock = threading.Lock()
        self._refusal = _Refusal(url)
        settings = _settings(brokers, properties or {}, patience_s, self._refusal)
        self._consumer = _made(
            url,
            Consumer,
            {
                **settings,
                "group.id": "atoll-updates-log",  # required, and never joined: positions are in the ledger
                "enable.auto.commit": False,
                "auto.offset.reset": "error",
                "fetch.message.max.bytes": RECORD_BYTES_MAX + _SLACK_BYTES,
                "receive.message.max.bytes": 4 * RECORD_BYTES_MAX,
                "queued.max.messages.kbytes": 65_536,
                "fetch.wait.max.ms": 50,
                "check.crcs": True,
            },
        )
        self._passing = _NO_LEADER + _NOT_HEARD_OF_YET if known else _NO_LEADER
        self._low, self._end = 0, 0
        self._next = -1

    def bounds(self) -> tuple[int, int]:
        """The first offset that is kept, and the one that the next record gets. Raises Unavailable."""
        with self._lock:
            return self._ask_bounds()

    def read(self, offset: int) -> bytes:
        """The record at `offset`. Raises NotFound outside of what the topic holds, Unavailable without an answer."""
        with self._lock:
            if not self._low <= offset < self._end:
                self._ask_bounds()
            if not self._low <= offset < self._end:
                raise NotFound(
                    f"updates log {self._url}: no record at offset {offset}, it holds {self._low} to {self._end}"
                )
            self._turn_to(offset)
            found = self._poll(time.monotonic() + self._patience_s)
            if found is None:
                raise self._refusal.error(f"offset {offset} did not come within {self._patience_s:g} s")
            if found[0] != offset:
                raise NotFound(f"updates log {self._url}: no record at offset {offset}, the next is another")
            self._next = offset + 1
            return found[1]

    def read_from(self, offset: int, bytes_max: int = PART_BYTES, wait_s: float = 0.0) -> LogPart:
        """What is there from `offset` on: one record at least if there is one or one comes within `wait_s`; `bytes_max`
        is exceeded by the last record at most. Raises Unavailable."""
        with self._lock:
            if not self._low <= offset < self._end:
                self._ask_bounds()
            start = offset if self._low <= offset <= self._end else self._low
            self._turn_to(start)
            records: list[tuple[int, bytes]] = []
            at, left = start, bytes_max
            deadline = time.monotonic() + (self._patience_s if at < self._end else wait_s)
            try:
                while left > 0 and (found := self._poll(deadline)) is not None:
                    records.append(found)
                    at, left = found[0] + 1, left - len(found[1]) - RECORD_COST
                    deadline = time.monotonic() + (_PREFETCHED_S if at < self._end else 0.0)
            except NotFound:  # removed since the bounds were asked: the next call begins behind it
                if not records:
                    return LogPart(self._low, (), self._low)
            self._next = at
            return LogPart(start, tuple(records), at)

    def close(self) -> None:
        """Leave the brokers."""
        with contextlib.suppress(KafkaException, RuntimeError):
            self._consumer.close()

    def _turn_to(self, offset: int) -> None:
        if self._next != offset:
            with self._refusal.told():
                self._consumer.assign([TopicPartition(self._topic, 0, offset)])
        self._next = -1

    def _poll(self, deadline: float) -> tuple[int, bytes] | None:
        """The next record with its offset, or None at the deadline (monotonic seconds), after one look at least.

        Raises NotFound when it was removed, Unavailable when the login may not read."""
        while True:
            left = deadline - time.monotonic()
            with self._refusal.told():
                message = self._consumer.poll(max(left, 0.0))
            if message is not None:
                error, offset = message.error(), message.offset()
                if error is None and offset is not None:
                    self._refusal.forget()
                    return offset, bytes(message.value() or b"")
                if error is not None and error.code() == KafkaError._AUTO_OFFSET_RESET:
                    self._ask_bounds()
                    raise NotFound(f"updates log {self._url}: the record was removed; it begins at {self._low}")
                if error is not None and error.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED:
                    raise self._refusal.error(_said(error))
                # Passing troubles are librdkafka's to cure, the right to a group is not needed; what lasts ends at the
                # deadline.
            if left <= 0:
                return None

    def _ask_bounds(self) -> tuple[int, int]:
        def ask(timeout_s: float) -> Any:
            return self._consumer.get_watermark_offsets(TopicPartition(self._topic, 0), timeout=timeout_s, cached=False)

        def look() -> None:
            self._next = -1  # what this takes up by chance is read again
            self._consumer.poll(0.0)

        found = self._refusal.asked(ask, look, self._patience_s, self._passing)
        if found is None:
            raise Unavailable(f"updates log {self._url}: no answer within {self._patience_s:g} s")
        self._passing = _NO_LEADER + _NOT_HEARD_OF_YET
        low, end = found
        self._low, self._end = max(low, 0), max(end, 0)
        return self._low, self._end


class KafkaLog:
    """The updates log in one topic, for one process that appends. Safe to call from several threads."""

    def __init__(
        self, url: str, properties: Mapping[str, str] | None = None, *, patience_s: float = PATIENCE_S
    ) -> None:
        """Reach the brokers, and create the topic when there is none; arguments as for `TopicReader`.

        Raises Unavailable when no broker answers, Malformed for a URL, a property or a topic that will not do.
        """
        self._url = url
        brokers, self._topic = place_of(url)
        self._patience_s = patience_s
        self._refusal = _Refusal(url)
        self._settings = _settings(brokers, properties or {}, patience_s, self._refusal)
        self._lock = threading.Lock()
        self._admin = _made(url, AdminClient, self._settings)
        self._require_topic()
        self._producer = self._new_producer()
        self._reader = TopicReader(url, properties, patience_s=patience_s, known=True)
        try:
            self._reader.bounds()
        except Unavailable:
            self.close()
            raise

    @property
    def end(self) -> int:
        """The offset that the next record gets. Raises Unavailable."""
        return self._reader.bounds()[1]

    def append(self, records: Sequence[bytes]) -> list[int]:
        """Hand `records` to the brokers, and return once all replicas have them; their offsets.

        Raises Malformed for a record that is too long, with none appended, and Unavailable when an acknowledgement did
        not come: some of the records may be there then, at offsets that nobody learns.
        """
        for record in records:
            if len(record) > RECORD_BYTES_MAX:
                raise Malformed(f"updates log: expected at most {RECORD_BYTES_MAX} bytes, found {len(record)}")
        with self._lock:
            offsets: dict[int, int] = {}
            errors: list[str] = []

            def settled(place: int) -> Any:
                def tell(error: KafkaError | None, message: Message) -> None:
                    offset = message.offset()
                    if error is not None or offset is None:
                        errors.append(_said(error) if error is not None else "no offset")
                    else:
                        offsets[place] = offset

                return tell

            try:
                for place, record in enumerate(records):
                    self._producer.produce(self._topic, record, partition=0, on_delivery=settled(place))
                self._producer.flush(self._patience_s + 1.0)
            except KafkaException as error:
                errors.insert(0, _said(error.args[0]))
            except (BufferError, SystemError) as error:  # a producer beyond repair calls `settled` while it raises
                cause = error.__cause__
                errors.insert(0, _said(cause.args[0]) if isinstance(cause, KafkaException) else str(cause or error))
            if errors or len(offsets) < len(records):
                self._refusal.heard(self._producer.poll)
                self._replace_producer()
                raise self._refusal.error(errors[0] if errors else "no acknowledgement")
            self._refusal.forget()
            return [offsets[place] for place in range(len(records))]

    def read(self, offset: int) -> bytes:
        """The record at `offset`. Raises NotFound outside of what the topic holds, Unavailable without an answer."""
        return self._reader.read(offset)

    def read_from(self, offset: int, bytes_max: int = PART_BYTES) -> LogPart:
        """What is there from `offset` on; see `TopicReader.read_from`. Raises Unavailable."""
        return self._reader.read_from(offset, bytes_max)

    def remove_before(self, offset: int) -> int:
        """Have the brokers delete the records below `offset`; how many. Raises Unavailable."""
        with self._lock:
            before, end = self._reader.bounds()
            wanted = min(offset, end)
            if wanted > before:
                partition = TopicPartition(self._topic, 0, wanted)
                asked = self._admin.delete_records([partition], request_timeout=self._patience_s)
                with self._refusal.told():
                    asked[partition].result()
            return max(0, wanted - before)

    def close(self) -> None:
        """Leave the brokers; everything appended is already durable."""
        self._reader.close()
        self._producer.purge()

    def _new_producer(self) -> Producer:
        return _made(
            self._url,
            Producer,
            {
                **self._settings,
                "enable.idempotence": True,
                "acks": "all",
                "linger.ms": 0,
                "queue.buffering.max.kbytes": 2 * 2**20 - 1,
                "message.timeout.ms": int(self._patience_s * 1000),
                "request.timeout.ms": int(self._patience_s * 1000),
            },
        )

    def _replace_producer(self) -> None:
        """A message that was given up must not be sent later on; an idempotent producer may also be beyond repair."""
        self._producer.purge()
        self._producer = self._new_producer()

    def _require_topic(self) -> None:
        """The topic as it must be: one partition, nothing deleted by age or size or merged by key."""
        found = self._found()
        if found is None or (found.error is not None and found.error.code() in _NO_TOPIC):
            self._create_topic()
            return
        if found.error is not None:
            raise self._refusal.error(_said(found.error))
        if len(found.partitions) != 1:
            raise Malformed(
                f"updates log {self._url}: expected a topic with 1 partition, found {len(found.partitions)}; "
                "offsets of several have no common order, so name another topic"
            )
        resource = ConfigResource(ResourceType.TOPIC, self._topic)
        with self._refusal.told():
            asked = self._admin.describe_configs([resource], request_timeout=self._patience_s)[resource].result()
        values = {name: str(entry.value) for name, entry in asked.items()}
        for name, expected in _TOPIC.items():
            if name in values and values[name] != expected:
                raise Malformed(
                    f"updates log {self._url}: expected the topic's {name} to be {expected}, found {values[name]}; "
                    "change it, or name a topic that is not there yet"
                )

    def _found(self) -> Any:
        """What the brokers know of the topic, or None."""

        def ask(timeout_s: float) -> Any:
            found = self._admin.list_topics(self._topic, timeout=timeout_s).topics.get(self._topic)
            if found is not None and found.error is not None and found.error.code() in _NO_LEADER:
                raise KafkaException(found.error)
            return found

        return self._refusal.asked(ask, lambda: self._admin.poll(0.0), self._patience_s)

    def _create_topic(self) -> None:
        topic = NewTopic(self._topic, num_partitions=1, config=dict(_TOPIC))
        try:
            self._admin.create_topics([topic], request_timeout=self._patience_s)[self._topic].result()
        except KafkaException as error:
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise self._refusal.error(f"the topic cannot be created: {_said(error.args[0])}") from None
        deadline = time.monotonic() + self._patience_s
        while time.monotonic() < deadline:  # its leader is chosen a moment later
            found = self._found()
            if found is not None and found.error is None and found.partitions and found.partitions[0].leader >= 0:
                return
            time.sleep(0.05)
        raise Unavailable(f"updates log {self._url}: the topic has no leader within {self._patience_s:g} s")


_TOPIC: Mapping[str, str] = {
    "cleanup.policy": "delete",
    "retention.ms": "-1",
    "retention.bytes": "-1",
    "max.message.bytes": str(RECORD_BYTES_MAX + _SLACK_BYTES),
}


class _Refusal:
    """Why the brokers take nobody in, which librdkafka says beside its answers and only to who polls; and errors that
    tell it."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._text = ""

    def __call__(self, error: KafkaError) -> None:
        """librdkafka's `error_cb`."""
        if error.code() not in _NO_ANSWER or "ssl/tls alert" in error.str():
            self._text = _said(error)

    def forget(self) -> None:
        """The brokers did what was asked."""
        self._text = ""

    def asked(
        self,
        ask: Callable[[float], T],
        look: Callable[[], object],
        patience_s: float,
        passing: Collection[int] = _NO_LEADER,
    ) -> T:
        """What `ask` answers within so many seconds; `look` is the client's poll. A leader that is being chosen is
        waited for, and whatever else is `passing`. Raises Unavailable."""
        self.forget()
        end = time.monotonic() + patience_s
        first = min(_FIRST_LOOK_S, patience_s)
        timeouts_s = [patience_s - first, first]
        while timeouts_s:
            timeout_s = timeouts_s.pop()
            try:
                return ask(timeout_s)
            except KafkaException as error:
                failed: KafkaError = error.args[0]
                with contextlib.suppress(KafkaException):
                    look()
            if failed.code() in passing and time.monotonic() < end:
                time.sleep(_ELECTION_PAUSE_S)
                timeouts_s.append(timeout_s)
            elif self._text or timeout_s == patience_s or failed.code() not in _NO_ANSWER:
                break
        raise self.error(_said(failed))

    def heard(self, look: Callable[[float], object]) -> None:
        """Take in why a client failed, if it has not said so yet; `look` is its poll, which raises what is fatal."""
        end = time.monotonic() + _LAST_WORD_S
        while not self._text and time.monotonic() < end:
            try:
                look(_LAST_WORD_S)
            except KafkaException as error:
                self(error.args[0])

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """librdkafka's failures as ours. Raises Unavailable."""
        try:
            yield
        except KafkaException as error:
            raise self.error(_said(error.args[0])) from None

    def error(self, what: str) -> Unavailable:
        """What failed, or why if that is known, and what to do; one line."""
        text = self._text or what
        told = advice(text)
        return Unavailable(f"updates log {self._url}: {told + ': ' if told else ''}{text}")


def _said(error: KafkaError) -> str:
    return f"{error.name()}: {error.str()}"


def _made(url: str, kind: Callable[..., T], settings: Mapping[str, Any]) -> T:
    """A client of the brokers. Raises Malformed for a property that librdkafka refuses."""
    try:
        return kind(dict(settings), logger=_log)
    except KafkaException as error:
        raise Malformed(f"updates log {url}: {error.args[0].str()}; correct the properties of its login") from None


def _settings(
    brokers: str, properties: Mapping[str, str], patience_s: float, refusal: Callable[[KafkaError], None]
) -> dict[str, Any]:
    """What every client of the brokers has in common. Raises Malformed."""
    check_properties(properties)
    return {
        **properties,
        "bootstrap.servers": brokers,
        "error_cb": refusal,
        "message.max.bytes": RECORD_BYTES_MAX + _SLACK_BYTES,
        "reconnect.backoff.ms": 50,
        "reconnect.backoff.max.ms": 500,
        "socket.connection.setup.timeout.ms": max(1000, int(patience_s * 1000)),
        "log_level": 0,  # it tells of every broken connection; ours to tell is what failed in the end
    }
