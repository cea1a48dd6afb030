"""A training step from a JAX function; the only importer of jax and jax2onnx.

jax2onnx writes wrong shapes for the products in the gradient of a plain `x @ w`: the graph does not even run, or the
gate refuses it. `linear` is the same layer with its gradient spelled out, transposes and all; a loss that is to be
exported is written with it. jax is an extra (`atoll[train-jax]`) for the operator's machine; a device runs the result
by onnxruntime alone. Where there is a choice, torch's exporter makes graphs half as large.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np

from model_delta.errors import Malformed
from model_delta.graphs.training import Arrays, Step, Trained, TrainingStep, contracted, flat


def linear(x: Any, w: Any, b: Any) -> Any:
    """x w + b for x [n, in], w [in, out], b [out], with a gradient that jax2onnx can write."""
    return _linear()(x, w, b)


def jax_training_graph(
    parameters: Mapping[str, Any], loss: Callable[[Any, Any, Any], Any], features: int, *, momentum: bool
) -> tuple[bytes, Step, Any]:
    """The training graph of `loss(parameters, features, labels)`, the same step by jax itself, and the parameters,
    float32[d].

    `parameters` are arrays by name; the flat vector has them in that order. `loss` gets features float32[n, features]
    and labels float32[n] and gives float32[]. Raises Malformed without jax, for parameters that are not float32, and
    when the step cannot be exported.
    """
    try:
        import jax
        import jax.numpy as jnp
        from jax2onnx import to_onnx
    except ImportError as error:
        raise Malformed(f"{error.name} is not installed: pip install 'atoll[train-jax]'") from None
    wrong = [name for name, value in parameters.items() if np.asarray(value).dtype != np.float32]
    if not parameters or wrong:
        raise Malformed(f"jax model: expected float32 arrays by name, found otherwise {(wrong or ['no arrays'])[0]!r}")
    tensors = tuple(Trained(name, tuple(np.shape(value))) for name, value in parameters.items())
    step = TrainingStep(tensors, features, momentum)

    def one_step(vector: Any, x: Any, y: Any, rate: Any, *more: Any) -> tuple[Any, ...]:
        pieces, start = {}, 0
        for one in tensors:
            pieces[one.tensor] = jnp.reshape(vector[start : start + one.length], one.shape)
            start += one.length
        value, gradients = jax.value_and_grad(loss)(pieces, x, y)
        direction = jnp.concatenate([jnp.reshape(gradients[one.tensor], (-1,)) for one in tensors])
        if not more:
            return vector - rate * direction, value
        velocity, kept = more
        direction = kept * velocity + direction
        return vector - rate * direction, value, direction

    shapes = [step.shape_of(name) for name in step.inputs]
    free = [tuple("B" if size == "n" else size for size in shape) for shape in shapes]
    log = logging.getLogger("jax2onnx")
    level = log.level
    try:
        log.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inputs = [
                shape if "B" in shape else jax.ShapeDtypeStruct(shape, jnp.float32)  # only a plain tuple may be free
                for shape in free
            ]
            model = to_onnx(one_step, inputs, model_name="training_step")
    except Exception as error:  # the tracer and the exporter raise whatever the model met
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise Malformed(f"jax model: its training step cannot be exported: {reason[:300]}") from None
    finally:
        log.setLevel(level)

    def by_jax(given: Arrays) -> dict[str, Any]:
        outputs = one_step(*(jnp.asarray(given[name]) for name in step.inputs))
        return {name: np.asarray(value) for name, value in zip(step.outputs, outputs, strict=True)}

    return contracted(model, step), by_jax, flat(np.asarray(value) for value in parameters.values())


@cache
def _linear() -> Any:
    import jax
    import jax.numpy as jnp

    def layer(x: Any, w: Any, b: Any) -> Any:
        return x @ w + b

    def forward(x: Any, w: Any, b: Any) -> tuple[Any, tuple[Any, Any]]:
        return x @ w + b, (x, w)

    def backward(held: tuple[Any, Any], above: Any) -> tuple[Any, Any, Any]:
        x, w = held
        return above @ jnp.transpose(w), jnp.transpose(x) @ above, jnp.sum(above, axis=0)

    spelled_out = jax.custom_vjp(layer)
    spelled_out.defvjp(forward, backward)
    return spelled_out
