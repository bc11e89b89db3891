"""The offline optimum: what no batcher can beat, since it sees the whole stream at once and sorts it.

All records by length, divided exactly (``runtime.grouping``) into batches that the limits allow, for the least time of
all batches together. In a backlog that is what a stream costs at least.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streamproc.runtime.cost import CostModel
from streamproc.runtime.grouping import cheapest_division, reach
from streamproc.runtime.limits import Limits


@dataclass(frozen=True, slots=True)
class Optimum:
    """The best division of a stream."""

    records: int
    batches: int
    worker_ms: float
    padding_ratio: float

    def per_s(self, workers: int) -> float:
        """Records a second with so many workers that never wait."""
        return self.records * workers / self.worker_ms * 1_000


def offline_optimum(lengths: Sequence[int], cost: CostModel, limits: Limits) -> Optimum:
    """Of these lengths, at these costs."""
    ordered = sorted(lengths)
    totals = range(len(ordered) + 1)
    costs = [cost.record_ms(length) for length in ordered]
    ends, worker_ms = cheapest_division(costs, totals, cost.alpha_ms, reach(ordered, totals, limits))
    padded = sum((end - begin) * ordered[end - 1] for begin, end in zip([0, *ends], ends, strict=False))
    return Optimum(len(ordered), len(ends), worker_ms, padded / sum(ordered))
