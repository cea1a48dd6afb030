"""The three aggregators of a round in one process: for a simulation, where nobody is to be kept apart.

Each party runs the code that an aggregator runs (`shares.party`), on its own shares, and what they open is put together
by the code with which the coordinator does it. Only the way between them is left out: no sealing, no HTTP, no Flower,
no disk. The same contributions to the same announcement therefore give the same aggregate, byte for byte, as over the
network; in rounds so large that distances are estimated by sketches, or that carry noise, under the same coin.

It keeps nothing, so nothing stops it from opening two sets of one round: not a way to run an aggregator.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence, Set

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fl_coordinator.aggregation import OPENING_TYPE, Aggregate, Opening, combine_openings
from fl_coordinator.channel import Channel
from fl_coordinator.shares.contribution import hold, keep, size_max
from fl_coordinator.shares.fixed_point import Rng
from fl_coordinator.shares.freezing import FROZEN_TYPE, Frozen
from fl_coordinator.shares.party import AggregationParty, Committed, Keep, Outcome, own_secret_of
from fl_coordinator.shares.remembering import RoundMemory
from fl_coordinator.shares.sharing import PARTIES, Exchange, to_bytes
from model_delta.digest import digest_of
from model_delta.encoding import pack
from model_delta.errors import Malformed
from model_delta.merkle import root as merkle_root
from model_delta.task import AggregatorKey, RoundTask
from model_delta.trust.signing import public_bytes, seal_envelope, sign


class LocalAggregators:
    """Three aggregators; `rngs` are their sources of random bytes, keys included: fixed bytes give the same round."""

    def __init__(
        self, rngs: Sequence[Rng] = (os.urandom,) * PARTIES, names: Sequence[str] = ("a0", "a1", "a2")
    ) -> None:
        if len(rngs) != PARTIES or len(names) != PARTIES:
            raise Malformed(f"aggregators: expected {PARTIES}, found {len(rngs)} sources and {len(names)} names")
        self._names, self._rngs = tuple(names), tuple(rngs)
        secrets = [(rng(32), rng(32)) for rng in self._rngs]
        self._sealing = [X25519PrivateKey.from_private_bytes(sealing) for sealing, _ in secrets]
        self._signing = [Ed25519PrivateKey.from_private_bytes(signing) for _, signing in secrets]

    @property
    def keys(self) -> tuple[AggregatorKey, ...]:
        """What a round must announce as its aggregators."""
        return tuple(
            AggregatorKey(name, sealing.public_key().public_bytes_raw(), public_bytes(signing.public_key()))
            for name, sealing, signing in zip(self._names, self._sealing, self._signing, strict=True)
        )

    def aggregate(
        self,
        contributions: Sequence[bytes],
        task: RoundTask,
        *,
        ca_pem: bytes,
        now: float,
        revoked: Set[int] = frozenset(),
        attempt: int = 1,
        memory: RoundMemory | None = None,
    ) -> Aggregate:
        """The decision about `contributions`, in this order, and the mean update of the chosen.

        `ca_pem` and `revoked` (serial numbers) judge device certificates at `now` (Unix seconds); `memory` is what the
        policy remembers of the rounds before (`memory_chain.after` gives what it is afterwards). Raises Malformed for
        a round that was announced with other aggregators or must not be run.
        """
        if task.aggregators != self.keys:
            raise Malformed(f"round {task.round_id!r}: was announced with other aggregators than {self._names}")
        kept = [keep(data, size_max(task)) for data in contributions]
        root = merkle_root([bytes.fromhex(entry.digest) for entry in kept])
        parties = []
        for index, sealing in enumerate(self._sealing):
            holding = hold(kept, task, index, sealing, ca_pem, revoked, now)
            secrets = self._pair_secrets(index, task, attempt, root)
            parties.append(
                AggregationParty(
                    task=task,
                    attempt=attempt,
                    root=root,
                    index=index,
                    holding=holding,
                    pair_secrets=secrets,
                    rng=self._rngs[index],
                    sign=functools.partial(self._frozen, index),
                    memory=memory,
                    own_secret=own_secret_of(self._names[index], sealing),
                )
            )
        outcomes = _in_step(parties)
        return combine_openings([self._signed(index, outcome) for index, outcome in enumerate(outcomes)], task)

    def _pair_secrets(self, index: int, task: RoundTask, attempt: int, root: str) -> dict[int, bytes]:
        return {
            peer: Channel(
                self._sealing[index],
                key.sealing,
                self._names[index],
                key.name,
                task.round_id,
                attempt,
                root,
            ).protocol_secret
            for peer, key in enumerate(self.keys)
            if peer != index
        }

    def _frozen(self, index: int, said: Frozen) -> bytes:
        return seal_envelope(sign(FROZEN_TYPE, pack(said), [self._signing[index]]))

    def _signed(self, index: int, outcome: Outcome) -> dict[str, object]:
        """What an aggregator answers; see `Aggregator.run_round`."""
        first = to_bytes(outcome.opened.first) if outcome.opened else b""
        second = to_bytes(outcome.opened.second) if outcome.opened else b""
        digests = (digest_of(first), digest_of(second)) if outcome.opened else ("", "")
        opening = Opening(self._names[index], index, outcome.decision, *digests)
        envelope = seal_envelope(sign(OPENING_TYPE, pack(opening), [self._signing[index]]))
        return {"opening": envelope, "first": first, "second": second}


def _in_step(parties: Sequence[AggregationParty]) -> list[Outcome]:
    """Run the parties, one step of all after the other. What one raises ends the round."""
    steps = [party.steps() for party in parties]
    given: list[Mapping[int, bytes] | None] = [None] * len(parties)
    outcomes: dict[int, Outcome] = {}
    while len(outcomes) < len(parties):
        wanted: dict[int, Exchange] = {}
        for index, generator in enumerate(steps):
            received = given[index]
            try:
                command = next(generator) if received is None else generator.send(received)
                while isinstance(command, Keep | Committed):  # there is no crash to remember anything for
                    command = generator.send({})
                wanted[index] = command
            except StopIteration as done:
                outcomes[index] = done.value
        for index, exchange in wanted.items():
            given[index] = {peer: wanted[peer].outgoing[index] for peer in exchange.expected}
    return [outcomes[index] for index in range(len(parties))]
