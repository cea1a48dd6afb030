"""A coordinator's publications over every kind of keyring: made, read, rotated, shredded."""

from __future__ import annotations

from pathlib import Path

import pytest

from model_delta.errors import Untrusted
from model_delta.keys.wrapping import version_of
from tests.fl_coordinator.platform_in_memory import START, Platform, fraud_model
from tests.model_delta.keys.rings import KINDS, rings


@pytest.mark.parametrize("kind", KINDS)
def test_versions_are_published_read_rotated_and_shredded(kind: str, tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    with rings(kind, tmp_path / "keys") as both:
        platform = Platform(tmp_path / "platform")
        platform.keyring = both.acme  # type: ignore[assignment]
        platform.reopen()
        publisher = platform.publisher
        first = publisher.publish(fraud_model(1), model="fraud", now=START)
        second = publisher.publish(fraud_model(2), model="fraud", now=START + 1)
        assert publisher.source(first.manifest) == fraud_model(1)
        assert publisher.keys.rotate().latest == 2
        assert {version_of(record.wrapped_key) for record in platform.ledger.releases()} == {2}
        assert publisher.file(second.manifest)
        publisher.keys.shred(first.manifest)
        with pytest.raises(Untrusted, match="was shredded"):
            publisher.source(first.manifest)
        assert publisher.source(second.manifest) == fraud_model(2)
        with pytest.raises(Untrusted):
            both.acme.unwrap(f"acme/{first.manifest}", first.wrapped_key)
        with pytest.raises(Untrusted):
            both.globex.unwrap(f"acme/{second.manifest}", platform.ledger.release(second.manifest).wrapped_key)
