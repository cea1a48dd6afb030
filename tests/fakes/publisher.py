"""A coordinator in memory, as a region sees it: it publishes real sealed releases and signed plans, and can go away.

publisher = Publisher(tmp_path, broker)
stable = publisher.publish(mlp(seed=1))
await publisher.plan(stable=stable.digest)
publisher.up = False                    # fetch and artifact_key raise Unavailable
"""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime.onnx_model import OnnxModel
from model_delta.digest import digest_of
from model_delta.encoding import pack
from model_delta.errors import NotFound, Unavailable
from model_delta.graphs.mlp import mlp_model
from model_delta.keys.encryption import new_key
from model_delta.keys.keyring import EmbeddedKeyring
from model_delta.manifest import GoldenCase, Tensor
from model_delta.plan import PLAN_TYPE, Cohort, RolloutPlan
from model_delta.release import Release, build_release
from model_delta.topics import plan_topic
from model_delta.trust.paths import KIND as TUF
from model_delta.trust.signing import open_envelope, seal_envelope
from tests.fakes.link import FakeBroker
from tests.fakes.tuf_site import Site

TENANT = "acme"
MODEL = "fraud"
NAMES = ("amount", "hour", "distance", "count")


def mlp(seed: int, bias: float = 0.0) -> bytes:
    """A small fraud model over `NAMES`; another seed is another model, `bias` shifts its scores."""
    rng = np.random.default_rng(seed)
    width = len(NAMES)
    first = rng.normal(0, 0.5, (width, 8)).astype(np.float32), np.zeros(8, np.float32)
    last = rng.normal(0, 0.5, (8, 1)).astype(np.float32), np.full(1, bias, np.float32)
    return mlp_model([first, last], np.zeros(width, np.float32), np.ones(width, np.float32))


def tensor(array: np.ndarray[Any, Any]) -> Tensor:
    """An array by value."""
    return Tensor(array.dtype.name, array.shape, array.tobytes())


class Publisher:
    """`fetched` counts what was asked for, by (kind, name); `keys_given` by manifest."""

    def __init__(self, directory: Path, broker: FakeBroker, now: float = 1_700_000_000.0, tenant: str = TENANT) -> None:
        self.tenant = tenant
        self.keyring = EmbeddedKeyring.create(directory / "keyring", tenant, lambda: now)
        self.link = broker.link("coordinator")
        self.now = now
        self.site = Site(now, self.keyring.anchors(), tenant)
        self.up = True
        self.fetched: Counter[tuple[str, str]] = Counter()
        self.keys_given: Counter[str] = Counter()
        self.objects: dict[tuple[str, str], bytes] = {}
        self._keys: dict[str, bytes] = {}
        self._releases = 0
        self._serial = 0

    def publish(
        self,
        file: bytes,
        *,
        golden_shift: float = 0.0,
        feature_set: str = "payments",
        model: str = MODEL,
        vouched: bool = True,
    ) -> Release:
        """Release `file`. A `golden_shift` makes it a version that does not answer as its golden case says."""
        self._releases += 1
        rows = np.linspace(-1, 1, 2 * len(NAMES), dtype=np.float32).reshape(2, -1)
        scores = np.asarray(run_file(file, rows) + golden_shift, np.float32)
        golden = GoldenCase({"features": tensor(rows)}, {"score": tensor(scores)})
        key = new_key()
        release = build_release(
            file,
            tenant=self.tenant,
            model=model,
            version={"eu-west": self._releases},
            release=self._releases,
            parents=(),
            keyring=self.keyring,
            key=key,
            golden=(golden,),
            feature_set=feature_set,
            now=self.now,
        )
        self._keys[release.digest] = key
        self.objects["manifest", release.digest] = release.envelope
        self.objects["delivery", release.digest] = pack(release.delivery)
        for name, data in release.blobs.items():
            self.objects["blob", name] = data
        if vouched:
            self.site.now = self.now
            self.site.release(open_envelope(release.envelope).payload, model)
            self.site.publish()
        return release

    def make_plan(
        self,
        *,
        stable: str,
        target: str = "",
        buckets: int = 0,
        withdrawn: tuple[str, ...] = (),
        serial: int = 0,
        model: str = MODEL,
    ) -> RolloutPlan:
        """The next plan (or one of the given serial), not signed yet."""
        self._serial = serial or self._serial + 1
        return RolloutPlan(
            tenant=self.tenant,
            model=model,
            name=f"rollout-{self._serial}",
            serial=self._serial,
            salt="salt",
            cohorts=(Cohort("everybody"),),
            target_buckets=buckets,
            target=target or stable,
            stable=stable,
            withdrawn=withdrawn,
            issued=int(self.now),
            expires=int(self.now) + 86_400,
        )

    def sign(self, plan: RolloutPlan) -> bytes:
        """The plan as it travels."""
        return seal_envelope(self.keyring.sign("plan", PLAN_TYPE, pack(plan)))

    async def plan(self, **fields: Any) -> RolloutPlan:
        """Sign a plan and publish it retained."""
        plan = self.make_plan(**fields)
        await self.link.publish(plan_topic(self.tenant, plan.model), self.sign(plan), retain=True)
        return plan

    async def fetch(self, kind: str, name: str) -> bytes:
        """What a region's `fetch` is."""
        self.fetched[kind, name] += 1
        await asyncio.sleep(0)
        if not self.up:
            raise Unavailable(f"{kind} {name[:12]}: the coordinator is away")
        if kind == "tuf":
            return self.site.store.get(TUF, name)
        try:
            return self.objects[kind, name]
        except KeyError:
            raise NotFound(f"{kind} {name[:12]}: not here") from None

    async def artifact_key(self, manifest: str) -> bytes:
        """What a region's `artifact_key` is."""
        self.keys_given[manifest] += 1
        await asyncio.sleep(0)
        if not self.up:
            raise Unavailable(f"key of {manifest[:12]}: the coordinator is away")
        return self._keys[manifest]


def run_file(file: bytes, rows: np.ndarray[Any, np.dtype[np.float32]]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The scores that a file gives, straight from the runtime."""
    scores = OnnxModel(digest_of(file), file, "model").run({"features": rows})["score"]
    return np.asarray(scores, np.float32)
