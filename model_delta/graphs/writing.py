"""The one byte form of every graph written here: fixed producer, raw little-endian tensor data, deterministic protobuf.

So the same weights give the same bytes, and two versions of a model have the same layout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import onnx

OPSET = 17
IR_VERSION = 9
PRODUCER = "atoll"


def canonical(model: onnx.ModelProto) -> bytes:
    """Checked, and in the one byte form that its content has."""
    import onnx

    model.producer_name, model.producer_version, model.doc_string = PRODUCER, "", ""
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString(deterministic=True))


def model_of(graph: onnx.GraphProto) -> onnx.ModelProto:
    """A model of this graph, in the operator set and format version of all of ours."""
    from onnx import helper

    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


def initializers(tensors: dict[str, npt.NDArray[Any]]) -> list[onnx.TensorProto]:
    """Stored tensors, named."""
    from onnx import numpy_helper

    return [numpy_helper.from_array(np.asarray(value, order="C"), name) for name, value in tensors.items()]


def rewired(node: onnx.NodeProto, names: dict[str, str]) -> onnx.NodeProto:
    """A copy of a node whose inputs and outputs have the new names given; others stay."""
    import onnx

    changed = onnx.NodeProto()
    changed.CopyFrom(node)
    for edges in (changed.input, changed.output):
        for index, name in enumerate(edges):
            edges[index] = names.get(name, name)
    return changed
