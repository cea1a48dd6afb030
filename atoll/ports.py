"""TCP ports for children: kept from everybody else while the children come and go, and asked whether they answer."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator

from atoll.settings import LOOPBACK


@contextlib.contextmanager
def held_ports(count: int, host: str = LOOPBACK) -> Iterator[list[int]]:
    """`count` different free ports that the system gives to nobody else while the block runs: neither to another demo
    that asks for a free port, nor to an outgoing connection while a child that listens there is being restarted.

    On Linux a bound socket with SO_REUSEADDR that does not listen does this, and lets children listen on the port (all
    our servers set SO_REUSEADDR). Elsewhere nothing holds the ports once they are known.
    """
    with contextlib.ExitStack() as held:
        ports = []
        for _ in range(count):
            holder = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            holder.bind((host, 0))
            # Only now: with the option set before, two holders could be given the same port.
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            ports.append(int(holder.getsockname()[1]))
        if sys.platform != "linux":
            held.close()
        yield ports


def port_answers(port: int, host: str = LOOPBACK) -> Callable[[], Awaitable[bool]]:
    """A readiness check: does somebody accept connections there?"""

    async def ready() -> bool:
        try:
            _, writer = await asyncio.open_connection(host, port)
        except OSError:
            return False
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        return True

    return ready
