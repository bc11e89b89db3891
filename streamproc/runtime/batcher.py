"""Decides when a window closes and which records go into a batch: first in, first out.

Passive: no thread, no clock, no I/O. It does not block, does not retry and keeps the order of arrival. A window opens
at its first record and closes at the first of: size, bytes, wait (from the arrival of its oldest record), or backlog,
when more records are known to be waiting in Kafka, so that holding these back buys nothing. While every worker is busy
nobody asks, and the window goes on growing up to its size. At shutdown and on revocation ``discard`` gives back what
was not dispatched; Kafka still has it.

Invariants: a batch is never empty; a record that alone exceeds ``max_bytes`` runs alone; a batch holds records of one
task only, of any number of partitions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from streamproc.records import Batch, Lease, Span
from streamproc.settings import BatchSettings


class Batcher:
    """The waiting records of one task."""

    def __init__(self, task: str, settings: BatchSettings, next_id: Callable[[], int]) -> None:
        self._task = task
        self._max_size = settings.max_size
        self._max_bytes = settings.max_bytes
        self._max_wait_s = settings.max_wait_ms / 1_000
        self._next_id = next_id
        self._spans: deque[Span] = deque()
        self.size = 0
        self.size_bytes = 0

    def add(self, span: Span) -> None:
        """Take records in; their window opened at ``span.arrived_at``."""
        self._spans.append(span)
        self.size += len(span.records)
        self.size_bytes += span.size_bytes

    @property
    def opened_at(self) -> float | None:
        """When the oldest waiting record arrived; None without records."""
        return self._spans[0].arrived_at if self._spans else None

    @property
    def deadline(self) -> float | None:
        """When the oldest record's wait is over; None without records."""
        return self._spans[0].arrived_at + self._max_wait_s if self._spans else None

    def full(self) -> str | None:
        """The rule by which the window is full, whoever waits: ``size`` or ``bytes``."""
        if self.size >= self._max_size:
            return "size"
        if self.size_bytes >= self._max_bytes:
            return "bytes"
        return None

    def due(self, now: float, *, backlog: bool) -> str | None:
        """The rule by which a free worker should get a batch now, or None."""
        rule = self.full()
        if rule is None and self._spans:
            if now >= self._spans[0].arrived_at + self._max_wait_s:
                return "wait"
            if backlog:
                return "backlog"
        return rule

    def take(self, now: float, rule: str) -> Batch:
        """Close the window by ``rule`` and hand its records out, oldest first; there must be some."""
        opened_at = self._spans[0].arrived_at
        taken: list[Span] = []
        room, room_bytes = self._max_size, self._max_bytes
        while self._spans and room > 0:
            span = self._spans[0]
            count = min(room, len(span.records))
            if span.size_bytes > room_bytes:
                count = self._fitting(span, count, room_bytes)
                if count == 0:
                    if taken:
                        break
                    count = 1
            self._spans.popleft()
            if count < len(span.records):
                span, rest = span.split(count)
                self._spans.appendleft(rest)
            taken.append(span)
            room -= count
            room_bytes -= span.size_bytes
        batch = Batch(
            id=self._next_id(),
            task=self._task,
            spans=taken,
            opened_at=opened_at,
            closed_at=now,
            closed_by=rule,
            fill=(self._max_size - room) / self._max_size,
        )
        self.size -= batch.size
        self.size_bytes -= batch.size_bytes
        return batch

    def discard(self, leases: set[Lease] | None = None) -> list[Span]:
        """Give back the waiting spans of these leases, or all of them."""
        gone = [span for span in self._spans if leases is None or span.lease in leases]
        if gone:
            self._spans = deque(span for span in self._spans if leases is not None and span.lease not in leases)
            self.size -= sum(len(span.records) for span in gone)
            self.size_bytes -= sum(span.size_bytes for span in gone)
        return gone

    @staticmethod
    def _fitting(span: Span, count: int, room_bytes: int) -> int:
        for index, size in enumerate(span.sizes[:count]):
            room_bytes -= max(size, 0)
            if room_bytes < 0:
                return index
        return count
