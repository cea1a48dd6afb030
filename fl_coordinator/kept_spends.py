"""What one aggregator has opened so far, and so whether it believes what the coordinator says a round will have spent.

The coordinator keeps the accounts of a model's releases and of each device, and says before a round what they hold. An
aggregator signs that account with its decision, and not blindly: the epsilons must follow from the spends and stay
within the announced budget, and no opening that this aggregator took part in may be missing. What it signs counts from
then on, whether it opens or not: two rounds side by side could else leave out each other. It cannot know of openings
without it; there are none with fewer than three aggregators. After it lost its disk it knows of none, the other two do.

It never counts more than the coordinator does, which pays for noise before it asks, and takes a sum without noise for
opened unless all who were asked say that they failed: such a sum is written down here when the answer is on disk and
goes out, so that who has no room for either can say so truthfully.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Sequence

import msgspec

from fl_coordinator.privacy import Spend, Spent, burden, miscounted
from model_delta.digest import digest_of
from model_delta.encoding import pack, unpack
from model_delta.errors import Malformed, NotFound, Untrusted
from model_delta.store import ArtifactStore
from model_delta.task import RoundTask

KIND = "spent"
_SLACK = 1e-9


class _Opened(msgspec.Struct, frozen=True):
    round_id: str
    noise_multiplier: float


class _Spends(msgspec.Struct, frozen=True):
    """Openings by model, and each device's burden by the openings it was frozen into, of all models."""

    models: dict[str, tuple[_Opened, ...]] = {}
    devices: dict[str, float] = {}
    format: int = 1


class KeptSpends:
    """Of one aggregator, in its own store. Blocking."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store
        self._one_at_a_time = threading.Lock()

    def promise(self, task: RoundTask, spent: Spent | None, device_ids: Sequence[str]) -> None:
        """Whether the account of a round that is about to open is right and within its budget; with noise it is written
        down as spent, so that no round that runs beside it leaves it out. Raises Malformed for a round with noise and
        no account, and when it would overspend, Untrusted for an account that leaves out or miscounts something."""
        with self._one_at_a_time:
            self._require_true(task, spent, device_ids)
            if task.noise_multiplier > 0:
                self._write(task, device_ids)

    def opened(self, task: RoundTask, device_ids: Sequence[str]) -> None:
        """Write down an opening without noise, before its shares leave; done again, or with noise, it changes
        nothing."""
        with self._one_at_a_time:
            self._write(task, device_ids)

    def _require_true(self, task: RoundTask, spent: Spent | None, device_ids: Sequence[str]) -> None:
        what = f"round {task.round_id!r}: privacy"
        if task.noise_multiplier == 0 and spent is None:
            return
        if spent is None or spent.spend != Spend(task.noise_multiplier) or spent.delta != task.delta:
            raise Malformed(f"{what}: expected an account of noise {task.noise_multiplier:g} at delta {task.delta:g}")
        if any(one.sampling != 1 for one in (*spent.before_release, *spent.before_device)):
            # A draw that nobody made would make every epsilon look small.
            raise Untrusted(f"{what}: the account counts openings as sampled; no device is drawn in secret")
        kept = self._kept(task)
        known = Counter(
            Spend(one.noise_multiplier) for one in kept.models.get(task.model, ()) if one.round_id != task.round_id
        )
        left_out = known - Counter(spent.before_release)
        if left_out:
            raise Untrusted(
                f"{what}: the account leaves out {left_out.total()} of {known.total()} openings of {task.model!r} that "
                "this aggregator took part in"
            )
        again = any(one.round_id == task.round_id for one in kept.models.get(task.model, ()))
        counted = burden([spent.spend]) if again else 0.0
        own = max((_less(kept.devices.get(name, 0.0), counted) for name in device_ids), default=0.0)
        if own > burden(spent.before_device) * (1 + _SLACK) + _SLACK:
            raise Untrusted(f"{what}: the account leaves out openings of its most burdened device")
        problem = miscounted(spent)
        if problem:
            raise Untrusted(f"{what}: {problem}")
        for whose, found, budget in (
            ("the release", spent.epsilon_release, task.epsilon),
            ("its most burdened device", spent.epsilon_device, task.epsilon_device),
        ):
            if found > budget:
                raise Malformed(
                    f"{what}: this opening would bring {whose} to epsilon {found:.2f} at delta {task.delta:g}, the "
                    f"announced budget is {budget:g}"
                )

    def _write(self, task: RoundTask, device_ids: Sequence[str]) -> None:
        kept = self._kept(task)
        before = kept.models.get(task.model, ())
        if any(one.round_id == task.round_id for one in before):
            return
        cost = burden([Spend(task.noise_multiplier)])  # infinite without noise
        devices = {**kept.devices, **{name: kept.devices.get(name, 0.0) + cost for name in device_ids}}
        models = {**kept.models, task.model: (*before, _Opened(task.round_id, task.noise_multiplier))}
        self._store.put(KIND, _file_name(task), pack(_Spends(models, devices)))

    def _kept(self, task: RoundTask) -> _Spends:
        try:
            return unpack(self._store.get(KIND, _file_name(task)), _Spends)
        except NotFound:
            return _Spends()


def _less(total: float, counted: float) -> float:
    return total if math.isinf(total) else total - counted


def _file_name(task: RoundTask) -> str:
    return digest_of(task.tenant.encode())
