"""Small models and keys that the tests of this package share."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import numpy.typing as npt

from model_delta.graphs.mlp import mlp_model
from model_delta.keys.keyring import EmbeddedKeyring

NOW = 1_790_000_000.0
FEATURES = 6
Floats = npt.NDArray[np.float32]
Layers = list[tuple[Floats, Floats]]


def layers(seed: int, sizes: tuple[int, ...] = (FEATURES, 32, 16, 1)) -> Layers:
    """Random weights of a fraud MLP."""
    rng = np.random.default_rng(seed)
    return [
        (
            rng.normal(0, 1 / np.sqrt(rows), (rows, columns)).astype(np.float32),
            rng.normal(0, 0.1, columns).astype(np.float32),
        )
        for rows, columns in pairwise(sizes)
    ]


def nudged(weights: Layers, seed: int, size: float = 1e-3) -> Layers:
    """The same model after a small training round."""
    rng = np.random.default_rng(seed)
    return [
        (
            (weight + rng.normal(0, size, weight.shape)).astype(np.float32),
            (bias + rng.normal(0, size, bias.shape)).astype(np.float32),
        )
        for weight, bias in weights
    ]


def normalisation(features: int = FEATURES) -> tuple[Floats, Floats]:
    """A mean and a scale."""
    return np.linspace(-1, 1, features).astype(np.float32), np.linspace(0.5, 2, features).astype(np.float32)


def model(weights: Layers) -> bytes:
    """The float32 ONNX file of a model."""
    return mlp_model(weights, *normalisation(weights[0][0].shape[0]))


def keyring(folder: Path, tenant: str = "acme") -> EmbeddedKeyring:
    """A new keyring whose clock stands at NOW."""
    return EmbeddedKeyring.create(folder / f"keyring-{tenant}", tenant, clock=lambda: NOW)


def run(file: bytes, **inputs: Any) -> dict[str, Any]:
    """Run an ONNX file once in onnxruntime."""
    session = session_of(file)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def session_of(file: bytes) -> Any:
    """A sequential session on one thread that folds constant weights (see `graphs.int8.quantize_weights`)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
