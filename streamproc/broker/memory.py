"""The in-memory broker itself, and its administration; see ``streamproc.testing`` for what it is and promises."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict, deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Self

from streamproc.broker.interface import (
    Compression,
    ConfigEntry,
    Headers,
    NewTopic,
    OffsetReset,
    TopicInfo,
)
from streamproc.broker.memory_clients import MemoryConsumer, MemoryProducer, MemoryReader, MemoryTransactionalProducer
from streamproc.broker.memory_group import MemoryGroup
from streamproc.broker.memory_log import (
    BATCH_OVERHEAD,
    DEFAULT_CONFIGS,
    DEFAULT_MAX_MESSAGE_BYTES,
    MemoryRecord,
    MemoryTopic,
    PartitionLog,
    size_of,
)
from streamproc.broker.partitioner import partition_of_key
from streamproc.broker.privileges import AclOperation
from streamproc.errors import BrokerError, RecordTooLargeError, TopicMissingError
from streamproc.records import TopicPartition

Operation = Literal[
    "probe",
    "start",
    "getmany",
    "commit",
    "committed",
    "end_offsets",
    "partition_count",
    "send_batch",
    "write",
    "commit_transaction",
    "commit_answer",
    "admin",
]
"""What ``MemoryBroker.fail_next`` can make fail; ``write`` is what the future of ``send_batch`` tells, and
``commit_answer`` what comes of a transaction that was committed."""


class MemoryBroker:
    """A broker without a network; implements ``interface.Connections``.

    Args:
        clock: The time in seconds since 1970, for records without a timestamp.
        max_batch_bytes: The size at which the batches of its producers take no further record.
    """

    def __init__(
        self, *, clock: Callable[[], float] = time.time, max_batch_bytes: int = DEFAULT_MAX_MESSAGE_BYTES - 1_024
    ) -> None:
        self._clock = clock
        self._max_batch_bytes = max_batch_bytes
        self._topics: dict[str, MemoryTopic] = {}
        self._groups: dict[str, MemoryGroup] = {}
        self._faults: defaultdict[str, deque[BaseException]] = defaultdict(deque)
        self._change: asyncio.Future[None] | None = None
        self._held: deque[Callable[[], None]] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._epochs: dict[str, int] = {}

    def create_topic(self, name: str, partitions: int = 1, *, configs: Mapping[str, str] | None = None) -> None:
        """Create a topic. Raises BrokerError if there is one of that name."""
        if name in self._topics:
            raise BrokerError(f"could not create topic {name}: it exists already")
        self._topics[name] = MemoryTopic([PartitionLog() for _ in range(partitions)], dict(configs or {}))

    def append(
        self,
        topic: str,
        value: bytes | None,
        *,
        key: bytes | None = None,
        partition: int = 0,
        headers: Headers = (),
        timestamp: int | None = None,
    ) -> MemoryRecord:
        """Write one record at once, without a producer."""
        self.check_topics([topic])
        if BATCH_OVERHEAD + size_of(key, value, headers) > self.topic(topic).max_message_bytes:
            raise RecordTooLargeError(f"the record exceeds max.message.bytes of topic {topic}")
        log = self.log(TopicPartition(topic, partition))
        time_ms = self.now_ms() if timestamp is None else timestamp
        record = MemoryRecord(topic, partition, log.end, time_ms, key, value, tuple(headers))
        log.append(record)
        self.changed()
        return record

    def records(self, topic: str, partition: int | None = None) -> list[MemoryRecord]:
        """What a topic holds, partition by partition."""
        logs = self.topic(topic).partitions
        return [record for log in (logs if partition is None else [logs[partition]]) for record in log.records]

    def remove(self, topic: str, partition: int, offset: int) -> None:
        """Take a record away and leave a gap in the offsets, as compaction does."""
        self.log(TopicPartition(topic, partition)).remove(offset)

    def truncate(self, topic: str, partition: int, offset: int) -> None:
        """Take away everything before an offset, as retention does."""
        self.log(TopicPartition(topic, partition)).truncate(offset)

    def committed(self, group_id: str) -> dict[TopicPartition, int]:
        """The committed offsets of a group."""
        return dict(self.group(group_id).offsets)

    def expel(self, consumer: MemoryConsumer) -> None:
        """Take a member out of its group without telling it, as after a missed session.

        Its partitions go to the others; its commits are rejected. With its next ``getmany`` it finds out, lets go and
        joins again.
        """
        consumer.expel()

    async def settled(self) -> None:
        """Returns once no group is rebalancing."""
        while self._tasks:
            await asyncio.wait(self._tasks)
        for group in self._groups.values():
            await group.settled()

    def fail_next(self, operation: Operation, error: BaseException, times: int = 1) -> None:
        """Make the next ``times`` calls of an operation, by whichever client, raise this error."""
        self._faults[operation].extend([error] * times)

    @contextlib.contextmanager
    def acknowledgements_held(self) -> Iterator[None]:
        """Within the block, batches are neither written nor acknowledged; afterwards all of them are, in order."""
        held, self._held = deque[Callable[[], None]](), None
        self._held = held
        try:
            yield
        finally:
            self._held = None
            for answer in held:
                self.answer_soon(answer)

    # interface.Connections

    async def probe(self) -> None:
        """Always there, unless told to fail."""
        self.maybe_fail("probe")

    def consumer(
        self, *, group_id: str, client_id: str = "memory", auto_offset_reset: OffsetReset = "earliest"
    ) -> MemoryConsumer:
        """A member-to-be of a consumer group."""
        del client_id
        return MemoryConsumer(self, self.group(group_id), group_id, auto_offset_reset)

    def producer(self, *, client_id: str = "memory", compression: Compression = "none") -> MemoryProducer:
        """A producer; nothing is compressed."""
        del client_id, compression
        return MemoryProducer(self, self._max_batch_bytes)

    def transactional_producer(
        self, *, client_id: str = "memory", compression: Compression = "none", transactional_id: str
    ) -> MemoryTransactionalProducer:
        """A producer of transactions; nothing of one is in the log before it is committed."""
        del client_id, compression
        return MemoryTransactionalProducer(self, self._max_batch_bytes, transactional_id)

    def partition_of_key(self, key: bytes, partitions: int) -> int:
        """The partition that Kafka's own clients choose for a key."""
        return partition_of_key(key, partitions)

    def admin(self) -> MemoryAdmin:
        """Administers this broker."""
        return MemoryAdmin(self)

    def reader(self) -> MemoryReader:
        """Reads it without a group."""
        return MemoryReader(self)

    # What the clients need.

    def now_ms(self) -> int:
        """The broker's time."""
        return int(self._clock() * 1000)

    def topic(self, name: str) -> MemoryTopic:
        """A topic by name."""
        self.check_topics([name])
        return self._topics[name]

    def topic_names(self) -> Iterable[str]:
        """All topics there are."""
        return list(self._topics)

    def drop_topic(self, name: str) -> None:
        """Delete a topic with all its records."""
        del self._topics[name]
        self._rebalance_readers(name)

    def grow_topic(self, name: str, total: int) -> None:
        """Give a topic more partitions; the groups that read it rebalance."""
        partitions = self.topic(name).partitions
        partitions.extend(PartitionLog() for _ in range(total - len(partitions)))
        self._rebalance_readers(name)

    def log(self, partition: TopicPartition) -> PartitionLog:
        """The records of a partition."""
        return self.topic(partition.topic).partitions[partition.partition]

    def partitions_of(self, topic: str) -> int:
        """How many partitions a topic has; 0 when there is none such."""
        return len(self._topics[topic].partitions) if topic in self._topics else 0

    def group(self, group_id: str) -> MemoryGroup:
        """A consumer group, made when it is first asked for."""
        if group_id not in self._groups:
            self._groups[group_id] = MemoryGroup(self.partitions_of)
        return self._groups[group_id]

    def check_topics(self, topics: Iterable[str]) -> None:
        """Raise TopicMissingError for those that do not exist."""
        absent = [topic for topic in topics if topic not in self._topics]
        if absent:
            raise TopicMissingError(f"no such topic in this MemoryBroker: {', '.join(absent)}", topics=absent)

    def begin_epoch(self, transactional_id: str) -> int:
        """A new epoch of a transactional id, which fences the earlier ones."""
        self._epochs[transactional_id] = self._epochs.get(transactional_id, -1) + 1
        return self._epochs[transactional_id]

    def epoch(self, transactional_id: str) -> int:
        """The current epoch of a transactional id."""
        return self._epochs[transactional_id]

    def maybe_fail(self, operation: Operation) -> None:
        """Raise what ``fail_next`` left for this operation."""
        if self._faults[operation]:
            raise self._faults[operation].popleft()

    def changed(self) -> None:
        """Wake whoever waits for records, offsets or assignments."""
        change, self._change = self._change, None
        if change is not None and not change.done() and not change.get_loop().is_closed():
            change.set_result(None)

    def next_change(self) -> asyncio.Future[None]:
        """A future that resolves at the next change; shared, so never cancel it."""
        loop = asyncio.get_running_loop()
        if self._change is None or self._change.get_loop() is not loop:
            self._change = loop.create_future()
        return self._change

    def answer_soon(self, answer: Callable[[], None]) -> None:
        """Run the broker's side of a request in a later iteration of the loop, in order."""
        if self._held is not None:
            self._held.append(answer)
        else:
            asyncio.get_running_loop().call_soon(answer)

    def background(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something beside the caller."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _rebalance_readers(self, topic: str) -> None:
        for group in self._groups.values():
            if any(topic in member.topics for member in group.members):
                group.rebalance_soon()


class MemoryAdmin:
    """Implements ``interface.Admin`` for a ``MemoryBroker``."""

    def __init__(self, broker: MemoryBroker) -> None:
        self._broker = broker

    async def __aenter__(self) -> Self:
        self._broker.maybe_fail("admin")
        return self

    async def __aexit__(self, *exc: object) -> None:
        return None

    async def topics(self) -> Mapping[str, TopicInfo]:
        """All topics."""
        return {name: TopicInfo(self._broker.partitions_of(name), 1) for name in self._broker.topic_names()}

    async def check_topics(self, names: Sequence[str], operation: AclOperation) -> None:  # noqa: ARG002 - all is allowed
        """See that the topics are there."""
        self._broker.check_topics(names)

    async def create_topics(self, topics: Sequence[NewTopic]) -> None:
        """Create topics."""
        for topic in topics:
            self._broker.create_topic(topic.name, topic.partitions, configs=topic.configs)

    async def delete_topics(self, names: Sequence[str]) -> None:
        """Delete topics with all their records."""
        self._broker.check_topics(names)
        for name in names:
            self._broker.drop_topic(name)

    async def describe_configs(self, topic: str) -> Mapping[str, ConfigEntry]:
        """The configurations of a topic, inherited ones included."""
        own = self._broker.topic(topic).configs
        return {name: ConfigEntry(value, name in own) for name, value in {**DEFAULT_CONFIGS, **own}.items()}

    async def set_configs(self, topic: str, changes: Mapping[str, str]) -> None:
        """Change some configurations of a topic."""
        self._broker.topic(topic).configs.update(changes)

    async def add_partitions(self, topic: str, total: int) -> None:
        """Give a topic more partitions."""
        if total <= self._broker.partitions_of(topic):
            raise BrokerError(f"could not add partitions to topic {topic}: it has {total} or more already")
        self._broker.grow_topic(topic, total)

    async def end_offsets(self, partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, int]:
        """The offset after the last record of each partition."""
        return {partition: self._broker.log(partition).end for partition in partitions}

    async def begin_offsets(self, partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, int]:
        """The offset of the first record that each partition still has."""
        return {partition: self._broker.log(partition).begin for partition in partitions}

    async def offsets_for_times(self, times_ms: Mapping[TopicPartition, int]) -> Mapping[TopicPartition, int | None]:
        """The first offset at or after a time."""
        return {partition: self._broker.log(partition).at_time(time_ms) for partition, time_ms in times_ms.items()}

    async def committed(
        self,
        group_id: str,
        partitions: Sequence[TopicPartition],
        *,
        stable: bool = False,  # noqa: ARG002 - a transaction here is committed at once, or not at all
    ) -> Mapping[TopicPartition, int]:
        """The committed offsets of a group."""
        offsets = self._broker.group(group_id).offsets
        return {partition: offsets[partition] for partition in partitions if partition in offsets}

    async def commit(self, group_id: str, offsets: Mapping[TopicPartition, int]) -> None:
        """Commit offsets of a group that has no members."""
        self._broker.maybe_fail("commit")
        await asyncio.sleep(0)
        self._broker.group(group_id).commit_from_outside(group_id, offsets)
        self._broker.changed()

    async def max_message_bytes(self, topic: str) -> int | None:
        """The largest batch in bytes that a topic takes."""
        return self._broker.topic(topic).max_message_bytes
