"""Packets are checked for text before the codec sees them: nothing honest is refused, nothing makes the codec panic."""

from __future__ import annotations

import random

import pytest

from regional_gateway.mqtt.text import problem_in
from tests.regional_gateway.mqtt_stage import connect_packet, packet, publish_packet, subscribe_packet, text

mqtt5 = pytest.importorskip("mqtt5")


def honest() -> list[bytes]:
    q1 = mqtt5.QoS.AT_LEAST_ONCE
    will = mqtt5.Will(
        "w/ü", payload=b"\xff\xfe", qos=q1, user_properties=[("a", "ö")], will_delay_interval=3, content_type="c"
    )
    return [
        mqtt5.ConnectPacket(
            "pos-ü", will=will, username="u", password=b"\xff\0", receive_max=4, session_expiry_interval=2**32 - 1
        ).write(),
        mqtt5.ConnectPacket("", username="only").write(),
        mqtt5.PublishPacket("a/ß", b"\xff" * 300).write(),
        mqtt5.PublishPacket(
            "a", b"", qos=q1, packet_id=7, message_expiry_interval=9, content_type="t", response_topic="r",
            correlation_data=b"\xff", user_properties=[("k", "v"), ("k", "v")], payload_format_indicator=1,
        ).write(),
        mqtt5.PubAckPacket(3).write(),
        mqtt5.PubAckPacket(3, reason_code=mqtt5.PubAckReasonCode.QUOTA_EXCEEDED, reason_str="voll").write(),
        mqtt5.SubscribePacket(1, [mqtt5.TopicFilter("a/#"), mqtt5.TopicFilter("b")], subscription_id=200_000).write(),
        mqtt5.UnsubscribePacket(1, ["a", "b"], user_properties=[("x", "y")]).write(),
        mqtt5.PingReqPacket().write(),
        mqtt5.DisconnectPacket().write(),
        mqtt5.DisconnectPacket(reason_str="bye", session_expiry_interval=4).write(),
        mqtt5.AuthPacket(reason_code=mqtt5.AuthReasonCode.RE_AUTHENTICATE, authentication_method="m").write(),
    ]  # fmt: skip


@pytest.mark.parametrize("index", range(len(honest())))
def test_honest_packets_have_no_problem(index: int) -> None:
    assert problem_in(memoryview(honest()[index])) == ""


@pytest.mark.parametrize(
    "hostile",
    [
        publish_packet(b"\xff", b""),
        publish_packet(b"\xed\xa0\x80", b""),  # half a surrogate pair
        packet(0x30, text("t") + b"\x04\x03" + text(b"\xff") + b"x"),
        packet(0x30, text("t") + b"\x07\x26" + text("k") + text(b"\xff")),
        packet(0x10, text(b"\xffQTT") + b"\x05\x02\0\x3c\0" + text("c")),
        packet(0x10, text("MQTT") + b"\x05\x02\0\x3c\0" + text(b"\xc0\x80")),
        packet(0x10, text("MQTT") + b"\x05\x82\0\x3c\0" + text("c") + text(b"\xff")),
        packet(0x82, b"\0\x01\0" + text(b"\xff") + b"\x01"),
        packet(0xA2, b"\0\x01\0" + text("ok") + text(b"\xff")),
        packet(0xE0, b"\0\x05\x1f" + text(b"\xff\xff")),
    ],
)
def test_text_that_is_not_utf_8_is_found_wherever_it_stands(hostile: bytes) -> None:
    assert problem_in(memoryview(hostile)) == "text is not UTF-8"


@pytest.mark.parametrize(
    ("hostile", "problem"),
    [
        (packet(0x20, b"\0\0\0"), "packet type 2 is not for a client"),
        (packet(0x30, b"\0\x05x"), "overrun"),
        (packet(0x30, text("t") + b"\x01\x77"), "property 0x77"),
        (packet(0x30, text("t") + b"\x01\x01\x00"), "overrun"),
        (packet(0x30, text("t") + b"\xff\xff\xff\xff\x01"), "more than four bytes"),
        (packet(0x10, text("MQTT")), "overrun"),
    ],
)
def test_fields_that_do_not_fit_are_named(hostile: bytes, problem: str) -> None:
    assert problem in problem_in(memoryview(hostile))


def test_no_mutated_packet_makes_the_codec_panic() -> None:
    rng = random.Random(20_261_121)
    seeds = [*honest(), connect_packet("pos-1"), subscribe_packet("a/+")]
    passed = 0
    for _ in range(30_000):
        mutated = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 4)):
            mutated[rng.randrange(len(mutated))] = rng.randrange(256)
        if problem_in(memoryview(mutated)):
            continue
        try:
            mqtt5.read(memoryview(mutated))
        except (ValueError, IndexError):
            continue
        passed += 1
    assert passed > 1_000
