"""The programs that make up a platform, each started alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from atoll.commands.options import DEFAULT_DATA, DataOption, LinesOption, LoginOption, StoreOption, group

gateway = group("gateway", "Run the program of one region.")
coordinator = group("coordinator", "Run the program in the middle.")
aggregator = group("aggregator", "Run one of the three aggregators of a federated round.")
fleet = group("fleet", "Run many simulated devices in one process.")
broker = group("broker", "Run the embedded MQTT 5 broker.")


@gateway.command("run")
def gateway_run(
    region: Annotated[str, typer.Option(help="The region's name.")] = "eu-west",
    store: StoreOption = "",
    data: DataOption = DEFAULT_DATA,
    json: LinesOption = False,
) -> None:
    """Run one region's gateway of the platform in the data folder.

    `atoll up` starts it and keeps it running; run it like this under a supervisor of your own.

    Example: atoll gateway run --region eu-west --data ./atoll-data
    """
    from atoll.gateway import run_gateway

    run_gateway(data, region, store=store, as_json=json)


@coordinator.command("run")
def coordinator_run(store: StoreOption = "", data: DataOption = DEFAULT_DATA, json: LinesOption = False) -> None:
    """Run the coordinator of the platform in the data folder.

    `atoll up` starts it and keeps it running; run it like this under a supervisor of your own.

    Example: atoll coordinator run --data ./atoll-data
    """
    from atoll.coordinator import run_coordinator

    run_coordinator(data, store=store, as_json=json)


@aggregator.command("run")
def aggregator_run(
    name: Annotated[str, typer.Option(help="a0, a1 or a2.")] = "a0",
    updates_log: Annotated[
        str, typer.Option(help="Where to read contributions: embedded, or kafka://host:port/topic; default: as set up.")
    ] = "",
    updates_login: LoginOption = "",
    data: DataOption = DEFAULT_DATA,
    json: LinesOption = False,
) -> None:
    """Run one aggregator of the platform in the data folder.

    `atoll up --learning` starts all three; run one like this under a supervisor of your own.

    Example: atoll aggregator run --name a0 --data ./atoll-data
    """
    from atoll.aggregator import run_aggregator

    run_aggregator(data, name, updates_log=updates_log, updates_login=updates_login, as_json=json)


@broker.command("run")
def broker_run(data: DataOption = DEFAULT_DATA, json: LinesOption = False) -> None:
    """Run the embedded MQTT 5 broker of the platform in the data folder.

    `atoll up --broker embedded` starts it and keeps it running; run it like this under a supervisor of your own.

    Example: atoll broker run --data ./atoll-data
    """
    from atoll.broker import run_broker

    run_broker(data, as_json=json)


@fleet.command("run")
def fleet_run(
    devices: Annotated[int, typer.Option(help="Size of the whole fleet.", min=1, max=300)] = 20,
    shard: Annotated[str, typer.Option(help="Which part of it this process runs, as I/N.")] = "0/1",
    payments: Annotated[
        Path | None,
        typer.Option(help="A labelled payments CSV (Time,V1..V28,Amount,Class) to deal to them; default: simulated."),
    ] = None,
    model: Annotated[str, typer.Option(help="The model to follow; default: fraud, or fraud-csv with --payments.")] = "",
    seed: Annotated[int, typer.Option(help="Seed of payments, population, dealing and faults.")] = 7,
    hostile: Annotated[float, typer.Option(help="Share of devices that poison their updates.", min=0, max=0.5)] = 0.0,
    rate: Annotated[float, typer.Option(help="Payments a second and device.", min=0.01)] = 4.0,
    absent: Annotated[str, typer.Option(help="Devices to leave out, separated by commas.")] = "",
    observe: Annotated[
        bool, typer.Option("--observe", help="Keep every raw update in the data folder, for comparisons only.")
    ] = False,
    metrics_port: Annotated[int, typer.Option(help="Port for /metrics; 0: none.", min=0, max=65535)] = 0,
    data: DataOption = DEFAULT_DATA,
    json: LinesOption = False,
) -> None:
    """Run simulated devices with their own payment streams against the platform of the data folder.

    With --payments the rows of a file are dealt to the devices, not alike to all, the same for the same seed.

    Example: atoll fleet run --devices 20
    """
    from atoll.fleet import run_fleet

    run_fleet(
        data,
        devices=devices,
        shard=shard,
        seed=seed,
        hostile=hostile,
        rate=rate,
        absent=absent,
        observe=observe,
        metrics_port=metrics_port,
        payments=payments,
        model=model,
        as_json=json,
    )
