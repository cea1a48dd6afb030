"""The bytes of anyone's model file, as a checked ONNX model or a refusal that says what the file is instead.

Everything that takes a model file comes through here: a file that names other files, whose content a runtime would then
read from the machine that opens it, gets no further.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from model_delta.errors import Malformed

if TYPE_CHECKING:
    import onnx

_EXPORT_HINT = "export it with torch.onnx.export, skl2onnx or tf2onnx"


def checked(data: bytes, what: str) -> onnx.ModelProto:
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


def opset(model: onnx.ModelProto) -> int:
    """The version of the default operator set."""
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=1)


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
