"""The versions that this region can answer with, in memory.

A version is loaded once, however many requests wait for it (single flight), in a thread, at most `LOADS_AT_ONCE` at a
time; the first requests after a cold start are held, not refused, up to a bounded number and time. Before a version
answers its first client it answers its own golden cases: a version that does not answer here as it did for its
publisher is refused. The same run tells whether the model is quick enough to run inside the event loop (a fraud model
takes 5 us, a thread hop 50) or belongs into a thread.

At most `versions_max` versions stay loaded; the one unused for longest goes first.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from model_delta.errors import AtollError, Malformed, Untrusted
from model_delta.manifest import GoldenCase, Manifest, Tensor
from regional_gateway.protocol import ModelFault, NotReady

Array = NDArray[Any]
INLINE_SECONDS_MAX = 0.002
LOADS_AT_ONCE = 1
WAITERS_MAX = 256
FAILED_SECONDS = 1.0
"""So long a failed load answers for itself, instead of every request trying again."""


class LoadedModel(Protocol):
    """A model that runs; `digest` is that of the manifest it was opened from."""

    digest: str

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Named tensors to named tensors."""


OpenModel = Callable[[Manifest, bytes], LoadedModel]
"""Opens the joined, plain, already checked model file of a manifest. Blocking."""


class Version(msgspec.Struct, frozen=True):
    """A loaded version: `name` is what clients are shown, `inline` whether it runs inside the event loop."""

    digest: str
    name: str
    manifest: Manifest
    model: LoadedModel
    inline: bool


class Pool:
    """Loaded versions by manifest digest. `load` brings one into memory: it fetches, checks, opens, and may raise.
    `on_load` is told how many seconds each load took."""

    def __init__(
        self,
        load: Callable[[str], Awaitable[Version]],
        *,
        versions_max: int = 64,
    ) -> None:
        self._load, self._versions_max = load, versions_max
        self.on_load: Callable[[float], None] = lambda seconds: None
        self._loaded: OrderedDict[str, Version] = OrderedDict()
        self._loading: dict[str, asyncio.Task[Version]] = {}
        self._failed: dict[str, tuple[AtollError, float]] = {}
        self._loads = asyncio.Semaphore(LOADS_AT_ONCE)
        self._waiting = 0

    def get(self, digest: str) -> Version | None:
        """The version if it is in memory now."""
        version = self._loaded.get(digest)
        if version is not None:
            self._loaded.move_to_end(digest)
        return version

    def __len__(self) -> int:
        return len(self._loaded)

    async def ready(self, digest: str, wait_seconds: float) -> Version:
        """The version, loaded first if need be.

        Raises NotReady after `wait_seconds` (the load goes on for those who come later), or at once when
        `WAITERS_MAX` requests wait already; and whatever the load raises.
        """
        version = self.get(digest)
        if version is not None:
            return version
        if self._waiting >= WAITERS_MAX:
            raise NotReady(f"version {digest[:12]}: still loading, and {WAITERS_MAX} requests wait for it already")
        failure, until = self._failed.get(digest, (None, 0.0))
        if failure is not None and asyncio.get_running_loop().time() < until:
            raise failure
        task = self._loading.get(digest)
        if task is None:
            task = asyncio.create_task(self._bring_in(digest), name=f"load {digest[:12]}")
            task.add_done_callback(_noticed)
            self._loading[digest] = task
        self._waiting += 1
        try:
            async with asyncio.timeout(wait_seconds):
                return await asyncio.shield(task)
        except TimeoutError:
            raise NotReady(f"version {digest[:12]}: not loaded within {wait_seconds:g} s, loading goes on") from None
        finally:
            self._waiting -= 1

    def keep_only(self, digests: Iterable[str]) -> None:
        """Drop every loaded version but these. A request that runs one keeps it until it is done."""
        wanted = set(digests)
        for digest in [digest for digest in self._loaded if digest not in wanted]:
            del self._loaded[digest]
        self._failed.clear()

    async def close(self) -> None:
        """Stop loading and let go of everything."""
        for task in self._loading.values():
            task.cancel()
        await asyncio.gather(*self._loading.values(), return_exceptions=True)
        self._loaded.clear()

    async def _bring_in(self, digest: str) -> Version:
        started = asyncio.get_running_loop().time()
        try:
            async with self._loads:
                version = await self._load(digest)
        except AtollError as error:
            self._failed[digest] = (error, asyncio.get_running_loop().time() + FAILED_SECONDS)
            raise
        finally:
            del self._loading[digest]
        self._loaded[digest] = version
        while len(self._loaded) > self._versions_max:
            self._loaded.popitem(last=False)
        self.on_load(asyncio.get_running_loop().time() - started)
        return version


def _noticed(task: asyncio.Task[Version]) -> None:
    """A load that fails after everybody stopped waiting is no surprise to the event loop."""
    if not task.cancelled():
        task.exception()


def open_version(
    digest: str, name: str, manifest: Manifest, file: bytes, open_model: OpenModel, clock: Callable[[], float]
) -> Version:
    """Open `file` and let it answer its golden cases. Blocking: call it in a thread. `clock` counts seconds.

    Raises Untrusted when an answer differs by more than the case's tolerance, and what `open_model` raises.
    """
    model = open_model(manifest, file)
    seconds = 0.0
    for number, case in enumerate(manifest.golden):
        inputs = {input_name: array_of(tensor) for input_name, tensor in case.inputs.items()}
        model.run(inputs)
        started = clock()
        outputs = model.run(inputs)
        seconds = max(seconds, clock() - started)
        _require_golden(name, number, case, outputs)
    # Without golden cases nothing is known about its speed, so it does not get the event loop.
    inline = bool(manifest.golden) and seconds <= INLINE_SECONDS_MAX
    return Version(digest, name, manifest, model, inline)


async def run(version: Version, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Run the model on checked inputs. Raises ModelFault when it fails or answers what is no finite number;
    Malformed when the inputs do not fit after all."""
    try:
        if version.inline:
            outputs = version.model.run(inputs)
        else:
            outputs = await asyncio.to_thread(version.model.run, inputs)
    except AtollError:
        raise  # the runtime says that the inputs do not fit after all (free dimensions other than the batch)
    except Exception as error:  # a runtime raises kinds of its own, and none may take the process down
        raise ModelFault(f"version {version.name}: the model failed: {type(error).__name__}") from error
    for output, array in outputs.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ModelFault(f"version {version.name}: output {output!r} is not a finite number")
    return outputs


def array_of(tensor: Tensor) -> Array:
    """The array that a tensor record holds. Raises Malformed when size and shape disagree."""
    try:
        return np.frombuffer(tensor.data, dtype=np.dtype(tensor.dtype)).reshape(tensor.shape)
    except (TypeError, ValueError) as error:
        raise Malformed(f"tensor: expected {tensor.dtype} of shape {list(tensor.shape)}, found: {error}") from None


def _require_golden(name: str, number: int, case: GoldenCase, outputs: Mapping[str, Array]) -> None:
    for output, tensor in case.outputs.items():
        expected = array_of(tensor)
        found = outputs.get(output)
        if found is None or found.shape != expected.shape:
            raise Untrusted(f"version {name}: golden case {number}: expected output {output!r} {list(expected.shape)}")
        apart = float(np.max(np.abs(found.astype(np.float64) - expected.astype(np.float64)), initial=0.0))
        if not apart <= case.tolerance:
            raise Untrusted(
                f"version {name}: golden case {number}: expected {output!r} within {case.tolerance:g} of what the "
                f"publisher saw, found {apart:.3g} apart"
            )
