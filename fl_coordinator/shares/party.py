"""One aggregator's part of a round: messages in, messages out; it holds only its own two shares of each update.

Three parties run this over the same frozen, ordered list of contributions, one step after another:

    hello      a fresh nonce, a commitment to a coin, and which decision of this round is remembered, if any
    compare    which contributions were refused and why; for each share a keyed hash, compared with its other holder
    coin       the coin's opening, and a hash of all that was public so far: everybody must have seen the same
    split ...  range check of 64 random subset sums (see `range_check`), one bit per device opened
    gram       shares of the Gram matrix of the devices that are left, opened to all three
    agree      hash of the decision; sent only after the decision was written down

and the rule in `rules.selection` chooses, from the matrix alone. Only then does a party return its two shares of the
sum over the chosen. Because each writes the decision down before it says `agree`, and opens only after both peers said
so, either all three remember the decision or nobody has opened anything: a new attempt after a crash can therefore go
on from the remembered decision, or start afresh, and never opens two different sets of one round (which would give
away their difference).

Nothing is multiplied or opened for a contribution that was refused. A deviating aggregator is noticed where something
arrives twice or must be the same for all (hashes, opened bits, the decision, and the shares of the sum, which
`aggregation.combine_openings` compares); for its own messages in the range check and the Gram step it is trusted to
compute correctly.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from fl_coordinator.rules import selection
from fl_coordinator.shares.contribution import Holding
from fl_coordinator.shares.fixed_point import Rng, Words, norm_max
from fl_coordinator.shares.range_check import bound_exponent, range_check, require_announceable
from fl_coordinator.shares.sharing import (
    PARTIES,
    SEED_BYTES,
    Exchange,
    Pair,
    Session,
    Steps,
    expand,
    gram_share,
    project,
    to_bytes,
)
from model_delta.digest import digest_of
from model_delta.encoding import pack, unpack
from model_delta.errors import Malformed, Untrusted
from model_delta.task import RoundTask

_TAG_BYTES = 32
_REASON_MAX = 300

R = TypeVar("R", bound=msgspec.Struct)


class DeviceVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one contribution. `reason` is "" for the selected. `norm` is the update's l2 norm in model units,
    `norm_sigma` its distance from the median norm in robust standard deviations, `krum_score` in squared model units;
    all three are -1, 0 and -1 when the contribution did not get as far as the Gram matrix."""

    device_id: str
    contribution: str
    selected: bool
    reason: str
    norm: float = -1.0
    norm_sigma: float = 0.0
    krum_score: float = -1.0


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """All that a round's three aggregators agreed on, the same bytes at each.

    `gram` holds the upper triangle, row by row, of the inner products of the devices `measured` (indices into
    `devices`), int64 little endian in units of 2^(-2 fraction_bits). `refusal` says why nothing was opened ("" if the
    sum over `selected` was)."""

    format: int = 1
    tenant: str
    model: str
    round_id: str
    attempt: int
    base: str
    root: str
    aggregators: tuple[str, ...]
    coin: bytes
    devices: tuple[DeviceVerdict, ...]
    measured: tuple[int, ...]
    gram: bytes
    selected: tuple[int, ...]
    refusal: str


@dataclass(frozen=True)
class Keep:
    """Write `decision` down, durably, before resuming. `agreed`: all three have it; from now on it is final."""

    decision: bytes
    agreed: bool


@dataclass(frozen=True)
class Outcome:
    """The packed Decision and this party's two shares of the selected sum, uint64[d] (None when nothing is opened)."""

    decision: bytes
    opened: Pair | None


Protocol = Generator[Exchange | Keep, Mapping[int, bytes], Outcome]


class _Hello(msgspec.Struct, frozen=True):
    nonce: bytes
    commitment: bytes
    remembered: str


class _Compare(msgspec.Struct, frozen=True):
    refusals: tuple[tuple[int, str], ...]
    first: bytes
    second: bytes


class _Coin(msgspec.Struct, frozen=True):
    secret: bytes
    seen: str


class AggregationParty:
    """Party `index` of attempt `attempt` at a round whose contributions are frozen under the Merkle root `root`.

    `pair_secrets` are 32 bytes per peer index that only the two know (any number of attempts may share them);
    `remembered` is the decision kept by an earlier attempt, `final` whether all three had agreed on it. Raises
    Malformed for a round that must not be run.
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
        remembered: bytes = b"",
        final: bool = False,
    ) -> None:
        require_announceable(task)
        shape = (len(holding.digests), task.length)
        if holding.shares.first.shape != shape or holding.shares.second.shape != shape:
            raise Malformed(f"round {task.round_id!r}: expected shares of shape {shape}")
        self._task = task
        self._attempt = attempt
        self._root = root
        self._index = index
        self._holding = holding
        self._pair_secrets = pair_secrets
        self._rng = rng
        self._remembered = remembered
        self._final = final
        self._names = (task.aggregators[0].name, task.aggregators[1].name, task.aggregators[2].name)

    def steps(self) -> Protocol:
        """The protocol as a generator of Exchange and Keep. Raises Untrusted, naming the peer where possible."""
        me = self._index
        secret = self._rng(SEED_BYTES)
        own = _Hello(self._rng(SEED_BYTES), self._commitment(me, secret), _name_of(self._remembered))
        hellos = yield from self._broadcast("hello", own, _Hello)
        session = self._session(hellos)
        decision = self._remembered if len({hello.remembered for hello in hellos}) == 1 else b""
        if not decision:
            if self._final:
                forgetful = [n for n, h in zip(self._names, hellos, strict=True) if h.remembered != own.remembered]
                raise Untrusted(
                    f"round {self._task.round_id!r} was decided and opened, but {' and '.join(forgetful)} no longer "
                    "remembers that decision; a second one would give updates away, so the round is over"
                )
            decision = pack((yield from self._decide(session, hellos, secret)))
            yield Keep(decision, agreed=False)
        agreed = yield from self._broadcast_bytes("agree", _name_of(decision).encode())
        self._require_same("agree", "another decision", agreed)
        yield Keep(decision, agreed=True)
        chosen = list(unpack(decision, Decision).selected)
        if not chosen:
            return Outcome(decision, None)
        shares = self._holding.shares
        return Outcome(
            decision,
            Pair(shares.first[chosen].sum(axis=0, dtype=np.uint64), shares.second[chosen].sum(axis=0, dtype=np.uint64)),
        )

    def _decide(self, session: Session, hellos: Sequence[_Hello], secret: bytes) -> Steps[Decision]:
        task = self._task
        compares = yield from self._broadcast("compare", self._compare(session), _Compare)
        refused = self._judge_compares(session, compares)
        coin = yield from self._toss(hellos, compares, secret)

        usable = [index for index in range(len(self._holding.digests)) if index not in refused]
        found = 0
        if len(usable) >= task.selected_min:
            shares = self._holding.shares
            selectors = expand(_key(coin, "projections"), task.length)
            sums = Pair(project(shares.first[usable], selectors), project(shares.second[usable], selectors))
            exponent = bound_exponent(task)
            inside = yield from range_check(session, sums, exponent)
            for index in (index for index, ok in zip(usable, inside, strict=True) if not ok):
                refused[index] = "range check: a random subset sum is larger than any clipped update allows"
                found += 1
            usable = [index for index in usable if index not in refused]

        gram = np.zeros((0, 0), dtype=np.int64)
        verdict = selection.Selection((), {}, (), (), "")
        refusal = f"{len(usable)} usable contributions, a sum of fewer than {task.selected_min} is not opened"
        if len(usable) >= task.selected_min:
            gram = yield from self._open_gram(session, usable)
            verdict = selection.select(
                gram,
                norm_max(task.clip_norm_l2, task.fraction_bits, task.length),
                task.clip_norm_l2,
                task.hostile_max,
                found,
                task.selected_min,
            )
            refusal = verdict.refusal
        else:
            usable = []
        return self._record(coin, refused, usable, gram, verdict, refusal)

    def _open_gram(self, session: Session, rows: list[int]) -> Steps[NDArray[np.int64]]:
        shares = self._holding.shares
        share = gram_share(Pair(shares.first[rows], shares.second[rows]))
        upper = np.triu_indices(len(rows))
        masked = share[upper] + session.zero_sum("gram", upper[0].shape)
        data = to_bytes(masked)
        received = yield Exchange("gram", dict.fromkeys(session.peers, data), session.peers)
        doubled = masked
        for peer in sorted(session.peers):
            doubled = doubled + session.read_words(received, peer, "gram", upper[0].shape)
        if (doubled & np.uint64(1)).any():
            raise Untrusted("step 'gram': the three shares add up to odd numbers; an aggregator has deviated")
        gram = np.zeros((len(rows), len(rows)), dtype=np.int64)
        gram[upper] = doubled.view(np.int64) >> 1
        gram = gram + np.triu(gram, 1).T
        _require_possible(gram)
        return gram

    def _record(
        self,
        coin: bytes,
        refused: Mapping[int, str],
        measured: list[int],
        gram: NDArray[np.int64],
        verdict: selection.Selection,
        refusal: str,
    ) -> Decision:
        task, holding = self._task, self._holding
        unit = 2**task.fraction_bits
        place = {index: position for position, index in enumerate(measured)}
        selected = tuple(measured[position] for position in verdict.selected)
        devices = []
        for index, (device_id, digest) in enumerate(zip(holding.device_ids, holding.digests, strict=True)):
            position = place.get(index)
            if position is None:
                reason = refused.get(index, refusal)
                devices.append(DeviceVerdict(device_id=device_id, contribution=digest, selected=False, reason=reason))
                continue
            score = verdict.scores[position]
            devices.append(
                DeviceVerdict(
                    device_id=device_id,
                    contribution=digest,
                    selected=index in selected,
                    reason="" if index in selected else verdict.rejected.get(position, refusal),
                    norm=float(np.sqrt(float(gram[position, position]))) / unit,
                    norm_sigma=verdict.norm_sigma[position],
                    krum_score=score / (unit * unit) if score >= 0 else -1.0,
                )
            )
        return Decision(
            tenant=task.tenant,
            model=task.model,
            round_id=task.round_id,
            attempt=self._attempt,
            base=task.base,
            root=self._root,
            aggregators=self._names,
            coin=coin,
            devices=tuple(devices),
            measured=tuple(measured),
            gram=gram[np.triu_indices(len(measured))].astype("<i8").tobytes(),
            selected=selected,
            refusal=refusal,
        )

    def _session(self, hellos: Sequence[_Hello]) -> Session:
        nonces = b"".join(hello.nonce for hello in hellos)
        info = pack(["atoll attempt", self._task.tenant, self._task.round_id, self._attempt, self._root])
        secrets = {
            peer: HKDF(hashes.SHA256(), SEED_BYTES, nonces, info).derive(secret)
            for peer, secret in self._pair_secrets.items()
        }
        return Session(self._index, self._names, secrets)

    def _commitment(self, index: int, secret: bytes) -> bytes:
        return hashlib.sha256(
            pack(["atoll coin", self._task.round_id, self._attempt, self._root, index, secret])
        ).digest()

    def _compare(self, session: Session) -> _Compare:
        shares = self._holding.shares
        return _Compare(
            tuple((index, reason[:_REASON_MAX]) for index, reason in sorted(self._holding.refusals.items())),
            self._tags(session, session.preceding, self._index, shares.first),
            self._tags(session, session.following, session.following, shares.second),
        )

    def _tags(self, session: Session, holder: int, share: int, rows: Words) -> bytes:
        """A keyed hash (BLAKE2b, RFC 7693) of each row, which only `holder` can recompute; zeros where refused."""
        key = session.key(holder, f"tags-{share}")
        tags = []
        for index in range(rows.shape[0]):
            if index in self._holding.refusals:
                tags.append(bytes(_TAG_BYTES))
                continue
            tag = hashlib.blake2b(index.to_bytes(8, "little"), key=key, digest_size=_TAG_BYTES)
            tag.update(to_bytes(rows[index]))
            tags.append(tag.digest())
        return b"".join(tags)

    def _judge_compares(self, session: Session, compares: Sequence[_Compare]) -> dict[int, str]:
        """Refused contributions with the reason, from everybody's complaints and the hashes that differ."""
        count = len(self._holding.digests)
        complaints: dict[int, dict[str, list[str]]] = {}
        for name, compare in zip(session.names, compares, strict=True):
            if len(compare.first) != _TAG_BYTES * count or len(compare.second) != _TAG_BYTES * count:
                raise Untrusted(f"{name}: step 'compare': expected {count} hashes twice, found another number")
            for index, reason in compare.refusals:
                if not 0 <= index < count:
                    raise Untrusted(f"{name}: step 'compare': no contribution {index} among {count}")
                complaints.setdefault(index, {}).setdefault(reason[:_REASON_MAX], []).append(name)
        refused = {
            index: "; ".join(
                reason if len(names) == PARTIES else f"{' and '.join(names)}: {reason}"
                for reason, names in sorted(reasons.items())
            )
            for index, reasons in complaints.items()
        }
        for index in range(count):
            if index in refused:
                continue
            part = slice(index * _TAG_BYTES, (index + 1) * _TAG_BYTES)
            for share in range(PARTIES):
                if not hmac.compare_digest(compares[share].first[part], compares[share - 1].second[part]):
                    pair = f"{session.names[share]} and {session.names[share - 1]}"
                    refused[index] = f"inconsistent shares: {pair} were sealed different values of share {share}"
                    break
        return refused

    def _toss(self, hellos: Sequence[_Hello], compares: Sequence[_Compare], secret: bytes) -> Steps[bytes]:
        """The joint coin: random if one of the three is honest, unknown to all before the contributions are fixed."""
        seen = digest_of(pack([list(hellos), list(compares)]))
        coins = yield from self._broadcast("coin", _Coin(secret, seen), _Coin)
        for index, coin in enumerate(coins):
            if not hmac.compare_digest(self._commitment(index, coin.secret), hellos[index].commitment):
                raise Untrusted(f"{self._names[index]}: step 'coin': does not open its commitment")
        self._require_same("coin", "other messages", [coin.seen for coin in coins])
        parts = [self._task.round_id, self._attempt, self._root, *(coin.secret for coin in coins)]
        return hashlib.sha256(pack(["atoll joint coin", *parts])).digest()

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


def read_gram(decision: Decision) -> NDArray[np.int64]:
    """The opened Gram matrix, int64[n, n] over `decision.measured`. Raises Malformed for another length."""
    count = len(decision.measured)
    upper = np.triu_indices(count)
    if len(decision.gram) != 8 * upper[0].size:
        raise Malformed(f"Gram matrix: expected {8 * upper[0].size} bytes, found {len(decision.gram)}")
    gram = np.zeros((count, count), dtype=np.int64)
    gram[upper] = np.frombuffer(decision.gram, dtype="<i8")
    return gram + np.triu(gram, 1).T


def _require_possible(gram: NDArray[np.int64]) -> None:
    """Inner products obey Cauchy-Schwarz; random numbers in their place do not. In float64 with 1e-9 to spare."""
    real = gram.astype(np.float64)
    norms = np.diagonal(real)
    if (norms < 0).any() or (real * real > np.outer(norms, norms) * (1 + 1e-9)).any():
        raise Untrusted("step 'gram': the opened numbers are no inner products; an aggregator has deviated")


def _name_of(decision: bytes) -> str:
    return digest_of(decision) if decision else ""


def _key(coin: bytes, purpose: str) -> bytes:
    return HKDF(hashes.SHA256(), SEED_BYTES, None, pack(["atoll coin", purpose])).derive(coin)
