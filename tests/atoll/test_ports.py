"""Ports that are held."""

from __future__ import annotations

import socket

import pytest

from atoll.ports import held_ports
from tests.fakes.ports import free_ports
from tests.systems import on_linux


@on_linux
def test_held_ports_are_given_to_nobody_else_and_children_can_listen_on_them() -> None:
    with held_ports(20) as ports:
        assert len(set(ports)) == 20
        assert not set(ports) & set(free_ports(200))
        for _ in range(2):  # a child, and the one that replaces it
            with (
                socket.create_server(("127.0.0.1", ports[0])) as listener,
                socket.create_connection(("127.0.0.1", ports[0]), timeout=5) as caller,
            ):
                listener.accept()[0].close()
                assert caller.recv(1) == b""
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", ports[1]), timeout=5)
