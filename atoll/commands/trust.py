"""The key ceremony, and what follows from it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from atoll.commands.options import DEFAULT_DATA, DataOption, JsonOption, group

trust = group("trust", "The root of trust: three holders of keys, and how long everything lasts.")

SticksOption = Annotated[
    list[Path], typer.Option("--stick", help="A holder's folder of keys; give it several times.", show_default=False)
]
PassphrasesOption = Annotated[
    list[Path],
    typer.Option(
        "--passphrase-file",
        help="A file with a passphrase: one for all sticks, or one for each in order; default: ask "
        "(or ATOLL_TRUST_PASSPHRASE).",
        exists=True,
        dir_okay=False,
        show_default=False,
    ),
]
RegionsOption = Annotated[
    list[str], typer.Option("--region", help="A region whose versions this platform's release key vouches for.")
]


@trust.command("init")
def trust_init(
    stick: SticksOption,
    region: RegionsOption = ["core"],  # noqa: B006
    passphrase_file: PassphrasesOption = [],  # noqa: B006
    data: DataOption = DEFAULT_DATA,
    json: JsonOption = False,
) -> None:
    """Hold the key ceremony: three people, a stick each, any two of whom may change the root of trust.

    Example: atoll trust init --stick /media/ann --stick /media/ben --stick /media/cho
    """
    from atoll.trust import trust_init

    trust_init(data, stick, region, passphrase_file, as_json=json)


@trust.command("rotate")
def trust_rotate(
    what: Annotated[str, typer.Argument(help="root, targets or online.")],
    stick: SticksOption = [],  # noqa: B006
    new_stick: Annotated[
        list[Path], typer.Option("--new-stick", help="An empty folder for a new holder's keys; three or more.")
    ] = [],  # noqa: B006
    region: RegionsOption = [],  # noqa: B006
    passphrase_file: PassphrasesOption = [],  # noqa: B006
    discard: Annotated[bool, typer.Option("--discard", help="Forget what waits for signatures.")] = False,
    data: DataOption = DEFAULT_DATA,
    json: JsonOption = False,
) -> None:
    """Renew root or targets, replace holders (--new-stick) or online keys; all at once or stick by stick.

    Example: atoll trust rotate online --stick /media/ann --stick /media/cho
    """
    from atoll.trust import trust_rotate

    trust_rotate(data, what, stick, new_stick, region, passphrase_file, discard=discard, as_json=json)


@trust.command("status")
def trust_status(data: DataOption = DEFAULT_DATA, json: JsonOption = False) -> None:
    """Show every role's version, expiry and days left, who can sign it, and what waits for signatures.

    Example: atoll trust status
    """
    from atoll.trust import trust_status

    trust_status(data, as_json=json)
