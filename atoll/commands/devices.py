"""One device: run, revoked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from atoll.commands.options import DEFAULT_CONTACT, DEFAULT_DATA, ContactOption, DataOption, JsonOption, group

device = group("device", "Run one device, as a device team would embed it; revoke a lost one.")


@device.command("revoke")
def device_revoke(
    name: Annotated[str, typer.Argument(help="The device's or gateway's name.")],
    data: DataOption = DEFAULT_DATA,
    contact: ContactOption = DEFAULT_CONTACT,
    json: JsonOption = False,
) -> None:
    """End a lost or hostile device's certificate: no keys, no reports, no rounds from now on.

    Example: atoll device revoke pos-0002
    """
    from atoll.operate import revoke_identity

    revoke_identity(data, name, contact_s=contact, as_json=json)


@device.command("run")
def device_run(
    device_id: Annotated[str, typer.Option("--id", help="The device's name.")] = "pos-0001",
    device_class: Annotated[str, typer.Option("--class", help="pos, phone, pi or mcu.")] = "pos",
    region: Annotated[str, typer.Option(help="Home region; the platform's only one when left out.")] = "",
    payments: Annotated[
        Path | None, typer.Option(help="A labelled payments CSV (Time,V1..V28,Amount,Class); default: simulated.")
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            help="The model to follow, whatever it takes and gives; default: fraud, or fraud-csv with --payments."
        ),
    ] = "",
    inputs: Annotated[
        Path | None,
        typer.Option(
            help="Named tensors to put to the model, over and over: JSON ({name: nested lists}, or `inputs` as in the "
            "Open Inference Protocol; one object, a list, or one a line) or .npz; default: made up from what it takes."
        ),
    ] = None,
    rate: Annotated[float, typer.Option(help="Payments, or inferences, a second.", min=0.01, max=1000)] = 2.0,
    count: Annotated[int, typer.Option(help="Stop after so many answers; 0 runs until Ctrl-C.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the simulated payments, or the made-up inputs.")] = 7,
    update_memory: Annotated[
        int, typer.Option(help="MiB that a step of an update may work in; 0: no limit.", min=0)
    ] = 0,
    update_storage: Annotated[
        int, typer.Option(help="MiB that an update may store on its way; 0: no limit.", min=0)
    ] = 0,
    cached_cost: Annotated[
        float, typer.Option(help="What a byte costs that the region has already, next to 1 for others.", min=0, max=1)
    ] = 1.0,
    data: DataOption = DEFAULT_DATA,
    contact: ContactOption = DEFAULT_CONTACT,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line instead of text.")] = False,
) -> None:
    """Enrol one device with the platform of the data folder and let it answer, printing a line for each answer.

    A model of payments (`features` to a `score`) decides payments. Any other, as the signature of its version says, is
    put the tensors of --inputs, or made-up ones.

    Example: atoll device run --id pos-0002 --count 20

    Example: atoll device run --model digits --inputs pixels.json
    """
    from atoll.device import run_device
    from model_delta.patch.route import DeviceLimits

    run_device(
        data,
        device_id,
        device_class,
        region,
        payments,
        inputs=inputs,
        rate=rate,
        count=count,
        seed=seed,
        model=model,
        contact_s=contact,
        as_json=json,
        limits=DeviceLimits(update_memory << 20 or None, update_storage << 20 or None),
        cached_cost=cached_cost,
    )
