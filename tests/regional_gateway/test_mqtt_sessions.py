"""The broker's rules alone: topics, access, sessions, retained messages, snapshots. No socket, no clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_delta.encoding import pack, unpack
from model_delta.errors import Malformed
from regional_gateway.mqtt.access import FLEET_RULES, Action, access, covers, matches, valid_filter, valid_topic
from regional_gateway.mqtt.session import Limits, Message, Session, Subscription
from regional_gateway.mqtt.session_table import SessionTable
from regional_gateway.mqtt.snapshots import RetainedSnapshot, SessionSnapshot

SMALL = Limits(queued_max=5, queued_bytes_max=1_000, inflight_max=2, sessions_per_identity_max=2, subscriptions_max=3)


def message(topic: str = "t", payload: bytes = b"x", **changes: object) -> Message:
    fields: dict[str, object] = {"qos": 1, "retain": False, "sender": "coordinator", "created": 0.0, **changes}
    return Message(topic=topic, payload=payload, **fields)  # type: ignore[arg-type]


def opened(
    table: SessionTable, name: str = "pos-1", *, clean: bool = False, expiry: int = 60, window: int = 9
) -> Session:
    found = table.open((name, name), clean_start=clean, expiry_seconds=expiry, receive_max=window)
    assert found is not None
    return found[0]


def drained(session: Session, now: float = 0.0) -> list[bytes]:
    payloads = []
    while (sending := session.take(now)) is not None:
        payloads.append(sending.delivery.message.payload)
        session.acknowledge(sending.packet_id)
    return payloads


@pytest.mark.parametrize(
    ("pattern", "topic", "expected"),
    [
        ("a/b", "a/b", True),
        ("a/b", "a/b/c", False),
        ("a/+", "a/b", True),
        ("a/+", "a", False),
        ("a/+", "a/", True),
        ("a/#", "a", True),
        ("a/#", "a/b/c", True),
        ("a/#", "ab", False),
        ("+/+", "/x", True),
        ("#", "a/b", True),
        ("#", "$SYS/load", False),
        ("+/load", "$SYS/load", False),
        ("$SYS/#", "$SYS/load", True),
        ("a/+/c", "a//c", True),
        ("a", "a/+", False),
    ],
)
def test_filters_match_as_section_4_7_says(pattern: str, topic: str, expected: bool) -> None:
    assert matches(pattern, topic) is expected
    if valid_topic(topic):
        table = SessionTable(Limits())
        session = opened(table)
        table.subscribe(session, Subscription(pattern, 1), 0.0)
        assert bool(table.publish(message(topic))) is expected
        table.retained.put(message(topic, retain=True))
        assert bool(table.retained.matching(pattern, 0.0)) is expected


@pytest.mark.parametrize("pattern", ["", "a#", "#/a", "a/#/b", "a+/b", "+a", "a\0b", "/".join("a" * 100)])
def test_malformed_filters_are_refused(pattern: str) -> None:
    assert not valid_filter(pattern)


LEVEL = st.sampled_from(["a", "b", "", "$x"])
TOPIC = st.lists(LEVEL, min_size=1, max_size=4).map("/".join).filter(bool)
PATTERN = (
    st.tuples(st.lists(st.one_of(LEVEL, st.just("+")), min_size=0, max_size=4), st.booleans())
    .map(lambda parts: "/".join([*parts[0], *(["#"] if parts[1] else [])]))
    .filter(bool)
)


@given(PATTERN, PATTERN, TOPIC)
def test_a_filter_covers_another_only_if_it_matches_all_of_its_topics(wide: str, narrow: str, topic: str) -> None:
    if covers(wide, narrow) and matches(narrow, topic):
        assert matches(wide, topic)


@given(st.lists(PATTERN, max_size=8), st.lists(TOPIC, max_size=8))
def test_trees_agree_with_matching_one_by_one(patterns: list[str], topics: list[str]) -> None:
    table = SessionTable(Limits())
    sessions = {}
    for index, pattern in enumerate(patterns):
        sessions[index] = opened(table, f"d{index}")
        table.subscribe(sessions[index], Subscription(pattern, 1), 0.0)
    for topic in topics:
        touched = table.publish(message(topic, retain=True))
        expected = [sessions[index] for index, pattern in enumerate(patterns) if matches(pattern, topic)]
        assert sorted(map(id, touched)) == sorted(map(id, expected))
    for index, pattern in enumerate(patterns):
        kept = sorted(found.topic for found in table.retained.matching(pattern, 0.0))
        assert kept == sorted({topic for topic in topics if matches(pattern, topic)})
        table.unsubscribe(sessions[index], pattern)
    assert all(not table.publish(message(topic)) for topic in topics)


@pytest.mark.parametrize(
    ("identity", "action", "topic", "expected"),
    [
        ("pos-1", "publish", "atoll/1/dev/pos-1/up/report", True),
        ("pos-1", "publish", "atoll/1/dev/pos-2/up/report", False),
        ("pos-1", "publish", "atoll/1/dev/pos-1/down/ack", False),
        ("pos-1", "publish", "atoll/1/cfg/acme/plan/fraud", False),
        ("pos-1", "subscribe", "atoll/1/dev/pos-1/down/#", True),
        ("pos-1", "subscribe", "atoll/1/dev/pos-1/down/res", True),
        ("pos-1", "subscribe", "atoll/1/dev/+/down/#", False),
        ("pos-1", "subscribe", "atoll/1/dev/pos-1/#", False),
        ("pos-1", "subscribe", "atoll/1/dev/pos-1/up/#", False),
        ("pos-1", "subscribe", "atoll/1/cfg/acme/#", True),
        ("pos-1", "subscribe", "#", False),
        ("pos-1", "subscribe", "$SYS/#", False),
        ("coordinator", "subscribe", "atoll/1/#", True),
        ("coordinator", "publish", "atoll/2/x", False),
        ("gateway-eu-west", "publish", "atoll/1/dev/pos-1/down/res", True),
        ("gateway-eu-west", "publish", "atoll/1/cfg/acme/round/fraud/eu-west", True),
        ("gateway-eu-west", "publish", "atoll/1/cfg/acme/round/fraud/ap-south", False),
        ("gateway-eu-west", "publish", "atoll/1/cfg/acme/round/fraud", False),
        ("gateway-eu-west", "publish", "atoll/1/cfg/acme/plan/fraud", False),
        ("gatewayx", "publish", "atoll/1/dev/pos-1/down/res", False),
        ("+", "subscribe", "atoll/1/dev/pos-1/down/#", False),
        ("pos-1/up/#", "publish", "atoll/1/dev/pos-1/up/x", False),
        ("%u", "publish", "atoll/1/dev/%u/up/x", False),
        ("", "subscribe", "atoll/1/cfg/#", False),
    ],
)
def test_access(identity: str, action: Action, topic: str, expected: bool) -> None:
    assert access(FLEET_RULES)(identity, action, topic) is expected


def test_a_session_keeps_its_order_its_window_and_its_packet_ids() -> None:
    table = SessionTable(SMALL)
    session = opened(table, window=2)
    table.subscribe(session, Subscription("#", 1), 0.0)
    for index in range(4):
        table.publish(message(payload=b"%d" % index))
    first, second = session.take(0.0), session.take(0.0)
    assert first is not None and second is not None  # noqa: PT018
    assert session.take(0.0) is None
    assert (first.packet_id, second.packet_id, first.duplicate) == (1, 2, False)
    table.close(session, now=10.0)
    again = opened(table)
    assert again is session
    resent = [again.take(10.0), again.take(10.0)]
    assert [(s.packet_id, s.duplicate) for s in resent if s] == [(1, True), (2, True)]
    assert again.take(10.0) is None
    assert table.acknowledge(session, 1)
    assert not table.acknowledge(session, 77)
    third = again.take(10.0)
    assert third is not None
    assert (third.packet_id, third.delivery.message.payload, third.duplicate) == (3, b"2", False)


def test_resending_keeps_a_smaller_receive_maximum() -> None:
    table = SessionTable(SMALL)
    session = opened(table, window=2)
    table.subscribe(session, Subscription("#", 1), 0.0)
    for index in range(3):
        table.publish(message(payload=b"%d" % index))
    while session.take(0.0):
        pass
    table.close(session, now=0.0)
    again = opened(table, window=1)
    first = again.take(0.0)
    assert first is not None
    assert again.take(0.0) is None
    again.acknowledge(first.packet_id)
    second = again.take(0.0)
    assert second is not None
    assert (second.delivery.message.payload, second.duplicate) == (b"1", True)


def test_packet_ids_go_round_without_meeting_themselves() -> None:
    table = SessionTable(Limits(inflight_max=3))
    session = opened(table)
    table.subscribe(session, Subscription("#", 1), 0.0)
    table.publish(message(payload=b"held"))
    held = session.take(0.0)
    assert held is not None
    seen = set()
    for _ in range(70_000):
        table.publish(message())
        sending = session.take(0.0)
        assert sending is not None
        assert 1 <= sending.packet_id <= 65_535
        assert sending.packet_id != held.packet_id
        seen.add(sending.packet_id)
        session.acknowledge(sending.packet_id)
    assert len(seen) == 65_534


def test_a_queue_is_bounded_in_number_and_bytes_and_counts_what_it_dropped() -> None:
    table = SessionTable(SMALL)
    session = opened(table)
    table.subscribe(session, Subscription("#", 1), 0.0)
    table.close(session, 0.0)
    for index in range(8):
        table.publish(message(payload=b"%d" % index))
    assert (session.dropped, table.dropped) == (3, 3)
    opened(table)
    assert drained(session) == [b"0", b"1", b"2", b"3", b"4"]
    table.publish(message(payload=bytes(900)))
    table.publish(message(payload=bytes(200)))
    assert session.dropped == 4
    drained(session)
    table.publish(message(payload=bytes(900)))
    assert len(drained(session)) == 1


def test_an_absent_session_keeps_only_qos_1() -> None:
    table = SessionTable(SMALL)
    session = opened(table)
    table.subscribe(session, Subscription("#", 1), 0.0)
    table.publish(message(payload=b"lost with the line", qos=0))
    table.publish(message(payload=b"kept"))
    table.close(session, 0.0)
    table.publish(message(payload=b"never queued", qos=0))
    opened(table)
    assert drained(session) == [b"kept"]
    assert table.dropped == 0


def test_expired_messages_are_skipped_and_sessions_end_after_their_expiry() -> None:
    table = SessionTable(SMALL)
    session = opened(table, expiry=100)
    table.subscribe(session, Subscription("#", 1), 0.0)
    table.close(session, 0.0)
    table.publish(message(payload=b"stale", expires=5.0))
    table.publish(message(payload=b"fresh", expires=50.0))
    table.expire(now=10.0)
    assert session.expired == 1
    opened(table, expiry=100)
    assert drained(session, now=10.0) == [b"fresh"]
    table.close(session, 10.0)
    table.expire(now=109.9)
    assert table.sessions
    table.expire(now=110.0)
    assert not table.sessions
    assert table.publish(message()) == []


def test_clean_start_ends_the_old_session_and_expiry_zero_ends_with_the_line() -> None:
    table = SessionTable(SMALL)
    old = opened(table)
    table.subscribe(old, Subscription("#", 1), 0.0)
    table.close(old, 0.0)
    fresh = opened(table, clean=True, expiry=0)
    assert fresh is not old
    assert table.publish(message()) == []
    table.close(fresh, 0.0)
    assert not table.sessions


def test_one_identity_holds_a_bounded_number_of_sessions_and_filters() -> None:
    table = SessionTable(SMALL)
    for suffix in ("a", "b"):
        assert table.open(("pos-1", suffix), clean_start=False, expiry_seconds=60, receive_max=9)
    assert table.open(("pos-1", "c"), clean_start=False, expiry_seconds=60, receive_max=9) is None
    assert table.open(("pos-1", "b"), clean_start=True, expiry_seconds=60, receive_max=9)
    session = opened(table, "pos-2")
    assert [table.subscribe(session, Subscription(f"t/{index}", 1), 0.0) for index in range(4)] == [True] * 3 + [False]
    assert table.subscribe(session, Subscription("t/0", 0), 0.0)


def test_one_copy_with_the_highest_qos_for_overlapping_filters() -> None:
    table = SessionTable(SMALL)
    session = opened(table)
    table.subscribe(session, Subscription("a/#", 0), 0.0)
    table.subscribe(session, Subscription("a/b", 1), 0.0)
    table.publish(message("a/b"))
    sending = session.take(0.0)
    assert sending is not None
    assert sending.delivery.qos == 1
    assert session.take(0.0) is None


def test_no_local_and_retain_options() -> None:
    table = SessionTable(SMALL)
    session = opened(table)
    table.retained.put(message("a", b"old", retain=True))
    table.subscribe(session, Subscription("a", 1, no_local=True, retain_handling=2, retain_as_published=True), 0.0)
    assert drained(session) == []
    assert table.publish(message("a", b"own", sender="pos-1", sender_client="pos-1")) == []
    table.publish(message("a", b"new", retain=True))
    sending = session.take(0.0)
    assert sending is not None
    assert sending.delivery.retain
    session.acknowledge(sending.packet_id)
    table.subscribe(session, Subscription("a", 1, retain_handling=1), 0.0)
    assert drained(session) == []
    table.subscribe(session, Subscription("+", 1, retain_handling=1), 0.0)
    assert drained(session) == [b"new"]


def test_retained_messages_are_bounded_overall_and_per_sender() -> None:
    limits = Limits(retained_max=3, retained_bytes_max=1_000, retained_bytes_per_identity_max=400)
    table = SessionTable(limits)
    hostile = message("h/1", bytes(390), retain=True, sender="pos-666")
    assert table.retained.fits(hostile)
    table.retained.put(hostile)
    assert not table.retained.fits(message("h/2", bytes(10), retain=True, sender="pos-666"))
    assert table.retained.fits(message("h/1", bytes(395), retain=True, sender="pos-666"))  # in place of the old one
    plan = message("cfg/plan", bytes(300), retain=True)
    assert table.retained.fits(plan)
    table.retained.put(plan)
    table.retained.put(message("x", b"y", retain=True, sender="c", expires=5.0))
    assert not table.retained.fits(message("z", b"y", retain=True, sender="d"))
    assert [kept.topic for kept in table.retained.matching("x", 6.0)] == []
    table.expire(6.0)
    assert table.retained.count == 2
    table.retained.put(message("h/1", b"", retain=True, sender="pos-666"))
    assert (table.retained.count, table.retained.bytes) == (1, plan.size)


def test_a_delayed_will_waits_for_its_client_and_a_clean_start_makes_it_due() -> None:
    table = SessionTable(SMALL)
    will = message("up/gone")
    session = opened(table)
    for clean, due in ((False, []), (True, [will])):
        table.close(session, 0.0)
        table.leave_will(session.key, will, due=30.0)
        assert table.due_wills(29.0) == []
        session = opened(table, clean=clean)
        assert table.due_wills(40.0) == due
    table.close(session, 40.0)
    table.leave_will(session.key, will, due=70.0)
    assert table.expire(71.0) == [will]


def test_a_snapshot_gives_back_sessions_queues_and_retained_messages() -> None:
    table = SessionTable(SMALL)
    shared = message("a", b"shared", expires=500.0, user_properties=(("k", "v"),), correlation=b"\0\xff")
    sessions = [opened(table, f"d{index}") for index in range(3)]
    for session in sessions:
        table.subscribe(session, Subscription("a", 1), 0.0)
    gone = opened(table, "not-persistent", expiry=0)
    table.subscribe(gone, Subscription("a", 1), 0.0)
    table.publish(shared)
    table.publish(message("a", b"second", retain=True))
    sent = sessions[0].take(0.0)
    assert sent is not None
    table.close(sessions[1], 7.0)
    frozen = unpack(pack(table.freeze_sessions()), SessionSnapshot)
    assert len(frozen.messages) == 2  # each once, however many queues hold it

    restored = SessionTable(SMALL)
    restored.thaw_sessions(frozen, lambda identity, action, topic: identity != "d2", now=20.0)
    restored.thaw_retained(unpack(pack(table.freeze_retained()), RetainedSnapshot))
    assert set(restored.sessions) == {("d0", "d0"), ("d1", "d1"), ("d2", "d2")}
    assert [found.payload for found in restored.retained.all()] == [b"second"]
    first = opened(restored, "d0")
    again = first.take(20.0)
    assert again is not None
    assert (again.packet_id, again.duplicate, again.delivery.message) == (sent.packet_id, True, shared)
    assert [restored.sessions["d1", "d1"].disconnected_at, restored.sessions["d2", "d2"].disconnected_at] == [7.0, 20.0]
    assert drained(opened(restored, "d1"), 20.0) == [b"shared", b"second"]
    assert [session.key[0] for session in restored.publish(message("a"))] == ["d0", "d1"]  # d2 lost its right


def test_a_snapshot_of_another_version_is_refused_with_a_way_out() -> None:
    with pytest.raises(Malformed, match=r"expected format 1, found 2.*empty folder"):
        SessionTable(SMALL).thaw_sessions(SessionSnapshot(2, (), ()), access(FLEET_RULES), 0.0)
