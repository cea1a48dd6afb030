"""Who belongs to the platform: certificates for devices, gateways and servers, and the aggregators' keys.

A name decides what the broker allows, so the first key of a name stays; only an operator's token replaces it.
"""

from __future__ import annotations

import contextlib

import msgspec

from fl_coordinator.ledger import Ledger
from fl_coordinator.ports import Clock, Note
from fl_coordinator.tables.records import AggregatorRecord, DeviceRecord
from model_delta.encoding import pack
from model_delta.errors import Malformed, NotFound, Untrusted
from model_delta.keys.certificates import days_left, require_identity, same_keys, serial_of
from model_delta.keys.keyring import Keyring
from model_delta.store import ArtifactStore
from model_delta.trust.repository import Repository

RENEW_DAYS = 60
AGGREGATORS = 3


class Enrolment(msgspec.Struct, frozen=True, kw_only=True):
    """A request for an identity. `traits` may hold device_class, region and labels."""

    csr_pem: str
    sealing_public: bytes
    kind: str
    common_name: str
    traits: dict[str, str] = {}


class Enrolled(msgspec.Struct, frozen=True):
    """The answer: certificate and CA as PEM, the newest root of the TUF repository (b"" before its ceremony), and the
    packed trust anchors of the day."""

    certificate_pem: bytes
    ca_pem: bytes
    root: bytes
    anchors: bytes


class Registrar:
    """Issues, replaces and revokes identities; remembers them in the ledger before it answers."""

    def __init__(
        self, *, tenant: str, ledger: Ledger, store: ArtifactStore, keyring: Keyring, clock: Clock, note: Note
    ) -> None:
        self._tenant = tenant
        self._ledger = ledger
        self._repository = Repository(store)
        self._keyring = keyring
        self._clock = clock
        self._note = note

    def enrol(self, wanted: Enrolment, *, replace: bool) -> Enrolled:
        """Issue a certificate. Blocking. Raises Malformed, and Untrusted when the identity belongs to another key.

        A device may not take a name that the broker's access rules give more rights to. An identity that is enrolled
        gets a new certificate for another key only with `replace` (an operator's token): the old one is then revoked.
        """
        require_identity(wanted.common_name)
        _require_name(wanted.kind, wanted.common_name)
        before: DeviceRecord | None = None
        with contextlib.suppress(NotFound):
            before = self._ledger.device(wanted.common_name)
        certificate = self._keyring.issue_certificate(
            wanted.csr_pem.encode(),
            wanted.common_name,
            wanted.sealing_public or None,
            server=wanted.kind in ("server", "gateway"),
        )
        if before is not None:
            if not replace and int(before.certificate_serial) in self._keyring.revoked():
                raise Untrusted(
                    f"identity {wanted.common_name}: its certificate was revoked; "
                    "use another name, or let an operator enrol it again with the admin token"
                )
            if same_keys(before.certificate, certificate) and before.kind == wanted.kind:
                revoked = int(before.certificate_serial) in self._keyring.revoked()
                if days_left(before.certificate, self._clock()) > RENEW_DAYS and not revoked:
                    certificate = before.certificate  # the answer was lost on its way: give it again
            elif replace:
                self._keyring.revoke(int(before.certificate_serial))
            else:
                raise Untrusted(
                    f"identity {wanted.common_name}: enrolled already with another key; "
                    "use another name, or let an operator enrol it again with the admin token"
                )
        traits = dict(wanted.traits)
        record = DeviceRecord(
            device_id=wanted.common_name,
            kind=wanted.kind,
            tenant=self._tenant,
            device_class=traits.pop("device_class", "")[:64],
            region=traits.pop("region", "")[:64],
            labels={key[:64]: value[:64] for key, value in list(traits.items())[:32]},
            certificate=certificate,
            certificate_serial=str(serial_of(certificate)),
            enrolled=self._clock(),
        )
        self._ledger.enrol(record)
        root = b""
        with contextlib.suppress(NotFound):
            root = self._repository.root_bytes()
        return Enrolled(certificate, self._keyring.ca_pem(), root, pack(self._keyring.anchors()))

    def revoke(self, name: str) -> None:
        """End an identity's certificate: it gets no keys, and what it says or contributes no longer counts.

        Durable when it returns; the embedded broker and the aggregators hear of it within seconds. Raises NotFound."""
        record = self._ledger.device(name)
        self._keyring.revoke(int(record.certificate_serial))
        self._ledger.mark_revoked(name)
        self._note("alert", f"{name}: its certificate was revoked")

    def register_aggregator(self, record: AggregatorRecord, *, replace: bool = False) -> None:
        """Remember an aggregator's keys and address; rounds take the first three by name.

        The first keys of a name stay, and three names are enough: all three aggregators hold the same token, and one
        that could register keys in another's name would be sent the shares of both. `replace` (an operator's token)
        overrides. Raises Malformed and Untrusted.
        """
        require_identity(record.key.name)
        known = {one.key.name: one.key for one in self._ledger.aggregators()}
        before = known.get(record.key.name)
        if not replace and before is None and len(known) >= AGGREGATORS:
            raise Untrusted(
                f"aggregator {record.key.name}: expected one of {', '.join(sorted(known))}; "
                "let an operator register another one with the admin token"
            )
        if not replace and before is not None and before != record.key:
            raise Untrusted(
                f"aggregator {record.key.name}: registered already with other keys; restore its folder, or let an "
                "operator register the new keys with the admin token"
            )
        self._ledger.save_aggregator(record)


def _require_name(kind: str, name: str) -> None:
    """Names decide what the broker allows, so a kind may not take another's. Raises Malformed."""
    if kind not in ("device", "gateway", "server"):
        raise Malformed(f"enrolment: kind: expected device, gateway or server, found {kind[:32]!r}")
    if name.startswith("gateway-") != (kind == "gateway") or (kind == "device" and name == "coordinator"):
        wanted = "a name that begins with gateway-" if kind == "gateway" else "another name"
        raise Malformed(f"enrolment: common_name of a {kind}: expected {wanted}, found {name!r}")
