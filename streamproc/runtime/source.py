"""Reads a task's topics, and never stops polling.

When as much is in flight as the limits allow, the partitions are paused and polling goes on, so that a batch of any
length never exceeds ``max.poll.interval.ms``. It neither retries nor reorders: records come per partition in offset
order. ``stop`` ends the reading at once, not the polling; what was handed over before is the owner's. ``hold`` pauses
the partitions until ``release``, whatever room there is.

Invariant: ``on_records`` is not called after ``stop``, and never for a partition that was paused before the poll. What
a poll that was under way brings after ``hold`` is handed over: it would not come again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from streamproc.broker.interface import Consumer
from streamproc.records import Record, TopicPartition

POLL_TIMEOUT_MS = 200
MAX_POLL_RECORDS = 5_000
RESUME_BELOW = 0.75
"""Share of a limit under which reading goes on: pausing and resuming cost a fetch each."""


class Room:
    """How much more may be in flight, in records and in bytes."""

    def __init__(self, max_records: int, max_bytes: int) -> None:
        self._max_records = max_records
        self._max_bytes = max_bytes

    def full(self, records: int, size_bytes: int) -> bool:
        """Whether a limit is reached."""
        return records >= self._max_records or size_bytes >= self._max_bytes

    def enough(self, records: int, size_bytes: int) -> bool:
        """Whether there is room enough to begin reading again."""
        return records <= self._max_records * RESUME_BELOW and size_bytes <= self._max_bytes * RESUME_BELOW

    def records(self, records: int, size_bytes: int, largest: int) -> int:
        """How many records to ask for when the largest value so far had ``largest`` bytes; at least one."""
        by_size = (self._max_bytes - size_bytes) // max(largest, 1)
        return max(1, min(MAX_POLL_RECORDS, self._max_records - records, by_size))


class Source:
    """The reading side of one task."""

    def __init__(
        self,
        consumer: Consumer,
        room: Room,
        in_flight: Callable[[], tuple[int, int]],
        on_records: Callable[[TopicPartition, Sequence[Record]], int],
        on_pause: Callable[[bool], None],
    ) -> None:
        """``on_records`` takes a partition's records and answers the bytes of the largest value."""
        self._consumer = consumer
        self._room = room
        self._in_flight = in_flight
        self._on_records = on_records
        self._on_pause = on_pause
        self._assigned: set[TopicPartition] = set()
        self._largest = 1
        self._stopped = False
        self.paused = False
        """Whether there is no room."""
        self.held = False
        """Whether the owner wants nothing."""

    async def run(self) -> None:
        """Poll until cancelled, after ``stop`` too. Raises BrokerError when the consumer cannot go on."""
        while True:
            # Room comes from settling, which says so, but also from giving back and from revocation.
            self.relieved()
            records, size_bytes = self._in_flight()
            if not self.paused and self._room.full(records, size_bytes):
                self._pause()
            wanted = self._room.records(records, size_bytes, self._largest)
            polled = await self._consumer.getmany(timeout_ms=POLL_TIMEOUT_MS, max_records=wanted)
            for partition, some in polled.items():
                if not self._stopped:
                    self._largest = max(self._largest, self._on_records(partition, some))

    def assigned(self, partitions: set[TopicPartition]) -> None:
        """These partitions are read from now on."""
        self._assigned |= partitions
        if (self.paused or self.held or self._stopped) and partitions:
            self._consumer.pause(*partitions)

    def revoked(self, partitions: set[TopicPartition]) -> None:
        """These are not read any more."""
        self._assigned -= partitions

    def relieved(self) -> None:
        """Something was settled: begin reading again if that made room enough."""
        if self.paused and not self._stopped and self._room.enough(*self._in_flight()):
            self.paused = False
            self._resume()
            self._on_pause(False)

    def hold(self) -> None:
        """Read nothing more until ``release``, also of partitions that are assigned meanwhile; polling goes on."""
        self.held = True
        if self._assigned:
            self._consumer.pause(*self._assigned)

    def release(self) -> None:
        """Begin reading again, as soon as there is room."""
        self.held = False
        self._resume()

    def stop(self) -> None:
        """Hand over nothing more; polling goes on, so that the group keeps its member while it drains."""
        self._stopped = True
        if self._assigned:
            self._consumer.pause(*self._assigned)

    def _pause(self) -> None:
        self.paused = True
        if self._assigned:
            self._consumer.pause(*self._assigned)
        self._on_pause(True)

    def _resume(self) -> None:
        if self._assigned and not (self.paused or self.held or self._stopped):
            self._consumer.resume(*self._assigned)

    @property
    def assigned_partitions(self) -> int:
        """How many partitions are assigned."""
        return len(self._assigned)
