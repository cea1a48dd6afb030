"""How a device or gateway gets its certificate: keys are made here, the request goes to the coordinator once."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path

from atoll.control_client import ControlClient
from atoll.platform import ANCHORS
from atoll.settings import write_private
from edge_runtime.identity import Identity


def enrolled_identity(
    folder: Path, name: str, kind: str, client: ControlClient, traits: Mapping[str, str] | None = None
) -> Identity:
    """The identity in `folder`, enrolled with the coordinator if it is not yet.

    `traits` (device_class, region and labels) go into the coordinator's registry. Raises Unavailable while the
    coordinator is away, Untrusted when it refuses the token or the name.
    """
    identity = Identity.create(folder, name)
    if identity.is_enrolled:
        return identity
    answer = client.post(
        "/v1/enroll",
        {
            "kind": kind,
            "common_name": name,
            "csr_pem": identity.request_pem().decode(),
            "sealing_public": base64.b64encode(identity.sealing_public).decode(),
            "traits": dict(traits or {}),
        },
    )
    write_private(folder / ANCHORS, base64.b64decode(answer["anchors"]))
    identity.enrolled(answer["certificate_pem"].encode(), answer["ca_pem"].encode())
    return identity
