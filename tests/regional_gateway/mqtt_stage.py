"""What the broker tests play on: a certificate authority, a broker process of either kind, paho clients, raw packets.

paho is used directly, not through the product's own link, so that a fault in one cannot hide a fault in the other; of
the link it takes only the mend of paho's rest in the middle of large packets.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import queue
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from edge_runtime.link import WholePackets
from regional_gateway import mosquitto
from tests.fakes.ports import free_port

PATIENCE_SECONDS = 60.0

EMBEDDED_PROGRAM = """
import asyncio, signal, sys
from pathlib import Path
from regional_gateway.mqtt.broker import serve, server_tls
from regional_gateway.mqtt.access import FLEET_RULES, access

async def main():
    port, folder, ca, certificate, key = sys.argv[1:]
    serving = asyncio.ensure_future(serve(
        host="127.0.0.1", port=int(port), tls=server_tls(Path(ca), Path(certificate), Path(key)),
        folder=Path(folder), acl=access(FLEET_RULES),
    ))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, serving.cancel)
    try:
        await serving
    except asyncio.CancelledError:
        pass

asyncio.run(main())
"""


class Authority:
    """A certificate authority that writes PEM files into `folder`."""

    def __init__(self, folder: Path, name: str = "test CA") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.datetime.now(datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(self._subject)
            .issuer_name(self._subject)
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=2))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.ca = folder / "ca.pem"
        self.ca.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        self.serials: dict[str, int] = {}

    def issue(self, name: str, *, server: bool = False) -> tuple[Path, Path]:
        """(certificate, key) files for `name`, made once."""
        certificate_path, key_path = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        if certificate_path.exists():
            return certificate_path, key_path
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.datetime.now(datetime.UTC)
        self.serials[name] = x509.random_serial_number()
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(self._subject)
            .public_key(key.public_key())
            .serial_number(self.serials[name])
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=2))
        )
        if server:
            address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
            builder = builder.add_extension(x509.SubjectAlternativeName([address]), critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        certificate_path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        key_path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return certificate_path, key_path

    def client_tls(self, name: str | None) -> ssl.SSLContext:
        """TLS of a client that believes this authority; `name` None shows no certificate."""
        context = ssl.create_default_context(cafile=str(self.ca))
        if name is not None:
            context.load_cert_chain(*self.issue(name))
        return context


class BrokerProcess:
    """A broker of `kind` ("embedded" or "mosquitto") in a process of its own, with its data in `folder`."""

    def __init__(self, kind: str, folder: Path, authority: Authority, platform: Sequence[str]) -> None:
        self.kind, self.folder, self.authority = kind, folder, authority
        self.port = free_port()
        certificate, key = authority.issue("broker", server=True)
        if kind == "mosquitto":
            found = mosquitto.find()
            assert found is not None
            self._command = mosquitto.prepare(
                found,
                folder,
                mosquitto.BrokerFiles(authority.ca, certificate, key),
                host="127.0.0.1",
                port=self.port,
                platform=platform,
                autosave_seconds=1,
            )
        else:
            files = [str(path) for path in (folder, authority.ca, certificate, key)]
            self._command = [sys.executable, "-c", EMBEDDED_PROGRAM, str(self.port), *files]
        self._process: subprocess.Popen[bytes] | None = None
        self.log = folder.parent / f"{folder.name}.log"

    def start(self) -> None:
        """Returns when the port answers."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, cwd=Path(__file__).parents[2])
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            assert self._process.poll() is None, f"broker ended with {self._process.returncode}: {self.log.read_text()}"
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            time.sleep(0.02)
        raise AssertionError(f"broker did not listen: {self.log.read_text()}")

    @property
    def running(self) -> bool:
        """Is the process alive?"""
        return self._process is not None and self._process.poll() is None

    def until_saved(self, *payloads: bytes) -> None:
        """Returns when its files hold all of `payloads`, as a broker promises them to after a moment."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            kept = b"".join(path.read_bytes() for path in self.folder.iterdir() if path.suffix in (".cbor", ".db"))
            if all(payload in kept for payload in payloads):
                return
            assert time.monotonic() < deadline, f"not saved after {PATIENCE_SECONDS} s: {payloads}"
            time.sleep(0.02)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """End it; returns the exit code."""
        assert self._process is not None
        if self._process.poll() is None:
            os.kill(self._process.pid, how)
        return self._process.wait(PATIENCE_SECONDS)


class Client:
    """A paho MQTT 5 client with blocking calls; every wait has a deadline."""

    def __init__(
        self,
        broker: BrokerProcess,
        name: str,
        *,
        client_id: str | None = None,
        clean_start: bool = True,
        expiry_seconds: int = 0,
        receive_max: int | None = None,
        manual_ack: bool = False,
        will: tuple[str, bytes] | None = None,
        connect: bool = True,
    ) -> None:
        self.messages: queue.Queue[paho.MQTTMessage] = queue.Queue()
        self.disconnects: queue.Queue[int] = queue.Queue()
        self._connected: queue.Queue[tuple[int, bool]] = queue.Queue()
        self._acks: dict[int, int] = {}
        self._suback: queue.Queue[list[int]] = queue.Queue()
        self._changed = threading.Condition()
        self.paho = WholePackets(
            CallbackAPIVersion.VERSION2,
            client_id=name if client_id is None else client_id,
            protocol=paho.MQTTv5,
            reconnect_on_failure=False,
            manual_ack=manual_ack,
        )
        self.paho.tls_set_context(broker.authority.client_tls(name))
        self.paho.connect_timeout = PATIENCE_SECONDS
        self.paho.on_connect = self._on_connect
        self.paho.on_message = lambda _c, _u, message: self.messages.put(message)
        self.paho.on_disconnect = lambda _c, _u, _f, code, _p: self.disconnects.put(code.value)
        self.paho.on_publish = self._on_publish
        self.paho.on_subscribe = lambda _c, _u, _m, codes, _p: self._suback.put([code.value for code in codes])
        if will is not None:
            self.paho.will_set(*will, qos=1)
        properties: Any = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = expiry_seconds
        if receive_max is not None:
            properties.ReceiveMaximum = receive_max
        self.session_present = False
        if connect:
            self.paho.connect("127.0.0.1", broker.port, keepalive=60, clean_start=clean_start, properties=properties)
            self.paho.loop_start()
            code, self.session_present = self._connected.get(timeout=PATIENCE_SECONDS)
            assert code == 0, f"{name}: refused with 0x{code:02x}"

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Say DISCONNECT and wait until the line is closed."""
        self.paho.disconnect()
        self.paho.loop_stop()

    def vanish(self) -> None:
        """Cut the line without a word."""
        raw: Any = self.paho.socket()
        raw.shutdown(socket.SHUT_RDWR)
        self.paho.loop_stop()

    def subscribe(self, pattern: str, qos: int = 1) -> int:
        """The code in SUBACK."""
        self.paho.subscribe(pattern, options=SubscribeOptions(qos=qos))
        return self._suback.get(timeout=PATIENCE_SECONDS)[0]

    def publish(
        self, topic: str, payload: bytes, *, retain: bool = False, expiry_seconds: int | None = None, qos: int = 1
    ) -> int:
        """The code in PUBACK: 0 when accepted, also when nobody listens (0x10); 0 at once for QoS 0."""
        properties: Any = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        if expiry_seconds is not None:
            properties.MessageExpiryInterval = expiry_seconds
        info = self.paho.publish(topic, payload, qos=qos, retain=retain, properties=properties)
        if not qos:
            return 0
        with self._changed:
            assert self._changed.wait_for(lambda: info.mid in self._acks, PATIENCE_SECONDS), f"no PUBACK for {topic}"
            code = self._acks[info.mid]
        return 0 if code == 0x10 else code

    def next(self, timeout: float = PATIENCE_SECONDS) -> paho.MQTTMessage:
        """The next message; queue.Empty after `timeout` seconds."""
        return self.messages.get(timeout=timeout)

    def payloads_until(self, last: bytes) -> list[bytes]:
        """All payloads up to and without `last`: what a barrier message proves to be everything that came before."""
        found: list[bytes] = []
        while (payload := self.next().payload) != last:
            found.append(bytes(payload))
        return found

    def _on_connect(self, _client: Any, _userdata: Any, flags: Any, code: Any, _properties: Any) -> None:
        self._connected.put((code.value, flags.session_present))

    def _on_publish(self, _client: Any, _userdata: Any, mid: int, code: Any, _properties: Any) -> None:
        with self._changed:
            self._acks[mid] = code.value
            self._changed.notify_all()


# --- packets by hand ------------------------------------------------------------------------------------------------


def text(value: str | bytes) -> bytes:
    """A UTF-8 string or binary field with its two-byte length."""
    data = value.encode() if isinstance(value, str) else bytes(value)
    return len(data).to_bytes(2, "big") + data


def packet(first_byte: int, body: bytes) -> bytes:
    """A packet: fixed header with the remaining length, then `body`."""
    length, encoded = len(body), bytearray()
    while True:
        encoded.append(length & 0x7F | (0x80 if length > 0x7F else 0))
        length >>= 7
        if not length:
            return bytes((first_byte,)) + bytes(encoded) + body


def connect_packet(
    client_id: str, *, level: int = 5, clean_start: bool = True, keep_alive: int = 60, properties: bytes = b""
) -> bytes:
    """CONNECT without a will; `properties` only for level 5."""
    name = "MQIsdp" if level == 3 else "MQTT"
    body = text(name) + bytes((level, 2 if clean_start else 0)) + keep_alive.to_bytes(2, "big")
    if level == 5:
        body += bytes((len(properties),)) + properties
    return packet(0x10, body + text(client_id))


def publish_packet(topic: str | bytes, payload: bytes, *, qos: int = 0, packet_id: int = 1, retain: int = 0) -> bytes:
    """PUBLISH without properties."""
    identifier = packet_id.to_bytes(2, "big") if qos else b""
    return packet(0x30 | qos << 1 | retain, text(topic) + identifier + b"\0" + payload)


def subscribe_packet(pattern: str, *, qos: int = 1, packet_id: int = 1) -> bytes:
    """SUBSCRIBE to one filter."""
    return packet(0x82, packet_id.to_bytes(2, "big") + b"\0" + text(pattern) + bytes((qos,)))


def tls_socket(broker: BrokerProcess, name: str | None) -> ssl.SSLSocket:
    """A connected TLS socket of identity `name`."""
    raw = socket.create_connection(("127.0.0.1", broker.port), timeout=PATIENCE_SECONDS)
    return broker.authority.client_tls(name).wrap_socket(raw, server_hostname="127.0.0.1")
