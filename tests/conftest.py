"""What every test may count on, however the suite was started."""

import signal
from collections import Counter
from pathlib import Path

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts a background job (`make test &`, nohup, some CI) with Ctrl-C ignored, and programs that tests start
    # and interrupt would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # under nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that at the end no worker is alone with one while the other waits.
    (A file's tests stay together, in their order.)"""
    seconds: Counter[Path] = Counter()
    for item in items:
        marks = list(item.iter_markers("slow"))
        seconds[item.path] += max((mark.kwargs.get("seconds", 3.0) for mark in marks), default=0.02)
    items.sort(key=lambda item: -seconds[item.path])
