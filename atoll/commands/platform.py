"""The whole platform on one machine: the demo, and one that stays up."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from atoll.commands.options import DEFAULT_DATA, DataOption, JsonOption, LoginOption, StoreOption


def demo(
    devices: Annotated[int, typer.Option(help="How many devices (20 to 240).", min=20, max=240)] = 60,
    rounds: Annotated[int, typer.Option(help="Federated rounds in act 3 (1 to 10).", min=1, max=10)] = 3,
    seed: Annotated[int, typer.Option(help="Seed of payments, population and faults.")] = 7,
    broker: Annotated[str, typer.Option(help="auto, mosquitto or embedded.")] = "auto",
    report: Annotated[Path, typer.Option(help="Folder for report.html and report.json.")] = Path("demo-report"),
    json: JsonOption = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the demo's data folder and logs.")] = False,
) -> None:
    """Run the whole platform on this machine: seven acts in about two minutes, with a live page and a report.

    Example: atoll demo --devices 60 --seed 7
    """
    from atoll.demo import run_demo

    raise typer.Exit(
        run_demo(devices=devices, rounds=rounds, seed=seed, broker=broker, report=report, as_json=json, keep=keep)
    )


def up(
    data: DataOption = DEFAULT_DATA,
    port: Annotated[
        int | None,
        typer.Option(
            help="First of the ports used: coordinator, broker, gateway, ...; default: the data folder's, first 7400.",
            min=1,
            max=65535,
        ),
    ] = None,
    region: Annotated[str, typer.Option(help="The region of the one gateway.")] = "eu-west",
    broker: Annotated[str, typer.Option(help="auto, mosquitto or embedded.")] = "auto",
    learning: Annotated[
        bool, typer.Option("--learning", help="Also start Flower and three aggregators, for federated rounds.")
    ] = False,
    updates_log: Annotated[
        str,
        typer.Option(help="Where contributions are kept: kafka://host:port/topic or embedded; default: as before."),
    ] = "",
    updates_login: LoginOption = "",
    store: StoreOption = "",
    json: JsonOption = False,
) -> None:
    """Start a platform here: coordinator, broker and one gateway, with their state in a data folder.

    Example: atoll up --data ./atoll-data
    """
    from atoll.up import run_up

    raise typer.Exit(
        run_up(
            data,
            port=port,
            region=region,
            broker=broker,
            learning=learning,
            updates_log=updates_log,
            updates_login=updates_login,
            store=store,
            as_json=json,
        )
    )
