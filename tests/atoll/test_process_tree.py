"""Who descends from whom, from a table of processes."""

from __future__ import annotations

from atoll.process_tree import members


def test_members_are_descendants_and_groups() -> None:
    table = {1: (0, 1), 10: (1, 10), 11: (10, 10), 12: (11, 12), 20: (1, 20), 30: (1, 33), 31: (30, 31)}
    assert members(10, (), table) == {10, 11, 12}
    assert members(10, (33,), table) == {10, 11, 12, 30, 31}
    assert members(99, (), table) == set()
