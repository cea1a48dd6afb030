"""Who is asking.

A tenant proves itself with an API key as a bearer token (RFC 6750, section 2.1). Only the SHA-256 of a key is kept:
keys are long and random, so a plain digest suffices, and looking a digest up leaks nothing useful about a key by its
timing.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from model_delta.digest import digest_of
from regional_gateway.limits import Limit
from regional_gateway.protocol import Unauthorized

API_KEY_LENGTH_MAX = 512


class Tenant(msgspec.Struct, frozen=True):
    """A customer: the digests of its API keys, the model that `/predict` means when none is named, its limit."""

    name: str
    api_key_digests: tuple[str, ...]
    default_model: str = "fraud"
    limit: Limit = Limit()


class Tenants:
    """The tenants of this region, found by API key."""

    def __init__(self, tenants: Iterable[Tenant]) -> None:
        self._by_digest = {digest: tenant for tenant in tenants for digest in tenant.api_key_digests}

    def of(self, authorization: str) -> Tenant:
        """The tenant of an `Authorization` header's value. Raises Unauthorized."""
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise Unauthorized("authorization: expected 'Authorization: Bearer <tenant API key>', found none")
        tenant = self._by_digest.get(digest_of(key.strip().encode())) if len(key) <= API_KEY_LENGTH_MAX else None
        if tenant is None:
            raise Unauthorized("authorization: expected the API key of a tenant of this region, found an unknown one")
        return tenant
