"""What `atoll device run --inputs FILE` puts to a model: named tensors from a file of the user's own, or made up.

    {"pixels": [[[0.1, ...]]]}                                                   plain: names and nested lists
    {"inputs": [{"name", "shape", "datatype", "data"}]}                          Open Inference Protocol v2
    [{...}, {...}], or one such object a line                                    several, one inference each
    FILE.npz                                                                     one inference, arrays by name

A plain list has no dtype: it gets the one that the version's signature names, and only where nothing is lost by that.
Tensors that come with a dtype keep it. So a file is read twice: its form when the command begins, before anything is
made, and its tensors against each version that answers, since only a version says what it takes.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_runtime.inference import array_of
from model_delta.errors import Malformed
from model_delta.manifest import Manifest, TensorSpec
from model_delta.signature import made_up, require_tensors, shown_type
from regional_gateway.protocol import parse_infer

FILE_BYTES_MAX = 256 << 20
ARRAYS_BYTES_MAX = 1 << 30
_SHOWN = 4
_KINDS = {"f": ("iuf", "numbers"), "i": ("iu", "whole numbers"), "u": ("iu", "whole numbers"), "b": ("b", "booleans")}

Row = Mapping[str, Any]
"""Tensors by name: arrays where the file gave them a dtype, otherwise nested lists."""
Tensors = dict[str, NDArray[Any]]


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, at least one. Raises Malformed with one line that names the file, what was found, what was
    expected and what to do."""
    try:
        size = path.stat().st_size
        if size > FILE_BYTES_MAX:
            raise Malformed(f"{path}: expected at most {FILE_BYTES_MAX} bytes, found {size}; split the file")
        data = path.read_bytes()
    except OSError as error:
        raise Malformed(f"{path}: cannot be read ({error.strerror}); give the path of a JSON or .npz file") from None
    if data.startswith(b"PK"):
        return [_arrays(path)]
    return [_row(found, where) for where, found in _objects(data, str(path))]


def tensors_of(row: Row, inputs: Sequence[TensorSpec], what: str) -> Tensors:
    """A row as the tensors that `inputs` promise. Raises Malformed, naming the input, expected and found."""
    specs = {spec.name: spec for spec in inputs}
    tensors = {
        name: value if isinstance(value, np.ndarray) or name not in specs else _converted(value, specs[name], what)
        for name, value in row.items()
    }
    require_tensors({name: np.asarray(value) for name, value in tensors.items()}, inputs, what)
    return tensors


def made_up_like_golden(manifest: Manifest, rng: np.random.Generator) -> Tensors:
    """Tensors like those of the version's golden case, which it is known to answer: of the same sizes, with other
    fractions. Whole numbers stay: many are no quantities but indices, lengths or sizes, and not any will do.

    Raises Malformed for a version without one: what it answers is not known, and a failure would count against it."""
    if not manifest.golden:
        raise Malformed(
            f"model {manifest.model}: its inputs cannot be made up, since it came without a golden case to take their "
            "sizes from; pass --inputs FILE"
        )
    case = {name: np.array(array_of(tensor, name)) for name, tensor in manifest.golden[0].inputs.items()}
    fractions = [spec for spec in manifest.inputs if case[spec.name].dtype.kind == "f"]
    return {**case, **made_up([TensorSpec(spec.name, spec.dtype, case[spec.name].shape) for spec in fractions], rng)}


def shown_short(outputs: Mapping[str, NDArray[Any]]) -> str:
    """A line about outputs: a few numbers of each, and of what shape they are one part."""
    parts = []
    for name, value in outputs.items():
        first = " ".join(f"{item:.4g}" if value.dtype.kind == "f" else str(item) for item in value.ravel()[:_SHOWN])
        more = " ..." if value.size > _SHOWN else ""
        parts.append(f"{name} {value.dtype.name}{list(value.shape)}: {first}{more}")
    return "; ".join(parts)


def listed(outputs: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """Outputs as JSON can hold them: nested lists by name; None for what is no finite number."""
    plain: dict[str, Any] = {}
    for name, value in outputs.items():
        whole = np.array(value.tolist(), dtype=object).reshape(value.shape)
        if value.dtype.kind == "f":
            whole[~np.isfinite(value)] = None
        plain[name] = whole.tolist()
    return plain


def _arrays(path: Path) -> Row:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(item.file_size for item in archive.infolist())
        if size > ARRAYS_BYTES_MAX:
            raise Malformed(
                f"{path}: expected arrays of at most {ARRAYS_BYTES_MAX} bytes, found {size}; split the file"
            )
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except Malformed:
        raise
    except Exception as error:  # of what is damaged: zlib's, tokenize's, RuntimeError, MemoryError and more
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise Malformed(f"{path}: expected arrays of numbers as numpy.savez writes them, found: {reason}") from None
    if not found:
        raise Malformed(f"{path}: expected one array for each input, found none")
    return found


def _objects(data: bytes, path: str) -> list[tuple[str, Any]]:
    """(where, value) of each JSON value of a file: one, the items of a list, or one a line."""
    lines = [(number, line) for number, line in enumerate(data.splitlines(), 1) if line.strip()]
    try:
        whole = msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        if len(lines) < 2 or not isinstance(_decoded(lines[0][1]), dict):
            raise Malformed(f"{path}: expected JSON or .npz, found: {error}; {_HINT}") from None
        found = [(f"{path}, line {number}", _decoded(line)) for number, line in lines]
        bad = next((where for where, value in found if value is None), "")
        if bad:
            raise Malformed(f"{bad}: expected one JSON object a line, found something else; {_HINT}") from None
        return found
    if not isinstance(whole, list):
        return [(path, whole)]
    if not whole:
        raise Malformed(f"{path}: expected at least one object, found an empty list; {_HINT}")
    return [(f"{path}, item {index}", value) for index, value in enumerate(whole, 1)]


def _decoded(line: bytes) -> Any:
    try:
        return msgspec.json.decode(line)
    except (msgspec.DecodeError, RecursionError):
        return None


_HINT = 'for example {"pixels": [[0.5, 1.0]]}'


def _row(found: Any, where: str) -> Row:
    if not isinstance(found, dict) or not found:
        raise Malformed(f"{where}: expected an object of tensors by name, found {_kind(found)}; {_HINT}")
    listed = found.get("inputs")
    if isinstance(listed, list) and listed and all(isinstance(one, dict) and "name" in one for one in listed):
        try:
            return parse_infer(msgspec.json.encode(found)).inputs
        except Malformed as error:
            raise Malformed(f"{where}: {error}") from None
    return found


def _kind(found: Any) -> str:
    if isinstance(found, dict):
        return "an empty object"
    return "a list" if isinstance(found, list) else "a single value"


def _converted(value: Any, spec: TensorSpec, what: str) -> NDArray[Any]:
    """Nested lists in the dtype of the signature, where nothing is lost by that."""
    expected = f"{what}: input {spec.name!r}: expected {shown_type(spec)}"
    kinds, words = _KINDS[np.dtype(spec.dtype).kind]
    try:
        found = np.asarray(value)
    except (ValueError, OverflowError):
        raise Malformed(f"{expected}, found lists of uneven lengths") from None
    if found.size and found.dtype.kind not in kinds:
        raise Malformed(f"{expected}, found no {words}")
    with np.errstate(over="ignore", invalid="ignore"):
        array = found.astype(spec.dtype)
    kept = np.isfinite(array).all() if array.dtype.kind == "f" else np.array_equal(array, found)
    if not kept:
        raise Malformed(f"{expected}, found numbers that are out of its range")
    return array
