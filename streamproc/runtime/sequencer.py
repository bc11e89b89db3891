"""Releases outcomes in the order that a task promises.

Passive: no clock, no I/O; it does not block or retry. ``expect`` announces spans in reading order, ``complete`` hands
in outcomes in whatever order workers finish and returns those that may be written now, in the order to write them.

    partition   reading order within a partition
    key         reading order within a key; records without a key are ordered among themselves
    unordered   as they complete

Held-back outcomes are records in flight for the ledger, so the back-pressure limits bound them. ``forget`` drops all
that is known of leases that have ended.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from streamproc.records import Failure, Lease, Outcome, Span


class Sequencer(Protocol):
    """What the three orders have in common."""

    def expect(self, span: Span) -> None:
        """Announce records that were read; spans of a lease come in reading order."""

    def complete(self, outcome: Outcome) -> list[Outcome]:
        """Hand in an outcome; the answer is what may be written now, in order."""

    def forget(self, leases: Iterable[Lease]) -> None:
        """Drop what is held for leases that have ended."""


class Unordered:
    """Releases every outcome at once."""

    def expect(self, span: Span) -> None:
        """Nothing to remember."""

    def complete(self, outcome: Outcome) -> list[Outcome]:
        """The outcome itself."""
        return [outcome]

    def forget(self, leases: Iterable[Lease]) -> None:
        """Nothing is held."""


@dataclass(slots=True)
class _Held:
    head: int = 0
    waiting: dict[int, Outcome] = field(default_factory=dict)


class PartitionOrder:
    """Releases the outcomes of a lease by their sequence numbers."""

    def __init__(self) -> None:
        self._held: dict[Lease, _Held] = {}

    def expect(self, span: Span) -> None:
        """Begin a lease with its first span; later ones need no announcement."""
        if span.lease not in self._held:
            self._held[span.lease] = _Held(head=span.first)

    def complete(self, outcome: Outcome) -> list[Outcome]:
        """The outcome and those behind it that waited for it, or nothing while an earlier one is missing."""
        held = self._held.get(outcome.span.lease)
        if held is None or outcome.span.first < held.head:
            return []
        if outcome.span.first != held.head:
            held.waiting[outcome.span.first] = outcome
            return []
        released = [outcome]
        held.head = outcome.span.stop
        while (following := held.waiting.pop(held.head, None)) is not None:
            released.append(following)
            held.head = following.span.stop
        return released

    def forget(self, leases: Iterable[Lease]) -> None:
        """Drop the held outcomes of these leases."""
        for lease in leases:
            self._held.pop(lease, None)


class KeyOrder:
    """Releases the outcomes of a key in reading order; other keys do not wait for it."""

    def __init__(self) -> None:
        self._queues: dict[Lease, dict[bytes | None, deque[int]]] = {}
        self._waiting: dict[Lease, dict[int, Outcome]] = {}

    def expect(self, span: Span) -> None:
        """Remember the order of the records of each key."""
        queues = self._queues.setdefault(span.lease, {})
        self._waiting.setdefault(span.lease, {})
        for sequence, record in enumerate(span.records, span.first):
            queue = queues.get(record.key)
            if queue is None:
                queues[record.key] = deque((sequence,))
            else:
                queue.append(sequence)

    def complete(self, outcome: Outcome) -> list[Outcome]:
        """The records of the outcome whose key has nothing earlier missing, and those that waited for them."""
        span = outcome.span
        queues = self._queues.get(span.lease)
        if queues is None:
            return []
        waiting = self._waiting[span.lease]
        released: list[Outcome] = []
        for index, record in enumerate(span.records):
            sequence = span.first + index
            queue = queues.get(record.key)
            if queue is None or sequence < queue[0] or sequence in waiting:
                continue
            single = _single(outcome, index)
            if sequence != queue[0]:
                waiting[sequence] = _alone(single)
                continue
            released.append(single)
            queue.popleft()
            while queue and (ready := waiting.pop(queue[0], None)) is not None:
                released.append(ready)
                queue.popleft()
            if not queue:
                del queues[record.key]
        return released

    def forget(self, leases: Iterable[Lease]) -> None:
        """Drop what is known of the keys of these leases."""
        for lease in leases:
            self._queues.pop(lease, None)
            self._waiting.pop(lease, None)


def _single(outcome: Outcome, index: int) -> Outcome:
    """The part of an outcome that is one record's, with its part of the bytes."""
    span, value = outcome.span, outcome.values[index]
    single = Span(
        span.lease,
        span.first + index,
        [span.records[index]],
        span.sizes[index : index + 1],
        span.arrived_at,
        traces=span.traces,
    )
    if not isinstance(value, Failure):
        single.output_bytes = len(value)
    return Outcome(single, outcome.statuses[index : index + 1], [value], outcome.report)


def _alone(single: Outcome) -> Outcome:
    """The outcome of one record, with a value that keeps no other's in memory while it waits."""
    (value,) = single.values
    if isinstance(value, memoryview):
        single.values = [bytes(value)]
    return single


def make_sequencer(ordering: str) -> Sequencer:
    """The sequencer for a task's ``ordering`` setting."""
    if ordering == "partition":
        return PartitionOrder()
    if ordering == "key":
        return KeyOrder()
    if ordering == "unordered":
        return Unordered()
    raise ValueError(f"no such ordering: {ordering}")
