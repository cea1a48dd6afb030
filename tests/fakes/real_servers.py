"""Real servers that tests start: where they are once built, and what becomes of a test where one is absent."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

import pytest


def built(name: str, version: str) -> Path:
    """The folder, outside the checkout, that `.ci/NAME/build` fills."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "atoll" / f"{name}-{version}"


def required() -> bool:
    """Whether the absence of a server is a failure."""
    return os.environ.get("ATOLL_REQUIRE_SERVERS") == "1"


def absent(what: str) -> NoReturn:
    """Skip a test that needs `what`, unless ATOLL_REQUIRE_SERVERS=1: then fail it."""
    if required():
        pytest.fail(f"expected {what}, because ATOLL_REQUIRE_SERVERS=1")
    pytest.skip(f"needs {what}")
