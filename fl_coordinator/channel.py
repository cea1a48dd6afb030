"""What two aggregators say to each other, readable by no third.

Their messages pass through HTTP and other people's machines, and a masked share that all three see is no longer masked.
So each message is sealed with AES-256-GCM under a key that follows from the X25519 keys of both (RFC 7748, HKDF RFC
5869), the round, the attempt and the frozen list, and from who speaks to whom. The step is in the associated data: a
message can be lost or repeated, but not read, changed, or passed off as another.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fl_coordinator.shares.fixed_point import Rng
from model_delta.encoding import pack
from model_delta.errors import Malformed, Untrusted

NAME_CHARS_MAX = 1_024

_KEY_BYTES = 32
_NONCE_BYTES = 12

_Name = Annotated[str, msgspec.Meta(max_length=NAME_CHARS_MAX)]


class ChannelMessage(msgspec.Struct, frozen=True):
    """A sealed message and where it belongs: its round, attempt, step, sender and receiver (names). Whoever holds many
    counts their boxes: all else is short."""

    round_id: _Name
    attempt: int
    step: _Name
    sender: _Name
    receiver: _Name
    nonce: Annotated[bytes, msgspec.Meta(max_length=_NONCE_BYTES)]
    box: bytes


class Channel:
    """One aggregator's end of the conversation with one peer, in one attempt at one round.

    Raises Malformed for peer bytes that are no usable X25519 key. A message's nonce is random (96 bits); an attempt has
    about 30 messages a direction, so two never meet.
    """

    def __init__(
        self,
        private: X25519PrivateKey,
        peer_sealing: bytes,
        own: str,
        peer: str,
        round_id: str,
        attempt: int,
        root: str,
    ) -> None:
        try:
            shared = private.exchange(X25519PublicKey.from_public_bytes(peer_sealing))
        except ValueError as error:
            raise Malformed(f"{peer}: X25519 key: {error}") from None
        self._secret = HKDF(
            hashes.SHA256(), _KEY_BYTES, None, pack(["atoll aggregators", sorted([own, peer]), round_id, attempt, root])
        ).derive(shared)
        self._own, self._peer = own, peer
        self._round_id, self._attempt = round_id, attempt

    @property
    def protocol_secret(self) -> bytes:
        """32 bytes for the protocol's own masks, the same at the peer, independent of the message keys."""
        return self._derive("masks")

    def seal(self, step: str, data: bytes, rng: Rng) -> ChannelMessage:
        """`data` for the peer."""
        nonce = rng(_NONCE_BYTES)
        box = self._cipher(self._own, self._peer).encrypt(nonce, data, self._bound(step, self._own, self._peer))
        return ChannelMessage(self._round_id, self._attempt, step, self._own, self._peer, nonce, box)

    def open(self, message: ChannelMessage) -> bytes:
        """What the peer said. Raises Untrusted when it was not said by the peer, to us, in this step and attempt."""
        bound = self._bound(message.step, self._peer, self._own)
        try:
            return self._cipher(self._peer, self._own).decrypt(message.nonce, message.box, bound)
        except (InvalidTag, ValueError):
            raise Untrusted(f"{self._peer}: message {message.step!r} does not open under this attempt's key") from None

    def _derive(self, *purpose: str) -> bytes:
        return HKDF(hashes.SHA256(), _KEY_BYTES, None, pack(["atoll channel", *purpose])).derive(self._secret)

    def _cipher(self, sender: str, receiver: str) -> AESGCM:
        return AESGCM(self._derive("message", sender, receiver))

    def _bound(self, step: str, sender: str, receiver: str) -> bytes:
        return pack([self._round_id, self._attempt, step, sender, receiver])
