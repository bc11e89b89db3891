"""The only code that decides offsets.

Passive: no clock, no I/O. Per assigned partition it knows the records that were read, which of them are *settled*
(their result, dead letter or deliberate drop is acknowledged by the broker, or was never to be written), and so the end
of the contiguous run of settled records: the offset that may be committed. Before any is settled that is the first one
read: whoever takes over a lease that was begun at the end of a topic (``auto_offset_reset: latest``) begins there too.
What is discarded (read, but never dispatched, because the partition goes away or the process stops) leaves the books
without moving that end.

*In flight* is what is read and not settled: its values, and its results once there are some. *Outstanding* is what is
read and not committable: beside what is in flight, what was settled behind it. The limits bound both, so that one
record that takes long neither fills the memory nor lets a crash repeat more than they say.

Invariants:

- An offset is never offered for commit while a record before it is unsettled.
- Settling is idempotent; settling for a lease that has ended, or twice, changes nothing.
- A partition that is assigned again gets a new lease with a higher epoch, and nothing of the old one counts.
- Of what is settled out of order only its ends are kept, neighbours as one: never more entries than spans in flight.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from streamproc.records import Lease, Span, TopicPartition


@dataclass(slots=True, eq=False)
class _Partition:
    lease: Lease
    head: int = 0
    """Sequence number up to which everything is settled."""
    read: int = 0
    """Sequence number of the next record to be read."""
    position: int | None = None
    """Offset after the last record read."""
    first_offset: int | None = None
    """Offset of the first record read."""
    last_timestamp: int | None = None
    """Timestamp of the last record read."""
    next_offset: int | None = None
    """Offset to commit: the one after the last record of the settled run; until one is settled, the first read."""
    committed: int | None = None
    out_of_order: list[tuple[int, int, int]] = field(default_factory=list)
    """Settled runs beyond the head, in order: first sequence number, the one after the last, and the next offset."""
    arrivals: deque[tuple[int, int]] = field(default_factory=deque)
    """(sequence number after a span, timestamp of its first record) of the spans read, to date the oldest unsettled."""
    gap: int | None = None
    """Sequence number of the first record that was discarded: nothing from there on can be committed any more."""
    in_flight_records: int = 0
    in_flight_bytes: int = 0
    output_bytes: int = 0

    def is_settled(self, sequence: int) -> bool:
        """Whether the record with this number is settled."""
        if sequence < self.head:
            return True
        at = self._place(sequence)
        return at > 0 and sequence < self.out_of_order[at - 1][1]

    def add(self, first: int, stop: int, next_offset: int) -> None:
        """Join a settled run with the head, or with those that it touches."""
        at = self._place(first)
        if at < len(self.out_of_order) and self.out_of_order[at][0] == stop:
            _, stop, next_offset = self.out_of_order.pop(at)
        if first == self.head:
            self.head, self.next_offset = stop, next_offset
        elif at and self.out_of_order[at - 1][1] == first:
            self.out_of_order[at - 1] = (self.out_of_order[at - 1][0], stop, next_offset)
        else:
            self.out_of_order.insert(at, (first, stop, next_offset))

    def _place(self, sequence: int) -> int:
        """How many runs begin at this number or before it."""
        return bisect_right(self.out_of_order, (sequence, math.inf, math.inf)) if self.out_of_order else 0


class Ledger:
    """The offsets of one task."""

    def __init__(self) -> None:
        self._partitions: dict[TopicPartition, _Partition] = {}
        self._epoch = 0
        self.in_flight_records = 0
        self.in_flight_bytes = 0
        """Bytes of the values of these records, and of their results."""
        self.output_bytes = 0
        """Bytes of their results alone."""
        self.outstanding_records = 0

    def open(self, partitions: Iterable[TopicPartition]) -> list[Lease]:
        """Begin new leases, one epoch for all of them."""
        self._epoch += 1
        leases = []
        for partition in partitions:
            if partition in self._partitions:
                self.close([partition])
            lease = Lease(partition, self._epoch)
            self._partitions[partition] = _Partition(lease)
            leases.append(lease)
        return leases

    def close(self, partitions: Iterable[TopicPartition]) -> None:
        """End the leases of these partitions; whatever is still in flight for them will count for nothing."""
        for partition in partitions:
            state = self._partitions.pop(partition, None)
            if state is not None:
                self.in_flight_records -= state.in_flight_records
                self.in_flight_bytes -= state.in_flight_bytes
                self.output_bytes -= state.output_bytes
                self.outstanding_records -= state.read - state.head

    def assigned(self) -> list[TopicPartition]:
        """The partitions with a live lease."""
        return list(self._partitions)

    def leases(self) -> list[Lease]:
        """The live leases."""
        return [state.lease for state in self._partitions.values()]

    def lease(self, partition: TopicPartition) -> Lease | None:
        """The live lease of a partition, if it is assigned."""
        state = self._partitions.get(partition)
        return state.lease if state is not None else None

    def is_live(self, lease: Lease) -> bool:
        """Whether outcomes of this lease still count."""
        state = self._partitions.get(lease.partition)
        return state is not None and state.lease is lease

    def read(self, span: Span) -> None:
        """Enter records that were read; spans of a lease come in order, ``span.first`` from ``next_sequence``."""
        state = self._partitions[span.lease.partition]
        if span.first != state.read or span.lease is not state.lease:
            raise AssertionError(f"span {span.first} of {span.lease} does not continue the lease at {state.read}")
        state.read = span.stop
        state.position = span.next_offset
        if state.first_offset is None:
            # To be committed too: whoever gets the partition next, with nothing committed, might begin elsewhere.
            state.first_offset = state.next_offset = span.records[0].offset
        state.last_timestamp = span.records[-1].timestamp
        state.arrivals.append((span.stop, span.records[0].timestamp))
        self._count(state, span, 1)
        self.outstanding_records += len(span.records)

    def produced(self, span: Span, size_bytes: int) -> None:
        """A span's results are here, and wait to be written: they are in flight until the span is settled."""
        state = self._partitions.get(span.lease.partition)
        if state is not None and state.lease is span.lease and not state.is_settled(span.first):
            added = size_bytes - span.output_bytes
            span.output_bytes = size_bytes
            self._count_bytes(state, added, added)

    def next_sequence(self, lease: Lease) -> int:
        """The sequence number of the next record of a live lease."""
        return self._partitions[lease.partition].read

    def settle(self, span: Span) -> bool:
        """Mark a span's records as settled; True if that counted."""
        state = self._partitions.get(span.lease.partition)
        if state is None or state.lease is not span.lease:
            return False
        if state.is_settled(span.first):
            return False
        self._count(state, span, -1)
        head = state.head
        state.add(span.first, span.stop, span.next_offset)
        self.outstanding_records -= state.head - head
        while state.arrivals and state.arrivals[0][0] <= state.head:
            state.arrivals.popleft()
        return True

    def discard(self, span: Span) -> None:
        """Take records off the books that were read but will not be processed under this lease."""
        state = self._partitions.get(span.lease.partition)
        if state is not None and state.lease is span.lease:
            self._count(state, span, -1)
            state.gap = span.first if state.gap is None else min(state.gap, span.first)

    def loads(self) -> Iterator[tuple[TopicPartition, int, int]]:
        """Each assigned partition with its outstanding records and its bytes in flight."""
        for partition, state in self._partitions.items():
            yield partition, state.read - state.head, state.in_flight_bytes

    def in_flight(self, partitions: Iterable[TopicPartition]) -> int:
        """Records of these partitions that are read and neither settled nor discarded."""
        return sum(state.in_flight_records for p in partitions if (state := self._partitions.get(p)) is not None)

    def is_awaited(self, partitions: Iterable[TopicPartition]) -> bool:
        """Whether records of these partitions are in flight that can still be committed: none before them is given up.

        What lies behind a discarded record may wait for it for ever, in the order of its partition.
        """
        states = [state for p in partitions if (state := self._partitions.get(p)) is not None]
        return any(state.head < (state.read if state.gap is None else state.gap) for state in states)

    def committable(self, partitions: Iterable[TopicPartition] | None = None) -> dict[TopicPartition, int]:
        """The offsets to commit that are not committed yet, of these partitions or of all."""
        states = (
            self._partitions.values()
            if partitions is None
            else [self._partitions[p] for p in partitions if p in self._partitions]
        )
        return {
            state.lease.partition: state.next_offset
            for state in states
            if state.next_offset is not None and state.next_offset != state.committed
        }

    def committed(self, offsets: dict[TopicPartition, int]) -> None:
        """The broker has taken these offsets."""
        for partition, offset in offsets.items():
            state = self._partitions.get(partition)
            if state is not None and state.next_offset is not None and offset <= state.next_offset:
                state.committed = offset

    def partitions(self) -> list[PartitionBooks]:
        """What is known of each assigned partition, for status and metrics."""
        return [
            PartitionBooks(
                partition=state.lease.partition,
                epoch=state.lease.epoch,
                position=state.position,
                first_offset=state.first_offset,
                next_offset=state.next_offset,
                committed=state.committed,
                in_flight_records=state.in_flight_records,
                last_timestamp=state.last_timestamp,
                oldest_timestamp=state.arrivals[0][1] if state.arrivals else None,
            )
            for state in self._partitions.values()
        ]

    def _count(self, state: _Partition, span: Span, sign: int) -> None:
        records = sign * len(span.records)
        state.in_flight_records += records
        self.in_flight_records += records
        outputs = sign * span.output_bytes
        self._count_bytes(state, sign * span.size_bytes + outputs, outputs)

    def _count_bytes(self, state: _Partition, size: int, outputs: int) -> None:
        state.in_flight_bytes += size
        self.in_flight_bytes += size
        state.output_bytes += outputs
        self.output_bytes += outputs


@dataclass(frozen=True, slots=True)
class PartitionBooks:
    """One assigned partition: offsets, records in flight, timestamps (ms) of the last and oldest unsettled record."""

    partition: TopicPartition
    epoch: int
    position: int | None
    first_offset: int | None
    next_offset: int | None
    committed: int | None
    in_flight_records: int
    last_timestamp: int | None
    oldest_timestamp: int | None
