"""Keyrings that misbehave as a distant one may: they hang, and they notice who asks them on an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any, cast

from model_delta.keys.keyring import Keyring


class HangingKeyring:
    """Another keyring, of which every call waits while `answering` is clear. `on_loop` names the calls that were made
    on a thread with a running event loop; `begun` all of them."""

    def __init__(self, keyring: Keyring) -> None:
        self._keyring = keyring
        self.tenant = keyring.tenant
        self.answering = threading.Event()
        self.answering.set()
        self.on_loop: list[str] = []
        self.begun: list[str] = []

    def as_keyring(self) -> Keyring:
        """The same, for a type checker that does not look into `__getattr__`."""
        return cast(Keyring, self)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._keyring, name)

        def call(*args: Any, **options: Any) -> Any:
            self.begun.append(name)
            try:
                asyncio.get_running_loop()
            except RuntimeError:
                pass
            else:
                self.on_loop.append(name)
            if not self.answering.wait(60.0):
                raise AssertionError(f"{name}: nobody let the fake keyring answer")
            return method(*args, **options)

        return call
