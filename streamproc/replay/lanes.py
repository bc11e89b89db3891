"""Writes replayed records: a lane for each partition that is written to, in whole batches.

Invariants:

- The records of one source partition go to one partition, in their order; with ``by_key``, those of one key do.
- A lane whose batch is on its way gathers what comes meanwhile, so batches grow with the load; a full one is queued at
  once. Nothing else decides about batches, whatever the pace.
- Every record has the marks of the run, and is counted once it is acknowledged.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

from streamproc.broker.interface import BatchBuilder, Producer, Row
from streamproc.record_lines import PlacedRecord
from streamproc.replay.marks import Source, mark
from streamproc.replay.pace import Deviation

PartitionOfKey = Callable[[bytes, int], int]
Stamp = Callable[[int], int | None]
"""The timestamp to write, by that of the capture; None for the time of writing."""


@dataclass(slots=True, eq=False)
class _Lane:
    """What goes to one partition."""

    topic: str
    partition: int
    max_bytes: int | None
    rows: list[Row] = field(default_factory=list)
    batch: BatchBuilder | None = None
    dues: list[float] = field(default_factory=list)
    """Of the records in the batch and in the rows, where the pace matters."""
    before: tuple[float, float] | None = None
    in_flight: int = 0


@dataclass(frozen=True, slots=True)
class _Target:
    """A topic that is written to."""

    topic: str
    partitions: int
    max_bytes: int | None


class Lanes:
    """Where a run writes to.

    Args:
        producer: Started, and stopped, by the caller.
        run: The id of the run.
        target_of: The topic to write to, by that of the capture. May raise StreamprocError.
        stamp: The timestamp to write.
        partition_of_key: With it, a key decides the partition. Without, and for records that have none, a record goes
            to the partition that it came from (modulo the topic's, where that has fewer).
        before_topic: Awaited with the first record of each topic of the capture and the topic that it goes to.
        on_acknowledged: Called with the number of records.
        deviation: Where to count how well the pace is kept.
    """

    def __init__(
        self,
        producer: Producer,
        run: str,
        *,
        target_of: Callable[[str], str],
        stamp: Stamp,
        partition_of_key: PartitionOfKey | None = None,
        before_topic: Callable[[PlacedRecord, str], Awaitable[None]] | None = None,
        on_acknowledged: Callable[[int], None],
        deviation: Deviation | None = None,
    ) -> None:
        self._producer = producer
        self._run = run
        self._target_of = target_of
        self._stamp = stamp
        self._partition_of_key = partition_of_key
        self._before_topic = before_topic
        self._on_acknowledged = on_acknowledged
        self._deviation = deviation
        self._targets: dict[str, _Target] = {}
        """By topic of the capture."""
        self._lanes: dict[tuple[str, int], _Lane] = {}
        self._by_source: dict[tuple[str, int], _Lane] = {}
        self._pending: set[asyncio.Future[object]] = set()
        self._gathering: set[_Lane] = set()
        """Lanes with a batch that is not full and waits for the one on its way."""
        self._error: BaseException | None = None
        self._waker: asyncio.Future[None] | None = None

    @property
    def partitions(self) -> list[tuple[str, int]]:
        """The partitions that were written to."""
        return list(self._lanes)

    async def prepare(self, records: Iterable[PlacedRecord]) -> None:
        """Look up where records go that are due later, so that no record waits for that. Raises as ``send``."""
        for record in records:
            if record.topic not in self._targets:
                self._targets[record.topic] = await self._look_up(record)

    async def send(self, records: Iterable[PlacedRecord], dues: list[float], now: float) -> None:
        """Write records, due at ``dues`` and sent at ``now``, both in seconds after the start.

        Waits while too much is queued.

        Raises:
            StreamprocError: a topic is missing, or a batch could not be written; what was queued may be.
        """
        touched = set()
        run, stamp, timed = self._run, self._stamp, self._deviation is not None
        for record, due in zip(records, dues, strict=True):
            topic, partition, offset, timestamp, key, value, headers = record
            lane = self._by_source.get((topic, partition))
            if lane is None:
                lane = await self._lane_of(record)
            lane.rows.append((stamp(timestamp), key, value, mark(headers, run, Source(topic, partition, offset))))
            if timed:
                lane.dues.append(due)
            touched.add(lane)
        for lane in touched:
            await self._fill(lane, now)
        self._check()

    async def pause(self, seconds: float) -> None:
        """Wait for a time, or until a lane can write what it has gathered."""
        loop = asyncio.get_running_loop()
        self._waker = loop.create_future()
        timer = loop.call_later(seconds, self._wake)
        try:
            await self._waker
        finally:
            timer.cancel()
            self._waker = None

    async def write_gathered(self, now: float) -> None:
        """Write what lanes have gathered whose batch has arrived."""
        for lane in [it for it in self._gathering if not it.in_flight]:
            await self._submit(lane, now)
        self._check()

    async def finish(self, now: float) -> None:
        """Write the rest, and wait until all is acknowledged. Raises as ``send``."""
        for lane in list(self._gathering):
            await self._submit(lane, now)
        if self._pending:
            await asyncio.wait(self._pending)
        self._check()

    async def _lane_of(self, record: PlacedRecord) -> _Lane:
        await self.prepare([record])
        target = self._targets[record.topic]
        if self._partition_of_key is not None and record.key is not None:
            partition = self._partition_of_key(record.key, target.partitions)
        else:
            partition = record.partition % target.partitions
        lane = self._lanes.get((target.topic, partition))
        if lane is None:
            lane = self._lanes[target.topic, partition] = _Lane(target.topic, partition, target.max_bytes)
        if self._partition_of_key is None:
            self._by_source[record.topic, record.partition] = lane
        return lane

    async def _look_up(self, record: PlacedRecord) -> _Target:
        topic = self._target_of(record.topic)
        partitions = await self._producer.partition_count(topic)
        if self._before_topic is not None:
            await self._before_topic(record, topic)
        return _Target(topic, partitions, await self._producer.max_message_bytes(topic))

    async def _fill(self, lane: _Lane, now: float) -> None:
        rows, start = lane.rows, 0
        while True:
            if lane.batch is None:
                lane.batch = self._producer.create_batch(lane.max_bytes)
            start += lane.batch.extend(rows, start)
            if start == len(rows):
                break
            await self._submit(lane, now)
        rows.clear()
        if lane.in_flight:
            self._gathering.add(lane)
        else:
            await self._submit(lane, now)

    async def _submit(self, lane: _Lane, now: float) -> None:
        batch, lane.batch = lane.batch, None
        self._gathering.discard(lane)
        if batch is None:
            return
        count = batch.record_count()
        if self._deviation is not None:
            lane.before = self._deviation.observe(lane.dues[:count], lane.before, now)
            del lane.dues[:count]
        future = await self._producer.send_batch(batch, lane.topic, lane.partition)
        lane.in_flight += 1
        self._pending.add(future)
        future.add_done_callback(partial(self._arrived, lane, count))

    def _arrived(self, lane: _Lane, count: int, future: asyncio.Future[object]) -> None:
        self._pending.discard(future)
        lane.in_flight -= 1
        if not lane.in_flight and lane in self._gathering:
            self._wake()
        if future.cancelled():
            return
        if (error := future.exception()) is not None:
            self._error = self._error or error
            self._wake()
        else:
            self._on_acknowledged(count)

    def _wake(self) -> None:
        if self._waker is not None and not self._waker.done():
            self._waker.set_result(None)

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
