"""The float32 weights behind a quantized version, and how a round's mean update is added to them.

Devices run and train the int8 file; its rounding must not enter the next version. So a round adds the mean of the
*updates* to the bytes that were published, tensor by tensor in place: everything else in the file stays as it is, byte
for byte, and averaging cannot move a weight that nobody trained.

Without a training graph of its own a round needs the layout of our fraud model: `layer0.weight`, `layer0.bias`, ...
behind `input.mean` and `input.scale`. With one it trains the float32 tensors that the graph names, whatever the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from model_delta.errors import Malformed
from model_delta.graphs.mlp import mlp_training_graph
from model_delta.graphs.training import TrainingStep
from model_delta.manifest import Manifest, StoredTensor
from model_delta.segments import read_tensor, stored_tensors
from model_delta.task import Parameter

Float32 = npt.NDArray[np.float32]


def parameters_of(manifest: Manifest) -> tuple[Parameter, ...]:
    """The trainable tensors of a version, in the order of the flat vector, as its file stores them.

    Raises Malformed for a model of another layout."""
    tensors = {tensor.name: tensor for tensor in manifest.tensors}
    parameters = []
    for name in _names(tensors, f"version {manifest.release} of {manifest.model}"):
        scale = f"{name}_scale" if tensors[name].dtype == "int8" else ""
        if tensors[name].dtype not in ("int8", "float32") or (scale and scale not in tensors):
            raise Malformed(
                f"tensor {name!r} of {manifest.model}: expected float32, or int8 with {name}_scale, "
                f"found {tensors[name].dtype}; publish it with such weights"
            )
        parameters.append(Parameter(name, tensors[name].shape, scale))
    return tuple(parameters)


def parameters_trained(manifest: Manifest, step: TrainingStep) -> tuple[Parameter, ...]:
    """The tensors that a graph from elsewhere trains, as the version stores them. Raises Malformed unless it stores
    each of them, of that shape and as float32, and takes rows as wide as the graph does."""
    tensors = {tensor.name: tensor for tensor in manifest.tensors}
    what = f"training graph for version {manifest.release} of {manifest.model}"
    widths = {spec.shape[-1] for spec in manifest.inputs if spec.name == "features" and len(spec.shape) == 2}
    if not widths & {step.features, -1}:
        raise Malformed(f"{what}: expected rows of {sorted(widths)} features, found a graph for {step.features}")
    for trained in step.tensors:
        stored = tensors.get(trained.tensor)
        if stored is None or (stored.dtype, tuple(stored.shape)) != ("float32", trained.shape):
            found = "none" if stored is None else f"{stored.dtype}{list(stored.shape)}"
            raise Malformed(
                f"{what}: tensor {trained.tensor!r}: expected float32{list(trained.shape)} in the model's file, found "
                f"{found}; publish the model with the trainer's names, and --quantize none"
            )
    if len({trained.tensor for trained in step.tensors}) != len(step.tensors):
        raise Malformed(f"{what}: expected every tensor once, found one twice")
    return tuple(Parameter(trained.tensor, trained.shape) for trained in step.tensors)


def training_graph(source: bytes, positive_weight: float, momentum: float) -> bytes:
    """The ONNX graph of one training step for the model in `source`: the input's mean and scale, no weights. Without
    `momentum` it is the graph that devices of earlier releases can run too."""
    tensors = {tensor.name: tensor for tensor in stored_tensors(source)}
    weights = [name for name in _names(tensors, "published model") if name.endswith(".weight")]
    sizes = [tensors[weights[0]].shape[0], *(tensors[name].shape[1] for name in weights)]
    mean, scale = (read_tensor(source, tensors[name]).astype(np.float32) for name in ("input.mean", "input.scale"))
    return mlp_training_graph(sizes, mean, scale, positive_weight, momentum=momentum > 0)


def apply_mean(source: bytes, mean: Float32, trained: Sequence[str] = ()) -> bytes:
    """The published bytes with `mean`, float32[d], added to the `trained` tensors (by default those of our own layout),
    in that order. Raises Malformed when one is missing, d differs or a sum is not finite."""
    tensors = {tensor.name: tensor for tensor in stored_tensors(source)}
    names = list(trained) or _names(tensors, "published model")
    missing = [name for name in names if name not in tensors]
    if missing:
        raise Malformed(f"published model: expected a stored tensor {missing[0]!r}, found none")
    length = sum(_count(tensors[name]) for name in names)
    if mean.shape != (length,):
        raise Malformed(f"mean update: expected {length} parameters, found {mean.shape}")
    changed = bytearray(source)
    start = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype != "float32":
            raise Malformed(f"tensor {name!r}: expected float32 master weights, found {tensor.dtype}")
        count = _count(tensor)
        moved = read_tensor(source, tensor).reshape(-1) + mean[start : start + count]
        if not np.isfinite(moved).all():
            raise Malformed(f"tensor {name!r}: the mean update leaves a weight that is not finite")
        changed[tensor.offset : tensor.offset + tensor.size] = moved.astype("<f4").tobytes()
        start += count
    return bytes(changed)


def _names(tensors: dict[str, StoredTensor], what: str) -> list[str]:
    names: list[str] = []
    while f"layer{len(names) // 2}.weight" in tensors:
        names += [f"layer{len(names) // 2}.weight", f"layer{len(names) // 2}.bias"]
    missing = [name for name in (*names, "input.mean", "input.scale") if name not in tensors]
    if not names or missing:
        raise Malformed(
            f"{what}: a federated round needs tensors layer0.weight, layer0.bias, ..., input.mean, input.scale; found "
            f"{', '.join(sorted(tensors)[:6]) or 'none'}; name a training graph of its own in the round's file "
            "(`training: {graph: ...}`, made by `atoll model training-graph`), or publish a model of that layout"
        )
    return names


def _count(tensor: StoredTensor) -> int:
    return int(np.prod(tensor.shape, dtype=np.int64))
