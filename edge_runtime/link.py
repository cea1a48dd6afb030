"""The device's line to the broker: MQTT 5 with a client certificate, kept up in the background.

Everybody who talks MQTT in Atoll declares the same small `Link` protocol (`connected`, `publish`, `subscribe`); this is
the implementation on paho-mqtt, and the only importer of it. Each link owns one network thread, so that a process may
hold dozens (paho selects, so not more than about 300); all handlers run in the asyncio loop that opened the link.

Rules of the line:

* the session is persistent (Clean Start 0, expiry 120 days), so that a broker restart or a long absence loses nothing;
* a broker that is away is retried for ever with jittered exponential backoff; `connected` tells the truth meanwhile;
* subscriptions are renewed on every connect, so retained messages come again and a lost session heals itself;
* `publish` is at least once: after `Unavailable` the message may still arrive. What was handed to the network and not
  acknowledged yet is bounded, and not handed over a second time: on a slow line a repeated contribution would queue up.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self, cast

import msgspec
from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from model_delta.errors import Malformed, Unavailable
from model_delta.topics import PACKET_BYTES_MAX

SESSION_EXPIRY_S = 120 * 86_400
UNACKNOWLEDGED_BYTES_MAX = 64_000_000
"""What waits for a broker that does not acknowledge: beyond it nothing more is sent."""
_MESSAGE_COST = 256
Handler = Callable[[str, bytes], None]

_log = logging.getLogger(__name__)


class Link(Protocol):
    """What a program needs of a broker connection. `publish` returns after the broker's acknowledgement and raises
    Unavailable after its deadline; handlers run in the event loop and are renewed on every reconnect."""

    @property
    def connected(self) -> bool: ...

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None: ...

    def subscribe(self, topic_filter: str, handler: Handler) -> None: ...


class TlsFiles(msgspec.Struct, frozen=True):
    """PEM files of one side of mutual TLS: who is believed, who we are, and our private key."""

    ca: Path
    certificate: Path
    key: Path


class _Sent(NamedTuple):
    """A message that the broker has not acknowledged; `refusal` comes with its answer."""

    topic: str
    payload: bytes
    retain: bool
    refusal: asyncio.Future[str]


def topic_matches(topic_filter: str, topic: str) -> bool:
    """MQTT 5.0 section 4.7: `+` is one level, a final `#` this level and all below; neither matches a leading `$`."""
    wanted, found = topic_filter.split("/"), topic.split("/")
    if topic.startswith("$") and wanted[0] in ("+", "#"):
        return False
    for index, level in enumerate(wanted):
        if level == "#":
            return True
        if index >= len(found) or level not in ("+", found[index]):
            return False
    return len(wanted) == len(found)


def reconnect_delay_s(failures: int, rng: random.Random, first_s: float = 0.25, most_s: float = 15.0) -> float:
    """Seconds to wait before the next try: exponential, equal jitter: in [half, whole] of min(most, first * 2^n)."""
    whole = min(most_s, first_s * 2.0 ** min(failures, 16))
    return whole * (0.5 + rng.random() / 2)


class WholePackets(paho.Client):
    """paho, which hands on a packet as soon as it is complete.

    paho 2.1 rests after a hundred pieces of a large packet, and does so even when the hundredth was the last: the
    packet, a contribution of a few megabytes, then lay there until the broker sent something else.
    """

    def loop_read(self, max_packets: int = 1) -> MQTTErrorCode:
        """As paho's, called when something can be read; MQTT_ERR_SUCCESS when the line is still good."""
        code = super().loop_read(max_packets)
        while not code and self._in_packet["have_remaining"] and not self._in_packet["to_process"]:
            code = super().loop_read(max_packets)
        return code


class MqttLink:
    """A `Link` over MQTT 5. `async with MqttLink(...)` starts it and does not wait for the broker.

    `client_id` names the persistent session (use the certificate's common name). `tls` None means plain TCP (loopback
    tests). `publish_deadline_s` bounds a publish, waiting for the connection included.
    """

    def __init__(
        self,
        *,
        host: str,
        port: int,
        client_id: str,
        tls: TlsFiles | None = None,
        publish_deadline_s: float = 10.0,
        keepalive_s: int = 30,
        connect_timeout_s: float = 5.0,
        rng: random.Random | None = None,
    ) -> None:
        self.host, self.port, self.client_id = host, port, client_id
        self._publish_deadline_s = publish_deadline_s
        self._keepalive_s = keepalive_s
        self._rng = rng or random.Random()  # jitter only
        self._failures = 0
        self._handlers: dict[str, list[Handler]] = {}
        self._unacknowledged: dict[int, _Sent] = {}
        self._up = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._client = self._make_client(tls, connect_timeout_s)

    def _make_client(self, tls: TlsFiles | None, connect_timeout_s: float) -> paho.Client:
        client = WholePackets(CallbackAPIVersion.VERSION2, client_id=self.client_id, protocol=paho.MQTTv5)
        client.connect_timeout = connect_timeout_s
        if tls is not None:
            for path in (tls.ca, tls.certificate, tls.key):
                if not path.is_file():
                    raise Unavailable(
                        f"link of {self.client_id}: expected a PEM file at {path}, found none; enrol first"
                    )
            context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=str(tls.ca))
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.load_cert_chain(str(tls.certificate), str(tls.key))
            client.tls_set_context(context)
        client.on_socket_open = _no_delay
        client.on_connect = self._on_connect
        client.on_connect_fail = self._on_connect_fail
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        return client

    # -- the owner's side: everything here runs in the event loop

    @property
    def connected(self) -> bool:
        """Whether the broker has accepted us and the line is up now."""
        return self._up.is_set()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def open(self) -> None:
        """Start connecting in the background and return at once."""
        if self._loop is not None:
            return
        self._loop = asyncio.get_running_loop()
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = SESSION_EXPIRY_S
        properties.MaximumPacketSize = PACKET_BYTES_MAX
        self._back_off()
        self._client.connect_async(
            self.host, self.port, keepalive=self._keepalive_s, clean_start=False, properties=properties
        )
        self._client.loop_start()

    async def close(self) -> None:
        """Disconnect (the session stays at the broker), fail what is in flight, and end the network thread."""
        if self._loop is None:
            return
        self._fail_waiting("the link was closed")
        self._client.drop_out_messages()  # or paho's thread would wait for acknowledgements that never come
        self._client.disconnect()
        await asyncio.to_thread(self._client.loop_stop)
        self._up.clear()
        self._loop = None

    async def wait_connected(self, deadline_s: float) -> None:
        """Return when the line is up. Raises Unavailable after `deadline_s`."""
        try:
            async with asyncio.timeout(deadline_s):
                await self._up.wait()
        except TimeoutError:
            raise Unavailable(
                f"broker {self.host}:{self.port}: no connection as {self.client_id} within {deadline_s:g} s; "
                "is it running, and was this identity issued by its CA?"
            ) from None

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Publish at QoS 1 and return after PUBACK. Raises Unavailable (deadline, refused, closed), Malformed (too big
        for the broker: sending it would break the connection again and again)."""
        if len(payload) + len(topic) + 64 > PACKET_BYTES_MAX:
            raise Malformed(f"publish to {topic}: at most {PACKET_BYTES_MAX} bytes in a packet, found {len(payload)}")
        if self._loop is None:
            raise Unavailable(f"publish to {topic}: the link is not open")
        try:
            async with asyncio.timeout(self._publish_deadline_s):
                await self._up.wait()
                refusal = await asyncio.shield(self._send(topic, payload, retain, self._loop))
        except TimeoutError:
            raise Unavailable(
                f"publish to {topic}: no acknowledgement by {self.host}:{self.port} in {self._publish_deadline_s:g} s"
            ) from None
        if refusal:
            raise Unavailable(f"publish to {topic}: refused by {self.host}:{self.port}: {refusal}")

    def _send(self, topic: str, payload: bytes, retain: bool, loop: asyncio.AbstractEventLoop) -> asyncio.Future[str]:
        """Hand a message to the network, unless it is there already; the broker's answer to it."""
        waiting = 0
        for sent in self._unacknowledged.values():
            if (sent.topic, sent.retain) == (topic, retain) and sent.payload == payload:
                return sent.refusal
            waiting += len(sent.payload) + _MESSAGE_COST
        if waiting + len(payload) + _MESSAGE_COST > UNACKNOWLEDGED_BYTES_MAX:
            raise Unavailable(f"publish to {topic}: {waiting} bytes wait for {self.host}:{self.port} to acknowledge")
        info = self._client.publish(topic, payload, qos=1, retain=retain)
        if info.rc == MQTTErrorCode.MQTT_ERR_QUEUE_SIZE:
            raise Unavailable(f"publish to {topic}: too many messages wait for the broker")
        # The acknowledgement is handled in this loop, so it cannot overtake the next line.
        self._unacknowledged[info.mid] = _Sent(topic, payload, retain, loop.create_future())
        return self._unacknowledged[info.mid].refusal

    def subscribe(self, topic_filter: str, handler: Handler) -> None:
        """Call `handler(topic, payload)` for matching messages, from now on and after every reconnect."""
        first = topic_filter not in self._handlers
        self._handlers.setdefault(topic_filter, []).append(handler)
        if first and self._up.is_set():
            self._client.subscribe(topic_filter, options=SubscribeOptions(qos=1))

    # -- the same loop, called by the network thread through call_soon_threadsafe

    def _became_connected(self) -> None:
        if self._handlers:
            self._client.subscribe([(topic_filter, SubscribeOptions(qos=1)) for topic_filter in self._handlers])
        self._up.set()

    def _became_disconnected(self, reason: str) -> None:
        if self._up.is_set():
            _log.info("link of %s: connection lost: %s", self.client_id, reason)
        self._up.clear()  # messages in flight are sent again by paho after the reconnect

    def _dispatch(self, topic: str, payload: bytes) -> None:
        for topic_filter, handlers in list(self._handlers.items()):
            if topic_matches(topic_filter, topic):
                for handler in handlers:
                    try:
                        handler(topic, payload)
                    except Exception:
                        _log.exception("link of %s: handler of %s failed", self.client_id, topic_filter)

    def _acknowledge(self, mid: int, refusal: str) -> None:
        sent = self._unacknowledged.pop(mid, None)
        if sent is not None and not sent.refusal.done():
            sent.refusal.set_result(refusal)

    def _fail_waiting(self, reason: str) -> None:
        waiting, self._unacknowledged = self._unacknowledged, {}
        for sent in waiting.values():
            if not sent.refusal.done():
                sent.refusal.set_result(reason)

    # -- the network thread

    def _tell(self, call: Callable[..., None], *arguments: Any) -> None:
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(call, *arguments)

    def _back_off(self) -> None:
        delay = reconnect_delay_s(self._failures, self._rng)
        # paho doubles by itself between two bounds; equal bounds leave the choice to us (it takes floats as well)
        self._client.reconnect_delay_set(cast(int, delay), cast(int, delay))
        self._failures += 1

    def _on_connect(self, client: paho.Client, data: Any, flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            _log.warning("link of %s: refused by %s:%d: %s", self.client_id, self.host, self.port, reason)
            return
        self._failures = 0
        self._tell(self._became_connected)

    def _on_connect_fail(self, client: paho.Client, data: Any) -> None:
        self._back_off()

    def _on_disconnect(self, client: paho.Client, data: Any, flags: Any, reason: Any, properties: Any) -> None:
        self._back_off()
        self._tell(self._became_disconnected, str(reason))

    def _on_message(self, client: paho.Client, data: Any, message: paho.MQTTMessage) -> None:
        self._tell(self._dispatch, message.topic, bytes(message.payload))

    def _on_publish(self, client: paho.Client, data: Any, mid: int, reason: Any, properties: Any) -> None:
        self._tell(self._acknowledge, mid, str(reason) if reason.is_failure else "")


def _no_delay(client: paho.Client, data: Any, line: Any) -> None:
    # chunk requests are small packets on a busy line: with Nagle's algorithm throughput falls nine-fold
    if isinstance(line, socket.socket):
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
