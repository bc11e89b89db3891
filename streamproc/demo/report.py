"""What a run of the demo amounts to, computed from the records of its result, metrics and dead-letter topics alone.

Nothing here asks the processor: a count of its own that was wrong could not be found out by itself. No I/O, no clock.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

Figures = dict[str, Any]

STEPS = ("preprocess", "transform_inputs", "execute", "transform_outputs")


class Tally:
    """Takes in the values of the three topics, in any order, and adds them up.

    A record is identified by its partition and offset in the input topic, which no other record shares.
    """

    def __init__(self) -> None:
        self.results: Counter[tuple[int, int]] = Counter()
        self.first_written_ms = 0
        self.last_written_ms = 0
        self.labelled = 0
        self.right = 0
        self.batches: list[dict[str, Any]] = []
        self.batched_records = 0
        self.dead = 0
        self.first_failure = ""

    def add_result(self, value: bytes, written_at_ms: int) -> None:
        """A record of the result topic, the full envelope, and its timestamp."""
        envelope = orjson.loads(value)
        source, result = envelope["source"], envelope["result"]
        self.first_written_ms = min(self.first_written_ms or source["timestamp"], source["timestamp"])
        self.last_written_ms = max(self.last_written_ms, written_at_ms)
        self.results[source["partition"], source["offset"]] += 1
        if result["label"] is not None:
            self.labelled += 1
            self.right += result["digit"] == result["label"]

    def add_metrics(self, value: bytes) -> None:
        """A record of the metrics topic: one per batch."""
        batch = orjson.loads(value)
        self.batches.append(batch)
        self.batched_records += batch["records"]

    def add_dead_letter(self, headers: Sequence[tuple[str, bytes | None]]) -> None:
        """A record of the dead-letter topic; the first one's reason is kept."""
        self.dead += 1
        if not self.first_failure:
            reasons = dict(headers)
            kind, message = (reasons.get(f"streamproc-error-{part}") or b"?" for part in ("type", "message"))
            self.first_failure = f"{kind.decode()}: {message.decode()}"

    @property
    def total(self) -> int:
        """Results read, repeated ones among them."""
        return self.results.total()

    @property
    def latest_batch_size(self) -> int | None:
        """Records of the batch that was reported last."""
        return int(self.batches[-1]["records"]) if self.batches else None

    def is_settled(self, records: int) -> bool:
        """Whether each of so many records has become something, and each batch is accounted for."""
        return len(self.results) + self.dead >= records and self.batched_records >= records

    def figures(self, ends: Mapping[int, int], workers: int) -> Figures:
        """The figures of a run, ready for JSON; ``ends`` is the log end of each partition of the input topic.

        The seconds are those between the timestamps of the first record and of the last result, so that they do not
        depend on how fast the results were read.
        """
        expected = {(partition, offset) for partition, end in ends.items() for offset in range(end)}
        once = sum(self.results[record] == 1 for record in expected)
        sizes = [batch["batch_size"] for batch in self.batches]
        seconds = max(self.last_written_ms - self.first_written_ms, 1) / 1_000
        return {
            "records": len(expected),
            "results": self.total,
            "with_one_result": once,
            "missing": len(expected - self.results.keys()),
            "repeated": self.total - len(self.results),
            "dead_letters": self.dead,
            "first_failure": self.first_failure,
            "accuracy": round(self.right / self.labelled, 4) if self.labelled else None,
            "seconds": round(seconds, 3),
            "records_per_s": round(self.total / seconds, 1),
            "workers": workers,
            "step_times_ms": {step: spread(self._times(step)) for step in (*STEPS, "total")},
            "queue_time_ms": spread([batch["queue_time"] for batch in self.batches if "queue_time" in batch]),
            "batch_sizes": {
                "median": statistics.median(sizes) if sizes else None,
                "max": max(sizes, default=None),
            },
            "closed_by": dict(Counter(batch["closed_by"] for batch in self.batches)),
            "metrics_batches": len(self.batches),
            "metrics_records_total": self.batched_records,
        }

    def _times(self, step: str) -> list[float]:
        if step == "total":
            return [batch["total_execution_time"] for batch in self.batches if "total_execution_time" in batch]
        times = [batch["execution_times"].get(step) for batch in self.batches if "execution_times" in batch]
        return [time for time in times if time is not None]


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Median and 99th percentile, the smallest value that 99 % of the values do not exceed."""
    if not values:
        return {"median": None, "p99": None}
    ordered = sorted(values)
    return {
        "median": round(statistics.median(ordered), 3),
        "p99": round(ordered[-(-99 * len(ordered) // 100) - 1], 3),
    }


def why_incomplete(figures: Mapping[str, Any]) -> str | None:
    """None when each record has exactly one result; otherwise what is wrong, as a sentence."""
    records, results = figures["records"], figures["results"]
    if records == results == figures["with_one_result"]:
        return None
    failed = f" and {figures['dead_letters']:,} dead letters" if figures["dead_letters"] else ""
    reason = f" (the first: {figures['first_failure']})" if figures["first_failure"] else ""
    return (
        f"{records:,} records have {results:,} results{failed}{reason}: {figures['missing']:,} have none, and "
        f"{figures['repeated']:,} results are repetitions"
    )
