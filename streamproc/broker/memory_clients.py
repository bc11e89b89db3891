"""Consumer and producer of the in-memory broker; see ``streamproc.testing``."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Self

from streamproc.broker.interface import (
    NO_GENERATION,
    BatchBuilder,
    Headers,
    Membership,
    OffsetReset,
    Rebalanced,
    Row,
)
from streamproc.broker.memory_group import MemoryGroup, moved_on
from streamproc.broker.memory_log import BATCH_OVERHEAD, MemoryRecord, size_of
from streamproc.broker.privileges import AclOperation
from streamproc.errors import BrokerError, RecordTooLargeError, TransactionAbortedError
from streamproc.records import Record, TopicPartition, TopicRecord

if TYPE_CHECKING:
    from streamproc.broker.memory import MemoryBroker


class MemoryConsumer:
    """Implements ``interface.Consumer`` for a ``MemoryBroker``; made by its ``consumer()``."""

    def __init__(self, broker: MemoryBroker, group: MemoryGroup, group_id: str, auto_offset_reset: OffsetReset) -> None:
        self.topics: frozenset[str] = frozenset()
        self.assigned: set[TopicPartition] = set()
        self._broker = broker
        self._group = group
        self._group_id = group_id
        self._auto_offset_reset = auto_offset_reset
        self._on_revoked: Rebalanced | None = None
        self._on_assigned: Rebalanced | None = None
        self._generation = 0
        self._positions: dict[TopicPartition, int] = {}
        self._highwater: dict[TopicPartition, int] = {}
        self._paused: set[TopicPartition] = set()
        self._order: list[TopicPartition] = []
        self._rebalancing = True
        self._may_commit = False
        self._expelled = False
        self._rejoining = False
        self._stopped = False
        self._error: BaseException | None = None

    async def start(self, topics: Sequence[str], on_revoked: Rebalanced, on_assigned: Rebalanced) -> None:
        """Join the group; returns after ``on_assigned``."""
        self._broker.maybe_fail("start")
        self._broker.check_topics(topics)
        self.topics = frozenset(topics)
        self._on_revoked = on_revoked
        self._on_assigned = on_assigned
        await self._group.join(self)

    async def stop(self) -> None:
        """Leave the group; commits nothing, calls no callback."""
        if not self._stopped:
            self._stopped = True
            self._may_commit = False
            self._group.leave(self)
            self._broker.changed()

    async def getmany(self, *, timeout_ms: int, max_records: int) -> Mapping[TopicPartition, Sequence[Record]]:
        """Records by partition, in offset order; the partition that was served first is served last next time."""
        self._broker.maybe_fail("getmany")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_ms / 1000
        # A broker in another process would answer later, so let the others on the loop run in any case.
        await asyncio.sleep(0)
        while True:
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            if self._expelled and not self._rejoining:
                self._rejoin()
            found = {} if self._rebalancing or self._stopped else self._take(max_records)
            remaining = deadline - loop.time()
            if found or remaining <= 0 or self._stopped:
                return found
            await asyncio.wait([self._broker.next_change()], timeout=remaining)

    def pause(self, *partitions: TopicPartition) -> None:
        """Return no more of these until ``resume``; revocation forgets it."""
        self._paused.update(partitions)

    def resume(self, *partitions: TopicPartition) -> None:
        """Return records of these again."""
        self._paused.difference_update(partitions)
        self._broker.changed()

    async def commit(self, offsets: Mapping[TopicPartition, int]) -> None:
        """Commit the next offset to read of each partition; all of them or none."""
        self._broker.maybe_fail("commit")
        await asyncio.sleep(0)
        current = self._may_commit and not self._expelled and self._generation == self._group.generation
        if not current or not offsets.keys() <= self.assigned:
            raise moved_on(self._group_id)
        self._group.offsets.update({TopicPartition(*partition): offset for partition, offset in offsets.items()})
        self._broker.changed()

    async def rewind(self, starts: Mapping[TopicPartition, int]) -> None:
        """Read these partitions from their committed offsets on, or from ``starts`` where there is none."""
        generation = self._generation
        self._broker.maybe_fail("committed")
        await asyncio.sleep(0)
        if self._generation == generation and not self._rebalancing:
            for partition in starts.keys() & self.assigned:
                self._positions[partition] = self._group.offsets.get(partition, starts[partition])
            self._broker.changed()

    def membership(self) -> Membership:
        """Who we are in the group."""
        if not self._may_commit:
            raise moved_on(self._group_id)
        return Membership(self._group_id, self._generation, f"member-{id(self)}", None)

    def connected(self) -> bool:
        """Whether it was started and not stopped."""
        return self._on_assigned is not None and not self._stopped

    def is_member(self) -> bool:
        """Whether the broker has not expelled it."""
        return not self._expelled

    def position(self, partition: TopicPartition) -> int | None:
        """The next offset to fetch of an assigned partition."""
        return self._positions.get(partition)

    def highwater(self, partition: TopicPartition) -> int | None:
        """The log end of an assigned partition as of the last ``getmany`` that looked at it."""
        return self._highwater.get(partition)

    async def end_offsets(self, partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, int]:
        """The log end of each partition."""
        self._broker.maybe_fail("end_offsets")
        return {partition: self._broker.log(partition).end for partition in partitions}

    async def committed(self, partition: TopicPartition) -> int | None:
        """The group's committed offset of a partition."""
        self._broker.maybe_fail("committed")
        return self._group.offsets.get(partition)

    async def revoke(self) -> None:
        """Called by the group: let go of everything."""
        self._rebalancing = True
        if self.assigned:
            await self._call(self._on_revoked, set(self.assigned))
        self._may_commit = False
        self.assigned = set()
        self._paused.clear()
        self._positions.clear()
        self._highwater.clear()

    async def assign(self, partitions: set[TopicPartition], generation: int) -> None:
        """Called by the group: take these from now on."""
        self.assigned = partitions
        self._generation = generation
        self._positions = {partition: self._first_offset(partition) for partition in partitions}
        self._order = sorted(partitions)
        self._may_commit = not self._stopped
        await self._call(self._on_assigned, set(partitions))
        self._rebalancing = False
        self._broker.changed()

    def expel(self) -> None:
        """Called by the broker: be out of the group without knowing it yet."""
        self._expelled = True
        self._group.leave(self)

    def _rejoin(self) -> None:
        self._rejoining = True
        self._rebalancing = True
        self._may_commit = False
        self._broker.background(self._revoke_and_join())

    async def _revoke_and_join(self) -> None:
        await self.revoke()
        self._expelled = self._rejoining = False
        if not self._stopped:
            await self._group.join(self)

    async def _call(self, callback: Rebalanced | None, partitions: set[TopicPartition]) -> None:
        if callback is None or self._stopped:
            return
        try:
            await callback(partitions)
        except Exception as error:  # noqa: BLE001 - it is raised again, in the task that reads
            self._error = error
            self._broker.changed()

    def _first_offset(self, partition: TopicPartition) -> int:
        log = self._broker.log(partition)
        reset = log.begin if self._auto_offset_reset == "earliest" else log.end
        offset = self._group.offsets.get(partition, reset)
        return offset if log.begin <= offset <= log.end else reset

    def _take(self, max_records: int) -> dict[TopicPartition, Sequence[Record]]:
        found: dict[TopicPartition, Sequence[Record]] = {}
        left = max_records
        for partition in list(self._order):
            if partition in self._paused:
                continue
            log = self._broker.log(partition)
            self._highwater[partition] = log.end
            if left and (records := log.read(self._positions[partition], left)):
                found[partition] = records
                left -= len(records)
                self._positions[partition] = records[-1].offset + 1
                self._order.remove(partition)
                self._order.append(partition)
        return found


def _check_generation(group: MemoryGroup, member: Membership) -> None:
    if member.generation not in (NO_GENERATION, group.generation):
        raise moved_on(member.group_id)


class MemoryReader:
    """Implements ``interface.Reader`` for a ``MemoryBroker``; made by its ``reader()``."""

    def __init__(self, broker: MemoryBroker) -> None:
        self._broker = broker
        self._positions: dict[TopicPartition, int] = {}
        self._dropped: set[TopicPartition] = set()

    async def __aenter__(self) -> Self:
        self._broker.maybe_fail("start")
        return self

    async def __aexit__(self, *exc: object) -> None:
        return None

    def assign(self, positions: Mapping[TopicPartition, int]) -> None:
        """Read these partitions, from these offsets on, in place of what was read before."""
        self._positions = dict(positions)
        self._dropped = set()

    def drop(self, *partitions: TopicPartition) -> None:
        """Read no more of these."""
        self._dropped.update(partitions)

    async def getmany(
        self, *, timeout_ms: int, max_records: int | None = None, partitions: Collection[TopicPartition] = ()
    ) -> Mapping[TopicPartition, Sequence[TopicRecord]]:
        """Records by partition, in offset order; with ``partitions``, those of these only."""
        self._broker.maybe_fail("getmany")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_ms / 1000
        await asyncio.sleep(0)
        wanted = set(partitions or self._positions) - self._dropped
        while not (found := self._take(wanted, sys.maxsize if max_records is None else max_records)):
            remaining = deadline - loop.time()
            if remaining <= 0:
                break
            await asyncio.wait([self._broker.next_change()], timeout=remaining)
        return found

    async def position(self, partition: TopicPartition) -> int:
        """The next offset to read."""
        log, position = self._broker.log(partition), self._positions[partition]
        # As a client's after a fetch that brought nothing: past what was compacted away.
        return position if log.read(position, 1) else max(position, log.end)

    def _take(
        self, wanted: Collection[TopicPartition], max_records: int
    ) -> dict[TopicPartition, Sequence[TopicRecord]]:
        found: dict[TopicPartition, Sequence[TopicRecord]] = {}
        for partition, position in self._positions.items():
            if partition in wanted and (records := self._broker.log(partition).read(position, max_records)):
                found[partition] = records
                max_records -= len(records)
        self._positions |= {partition: records[-1].offset + 1 for partition, records in found.items()}
        return found


class MemoryBatch:
    """A batch under construction, which takes records until it has the size of its limit."""

    def __init__(self, max_bytes: int, now_ms: int) -> None:
        self.size = BATCH_OVERHEAD
        self.records: list[tuple[int, bytes | None, bytes | None, tuple[tuple[str, bytes | None], ...]]] = []
        self._max_bytes = max_bytes
        self._now_ms = now_ms
        self._full = False

    def append(
        self, *, timestamp: int | None, key: bytes | None, value: bytes | memoryview | None, headers: Headers = ()
    ) -> object | None:
        """Add a record; None when it does not fit any more, and the batch takes no further ones."""
        size = size_of(key, value, headers)
        if self._full or (self.records and self.size + size > self._max_bytes):
            self._full = True
            return None
        self.size += size
        kept = None if value is None else bytes(value)
        self.records.append((self._now_ms if timestamp is None else timestamp, key, kept, tuple(headers)))
        return self.records[-1]

    def extend(self, rows: Sequence[Row], start: int) -> int:
        """Add ``rows[start:]`` as far as they fit; how many did."""
        before = self.record_count()
        for timestamp, key, value, headers in rows[start:]:
            if self.append(timestamp=timestamp, key=key, value=value, headers=headers) is None:
                break
        return self.record_count() - before

    def record_count(self) -> int:
        """How many records it holds."""
        return len(self.records)


class MemoryProducer:
    """Implements ``interface.Producer`` for a ``MemoryBroker``; made by its ``producer()``."""

    def __init__(self, broker: MemoryBroker, max_batch_bytes: int) -> None:
        self._broker = broker
        self._max_batch_bytes = max_batch_bytes
        self._unanswered: set[asyncio.Future[object]] = set()
        self._stopped = False

    async def start(self) -> None:
        """Connect."""
        self._broker.maybe_fail("start")

    async def stop(self) -> None:
        """Wait for what was submitted; while acknowledgements are held, that is for ever."""
        self._stopped = True
        while self._unanswered:
            await asyncio.wait(set(self._unanswered))

    def create_batch(self, max_bytes: int | None = None) -> BatchBuilder:
        """An empty batch of at most ``max_bytes``, or of the producer's own limit."""
        limit = self._max_batch_bytes if max_bytes is None else min(max_bytes, self._max_batch_bytes)
        return MemoryBatch(limit, self._broker.now_ms())

    async def send_batch(
        self,
        batch: BatchBuilder,
        topic: str,
        partition: int,
        *,
        patient: bool = True,  # noqa: ARG002 - nothing is waited for here
    ) -> asyncio.Future[object]:
        """Write a batch; the future resolves in a later iteration of the loop, in order."""
        self._broker.maybe_fail("send_batch")
        self._broker.check_topics([topic])
        count = self._broker.partitions_of(topic)
        if self._stopped or not 0 <= partition < count:
            problem = "the producer is stopped" if self._stopped else f"it has {count} partitions"
            raise BrokerError(f"could not write to partition {partition} of topic {topic}: {problem}")
        if not isinstance(batch, MemoryBatch):
            raise TypeError(f"{type(batch).__name__} is no batch of this producer's")
        future: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self._unanswered.add(future)
        future.add_done_callback(self._unanswered.discard)
        self._broker.answer_soon(partial(self._write, future, batch, TopicPartition(topic, partition)))
        return future

    async def partition_count(self, topic: str, *, operation: AclOperation = "Write") -> int:  # noqa: ARG002 - all is allowed
        """How many partitions the topic has."""
        self._broker.maybe_fail("partition_count")
        self._broker.check_topics([topic])
        return self._broker.partitions_of(topic)

    async def max_message_bytes(self, topic: str) -> int | None:
        """The size of the largest batch that the topic takes."""
        self._broker.check_topics([topic])
        return self._broker.topic(topic).max_message_bytes

    def _write(self, future: asyncio.Future[object], batch: MemoryBatch, to: TopicPartition) -> None:
        try:
            self._broker.maybe_fail("write")
            base = self._take(batch, to)
        except BrokerError as error:
            if not future.done():  # else its caller gave it up, which does not undo the sending
                future.set_exception(error)
        else:
            if not future.done():
                future.set_result(base)
            self._broker.changed()

    def _take(self, batch: MemoryBatch, to: TopicPartition) -> int:
        """The broker's side of a batch: the offset of its first record. Raises RecordTooLargeError."""
        self._check_size(batch, to)
        return self._append(batch, to)

    def _check_size(self, batch: MemoryBatch, to: TopicPartition) -> None:
        limit = self._broker.topic(to.topic).max_message_bytes
        if batch.records and batch.size > limit:
            raise RecordTooLargeError(
                f"could not write to topic {to.topic}: the batch exceeds max.message.bytes of topic {to.topic} "
                f"({batch.size} > {limit} bytes)"
            )

    def _append(self, batch: MemoryBatch, to: TopicPartition) -> int:
        log = self._broker.log(to)
        base = log.end
        for timestamp, key, value, headers in batch.records:
            log.append(MemoryRecord(*to, log.end, timestamp, key, value, headers))
        return base


class MemoryTransactionalProducer(MemoryProducer):
    """Implements ``interface.TransactionalProducer`` for a ``MemoryBroker``; made by ``transactional_producer()``.

    What a transaction holds is in no log before it is committed, and then all at once.
    """

    def __init__(self, broker: MemoryBroker, max_batch_bytes: int, transactional_id: str) -> None:
        super().__init__(broker, max_batch_bytes)
        self._id = transactional_id
        self._epoch = -1
        self._taken: list[tuple[MemoryBatch, TopicPartition]] = []
        self._lost = False

    async def start(self) -> None:
        """Connect, and fence those that were started with this id before."""
        await super().start()
        self._epoch = self._broker.begin_epoch(self._id)

    @property
    def in_transaction(self) -> bool:
        """Whether something was sent since the last commit that can still be committed."""
        return bool(self._taken or self._unanswered) and not self._lost

    async def send_batch(
        self,
        batch: BatchBuilder,
        topic: str,
        partition: int,
        *,
        patient: bool = True,  # noqa: ARG002 - nothing is waited for here
    ) -> asyncio.Future[object]:
        """Take a batch into the transaction."""
        self._check()
        return await super().send_batch(batch, topic, partition)

    async def commit_transaction(self, offsets: Mapping[TopicPartition, int], member: Membership) -> None:
        """Write what was taken, and commit the offsets, or neither."""
        self._check()
        try:
            self._broker.maybe_fail("commit_transaction")
            await asyncio.sleep(0)
            self._check()
            group = self._broker.group(member.group_id)
            if offsets:
                _check_generation(group, member)
        except BaseException:
            self._lost = True
            raise
        for batch, to in self._taken:
            self._append(batch, to)
        self._taken.clear()
        group.offsets.update({TopicPartition(*partition): offset for partition, offset in offsets.items()})
        self._broker.changed()
        try:
            self._broker.maybe_fail("commit_answer")
        except BaseException:
            self._lost = True
            raise

    def abort(self) -> Awaitable[None]:
        """Forget what was taken, and begin a new epoch."""
        self._lost = True
        self._taken.clear()
        for future in self._unanswered:
            if not future.done():
                future.set_exception(_aborted())
        return asyncio.ensure_future(self._begin_again())

    async def _begin_again(self) -> None:
        await asyncio.sleep(0)
        self._epoch = self._broker.begin_epoch(self._id)
        self._lost = False

    def _check(self) -> None:
        if self._lost or self._epoch != self._broker.epoch(self._id):
            self._lost = True
            raise _aborted()

    def _write(self, future: asyncio.Future[object], batch: MemoryBatch, to: TopicPartition) -> None:
        if not future.done() or future.cancelled():  # else it belongs to a transaction that was given up
            super()._write(future, batch, to)

    def _take(self, batch: MemoryBatch, to: TopicPartition) -> int:
        self._check()
        self._check_size(batch, to)
        self._taken.append((batch, to))
        return -1


def _aborted() -> TransactionAbortedError:
    return TransactionAbortedError(
        "the transaction was given up; nothing of it is visible, and its records are processed again"
    )
