"""int8 versions of a model, alike their parents, and how far each weight moved since.

A quantized version exists to be small on the radio, so its scales and integers follow its parent's wherever the weights
allow: the rules are in `patch.quantization`, which matrices take part in `graphs.roles`, the rewritten nodes in
`graphs.products`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from model_delta.errors import Malformed
from model_delta.graphs.products import quantized_nodes
from model_delta.graphs.reading import checked
from model_delta.graphs.roles import Form, Role, roles_of, static_weight
from model_delta.graphs.writing import canonical
from model_delta.patch import fidelity, quantization
from model_delta.segments import DTYPES, operators, read_tensor, stored_tensors

if TYPE_CHECKING:
    import onnx

Floats = npt.NDArray[np.float32]
Observe = Callable[[bytes], Mapping[str, npt.NDArray[Any]]]
"""Runs a graph file on the calibration rows and gives its outputs by name; onnxruntime is imported elsewhere."""


class Quantized(msgspec.Struct, frozen=True):
    """A quantized file and how it relates to its parent: how many tensors and weights became int8, how many scales
    there are, how many of those the parent had otherwise, and the share of integers that moved (None without a parent
    that fits)."""

    file: bytes
    tensors: int
    weights: int
    scales: int
    rescaled: int
    moved: float | None


def quantize_weights(data: bytes, parent: bytes | None = None, parent_source: bytes | None = None) -> bytes:
    """The file of `quantize` in the form `weights`."""
    return quantize(data, parent, parent_source).file


def quantize(
    data: bytes,
    parent: bytes | None = None,
    parent_source: bytes | None = None,
    *,
    form: Form = "weights",
    per_channel: bool = True,
    calibration: Observe | None = None,
) -> Quantized:
    """int8 for the constant float32 matrices of a model; biases and everything else stay float32.

    Form `weights`: each matrix that a MatMul or Gemm multiplies by becomes an int8 initializer of the same name, a
    float32 `NAME_scale` per output channel and a DequantizeLinear. Open such a model (`segments.operators` tells) with
    onnxruntime's `session.disable_quant_qdq` set to 1: the weights are then restored once, at load, and it answers as
    fast as its float32 twin. Without it onnxruntime 1.31 restores them on every run (five times slower for the fraud
    model) and rounds the activations of some layers to int8, which moved scores by up to 4e-3.

    Form `dynamic`: products are of integers. Activations are rounded to uint8 as they come (DynamicQuantizeLinear, one
    scale a tensor and run, so there is no activation scale to ship), multiplied by MatMulInteger and scaled back;
    tables that Gather reads become int8 too, and the rows read are dequantized. A Gemm that transposes or scales is
    treated as in form `weights`. With `per_channel` false there is one scale a tensor, as onnxruntime's own dynamic
    quantization has it.

    Form `static`: as `dynamic`, but the scale and zero point of each activation that enters a product are fixed: a
    QuantizeLinear to uint8 and a DequantizeLinear around it, and a DequantizeLinear after the weights, which the
    runtime fuses with the product (QDQ). The bias stays float32: a plain Gemm becomes a MatMul and a Sum, and an Add to
    a product a Sum, because onnxruntime makes a Gemm of MatMul and Add again, which it does not fuse then.
    `calibration` runs a copy of the model that tells the range of those activations on rows of the caller's; raises
    Malformed without it, and for a range that is not finite. Activation scales are never the parent's: a locked one
    clips what the new weights make larger, and the answers are gone. Open such a model with quantization left on.

    Scales and integers of weights follow `parent`, a file of the same form, where it has the same matrix, and float32
    tensors move from the parent's on a grid; `parent_source` is the float32 that the parent was made from, by which
    weights that did not move at all are told (the rules are in `patch.quantization`). Deterministic: the same input
    gives the same bytes. A model that is quantized already, is too old for DequantizeLinear per channel, has control
    flow, or has no such matrix is returned unchanged. Raises Malformed for what is no ONNX model.
    """
    from onnx import TensorProto, numpy_helper

    model = checked(data, "model to quantize")
    graph = model.graph
    roles = roles_of(model, form, per_channel)
    if not roles:
        return Quantized(data, 0, 0, 0, 0, None)
    activations = _activations(model, roles, calibration) if form == "static" else {}
    before = _Tensors(parent)
    source = _Tensors(parent_source)
    replaced: list[onnx.TensorProto] = []
    weights = scale_count = rescaled = moved = comparable = 0
    for tensor in graph.initializer:
        if tensor.data_type not in DTYPES:  # text, bfloat16: they stay as they are
            replaced.append(tensor)
            continue
        value = numpy_helper.to_array(tensor)
        role = roles.get(tensor.name)
        if role is None:
            known = before.find(tensor.name, "float32", value.shape) if value.dtype == np.float32 else None
            if known is not None:
                value = quantization.on_grid(value, known, source.find(tensor.name, "float32", value.shape))
            replaced.append(numpy_helper.from_array(value, tensor.name))
            continue
        shape = () if role.axis is None else (value.shape[role.axis],)
        old_levels = before.find(tensor.name, "int8", value.shape)
        old_scales = before.find(f"{tensor.name}_scale", "float32", shape)
        if old_levels is not None and old_scales is not None:
            old_source = source.find(tensor.name, "float32", value.shape)
            known_parent = quantization.Parent(old_levels, old_scales, old_source)
            levels, scales = quantization.requantize(value, role.axis, known_parent)
            rescaled += int((scales != old_scales).sum())
            moved += int((levels != old_levels).sum())
            comparable += levels.size
        else:
            scales = quantization.fresh_scales(value, role.axis)
            levels = quantization.quantize(value, scales, role.axis)
        weights, scale_count = weights + levels.size, scale_count + scales.size
        replaced.append(numpy_helper.from_array(levels, tensor.name))
        replaced.append(numpy_helper.from_array(scales, f"{tensor.name}_scale"))
    for name, (scale, zero) in activations.items():
        replaced.append(numpy_helper.from_array(np.asarray(scale, np.float32), f"{name}_activation_scale"))
        replaced.append(numpy_helper.from_array(np.asarray(zero, np.uint8), f"{name}_activation_zero"))
    nodes = quantized_nodes(list(graph.node), roles)
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    # Changed floats are noise and changed integers a few ones among zeros: kept apart, each compresses better.
    graph.initializer.extend(sorted(replaced, key=lambda tensor: tensor.data_type == TensorProto.INT8))
    del graph.value_info[:]
    share = moved / comparable if comparable else None
    return Quantized(canonical(model), len(roles), weights, scale_count, rescaled, share)


def form_of(file: bytes) -> tuple[Form, bool] | None:
    """The form and `per_channel` of a file that `quantize` made; None of another."""
    kinds = operators(file)
    if "DequantizeLinear" not in kinds and "MatMulInteger" not in kinds:
        return None
    scales = [t for t in stored_tensors(file) if t.name.endswith("_scale") and t.dtype == "float32"]
    form: Form = "dynamic" if "MatMulInteger" in kinds else "static" if "QuantizeLinear" in kinds else "weights"
    return form, any(scale.shape for scale in scales)


def weight_changes(
    source: bytes, file: bytes, fresh: bytes, parent_source: bytes, parent: bytes
) -> Iterator[fidelity.Change]:
    """How each int8 tensor of `file` moved since `parent`, beside the float32 both were made from and a fresh
    requantization; tensors that the five files do not share are left out. What `fidelity.carried` looks at.

    Raises Malformed when `source` is no ONNX model.
    """
    form, per_channel = form_of(file) or ("weights", True)
    new, old, now, anew, then = (_Tensors(part) for part in (source, parent_source, file, fresh, parent))
    for name, role in roles_of(checked(source, "float32 model"), form, per_channel).items():
        weight = new.find(name, "float32")
        if weight is None:
            continue
        before = old.find(name, "float32", weight.shape)
        levels = [part.dequantized(name, weight.shape, role.axis) for part in (now, anew, then)]
        if before is None or levels[0] is None or levels[1] is None or levels[2] is None:
            continue
        yield fidelity.Change(name, weight - before, levels[0] - levels[2], levels[1] - levels[2])


class _Tensors:
    """The stored tensors of a file, found by name; none without a file."""

    def __init__(self, file: bytes | None) -> None:
        self._file = file if file is not None else b""
        self._stored = {tensor.name: tensor for tensor in stored_tensors(self._file)}

    def find(self, name: str, dtype: str, shape: tuple[int, ...] | None = None) -> npt.NDArray[Any] | None:
        """The tensor, when it is of that type and shape."""
        stored = self._stored.get(name)
        if stored is None or stored.dtype != dtype or (shape is not None and stored.shape != shape):
            return None
        return read_tensor(self._file, stored)

    def dequantized(self, name: str, shape: tuple[int, ...], axis: int | None) -> Floats | None:
        """The weights that NAME and NAME_scale stand for."""
        levels = self.find(name, "int8", shape)
        scales = self.find(f"{name}_scale", "float32", () if axis is None else (shape[axis],))
        return None if levels is None or scales is None else quantization.dequantize(levels, scales, axis)


def _activations(
    model: onnx.ModelProto, roles: dict[str, Role], calibration: Observe | None
) -> dict[str, tuple[np.float32, np.uint8]]:
    """Scale and zero point of each activation that a static product takes, from its range on the calibration rows."""
    from onnx import TensorProto, helper

    if calibration is None:
        raise Malformed("model to quantize: expected calibration rows for fixed activation scales, found none")
    names = list(dict.fromkeys(node.input[0] for node in model.graph.node if static_weight(node, roles)))
    watched = type(model)()
    watched.CopyFrom(model)
    del watched.graph.output[:]
    for name in names:
        for operator in ("ReduceMin", "ReduceMax"):
            seen = f"{name}_{operator}"
            watched.graph.node.append(helper.make_node(operator, [name], [seen], keepdims=0))
            watched.graph.output.append(helper.make_tensor_value_info(seen, TensorProto.FLOAT, []))
    found = calibration(canonical(watched))
    try:
        return {
            name: quantization.activation_scale(
                float(np.min(found[f"{name}_ReduceMin"])), float(np.max(found[f"{name}_ReduceMax"]))
            )
            for name in names
        }
    except KeyError as missing:
        raise Malformed(f"model to quantize: calibration: expected the output {missing}, found none") from None
