"""How fast a tenant may ask.

A token bucket in its virtual-scheduling form, the generic cell rate algorithm (ITU-T I.371, annex A): the whole state
is one number, the time at which the bucket would be full again. Pure: `now` is an argument, and the caller keeps the
number.
"""

from __future__ import annotations

import msgspec


class Limit(msgspec.Struct, frozen=True):
    """`rate_per_second` requests on average, up to `burst` at once. Both > 0."""

    rate_per_second: float = 2_000.0
    burst: int = 4_000


def take(full_at: float, limit: Limit, now: float) -> tuple[float, float]:
    """Take one token: returns the new `full_at` and the seconds to wait (0.0: admitted; otherwise nothing was taken).

    `full_at` starts as 0.0; all times are seconds on the same clock.
    """
    interval = 1.0 / limit.rate_per_second
    next_full = max(full_at, now) + interval
    wait = next_full - now - limit.burst * interval
    # The tolerance absorbs rounding, so that exactly `burst` requests pass at one instant.
    if wait > interval * 1e-6:
        return full_at, wait
    return next_full, 0.0
