"""Model files on this machine, without a platform: quantized, made into patches and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from atoll.commands.options import JsonOption, group

model = group("model", "Prepare a model file before it is published.")
delta = group("delta", "Make patches between two files, apply them, look into them.")


@model.command("quantize")
def model_quantize(
    float32: Annotated[Path, typer.Argument(metavar="FP32", help="The float32 ONNX model.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Where the int8 model goes; an old file is replaced.")],
    parent: Annotated[
        Path | None, typer.Option(metavar="INT8", help="The int8 version before, whose scales and form are kept.")
    ] = None,
    parent_fp32: Annotated[
        Path | None,
        typer.Option(
            "--parent-fp32", metavar="OLD", help="Its float32: weights that did not move keep their integers."
        ),
    ] = None,
    form: Annotated[
        str,
        typer.Option(
            help="weights (stored as int8, computed as float32), dynamic (integers multiplied) or static (that, with "
            "fixed activation scales); default: the parent's, or weights."
        ),
    ] = "",
    per_tensor: Annotated[
        bool, typer.Option("--per-tensor", help="One scale a tensor instead of one a channel; without a parent.")
    ] = False,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="ROWS.npz",
            help="For static: an array of rows for each input, from which activation scales come; default: made up.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the made-up inputs on which outputs are compared.")] = 7,
    json: JsonOption = False,
) -> None:
    """Make the int8 version of a model, alike its parent, and check that it answers alike and carries the update.

    Example: atoll model quantize new.onnx new-int8.onnx --parent old-int8.onnx --parent-fp32 old.onnx
    """
    from atoll.model import quantize_file

    quantize_file(
        float32,
        out,
        parent,
        parent_fp32,
        form=form,
        per_tensor=per_tensor,
        calibration=calibration,
        seed=seed,
        as_json=json,
    )


@model.command("training-graph")
def model_training_graph(
    place: Annotated[
        str,
        typer.Argument(
            metavar="FILE.py:FUNCTION",
            help="A function that gives a torch module and loss(prediction, labels), or a dict of JAX arrays and "
            "loss(parameters, features, labels). The file is run on this machine.",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT.onnx", help="Where the graph goes; an old file is replaced.")],
    features: Annotated[int, typer.Option(help="How many numbers a row has.", min=1)] = 26,
    momentum: Annotated[bool, typer.Option(help="Steps with momentum, as rounds take them by default.")] = True,
    json: JsonOption = False,
) -> None:
    """Make the training step that devices run from your own torch or JAX model, if one step of it is the trainer's.

    Example: atoll model training-graph model.py:make step.onnx
    """
    from atoll.training_graph import make_training_graph

    make_training_graph(place, out, features=features, momentum=momentum, as_json=json)


@delta.command("make")
def delta_make(
    old: Annotated[Path, typer.Argument(metavar="OLD", help="The file that the other side has.")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="The file that it is to get.")],
    patch: Annotated[Path, typer.Argument(metavar="PATCH", help="Where the patch goes; an old file is replaced.")],
    format_name: Annotated[
        str, typer.Option("--format", help="bsdiff40 (any bspatch applies it) or tp1 (denser).")
    ] = "bsdiff40",
    json: JsonOption = False,
) -> None:
    """Make a patch from one file to another: by the names of tensors in models, by a search in other files.

    Example: atoll delta make old.onnx new.onnx model.patch
    """
    from atoll.delta import make_delta

    make_delta(old, new, patch, format_name=format_name, as_json=json)


@delta.command("apply")
def delta_apply(
    old: Annotated[Path, typer.Argument(metavar="OLD", help="The file that the patch was made from.")],
    patch: Annotated[Path, typer.Argument(metavar="PATCH", help="A patch of any format that `make` writes.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Where the new file goes; an old file is replaced.")],
    sha256: Annotated[str, typer.Option("--sha256", help="Keep the new file only if this is its SHA-256.")] = "",
    json: JsonOption = False,
) -> None:
    """Make the new file out of the old one and a patch, in little memory; it gets its name only when it is complete.

    Example: atoll delta apply old.onnx model.patch new.onnx
    """
    from atoll.delta import apply_delta

    apply_delta(old, patch, out, sha256=sha256, as_json=json)


@delta.command("inspect")
def delta_inspect(
    patch: Annotated[Path, typer.Argument(metavar="PATCH", help="A patch of any format that `make` writes.")],
    old: Annotated[
        Path | None, typer.Option("--old", help="The old file, to name the tensors that change (tp1 only).")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show what a patch says about itself: format, sizes, digests, memory to apply it, what it changes.

    Example: atoll delta inspect model.patch
    """
    from atoll.delta import inspect_delta

    inspect_delta(patch, old, as_json=json)
