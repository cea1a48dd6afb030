"""What a round may open in order to choose, and which policies can choose from that.

    distances   the Gram matrix: all distances and norms. Every rule that needs nothing else can decide.
    graph       one bit for each pair of devices: are they close? `cluster` keeps those close to most others.
    selection   nothing but who is chosen: `multikrum` is computed on shares.

In all three a bit says for each device whether its update is well formed; in the last two another one whether it is
within the clip norm.
"""

from __future__ import annotations

from collections.abc import Mapping

DISTANCES, GRAPH, SELECTION = "distances", "graph", "selection"

POLICIES: Mapping[str, tuple[str, ...]] = {
    DISTANCES: ("krum", "robust", "history", "multikrum"),
    GRAPH: ("cluster",),
    SELECTION: ("multikrum",),
}

SELECTION_MAX = 128
"""The most contributions of a round that reveals the selection alone: its cost grows with their cube."""


def problem(reveal: str, policy: str) -> tuple[str, str] | None:
    """Which of the two is wrong, and why; None when a round can be run so."""
    if reveal not in POLICIES:
        return "reveal", f"expected {' or '.join(POLICIES)}, found {reveal[:64]!r}"
    if policy not in POLICIES[reveal]:
        allowed = " or ".join(POLICIES[reveal])
        return "policy", f"expected policy {allowed} with `reveal: {reveal}`, found {policy[:64]!r}"
    return None
