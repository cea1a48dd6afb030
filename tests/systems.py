"""Tests that only some systems can run."""

from __future__ import annotations

import sys

import pytest

on_linux = pytest.mark.skipif(
    sys.platform != "linux", reason="relies on what only Linux has: /proc, /dev/full, prctl, ports that are held"
)
