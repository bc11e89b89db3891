"""What happened within a window: batches, records, failures by cause, and the distributions of what batches took.

Totals are made of metrics records, one a batch, and merge: those of replicas to a task's, those of tasks to the
fleet's. Every number is a count or an exact sum, so that merging is exact, and in any order.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import orjson

from streamproc.stats.histogram import Distribution

COUNTS = ("records", "requested", "results", "failed", "attempts")
"""The fields of a metrics record that are added up."""
MEASURES = (
    *("queue_time", "total_execution_time", "wall_time", "predicted_wall_time"),
    *("fill", "padding_ratio", "memory", "predicted_memory"),
)
"""The fields of a metrics record that are distributions; those it has not, or null, do not count."""
SEEN_OVER_PREDICTED = {
    "wall_time_over_predicted": ("wall_time", "predicted_wall_time"),
    "memory_over_predicted": ("memory", "predicted_memory"),
}
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
MAX_NAMES = 50
"""Of causes, rules and steps each; further ones are counted as ``other``."""
UNKNOWN = "unknown"
"""The replica of metrics records that do not name one, as those of older versions."""


@dataclass(frozen=True, slots=True)
class BatchMetrics:
    """A metrics record, read."""

    task: str
    replica: str
    timestamp_ms: int
    counts: Mapping[str, int]
    causes: Mapping[str, int]
    closed_by: str
    measures: Mapping[str, float]
    steps: Mapping[str, float]


def read_metrics(value: bytes | None) -> BatchMetrics | None:
    """The batch that a record of a metrics topic tells of; None where it is none of streamproc's."""
    try:
        it = orjson.loads(value or b"")
        measures = {name: float(it[name]) for name in MEASURES if it.get(name) is not None}
        for name, (seen, predicted) in SEEN_OVER_PREDICTED.items():
            if seen in measures and measures.get(predicted):
                measures[name] = measures[seen] / measures[predicted]
        task, replica = it["task"], it.get("replica") or UNKNOWN
        if not isinstance(task, str) or not isinstance(replica, str) or "/" in task:
            return None
        return BatchMetrics(
            task=task,
            replica=replica,
            timestamp_ms=int(it["timestamp"]),
            counts={name: int(it.get(name) or 0) for name in COUNTS},
            causes={str(cause): int(count) for cause, count in (it.get("causes") or {}).items()},
            closed_by=str(it.get("closed_by")),
            measures=measures,
            steps={str(step): float(ms) for step, ms in (it.get("execution_times") or {}).items() if ms is not None},
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


class Totals:
    """The batches of a window, of one replica's task or of several together."""

    __slots__ = ("batches", "causes", "closed_by", "counts", "measures", "steps")

    def __init__(self) -> None:
        self.batches = 0
        self.counts: Counter[str] = Counter(dict.fromkeys(COUNTS, 0))
        self.causes: Counter[str] = Counter()
        self.closed_by: Counter[str] = Counter()
        self.measures: defaultdict[str, Distribution] = defaultdict(Distribution)
        self.steps: defaultdict[str, Distribution] = defaultdict(Distribution)

    def add(self, batch: BatchMetrics) -> None:
        """Count a batch."""
        self.batches += 1
        self.counts.update(batch.counts)
        for cause, count in batch.causes.items():
            self.causes[_name(cause, self.causes)] += count
        self.closed_by[_name(batch.closed_by, self.closed_by)] += 1
        for name, value in batch.measures.items():
            self.measures[name].add(value)
        for step, ms in batch.steps.items():
            self.steps[_name(step, self.steps)].add(ms)

    def merge(self, other: Totals) -> None:
        """Count all that the other has counted."""
        self.batches += other.batches
        self.counts.update(other.counts)
        self.causes.update(other.causes)
        self.closed_by.update(other.closed_by)
        for name, distribution in other.measures.items():
            self.measures[name].merge(distribution)
        for step, distribution in other.steps.items():
            self.steps[step].merge(distribution)

    def state(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return {
            "batches": self.batches,
            "counts": dict(self.counts),
            "causes": dict(self.causes),
            "closed_by": dict(self.closed_by),
            "measures": {name: it.state() for name, it in self.measures.items()},
            "steps": {name: it.state() for name, it in self.steps.items()},
        }

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Self:
        """The totals that a state was made of."""
        it = cls()
        it.batches = state["batches"]
        it.counts.update(state["counts"])
        it.causes.update(state["causes"])
        it.closed_by.update(state["closed_by"])
        it.measures.update({name: Distribution.of_state(of) for name, of in state["measures"].items()})
        it.steps.update({name: Distribution.of_state(of) for name, of in state["steps"].items()})
        return it

    def described(self, *, buckets: bool) -> dict[str, Any]:
        """What readers see of it: with ``buckets`` what they need to merge several, without the quantiles alone."""
        return {
            "batches": self.batches,
            **{name: self.counts[name] for name in COUNTS},
            "causes": dict(sorted(self.causes.items())),
            "closed_by": dict(sorted(self.closed_by.items())),
            **{name: _described(self.measures.get(name), buckets) for name in (*MEASURES, *SEEN_OVER_PREDICTED)},
            "execution_times": {step: _described(it, buckets) for step, it in sorted(self.steps.items())},
        }


def _described(it: Distribution | None, buckets: bool) -> dict[str, Any] | None:
    if it is None or not it.count:
        return None
    sum_ = round(it.sum, 5)
    told: dict[str, Any] = {
        "count": it.count,
        "sum": sum_,
        "mean": sum_ / it.count,
        "min": it.least,
        **{name: it.quantile(q) for name, q in QUANTILES.items()},
        "max": it.greatest,
    }
    return told | {"buckets": it.state()["buckets"]} if buckets else told


def _name(name: str, known: Mapping[str, object]) -> str:
    """The name to count under: whoever writes to the topic chooses them, and their number has to end somewhere."""
    return name if name in known or len(known) < MAX_NAMES else "other"
