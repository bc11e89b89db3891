"""How numbers are spread, in bounded memory: quantiles within 1 %, whatever the numbers and however many.

Numbers are counted in buckets, each 2 % wider than the one before (a sketch known as DDSketch). Between a nanosecond
and a day, in milliseconds, there are some two thousand of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

RATIO = 1.02
SMALLEST = 1e-9
"""What is nearer to zero counts as zero."""

_LOG = math.log(RATIO)
_MIDDLE = 2 / (RATIO + 1)
_ROUNDING = 1e-9


class Bin(NamedTuple):
    """A part of a histogram: what lies between two numbers."""

    low: float
    high: float
    weight: float


class Distribution:
    """Counts numbers; each may count for less, or more, than one."""

    def __init__(self) -> None:
        self.weight = 0.0
        self.least = math.inf
        self.most = -math.inf
        self._total = 0.0
        self._zero = 0.0
        self._above: dict[int, float] = {}
        self._below: dict[int, float] = {}

    def add(self, value: float, weight: float = 1.0) -> None:
        """One more, which is finite."""
        self.weight += weight
        self._total += value * weight
        self.least = min(self.least, value)
        self.most = max(self.most, value)
        if abs(value) < SMALLEST:
            self._zero += weight
            return
        buckets = self._above if value > 0 else self._below
        index = math.ceil(math.log(abs(value)) / _LOG)
        buckets[index] = buckets.get(index, 0.0) + weight

    @property
    def mean(self) -> float | None:
        """The mean, exactly; None where nothing was counted."""
        return self._total / self.weight if self.weight else None

    def quantile(self, share: float) -> float | None:
        """The smallest number that this share (0 to 1) does not exceed, within 1 %; None where nothing was counted."""
        wanted, seen = self.weight * share * (1 - _ROUNDING), 0.0
        for middle, weight in self._ordered():
            seen += weight
            if seen >= wanted:
                return min(max(middle, self.least), self.most)
        return None

    def histogram(self, edges: Sequence[float]) -> list[Bin]:
        """How much lies between each edge and the next, by the middles of the buckets; the outer edges include all."""
        weights = [0.0] * (len(edges) - 1)
        at = 0
        for middle, weight in self._ordered():
            while at < len(weights) - 1 and middle > edges[at + 1]:
                at += 1
            weights[at] += weight
        return [Bin(low, high, weight) for low, high, weight in zip(edges, edges[1:], weights, strict=False)]

    def _ordered(self) -> list[tuple[float, float]]:
        """The buckets' middles and weights, from the lowest on."""
        below = [(-_middle(index), weight) for index, weight in sorted(self._below.items(), reverse=True)]
        zero = [(0.0, self._zero)] if self._zero else []
        return [*below, *zero, *((_middle(index), weight) for index, weight in sorted(self._above.items()))]


def _middle(index: int) -> float:
    return _MIDDLE * math.exp(index * _LOG)
