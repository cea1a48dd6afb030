"""How to log in at Kafka's brokers, and what to do when they refuse: rules about names and texts, without a client.

The properties are librdkafka's own, so that what its users know holds here; but those of security alone, because how
records are sent and read is not a matter of taste. A password may be in a file of its own: `sasl.password.file` instead
of `sasl.password`, `ssl.key.password.file` instead of `ssl.key.password`.
"""

from __future__ import annotations

from collections.abc import Mapping

from model_delta.errors import Malformed

ALLOWED = ("security.protocol", "sasl.", "ssl.", "client.id")
"""What names of properties begin with."""
FROM_FILE = ("sasl.password", "ssl.key.password")
"""What may be in a file of its own, under its name with `.file` behind it."""
FILES = ("ssl.ca.location", "ssl.certificate.location", "ssl.key.location", "ssl.crl.location", "ssl.keystore.location")
"""Properties that name a file that must be there."""


def check_properties(properties: Mapping[str, str]) -> None:
    """Raises Malformed for a property that has nothing to do with security."""
    for name in properties:
        if not name.startswith(ALLOWED):
            raise Malformed(f"updates log: property {name!r}: expected one of {', '.join(ALLOWED)}")


def parse_login(text: str, what: str) -> dict[str, str]:
    """Properties by name from lines of `name=value`; blank lines and those with # in front say nothing.

    Raises Malformed with `what` and the line's number, never with what stands in it.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        name, equals, value = (part.strip() for part in line.partition("="))
        if not line.strip() or line.strip().startswith("#"):
            continue
        if not equals or not name or name in found:
            raise Malformed(f"{what}:{number}: expected name=value, each name once, as librdkafka names properties")
        if not name.startswith(ALLOWED):
            raise Malformed(f"{what}:{number}: expected a property of {', '.join(ALLOWED)}")
        found[name] = value
    return found


def advice(text: str) -> str:
    """What to do about an error of librdkafka's; `text` is what it says, with its error's name."""
    if "_AUTHENTICATION" in text:
        return "the brokers refused the login; check sasl.mechanism, sasl.username and the password"
    if "ssl/tls alert" in text:
        return "the brokers refused this side's certificate; check ssl.certificate.location and ssl.key.location"
    if "_SSL" in text:
        return "no TLS with the brokers; check ssl.ca.location, and that host and port are of their TLS listener"
    if "AUTHORIZATION_FAILED" in text:
        return (
            "the login may not do this; allow it READ and DESCRIBE on the topic (an aggregator), or also WRITE, CREATE,"
            " DELETE and DESCRIBE_CONFIGS (the coordinator)"
        )
    if "_UNKNOWN_PARTITION" in text:
        return "no such topic yet, or the login may not see it (READ and DESCRIBE)"
    if "_TRANSPORT" in text or "_ALL_BROKERS_DOWN" in text or "_TIMED_OUT" in text:
        return "no answer; check host and port, and whether the brokers want TLS or a login (security.protocol)"
    return ""
