"""Reads a task's topics, and never stops polling.

When as much is outstanding as the limits allow, partitions are paused, first those that have more than their share; and
polling goes on, so that a batch of any length never exceeds ``max.poll.interval.ms``. It neither retries nor reorders:
records come per partition in offset order. ``stop`` ends the reading at once, not the polling; what was handed over
before is the owner's. ``hold`` pauses the partitions until ``release``, whatever room there is.

Invariant: ``on_records`` is not called after ``stop``, and never for a partition that was paused before the poll. What
a poll that was under way brings after ``hold`` is handed over: it would not come again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from streamproc.broker.interface import Consumer
from streamproc.records import Record, TopicPartition

POLL_TIMEOUT_MS = 200
MAX_POLL_RECORDS = 1_000
"""A poll is parsed in one go, which nothing else of the event loop can interrupt: so many take about 4 ms."""
REOPEN_AT = 0.25
"""How much of the shared half must be free before it is open again, so that it is not filled record by record."""
LARGEST_KEPT = 7 / 8
"""What remains, from one poll to the next, of the largest value that was seen: one large record is not the rule."""


Load = tuple[TopicPartition, int, int]
"""What a partition has outstanding: records, and bytes of values and results."""


class Room:
    """How much more may be read, in records and in bytes, and of which partitions.

    Half of a limit is reserved, an equal share for each partition; the other half is shared, and holds what partitions
    have beyond their shares. While there is room in the shared half everything is read. Once it is used up a partition
    is read while half of its own share is free, so that one that is stuck leaves the others theirs. A limit of fewer
    records than two a partition has no shares.

    Passive; it is asked before each poll. In records the limit is never exceeded. In bytes one poll may exceed it: how
    large a record is shows when it is there.
    """

    def __init__(self, max_records: int, max_bytes: int) -> None:
        self._limits = (max_records, max_bytes)
        self.divide(1)

    def divide(self, partitions: int) -> None:
        """So many partitions are assigned."""
        records, size_bytes = self._limits
        count = max(partitions, 1)
        own, own_bytes = self._shares = (records // 2 // count, size_bytes // 2 // count)
        shared, shared_bytes = self._shared = (records - count * own, size_bytes - count * own_bytes)
        # Half a share is also what a poll may bring then: of whichever partition, it has room for that.
        chunk, chunk_bytes = self._chunks = (max(own // 2, 1), max(own_bytes // 2, 1))
        self._enough = (max(int(shared * REOPEN_AT), chunk), max(int(shared_bytes * REOPEN_AT), chunk_bytes))
        self._shared_open = True
        self._free = self._shared
        self._seen = (0, 0)

    def look(self, records: int, size_bytes: int, loads: Callable[[], Iterable[Load]]) -> set[TopicPartition]:
        """The partitions that are not to be read now.

        ``records`` and ``size_bytes`` are what is outstanding altogether; ``loads`` is asked only where little is left.
        """
        self._seen = (records, size_bytes)
        shared = self._shared
        if records * 2 <= shared[0] and size_bytes * 2 <= shared[1]:
            self._shared_open = True
            self._free = (shared[0] - records, shared[1] - size_bytes)
            return set()
        own, own_bytes = self._shares
        known = list(loads())
        free = shared[0] - sum([count - own for _, count, _ in known if count > own])
        free_bytes = shared[1] - sum([size - own_bytes for _, _, size in known if size > own_bytes])
        least, least_bytes = (1, 1) if self._shared_open else self._enough
        self._shared_open = free >= least and free_bytes >= least_bytes
        if self._shared_open:
            self._free = (free, free_bytes)
            return set()
        self._free = self._chunks
        if records >= self._limits[0] or size_bytes >= self._limits[1]:
            return {partition for partition, _, _ in known}
        most, most_bytes = own - self._chunks[0], own_bytes - self._chunks[1]
        return {partition for partition, count, size in known if count > most or size > most_bytes}

    def wanted(self, largest: int) -> int:
        """How many records to ask for after a look, when the largest value had ``largest`` bytes; at least one.

        So few that no partition gets more than it has room for, whichever they come from.
        """
        return max(1, min(MAX_POLL_RECORDS, self._free[0], self._free[1] // max(largest, 1)))

    def eased(self, records: int, size_bytes: int) -> bool:
        """Whether so much was settled since the last look that another one may find room."""
        seen, chunks = self._seen, self._chunks
        return (seen[0] - records) * 2 >= chunks[0] or (seen[1] - size_bytes) * 2 >= chunks[1]


class Source:
    """The reading side of one task."""

    def __init__(
        self,
        consumer: Consumer,
        room: Room,
        outstanding: Callable[[], tuple[int, int]],
        loads: Callable[[], Iterable[Load]],
        *,
        on_records: Callable[[TopicPartition, Sequence[Record]], int],
        on_pause: Callable[[bool], None],
    ) -> None:
        """``outstanding`` answers the records and bytes of all partitions, ``loads`` those of each.

        ``on_records`` takes a partition's records and answers the bytes of the largest value. ``on_pause`` is told when
        back-pressure begins for a first partition, and when it has ended for the last.
        """
        self._consumer = consumer
        self._room = room
        self._outstanding = outstanding
        self._loads = loads
        self._on_records = on_records
        self._on_pause = on_pause
        self._assigned: set[TopicPartition] = set()
        self._largest = 1
        self._stopped = False
        self.paused: set[TopicPartition] = set()
        """The partitions that back-pressure keeps from being read."""
        self.held = False
        """Whether the owner wants nothing."""

    async def run(self) -> None:
        """Poll until cancelled, after ``stop`` too. Raises BrokerError when the consumer cannot go on."""
        while True:
            # Room comes from settling, which says so, but also from giving back and from revocation.
            if not self._stopped:
                self._look()
            wanted = self._room.wanted(self._largest)
            polled = await self._consumer.getmany(timeout_ms=POLL_TIMEOUT_MS, max_records=wanted)
            if polled:
                self._largest = int(self._largest * LARGEST_KEPT)
            for partition, some in polled.items():
                if not self._stopped:
                    self._largest = max(self._largest, self._on_records(partition, some))

    def assigned(self, partitions: set[TopicPartition]) -> None:
        """These partitions are read from now on."""
        self._assigned |= partitions
        self._room.divide(len(self._assigned))
        if (self.held or self._stopped) and partitions:
            self._consumer.pause(*partitions)

    def revoked(self, partitions: set[TopicPartition]) -> None:
        """These are not read any more."""
        self._assigned -= partitions
        self.paused -= partitions

    def suspend(self, partitions: set[TopicPartition]) -> None:
        """Read nothing of these until ``go_on``, or until they are assigned anew."""
        self.revoked(partitions)
        self._consumer.pause(*partitions)

    def go_on(self, partitions: set[TopicPartition]) -> None:
        """Read these again, as far as there is room and the owner wants them."""
        self._consumer.resume(*partitions)
        self.assigned(partitions)

    def reload(self, room: Room) -> None:
        """Read by other limits, from the next poll on."""
        self._room = room
        room.divide(len(self._assigned))

    def relieved(self) -> None:
        """Something was settled: begin reading again if that made room enough."""
        if self.paused and not self._stopped and self._room.eased(*self._outstanding()):
            self._look()

    def hold(self) -> None:
        """Read nothing more until ``release``, also of partitions that are assigned meanwhile; polling goes on."""
        self.held = True
        if self._assigned:
            self._consumer.pause(*self._assigned)

    def release(self) -> None:
        """Begin reading again, as soon as there is room."""
        self.held = False
        if not self._stopped and (readable := self._assigned - self.paused):
            self._consumer.resume(*readable)

    def stop(self) -> None:
        """Hand over nothing more; polling goes on, so that the group keeps its member while it drains."""
        self._stopped = True
        if self._assigned:
            self._consumer.pause(*self._assigned)

    def _look(self) -> None:
        """Pause and resume as the room says."""
        before = self.paused
        closed = self._room.look(*self._outstanding(), self._loads)
        if not closed and not before:
            return
        # Those that are being revoked are in the books still, and none of ours any more.
        self.paused = closed = closed & self._assigned
        if closing := closed - before:
            self._consumer.pause(*closing)
        if not self.held and (opening := before - closed):
            self._consumer.resume(*opening)
        if bool(closed) != bool(before):
            self._on_pause(bool(closed))

    @property
    def assigned_partitions(self) -> int:
        """How many partitions are assigned."""
        return len(self._assigned)
