"""How every long-running process of a platform starts and ends.

A process runs one coroutine until SIGTERM or SIGINT cancels it; what it opened is closed on the way out. Errors that a
person must put right end it with exit code 2 and one line; losing a peer ends it with 3, so that a supervisor restarts
it. Whoever started it with `--json` is told so (see `events`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Coroutine
from typing import Any

from atoll.events import Events
from atoll.log_lines import FewAlike
from atoll.settings import ConfigurationError
from model_delta.errors import AtollError, Malformed, NotFound, StorageFull, Unavailable


def run_process(
    main: Coroutine[Any, Any, None], name: str, default_level: str = "INFO", events: Events | None = None
) -> None:
    """Run `main` until it ends or a signal cancels it; exit with the code its error stands for. `events` hear of it.

    What the process writes is for its own user alone, whatever the caller's umask."""
    os.umask(0o077)
    logging.basicConfig(
        level=os.environ.get("ATOLL_LOG", default_level),
        format=f"%(asctime)s %(levelname).1s {name} %(name)s: %(message)s",
    )
    for handler in logging.getLogger().handlers:
        handler.addFilter(FewAlike())
    logging.getLogger("httpx").setLevel(logging.WARNING)
    events = events or Events(name, as_json=False)
    try:
        asyncio.run(_cancel_on_signal(main))
    except KeyboardInterrupt:
        events.say("stopped")
        sys.exit(130)
    except BaseExceptionGroup as group:
        sys.exit(_report(_first(group), events))
    except AtollError as error:
        sys.exit(_report(error, events))
    events.say("stopped")


async def _cancel_on_signal(main: Coroutine[Any, Any, None]) -> None:
    loop = asyncio.get_running_loop()
    task = asyncio.create_task(main)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        return


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


def _report(error: BaseException, events: Events) -> int:
    if not isinstance(error, AtollError):
        events.failed(f"{type(error).__name__}: {error}", 1)
        raise error
    print(f"{events.name}: {error}", file=sys.stderr, flush=True)
    events.failed(str(error), exit_code(error))
    return exit_code(error)


def exit_code(error: AtollError) -> int:
    """2 for what a person must put right, 3 for what a retry may cure, 4 for a refusal on grounds of trust."""
    if isinstance(error, ConfigurationError | Malformed | NotFound | StorageFull):
        return 2
    if isinstance(error, Unavailable):
        return 3
    return 4
