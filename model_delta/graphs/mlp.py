"""The fraud model as a graph, and one step of its training as another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from model_delta.errors import Malformed
from model_delta.graphs.writing import canonical, initializers, model_of
from model_delta.signature import FEATURES, SCORE

Floats = npt.NDArray[np.float32]


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
        initializers(tensors),
    )
    return canonical(model_of(graph))


def mlp_training_graph(
    sizes: Sequence[int], mean: Floats, scale: Floats, positive_weight: float, *, momentum: bool = False
) -> bytes:
    """One step of stochastic gradient descent on an `mlp_model` of layer `sizes` (F, ..., 1), as a graph; inputs and
    outputs are those of `RoundTask.training_graph`, with or without `momentum`.

    The flat vector is layer0.weight (row-major [in, out]), layer0.bias, layer1.weight, ... The loss is the batch mean
    of  -positive_weight y log p - (1 - y) log(1 - p),  computed from the logit; it is the loss before the step. The
    backward pass is written out by hand. Momentum is Polyak's heavy ball without dampening (as in torch.optim.SGD):
    v' = momentum v + gradient, w' = w - learning_rate v'. Raises Malformed.
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
        "signs": np.array([[-1], [1]], np.float32),
        "label_weight": np.array([[positive_weight], [-1]], np.float32),
        "class_weight": np.array([[0], [1]], np.float32),
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

    # Loss: sum over both classes, the positive one first, and the rows of  w softplus(s z),  with s = -1 and 1, and
    # w = p y / n and (1 - y) / n, p the positive weight. Classes are rows, so that labels need no change of shape.
    # A one for each row makes sums over rows products, which are faster.
    add("HardSigmoid", ["labels"], "ones", alpha=0.0, beta=1.0)
    add("MatMul", ["ones", "ones"], "rows")
    add("Mul", ["labels", "label_weight"], "weighted_labels")
    add("Add", ["weighted_labels", "class_weight"], "sums_of_weights")
    add("Div", ["sums_of_weights", "rows"], "weights")
    add("Gemm", ["signs", logit], "signed", transB=1)
    add("Softplus", ["signed"], "surprise")
    add("Mul", ["weights", "surprise"], "losses")
    add("ReduceSum", ["losses"], "loss", keepdims=0)

    # Backward: dloss/dz = sum of s w sigmoid(s z);  dW = a^T dz, db = sum dz, da = dz W^T where z > 0.
    add("Sigmoid", ["signed"], "error")
    add("Mul", ["weights", "error"], "pull")
    add("Gemm", ["pull", "signs"], f"dz{layers - 1}", transA=1)
    gradients: list[str] = []
    for i in reversed(range(layers)):
        add("Gemm", [f"a{i}", f"dz{i}"], f"dw{i}", transA=1)
        add("MatMul", ["ones", f"dz{i}"], f"db{i}")
        gradients = [add("Reshape", [f"dw{i}", "flat"], f"dw{i}_flat"), f"db{i}", *gradients]
        if i > 0:
            add("Gemm", [f"dz{i}", f"w{i}"], f"da{i}", transB=1)
            # max(0, min(1, 3e38 a)): 1 where Relu let something through, in one node.
            add("HardSigmoid", [f"a{i}"], f"mask{i - 1}", alpha=3e38, beta=0.0)
            add("Mul", [f"da{i}", f"mask{i - 1}"], f"dz{i - 1}")
    direction = add("Concat", gradients, "gradient", axis=0)
    if momentum:
        add("Mul", ["velocity", "momentum"], "kept")
        direction = add("Add", ["kept", "gradient"], "updated_velocity")
    add("Mul", [direction, "learning_rate"], "step")
    add("Sub", ["parameters", "step"], "updated")

    length = sum(lengths)
    more_inputs = [
        helper.make_tensor_value_info("velocity", TensorProto.FLOAT, [length]),
        helper.make_tensor_value_info("momentum", TensorProto.FLOAT, []),
    ]
    graph = helper.make_graph(
        nodes,
        "training_step",
        [
            helper.make_tensor_value_info("parameters", TensorProto.FLOAT, [length]),
            helper.make_tensor_value_info(FEATURES, TensorProto.FLOAT, ["n", sizes[0]]),
            helper.make_tensor_value_info("labels", TensorProto.FLOAT, ["n"]),
            helper.make_tensor_value_info("learning_rate", TensorProto.FLOAT, []),
            *(more_inputs if momentum else ()),
        ],
        [
            helper.make_tensor_value_info("updated", TensorProto.FLOAT, [length]),
            *([helper.make_tensor_value_info("updated_velocity", TensorProto.FLOAT, [length])] if momentum else ()),
            helper.make_tensor_value_info("loss", TensorProto.FLOAT, []),
        ],
        initializers(tensors),
    )
    return canonical(model_of(graph))


def _require_sizes(sizes: Sequence[int], mean: Floats, scale: Floats) -> None:
    if len(sizes) < 2 or min(sizes) < 1:
        raise Malformed(f"model: expected layer sizes of 1 or more, at least two, found {list(sizes)}")
    if mean.shape != (sizes[0],) or scale.shape != (sizes[0],):
        raise Malformed(f"model: expected mean and scale of {sizes[0]} features, found {mean.shape} and {scale.shape}")
    if not np.isfinite(mean).all() or not np.isfinite(scale).all() or (scale <= 0).any():
        raise Malformed("model: expected a finite mean, and a finite scale above 0, for every feature")


def _normalisation(mean: Floats, scale: Floats) -> dict[str, npt.NDArray[Any]]:
    return {"input.mean": mean.astype(np.float32), "input.scale": scale.astype(np.float32)}
