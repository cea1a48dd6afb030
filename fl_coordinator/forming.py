"""From the bytes that somebody hands in to the file that devices run: quantized with its parent's scales (so that the
delta stays small), afresh, or not at all; and what that file answers to golden inputs.

What speaks for a form is decided in `forms` and `model_delta.patch.fidelity`; here it is measured.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from fl_coordinator import forms
from fl_coordinator.forms import Asked, Form
from fl_coordinator.ledger import Ledger
from fl_coordinator.published import Published
from fl_coordinator.tables.records import ReleaseRecord
from model_delta.digest import digest_of
from model_delta.errors import Malformed
from model_delta.graphs.int8 import form_of, quantize_weights, weight_changes
from model_delta.manifest import GoldenCase, Manifest, Tensor, TensorSpec
from model_delta.patch import fidelity
from model_delta.patch.quantization import Measured, Worth
from model_delta.signature import SCORE, payment_width

_log = logging.getLogger("atoll.coordinator")

Array = npt.NDArray[np.generic]


class LoadedModel(Protocol):
    """A model that answers; see the programs that run one."""

    digest: str

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Named tensors to named tensors."""


OpenModel = Callable[[Manifest, bytes], LoadedModel]
GoldenInputs = Callable[[str, Sequence[TensorSpec]], Sequence[Mapping[str, Array]]]
"""(model, its inputs) -> inputs to try it with, one after the other: the first that it answers with finite numbers
become the golden case, which every device must reproduce."""
GOLDEN_BYTES_MAX = 2 << 20
"""Of one case, inputs and outputs: it travels in the manifest, of which a device takes 4 MB."""
TOLERANCE = 1e-4
"""How far a golden output may be off on a device: absolute, or relative to the largest number in it, whichever is more;
the kernels of another processor round in another order. The second is for half precision."""
TOLERANCE_HALF = 1e-2
Cases = Sequence[Mapping[str, Array]]
LatenciesUs = Callable[[Sequence[LoadedModel], Mapping[str, Array]], Sequence[float]]
"""(loaded models, inputs of one row) -> median microseconds of an answer on this machine, of each. They are measured
together, so that what else the machine does in the meantime slows all of them alike."""


class Forming:
    """Makes the files of new versions. Blocking."""

    def __init__(
        self,
        *,
        published: Published,
        ledger: Ledger,
        open_model: OpenModel,
        golden_inputs: GoldenInputs,
        latencies_us: LatenciesUs | None,
        worth: Mapping[str, Worth],
    ) -> None:
        """`published` has the parents; the other arguments are those of `Publisher`."""
        self._published = published
        self._ledger = ledger
        self._open_model = open_model
        self._golden_inputs = golden_inputs
        self._latencies_us = latencies_us
        self._worth = dict(worth)

    def formed(self, source: bytes, like: Manifest, base: ReleaseRecord | None, asked: Asked) -> tuple[bytes, Form]:
        """The file of `source` that devices are to run, in the form that was asked for or is worth it.

        int8 has the scales of `base` so that the patch from it is small; it is quantized afresh where that would answer
        worse to the golden inputs or lose the update (`patch.fidelity`). `like` is a manifest with the inputs."""
        fresh = quantize_weights(source)
        if fresh is source:
            int8 = form_of(source) is not None
            if asked == "int8" and not int8:
                raise Malformed(
                    f"model {like.model}: expected constant float32 matrices that can become int8, found none; "
                    "leave --quantize out to release it as it is"
                )
            return source, Form(int8=int8, reason="released as handed in: nothing in it can become int8")
        if asked == "none":
            return source, Form(int8=False, reason="asked for")
        file, form = fresh, Form(int8=True, reason="asked for" if asked == "int8" else "not measured")
        cases = self._tried(like, source)[0]
        if base is not None:
            file, form = self._alike(source, fresh, base, form, like, cases)
        if self._latencies_us is not None:
            measured = self._measured({"float32": source, "int8": file}, like, cases[:1])
            devices = Counter(record.device_class for record in self._ledger.devices() if record.kind == "device")
            better, reason, classes = forms.decide(measured["int8"], measured["float32"], self._worth, devices)
            form = msgspec.structs.replace(
                form,
                int8=better or asked == "int8",
                reason=f"asked for; {reason}" if asked == "int8" else reason,
                measured={name: forms.recorded(found) for name, found in measured.items()},
                classes=classes,
            )
        if base is not None and not asked:
            form = msgspec.structs.replace(form, int8=self.is_int8(base), reason=f"as its parent; {form.reason}")
        return (file if form.int8 else source), form

    def golden(self, draft: Manifest, file: bytes, *, scored: bool) -> tuple[tuple[GoldenCase, ...], str]:
        """What a file answers to the golden inputs of its model, and why there is no such case ("" when there is one).

        Raises Malformed for a file that cannot be opened. A model of payments has to answer, with finite numbers, and
        where devices decide by its `score` (`scored`) from 0 to 1: each device would refuse others. Of any other model
        nobody knows which inputs make sense, so one that answers none of those made up comes without a case."""
        cases = []
        tried, untried = self._tried(draft, file)
        for inputs in tried:
            outputs = self._open_model(draft, file).run(inputs)
            if scored and not all(0 <= score <= 1 for score in (outputs[SCORE].min(), outputs[SCORE].max())):
                raise Malformed(
                    f"model {draft.model}: expected scores from 0 to 1, found {outputs[SCORE].min():.4g} to "
                    f"{outputs[SCORE].max():.4g}; let the model end in one probability per row"
                )
            if sum(value.nbytes for value in (*inputs.values(), *outputs.values())) > GOLDEN_BYTES_MAX:
                return (), f"what it takes and gives is more than {GOLDEN_BYTES_MAX} bytes"
            cases.append(GoldenCase(_tensors(inputs), _tensors(outputs), _tolerance(outputs)))
        return tuple(cases), untried

    def _tried(self, like: Manifest, file: bytes) -> tuple[Cases, str]:
        """The first golden inputs that a file with the inputs of `like` answers with finite numbers, at most one batch;
        and what was wrong with the first when it answers none. Raises Malformed for a file that cannot be opened, and
        for a model of payments that answers none."""
        loaded, reason = self._opened(like, file), ""
        candidates = self._golden_inputs(like.model, like.inputs)
        for inputs in candidates:
            try:
                outputs = loaded.run(inputs)
            except Malformed as error:
                reason = reason or str(error)
                continue
            if all(np.isfinite(value).all() for value in outputs.values()):
                return [inputs], ""
            reason = reason or f"model {like.model}: answers a golden input with a number that is not finite"
        if reason and payment_width(like.inputs, like.outputs) is not None:
            raise Malformed(reason)
        return [], reason or "its inputs are too large to travel with it"

    def is_int8(self, record: ReleaseRecord) -> bool:
        """Whether a version has int8 weights; the file tells of versions that were published before forms were kept."""
        if record.form is not None:
            return record.form.int8
        return form_of(self._published.file(record.manifest)) is not None

    def require_form(self, known: ReleaseRecord, asked: Asked) -> None:
        """Raise Malformed where bytes that are a version already are wanted in another form: its digest is signed."""
        if asked in ("int8", "none") and self.is_int8(known) != (asked == "int8"):
            there = "int8" if self.is_int8(known) else "float32"
            raise Malformed(
                f"model {known.model}: these bytes are version {known.release} already, released as {there}; "
                "leave --quantize out, or publish on another parent"
            )

    def _alike(
        self, source: bytes, fresh: bytes, base: ReleaseRecord, form: Form, like: Manifest, cases: Cases
    ) -> tuple[bytes, Form]:
        """The int8 file with the scales of `base`, or the fresh one where that one fails; what was measured."""
        parent, before = self._published.file(base.manifest), self._published.source(base.manifest)
        file = quantize_weights(source, parent, before)
        share = fidelity.carried(weight_changes(source, file, fresh, before, parent))
        exact, ours, anew = (self._answers(like, one, cases) for one in (source, file, fresh))
        found = fidelity.Fidelity(_distance(ours, exact), _distance(anew, exact), share)
        refused = fidelity.refusals(found)
        form = msgspec.structs.replace(
            form,
            distance=_number(found.distance),
            distance_fresh=_number(found.distance_fresh),
            carried=share,
            fresh_because=refused,
        )
        if refused:
            _log.info("model %s: quantized afresh: %s", base.model, "; ".join(refused))
        return (fresh if refused else file), form

    def _measured(self, files: Mapping[str, bytes], like: Manifest, cases: Cases) -> dict[str, Measured]:
        """Bytes of each file, and microseconds of the first row of `cases`; NaN where a model does not answer it."""
        times: Sequence[float] = [float("nan")] * len(files)
        if self._latencies_us is not None and cases:
            free = {spec.name for spec in like.inputs if spec.shape[:1] == (-1,)}
            row = {name: value[:1] if name in free else value for name, value in cases[0].items()}
            try:
                times = self._latencies_us([self._opened(like, file) for file in files.values()], row)
            except Malformed as error:
                _log.info("model %s: its latency cannot be measured: %s", like.model, error)
        return {name: Measured(len(file), time) for (name, file), time in zip(files.items(), times, strict=True)}

    def _answers(self, like: Manifest, file: bytes, cases: Cases) -> list[Mapping[str, Array]]:
        """What a file with the inputs of `like` answers."""
        loaded = self._opened(like, file)
        return [loaded.run(inputs) for inputs in cases]

    def _opened(self, like: Manifest, file: bytes) -> LoadedModel:
        return self._open_model(msgspec.structs.replace(like, file_digest=digest_of(file), size=len(file)), file)


def _distance(found: Sequence[Mapping[str, Array]], expected: Sequence[Mapping[str, Array]]) -> float | None:
    """The largest 1 - cosine of any output that is numbers with a fraction; None where there is none."""
    pairs = [(ours[name], value) for ours, exact in zip(found, expected, strict=True) for name, value in exact.items()]
    distances = [fidelity.distance(ours, value) for ours, value in pairs if np.issubdtype(value.dtype, np.floating)]
    return max(distances, default=None)


def _tolerance(outputs: Mapping[str, Array]) -> float:
    """What a device's answer may differ by."""
    most = TOLERANCE
    for value in outputs.values():
        if value.dtype.kind == "f" and value.size:
            share = TOLERANCE_HALF if value.dtype.itemsize == 2 else TOLERANCE
            most = max(most, share * float(np.max(np.abs(value.astype(np.float64)))))
    return most


def _number(value: float | None) -> float | None:
    return value if value is not None and np.isfinite(value) else None


def _tensors(values: Mapping[str, Array]) -> dict[str, Tensor]:
    tensors = {}
    for name, value in values.items():
        array = np.asarray(value, order="C")  # ascontiguousarray would make a row of a scalar
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        tensors[name] = Tensor(array.dtype.name, tuple(array.shape), little.tobytes())
    return tensors
