"""The path of a request through the region.

`predict` (named features in, a decision out) and `infer` (tensors in, tensors out) differ only in how they read their
inputs and word their answer. Both admit the tenant first and are counted last; in between goes `_answer`: choose the
version that the plan names for this caller, wait for it if it is still loading, read the inputs as that version wants
them, run. Everything that can grow is bounded: requests in flight, those that wait for a load, body sizes.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from model_delta.errors import Malformed
from model_delta.manifest import Manifest
from model_delta.plan import DeviceTraits, RolloutPlan
from model_delta.signature import SCORE, payment_width
from monitoring.metrics import Metrics
from regional_gateway.features import vector_of
from regional_gateway.limits import take
from regional_gateway.pool import Pool, Version, run
from regional_gateway.protocol import (
    NotReady,
    PredictResponse,
    TooMany,
    UnknownModel,
    encode_infer,
    parse_infer,
    parse_predict,
    require_inputs,
)
from regional_gateway.routing import Refusal, Route, choose
from regional_gateway.tenants import Tenant, Tenants

Array = NDArray[Any]
IN_FLIGHT_MAX = 512
WAIT_SECONDS_MAX = 5.0


class Versions(Protocol):
    """The plans in force and the versions in memory."""

    @property
    def pool(self) -> Pool:
        """Versions in memory."""

    def plan(self, tenant: str, model: str) -> RolloutPlan | None:
        """The plan in force."""

    def plans(self, tenant: str = "") -> tuple[RolloutPlan, ...]:
        """All plans in force, of one tenant or ("") of all."""

    def ready(self) -> bool:
        """Whether every plan can be answered for."""


class Asker(msgspec.Struct, frozen=True):
    """Who asks: the Authorization header, and the device on whose behalf ("" for none)."""

    authorization: str = ""
    device_id: str = ""
    device_class: str = ""


class Meters:
    """What the region counts."""

    def __init__(self, metrics: Metrics) -> None:
        self.requests = metrics.counter("gateway_requests", "Requests by route and HTTP status.", ("route", "status"))
        self.seconds = metrics.histogram("gateway_request_seconds", "Time to answer an inference.", ("route",))
        self.decisions = metrics.counter(
            "gateway_decisions", "Payments scored in this region.", ("decision", "version", "arm")
        )
        self.cold_loads = metrics.histogram("gateway_cold_load_seconds", "Time to bring a version into memory.")
        self.loaded = metrics.gauge("gateway_models_loaded", "Versions in memory.")
        self.in_flight = metrics.gauge("gateway_requests_in_flight", "Requests being answered.")
        self.ready = metrics.gauge("gateway_ready", "1 while the region takes traffic.")


class Gateway:
    """What the request's path needs. `feature_sets` maps a manifest's feature set to its names in order; `timer` is
    seconds of a steady clock."""

    def __init__(
        self,
        *,
        region: str,
        tenants: Tenants,
        versions: Versions,
        feature_sets: Mapping[str, tuple[str, ...]],
        metrics: Metrics,
        timer: Callable[[], float] = time.perf_counter,
        wait_seconds_max: float = WAIT_SECONDS_MAX,
        in_flight_max: int = IN_FLIGHT_MAX,
    ) -> None:
        self.region, self.tenants, self.versions, self.feature_sets = region, tenants, versions, feature_sets
        self.metrics, self.meters = metrics, Meters(metrics)
        self.timer = timer
        self.wait_seconds_max, self.in_flight_max = wait_seconds_max, in_flight_max
        self.in_flight = 0
        self.draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._full_at: dict[str, float] = {}
        versions.pool.on_load = self.meters.cold_loads.observe
        self.meters.loaded.read_from(lambda: len(versions.pool))
        self.meters.in_flight.read_from(lambda: self.in_flight)
        self.meters.ready.read_from(lambda: float(self.ready()))

    def ready(self) -> bool:
        """Whether new traffic is wanted here. Cheap: probes ask often."""
        return not self.draining and self.versions.ready()

    def admit(self, asker: Asker) -> Tenant:
        """The tenant, if it is known and within its limit. Raises Unauthorized, TooMany."""
        tenant = self.tenants.of(asker.authorization)
        full_at, wait = take(self._full_at.get(tenant.name, 0.0), tenant.limit, self.timer())
        self._full_at[tenant.name] = full_at
        if wait:
            limit = tenant.limit
            raise TooMany(
                f"tenant {tenant.name}: expected at most {limit.rate_per_second:g} requests/s in bursts of "
                f"{limit.burst}, found more",
                retry_after_seconds=wait,
            )
        return tenant

    async def drain(self, settle_seconds: float, deadline_seconds: float) -> bool:
        """Leave without losing a request: readiness says no at once, requests are still answered for `settle_seconds`
        (so that those who route here notice), then what is in flight is waited for. True if all of it was finished."""
        self.draining = True
        await asyncio.sleep(settle_seconds)
        try:
            async with asyncio.timeout(deadline_seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    @contextlib.contextmanager
    def flight(self) -> Iterator[None]:
        """Around the answering of one request. Raises NotReady when too many are being answered."""
        if self.in_flight >= self.in_flight_max:
            raise NotReady(f"region {self.region}: expected at most {self.in_flight_max} requests at once, found more")
        self.in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.in_flight -= 1
            if not self.in_flight:
                self._idle.set()


async def predict(gateway: Gateway, asker: Asker, body: bytes) -> PredictResponse:
    """Score one payment of named features. Raises the kinds listed in `protocol`."""
    started = gateway.timer()
    tenant = gateway.admit(asker)
    request = parse_predict(body)
    asker = Asker("", request.device_id or asker.device_id, request.device_class or asker.device_class)
    version, route, late, outputs = await _answer(
        gateway,
        tenant,
        request.model or tenant.default_model,
        "",
        asker,
        lambda manifest: _named_inputs(gateway, manifest, request.features),
    )
    score = float(_scores(version.manifest, outputs)[0])
    threshold = version.manifest.decision_threshold
    approved = score < threshold
    reason = f"score {'below' if approved else 'at or above'} the version's threshold {threshold:g}"
    if late:
        reason += f"; {late}"
    request_id = request.request_id or uuid.uuid4().hex
    latency = gateway.timer() - started
    _count(gateway, version, route, [score])
    return PredictResponse(
        score=score,
        decision="approve" if approved else "decline",
        model_version=version.name,
        manifest=version.digest,
        reason=reason,
        region=gateway.region,
        latency_ms=round(latency * 1e3, 3),
        request_id=request_id,
    )


async def infer(
    gateway: Gateway, asker: Asker, model: str, asked_version: str, body: bytes, header_length: int | None
) -> tuple[bytes, int | None]:
    """Answer an Open Inference Protocol request: the response body and, if it holds binary tensors, its JSON's length.

    Raises the kinds listed in `protocol`.
    """
    tenant = gateway.admit(asker)
    request = parse_infer(body, header_length)

    def inputs(manifest: Manifest) -> Mapping[str, Array]:
        require_inputs(request.inputs, manifest.inputs, model)
        return request.inputs

    version, route, _, outputs = await _answer(gateway, tenant, model, asked_version, asker, inputs)
    response = encode_infer(model, version.name, request, outputs)
    if payment_width(version.manifest.inputs, version.manifest.outputs) is not None:
        _count(gateway, version, route, outputs[SCORE].ravel().tolist())
    return response


def plan_of(gateway: Gateway, tenant: Tenant, model: str) -> RolloutPlan:
    """The plan in force. Raises UnknownModel, or NotReady while the region has not heard of any plan at all."""
    plan = gateway.versions.plan(tenant.name, model)
    if plan is not None:
        return plan
    known = sorted(plan.model for plan in gateway.versions.plans(tenant.name))
    if not known:
        raise NotReady(f"region {gateway.region}: no model of tenant {tenant.name} is known here yet")
    raise UnknownModel(f"model: expected one of {', '.join(known[:8])}, found {model[:64]!r}")


async def _answer(
    gateway: Gateway,
    tenant: Tenant,
    model: str,
    asked_version: str,
    asker: Asker,
    inputs: Callable[[Manifest], Mapping[str, Array]],
) -> tuple[Version, Route, str, dict[str, Array]]:
    """The version that answers, the route, why it is not the one that the plan names ("" if it is), and the outputs."""
    plan = plan_of(gateway, tenant, model)
    traits = DeviceTraits(asker.device_id, tenant.name, asker.device_class, gateway.region)
    route = choose(plan, traits, asked_version.rpartition("@")[2])
    if isinstance(route, Refusal):
        raise UnknownModel(route.reason) if asked_version else NotReady(route.reason)
    version, late = gateway.versions.pool.get(route.manifest), ""
    if version is None and route.fallback:
        version = gateway.versions.pool.get(route.fallback)
        late = f"answered by the stable version while {route.manifest[:12]} is not loaded" if version else ""
    if version is None:
        version = await gateway.versions.pool.ready(route.manifest, gateway.wait_seconds_max)
    outputs = await run(version, inputs(version.manifest))
    return version, route, late, outputs


def _named_inputs(gateway: Gateway, manifest: Manifest, features: Mapping[str, float]) -> Mapping[str, Array]:
    names = gateway.feature_sets.get(manifest.feature_set)
    if names is None or len(manifest.inputs) != 1:
        raise Malformed(
            f"model {manifest.model}: expected a feature set known here ({', '.join(gateway.feature_sets) or 'none'}), "
            f"found {manifest.feature_set!r}; send tensors to /v2/models/{manifest.model}/infer"
        )
    return {manifest.inputs[0].name: vector_of(features, names)}


def _scores(manifest: Manifest, outputs: Mapping[str, Array]) -> Array:
    output = outputs.get(SCORE) if SCORE in outputs or len(outputs) != 1 else next(iter(outputs.values()))
    if output is None or output.size != 1 or output.dtype.kind not in "fiu":
        raise Malformed(
            f"model {manifest.model}: expected one number named {SCORE!r}, found outputs {', '.join(outputs)}; "
            f"send tensors to /v2/models/{manifest.model}/infer"
        )
    return output.astype(np.float64).ravel()


def _count(gateway: Gateway, version: Version, route: Route, scores: list[float]) -> None:
    for score in scores:
        verdict = "approve" if score < version.manifest.decision_threshold else "decline"
        gateway.meters.decisions.add(1, verdict, version.name, route.arm or "named")
