"""`atoll model training-graph`: a training step from a user's own torch or JAX model, gated before it is written.

The user's file is Python and is run here, on the operator's machine, with the operator's rights; what leaves it is a
graph, which devices run as data. The file names a function without arguments that gives

    a torch.nn.Module                 and loss(prediction, labels)                 torch
    a dict of arrays by tensor name   and loss(parameters, features, labels)       JAX

Tensors are named as in the published model, where a round looks for them.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atoll.output import show
from atoll.settings import ConfigurationError, write_private
from edge_runtime.onnx_model import run_graph
from model_delta.digest import digest_of
from model_delta.errors import Malformed
from model_delta.graphs.jax_step import jax_training_graph
from model_delta.graphs.torch_step import torch_training_graph
from model_delta.graphs.training import require_equal_step, step_of

_EXTRAS = {"torch": "train", "jax": "train-jax", "jaxlib": "train-jax"}


def make_training_graph(place: str, out: Path, *, features: int, momentum: bool, as_json: bool) -> None:
    """Export, compare one step with the trainer's, write, and print digest, size, tensors and distance.

    `place` is FILE.py:FUNCTION. Raises ConfigurationError and Malformed (one line, nothing written).
    """
    model, loss = _made(place)
    if hasattr(model, "named_parameters"):
        graph, trainer, start = torch_training_graph(model, loss, features, momentum=momentum)
    elif isinstance(model, Mapping):
        graph, trainer, start = jax_training_graph(model, loss, features, momentum=momentum)
    else:
        raise ConfigurationError(
            f"{place}: expected a torch.nn.Module or a dict of arrays with the loss, found {type(model).__name__}"
        )
    step = step_of(graph, str(out))
    distance = require_equal_step(lambda inputs: run_graph(graph, inputs), trainer, step, start)
    write_private(out, graph)
    out.chmod(0o644)
    value = {
        "file": str(out),
        "digest": digest_of(graph),
        "bytes": len(graph),
        "parameters": step.length,
        "tensors": [{"tensor": one.tensor, "shape": list(one.shape)} for one in step.tensors],
        "features": step.features,
        "momentum": step.momentum,
        "distance": distance,
    }
    text = (
        f"{out}: {len(graph)} bytes, {step.length} parameters of {len(step.tensors)} tensors, "
        f"{step.features} features{', momentum' if step.momentum else ''}\n"
        f"one step differs by {distance:.2g} from the trainer's; name the file in a round's `training: {{graph: ...}}`"
    )
    show(value, text, as_json=as_json)


def _made(place: str) -> tuple[Any, Any]:
    name, colon, function = place.rpartition(":")
    path = Path(name)
    if not colon or not function.isidentifier() or path.suffix != ".py":
        raise ConfigurationError(f"expected FILE.py:FUNCTION, such as model.py:make, found {place!r}")
    if not path.is_file():
        raise ConfigurationError(f"{path}: cannot read: no such file")
    spec = importlib.util.spec_from_file_location("atoll_user_model", path)
    if spec is None or spec.loader is None:
        raise ConfigurationError(f"{path}: expected a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        make = getattr(module, function, None)
        if not callable(make):
            raise ConfigurationError(f"{path}: expected a function {function!r}, found none")
        pair = make()
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        hint = f"pip install 'atoll[{_EXTRAS[package]}]'" if package in _EXTRAS else "install what the file imports"
        raise ConfigurationError(f"{path}: {package or error} is not installed: {hint}") from None
    except (ConfigurationError, Malformed):
        raise
    except Exception as error:  # a user's code raises anything
        line = (str(error).strip().splitlines() or [""])[0][:200]
        raise ConfigurationError(f"{path}: {function}() failed: {type(error).__name__}: {line}") from None
    if not isinstance(pair, tuple) or len(pair) != 2 or not callable(pair[1]):
        raise ConfigurationError(
            f"{path}: expected {function}() to give a model and its loss, found {type(pair).__name__}"
        )
    return pair
