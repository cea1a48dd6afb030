"""Three kinds of failure, named by what the caller should do about them.

    AtollError
    ├── Untrusted          refuse, report, never retry
    │   ├── SignatureInvalid
    │   ├── DigestMismatch
    │   ├── Expired
    │   ├── RolledBack
    │   ├── TooLarge
    │   └── NotVouchedFor
    ├── Unavailable        retry with backoff, at the shell
    │   ├── NotFound
    │   ├── StorageFailed
    │   │   └── StorageFull
    │   └── TooSlow
    └── Malformed          a bug or an attack: count it, do not retry

A message names the object, what was expected and what was found. Messages never hold key material, certificates or
feature values.
"""

from __future__ import annotations


class AtollError(Exception):
    """Base of every error that Atoll raises on purpose."""


class Untrusted(AtollError):
    """What was received is not vouched for: refuse it and report it; a retry gives the same answer."""


class SignatureInvalid(Untrusted):
    """Fewer valid signatures than the role's threshold."""


class DigestMismatch(Untrusted):
    """Bytes whose digest is not the one they were named by."""


class Expired(Untrusted):
    """A signed record read after its expiry."""


class RolledBack(Untrusted):
    """A record older than one already accepted."""


class TooLarge(Untrusted):
    """More bytes than were declared, or than the reader's limit for this kind of file."""


class NotVouchedFor(Untrusted):
    """A version that no role of the repository vouches for: never published, or withdrawn."""


class Unavailable(AtollError):
    """The other side did not answer, or has not got it yet: retry with backoff until a deadline."""


class NotFound(Unavailable):
    """The named object is not there (yet)."""


class StorageFailed(Unavailable):
    """The disk takes or gives no bytes now, be it read-only, broken or full; nothing was changed."""


class StorageFull(StorageFailed):
    """No room left to write; nothing was changed."""


class TooSlow(Unavailable):
    """Bytes that come, but not fast enough to be worth waiting for: ask another mirror."""


class Malformed(AtollError):
    """Input that does not have the promised form."""
