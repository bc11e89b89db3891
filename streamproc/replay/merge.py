"""The common order of several partitions: by timestamp, then topic and partition. Pure; no I/O.

Invariants:

- Each partition's own order is kept, whatever its timestamps: only the partitions' next records are compared.
- The order follows from the records alone, not from when they came: nothing is handed out while a partition that may
  have more has none here. What is kept is what was added of the partitions, and nothing else.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable

from streamproc.records import TopicPartition, TopicRecord


class Merge:
    """Merges partitions as their records come."""

    def __init__(self, partitions: Iterable[TopicPartition]) -> None:
        self.dry = set(partitions)
        """The partitions of which a record, or their end, is needed to go on."""
        self._queues: dict[TopicPartition, deque[TopicRecord]] = {it: deque() for it in self.dry}
        self._ended: set[TopicPartition] = set()
        self._heads: list[tuple[int, TopicPartition]] = []

    def add(self, partition: TopicPartition, records: Iterable[TopicRecord]) -> None:
        """More records of a partition, behind those that were added before."""
        queue = self._queues[partition]
        queue.extend(records)
        if queue and partition in self.dry:
            self.dry.discard(partition)
            heapq.heappush(self._heads, (queue[0].timestamp, partition))

    def end(self, partition: TopicPartition) -> None:
        """Nothing more comes of a partition."""
        self._ended.add(partition)
        self.dry.discard(partition)

    @property
    def done(self) -> bool:
        """Whether all partitions have ended and all of their records were taken."""
        return not self.dry and not self._heads and len(self._ended) == len(self._queues)

    def take(self) -> list[TopicRecord]:
        """The next records in the common order, until a partition runs dry."""
        taken: list[TopicRecord] = []
        while self._heads and not self.dry:
            _, partition = heapq.heappop(self._heads)
            queue = self._queues[partition]
            following = self._heads[0] if self._heads else None
            while True:
                taken.append(queue.popleft())
                if not queue:
                    if partition not in self._ended:
                        self.dry.add(partition)
                    break
                head = (queue[0].timestamp, partition)
                if following is not None and head > following:
                    heapq.heappush(self._heads, head)
                    break
        return taken
