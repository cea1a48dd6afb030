"""Ports for servers that tests start."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections import deque

HELD_MAX = 100
_held: deque[socket.socket] = deque()
"""Ports that were given out, kept from everybody else's bind(0): see `atoll.ports.held_ports`."""


def free_port() -> int:
    """A TCP port that nobody listens on, and that the system gives to nobody else for a good while."""
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """`count` different free ports: all are held until the last one is known."""
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        ports = [int(probe.getsockname()[1]) for probe in probes]
        if sys.platform == "linux":
            held.pop_all()
            for probe in probes:  # only now: with the option set before, two could be given the same port
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _held.extend(probes)
            while len(_held) > HELD_MAX:
                _held.popleft().close()
        return ports
