"""A histogram for the data path, served through prometheus-client.

prometheus-client's own takes one value a call, scans its buckets and locks twice. Here a call bisects, takes a weight
(a span's records arrived together, so one call stands for all of them), and needs no lock: a histogram belongs to the
event loop's thread, which also serves ``/metrics``.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector


class Histogram:
    """The observations of one set of label values."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Count ``value`` as often as ``count`` says."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    @property
    def count(self) -> int:
        """How many values were observed."""
        return sum(self._counts)

    @property
    def sum(self) -> float:
        """The observed values together."""
        return self._sum

    def held(self) -> list[tuple[float, float | None, int]]:
        """Of each bucket that holds values: above what they are, up to what (None: no limit), and how many."""
        buckets = zip((0.0, *self._bounds), (*self._bounds, None), self._counts, strict=True)
        return [bucket for bucket in buckets if bucket[2]]

    def cumulative(self) -> list[int]:
        """For each upper bound, and for infinity, how many values were not above it."""
        return list(accumulate(self._counts))


class HistogramFamily(Collector):
    """The histograms of one metric, a child for each set of label values."""

    def __init__(
        self, name: str, documentation: str, labels: tuple[str, ...], *, unit: str, buckets: tuple[float, ...]
    ) -> None:
        if not buckets or list(buckets) != sorted(set(buckets)):
            raise ValueError(f"the buckets of {name} do not rise: {buckets}")
        self._name = name
        self._documentation = documentation
        self._labels = labels
        self._unit = unit
        self._buckets = buckets
        self._bound_names = [*map(repr, buckets), "+Inf"]
        self._children: dict[tuple[str, ...], Histogram] = {}

    def labels(self, *values: str) -> Histogram:
        """The histogram of these label values, made at the first call."""
        if len(values) != len(self._labels):
            raise ValueError(f"{self._name} has the labels {self._labels}, not {len(values)} of them")
        return self._children.setdefault(values, Histogram(self._buckets))

    def describe(self) -> Iterable[HistogramMetricFamily]:
        """The metric without samples: how a registry learns its name."""
        return [HistogramMetricFamily(self._name, self._documentation, labels=self._labels, unit=self._unit)]

    def collect(self) -> Iterable[HistogramMetricFamily]:
        """The metric with a sample for each bucket of each child."""
        family = HistogramMetricFamily(self._name, self._documentation, labels=self._labels, unit=self._unit)
        for values, child in self._children.items():
            family.add_metric(
                values, list(zip(self._bound_names, map(float, child.cumulative()), strict=True)), child.sum
            )
        return [family]
