"""Our TUF client as the TUF conformance suite wants to run it: `python -m atoll.tuf_conformance`.

The suite starts a program for each step and watches its exit code (0 done, 1 refused or failed), the metadata it keeps
and the requests it makes. The protocol is the suite's CLIENT-CLI document: `init TRUSTED_ROOT`, `refresh`, `download`,
with folders and addresses as options before the command. This file adds no rule of its own, so that what passes here is
what a device does: the same `Trust`, over HTTP, with this machine's clock.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from model_delta.errors import AtollError, Malformed
from model_delta.trust.client import Trust
from model_delta.trust.fetchers import HttpSource

COMMANDS = ("init", "refresh", "download")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code. Why something was refused goes to standard error."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "init":
            options.metadata_dir.mkdir(parents=True, exist_ok=True)
            (options.metadata_dir / "root.json").write_bytes(Path(_required(options, "trusted_root")).read_bytes())
        else:
            _refresh_and_download(options)
    except (AtollError, OSError) as error:
        print(f"{options.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _refresh_and_download(options: argparse.Namespace) -> None:
    root = (options.metadata_dir / "root.json").read_bytes()
    metadata = HttpSource(_required(options, "metadata_url"))
    wanted = options.command == "download"
    targets = HttpSource(_required(options, "target_base_url")) if wanted else None
    trust = Trust(options.metadata_dir, root, metadata, targets)
    now = time.time()
    trust.refresh(now)
    if wanted:
        trust.download(_required(options, "target_name"), now, Path(_required(options, "target_dir")))


def _required(options: argparse.Namespace, name: str) -> str:
    value = getattr(options, name)
    if not value:
        raise Malformed(f"expected --{name.replace('_', '-')}, found none")
    return str(value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m atoll.tuf_conformance", description=__doc__)
    parser.add_argument("--metadata-dir", type=Path, required=True)
    for name in ("metadata-url", "target-name", "target-dir", "target-base-url"):
        parser.add_argument(f"--{name}")
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("trusted_root", nargs="?", metavar="TRUSTED_ROOT")
    return parser


if __name__ == "__main__":
    sys.exit(main())
