"""Federated rounds: run, looked at, checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from atoll.commands.options import DEFAULT_CONTACT, DEFAULT_DATA, ContactOption, DataOption, JsonOption, group

round_ = group("round", "Let the fleet learn: federated rounds that no server can read.")


@round_.command("run")
def round_run(
    file: Annotated[
        Path | None, typer.Option("--file", metavar="ROUND.yaml", help="A round YAML file instead of the options.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model to improve; default: fraud.")] = None,
    quorum: Annotated[int | None, typer.Option(help="Fewest contributions to aggregate; default: 12.", min=3)] = None,
    hostile: Annotated[
        int | None, typer.Option(help="Assumed bound on hostile devices (f); default: 2.", min=0)
    ] = None,
    deadline: Annotated[
        float | None, typer.Option(help="Seconds until the round closes for contributions; default: 60.", min=1)
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Mini-batches a device trains; default: 40.", min=1)] = None,
    wait: Annotated[bool, typer.Option(help="Wait for the round's end and show progress.")] = True,
    data: DataOption = DEFAULT_DATA,
    contact: ContactOption = DEFAULT_CONTACT,
    json: JsonOption = False,
) -> None:
    """Open a federated round on the stable version and publish the candidate that comes out of it.

    Example: atoll round run --file atoll/examples/round.yaml
    """
    from atoll.rounds import run_round

    options = {"model": model, "quorum": quorum, "hostile": hostile, "deadline": deadline, "steps": steps}
    run_round(data, file, options, wait=wait, contact_s=contact, as_json=json)


@round_.command("status")
def round_status(
    round_id: Annotated[str, typer.Argument(help="The round; all when left out.")] = "",
    data: DataOption = DEFAULT_DATA,
    contact: ContactOption = DEFAULT_CONTACT,
    json: JsonOption = False,
) -> None:
    """Show who took part in one round, who was refused and why, and what came out; or a line for each round.

    Example: atoll round status
    """
    from atoll.rounds import show_status

    show_status(data, round_id, contact_s=contact, as_json=json)


@round_.command("list")
def round_list(
    data: DataOption = DEFAULT_DATA, contact: ContactOption = DEFAULT_CONTACT, json: JsonOption = False
) -> None:
    """Show a line for each round.

    Example: atoll round list
    """
    from atoll.rounds import list_rounds

    list_rounds(data, contact_s=contact, as_json=json)


@round_.command("show")
def round_show(
    round_id: Annotated[str, typer.Argument(help="The round.")],
    transcript: Annotated[
        Path | None, typer.Option("--transcript", metavar="FILE", help="Also write the signed transcript to this file.")
    ] = None,
    data: DataOption = DEFAULT_DATA,
    contact: ContactOption = DEFAULT_CONTACT,
    json: JsonOption = False,
) -> None:
    """Show all that is known of one round, and export its transcript.

    Example: atoll round show fraud-1700000000-0a1b2c --transcript round.cbor
    """
    from atoll.rounds import show_round

    show_round(data, round_id, transcript, contact_s=contact, as_json=json)


@round_.command("abort")
def round_abort(
    round_id: Annotated[str, typer.Argument(help="The round.")],
    data: DataOption = DEFAULT_DATA,
    contact: ContactOption = DEFAULT_CONTACT,
    json: JsonOption = False,
) -> None:
    """End a round at once, before its result is published. What aggregators still answer is dropped.

    Example: atoll round abort fraud-1700000000-0a1b2c
    """
    from atoll.rounds import abort_round

    abort_round(data, round_id, contact_s=contact, as_json=json)


@round_.command("verify")
def round_verify(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Transcripts from `atoll round show`.")],
    anchors: Annotated[
        Path | None, typer.Option(metavar="ANCHORS.cbor", help="Trust anchors; default: the data folder's.")
    ] = None,
    data: DataOption = DEFAULT_DATA,
    json: JsonOption = False,
) -> None:
    """Replay rounds from their transcripts, without any running process: signatures, frozen list, choice, sum, privacy.

    Example: atoll round verify round.cbor
    """
    from atoll.rounds import verify_rounds

    verify_rounds(data, files, anchors, as_json=json)
