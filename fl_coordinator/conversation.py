"""What an aggregator and its two peers say to each other in one attempt at a round.

Each message is sealed for its receiver (`channel`), sent again until it is taken, and waited for until the step's
deadline. Who gives up tells the others why, so that they need not wait for theirs.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fl_coordinator.channel import Channel, ChannelMessage
from fl_coordinator.mailbox import Mailbox
from fl_coordinator.round_command import RoundCommand
from fl_coordinator.shares.fixed_point import Rng
from fl_coordinator.shares.sharing import Exchange
from model_delta.encoding import pack
from model_delta.errors import AtollError, Unavailable, Untrusted
from model_delta.task import RoundTask

Send = Callable[[str, str, bytes], Awaitable[None]]
"""send(peer, name, data): hand `data` to that aggregator's `deliver(own name, name, data)`. Raises Unavailable."""

_ABORT = "abort"
_RETRY_FIRST_S, _RETRY_MAX_S = 0.05, 1.0
_FAREWELL_S = 2.0


class Conversation:
    """The aggregator at place `index` of `task`, with its sealing key `own`, in the attempt that `command` asks for.
    `step_timeout_s` is how long a peer may take for one message."""

    def __init__(
        self,
        *,
        own: X25519PrivateKey,
        index: int,
        task: RoundTask,
        command: RoundCommand,
        mailbox: Mailbox,
        send: Send,
        rng: Rng,
        step_timeout_s: float,
    ) -> None:
        self._command = command
        self._mailbox = mailbox
        self._send_bytes = send
        self._rng = rng
        self._step_timeout_s = step_timeout_s
        name, place = task.aggregators[index].name, (command.round_id, command.attempt, command.root)
        self._names = {peer: key.name for peer, key in enumerate(task.aggregators) if peer != index}
        self._channels = {
            peer: Channel(own, task.aggregators[peer].sealing, name, other, *place)
            for peer, other in self._names.items()
        }

    @property
    def pair_secrets(self) -> dict[int, bytes]:
        """32 bytes per peer that only the two know."""
        return {peer: channel.protocol_secret for peer, channel in self._channels.items()}

    async def exchange(self, step: Exchange) -> dict[int, bytes]:
        """Send and collect the messages of one step. Raises Unavailable naming the peer, at the step's deadline."""
        deadline = asyncio.get_running_loop().time() + self._step_timeout_s
        sends = [
            asyncio.create_task(
                self._send(self._names[peer], self._channels[peer].seal(step.step, data, self._rng), deadline),
                name=f"{step.step} to {self._names[peer]}",
            )
            for peer, data in step.outgoing.items()
        ]
        try:
            received = {}
            for peer in sorted(step.expected):
                received[peer] = await self._receive(step.step, peer, deadline)
            for task in sends:
                await task
        finally:
            for task in sends:
                task.cancel()
            await asyncio.gather(*sends, return_exceptions=True)
        return received

    async def farewell(self, reason: str) -> None:
        """Tell the peers why there will be no more of this attempt; best effort."""
        for peer, channel in self._channels.items():
            message = channel.seal(_ABORT, reason[:500].encode(), self._rng)
            with contextlib.suppress(AtollError, TimeoutError):
                async with asyncio.timeout(min(_FAREWELL_S, self._step_timeout_s)):
                    await self._send_bytes(self._names[peer], _ABORT, pack(message))

    def end(self) -> None:
        """Forget the attempt's messages."""
        self._mailbox.discard(self._command.round_id, self._command.attempt)

    async def _send(self, peer: str, message: ChannelMessage, deadline: float) -> None:
        data, pause = pack(message), _RETRY_FIRST_S
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    await self._send_bytes(peer, message.step, data)
                    return
            except (Unavailable, TimeoutError) as error:
                if asyncio.get_running_loop().time() + pause >= deadline:
                    raise Unavailable(
                        f"{self._what}: {peer} cannot be reached for step {message.step!r} ({error}); nothing was "
                        "opened, run the round again as a new attempt"
                    ) from None
            await asyncio.sleep(pause)
            pause = min(2 * pause, _RETRY_MAX_S)

    async def _receive(self, step: str, peer: int, deadline: float) -> bytes:
        command = self._command
        while True:
            for message in self._mailbox.find(command.round_id, command.attempt, step, self._names[peer]):
                with contextlib.suppress(Untrusted):  # forged: the true one may still come
                    return self._channels[peer].open(message)
            for other, channel in self._channels.items():
                for message in self._mailbox.find(command.round_id, command.attempt, _ABORT, self._names[other]):
                    with contextlib.suppress(Untrusted):
                        reason = channel.open(message).decode(errors="replace")
                        raise Unavailable(f"{self._what}: {self._names[other]} gave up: {reason}")
            try:
                async with asyncio.timeout_at(deadline):
                    await self._mailbox.arrival.rung()
            except TimeoutError:
                raise Unavailable(
                    f"{self._what}: no {step!r} from {self._names[peer]} within {self._step_timeout_s:g} s; "
                    "nothing was opened, run the round again as a new attempt"
                ) from None

    @property
    def _what(self) -> str:
        return f"round {self._command.round_id!r} attempt {self._command.attempt}"
