"""What an aggregator must not forget, in its folder: its keys, what it decided in each round, what it answered.

Two key pairs (0600): X25519, to which devices and the other aggregators seal, and Ed25519, with which it signs what it
opened. Everything is written whole or not at all (`model_delta.store`).
"""

from __future__ import annotations

import logging
import stat
from pathlib import Path
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fl_coordinator.round_command import KEPT_S, RoundCommand
from fl_coordinator.shares.fixed_point import Rng
from model_delta.digest import digest_of
from model_delta.encoding import pack, unpack, unpack_plain
from model_delta.errors import Expired, Malformed, NotFound, Untrusted
from model_delta.store import DirectoryStore
from model_delta.task import RoundTask, terms_of

_log = logging.getLogger("atoll.aggregator")


class RoundProgress(msgspec.Struct, frozen=True, kw_only=True):
    """What must survive a crash: the frozen list's root, the announcement's terms, the last attempt begun, what all
    three committed to for the coin, the decision (`final` once all three agreed on it)."""

    round_id: str
    root: str
    deadline: int
    attempt: int = 0
    decision: bytes = b""
    final: bool = False
    format: int = 1
    terms: str = ""
    commitments: tuple[bytes, ...] = ()


class _Keys(msgspec.Struct, frozen=True):
    sealing: bytes
    signing: bytes
    format: int = 1


class _Forgotten(msgspec.Struct, frozen=True):
    deadline: int
    format: int = 1


class AggregatorState:
    """The state of the aggregator `name` in `folder`, which no other process may use."""

    def __init__(self, name: str, folder: Path, rng: Rng) -> None:
        """Keys are created on first start. Raises Untrusted when the key file can be read by others."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._name = name
        self._folder = folder
        self.store = DirectoryStore(folder)
        self.sealing, self.signing = self._open_keys(rng)

    def begin(self, command: RoundCommand, task: RoundTask) -> RoundProgress:
        """What is remembered of the round; its list and terms are fixed here, by the first command. Raises Untrusted
        for others than the first ones, Expired for a round of a time that was forgotten."""
        terms = terms_of(task)
        try:
            progress = unpack(self.store.get("round", _file_name(command.round_id)), RoundProgress)
        except NotFound:
            deadline = task.deadline
            if deadline <= self._forgotten():
                raise Expired(
                    f"round {command.round_id!r}: of a time that {self._name} has forgotten, whatever its clock says "
                    "now; it may have been opened already"
                ) from None
            progress = RoundProgress(round_id=command.round_id, root=command.root, deadline=deadline, terms=terms)
            self.remember(progress)
        if progress.root != command.root:
            raise Untrusted(
                f"round {command.round_id!r}: frozen with root {progress.root[:16]}…, found {command.root[:16]}… now; "
                "opening two sets of one round would give updates away"
            )
        if progress.terms not in ("", terms):  # "": begun by a program that did not keep them
            raise Untrusted(
                f"round {command.round_id!r}: was announced with the terms {progress.terms[:16]}… at first, found "
                f"{terms[:16]}… now; a round is not announced anew with another m_min, policy or noise"
            )
        return progress

    def remember(self, progress: RoundProgress) -> None:
        """Write it down."""
        self.store.put("round", _file_name(progress.round_id), pack(progress))

    def given_reply(self, round_id: str) -> dict[str, Any] | None:
        """The answer that was given before, if there is one."""
        try:
            reply: dict[str, Any] = unpack_plain(self.store.get("reply", _file_name(round_id)))
        except NotFound:
            return None
        return reply

    def give(self, round_id: str, reply: dict[str, Any]) -> None:
        """Write the answer down, before it is given."""
        self.store.put("reply", _file_name(round_id), pack(reply))

    def forget_old_rounds(self, now: float) -> None:
        """Rounds that would be refused by their age anyway need no memory. That they are forgotten is written down
        first: a clock that was wrong and is put right must not make them new again."""
        for name in self.store.names("round"):
            try:
                progress = unpack(self.store.get("round", name), RoundProgress)
            except Malformed as error:  # of a round of its own: no reason to refuse all others
                _log.error("%s: what is remembered of round %s: %s", self._name, name[:16], error)
                continue
            if progress.deadline + 2 * KEPT_S < now:
                if progress.deadline > self._forgotten():
                    self.store.put("forgotten", "until", pack(_Forgotten(progress.deadline)))
                self.store.remove("reply", name)
                self.store.remove("round", name)

    def _forgotten(self) -> int:
        """The latest deadline of a round that was forgotten, in Unix seconds; 0 if none was."""
        try:
            return unpack(self.store.get("forgotten", "until"), _Forgotten).deadline
        except NotFound:
            return 0

    def _open_keys(self, rng: Rng) -> tuple[X25519PrivateKey, Ed25519PrivateKey]:
        path = self._folder / "key" / "aggregator"
        try:
            keys = unpack(self.store.get("key", "aggregator"), _Keys)
        except NotFound:
            keys = _Keys(rng(32), rng(32))
            self.store.put("key", "aggregator", pack(keys))
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            raise Untrusted(f"keys of {self._name}: expected mode 0600 on {path}, found {mode:04o}; chmod 600 it")
        return X25519PrivateKey.from_private_bytes(keys.sealing), Ed25519PrivateKey.from_private_bytes(keys.signing)


def _file_name(round_id: str) -> str:
    return digest_of(round_id.encode())
