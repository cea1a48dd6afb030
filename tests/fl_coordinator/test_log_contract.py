"""What the coordinator needs of an updates log, asked of the embedded one and of a real Kafka broker alike."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from confluent_kafka import KafkaError, KafkaException, Producer

from fl_coordinator.kafka_log import KafkaLog, TopicReader, _Refusal, place_of
from fl_coordinator.ports import UpdatesLog
from fl_coordinator.updates_log import PART_BYTES, RECORD_BYTES_MAX, LogPart, SegmentLog
from model_delta.errors import Malformed, NotFound, Unavailable
from tests.fakes.kafka_server import Broker
from tests.fakes.losing_proxy import LosingProxy

Open = Callable[[], UpdatesLog]


@pytest.fixture(params=["embedded", pytest.param("kafka", marks=pytest.mark.slow)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a log is: a folder, or the URL of a topic that nobody has used."""
    if request.param == "embedded":
        return str(tmp_path)
    return topic_on(request.getfixturevalue("kafka"))


@pytest.fixture
def opened(place: str) -> Iterator[Open]:
    """Opens the log, as often as a test likes, as a process that starts again does."""
    logs: list[UpdatesLog] = []

    def open_log() -> UpdatesLog:
        if logs:
            logs[-1].close()
        logs.append(KafkaLog(place) if place.startswith("kafka:") else SegmentLog(Path(place), segment_bytes=4096))
        return logs[-1]

    yield open_log
    if logs:
        logs[-1].close()


def topic_on(kafka: Broker) -> str:
    return f"kafka://{kafka.address}/updates-{uuid.uuid4().hex}"


def test_records_are_read_at_their_offsets_by_whoever_opens_the_log_next(opened: Open) -> None:
    log = opened()
    records = [b"one", b"", b"three" * 1000, bytes(range(256))]
    offsets = log.append(records) + log.append([b"five"])
    assert offsets == sorted(set(offsets))
    assert [log.read(offset) for offset in reversed(offsets)] == [b"five", *reversed(records)]
    again = opened()
    assert again.end > offsets[-1]
    assert [again.read(offset) for offset in offsets] == [*records, b"five"]
    [new] = again.append([b"six"])
    assert new > offsets[-1]
    assert again.read(new) == b"six"


def test_the_end_is_the_offset_of_what_comes_next(opened: Open) -> None:
    log = opened()
    for number in range(5):
        end = log.end
        assert log.append([b"x" * number]) == [end]
    assert opened().append([b"y"]) != [end]


def test_nothing_is_there_beyond_the_end(opened: Open) -> None:
    log = opened()
    with pytest.raises(NotFound):
        log.read(0)
    [offset] = log.append([b"one"])
    with pytest.raises(NotFound):
        log.read(log.end)
    with pytest.raises(NotFound):
        log.read(10**12)
    assert log.read(offset) == b"one"
    assert log.append([]) == []


def test_old_records_go_and_the_offsets_of_the_others_stay(opened: Open) -> None:
    log = opened()
    offsets = [log.append([bytes([number]) * 3000])[0] for number in range(6)]
    assert log.remove_before(offsets[4]) > 0
    assert log.remove_before(offsets[4]) == 0
    assert log.read(offsets[4]) == b"\x04" * 3000
    with pytest.raises(NotFound):
        log.read(offsets[0])
    again = opened()
    with pytest.raises(NotFound):
        again.read(offsets[0])
    assert again.read(offsets[5]) == b"\x05" * 3000
    assert again.append([b"next"])[0] > offsets[5]
    log = opened()
    log.remove_before(log.end)
    assert log.end > offsets[5]


def test_a_record_that_is_too_long_is_refused_with_all_that_came_with_it(opened: Open) -> None:
    log = opened()
    with pytest.raises(Malformed, match="at most"):
        log.append([b"small", bytes(RECORD_BYTES_MAX + 1)])
    assert opened().end == 0


def test_a_record_of_a_million_parameters_fits(opened: Open) -> None:
    log = opened()
    record = os.urandom(8 << 20)
    [offset] = log.append([record])
    assert log.read(offset) == record


def test_threads_may_read_while_one_appends(opened: Open) -> None:
    log = opened()
    offsets = log.append([str(number).encode() for number in range(20)])
    found: dict[int, bytes] = {}

    def read(mine: list[int]) -> None:
        found.update({offset: log.read(offset) for offset in mine})

    threads = [threading.Thread(target=read, args=(offsets[part::3],)) for part in range(3)]
    for thread in threads:
        thread.start()
    more = log.append([b"more"])
    for thread in threads:
        thread.join()
    assert [found[offset] for offset in offsets] == [str(number).encode() for number in range(20)]
    assert log.read(more[0]) == b"more"


def followed(log: UpdatesLog | TopicReader, offset: int = 0) -> list[tuple[int, bytes]]:
    """Everything from `offset` to the end, part by part, as a follower reads it."""
    found: list[tuple[int, bytes]] = []
    while (part := log.read_from(offset)).records:
        assert part.start == offset
        assert part.next > part.records[-1][0] >= offset
        found += part.records
        offset = part.next
    assert part.next == offset
    return found


def test_a_follower_reads_every_record_once_in_order_from_wherever_it_was(opened: Open) -> None:
    log = opened()
    assert log.read_from(0) == LogPart(0, (), 0)
    records = [bytes([number]) * 1500 for number in range(12)]
    offsets = [offset for record in records for offset in log.append([record])]
    expected = list(zip(offsets, records, strict=True))
    assert followed(log) == expected
    assert followed(log, offsets[5]) == expected[5:]
    end = log.end
    assert followed(log, end) == []
    later = log.append([b"later", b""])
    assert followed(log, end) == list(zip(later, [b"later", b""], strict=True))
    assert followed(opened(), offsets[11]) == [expected[11], *zip(later, [b"later", b""], strict=True)]


def test_a_part_is_bounded_and_a_long_record_comes_alone(opened: Open) -> None:
    log = opened()
    log.append([os.urandom(PART_BYTES // 2 + 1) for _ in range(3)])
    sizes, offset = [], 0
    while (part := log.read_from(offset)).records:
        sizes.append(len(part.records))
        offset = part.next
    assert sum(sizes) == 3
    assert max(sizes) <= 2


def test_a_part_of_very_small_records_is_bounded_too(opened: Open) -> None:
    log = opened()
    log.append([b""] * 100)
    part = log.read_from(0, 10_000)  # type: ignore[call-arg]  # both take it, followers do not need it
    assert 0 < len(part.records) < 50
    assert len(followed(log)) == 100


def test_a_follower_of_what_is_gone_or_never_was_is_told_where_the_log_begins(opened: Open) -> None:
    log = opened()
    offsets = [log.append([bytes([number]) * 3000])[0] for number in range(6)]
    log.remove_before(offsets[4])
    first = log.read_from(offsets[0]).start
    assert offsets[0] < first <= offsets[4]
    assert dict(followed(log, first))[offsets[5]] == b"\x05" * 3000
    beyond = log.read_from(10**12)
    assert beyond.start == first
    assert [offset for offset, _ in beyond.records][-1] == offsets[5]


def test_a_follower_never_sees_half_of_what_is_being_appended(opened: Open) -> None:
    log = opened()
    batches = [[f"{number}-{part}".encode() * 200 for part in range(3)] for number in range(40)]
    writer = threading.Thread(target=lambda: [log.append(batch) for batch in batches])
    writer.start()
    found: list[bytes] = []
    offset, end = 0, time.monotonic() + 30.0
    while len(found) < 120 and time.monotonic() < end:
        part = log.read_from(offset)
        found += [record for _, record in part.records]
        offset = part.next
    writer.join()
    assert found == [record for batch in batches for record in batch]


WRITER = """
import sys
from pathlib import Path
from fl_coordinator.kafka_log import KafkaLog
from fl_coordinator.updates_log import SegmentLog
place = sys.argv[1]
log = KafkaLog(place) if place.startswith("kafka:") else SegmentLog(Path(place), segment_bytes=20_000)
number = 0
while True:
    number += 1
    offsets = log.append([f"{number}-{part}".encode() * 100 for part in range(3)])
    for part, offset in enumerate(offsets):
        print(offset, f"{number}-{part}", flush=True)
"""


def test_what_was_acknowledged_survives_a_writer_that_is_killed(place: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", WRITER, place], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    lines = [child.stdout.readline() for _ in range(40)]
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    lines += child.stdout.read().splitlines(keepends=True)
    child.stdout.close()
    log: UpdatesLog = KafkaLog(place) if place.startswith("kafka:") else SegmentLog(Path(place))
    told = [line.split() for line in lines if line.endswith("\n")]
    for offset, text in told:
        assert log.read(int(offset)) == text.encode() * 100
    assert log.end > int(told[-1][0])
    log.close()


@pytest.mark.slow
def test_a_broker_that_is_killed_keeps_what_it_acknowledged_and_is_waited_for(kafka: Broker) -> None:
    url = topic_on(kafka)
    with contextlib.closing(KafkaLog(url)) as patient:
        offsets = patient.append([b"before", b"the end"])
    log, follower = KafkaLog(url, patience_s=2.0), TopicReader(url, patience_s=2.0)
    part = follower.read_from(0)
    assert part.records == ((offsets[0], b"before"), (offsets[1], b"the end"))
    kafka.end(signal.SIGKILL)
    with pytest.raises(Unavailable, match="updates log kafka://"):
        log.append([b"nobody takes this"])
    with pytest.raises(Unavailable):
        follower.read_from(part.next)
    with pytest.raises(Unavailable):
        assert log.end
    kafka.start()
    [after] = append_soon(log, b"after")
    assert [log.read(offset) for offset in (*offsets, after)] == [b"before", b"the end", b"after"]
    found = followed(follower, part.next)
    assert found[-1] == (after, b"after")
    assert {record for _, record in found} == {b"after"}  # an append that failed by its deadline may be there as well
    [awaited] = append_soon(log, b"waited for")
    assert (awaited, b"waited for") in follower.read_from(awaited, wait_s=60.0).records
    log.close()
    follower.close()


def append_soon(log: KafkaLog, record: bytes) -> list[int]:
    """As the coordinator's loop does: again and again until the broker is back."""
    for _ in range(30):
        try:
            return log.append([record])
        except Unavailable:
            continue
    pytest.fail("the broker did not come back")


@pytest.mark.slow
def test_a_batch_whose_acknowledgement_is_lost_is_stored_once(kafka: Broker) -> None:
    url = topic_on(kafka)
    records = [b"one", b"two", b"three"]
    with LosingProxy(kafka.port) as proxy:
        log = KafkaLog(url.replace(f":{kafka.port}/", f":{proxy.port}/"))
        [first] = log.append([b"before"])
        proxy.lose_next()
        offsets = log.append(records)
        assert (proxy.lost, proxy.produced >= 3) == (1, True), "otherwise nothing was lost, or sent again"
        # A producer that is not idempotent stores the same batch twice on the same way.
        proxy.lose_next()
        careless = Producer({"bootstrap.servers": f"127.0.0.1:{proxy.port}", "acks": "all"})
        careless.produce(place_of(url)[1], b"careless", partition=0)
        assert careless.flush(10.0) == 0
        assert proxy.lost == 2
        log.close()
    reader = TopicReader(url)
    found = [record for _, record in reader.read_from(0).records]
    reader.close()
    assert found == [b"before", *records, b"careless", b"careless"]
    assert offsets == [first + 1, first + 2, first + 3]


@pytest.mark.slow
def test_a_topic_that_would_lose_or_reorder_records_is_refused(kafka: Broker) -> None:
    from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]

    admin = AdminClient({"bootstrap.servers": kafka.address})
    several, short = f"several-{uuid.uuid4().hex}", f"short-{uuid.uuid4().hex}"
    wanted = [NewTopic(several, 3), NewTopic(short, 1, config={"retention.ms": "1000"})]
    for made in admin.create_topics(wanted).values():
        made.result(30)
    with pytest.raises(Malformed, match="1 partition, found 3"):
        KafkaLog(f"kafka://{kafka.address}/{several}")
    with pytest.raises(Malformed, match=r"retention\.ms to be -1, found 1000"):
        KafkaLog(f"kafka://{kafka.address}/{short}")


@pytest.mark.parametrize(
    "url",
    ["kafka://", "kafka://host:1", "kafka://host:1/", "http://host:1/t", "kafka://me:pw@host:1/t", "kafka://h:1/a b"],
)
def test_a_url_that_names_no_topic_is_refused(url: str) -> None:
    with pytest.raises(Malformed, match="expected kafka://host:port/topic"):
        place_of(url)


def test_several_brokers_may_be_named_and_properties_only_for_security() -> None:
    assert place_of("kafka://one:9092,two:9092/fraud.updates") == ("one:9092,two:9092", "fraud.updates")
    with pytest.raises(Malformed, match="property 'acks'"):
        KafkaLog("kafka://127.0.0.1:1/t", {"acks": "0"})


@pytest.mark.parametrize("code", [KafkaError.NOT_LEADER_FOR_PARTITION, KafkaError.LEADER_NOT_AVAILABLE])
def test_a_leader_that_is_being_chosen_is_waited_for_and_one_that_never_comes_is_said(code: int) -> None:
    told = iter([KafkaException(KafkaError(code)), KafkaException(KafkaError(code)), (0, 7)])

    def ask(timeout_s: float) -> tuple[int, int]:
        answer = next(told)
        if isinstance(answer, KafkaException):
            raise answer
        return answer

    def never(timeout_s: float) -> tuple[int, int]:
        raise KafkaException(KafkaError(code))

    refusal = _Refusal("kafka://127.0.0.1:1/t")
    assert refusal.asked(ask, lambda: None, 60.0) == (0, 7)
    with pytest.raises(Unavailable, match=f"updates log kafka://.*{KafkaError(code).name()}"):
        refusal.asked(never, lambda: None, 0.05)


def test_without_a_broker_the_log_is_unavailable_by_name() -> None:
    with pytest.raises(Unavailable, match="updates log kafka://127"):
        KafkaLog("kafka://127.0.0.1:1/t", patience_s=0.3)
