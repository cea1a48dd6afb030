"""A whole secure round in one process: a small CA, devices, three aggregators' keys, and parties run in lock-step.

Everything is real but the network and the disk. `run` moves the messages of three `AggregationParty` generators and
keeps what each of them received, so that a test can look at one party's complete view, or change a message on its way.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fl_coordinator.aggregation import OPENING_TYPE, Opening, combine_openings
from fl_coordinator.channel import Channel
from fl_coordinator.privacy import Spent
from fl_coordinator.shares import client
from fl_coordinator.shares.contribution import (
    CONTRIBUTION_TYPE,
    Claim,
    Contribution,
    Holding,
    hold,
    keep,
    parse,
    sealing_info,
    size_max,
)
from fl_coordinator.shares.decision import Decision
from fl_coordinator.shares.fixed_point import clip, encode
from fl_coordinator.shares.freezing import FROZEN_TYPE, Frozen
from fl_coordinator.shares.measuring import Coefficients, Measured
from fl_coordinator.shares.party import AggregationParty, Committed, Keep, Outcome, own_secret_of
from fl_coordinator.shares.remembering import RoundMemory
from fl_coordinator.shares.sharing import Exchange, Pair, Ring, to_bytes
from fl_coordinator.shares.streams import COLUMNS, KeyStream, Rows, Words, expand
from fl_coordinator.transcript import SETTLEMENT_TYPE, Settlement, mean_digest, transcript_of
from model_delta.digest import digest_of
from model_delta.encoding import pack, unpack
from model_delta.keys.certificates import make_authority, make_leaf, make_request
from model_delta.keys.encryption import seal_to
from model_delta.merkle import root
from model_delta.task import TASK_TYPE, AggregatorKey, Parameter, RoundTask
from model_delta.trust.signing import pre_authentication_encoding, public_bytes, seal_envelope, sign
from model_delta.trust.updater import RoleKeys, TrustAnchors

NOW = 1_800_000_000.0
NAMES = ("north", "centre", "south")
Tamper = Callable[[int, int, str, bytes], bytes]
"""(from, to, step, message) -> the message that arrives."""


@dataclass
class View:
    """What one party received, by step and sender, and what it sent, by step and receiver."""

    received: dict[tuple[str, int], bytes] = field(default_factory=dict)
    sent: dict[tuple[str, int], bytes] = field(default_factory=dict)
    kept: list[Keep] = field(default_factory=list)
    committed: tuple[bytes, ...] = ()


class Device:
    """A device identity with a certificate by the world's CA."""

    def __init__(self, name: str, authority: bytes, authority_key: ec.EllipticCurvePrivateKey) -> None:
        self.name = name
        self.key = ec.generate_private_key(ec.SECP256R1())
        sealing = X25519PrivateKey.generate().public_key().public_bytes_raw()
        request = make_request(self.key, name)
        self.certificate = make_leaf(authority, authority_key, request, name, "acme", sealing, now=NOW, days=90)

    def sign(self, message: bytes) -> bytes:
        return self.key.sign(message, ec.ECDSA(hashes.SHA256()))


class SecureRound:
    """One announced round and everybody who takes part in it. Keyword arguments override fields of the task."""

    def __init__(self, length: int = 64, **changes: object) -> None:
        self.authority_key = ec.generate_private_key(ec.SECP256R1())
        self.ca_pem = make_authority(self.authority_key, "acme", NOW)
        self.sealing = [X25519PrivateKey.generate() for _ in NAMES]
        self.signing = [Ed25519PrivateKey.generate() for _ in NAMES]
        self.round_key = Ed25519PrivateKey.generate()
        keys = tuple(
            AggregatorKey(name, sealing.public_key().public_bytes_raw(), public_bytes(signing.public_key()))
            for name, sealing, signing in zip(NAMES, self.sealing, self.signing, strict=True)
        )
        self.task = msgspec.structs.replace(
            RoundTask(
                tenant="acme",
                model="fraud",
                round_id="fraud-7",
                base=digest_of(b"base"),
                training_graph=digest_of(b"graph"),
                parameters=(Parameter("w", (length,)),),
                length=length,
                hostile_max=0,
                selected_min=3,
                aggregators=keys,
                issued=int(NOW) - 60,
                deadline=int(NOW) + 60,
            ),
            **changes,
        )
        self.devices: dict[str, Device] = {}

    @property
    def anchors(self) -> TrustAnchors:
        return TrustAnchors("acme", {"round": RoleKeys((public_bytes(self.round_key.public_key()),))})

    def announcement(self, task: RoundTask | None = None) -> bytes:
        return seal_envelope(sign(TASK_TYPE, pack(task or self.task), [self.round_key]))

    def device(self, name: str) -> Device:
        if name not in self.devices:
            self.devices[name] = Device(name, self.ca_pem, self.authority_key)
        return self.devices[name]

    def encode(self, update: np.ndarray) -> Words:
        """As an honest device encodes it."""
        return encode(clip(update, self.task.clip_norm_l2), self.task.fraction_bits, os.urandom)

    def contribution(self, name: str, update: np.ndarray, task: RoundTask | None = None) -> bytes:
        """By the client's code, clipped."""
        device = self.device(name)
        return client.make_contribution(
            update.astype(np.float32, copy=False), task or self.task, device.sign, device.certificate, name, os.urandom
        )

    def raw(self, name: str, encoded: Words, task: RoundTask | None = None) -> bytes:
        """By a device that shares whatever it likes."""
        device = self.device(name)
        return client.share_out(encoded, task or self.task, device.sign, device.certificate, name, os.urandom)

    def equivocating(self, name: str, encoded: Words, share: int = 1) -> bytes:
        """By a device that seals one value of a share to one of its holders and another to the other one."""
        secrets = [os.urandom(32) for _ in range(3)]
        rest = encoded - expand(secrets[0], encoded.size) - expand(secrets[1], encoded.size)
        masked = KeyStream(secrets[2]).masked(rest).tobytes()
        pairs = [[secrets[index], secrets[(index + 1) % 3]] for index in range(3)]
        pairs[share][0] = os.urandom(32)
        sealed = tuple(
            seal_to(key.sealing, b"".join(pairs[index]), sealing_info(self.task, name, index))
            for index, key in enumerate(self.task.aggregators)
        )
        claim = unpack(parse(self.raw(name, encoded)).claim, Claim)
        return self.signed(name, msgspec.structs.replace(claim, sealed=sealed, masked=digest_of(masked)), masked)

    def signed(self, name: str, claim: Claim, masked: bytes) -> bytes:
        """Whatever `claim` says, validly signed by the device `name`."""
        packed = pack(claim)
        return pack(
            Contribution(packed, self.device(name).sign(pre_authentication_encoding(CONTRIBUTION_TYPE, packed)), masked)
        )

    def sign_frozen(self, index: int, said: Frozen) -> bytes:
        """A freeze under the key of aggregator `index`."""
        return seal_envelope(sign(FROZEN_TYPE, pack(said), [self.signing[index]]))

    def hold(self, contributions: Sequence[bytes], index: int) -> Holding:
        kept = [keep(data, size_max(self.task)) for data in contributions]
        return hold(kept, self.task, index, self.sealing[index], self.ca_pem, frozenset(), NOW)

    def party(
        self,
        index: int,
        contributions: Sequence[bytes],
        attempt: int = 1,
        holding: Holding | None = None,
        remembered: bytes = b"",
        final: bool = False,
        memory: RoundMemory | None = None,
        spent: Spent | None = None,
        committed: tuple[bytes, ...] = (),
    ) -> AggregationParty:
        digests = holding.digests if holding else [digest_of(data) for data in contributions]
        frozen = root([bytes.fromhex(digest) for digest in digests])
        secrets = {
            peer: Channel(
                self.sealing[index],
                key.sealing,
                NAMES[index],
                key.name,
                self.task.round_id,
                attempt,
                frozen,
            ).protocol_secret
            for peer, key in enumerate(self.task.aggregators)
            if peer != index
        }
        return AggregationParty(
            task=self.task,
            attempt=attempt,
            root=frozen,
            index=index,
            holding=holding or self.hold(contributions, index),
            pair_secrets=secrets,
            rng=os.urandom,
            sign=lambda said: self.sign_frozen(index, said),
            memory=memory,
            spent=spent,
            remembered=remembered,
            final=final,
            committed=committed,
            own_secret=own_secret_of(NAMES[index], self.sealing[index]),
        )

    def run(
        self,
        contributions: Sequence[bytes],
        tamper: Tamper | None = None,
        attempt: int = 1,
        memory: RoundMemory | None = None,
        spent: Spent | None = None,
    ) -> tuple[list[Outcome], list[View]]:
        parties = [self.party(index, contributions, attempt, memory=memory, spent=spent) for index in range(3)]
        return run_parties(parties, tamper)

    def run_rows(
        self, rows: Words, tamper: Tamper | None = None, seed: int = 0, memory: RoundMemory | None = None
    ) -> tuple[list[Outcome], list[View], Decision]:
        """Run on encoded updates uint32[n, d] that no device signed; outcomes, views, and the common decision."""
        holdings = random_holdings(rows, seed)
        names = [bytes.fromhex(digest) for digest in holdings[0].digests]
        parties = [self.party(index, names, holding=holding, memory=memory) for index, holding in enumerate(holdings)]
        outcomes, views = run_parties(parties, tamper)
        assert len({outcome.decision for outcome in outcomes}) == 1
        return outcomes, views, unpack(outcomes[0].decision, Decision)

    def replies(self, outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
        """What the three aggregators answer: signed openings and shares."""
        replies = []
        for index, (key, outcome) in enumerate(zip(self.task.aggregators, outcomes, strict=True)):
            opened = outcome.opened
            first, second = (to_bytes(opened.first), to_bytes(opened.second)) if opened else (b"", b"")
            digests = [digest_of(share) if share else "" for share in (first, second)]
            opening = pack(Opening(key.name, index, outcome.decision, *digests))
            envelope = seal_envelope(sign(OPENING_TYPE, opening, [self.signing[index]]))
            replies.append({"opening": envelope, "first": first, "second": second})
        return replies

    def transcript(self, outcomes: Sequence[Outcome]) -> bytes:
        """The packed transcript of a round without noise, as a coordinator would keep it."""
        replies, decision = self.replies(outcomes), unpack(outcomes[0].decision, Decision)
        settled = Settlement(
            tenant=self.task.tenant,
            model=self.task.model,
            round_id=self.task.round_id,
            root=decision.root,
            mean=mean_digest(combine_openings(replies, self.task).mean),
        )
        signed = seal_envelope(sign(SETTLEMENT_TYPE, pack(settled), [self.round_key]))
        return pack(transcript_of(self.announcement(), replies, signed))

    def decide(self, contributions: Sequence[bytes]) -> Decision:
        """The decision of an undisturbed run, the same at all three."""
        outcomes, _ = self.run(contributions)
        assert len({outcome.decision for outcome in outcomes}) == 1
        return unpack(outcomes[0].decision, Decision)


def run_parties(parties: Sequence[AggregationParty], tamper: Tamper | None = None) -> tuple[list[Outcome], list[View]]:
    """Run three parties in lock-step. What one raises goes to the caller."""
    steps = [party.steps() for party in parties]
    views = [View() for _ in parties]
    outcomes: list[Outcome | None] = [None] * len(parties)
    inputs: list[Mapping[int, bytes] | None] = [None] * len(parties)
    while any(outcome is None for outcome in outcomes):
        wanted: dict[int, Exchange] = {}
        for index, generator in enumerate(steps):
            try:
                given = inputs[index]
                command = next(generator) if given is None else generator.send(given)
                while isinstance(command, Keep | Committed):
                    if isinstance(command, Keep):
                        views[index].kept.append(command)
                    else:
                        views[index].committed = command.commitments
                    command = generator.send({})
                wanted[index] = command
            except StopIteration as done:
                outcomes[index] = done.value
        assert len({exchange.step for exchange in wanted.values()}) <= 1, "parties are out of step"
        for index, exchange in wanted.items():
            inputs[index] = {}
            for peer, data in exchange.outgoing.items():
                views[index].sent[exchange.step, peer] = data
        for index, exchange in wanted.items():
            received = {}
            for peer in exchange.expected:
                data = wanted[peer].outgoing[index]
                received[peer] = data if tamper is None else tamper(peer, index, exchange.step, data)
                views[index].received[exchange.step, peer] = received[peer]
            inputs[index] = received
    return [outcome for outcome in outcomes if outcome is not None], views


class ArrayRows:
    """Rows at hand, uint32[n, d]."""

    def __init__(self, words: Words) -> None:
        self.words = words

    @property
    def length(self) -> int:
        return int(self.words.shape[1])

    def origin(self, row: int) -> bytes:
        return bytes(self.words[row].tobytes())

    def blocks(self, rows: Sequence[int]) -> Iterator[tuple[int, Words]]:
        for start in range(0, self.length, COLUMNS):
            yield start, self.words[list(rows), start : start + COLUMNS].copy()


def measure_words(coefficients: Coefficients, words: Words) -> Measured:
    """Projections and sketches of vectors at hand."""
    return coefficients.measure((ArrayRows(words), range(len(words))))[0]


def whole(rows: Rows, count: int) -> Words:
    """All of `count` rows at once, uint32[count, d]."""
    return np.concatenate([block.copy() for _, block in rows.blocks(range(count))], axis=1)


def random_sharing(rows: Ring, seed: int) -> list[Pair]:
    """Replicated shares of `rows` for the three parties, from a seed, in the ring of their type."""
    rng = np.random.default_rng(seed)
    first, second = (rng.integers(0, 256, size=rows.nbytes, dtype=np.uint8) for _ in range(2))
    one, two = (part.view(rows.dtype).reshape(rows.shape) for part in (first, second))
    parts = [one, two, rows - one - two]
    return [Pair(parts[index], parts[(index + 1) % 3]) for index in range(3)]


def random_holdings(rows: Words, seed: int) -> list[Holding]:
    """What three aggregators hold of encoded updates uint32[n, d], without devices and signatures."""
    digests = tuple(digest_of(row.tobytes() + bytes([place % 256, place // 256])) for place, row in enumerate(rows))
    names = tuple(f"pos-{place:04d}" for place in range(len(rows)))
    return [
        Holding(digests, names, {}, ArrayRows(pair.first), ArrayRows(pair.second))
        for pair in random_sharing(rows, seed)
    ]


def honest_rows(world: SecureRound, count: int, seed: int = 0) -> Words:
    """Encoded updates of devices that learn about the same thing."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=world.task.length)
    return np.stack([world.encode(0.05 * (common + rng.normal(size=world.task.length))) for _ in range(count)])


def opened_sum(outcomes: list[Outcome]) -> Words:
    """What the three open together, each of them two of the three summands."""
    pairs = [outcome.opened for outcome in outcomes if outcome.opened is not None]
    for place in range(3):
        assert np.array_equal(pairs[place].second, pairs[(place + 1) % 3].first)
    return pairs[0].first + pairs[1].first + pairs[2].first


def ones_off_balance(data: bytes) -> float:
    """How far the share of one bits is from a half, in standard deviations of random data."""
    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8))
    return abs(float(bits.sum()) - bits.size / 2) / math.sqrt(bits.size / 4)
