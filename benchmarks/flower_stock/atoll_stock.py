"""What stock SuperNodes run: a ClientApp that does nothing but answer. The ServerApp is the product's own."""

from __future__ import annotations

from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from fl_coordinator.flower_carrier import server_app
from model_delta.encoding import pack

server = server_app()
client = ClientApp()


@client.query()  # type: ignore[untyped-decorator]
def answer(message: Any, context: Any) -> Any:
    """As a node of ours answers a command that has nothing to do."""
    record = {"id": message.content["command"]["id"], "payload": pack({})}
    return Message(RecordDict({"answer": ConfigRecord(record)}), reply_to=message)
