"""How contributions come in: verify, admit, append and flush, record; only then is there a receipt.

A crash at any point costs a device at most a repetition. What a contribution claims is looked at only after its
signature and certificate hold; every reason to refuse, in order, is in `admission`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Sequence

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fl_coordinator.admission import OVER_BUDGET, Offered, OpenRound, Refusal, already_in, over_quota_of, refuse
from fl_coordinator.inbox import Inbox
from fl_coordinator.ledger import Ledger
from fl_coordinator.ports import Clock, Link, UpdatesLog
from fl_coordinator.recorded_rounds import newest_round
from fl_coordinator.rollout_driver import AWAKE_S
from fl_coordinator.rounds import Round, State
from fl_coordinator.shares.bounds import contributions_max
from fl_coordinator.shares.contribution import (
    CONTRIBUTION_TYPE,
    Claim,
    Contribution,
    mismatch,
    parse,
    size_max,
    verify,
)
from fl_coordinator.spending import over_budget
from fl_coordinator.tables.records import AdmittedContribution
from fl_coordinator.threads import in_thread
from fl_coordinator.updates_log import LogPart
from model_delta import topics
from model_delta.digest import digest_of
from model_delta.encoding import pack, unpack
from model_delta.errors import Expired, Malformed, NotFound, SignatureInvalid, Unavailable, Untrusted
from model_delta.keys.certificates import key_named_in, serial_of
from model_delta.keys.keyring import Keyring
from model_delta.trust.signing import pre_authentication_encoding
from monitoring.metrics import Metrics

CONTRIBUTION_QUEUE_MAX = 128
CONTRIBUTION_BYTES_MAX = 64 << 20
BATCH_MAX = 16
TOLD_AT_ONCE = 64
DAY_S = 86_400.0

_log = logging.getLogger("atoll.coordinator")


class Intake:
    """The inbox of contributions and its way into the updates log. For one event loop.

    `admitting` is held while a batch is written, so that a freeze does not cut through it; `admitted` is notified after
    each batch, and by whoever wants a waiting round to look again.
    """

    def __init__(
        self, *, ledger: Ledger, log: UpdatesLog, keyring: Keyring, link: Link, metrics: Metrics, clock: Clock
    ) -> None:
        self.inbox = Inbox(
            messages_max=CONTRIBUTION_QUEUE_MAX,
            per_device_max=2,
            message_bytes_max=CONTRIBUTION_BYTES_MAX,
            bytes_max=256 << 20,
        )
        self.admitting = asyncio.Lock()
        self.admitted = asyncio.Condition()
        self._batches = 0
        self._ledger = ledger
        self._log = log
        self._keyring = keyring
        self._link = link
        self._clock = clock
        self._count_refused = metrics.counter("contributions_refused", "Refused contributions.", ("reason",))
        self._count_admitted = metrics.counter("contributions_admitted", "Admitted contributions.")

    async def take(self) -> None:
        """Admit what has arrived, up to a batch, and send the receipts; waits for one contribution.

        Raises Unavailable and StorageFull with nobody told: devices send again."""
        batch = [await self.inbox.get()]
        while len(batch) < BATCH_MAX and not self.inbox.empty():
            batch.append(self.inbox.get_nowait())
        async with self.admitting:
            receipts = await asyncio.to_thread(self._admit, batch)
        async with self.admitted:
            self._batches += 1
            self.admitted.notify_all()
        for device_id, receipt in receipts:
            with contextlib.suppress(Unavailable, Malformed):  # whose receipt cannot be sent costs nobody else theirs
                await self._link.publish(topics.down(device_id, "receipt"), pack(receipt))

    async def log_from(self, offset: int, wait_s: float) -> LogPart:
        """What the log holds from `offset` on; when that is nothing, after the next batch or `wait_s` seconds.

        Raises Unavailable, and Malformed for damage or an offset inside a record."""
        deadline = asyncio.get_running_loop().time() + wait_s
        while True:
            batches = self._batches
            part = await asyncio.to_thread(self._log.read_from, offset)
            if part.records:
                return part
            try:
                async with asyncio.timeout_at(deadline), self.admitted:
                    while self._batches == batches:
                        await self.admitted.wait()
            except TimeoutError:
                return part

    async def leave_out(self, found: Round) -> None:
        """Tell devices that are over their quota, or that a round with privacy would bring over their budget, that it
        does not take them, before they train and upload in vain; whoever does not hear it is refused at admission.
        Raises StorageFull."""
        refusals = await in_thread(self._known_refusals, found)
        receipts = {
            name: topics.ContributionReceipt(found.round_id, False, _told(refusal))
            for name, refusal in refusals.items()
        }
        names = list(receipts)
        for start in range(0, len(names), TOLD_AT_ONCE):
            some = names[start : start + TOLD_AT_ONCE]
            sent = [self._link.publish(topics.down(name, "receipt"), pack(receipts[name])) for name in some]
            await asyncio.gather(*sent, return_exceptions=True)

    def _known_refusals(self, found: Round) -> dict[str, Refusal]:
        """The devices heard lately that follow the model and would be refused whatever they send, written down, and
        why."""
        now, quota = self._clock(), found.spec.quota.per_device
        if found.spec.privacy is None and not quota:
            return {}
        following = self._ledger.followers(found.task.model)
        awake = [record.device_id for record in following if record.last_seen >= now - AWAKE_S]
        known = {name: Refusal(OVER_BUDGET, text) for name, text in self.over_budget(found, awake).items()}
        for name in awake if quota else ():
            lately = self._ledger.contributions_of(name, now - DAY_S, found.round_id)
            if lately >= quota:
                known[name] = over_quota_of(lately, quota)
        self._ledger.sit_out((found.round_id, name, refusal.reason) for name, refusal in known.items())
        return known

    def over_budget(self, found: Round, device_ids: Sequence[str]) -> dict[str, str]:
        """Which of these devices the round's privacy leaves out, and why in words. Blocking."""
        if found.spec.privacy is None:
            return {}
        return over_budget(self._ledger, found.spec.privacy, found.round_id, device_ids)

    def _admit(self, batch: Sequence[tuple[str, bytes]]) -> list[tuple[str, topics.ContributionReceipt]]:
        """Verify, ask every question, append with one flush, record; only then are there receipts.

        A crash between the log and the ledger leaves records in the log that nothing names; their devices have no
        receipt and send again.
        """
        now = self._clock()
        receipts: list[tuple[str, topics.ContributionReceipt]] = []
        fresh: dict[str, list[tuple[Offered, bytes]]] = {}
        for topic, data in batch:
            device_id = topics.device_of(topic)
            offered, round_ = self._offered(device_id, data, now)
            if round_ is not None:
                round_ = _with_pending(round_, [entry for entry, _ in fresh.get(round_.round_id, [])])
            refusal = refuse(offered, round_, now)
            if refusal is not None:
                receipts.append((device_id, self._refused(offered, refusal)))
                continue
            if round_ is not None and not already_in(offered, round_):
                fresh.setdefault(round_.round_id, []).append((offered, data))
            receipts.append((device_id, topics.ContributionReceipt(offered.round_id, True)))
        for round_id, entries in fresh.items():
            offsets = self._log.append([data for _, data in entries])
            self._ledger.admit(
                round_id,
                [
                    AdmittedContribution(offered.device_id, offered.digest, offset, len(data), now)
                    for (offered, data), offset in zip(entries, offsets, strict=True)
                ],
            )
            self._count_admitted.add(len(entries))
        return receipts

    def _refused(self, offered: Offered, refusal: Refusal) -> topics.ContributionReceipt:
        self._count_refused.add(1, refusal.reason)
        with contextlib.suppress(NotFound):
            self._ledger.round(offered.round_id)
            self._ledger.count_refusal(offered.round_id, refusal.reason)
        _log.info("contribution of %s refused: %s: %s", offered.device_id, refusal.reason, refusal.text[:500])
        return topics.ContributionReceipt(offered.round_id, False, _told(refusal))

    def _offered(self, device_id: str, data: bytes, now: float) -> tuple[Offered, OpenRound | None]:
        """What the bytes turn out to be, and the round that they claim to be for."""
        digest = digest_of(data)
        try:
            contribution = parse(data)
            claim = unpack(contribution.claim, Claim)
            newest = newest_round(self._ledger, claim.model)
            if newest is not None and len(data) > size_max(newest.task):
                raise Malformed(f"expected at most {size_max(newest.task)} bytes, found {len(data)}")
        except Malformed as error:
            return Offered(device_id=device_id, digest=digest, flaw="malformed", flaw_text=str(error)), None
        claimed = Offered(
            device_id=device_id, digest=digest, round_id=claim.round_id, base=claim.base, length=claim.length
        )
        round_ = None if newest is None else self._open_round(newest)
        try:
            require_signed(contribution, claim)
            record = self._ledger.device(device_id)
            verified = verify(data, self._keyring.ca_pem(), frozenset(), now)
            if verified.device_id != device_id or record.kind != "device":
                text = f"sent on the line of {device_id}, signed by {verified.device_id}"
                return _flawed(claimed, "unknown certificate", text), round_
            if serial_of(claim.certificate) in self._keyring.revoked():
                return _flawed(claimed, "revoked certificate", f"certificate of {device_id}: revoked"), round_
        except SignatureInvalid as error:
            return _flawed(claimed, "bad signature", str(error)), round_
        except Expired as error:
            return _flawed(claimed, "expired certificate", str(error)), round_
        except (NotFound, Untrusted) as error:
            return _flawed(claimed, "unknown certificate", str(error)), round_
        except Malformed as error:
            return _flawed(claimed, "malformed", str(error)), round_
        if newest is not None and claim.round_id == newest.round_id:
            quota = newest.spec.quota
            lately = self._ledger.contributions_of(device_id, now - DAY_S, newest.round_id) if quota.per_device else 0
            claimed = msgspec.structs.replace(
                claimed,
                mismatch=mismatch(verified.claim, len(verified.masked), newest.task),
                group=record.trait(quota.group),
                lately=lately,
                over_budget=self.over_budget(newest, [device_id]).get(device_id, ""),
            )
        return claimed, round_

    def _open_round(self, newest: Round) -> OpenRound:
        entries = self._ledger.contributions(newest.round_id)
        quota = newest.spec.quota
        return OpenRound(
            round_id=newest.round_id,
            base=newest.task.base,
            length=newest.task.length,
            collecting=newest.at in (State.ANNOUNCED, State.COLLECTING),
            deadline=float(newest.task.deadline),
            contributions_max=contributions_max(newest.task),
            admitted={entry.device_id: entry.digest for entry in entries},
            per_device=quota.per_device,
            per_group=quota.per_group,
            groups=self._ledger.groups_of(newest.round_id, quota.group) if quota.per_group else {},
        )


def _told(refusal: Refusal) -> str:
    return f"{refusal.reason}: {refusal.text}"[:500]


def _with_pending(round_: OpenRound, pending: Sequence[Offered]) -> OpenRound:
    """The round with what the same batch has brought already."""
    groups = Counter(round_.groups) + Counter(entry.group for entry in pending)
    admitted = {**{entry.device_id: entry.digest for entry in pending}, **round_.admitted}
    return msgspec.structs.replace(round_, admitted=admitted, groups=dict(groups))


def require_signed(contribution: Contribution, claim: Claim) -> None:
    """The first question, before anybody asks whether the certificate counts: did its key sign this?

    Raises SignatureInvalid when it did not, or signed another vector, Malformed and Untrusted for no usable key.
    """
    key = key_named_in(claim.certificate)
    try:
        message = pre_authentication_encoding(CONTRIBUTION_TYPE, contribution.claim)
        key.verify(contribution.signature, message, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise SignatureInvalid("contribution: the signature is not by the key in its certificate") from None
    if digest_of(contribution.masked) != claim.masked:
        raise SignatureInvalid("contribution: the masked vector is not the one that was signed")


def _flawed(offered: Offered, flaw: str, text: str) -> Offered:
    return msgspec.structs.replace(offered, flaw=flaw, flaw_text=text)
