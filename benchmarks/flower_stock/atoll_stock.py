"""What stock SuperNodes run: a ClientApp that answers, for an aggregator once it has the frozen list. The ServerApp is
the product's own."""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from fl_coordinator.flower_carrier import server_app
from fl_coordinator.round_command import stands_s
from model_delta.encoding import pack, unpack_plain

server = server_app()
client = ClientApp()
WAIT_S = 2.0


@client.query()  # type: ignore[untyped-decorator]
def answer(message: Any, context: Any) -> Any:
    """As a node of ours answers a command that has nothing to do; one to stand by, when the list has come."""
    record = {"id": message.content["command"]["id"]}
    command = unpack_plain(message.content["command"]["payload"])
    try:
        if stands_s(command) is not None:
            _fetch(command["round_id"], context)
        record["payload"] = pack({})
    except OSError as error:
        record["error"] = f"found no list: {error}"
    return Message(RecordDict({"answer": ConfigRecord(record)}), reply_to=message)


def _fetch(round_id: str, context: Any) -> bytes:
    """The attempt at a round, by long polls. Raises OSError, also when it is over."""
    name, token = context.node_config["name"], Path(context.run_config["coordinator-token-file"]).read_text()
    url = f"{context.run_config['coordinator-url']}/v1/rounds/{round_id}/attempt?aggregator={name}&wait={WAIT_S}"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    asked = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    while True:
        with opener.open(asked, timeout=WAIT_S + 10.0) as response:
            found: bytes = response.read()
            if found:
                return found
