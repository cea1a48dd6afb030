"""A training step from anybody's torch model; the only importer of torch.

torch's exporter does not take a gradient, neither autograd's nor functorch's. What it takes is a trace of one:
`make_fx` runs forward and backward once on symbols and writes down every operator (no decompositions: some have no
counterpart in ONNX), and that trace has no gradient in it any more. torch is an extra (`atoll[train]`) for the
operator's machine; a device runs the result by onnxruntime alone.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from model_delta.errors import Malformed
from model_delta.graphs.training import Arrays, Step, Trained, TrainingStep, contracted, flat

_ROWS = 7  # of the rows traced with: a number that is no other size, so that no other axis follows it


def torch_training_graph(
    module: Any, loss: Callable[[Any, Any], Any], features: int, *, momentum: bool
) -> tuple[bytes, Step, Any]:
    """The training graph of a torch.nn.Module, the same step by torch itself, and the parameters, float32[d].

    `module` takes float32[n, features]; `loss(prediction, labels)` gives the batch's loss, float32[]. The flat vector
    is `module.named_parameters()` in order. Raises Malformed without torch, for a module with buffers or frozen or
    other than float32 parameters, and when torch cannot export the step.
    """
    try:
        import torch
        from torch.func import functional_call, grad_and_value
        from torch.fx.experimental.proxy_tensor import make_fx
    except ImportError as error:
        raise Malformed(f"{error.name} is not installed: pip install 'atoll[train]'") from None
    named = dict(module.named_parameters())
    buffers = [name for name, _ in module.named_buffers()]
    if not named or buffers:
        raise Malformed(
            f"torch model: expected parameters and no buffers, found {len(named)} and {buffers[:4]}; "
            "a round trains parameters alone (layer instead of batch normalisation)"
        )
    wrong = [name for name, value in named.items() if value.dtype != torch.float32 or not value.requires_grad]
    if wrong:
        raise Malformed(f"torch model: expected float32 parameters that are trained, found otherwise {wrong[0]!r}")
    tensors = tuple(Trained(name, tuple(value.shape)) for name, value in named.items())
    step = TrainingStep(tensors, features, momentum)
    sizes = [tensor.length for tensor in tensors]

    def one_step(parameters: Any, x: Any, y: Any, rate: Any, *more: Any) -> tuple[Any, ...]:
        parts = torch.split(parameters, sizes)
        pieces = {one.tensor: part.reshape(one.shape) for one, part in zip(tensors, parts, strict=True)}
        gradients, value = grad_and_value(lambda held: loss(functional_call(module, held, (x,)), y))(pieces)
        direction = torch.cat([gradients[one.tensor].reshape(-1) for one in tensors])
        if not more:
            return parameters - rate * direction, value
        velocity, kept = more
        direction = kept * velocity + direction
        return parameters - rate * direction, value, direction

    start = flat(value.detach().numpy() for value in named.values())
    example = [
        torch.from_numpy(start),
        torch.zeros(_ROWS, features),
        torch.zeros(_ROWS),
        torch.tensor(0.05),
        *([torch.zeros(step.length), torch.tensor(0.9)] if momentum else []),
    ]
    shapes = [{0: torch.export.Dim("n")} if name in ("features", "labels") else {} for name in step.inputs]
    try:
        traced = make_fx(one_step, tracing_mode="symbolic")(*example)
        with warnings.catch_warnings(), _quiet("torch.onnx"):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                traced, tuple(example), dynamo=True, dynamic_shapes=tuple(shapes), verbose=False
            )
    except Exception as error:  # the tracer and the exporter raise whatever the model met
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise Malformed(
            f"torch model: its training step cannot be exported: {reason[:300]}; "
            "a step must not draw random numbers (let make() call eval() on a module with dropout)"
        ) from None

    def by_torch(inputs: Arrays) -> dict[str, Any]:
        outputs = one_step(*(torch.from_numpy(np.asarray(inputs[name]).copy()) for name in step.inputs))
        return {name: value.detach().numpy() for name, value in zip(step.outputs, outputs, strict=True)}

    return contracted(program.model_proto, step), by_torch, start


class _quiet:  # noqa: N801 - reads as a statement
    """No warnings in the log of a library while it works."""

    def __init__(self, name: str) -> None:
        self._log = logging.getLogger(name)

    def __enter__(self) -> None:
        self._level = self._log.level
        self._log.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        self._log.setLevel(self._level)
