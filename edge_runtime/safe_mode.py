"""What answers when no full model may: the compact baseline, or, before there is one, a fixed rule.

A baseline comes in a handful of short frames over a line that carries little else (LoRaWAN, SMS), or as one signed
file. It is verified on arrival and again at every start, and kept until a newer one comes; an older release than the
one at hand is refused.

With no model and no baseline the rule is: approve a payment up to `amount_limit`, decline above it; where the features
hold no amount, decline. It is a merchant's floor limit, the oldest rule of the card trade: it bounds the loss of one
payment, and claims nothing else. Its score is 0 or 1, and its version is "".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_runtime.slots import replace_file
from model_delta.baseline import BASELINE_BYTES_MAX, decode_verified
from model_delta.digest import digest_of
from model_delta.errors import AtollError, Malformed, RolledBack, SignatureInvalid, Untrusted
from model_delta.frames import Reassembly
from model_delta.trust.updater import TrustAnchors, role_keys


class Baseline(Protocol):
    """A compact model: `score(features float32[F])` in [0, 1]; `release` only grows."""

    @property
    def release(self) -> int: ...

    @property
    def decision_threshold(self) -> float: ...

    def score(self, features: NDArray[np.float32]) -> float: ...


OpenBaseline = Callable[[bytes], Baseline]


class SafeAnswer(msgspec.Struct, frozen=True):
    """A score, the decision, and the digest of the baseline that gave it ("" for the fixed rule)."""

    score: float
    approved: bool
    digest: str


def verified_baseline(anchors: Callable[[], TrustAnchors], model: str) -> OpenBaseline:
    """Opens signed baselines of the anchors' tenant and of `model`, by the keys that the role `baseline` has then."""

    def open_baseline(data: bytes) -> Baseline:
        known = anchors()
        keys, threshold = role_keys(known, "baseline")
        if threshold > 1:
            raise SignatureInvalid(f"baseline: expected {threshold} signatures of the role; its form has room for one")
        found = decode_verified(data, keys)
        if (found.tenant, found.model) != (known.tenant, model):
            raise Untrusted(f"baseline: expected {known.tenant}/{model}, found {found.tenant}/{found.model}")
        return found

    return open_baseline


class SafeMode:
    """The baseline in `path`, if there is one; `problem` says what is wrong with it."""

    def __init__(
        self,
        path: Path,
        *,
        open_baseline: OpenBaseline,
        amount_feature: str = "amount",
        amount_limit: float = 50.0,
    ) -> None:
        self._path, self._open_baseline = path, open_baseline
        self._amount_feature, self._amount_limit = amount_feature, amount_limit
        self._frames = Reassembly()
        self.baseline: Baseline | None = None
        self.digest = ""
        self.problem = ""
        if path.exists():
            try:
                self._use(path.read_bytes())
            except (AtollError, OSError) as error:
                self.problem = f"baseline at {path}: {error}"

    def receive(self, data: bytes) -> Baseline:
        """A whole signed baseline has arrived. Raises Untrusted, Malformed, RolledBack, StorageFull; the one at hand
        then stays."""
        if len(data) > BASELINE_BYTES_MAX:
            raise Malformed(f"baseline: expected at most {BASELINE_BYTES_MAX} bytes, found {len(data)}")
        found = self._open_baseline(data)
        if self.baseline is not None and found.release < self.baseline.release:
            raise RolledBack(f"baseline: expected release {self.baseline.release} or later, found {found.release}")
        replace_file(self._path, data)
        return self._use(data)

    def receive_frame(self, frame: bytes) -> Baseline | None:
        """One radio frame has arrived; the baseline, if this frame completed it. Raises as `receive`."""
        data = self._frames.add(frame)
        return None if data is None else self.receive(data)

    def answer(self, features: Mapping[str, float], row: NDArray[np.float32]) -> SafeAnswer:
        """Answer one payment. Never raises: whatever is wrong with the baseline, the fixed rule is left."""
        if self.baseline is not None:
            try:
                score = self.baseline.score(row)
                if 0.0 <= score <= 1.0:
                    return SafeAnswer(score, score < self.baseline.decision_threshold, self.digest)
                self.problem = f"baseline {self.digest[:12]}: expected a score in [0, 1], found {score!r}"
            except (ValueError, AtollError) as error:
                self.problem = str(error)
        amount = features.get(self._amount_feature)
        approved = amount is not None and amount <= self._amount_limit
        return SafeAnswer(0.0 if approved else 1.0, approved, "")

    def _use(self, data: bytes) -> Baseline:
        self.baseline = self._open_baseline(data)
        self.digest = digest_of(data)
        self.problem = ""
        return self.baseline
