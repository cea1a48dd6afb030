"""A real Kafka broker in KRaft mode, alone, on free loopback ports, for as long as tests need it.

Three listeners lead to the same topics: `address` takes anybody, who may do anything; `login_address` wants TLS and a
password (SCRAM-SHA-512, or PLAIN), `certificate_address` TLS and a client's certificate. Who is not ANONYMOUS may do
what the access lists say.

Its jars are fetched by `.ci/kafka/build` into a folder outside the checkout, or are in the folder that
ATOLL_KAFKA_SERVER names.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from model_delta.keys.certificates import make_request
from model_delta.keys.keyring import EmbeddedKeyring
from tests.fakes.ports import free_ports
from tests.fakes.real_servers import absent, built, required

VERSION = "4.1.1"
START_S = 180.0
STARTS_MAX = 3
STOP_S = 30
COORDINATOR, READER = "coordinator", "reader"
"""Who may log in: the first may do anything, the second only what a test allows it."""
PASSWORDS = {COORDINATOR: "correct-horse", READER: "only-looking"}
_CLUSTER = urlsafe_b64encode(b"one broker alone").decode().rstrip("=")
_HEAP = ("-Xms64m", "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto")


def folder() -> Path:
    """Where the broker's jars are, if they were fetched."""
    named = os.environ.get("ATOLL_KAFKA_SERVER")
    return Path(named) if named else built("kafka", VERSION)


def found() -> bool:
    """Whether a broker can be started, or has to be."""
    return required() or (shutil.which("java") is not None and any((folder() / "libs").glob("kafka_*.jar")))


def require_jars() -> Path:
    """The folder of the jars. Skips the test where there is none, unless ATOLL_REQUIRE_SERVERS=1."""
    libs = folder() / "libs"
    if shutil.which("java") is None or not list(libs.glob("kafka_*.jar")):
        absent(f"java, and a Kafka broker's jars in {libs}: run .ci/kafka/build")
    return libs


class NotStarted(Exception):
    """A broker that ended, or took no connections, when it was to start."""


class Broker:
    """One broker on one folder. It may be killed and started again: the port and what it holds stay."""

    def __init__(self, place: Path, libs: Path) -> None:
        self._place, self._libs = place, libs
        self.port, self._login_port, self._certificate_port, controller = free_ports(4)
        self._process: subprocess.Popen[bytes] | None = None
        place.mkdir(parents=True, exist_ok=True)
        self.ca = place / "ca.pem"
        keyring = EmbeddedKeyring.create(place / "keyring", "brokers")
        self.ca.write_bytes(keyring.ca_pem())
        self.server = _identity(keyring, place / "server.pem", "kafka", server=True)
        self.client = _identity(keyring, place / "client.pem", READER, server=False)
        listeners = {
            "PLAINTEXT": self.port,
            "LOGIN": self._login_port,
            "CERTIFICATE": self._certificate_port,
            "CONTROLLER": controller,
        }
        addresses = [f"{name}://127.0.0.1:{port}" for name, port in listeners.items()]
        scram = "org.apache.kafka.common.security.scram.ScramLoginModule required;"
        users = " ".join(f'user_{name}="{password}"' for name, password in PASSWORDS.items())
        plain = f"org.apache.kafka.common.security.plain.PlainLoginModule required {users};"
        settings = {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": f"1@127.0.0.1:{controller}",
            "listeners": ",".join(addresses),
            "advertised.listeners": ",".join(addresses[:-1]),
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,LOGIN:SASL_SSL,CERTIFICATE:SSL,CONTROLLER:PLAINTEXT",
            "controller.listener.names": "CONTROLLER",
            "sasl.enabled.mechanisms": "SCRAM-SHA-512,PLAIN",
            "listener.name.login.scram-sha-512.sasl.jaas.config": scram,
            "listener.name.login.plain.sasl.jaas.config": plain,
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(self.server),
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": str(self.ca),
            "listener.name.certificate.ssl.client.auth": "required",
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": f"User:ANONYMOUS;User:{COORDINATOR};User:{_name_in(self.client)}",
            "log.dirs": str(place / "data"),
            "offsets.topic.replication.factor": "1",
            "default.replication.factor": "1",
            "auto.create.topics.enable": "false",
            "broker.heartbeat.interval.ms": "300",
            "broker.session.timeout.ms": "1500",  # so soon may one that was killed come back
            "num.network.threads": "1",
            "num.io.threads": "2",
        }
        (place / "server.properties").write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
        words = [f"SCRAM-SHA-512=[name={name},password={password}]" for name, password in PASSWORDS.items()]
        scrams = [word for each in words for word in ("--add-scram", each)]
        self._java("kafka.tools.StorageTool", "format", "-t", _CLUSTER, "-c", self._properties, *scrams)

    @property
    def address(self) -> str:
        """host:port for clients."""
        return f"127.0.0.1:{self.port}"

    @property
    def login_address(self) -> str:
        """host:port for clients with TLS and a password."""
        return f"127.0.0.1:{self._login_port}"

    @property
    def certificate_address(self) -> str:
        """host:port for clients with TLS and a certificate."""
        return f"127.0.0.1:{self._certificate_port}"

    def login(self, name: str) -> dict[str, str]:
        """librdkafka's properties of COORDINATOR or READER, for `login_address`."""
        return {
            "security.protocol": "sasl_ssl",
            "ssl.ca.location": str(self.ca),
            "sasl.mechanism": "SCRAM-SHA-512",
            "sasl.username": name,
            "sasl.password": PASSWORDS[name],
        }

    def login_file(self, path: Path, name: str) -> Path:
        """The same as a file, with the password in another one."""
        properties = self.login(name)
        secret = path.with_suffix(".password")
        secret.write_text(properties.pop("sasl.password") + "\n")
        properties["sasl.password.file"] = secret.name
        path.write_text("# who we are\n" + "".join(f"{key}={value}\n" for key, value in properties.items()))
        return path

    def certificate_login(self) -> dict[str, str]:
        """librdkafka's properties for `certificate_address`."""
        files = dict.fromkeys(("ssl.certificate.location", "ssl.key.location"), str(self.client))
        return {"security.protocol": "ssl", "ssl.ca.location": str(self.ca), **files}

    def allow(self, name: str, topic: str, *operations: str) -> None:
        """Let who logs in as `name` do that with the topic; in force when this returns."""
        from confluent_kafka import admin as ask

        admin = ask.AdminClient({"bootstrap.servers": self.address})
        topics, where = ask.ResourceType.TOPIC, ask.ResourcePatternType.LITERAL  # type: ignore[attr-defined]
        wanted = [
            ask.AclBinding(  # type: ignore[attr-defined]
                *(topics, topic, where, f"User:{name}", "*", ask.AclOperation[each]),  # type: ignore[attr-defined]
                ask.AclPermissionType.ALLOW,  # type: ignore[attr-defined]
            )
            for each in operations
        ]
        for made in admin.create_acls(wanted).values():
            made.result(60)
        anything: Any = (ask.AclOperation.ANY, ask.AclPermissionType.ANY)  # type: ignore[attr-defined]
        anybody: Any = (None, None)
        every = ask.AclBindingFilter(topics, topic, where, *anybody, *anything)  # type: ignore[attr-defined]
        end = time.monotonic() + 60.0
        while not {one.operation.name for one in admin.describe_acls(every).result(60)}.issuperset(operations):
            assert time.monotonic() < end, "the broker has not heard of its access lists"
            time.sleep(0.02)

    def start(self) -> None:
        """Start, and return once it takes connections."""
        with (self._place / "stdout").open("ab") as out:
            self._process = subprocess.Popen(
                self._command("kafka.Kafka", self._properties), stdout=out, stderr=out, cwd=self._place
            )
        if not self._answers(self._process):
            code = self._process.poll()
            self.end(signal.SIGKILL)
            said = (self._place / "stdout").read_text()[-2000:]
            raise NotStarted(f"the Kafka broker did not start in {START_S} s, its exit code is {code}:\n{said}")

    def _answers(self, process: subprocess.Popen[bytes]) -> bool:
        """Whether it takes connections, before it ends and in time."""
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 0.2):
                return True
            if process.poll() is not None:
                break
            time.sleep(0.05)
        return False

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Stop or kill it, by its process id, and wait."""
        if self._process is not None:
            self._process.send_signal(how)
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(STOP_S)
            self._process = None

    @property
    def _properties(self) -> str:
        return str(self._place / "server.properties")

    def _command(self, main: str, *arguments: str) -> list[str]:
        java = shutil.which("java") or "java"
        return [java, *_HEAP, "-cp", f"{self._libs}/*", main, *arguments]

    def _java(self, main: str, *arguments: str) -> None:
        ran = subprocess.run(self._command(main, *arguments), capture_output=True, cwd=self._place, text=True)
        assert ran.returncode == 0, ran.stdout + ran.stderr


def _identity(keyring: EmbeddedKeyring, path: Path, name: str, *, server: bool) -> Path:
    """A new key and its certificate, one after the other in one PEM file."""
    key = ec.generate_private_key(ec.SECP256R1())
    form, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    certificate = keyring.issue_certificate(make_request(key, name), name, None, server=server)
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, plain) + certificate)
    return path


def _name_in(path: Path) -> str:
    return x509.load_pem_x509_certificate(path.read_bytes()).subject.rfc4514_string()


@contextmanager
def running(place: Path) -> Iterator[Broker]:
    """A broker that keeps its data in a folder of `place`; ended by its process id."""
    for start in range(STARTS_MAX):  # all tests of a worker hang on it, so a port that was taken meanwhile ends nothing
        broker = Broker(place / str(start), require_jars())
        try:
            broker.start()
            break
        except NotStarted:
            if start + 1 == STARTS_MAX:
                raise
    try:
        yield broker
    finally:
        broker.end(signal.SIGKILL)
