"""What a program of the platform tells whoever started it: with `--json`, one object a line on standard output.

    {"event": "ready", "time": ..., "process": "gateway-eu-west", "url": "http://127.0.0.1:7402", ...}
    {"event": "stopped", "time": ..., "process": "gateway-eu-west"}
    {"event": "error", "time": ..., "process": "gateway-eu-west", "error": "...", "exit_code": 2}

`time` is in Unix seconds. Events and fields may be added; a reader ignores those that it does not know. Nothing else
goes to standard output; logs and errors for people are on standard error, with or without `--json`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


class Events:
    """Says what happens to the process `name`; silent unless `as_json`."""

    def __init__(self, name: str, *, as_json: bool) -> None:
        self.name = name
        self.as_json = as_json

    def say(self, event: str, **fields: Any) -> None:
        """Write one line at once. A reader that has gone is no reason to end."""
        if not self.as_json:
            return
        told = {"event": event, "time": round(time.time(), 3), "process": self.name, **fields}
        try:
            print(json.dumps(told, default=str), flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def failed(self, error: str, exit_code: int) -> None:
        """The process ends with this error."""
        self.say("error", error=error, exit_code=exit_code)
