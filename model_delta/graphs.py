"""ONNX graphs: look into one, quantize one, write the ones we ship. The only importer of onnx.

onnx is imported inside the functions, because a device that opens releases never needs it. Every graph written here has
a canonical form (fixed producer, raw little-endian tensor data, deterministic protobuf), so that the same weights give
the same bytes and two versions of a model have the same layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from model_delta.errors import Malformed
from model_delta.manifest import TensorSpec
from model_delta.patch import fidelity, quantization
from model_delta.segments import DTYPES, operators, read_tensor, stored_tensors

if TYPE_CHECKING:
    import onnx

FEATURES = "features"
SCORE = "score"
OPSET = 17
IR_VERSION = 9
PRODUCER = "atoll"
DEQUANTIZE_OPSET_MIN = 13  # DequantizeLinear with one scale per channel
_SLOW_WIDTH = 512
_FREE_AXIS = 16
_EXPORT_HINT = "export it with torch.onnx.export, skl2onnx or tf2onnx"

Floats = npt.NDArray[np.float32]
Form = Literal["weights", "dynamic", "static"]
Observe = Callable[[bytes], Mapping[str, npt.NDArray[Any]]]
"""Runs a graph file on the calibration rows and gives its outputs by name; onnxruntime is imported elsewhere."""


class GraphInfo(msgspec.Struct, frozen=True):
    """What a model takes and gives, its default operator set, and how many numbers its weights are."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    opset: int
    parameters: int


def inspect(data: bytes, what: str) -> GraphInfo:
    """Check that `data` is a valid ONNX model (onnx.checker) that stands on its own, and describe it.

    `what` names the file in messages. Raises Malformed, one line that says what was found and what to do.
    """
    model = _checked(data, what)
    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer}
    return GraphInfo(
        tuple(_spec(value, what) for value in graph.input if value.name not in weights),
        tuple(_spec(value, what) for value in graph.output),
        _opset(model),
        sum(int(np.prod(list(tensor.dims), dtype=np.int64)) for tensor in graph.initializer),
    )


def require_features(info: GraphInfo, feature_count: int, what: str) -> None:
    """Raise Malformed unless the model is one that a terminal can feed: the one input `features` float32[batch,
    feature_count] and an output `score` float32[batch, 1]; a free dimension fits."""
    expected_input = f"input 'features' float32[batch, {feature_count}]"
    expected_output = "output 'score' float32[batch, 1]"
    if not _is_matrix(info.inputs, FEATURES, feature_count) or len(info.inputs) != 1:
        raise Malformed(
            f"{what}: expected the one {expected_input}, found {_show(info.inputs)}; "
            f"train it on the {feature_count} features that a terminal computes, and name the input 'features'"
        )
    if not _is_matrix(info.outputs, SCORE, 1):
        raise Malformed(
            f"{what}: expected an {expected_output}, found {_show(info.outputs)}; "
            "let the model end in one probability per row, named 'score'"
        )


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

    model = _checked(data, "model to quantize")
    graph = model.graph
    roles = _roles(model, form, per_channel)
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
    nodes = _quantized_nodes(list(graph.node), roles)
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    # Changed floats are noise and changed integers a few ones among zeros: kept apart, each compresses better.
    graph.initializer.extend(sorted(replaced, key=lambda tensor: tensor.data_type == TensorProto.INT8))
    del graph.value_info[:]
    share = moved / comparable if comparable else None
    return Quantized(_canonical(model), len(roles), weights, scale_count, rescaled, share)


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
    for name, role in _roles(_checked(source, "float32 model"), form, per_channel).items():
        weight = new.find(name, "float32")
        if weight is None:
            continue
        before = old.find(name, "float32", weight.shape)
        levels = [part.dequantized(name, weight.shape, role.axis) for part in (now, anew, then)]
        if before is None or levels[0] is None or levels[1] is None or levels[2] is None:
            continue
        yield fidelity.Change(name, weight - before, levels[0] - levels[2], levels[1] - levels[2])


def made_up_inputs(data: bytes, rng: np.random.Generator, rows: int = 16) -> dict[str, npt.NDArray[Any]]:
    """Inputs by name that the model runs on: standard normal numbers; row numbers below the table's size for integers
    that a Gather looks up directly; ones for every other integer (a mask). Raises Malformed for what is no model.

    The first axis has `rows`; another free axis has 16, and axes of one name have one size."""
    model = _checked(data, "model")
    tables = {tensor.name: tensor.dims[0] for tensor in model.graph.initializer if len(tensor.dims) == 2}
    looked_up = {node.input[1]: tables.get(node.input[0], 1) for node in model.graph.node if node.op_type == "Gather"}
    sizes: dict[str, int] = {}
    made: dict[str, npt.NDArray[Any]] = {}
    for value in model.graph.input:
        spec = _spec(value, "model")
        if any(tensor.name == spec.name for tensor in model.graph.initializer):
            continue
        shape = []
        for axis, size in enumerate(value.type.tensor_type.shape.dim):
            free = rows if axis == 0 else _FREE_AXIS
            shape.append(size.dim_value or sizes.setdefault(size.dim_param or f"{spec.name}.{axis}", free))
        if np.issubdtype(np.dtype(spec.dtype), np.floating):
            made[spec.name] = rng.normal(size=shape).astype(spec.dtype)
        elif spec.name in looked_up:
            made[spec.name] = rng.integers(0, looked_up[spec.name], shape).astype(spec.dtype)
        else:
            made[spec.name] = np.ones(shape, spec.dtype)
    return made


def mlp_model(weights: Sequence[tuple[Floats, Floats]], mean: Floats, scale: Floats) -> bytes:
    """A fraud model: `features` float32[batch, F] -> (x - mean) / scale -> Gemm, Relu, ..., Gemm, Sigmoid -> `score`
    float32[batch, 1].

    `weights` are (W float32[in, out], b float32[out]) per layer, stored as `layer0.weight`, `layer0.bias`, ...
    Opset 17, IR version 9. Raises Malformed for shapes that do not chain or numbers that are not finite.
    """
    from onnx import TensorProto, helper

    sizes = [len(mean), *(weight.shape[1] for weight, _ in weights)]
    _require_sizes(sizes, mean, scale)
    for index, (weight, bias) in enumerate(weights):
        if weight.shape != (sizes[index], sizes[index + 1]) or bias.shape != (sizes[index + 1],):
            raise Malformed(
                f"layer {index}: expected weight {(sizes[index], sizes[index + 1])} and bias {(sizes[index + 1],)}, "
                f"found {weight.shape} and {bias.shape}"
            )
        if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            raise Malformed(f"layer {index}: expected finite weights")
    if sizes[-1] != 1:
        raise Malformed(f"model: expected 1 output, found {sizes[-1]}")
    tensors = _normalisation(mean, scale)
    nodes = [
        helper.make_node("Sub", [FEATURES, "input.mean"], ["centred"]),
        helper.make_node("Div", ["centred", "input.scale"], ["layer0.input"]),
    ]
    for index, (weight, bias) in enumerate(weights):
        tensors[f"layer{index}.weight"] = weight.astype(np.float32)
        tensors[f"layer{index}.bias"] = bias.astype(np.float32)
        names = [f"layer{index}.input", f"layer{index}.weight", f"layer{index}.bias"]
        nodes.append(helper.make_node("Gemm", names, [f"layer{index}.output"]))
        last = index == len(weights) - 1
        activation, result = ("Sigmoid", SCORE) if last else ("Relu", f"layer{index + 1}.input")
        nodes.append(helper.make_node(activation, [f"layer{index}.output"], [result]))
    graph = helper.make_graph(
        nodes,
        "fraud",
        [helper.make_tensor_value_info(FEATURES, TensorProto.FLOAT, ["batch", len(mean)])],
        [helper.make_tensor_value_info(SCORE, TensorProto.FLOAT, ["batch", 1])],
        _initializers(tensors),
    )
    return _canonical(_model(graph))


def mlp_training_graph(sizes: Sequence[int], mean: Floats, scale: Floats, positive_weight: float) -> bytes:
    """One step of stochastic gradient descent on an `mlp_model` of layer `sizes` (F, ..., 1), as a graph.

    Inputs `parameters` float32[d], `features` float32[n, F], `labels` float32[n], `learning_rate` float32[]; outputs
    `updated` float32[d], `loss` float32[]. The flat vector is layer0.weight (row-major [in, out]), layer0.bias,
    layer1.weight, ... The loss is the batch mean of  -positive_weight y log p - (1 - y) log(1 - p),  computed from the
    logit; it is the loss before the step. The backward pass is written out by hand. Raises Malformed.
    """
    from onnx import TensorProto, helper

    _require_sizes(sizes, mean, scale)
    if sizes[-1] != 1 or not positive_weight > 0:
        raise Malformed(
            f"training graph: expected 1 output and a positive weight above 0, found {sizes[-1]} and one not"
        )
    layers = len(sizes) - 1
    shapes = [shape for i in range(layers) for shape in ((sizes[i], sizes[i + 1]), (sizes[i + 1],))]
    lengths = [int(np.prod(shape)) for shape in shapes]
    tensors: dict[str, npt.NDArray[Any]] = {
        **_normalisation(mean, scale),
        "lengths": np.array(lengths, np.int64),
        "positive_weight": np.array(positive_weight, np.float32),
        "zero": np.array(0, np.float32),
        "one": np.array(1, np.float32),
        "first_axis": np.array([0], np.int64),
        "column": np.array([-1, 1], np.int64),
        "flat": np.array([-1], np.int64),
    }
    nodes = []

    def add(operator: str, inputs: Sequence[str], *outputs: str, **attributes: object) -> str:
        nodes.append(helper.make_node(operator, list(inputs), list(outputs), **attributes))
        return outputs[0]

    # The flat vector as matrices.
    flat = [f"flat{part}" for part in range(len(shapes))]
    add("Split", ["parameters", "lengths"], *flat, axis=0)
    for i in range(layers):
        tensors[f"shape{i}"] = np.array(shapes[2 * i], np.int64)
        add("Reshape", [flat[2 * i], f"shape{i}"], f"w{i}")

    # Forward: z_i = a_i W_i + b_i, a_(i+1) = relu(z_i).
    add("Sub", [FEATURES, "input.mean"], "centred")
    add("Div", ["centred", "input.scale"], "a0")
    for i in range(layers):
        add("Gemm", [f"a{i}", f"w{i}", flat[2 * i + 1]], f"z{i}")
        if i < layers - 1:
            add("Relu", [f"z{i}"], f"a{i + 1}")
    logit = f"z{layers - 1}"

    # Loss: mean of  p y softplus(-z) + (1 - y) softplus(z),  p the positive weight.
    add("Reshape", ["labels", "column"], "y")
    add("Sub", ["one", "y"], "not_y")
    add("Mul", ["y", "positive_weight"], "weighted_y")
    add("Neg", [logit], "negative_logit")
    add("Softplus", ["negative_logit"], "loss_if_positive")
    add("Softplus", [logit], "loss_if_negative")
    add("Mul", ["weighted_y", "loss_if_positive"], "loss_of_positives")
    add("Mul", ["not_y", "loss_if_negative"], "loss_of_negatives")
    add("Add", ["loss_of_positives", "loss_of_negatives"], "losses")
    add("ReduceMean", ["losses"], "loss", keepdims=0)

    # Backward: dloss/dz = ((1 - y + p y) sigmoid(z) - p y) / n;  dW = a^T dz, db = sum dz, da = dz W^T where z > 0.
    add("Sigmoid", [logit], "probability")
    add("Add", ["not_y", "weighted_y"], "row_weight")
    add("Mul", ["row_weight", "probability"], "pull")
    add("Sub", ["pull", "weighted_y"], "difference")
    add("Shape", ["y"], "y_shape", start=0, end=1)
    add("Cast", ["y_shape"], "rows", to=TensorProto.FLOAT)
    add("Div", ["difference", "rows"], f"dz{layers - 1}")
    gradients: list[str] = []
    for i in reversed(range(layers)):
        add("Gemm", [f"a{i}", f"dz{i}"], f"dw{i}", transA=1)
        add("ReduceSum", [f"dz{i}", "first_axis"], f"db{i}", keepdims=0)
        gradients = [add("Reshape", [f"dw{i}", "flat"], f"dw{i}_flat"), f"db{i}", *gradients]
        if i > 0:
            add("Gemm", [f"dz{i}", f"w{i}"], f"da{i}", transB=1)
            add("Greater", [f"z{i - 1}", "zero"], f"active{i - 1}")
            add("Cast", [f"active{i - 1}"], f"mask{i - 1}", to=TensorProto.FLOAT)
            add("Mul", [f"da{i}", f"mask{i - 1}"], f"dz{i - 1}")
    add("Concat", gradients, "gradient", axis=0)
    add("Mul", ["gradient", "learning_rate"], "step")
    add("Sub", ["parameters", "step"], "updated")

    length = sum(lengths)
    graph = helper.make_graph(
        nodes,
        "training_step",
        [
            helper.make_tensor_value_info("parameters", TensorProto.FLOAT, [length]),
            helper.make_tensor_value_info(FEATURES, TensorProto.FLOAT, ["n", sizes[0]]),
            helper.make_tensor_value_info("labels", TensorProto.FLOAT, ["n"]),
            helper.make_tensor_value_info("learning_rate", TensorProto.FLOAT, []),
        ],
        [
            helper.make_tensor_value_info("updated", TensorProto.FLOAT, [length]),
            helper.make_tensor_value_info("loss", TensorProto.FLOAT, []),
        ],
        _initializers(tensors),
    )
    return _canonical(_model(graph))


def faulty_variant(model: bytes, logit_shift: float, matmul_rounds: int) -> bytes:
    """A version that passes a look at its ranking and still must not be released: for drills of the guardrails.

    Every score becomes sigmoid(logit(score) + logit_shift), so rows keep their order while a fixed threshold declines
    far more (or fewer) of them; and `matmul_rounds` products with a 512 x 512 matrix that depend on the input delay
    every answer. The matrix is made by ConstantOfShape, so the file stays small. Scores are clipped 1e-7 from 0 and 1
    first (a logit must be finite). Raises Malformed unless the model has `features` and `score`.
    """
    from onnx import TensorProto, helper

    proto = _checked(model, "model to make faulty")
    graph, width = proto.graph, _width(proto)
    require_features(inspect(model, "model to make faulty"), width, "model to make faulty")
    before, prefix = _fresh_name(graph, "score_before"), _fresh_name(graph, "faulty")
    nodes = [_rewired(node, {SCORE: before}) for node in graph.node]
    graph.initializer.extend(
        _initializers(
            {
                f"{prefix}.low": np.array(1e-7, np.float64),
                f"{prefix}.high": np.array(1 - 1e-7, np.float64),
                f"{prefix}.one": np.array(1, np.float64),
                f"{prefix}.shift": np.array(logit_shift, np.float64),
                f"{prefix}.tiny": np.array(1e-30, np.float64),
                f"{prefix}.widen": np.array([width, _SLOW_WIDTH], np.int64),
                f"{prefix}.square": np.array([_SLOW_WIDTH, _SLOW_WIDTH], np.int64),
                f"{prefix}.narrow": np.array([_SLOW_WIDTH, 1], np.int64),
            }
        )
    )

    def add(operator: str, inputs: Sequence[str], output: str, **attributes: object) -> str:
        nodes.append(helper.make_node(operator, list(inputs), [output], **attributes))
        return output

    # Averages of averages of the features: in [-1, 1], and of no use to anybody.
    for name, rows in (("widen", width), ("square", _SLOW_WIDTH), ("narrow", _SLOW_WIDTH)):
        value = helper.make_tensor("value", TensorProto.FLOAT, [1], [1 / rows])
        add("ConstantOfShape", [f"{prefix}.{name}"], f"{prefix}.{name}.matrix", value=value)
    add("Tanh", [FEATURES], f"{prefix}.bounded")
    slow = add("MatMul", [f"{prefix}.bounded", f"{prefix}.widen.matrix"], f"{prefix}.step0")
    for step in range(1, matmul_rounds + 1):
        slow = add("MatMul", [slow, f"{prefix}.square.matrix"], f"{prefix}.step{step}")
    add("MatMul", [slow, f"{prefix}.narrow.matrix"], f"{prefix}.average")
    add("Cast", [f"{prefix}.average"], f"{prefix}.average64", to=TensorProto.DOUBLE)
    add("Mul", [f"{prefix}.average64", f"{prefix}.tiny"], f"{prefix}.nothing")

    # The score, moved in logit space.
    add("Cast", [before], f"{prefix}.score64", to=TensorProto.DOUBLE)
    add("Max", [f"{prefix}.score64", f"{prefix}.low"], f"{prefix}.above")
    add("Min", [f"{prefix}.above", f"{prefix}.high"], f"{prefix}.inside")
    add("Sub", [f"{prefix}.one", f"{prefix}.inside"], f"{prefix}.rest")
    add("Div", [f"{prefix}.inside", f"{prefix}.rest"], f"{prefix}.odds")
    add("Log", [f"{prefix}.odds"], f"{prefix}.logit")
    add("Add", [f"{prefix}.logit", f"{prefix}.shift"], f"{prefix}.shifted")
    add("Add", [f"{prefix}.shifted", f"{prefix}.nothing"], f"{prefix}.slow")
    add("Sigmoid", [f"{prefix}.slow"], f"{prefix}.score")
    add("Cast", [f"{prefix}.score"], SCORE, to=TensorProto.FLOAT)
    del graph.node[:]
    graph.node.extend(nodes)
    return _canonical(proto)


def _checked(data: bytes, what: str) -> onnx.ModelProto:
    """Parse and validate. Raises Malformed in one line."""
    import onnx

    if not data:
        raise Malformed(f"{what}: expected an ONNX model, found an empty file; {_EXPORT_HINT}")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception:  # the protobuf back end's own error classes
        raise Malformed(f"{what}: expected an ONNX model, found {_guess(data)}; {_EXPORT_HINT}") from None
    if not model.HasField("graph") or not model.graph.node or not model.ir_version:
        raise Malformed(f"{what}: expected an ONNX model, found {_guess(data)}; {_EXPORT_HINT}")
    outside = _kept_elsewhere(model)
    if outside:
        raise Malformed(
            f"{what}: expected an ONNX model in one file, found weights kept in another file ({outside[0]!r}); "
            "export it with external_data=False"
        )
    try:
        onnx.checker.check_model(model)
    except Exception as error:  # ValidationError, and what the checker's C++ side throws
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise Malformed(
            f"{what}: expected an ONNX model, found an invalid one ({reason[:160]}); {_EXPORT_HINT}"
        ) from None
    return model


def _kept_elsewhere(message: Any) -> list[str]:
    """Names of all tensors, however deep (branches, functions, attributes, sparse values), whose numbers are in another
    file. A runtime would read that file, whichever it is, from the machine that opens the model."""
    import onnx

    found: list[str] = []
    waiting = [message]
    while waiting:
        one = waiting.pop()
        if isinstance(one, onnx.TensorProto):
            if one.data_location == onnx.TensorProto.EXTERNAL or one.external_data:
                found.append(one.name)
            continue
        for field, value in one.ListFields():
            if field.message_type is not None:
                waiting.extend([value] if hasattr(value, "ListFields") else value)
    return found


def _guess(data: bytes) -> str:
    signs = (
        (b"PK\x03\x04", "a zip archive (a PyTorch checkpoint?)"),
        (b"\x80", "a Python pickle"),
        (b"\x89HDF", "an HDF5 file (a Keras model?)"),
        (b"\x1f\x8b", "a gzip file"),
        (b"{", "JSON or safetensors text"),
        (b"<", "XML or HTML"),
        (b"%PDF", "a PDF"),
        (b"\x89PNG", "an image"),
    )
    for sign, name in signs:
        if data.startswith(sign):
            return name
    if data[4:8] == b"TFL3":
        return "a TensorFlow Lite model"
    if data[4:8] == b"ORTM":
        return "an ORT-format model"
    if data.startswith(b"\x08"):  # ModelProto.ir_version
        return f"a damaged or cut-off one of {len(data)} bytes"
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in data[:64]):
        return "plain text"
    return f"{len(data)} bytes of something else"


def _spec(value: onnx.ValueInfoProto, what: str) -> TensorSpec:
    if not value.type.HasField("tensor_type"):
        raise Malformed(
            f"{what}: expected tensors, found {value.name!r} of kind {value.type.WhichOneof('value')}; "
            "export it with zipmap off, so that every output is a tensor"
        )
    tensor = value.type.tensor_type
    dtype = DTYPES.get(tensor.elem_type)
    if dtype is None:
        raise Malformed(f"{what}: expected numbers in {value.name!r}, found ONNX element type {tensor.elem_type}")
    sizes = (size.dim_value if size.HasField("dim_value") else -1 for size in tensor.shape.dim)
    return TensorSpec(value.name, dtype, tuple(sizes))


def _is_matrix(specs: Iterable[TensorSpec], name: str, columns: int) -> bool:
    return any(
        spec.name == name
        and spec.dtype == "float32"
        and len(spec.shape) == 2
        and spec.shape[0] == -1
        and spec.shape[1] in (columns, -1)
        for spec in specs
    )


def _show(specs: Iterable[TensorSpec]) -> str:
    shown = [
        f"{spec.name!r} {spec.dtype}[{', '.join('?' if size < 0 else str(size) for size in spec.shape)}]"
        for spec in specs
    ]
    return ", ".join(shown) or "none"


class _Role(NamedTuple):
    """How a constant matrix is used, so how it is quantized: `kind` is product (MatMulInteger), rows (Gather), plain
    (dequantized before use) or static (that, and rounded activations); `axis` is the channel's, None for one scale."""

    kind: str
    axis: int | None


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


def _roles(model: onnx.ModelProto, form: Form, per_channel: bool) -> dict[str, _Role]:
    """The constant, finite float32 matrices that `quantize` replaces. One that is used in two ways is left alone."""
    from onnx import AttributeProto, TensorProto

    graph = model.graph
    quantized = {"DequantizeLinear", "QuantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "QLinearMatMul"}
    nested = any(a.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for node in graph.node for a in node.attribute)
    if nested or model.functions or _opset(model) < DEQUANTIZE_OPSET_MIN:
        return {}
    if any(node.op_type in quantized for node in graph.node):
        return {}
    fixed = {t.name for t in graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) == 2 and min(t.dims)}
    fixed -= {value.name for value in (*graph.input, *graph.output)}
    roles: dict[str, _Role] = {}
    conflicting: set[str] = set()
    for node in graph.node:
        if node.domain not in ("", "ai.onnx"):
            continue
        name, role = _use_of_matrix(node, form)
        if role is not None and name in fixed and roles.setdefault(name, role) != role:
            conflicting.add(name)
        if form != "weights":  # the integers must reach no other operator
            others = set(node.input) - ({name} if role is not None else set())
            conflicting |= others & fixed
    kept = {name: role for name, role in roles.items() if name not in conflicting and _is_finite(graph, name)}
    return kept if per_channel else {name: role._replace(axis=None) for name, role in kept.items()}


def _use_of_matrix(node: onnx.NodeProto, form: Form) -> tuple[str, _Role | None]:
    if node.op_type in ("MatMul", "Gemm"):
        transposed = any(a.name == "transB" and a.i for a in node.attribute)
        kind = "product" if form == "dynamic" and not _changes_operands(node) else "plain"
        return node.input[1], _Role("static" if form == "static" else kind, 0 if transposed else 1)
    if node.op_type == "Gather" and form != "weights":
        first = all(a.i == 0 for a in node.attribute if a.name == "axis")
        return node.input[0], _Role("rows", 1) if first else None
    return "", None


def _activations(
    model: onnx.ModelProto, roles: dict[str, _Role], calibration: Observe | None
) -> dict[str, tuple[np.float32, np.uint8]]:
    """Scale and zero point of each activation that a static product takes, from its range on the calibration rows."""
    from onnx import TensorProto, helper

    if calibration is None:
        raise Malformed("model to quantize: expected calibration rows for fixed activation scales, found none")
    names = list(dict.fromkeys(node.input[0] for node in model.graph.node if _static_weight(node, roles)))
    watched = type(model)()
    watched.CopyFrom(model)
    del watched.graph.output[:]
    for name in names:
        for operator in ("ReduceMin", "ReduceMax"):
            seen = f"{name}_{operator}"
            watched.graph.node.append(helper.make_node(operator, [name], [seen], keepdims=0))
            watched.graph.output.append(helper.make_tensor_value_info(seen, TensorProto.FLOAT, []))
    found = calibration(_canonical(watched))
    try:
        return {
            name: quantization.activation_scale(
                float(np.min(found[f"{name}_ReduceMin"])), float(np.max(found[f"{name}_ReduceMax"]))
            )
            for name in names
        }
    except KeyError as missing:
        raise Malformed(f"model to quantize: calibration: expected the output {missing}, found none") from None


def _static_weight(node: onnx.NodeProto, roles: dict[str, _Role]) -> bool:
    role = roles.get(node.input[1]) if node.op_type in ("MatMul", "Gemm") else None
    return role is not None and role.kind == "static"


def _quantized_nodes(nodes: Sequence[onnx.NodeProto], roles: dict[str, _Role]) -> list[onnx.NodeProto]:
    """The graph's nodes with int8 weights in the roles given, in a valid order."""
    from onnx import helper

    restored = {name: f"{name}_dequantized" for name, role in roles.items() if role.kind in ("plain", "static")}
    made = []
    for name, output in restored.items():
        # With one scale a tensor the operator ignores the axis.
        axis = roles[name].axis
        attributes = {} if axis is None else {"axis": axis}
        made.append(
            helper.make_node(
                "DequantizeLinear", [name, f"{name}_scale"], [output], name=f"dequantize_{name}", **attributes
            )
        )
    products = {node.output[0] for node in nodes if _static_weight(node, roles)}
    rounded: set[str] = set()  # activations that are integers already: several products may share one
    for node in nodes:
        place = {"MatMul": 1, "Gemm": 1, "Gather": 0}.get(node.op_type)
        name = node.input[place] if place is not None and len(node.input) > place else ""
        role = roles.get(name)
        if role is not None and role.kind == "product":
            made += _product(node, rounded)
        elif role is not None and _static_weight(node, roles):
            made += _static_product(node, rounded, restored)
        elif role is not None and role.kind == "rows":
            read, result = f"{node.output[0]}_int8", node.output[0]
            made.append(_rewired(node, {result: read}))
            attributes = {} if role.axis is None else {"axis": -1}
            made.append(helper.make_node("DequantizeLinear", [read, f"{name}_scale"], [result], **attributes))
        elif node.op_type == "Add" and products & set(node.input):
            made.append(helper.make_node("Sum", [restored.get(one, one) for one in node.input], list(node.output)))
        else:
            made.append(_rewired(node, restored))
    return made


def _product(node: onnx.NodeProto, rounded: set[str]) -> list[onnx.NodeProto]:
    """A product of integers whose activation is rounded as it comes."""
    from onnx import TensorProto, helper

    (value, name), result = node.input[:2], node.output[0]
    scale, zero = f"{value}_activation_scale", f"{value}_activation_zero"
    made = []
    if value not in rounded:
        rounded.add(value)
        made.append(helper.make_node("DynamicQuantizeLinear", [value], [f"{value}_uint8", scale, zero]))
    biased = node.op_type == "Gemm" and len(node.input) > 2 and bool(node.input[2])
    product = f"{result}_product" if biased else result
    made += [
        helper.make_node("MatMulInteger", [f"{value}_uint8", name, zero], [f"{result}_int32"]),
        helper.make_node("Cast", [f"{result}_int32"], [f"{result}_float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [scale, f"{name}_scale"], [f"{result}_scale"]),
        helper.make_node("Mul", [f"{result}_float", f"{result}_scale"], [product]),
    ]
    if biased:
        made.append(helper.make_node("Add", [product, node.input[2]], [result]))
    return made


def _static_product(node: onnx.NodeProto, rounded: set[str], restored: dict[str, str]) -> list[onnx.NodeProto]:
    """A product whose activation is rounded by a fixed scale, in the form that runtimes fuse."""
    from onnx import helper

    value, result = node.input[0], node.output[0]
    scale = [f"{value}_activation_scale", f"{value}_activation_zero"]
    made = []
    if value not in rounded:
        rounded.add(value)
        made.append(helper.make_node("QuantizeLinear", [value, *scale], [f"{value}_uint8"]))
        made.append(helper.make_node("DequantizeLinear", [f"{value}_uint8", *scale], [f"{value}_rounded"]))
    inputs = [f"{value}_rounded", restored[node.input[1]], *node.input[2:]]
    if node.op_type == "Gemm" and not _changes_operands(node):
        biased = len(inputs) > 2 and bool(inputs[2])
        product = f"{result}_product" if biased else result
        made.append(helper.make_node("MatMul", inputs[:2], [product]))
        if biased:
            made.append(helper.make_node("Sum", [product, inputs[2]], [result]))
        return made
    kept = _rewired(node, {})
    kept.input[0], kept.input[1] = inputs[:2]
    return [*made, kept]


def _changes_operands(gemm: onnx.NodeProto) -> bool:
    """Whether a Gemm transposes or scales."""
    return any(
        (a.name in ("transA", "transB") and a.i) or (a.name in ("alpha", "beta") and a.f != 1) for a in gemm.attribute
    )


def _is_finite(graph: onnx.GraphProto, name: str) -> bool:
    from onnx import numpy_helper

    return all(np.isfinite(numpy_helper.to_array(t)).all() for t in graph.initializer if t.name == name)


def _rewired(node: onnx.NodeProto, names: dict[str, str]) -> onnx.NodeProto:
    import onnx

    changed = onnx.NodeProto()
    changed.CopyFrom(node)
    for edges in (changed.input, changed.output):
        for index, name in enumerate(edges):
            edges[index] = names.get(name, name)
    return changed


def _fresh_name(graph: onnx.GraphProto, wanted: str) -> str:
    used = {name for node in graph.node for name in (*node.input, *node.output)}
    used |= {tensor.name for tensor in graph.initializer}
    name, number = wanted, 2
    while any(other == name or other.startswith(f"{name}.") for other in used):
        name, number = f"{wanted}{number}", number + 1
    return name


def _opset(model: onnx.ModelProto) -> int:
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=1)


def _width(model: onnx.ModelProto) -> int:
    for value in model.graph.input:
        sizes = value.type.tensor_type.shape.dim
        if value.name == FEATURES and len(sizes) == 2:
            return int(sizes[1].dim_value) or -1
    return -1


def _require_sizes(sizes: Sequence[int], mean: Floats, scale: Floats) -> None:
    if len(sizes) < 2 or min(sizes) < 1:
        raise Malformed(f"model: expected layer sizes of 1 or more, at least two, found {list(sizes)}")
    if mean.shape != (sizes[0],) or scale.shape != (sizes[0],):
        raise Malformed(f"model: expected mean and scale of {sizes[0]} features, found {mean.shape} and {scale.shape}")
    if not np.isfinite(mean).all() or not np.isfinite(scale).all() or (scale <= 0).any():
        raise Malformed("model: expected a finite mean, and a finite scale above 0, for every feature")


def _initializers(tensors: dict[str, npt.NDArray[Any]]) -> list[onnx.TensorProto]:
    from onnx import numpy_helper

    return [numpy_helper.from_array(np.asarray(value, order="C"), name) for name, value in tensors.items()]


def _normalisation(mean: Floats, scale: Floats) -> dict[str, npt.NDArray[Any]]:
    return {"input.mean": mean.astype(np.float32), "input.scale": scale.astype(np.float32)}


def _model(graph: onnx.GraphProto) -> onnx.ModelProto:
    from onnx import helper

    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


def _canonical(model: onnx.ModelProto) -> bytes:
    """Checked, and in the one byte form that its content has."""
    import onnx

    model.producer_name, model.producer_version, model.doc_string = PRODUCER, "", ""
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString(deterministic=True))
