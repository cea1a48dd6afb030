"""The ONNX runtime of the device; the only importer of onnxruntime here.

The import is lazy (it costs 0.1 s) and its telemetry is switched off before it. Sessions are lean: sequential, one
thread, no arena, no memory pattern; at this size more threads only cost. Devices of one process that run the same
version share one session: it is thread-safe, costs nothing per device and keeps its caches warm.
"""

from __future__ import annotations

import mmap
import os
import re
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edge_runtime.inference import Arrays, InputsDisagree
from model_delta.digest import digest_of
from model_delta.errors import Malformed
from model_delta.manifest import Manifest, manifest_digest
from model_delta.segments import operators

_lock = threading.Lock()
_models: weakref.WeakValueDictionary[str, OnnxModel] = weakref.WeakValueDictionary()
_graphs: dict[str, OnnxModel] = {}
_GRAPHS_MAX = 4
_KIND = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")
_PLACE = re.compile(r"\s*[^\s:]*/[^\s:]+\.(cc|cpp|h|hpp):\d+ ")


class OnnxModel:
    """One session. `digest` is the manifest's (or, for a bare graph, the file's)."""

    def __init__(self, digest: str, file: bytes | Path, what: str, *, repeated: bool = False) -> None:
        """`repeated`: inputs will have few different shapes, for each of which the runtime may remember how much memory
        a run takes (a fifth more training steps a second)."""
        self.digest = digest
        self._session = _open_session(file, what, repeated)
        self._inputs = {item.name: item for item in self._session.get_inputs()}
        self._outputs = [item.name for item in self._session.get_outputs()]
        self._shared_axes = _shared_axes(self._session.get_inputs())

    def run(self, inputs: Arrays) -> dict[str, NDArray[np.generic]]:
        """Run named tensors. Raises InputsDisagree when axes that the graph calls by one name differ in size, Malformed
        when they do not fit the model otherwise."""
        for axis, places in self._shared_axes.items():
            sizes = [(name, inputs[name].shape[index]) for name, index in places if name in inputs]
            if len({size for _, size in sizes}) > 1:
                found = ", ".join(f"{name!r} {size}" for name, size in sizes)
                raise InputsDisagree(
                    f"model {self.digest[:12]}: expected one size of axis {axis[:64]!r} in all inputs, found {found}"
                )
        try:
            results = self._session.run(self._outputs, dict(inputs))
        except Exception as error:  # onnxruntime raises several unrelated kinds, and plain ValueError
            raise Malformed(f"model {self.digest[:12]}: {_without_values(_first_line(error))}") from None
        return dict(zip(self._outputs, results, strict=True))


def open_model(manifest: Manifest, file: bytes | Path) -> OnnxModel:
    """The version as a loaded model; the one that is already open in this process, if it is. `file`, in memory or by
    its path (which saves a copy of it), has been checked against the manifest. Raises Malformed when onnxruntime
    refuses it or its inputs are not the manifest's."""
    digest = manifest_digest(manifest)
    with _lock:
        found = _models.get(digest)
        if found is None:
            found = OnnxModel(digest, file, f"model {manifest.model} {digest[:12]}")
            expected = {spec.name for spec in manifest.inputs}
            if set(found._inputs) != expected:
                raise Malformed(
                    f"model {manifest.model} {digest[:12]}: expected inputs {sorted(expected)}, "
                    f"found {sorted(found._inputs)}"
                )
            _models[digest] = found
        return found


def run_graph(graph: bytes, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.generic]]:
    """Run a bare graph (a training step). The last few graphs stay open. Raises Malformed."""
    digest = digest_of(graph)
    with _lock:
        found = _graphs.get(digest)
        if found is None:
            found = OnnxModel(digest, graph, f"graph {digest[:12]}", repeated=True)
            while len(_graphs) >= _GRAPHS_MAX:
                _graphs.pop(next(iter(_graphs)))
            _graphs[digest] = found
    return found.run(inputs)


def _open_session(file: bytes | Path, what: str, repeated: bool) -> Any:
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = repeated
    options.log_severity_level = 4  # what fails is raised; the runtime's own line would name values of inputs
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    kinds = operators(file) if isinstance(file, bytes) else _operators_at(file)
    if "DequantizeLinear" in kinds and "QuantizeLinear" not in kinds:
        # Only weights are int8: restore them once, at load. By default the runtime restores them on every run, and
        # rounds the activations of some layers to int8, which moves scores by up to 4e-3.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        return onnxruntime.InferenceSession(
            file if isinstance(file, bytes) else str(file), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        raise Malformed(f"{what}: onnxruntime cannot open it: {_first_line(error)}") from None


def _shared_axes(inputs: Sequence[Any]) -> dict[str, list[tuple[str, int]]]:
    """By name, the axes that are there several times: in which inputs, and where there. The graph names free axes; the
    manifest does not."""
    found: dict[str, list[tuple[str, int]]] = {}
    for item in inputs:
        for index, size in enumerate(item.shape):
            if isinstance(size, str):
                found.setdefault(size, []).append((item.name, index))
    return {axis: places for axis, places in found.items() if len(places) > 1}


def _operators_at(path: Path) -> frozenset[str]:
    """The operators of a model file, of which only the parts that name them are read."""
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return frozenset()  # an empty file cannot be mapped
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            return operators(cast(bytes, view))


def _without_values(message: str) -> str:
    """A kernel's own words without the numbers in them: one may be an input's (an index that is out of bounds)."""
    node, status, words = message.partition(" Status Message:")
    return node + status + re.sub(r"-?\d+(\.\d+)?(e[+-]?\d+)?", "#", words)


def _first_line(error: Exception) -> str:
    """The runtime's own words in one short line, without the place in its source that stands before them."""
    line = _KIND.sub("", (str(error).strip().splitlines() or [type(error).__name__])[0])
    place = _PLACE.search(line)
    if place is not None:
        said = _after_signature(line[place.end() :])
        line = f"{line[: place.start()]} {said}".lstrip() if said else line
    return line[:200]


def _after_signature(text: str) -> str:
    """What follows a C++ function's signature; "" if nothing does."""
    depth = 0
    for index, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if letter == ")" and depth == 0:
            return re.sub(r"^(const )?(\[with [^\]]*\] )?", "", text[index + 1 :].lstrip())
    return ""
