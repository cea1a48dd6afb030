"""Options that many commands share, and what every group of commands has in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DataOption = Annotated[
    Path, typer.Option("--data", envvar="ATOLL_DATA", help="The platform's data folder.", show_default=True)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON value instead of text.")]
LinesOption = Annotated[bool, typer.Option("--json", help="Print one JSON object a line: ready, stopped, error.")]
StoreOption = Annotated[
    str,
    typer.Option(
        "--store",
        help="Where model files are kept: a folder, s3://BUCKET/PREFIX, gs://, az://, or `default`; if left out: as "
        "before.",
    ),
]
LoginOption = Annotated[
    str,
    typer.Option(
        "--updates-login",
        help="How to log in at the brokers of --updates-log: a file of lines name=value, as librdkafka names them "
        "(sasl.username=atoll); if left out: as before.",
    ),
]
ContactOption = Annotated[
    float,
    typer.Option("--contact", envvar="ATOLL_CONTACT", help="Seconds to try to reach the platform.", min=0.1, max=3600),
]
DEFAULT_DATA = Path("atoll-data")
DEFAULT_CONTACT = 10.0


def group(name: str, text: str) -> typer.Typer:
    """An empty group of commands; `text` is its help."""
    # click suggests what was meant; typer would say so a second time
    return typer.Typer(name=name, help=text, no_args_is_help=True, rich_markup_mode=None, suggest_commands=False)
