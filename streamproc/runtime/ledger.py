"""The only code that decides offsets.

Passive: no clock, no I/O. Per assigned partition it knows the records that were read, which of them are *settled*
(their result, dead letter or deliberate drop is acknowledged by the broker, or was never to be written), and so the end
of the contiguous run of settled records: the offset that may be committed. What is discarded (read, but never
dispatched, because the partition goes away or the process stops) leaves the books without moving that end.

Invariants:

- An offset is never offered for commit while a record before it is unsettled.
- Settling is idempotent; settling for a lease that has ended, or twice, changes nothing.
- A partition that is assigned again gets a new lease with a higher epoch, and nothing of the old one counts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
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
    """Offset to commit: the one after the last record of the settled run; None until one is settled."""
    committed: int | None = None
    out_of_order: dict[int, Span] = field(default_factory=dict)
    """Settled spans that begin beyond the head, by their first sequence number."""
    arrivals: deque[tuple[int, int]] = field(default_factory=deque)
    """(sequence number after a span, timestamp of its first record) of the spans read, to date the oldest unsettled."""
    in_flight_records: int = 0
    in_flight_bytes: int = 0


class Ledger:
    """The offsets of one task."""

    def __init__(self) -> None:
        self._partitions: dict[TopicPartition, _Partition] = {}
        self._epoch = 0
        self.in_flight_records = 0
        self.in_flight_bytes = 0

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
            state.first_offset = span.records[0].offset
        state.last_timestamp = span.records[-1].timestamp
        state.arrivals.append((span.stop, span.records[0].timestamp))
        self._count(state, span, 1)

    def next_sequence(self, lease: Lease) -> int:
        """The sequence number of the next record of a live lease."""
        return self._partitions[lease.partition].read

    def settle(self, span: Span) -> bool:
        """Mark a span's records as settled; True if that counted."""
        state = self._partitions.get(span.lease.partition)
        if state is None or state.lease is not span.lease:
            return False
        if span.first < state.head or span.first in state.out_of_order:
            return False
        self._count(state, span, -1)
        if span.first != state.head:
            state.out_of_order[span.first] = span
            return True
        last = span
        while (following := state.out_of_order.pop(last.stop, None)) is not None:
            last = following
        state.head = last.stop
        state.next_offset = last.next_offset
        while state.arrivals and state.arrivals[0][0] <= state.head:
            state.arrivals.popleft()
        return True

    def discard(self, span: Span) -> None:
        """Take records off the books that were read but will not be processed under this lease."""
        state = self._partitions.get(span.lease.partition)
        if state is not None and state.lease is span.lease:
            self._count(state, span, -1)

    def in_flight(self, partitions: Iterable[TopicPartition]) -> int:
        """Records of these partitions that are read and neither settled nor discarded."""
        return sum(state.in_flight_records for p in partitions if (state := self._partitions.get(p)) is not None)

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
        records, size = sign * len(span.records), sign * span.size_bytes
        state.in_flight_records += records
        state.in_flight_bytes += size
        self.in_flight_records += records
        self.in_flight_bytes += size


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
