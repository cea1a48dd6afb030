"""The version that answers on the device now, if any.

The installation puts versions in and takes them out; whoever answers asks here first whether one may.
"""

from __future__ import annotations

from edge_runtime.inference import LoadedModel
from model_delta.manifest import Manifest
from model_delta.signature import payment_width


class Running:
    """The version that answers now, if any. `blocked` says why it may not ("" when it may)."""

    def __init__(self) -> None:
        self.model: LoadedModel | None = None
        self.manifest: Manifest | None = None
        self.digest = ""
        self.payment_width: int | None = None
        """How many features it scores payments by (-1: any number); None for a version of another signature."""
        self.withdrawn: frozenset[str] = frozenset()

    def use(self, model: LoadedModel, manifest: Manifest, digest: str) -> None:
        """Answer with this version from now on."""
        self.model, self.manifest, self.digest = model, manifest, digest
        self.payment_width = payment_width(manifest.inputs, manifest.outputs)

    def clear(self) -> None:
        """No version answers."""
        self.model, self.manifest, self.digest, self.payment_width = None, None, "", None

    def blocked(self, now: float) -> str:
        """Why the installed version must not answer at `now` (Unix seconds); "" when it may."""
        if self.model is None or self.manifest is None:
            return "no model"
        if self.digest in self.withdrawn:
            return "withdrawn"
        if now >= self.manifest.expires:
            return "expired"
        return ""
