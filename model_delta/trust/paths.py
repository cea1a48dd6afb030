"""What things are called in a TUF repository: roles, target paths, and the kind of object its files are in a store."""

from __future__ import annotations

import re

from model_delta.digest import require_digest
from model_delta.errors import Malformed

KIND = "tuf"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_REGION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
"""Without a point: `REGION.TENANT` must have one reading."""


def delegated_role(region: str, tenant: str) -> str:
    """The name of a region's role for a tenant."""
    return f"{_name(region, 'region')}.{_name(tenant, 'tenant')}"


def version_path(region: str, tenant: str, model: str, digest: str) -> str:
    """The target path of a model version. Raises Malformed for a part that is no name."""
    parts = (_name(region, "region"), _name(tenant, "tenant"), _name(model, "model"), require_digest(digest))
    return "/".join(parts)


def anchors_path(tenant: str) -> str:
    """The target path of a tenant's anchors."""
    return f"{_name(tenant, 'tenant')}/anchors"


def _name(text: str, what: str) -> str:
    allowed, signs = (_REGION, "'_', '-'") if what == "region" else (_NAME, "'.', '_', '-'")
    if not allowed.fullmatch(text):
        raise Malformed(f"{what}: expected 1 to 64 letters, digits, {signs}, first no sign, found {text[:80]!r}")
    return text
