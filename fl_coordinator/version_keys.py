"""The keys of published versions: all wrapped anew, or one destroyed.

A version's files are sealed under its artifact key, which lies in the ledger wrapped by the keyring. `rotate` wraps all
of them under a newer wrapping key; `shred` forgets one version's for good. Neither runs beside a publication.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from fl_coordinator.ledger import Ledger
from fl_coordinator.rollout import Rollout, holds_devices
from model_delta.encoding import unpack
from model_delta.errors import Malformed
from model_delta.keys.keyring import Keyring
from model_delta.keys.wrapping import KeyVersions

REWRAP_BATCH = 2_000
"""How many records are rewrapped between two words on how far a rotation is."""


class VersionKeys:
    """Changes the artifact keys of one tenant's versions. Blocking. `context` says what a version's key is bound to;
    `one_at_a_time` is held by whoever publishes."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        keyring: Keyring,
        context: Callable[[str], str],
        one_at_a_time: threading.Lock,
        rewrap_batch: int = REWRAP_BATCH,
    ) -> None:
        self._ledger, self._keyring, self._context = ledger, keyring, context
        self._one_at_a_time = one_at_a_time
        self._rewrap_batch = rewrap_batch
        self._rewrapping = (0, 0)

    @property
    def rewrapping(self) -> tuple[int, int]:
        """(records rewrapped, of how many) while keys are rotated, else (0, 0). From any thread."""
        return self._rewrapping

    def rotate(self, *, forget: bool = False) -> KeyVersions:
        """Give all artifact keys a new wrapping key; with `forget` the old ones are destroyed, and with them every
        copy of a record that was made before. Repeating a call that was cut off ends its work. Raises Untrusted for a
        record that does not open: then nothing is replaced and nothing forgotten."""
        with self._one_at_a_time:
            latest = self._keyring.rotate()
            kept = [record for record in self._ledger.releases() if record.wrapped_key]
            try:
                fresh = self._rewrapped([(self._context(one.manifest), one.wrapped_key) for one in kept])
                self._ledger.replace_wrapped_keys(
                    {record.manifest: wrapped for record, wrapped in zip(kept, fresh, strict=True)}
                )
            finally:
                self._rewrapping = (0, 0)
            if forget:
                self._keyring.trim(latest)
            return self._keyring.versions()

    def _rewrapped(self, records: Sequence[tuple[str, bytes]]) -> list[bytes]:
        """All of `records` under the newest wrapping key, telling in `rewrapping` how far it is. Nothing is stored."""
        fresh: list[bytes] = []
        for start in range(0, len(records), self._rewrap_batch):
            self._rewrapping = (start, len(records))
            fresh += self._keyring.rewrap(records[start : start + self._rewrap_batch])
        self._rewrapping = (len(records), len(records))
        return fresh

    def shred(self, manifest: str) -> KeyVersions:
        """Destroy a version's key, so that neither its file nor what was published as its source opens again: not
        from the store, not from a mirror, not from a copy of the ledger. Devices that hold it opened run it until
        it expires or a plan moves them.

        Raises NotFound, and Malformed for a version that devices fall back to or that a rollout still sends out.
        """
        with self._one_at_a_time:
            record = self._ledger.release(manifest)
            if self._ledger.stable(record.model) == manifest:
                raise Malformed(f"version {manifest[:16]}…: is the stable one; roll out another one first")
            for rollout in (unpack(data, Rollout) for data in self._ledger.rollouts()):
                if manifest in (rollout.target, rollout.stable) and holds_devices(rollout):
                    raise Malformed(f"version {manifest[:16]}…: rollout {rollout.name} needs it; abort that first")
            if record.wrapped_key:
                self._ledger.replace_wrapped_keys({manifest: b""})
        return self.rotate(forget=True)
