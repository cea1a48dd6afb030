"""How a device or gateway gets its certificate: keys are made here, the request goes to the coordinator once, and again
when the certificate runs out soon."""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping
from pathlib import Path

from atoll.control_client import ControlClient
from atoll.platform import ANCHORS, RENEW_DAYS, ROOT
from atoll.settings import write_private
from edge_runtime.identity import Identity
from model_delta.errors import Unavailable
from model_delta.keys.certificates import days_left


def enrolled_identity(
    folder: Path, name: str, kind: str, client: ControlClient, traits: Mapping[str, str] | None = None
) -> Identity:
    """The identity in `folder`, enrolled with the coordinator if it is not yet, not for much longer, or by an earlier
    program, which knew of no root.

    `traits` (device_class, region and labels) go into the coordinator's registry. Raises Unavailable while the
    coordinator is away (but goes on with a certificate that is still valid), Untrusted when it refuses the token or the
    name.
    """
    identity = Identity.create(folder, name)
    left = days_left(identity.certificate_pem, time.time()) if identity.is_enrolled else 0.0
    if left >= RENEW_DAYS and (folder / ROOT).exists():
        return identity
    try:
        _enrol(identity, kind, client, traits or {})
    except Unavailable:
        if left <= 0.0 or not (folder / ROOT).exists():
            raise
    return identity


def _enrol(identity: Identity, kind: str, client: ControlClient, traits: Mapping[str, str]) -> None:
    answer = client.post(
        "/v1/enroll",
        {
            "kind": kind,
            "common_name": identity.name,
            "csr_pem": identity.request_pem().decode(),
            "sealing_public": base64.b64encode(identity.sealing_public).decode(),
            "traits": dict(traits),
        },
    )
    root = base64.b64decode(answer.get("root", ""))
    if not root:
        raise Unavailable(f"{identity.name}: the coordinator has no root of trust yet; see `atoll trust status`")
    if not (identity.folder / ROOT).exists():  # the first one stays: what follows is for the repository to say
        write_private(identity.folder / ROOT, root)
    write_private(identity.folder / ANCHORS, base64.b64decode(answer["anchors"]))
    identity.enrolled(answer["certificate_pem"].encode(), answer["ca_pem"].encode())
