"""`atoll model quantize`: the int8 version of a model file, gated on fidelity before it is written.

Without a parent it is a fresh quantization. With one it follows the parent, and is held against a fresh quantization of
the same float32: outputs on made-up inputs, and with the parent's float32 also the carried share. A version that fails
is not written.

Fixed activation scales (form `static`) come from calibration rows: a file of them, or made-up ones. They are judged on
other rows than they were chosen on, where the model takes any number of rows.
"""

from __future__ import annotations

import zipfile
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from atoll.output import show
from atoll.settings import ConfigurationError, write_private
from atoll.timing import medians_us
from edge_runtime.onnx_model import OnnxModel, run_graph
from model_delta.digest import digest_of
from model_delta.errors import Malformed
from model_delta.graphs.inspection import inspect, made_up_inputs
from model_delta.graphs.int8 import Quantized, form_of, quantize, weight_changes
from model_delta.graphs.roles import Form
from model_delta.patch import fidelity, quantization
from model_delta.patch.fidelity import Fidelity

FILE_BYTES_MAX = 512 * 2**20
FORMS = ("weights", "dynamic", "static")

Inputs = dict[str, npt.NDArray[Any]]


def quantize_file(
    float32: Path,
    out: Path,
    parent: Path | None,
    parent_float32: Path | None,
    *,
    form: str,
    per_tensor: bool,
    calibration: Path | None,
    seed: int,
    as_json: bool,
) -> None:
    """Quantize, compare, write, and print sizes, scales, integers that moved, fidelity, and whether int8 is worth it
    on this machine. Raises ConfigurationError, Malformed (one line, nothing written) and StorageFull."""
    if form and form not in FORMS:
        raise ConfigurationError(f"--form: expected {', '.join(FORMS[:-1])} or {FORMS[-1]}, found {form!r}")
    if parent_float32 is not None and parent is None:
        raise ConfigurationError("--parent-fp32: expected --parent with it, the int8 version made from that file")
    source = _read(float32)
    before = _read(parent) if parent is not None else None
    before_source = _read(parent_float32) if parent_float32 is not None else None
    chosen, per_channel = form or FORMS[0], not per_tensor
    if before is not None:
        found = form_of(before)
        if found is None:
            raise ConfigurationError(f"--parent {parent}: expected a file that `atoll model quantize` made")
        if (form and form != found[0]) or (per_tensor and found[1]):
            raise ConfigurationError(
                f"--parent {parent}: expected one of the same form, found {found[0]} with one scale a "
                f"{'channel' if found[1] else 'tensor'}; leave --form and --per-tensor out"
            )
        chosen, per_channel = found
    kind = cast(Form, chosen)
    if calibration is not None and kind != "static":
        raise ConfigurationError(f"--calibration: expected --form static with it, found {kind}")
    given = _rows(calibration, source) if calibration is not None else None
    inputs, seen = _judged_and_seen(source, given, seed)

    def observe(graph: bytes) -> dict[str, npt.NDArray[Any]]:
        return run_graph(graph, seen)

    made = quantize(source, before, before_source, form=kind, per_channel=per_channel, calibration=observe)
    if not made.tensors:
        raise Malformed(
            f"{float32}: expected a float32 model with constant matrices, found none that could be int8; "
            "one that is quantized already, has control flow, or an operator set below 13 is released as it is"
        )
    if before is not None and made.moved is None:
        raise ConfigurationError(
            f"--parent {parent}: expected a version of the same model, found no tensor of its names"
        )
    fresh = (
        quantize(source, form=kind, per_channel=per_channel, calibration=observe).file if before is not None else None
    )
    measured = _fidelity(source, made.file, fresh, before, before_source, inputs)
    reasons = fidelity.refusals(measured)
    if reasons:
        raise Malformed(f"{out}: not written; {'; '.join(reasons)}")
    int8, plain = _measured((made.file, source), inputs)
    choice = quantization.choose(int8, plain)
    write_private(out, made.file)
    out.chmod(0o644)
    _tell(out, source, made, measured, choice, as_json)


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > FILE_BYTES_MAX:
            raise ConfigurationError(f"{path}: expected at most {FILE_BYTES_MAX} bytes, found {size}")
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot read: {error.strerror}") from None


def _rows(path: Path, source: bytes) -> Inputs:
    """The arrays of an .npz file, one for each input of the model. Raises ConfigurationError."""
    wanted = {spec.name: spec for spec in inspect(source, "model").inputs}
    if path.exists() and path.stat().st_size > FILE_BYTES_MAX:
        raise ConfigurationError(f"{path}: expected at most {FILE_BYTES_MAX} bytes, found {path.stat().st_size}")
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:  # a lone .npy array has no names
        raise ConfigurationError(f"--calibration {path}: expected an .npz file of rows: {error}") from None
    if found.keys() != wanted.keys():
        raise ConfigurationError(
            f"--calibration {path}: expected an array for each of {', '.join(sorted(wanted))}, "
            f"found {', '.join(sorted(found)) or 'none'}"
        )
    for name, value in found.items():
        if value.dtype.kind not in "biuf" or not value.size or not np.isfinite(value).all():
            raise ConfigurationError(f"--calibration {path}: {name}: expected finite numbers, found {value.dtype}")
    return {name: value.astype(wanted[name].dtype) for name, value in found.items()}


def _judged_and_seen(source: bytes, given: Inputs | None, seed: int) -> tuple[Inputs, Inputs]:
    """The rows on which answers are compared, and those from which activation scales come."""
    if given is None:
        judged, seen = (made_up_inputs(source, np.random.default_rng(one)) for one in (seed, seed + 1))
        return judged, seen
    free = all(spec.shape[:1] == (-1,) for spec in inspect(source, "model").inputs)
    if not free or any(len(value) < 2 for value in given.values()):
        return given, given
    return {name: value[1::2] for name, value in given.items()}, {name: value[::2] for name, value in given.items()}


def _fidelity(
    source: bytes,
    file: bytes,
    fresh: bytes | None,
    parent: bytes | None,
    parent_source: bytes | None,
    inputs: Inputs,
) -> Fidelity:
    share = None
    if fresh is not None and parent is not None and parent_source is not None:
        share = fidelity.carried(weight_changes(source, file, fresh, parent_source, parent))
    try:
        expected = run_graph(source, inputs)
    except Malformed:  # not everything runs on made-up inputs
        return Fidelity(carried=share)
    distances = [_distance(run_graph(one, inputs), expected) if one is not None else None for one in (file, fresh)]
    return Fidelity(distances[0], distances[1], share)


def _distance(found: dict[str, npt.NDArray[np.generic]], expected: dict[str, npt.NDArray[np.generic]]) -> float | None:
    outputs = [name for name, value in expected.items() if np.issubdtype(value.dtype, np.floating)]
    return max((fidelity.distance(found[name], expected[name]) for name in outputs), default=None)


def _measured(files: tuple[bytes, bytes], inputs: Inputs) -> list[quantization.Measured]:
    """What each file costs here; NaN when one of the models does not run on a single row."""
    row = {name: value[:1] for name, value in inputs.items()}
    models = [OnnxModel(digest_of(file), file, "model", repeated=True) for file in files]
    try:
        times = medians_us([partial(model.run, row) for model in models])
    except Malformed:
        times = [float("nan")] * len(files)
    return [quantization.Measured(len(file), time) for file, time in zip(files, times, strict=True)]


def _tell(
    out: Path, source: bytes, made: Quantized, measured: Fidelity, choice: quantization.Choice, as_json: bool
) -> None:
    share = measured.carried if measured.carried is not None and measured.carried.moved else None
    value = {
        "file": str(out),
        "bytes": len(made.file),
        "float32_bytes": len(source),
        "tensors": made.tensors,
        "weights": made.weights,
        "scales": made.scales,
        "scales_not_the_parents": made.rescaled,
        "integers_moved": made.moved,
        "distance": measured.distance,
        "distance_fresh": measured.distance_fresh,
        "carried": share.share if share else None,
        "carried_fresh": share.fresh if share else None,
        "int8_here": choice.int8,
        "int8_here_because": choice.reason,
    }
    lines = [f"{out}: {len(made.file)} bytes, float32 {len(source)}; {made.weights} weights of {made.tensors} tensors"]
    if made.moved is not None:
        lines.append(f"{made.moved:.4%} of the integers moved; {made.rescaled} of {made.scales} scales are new")
    if measured.distance is not None:
        beside = "" if measured.distance_fresh is None else f" (a fresh quantization: {measured.distance_fresh:.5f})"
        lines.append(f"outputs: 1 - cosine to float32 {measured.distance:.5f}{beside}")
    if share is not None:
        lines.append(f"carried share of the update: {share.share:.3f} (a fresh quantization: {share.fresh:.3f})")
    lines.append(f"on this machine {choice.reason}")
    show(value, "\n".join(lines), as_json=as_json)
