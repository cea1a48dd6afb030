"""A keyring on another machine, asked with a deadline.

A key server that is switched off answers at once that it is not there. One behind a dead link or a stuck disk answers
nothing, and each question to it hangs for as long as its client is patient: long enough for a few devices' requests to
occupy every worker thread of the coordinator. So each call is made on a thread of its own here, at most CALLS_MAX of
them; who asked waits `deadline_s` and is then told Unavailable. From then on nobody waits until `deadline_s` have
passed again: then the next calls try anew. What was revoked is told as it was last known, so that a server which is
away does not shut everybody out.

A call that was given up may still be carried out. That is harmless: a repeated `rotate` adds one more version, and
`revoke` and `trim` say what shall be, not what to change.

Calls block. They belong in a thread of the caller's too (`asyncio.to_thread`), never on an event loop.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import TypeVar

from model_delta.errors import Unavailable
from model_delta.keys.keyring import Keyring
from model_delta.keys.wrapping import KeyVersions
from model_delta.trust.signing import Envelope
from model_delta.trust.updater import TrustAnchors

DEADLINE_S = 10.0
RECORD_S = 0.005
"""What one more record to rewrap adds to the deadline."""
CALLS_MAX = 8
"""How many calls may be on their way at once, given up ones included."""

Result = TypeVar("Result")


class DistantKeyring:
    """A `Keyring` in front of another. `clock` gives seconds that never go back."""

    def __init__(
        self, keyring: Keyring, deadline_s: float = DEADLINE_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._keyring = keyring
        self._deadline_s = deadline_s
        self._clock = clock
        self._free = threading.BoundedSemaphore(CALLS_MAX)
        self._silent_until = float("-inf")
        self._revoked: frozenset[int] | None = None

    @property
    def tenant(self) -> str:
        """Whose keys these are; known here."""
        return self._keyring.tenant

    def new_key(self, context: str) -> tuple[bytes, bytes]:
        """See `Keyring`."""
        return self._ask("new_key", lambda: self._keyring.new_key(context))

    def wrap(self, context: str, key: bytes) -> bytes:
        """See `Keyring`."""
        return self._ask("wrap", lambda: self._keyring.wrap(context, key))

    def unwrap(self, context: str, wrapped: bytes) -> bytes:
        """See `Keyring`."""
        return self._ask("unwrap", lambda: self._keyring.unwrap(context, wrapped))

    def rewrap(self, records: Sequence[tuple[str, bytes]]) -> list[bytes]:
        """See `Keyring`; many records may take longer."""
        return self._ask("rewrap", lambda: self._keyring.rewrap(records), RECORD_S * len(records))

    def rotate(self) -> int:
        """See `Keyring`."""
        return self._ask("rotate", self._keyring.rotate)

    def trim(self, floor: int) -> None:
        """See `Keyring`."""
        self._ask("trim", lambda: self._keyring.trim(floor))

    def versions(self) -> KeyVersions:
        """See `Keyring`."""
        return self._ask("versions", self._keyring.versions)

    def sign(self, role: str, kind: str, payload: bytes) -> Envelope:
        """See `Keyring`."""
        return self._ask("sign", lambda: self._keyring.sign(role, kind, payload))

    def sign_bytes(self, role: str, data: bytes) -> tuple[str, bytes]:
        """See `Keyring`."""
        return self._ask("sign_bytes", lambda: self._keyring.sign_bytes(role, data))

    def public_key(self, role: str) -> bytes:
        """See `Keyring`."""
        return self._ask("public_key", lambda: self._keyring.public_key(role))

    def verify(self, envelope: Envelope, kind: str, role: str) -> bytes:
        """See `Keyring`."""
        return self._ask("verify", lambda: self._keyring.verify(envelope, kind, role))

    def anchors(self) -> TrustAnchors:
        """See `Keyring`."""
        return self._ask("anchors", self._keyring.anchors)

    def issue_certificate(
        self,
        csr_pem: bytes,
        common_name: str,
        sealing_public: bytes | None,
        days: int = 400,
        dns_names: Sequence[str] = (),
        server: bool = False,
    ) -> bytes:
        """See `Keyring`."""
        return self._ask(
            "issue_certificate",
            lambda: self._keyring.issue_certificate(csr_pem, common_name, sealing_public, days, dns_names, server),
        )

    def ca_pem(self) -> bytes:
        """See `Keyring`."""
        return self._ask("ca_pem", self._keyring.ca_pem)

    def revoke(self, serial: int) -> None:
        """See `Keyring`."""
        self._ask("revoke", lambda: self._keyring.revoke(serial))

    def revoked(self) -> frozenset[int]:
        """See `Keyring`; what was last known when there is no answer. Raises Unavailable when nothing is known."""
        try:
            self._revoked = self._ask("revoked", self._keyring.revoked)
        except Unavailable:
            if self._revoked is None:
                raise
        return self._revoked

    def revocation_list(self) -> bytes:
        """See `Keyring`."""
        return self._ask("revocation_list", self._keyring.revocation_list)

    def _ask(self, what: str, call: Callable[[], Result], more_s: float = 0.0) -> Result:
        """What `call` returns or raises. Raises Unavailable after the deadline, and at once while nothing answers."""
        patience_s = self._deadline_s + more_s
        if self._clock() < self._silent_until or not self._free.acquire(timeout=patience_s):
            raise self._no_answer(what, "it answered nothing before this either")
        answers: SimpleQueue[tuple[Result | None, Exception | None]] = SimpleQueue()

        def carry_out() -> None:
            try:
                answers.put((call(), None))
            except Exception as error:  # raised again where the answer is waited for
                answers.put((None, error))
            finally:
                self._free.release()

        threading.Thread(target=carry_out, name=f"keyring {what}", daemon=True).start()
        try:
            found, error = answers.get(timeout=patience_s)
        except Empty:
            self._silent_until = self._clock() + self._deadline_s
            raise self._no_answer(what, f"none within {patience_s:g} s") from None
        if error is not None:
            raise error
        return found  # type: ignore[return-value]  # no error: it is what the call returned

    def _no_answer(self, what: str, found: str) -> Unavailable:
        return Unavailable(
            f"keys of {self.tenant}: {what}: expected an answer of the key server, found {found}; "
            "see that it runs and can be reached"
        )
