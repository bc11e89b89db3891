"""Records, spans and batches for tests of the data path's bookkeeping."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from streamproc.records import Batch, BatchReport, Lease, Outcome, Span, Status, TopicPartition, value_sizes


@dataclass(slots=True)
class FakeRecord:
    offset: int
    key: bytes | None = None
    value: bytes | None = b"{}"
    topic: str = "in"
    partition: int = 0
    timestamp: int = 1_700_000_000_000
    headers: Sequence[tuple[str, bytes | None]] = field(default_factory=tuple)


def lease(partition: int = 0, epoch: int = 1, topic: str = "in") -> Lease:
    return Lease(TopicPartition(topic, partition), epoch)


def span(
    of: Lease,
    first: int,
    count: int,
    *,
    value: bytes = b"{}",
    arrived_at: float = 0.0,
    keys: Sequence[bytes | None] = (),
    values: Sequence[bytes] = (),
    begin: int = 100,
) -> Span:
    """Records with the offsets from ``begin`` on, where the lease's first record has it."""
    records = [
        FakeRecord(
            offset=begin + first + index,
            key=keys[index] if keys else None,
            value=values[index] if values else value,
            topic=of.partition.topic,
            partition=of.partition.partition,
        )
        for index in range(count)
    ]
    return Span(of, first, records, value_sizes(records), arrived_at)


def batch(spans: Sequence[Span], *, number: int = 1, closed_by: str = "size", attempt: int = 1) -> Batch:
    return Batch(
        id=number,
        task="text",
        spans=spans,
        opened_at=0.0,
        closed_at=0.0,
        closed_by=closed_by,
        fill=1.0,
        attempt=attempt,
    )


def outcome(of: Span) -> Outcome:
    report = BatchReport(batch([of]), worker=0, metrics=b"{}", attempts=1)
    return Outcome(of, bytes([Status.RESULT]) * len(of.records), [b"{}"] * len(of.records), report)
