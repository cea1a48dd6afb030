"""What a device signs when it says that it takes no part in a round.

The word has an effect, for a round does not wait for such a device, and reports pass through a broker. So nobody else
can say it, nor can it be said again of another round, base or reason. Both sides make the message here; it is for the
open round alone, and nobody keeps it.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from model_delta.encoding import pack
from model_delta.errors import SignatureInvalid
from model_delta.task import RoundTask
from model_delta.trust.signing import pre_authentication_encoding

SITTING_OUT_TYPE = "sitting-out"
FORMAT = 1


def sitting_out_message(task: RoundTask, device_id: str, reason: str) -> bytes:
    """The DSSE v1.0 pre-authentication encoding of which round, on which base, whose word and why; to be signed by the
    key of the device's certificate. `reason` is as it is told, also where the reader does not know it."""
    said = [FORMAT, task.tenant, task.model, task.round_id, task.base, device_id, reason]
    return pre_authentication_encoding(SITTING_OUT_TYPE, pack(said))


def require_own_word(
    task: RoundTask, device_id: str, reason: str, signature: bytes, verifying: ec.EllipticCurvePublicKey
) -> None:
    """Raises SignatureInvalid unless `signature` (ECDSA P-256 SHA-256, DER) is the device's over that message."""
    try:
        verifying.verify(signature, sitting_out_message(task, device_id, reason), ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise SignatureInvalid(f"{device_id} sits out round {task.round_id}: not signed by its own key") from None
