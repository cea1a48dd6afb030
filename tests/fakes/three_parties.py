"""The three parties of a computation on shares in lock-step, without a round around them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fl_coordinator.shares.sharing import Exchange, Pair, Ring, Session
from tests.fakes.secure_round import NAMES, Tamper


def sessions() -> list[Session]:
    """Of one attempt, with fresh secrets."""
    secrets = {frozenset(pair): os.urandom(32) for pair in ((0, 1), (1, 2), (2, 0))}
    return [Session(i, NAMES, {j: secrets[frozenset((i, j))] for j in range(3) if j != i}) for i in range(3)]


Change = Callable[[np.ndarray], None]
LIAR = 1


@dataclass(frozen=True)
class CarefulLiar(Session):
    """Changes its summand in some steps, and goes on with it as if it were right: so its peers hear one story."""

    changes: Mapping[str, Change] = field(default_factory=dict)

    def zero_bits(self, step: str, like: Ring) -> Ring:
        return self._changed(step, super().zero_bits(step, like))

    def zero_sum(self, step: str, like: Ring) -> Ring:
        return self._changed(step, super().zero_sum(step, like))

    def _changed(self, step: str, words: Ring) -> Ring:
        words = words.copy()
        if step in self.changes:
            self.changes[step](words.reshape(-1))
        return words


def together(
    make: Callable[[Session, int], Any], tamper: Tamper | None = None, lies: Mapping[str, Change] | None = None
) -> list[Any]:
    """Run one generator per party; their results. What one raises goes to the caller. `tamper` changes what arrives,
    `lies` what party 1 adds to its summand in a step."""
    parties = sessions()
    if lies is not None:
        liar = parties[LIAR]
        parties[LIAR] = CarefulLiar(liar.index, liar.names, liar.secrets, lies)
    steps = [make(session, session.index) for session in parties]
    results: list[Any] = [None] * 3
    inputs: list[dict[int, bytes] | None] = [None] * 3
    while True:
        wanted: dict[int, Exchange] = {}
        for index, generator in enumerate(steps):
            try:
                wanted[index] = generator.send(inputs[index])
            except StopIteration as done:
                results[index] = done.value
        if not wanted:
            return results
        inputs = [{} for _ in range(3)]
        for index, exchange in wanted.items():
            for peer in exchange.expected:
                data = wanted[peer].outgoing[index]
                inputs[index][peer] = data if tamper is None else tamper(peer, index, exchange.step, data)


def xor_sharing(value: np.ndarray) -> list[Pair]:
    """Shares under exclusive or, in words of 64 bits."""
    a, b = (np.frombuffer(os.urandom(value.nbytes), dtype="<u8").reshape(value.shape) for _ in range(2))
    parts = [a, b, value ^ a ^ b]
    return [Pair(parts[i], parts[(i + 1) % 3]) for i in range(3)]


def heard_by_the_silent(
    make: Callable[[Session, int], Any], parties: list[Session], liar: int, silent: str
) -> dict[tuple[int, str], bytes]:
    """What a liar has been told, by sender and step, when it sends nothing from step `silent` on and the others have
    come as far as they can: on a real network nobody waits for a message that is not for him."""
    steps = [make(session, session.index) for session in parties]
    waiting: list[Exchange | None] = [next(generator) for generator in steps]
    mail: dict[tuple[int, int, str], bytes] = {}
    moved = True
    while moved:
        moved = False
        for index, exchange in enumerate(waiting):
            if exchange is None or (index == liar and exchange.step == silent):
                continue
            before = len(mail)
            mail.update({(index, peer, exchange.step): data for peer, data in exchange.outgoing.items()})
            moved = moved or len(mail) > before
            found = {peer: mail.get((peer, index, exchange.step)) for peer in exchange.expected}
            given = {peer: data for peer, data in found.items() if data is not None}
            if len(given) < len(found):
                continue
            moved = True
            try:
                waiting[index] = steps[index].send(given)
            except StopIteration:
                waiting[index] = None
    return {(sender, step): data for (sender, receiver, step), data in mail.items() if receiver == liar}
