"""What commands print: one JSON value with `--json`, otherwise short text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import typer


def show(value: Any, text: str, *, as_json: bool) -> None:
    """Print `value` as JSON or `text`, in which nothing but a line break steers the terminal: some of it is what
    devices, relays and aggregators said."""
    typer.echo(json.dumps(value, indent=2, default=str) if as_json else plain(text))


def columns(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> str:
    """Rows as aligned columns under their keys; "none" when there are none."""
    if not rows:
        return "none"
    cells = [[key.replace("_", " ") for key in keys], *([_cell(row.get(key, "")) for key in keys] for row in rows)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(keys))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def plain(text: str) -> str:
    """The text without what could steer a terminal; line breaks stay."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, str) and len(value) == 64:
        return value[:12]
    if isinstance(value, list | tuple):
        return str(len(value))
    return str(value)
