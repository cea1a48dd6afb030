"""One aggregator's part of a round: messages in, messages out; it holds only its own two shares of each update.

Three parties run this over the same frozen, ordered list of contributions, one step after another:

    hello      a fresh nonce, the signed freeze with a commitment to a coin (see `freezing`), and which decision of this
               round is remembered, if any
    compare    which contributions were refused and why; for each share a keyed hash of what it follows from (secret,
               digest of the ciphertext), compared with its other holder
    coin       the coin's opening, the same in every attempt (what the others committed to is on disk before), and a
               hash of all that was public so far: everybody must have seen the same
    measured   48 projections and a sketch (see `measuring`) of the first share, sent to the other holder of it
    range-...  range check of the projections (see `range_check`), one bit per device opened
    lift-...   the sketches of the devices that are left, from Z_2^32 to Z_2^64 (see `lifting`)
    gram       shares of the sketches' Gram matrix, opened to all three; or only one bit a pair, or the chosen set, in a
               round that reveals less (see `revealing`)
    agree      hash of the decision; sent only after the decision was written down
    noise      in a round with privacy: each party's own noise on the sum, in shares (see `_noisy`)

and the policy in `rules` chooses, from that alone. Only then does a party return its two shares of the weighted
sum over the chosen. Because each writes the decision down before it says `agree`, and opens only after both peers said
so, either all three remember the decision or nobody has opened anything: a new attempt after a crash can therefore go
on from the remembered decision, or start afresh, and never opens two different sets of one round (which would give
away their difference).

Nothing is multiplied or opened for a contribution that was refused. A deviating aggregator is noticed where something
arrives twice or must be the same for all (hashes, opened bits, the decision, and the shares of the sum, which
`aggregation.combine_openings` compares). What a peer says it measured is checked by random sums that it cannot foresee
(see `combining`), products of bits and the lifted sketches before anything is opened (`verifying`, `lifting`), the Gram
matrix before anything is decided from it (`gram`). What is compared in a round that reveals less is not: for its
messages there an aggregator is trusted to compute correctly.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from fl_coordinator.privacy import Spent, noise
from fl_coordinator.rules import reveals, selection
from fl_coordinator.shares.bounds import PROJECTIONS, bounds_of, contributions_max, noise_std, require_announceable
from fl_coordinator.shares.combining import RandomSums
from fl_coordinator.shares.contribution import Holding
from fl_coordinator.shares.decision import (
    OUT_OF_RANGE,
    Decision,
    judge,
    memory_after,
    told_of,
    too_few,
    verdicts_on,
)
from fl_coordinator.shares.fixed_point import Rng
from fl_coordinator.shares.freezing import (
    Frozen,
    coin_part,
    joint_coin,
    read_statement,
    require_one_coin,
    require_opening,
    require_same_freeze,
    statement,
)
from fl_coordinator.shares.gram import open_gram
from fl_coordinator.shares.lifting import lift
from fl_coordinator.shares.measuring import Coefficients
from fl_coordinator.shares.origins import Compared, compared, refused_after
from fl_coordinator.shares.range_check import range_check
from fl_coordinator.shares.remembering import RoundMemory, empty_memory, require_announced
from fl_coordinator.shares.revealing import reveal
from fl_coordinator.shares.sharing import PARTIES, Exchange, Pair, Session, Steps, to_bytes
from fl_coordinator.shares.streams import (
    SEED_BYTES,
    WORD_BYTES,
    KeyStream,
    SummedRows,
    Words,
    expand,
    weighted_sum,
    weighted_sum_from,
)
from model_delta.digest import digest_of
from model_delta.encoding import pack, unpack
from model_delta.errors import Malformed, Untrusted
from model_delta.task import RoundTask

R = TypeVar("R", bound=msgspec.Struct)


@dataclass(frozen=True)
class Keep:
    """Write `decision` down, durably, before resuming. `agreed`: all three have it; from now on it is final."""

    decision: bytes
    agreed: bool


@dataclass(frozen=True)
class Outcome:
    """The packed Decision and this party's two shares of the weighted sum, uint32[d] (None when nothing is opened)."""

    decision: bytes
    opened: Pair | None


@dataclass(frozen=True)
class Committed:
    """Write down, durably, what all three committed to, before resuming: no other coin is tossed for this list."""

    commitments: tuple[bytes, ...]


T = TypeVar("T")
Talk = Generator[Exchange | Keep | Committed, Mapping[int, bytes], T]
Protocol = Talk[Outcome]


class _Hello(msgspec.Struct, frozen=True):
    nonce: bytes
    frozen: bytes
    remembered: str


@dataclass(frozen=True)
class _Coined:
    """The coin, and what shows that it was tossed after the freeze."""

    coin: bytes
    frozen: tuple[bytes, ...]
    parts: tuple[bytes, ...]


@dataclass(frozen=True)
class _Summed:
    """The sums of both shares of some rows, uint32[d]."""

    rows: list[int]
    first: Words
    second: Words


class _Coin(msgspec.Struct, frozen=True):
    secret: bytes
    seen: str


class AggregationParty:
    """Party `index` of attempt `attempt` at a round whose contributions are frozen under the Merkle root `root`.

    `pair_secrets` are 32 bytes per peer index that only the two know (any number of attempts may share them);
    `remembered` is the decision kept by an earlier attempt, `final` whether all three had agreed on it, `committed`
    what all committed to then. `own_secret` (`own_secret_of`) is known to nobody else and the same in every attempt:
    its part of the coin and of the noise follow from it. `sign` seals a `freezing.Frozen` under this aggregator's key;
    `announced` is the digest of the announcement's payload as it was signed, that of `task` packed if not given.
    `memory` is what the policy remembers of earlier rounds, `spent` the account to be signed. Raises Malformed for a
    round that must not be run, Untrusted for one that was announced with another memory.
    """

    def __init__(
        self,
        *,
        task: RoundTask,
        attempt: int,
        root: str,
        index: int,
        holding: Holding,
        pair_secrets: Mapping[int, bytes],
        rng: Rng,
        sign: Callable[[Frozen], bytes],
        announced: str = "",
        memory: RoundMemory | None = None,
        spent: Spent | None = None,
        remembered: bytes = b"",
        final: bool = False,
        committed: tuple[bytes, ...] = (),
        own_secret: bytes = b"",
    ) -> None:
        require_announceable(task)
        self._memory = memory or empty_memory(task)
        require_announced(self._memory, task)
        if not holding.first.length == holding.second.length == task.length:
            raise Malformed(f"round {task.round_id!r}: expected shares of {task.length} words")
        if len(holding.digests) > contributions_max(task):
            raise Malformed(
                f"round {task.round_id!r}: its numbers allow {contributions_max(task)} contributions, found "
                f"{len(holding.digests)}"
            )
        self._task = task
        self._attempt = attempt
        self._root = root
        self._index = index
        self._holding = holding
        self._pair_secrets = pair_secrets
        self._rng = rng
        self._sign = sign
        self._spent = spent
        self._announced = announced or digest_of(pack(task))
        self._own_secret = own_secret or rng(SEED_BYTES)
        self._remembered = remembered
        self._final = final
        self._committed = committed
        self._summed: _Summed | None = None
        self._names = (task.aggregators[0].name, task.aggregators[1].name, task.aggregators[2].name)

    def steps(self) -> Protocol:
        """The protocol as a generator of Exchange and Keep. Raises Untrusted, naming the peer where possible."""
        me = self._index
        secret = coin_part(self._own_secret, self._task, self._root)
        count = len(self._holding.digests)
        said = statement(self._task, self._announced, self._attempt, self._root, count, me, secret)
        own = _Hello(self._rng(SEED_BYTES), self._sign(said), _name_of(self._remembered))
        hellos = yield from self._broadcast("hello", own, _Hello)
        frozen = [read_statement(hello.frozen, self._task, index) for index, hello in enumerate(hellos)]
        for found, name in zip(frozen, self._names, strict=True):
            require_same_freeze(found, said, name)
        session = self._session(hellos)
        decision = self._remembered if len({hello.remembered for hello in hellos}) == 1 else b""
        if not decision:
            if self._final:
                forgetful = [n for n, h in zip(self._names, hellos, strict=True) if h.remembered != own.remembered]
                raise Untrusted(
                    f"round {self._task.round_id!r} was decided and opened, but {' and '.join(forgetful)} no longer "
                    "remembers that decision; a second one would give updates away, so the round is over"
                )
            decision = pack((yield from self._decide(session, hellos, frozen, secret)))
            yield Keep(decision, agreed=False)
        agreed = yield from self._broadcast_bytes("agree", _name_of(decision).encode())
        self._require_same("agree", "another decision", agreed)
        yield Keep(decision, agreed=True)
        taken = unpack(decision, Decision)
        chosen = list(taken.selected)
        if not chosen:
            return Outcome(decision, None)
        self._require_still_held(chosen)
        weights = [taken.devices[index].weight for index in chosen]
        first, second = self._weighted(dict(zip(chosen, weights, strict=True)))
        if self._task.noise_multiplier > 0:
            first, second = yield from self._noisy(decision, first, second)
        return Outcome(decision, Pair(first, second))

    def _weighted(self, weights: Mapping[int, int]) -> tuple[Words, Words]:
        """Both shares of the weighted sum, from what was summed while measuring if this attempt did."""
        held, summed = (self._holding.first, self._holding.second), self._summed
        if summed is None:
            rows, factors = list(weights), list(weights.values())
            first, second = (weighted_sum(share, rows, factors) for share in held)
        else:
            totals = zip((summed.first, summed.second), held, strict=True)
            first, second = (weighted_sum_from(total, summed.rows, share, weights) for total, share in totals)
        return first, second

    def _require_still_held(self, chosen: Sequence[int]) -> None:
        """Between two attempts a certificate may expire or be revoked: then there is no share to open any more."""
        gone = [index for index in chosen if index in self._holding.refusals]
        if gone:
            raise Untrusted(
                f"round {self._task.round_id!r} was decided with {self._holding.device_ids[gone[0]]}, which is refused "
                f"now: {self._holding.refusals[gone[0]]}; another set would give updates away, so the round is over"
            )

    def _noisy(self, decision: bytes, first: Words, second: Words) -> Steps[tuple[Words, Words]]:
        """The shares of the sum with the noise of all three on them.

        Party i deals its noise as a + b: b, from a seed that it tells the following party, goes on share i + 1, a on
        share i, and to the preceding party, who holds it too and to whom it is random. All follows from a secret of
        the party's own and the decision, so that a decision that is opened again carries the same noise: two
        openings with fresh noise would be less noisy together.
        """
        info = pack(["atoll noise", self._task.round_id, self._root, digest_of(decision)])
        secret = HKDF(hashes.SHA256(), 2 * SEED_BYTES, None, info).derive(self._own_secret)
        seed, draw = secret[:SEED_BYTES], KeyStream(secret[SEED_BYTES:])
        own = noise(first.size, noise_std(self._task), draw.take).astype(np.uint32)
        after = expand(seed, first.size)
        before = own - after
        following, preceding = (self._index + 1) % PARTIES, (self._index - 1) % PARTIES
        received = yield Exchange(
            "noise", {following: seed, preceding: to_bytes(before)}, frozenset({following, preceding})
        )
        for peer, size in ((preceding, SEED_BYTES), (following, WORD_BYTES * first.size)):
            if len(received[peer]) != size:
                found = len(received[peer])
                raise Untrusted(f"{self._names[peer]}: step 'noise': expected {size} bytes, found {found}")
        first = first + before + expand(received[preceding], first.size)
        second = second + after + np.frombuffer(received[following], dtype="<u4")
        return first, second

    def _decide(
        self, session: Session, hellos: Sequence[_Hello], frozen: Sequence[Frozen], secret: bytes
    ) -> Talk[Decision]:
        task = self._task
        compares = yield from self._broadcast("compare", compared(session, self._holding), Compared)
        refused = refused_after(session, compares, len(self._holding.digests))
        coined = yield from self._toss(hellos, frozen, compares, secret)

        usable = [index for index in range(len(self._holding.digests)) if index not in refused]
        bits: dict[int, bool] = {}
        if len(usable) >= task.selected_min:
            projections, sketches = yield from self._measured(session, coined.coin, usable)
            inside = yield from range_check(session, projections, bounds_of(task).exponent)
            bits = {index: bool(ok) for index, ok in zip(usable, inside, strict=True)}
            for index in (index for index, ok in bits.items() if not ok):
                refused[index] = OUT_OF_RANGE
            usable = [index for index in usable if index not in refused]
            sketches = sketches.rows(inside)
        if len(usable) < task.selected_min:
            nothing = np.zeros((0, 0), dtype=np.int64)
            return self._record(coined, refused, bits, (), nothing, None, too_few(task, len(usable)))
        if task.reveal != reveals.DISTANCES:
            hidden = yield from reveal(session, task, coined.coin, sketches, len(bits) - len(usable))
            judged = selection.Judged(hidden.choice, ())
            nothing = np.zeros((0, 0), dtype=np.int64)
            record = self._record(coined, refused, bits, usable, nothing, judged, hidden.choice.refusal)
            return told_of(record, hidden)
        gram = yield from open_gram(session, (yield from lift(session, sketches)))
        names, hostile = [self._holding.device_ids[index] for index in usable], len(bits) - len(usable)
        judged = judge(task, gram, names, hostile, self._memory.memory)
        return self._record(coined, refused, bits, usable, gram, judged, judged.choice.refusal)

    def _measured(self, session: Session, coin: bytes, usable: list[int]) -> Steps[tuple[Pair, Pair]]:
        """Shares of all projections and sketches: of the first share by own computing, of the second by the peer's."""
        coefficients = Coefficients(coin, self._task.length, bounds_of(self._task))
        first = SummedRows(self._holding.first)
        second = RandomSums(self._holding.second, self._task.length, usable, self._rng)
        measured, again = coefficients.measure((first, usable), (second, range(second.count)))
        self._summed = _Summed(usable, first.total, second.total)
        own = measured.joined
        received = yield Exchange("measured", {session.preceding: to_bytes(own)}, frozenset({session.following}))
        other = session.read_words(received, session.following, "measured", own)
        if not np.array_equal(second.of(other), again.joined):
            raise Untrusted(
                f"{session.names[session.following]}: step 'measured': what it says it measured of a share is not what "
                "the share gives; nothing was opened"
            )
        both = Pair(own, other)
        return both.columns(0, PROJECTIONS), both.columns(PROJECTIONS, own.shape[1])

    def _record(
        self,
        coined: _Coined,
        refused: Mapping[int, str],
        bits: Mapping[int, bool],
        measured: Sequence[int],
        gram: NDArray[np.int64],
        judged: selection.Judged | None,
        refusal: str,
    ) -> Decision:
        task, holding = self._task, self._holding
        named = list(zip(holding.device_ids, holding.digests, strict=True))
        devices = verdicts_on(task, named, refused, bits, measured, gram, judged, refusal)
        return Decision(
            tenant=task.tenant,
            model=task.model,
            round_id=task.round_id,
            attempt=self._attempt,
            base=task.base,
            root=self._root,
            aggregators=self._names,
            coin=coined.coin,
            policy=task.policy,
            devices=devices,
            measured=tuple(measured),
            scale=bounds_of(task).scale,
            gram=gram[np.triu_indices(len(gram))].astype("<i8").tobytes(),
            selected=tuple(index for index, device in enumerate(devices) if device.selected),
            divisor=judged.choice.divisor if judged is not None else 0,
            refusal=refusal,
            task=self._announced,
            frozen=coined.frozen,
            parts=coined.parts,
            memory=memory_after(self._memory, task, judged),
            reveal=task.reveal,
            spent=self._spent,
        )

    def _session(self, hellos: Sequence[_Hello]) -> Session:
        nonces = b"".join(hello.nonce for hello in hellos)
        info = pack(["atoll attempt", self._task.tenant, self._task.round_id, self._attempt, self._root])
        secrets = {
            peer: HKDF(hashes.SHA256(), SEED_BYTES, nonces, info).derive(secret)
            for peer, secret in self._pair_secrets.items()
        }
        return Session(self._index, self._names, secrets)

    def _toss(
        self, hellos: Sequence[_Hello], frozen: Sequence[Frozen], compares: Sequence[Compared], secret: bytes
    ) -> Talk[_Coined]:
        """The joint coin: random if one of the three is honest, unknown to all before the contributions are fixed."""
        yield Committed(require_one_coin(frozen, self._committed, self._names))
        seen = digest_of(pack([list(hellos), list(compares)]))
        coins = yield from self._broadcast("coin", _Coin(secret, seen), _Coin)
        for name, said, coin in zip(self._names, frozen, coins, strict=True):
            require_opening(said, coin.secret, name)
        self._require_same("coin", "other messages", [coin.seen for coin in coins])
        parts = tuple(coin.secret for coin in coins)
        joint = joint_coin(self._task.round_id, self._root, parts)
        return _Coined(joint, tuple(hello.frozen for hello in hellos), parts)

    def _broadcast(self, step: str, own: R, kind: type[R]) -> Steps[list[R]]:
        messages = yield from self._broadcast_bytes(step, pack(own))
        values: list[R] = []
        for index, data in enumerate(messages):
            try:
                values.append(own if index == self._index else unpack(data, kind))
            except Malformed as error:
                raise Untrusted(f"{self._names[index]}: step {step!r}: {error}") from None
        return values

    def _broadcast_bytes(self, step: str, own: bytes) -> Steps[list[bytes]]:
        """Send the same bytes to both peers; everybody's bytes in party order."""
        peers = frozenset(range(PARTIES)) - {self._index}
        received = yield Exchange(step, dict.fromkeys(peers, own), peers)
        return [own if index == self._index else received[index] for index in range(PARTIES)]

    def _require_same(self, step: str, what: str, values: Sequence[object]) -> None:
        if len(set(values)) == 1:
            return
        odd = [name for name, value in zip(self._names, values, strict=True) if values.count(value) == 1]
        raise Untrusted(f"step {step!r}: {' and '.join(odd)} saw {what} than the rest; nothing was opened")


def own_secret_of(name: str, sealing: X25519PrivateKey) -> bytes:
    """32 bytes from an aggregator's own key, so that they are the same after a crash, and nobody else's."""
    return HKDF(hashes.SHA256(), SEED_BYTES, None, pack(["atoll noise", name])).derive(sealing.private_bytes_raw())


def _name_of(decision: bytes) -> str:
    return digest_of(decision) if decision else ""
