"""Versions of a model: published, rolled out, cleared away."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from atoll.commands.options import DEFAULT_CONTACT, DEFAULT_DATA, ContactOption, DataOption, JsonOption, group
from model_delta.errors import Malformed

rollout = group("rollout", "Send a published version out to the fleet in stages, watch it, stop it.")
store = group("store", "Where model files are kept: remove what nothing needs any more.")


def publish(
    model: Annotated[
        Path | None, typer.Argument(metavar="MODEL.onnx", help="An ONNX model file; left out with --join.")
    ] = None,
    name: Annotated[str, typer.Option("--model", help="The model's name on the platform.")] = "fraud",
    label: Annotated[
        str, typer.Option("--name", help="A name for this version, to be used as a rollout's target.")
    ] = "",
    threshold: Annotated[
        float | None, typer.Option(help="Scores at or above it are declined; default: the parent's, or 0.5.")
    ] = None,
    latency: Annotated[
        float | None,
        typer.Option(
            "--latency-max",
            help="Milliseconds that an answer may take on a device, which goes back from a slower version; default: "
            "the parent's, or 50.",
            min=0.001,
            max=1e6,
        ),
    ] = None,
    feature_set: Annotated[
        str,
        typer.Option(
            help="What gateways take by name: terminal-26-v1 (default of fraud) or ulb-30-v1 (default of fraud-csv)."
        ),
    ] = "",
    signature: Annotated[
        Path | None,
        typer.Option(help="An OpenSSF model-signing bundle over the model: published only if it verifies."),
    ] = None,
    signer_key: Annotated[Path | None, typer.Option(help="The signer's public key, PEM.")] = None,
    signer_chain: Annotated[
        list[Path] | None,
        typer.Option(help="Instead of a key: the certificates that the signer's must lead to, PEM; may be repeated."),
    ] = None,
    signed_folder: Annotated[
        Path | None, typer.Option(help="The folder that the bundle covers, where that is more than the model's file.")
    ] = None,
    quantize: Annotated[
        str,
        typer.Option(
            help="auto (int8 where it measures faster or smaller enough), int8 or none (float32); default: the form "
            "of the version before, or auto."
        ),
    ] = "",
    join: Annotated[
        bool, typer.Option("--join", help="Publish one version that joins those that regions released apart.")
    ] = False,
    data: DataOption = DEFAULT_DATA,
    contact: ContactOption = DEFAULT_CONTACT,
    json: JsonOption = False,
) -> None:
    """Describe, sign, encrypt and store a model as a new version. Nobody runs it until a rollout says so.

    The models fraud and fraud-csv take payments; with --model NAME any other may take and give any tensors of numbers.

    Example: atoll publish fraud.onnx --name spring
    """
    from atoll.operate import join_releases, publish_model

    if join == (model is not None) or (
        join and (threshold is not None or latency is not None or feature_set or signature)
    ):
        raise Malformed("publish: expected MODEL.onnx, or --join alone (with --model and --name)")
    if model is None:
        join_releases(data, name, label, contact_s=contact, as_json=json)
        return
    publish_model(
        data,
        model,
        name,
        label,
        threshold,
        feature_set,
        latency_ms_max=latency,
        signature=signature,
        signer_key=signer_key,
        signer_chain=signer_chain or (),
        signed_folder=signed_folder,
        quantize=quantize,
        contact_s=contact,
        as_json=json,
    )


@rollout.command("apply")
def rollout_apply(
    file: Annotated[
        Path, typer.Argument(metavar="ROLLOUT.yaml", help="A rollout YAML file: cohorts, stages, guardrails.")
    ],
    data: DataOption = DEFAULT_DATA,
    contact: ContactOption = DEFAULT_CONTACT,
    json: JsonOption = False,
) -> None:
    """Start the rollout that a YAML file describes: its cohorts, stages and guardrails.

    Example: atoll rollout apply atoll/examples/canary.yaml
    """
    from atoll.operate import apply_rollout

    apply_rollout(data, file, contact_s=contact, as_json=json)


@rollout.command("status")
def rollout_status(
    name: Annotated[str, typer.Argument(help="The rollout's name; all when left out.")] = "",
    data: DataOption = DEFAULT_DATA,
    contact: ContactOption = DEFAULT_CONTACT,
    json: JsonOption = False,
) -> None:
    """Show the stage, health and history of one rollout, or a line for each.

    Example: atoll rollout status fraud-canary
    """
    from atoll.operate import show_rollouts

    show_rollouts(data, name, contact_s=contact, as_json=json)


@rollout.command("abort")
def rollout_abort(
    name: Annotated[str, typer.Argument(help="The rollout's name.")],
    data: DataOption = DEFAULT_DATA,
    contact: ContactOption = DEFAULT_CONTACT,
    json: JsonOption = False,
) -> None:
    """Stop a rollout: every device goes back to the stable version.

    Example: atoll rollout abort fraud-canary
    """
    from atoll.operate import abort_rollout

    abort_rollout(data, name, contact_s=contact, as_json=json)


@store.command("gc")
def store_gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be removed.")] = False,
    data: DataOption = DEFAULT_DATA,
    contact: ContactOption = DEFAULT_CONTACT,
    json: JsonOption = False,
) -> None:
    """Remove from the coordinator's store what no plan, rollback, open round or device within the window needs.

    Example: atoll store gc --dry-run
    """
    from atoll.stores import clean_store

    clean_store(data, dry_run=dry_run, contact_s=contact, as_json=json)
