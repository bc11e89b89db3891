"""The broker as a Faust application is it: records come from a stream, results leave by the application's producer.

Implements what a processor asks of Kafka (``broker.interface``) by what the application has already: its membership in
its group, its connections, its security. Nothing of its configuration is changed, and no connection is made.

A *commit* here acknowledges events to Faust, which commits them to Kafka when it does. Before partitions are taken away
and before it stops, Faust waits until all events that a stream took are acknowledged; so few of them are held at once.

Invariants:

- Events of a partition are acknowledged in the order of their offsets, and only once the processor has committed them:
  Faust, which forgets what is not acknowledged when the group rebalances, can never commit past one that is not done.
- A record is of the assignment that it was read in. What is left of an earlier one is dropped here without being
  acknowledged, and is read again by whoever has the partition then.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict, deque
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, NamedTuple

import faust
from faust.types import TP, Message, TopicT

from streamproc.broker.interface import (
    BatchBuilder,
    Compression,
    Consumer,
    Membership,
    OffsetReset,
    Producer,
    Rebalanced,
    TransactionalProducer,
)
from streamproc.broker.memory_clients import MemoryBatch
from streamproc.broker.partitioner import partition_of_key
from streamproc.broker.privileges import AclOperation
from streamproc.broker.translation import brief
from streamproc.errors import BrokerError, TopicMissingError
from streamproc.records import Record, TopicPartition

MAX_MESSAGE_BYTES = "max.message.bytes"
METADATA_TIMEOUT_S = 10.0
"""So long a topic is waited for; Faust's producer would wait for 20 minutes."""


class FaustRecord(NamedTuple):
    """A record as a processor reads it."""

    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes | None]]

    @classmethod
    def of(cls, message: Message) -> FaustRecord:
        """What Faust's message holds: its time is in seconds, its value what Kafka has."""
        told: Any = message.headers
        return cls(message.offset, round(message.timestamp * 1_000), message.key, message.value, told or ())


class FaustConsumer:
    """Implements ``interface.Consumer`` for a stream of a Faust application, whose events ``feed`` takes.

    ``assigned`` and ``revoked`` have to be called with what the application's group does.
    """

    def __init__(self, app: faust.App, topics: Sequence[str], max_buffered: int) -> None:
        """At most ``max_buffered`` records wait here to be read."""
        self._app = app
        self._topics = frozenset(topics)
        self._max_buffered = max_buffered
        self._assigned: set[TopicPartition] = set()
        self._paused: set[TopicPartition] = set()
        self._buffers: defaultdict[TopicPartition, deque[Message]] = defaultdict(deque)
        self._buffered = 0
        self._read: defaultdict[TopicPartition, deque[Message]] = defaultdict(deque)
        self._positions: dict[TopicPartition, int] = {}
        self._ends: dict[TopicPartition, int] = {}
        self._callbacks: tuple[Rebalanced, Rebalanced] | None = None
        self._arrived = asyncio.Event()
        self._moved = asyncio.Event()

    # -- from the application

    async def feed(self, message: Message) -> None:
        """Take a message, once there is room; it is dropped if the group has shared the partitions out meanwhile."""
        partition = TopicPartition(message.topic, message.partition)
        while message.generation_id == self._app.consumer_generation_id:
            # Faust may hand over the first records of an assignment a moment before it tells of it.
            if partition in self._assigned and self._buffered < self._max_buffered:
                self._buffers[partition].append(message)
                self._buffered += 1
                self._ends[partition] = message.offset + 1
                self._arrived.set()
                return
            self._moved.clear()
            await self._moved.wait()

    async def assigned(self, partitions: set[TP]) -> None:
        """The group has given these to the application, and no others."""
        self._assigned = {TopicPartition(*it) for it in partitions if it.topic in self._topics}
        if self._callbacks is not None:
            await self._callbacks[1](set(self._assigned))
        self._moved.set()

    async def revoked(self) -> None:
        """The group takes all partitions back."""
        gone, self._assigned = self._assigned, set()
        if gone and self._callbacks is not None:
            await self._callbacks[0](gone)
        self._forget()

    def _forget(self) -> None:
        for it in (self._buffers, self._read, self._positions, self._ends, self._paused):
            it.clear()
        self._buffered = 0
        self._moved.set()

    # -- for the processor

    async def start(self, topics: Sequence[str], on_revoked: Rebalanced, on_assigned: Rebalanced) -> None:  # noqa: ARG002 - the stream's
        """Begin to read what the application has; it is in its group already."""
        self._callbacks = (on_revoked, on_assigned)
        if self._assigned:
            await on_assigned(set(self._assigned))

    async def stop(self) -> None:
        """Read no more; what is not acknowledged stays so."""
        self._callbacks = None
        self._forget()

    async def getmany(self, *, timeout_ms: int, max_records: int) -> Mapping[TopicPartition, Sequence[Record]]:
        """Records by partition, in offset order, as soon as there are any; empty after ``timeout_ms``."""
        await asyncio.sleep(0)
        if not (found := self._take(max_records)):
            self._arrived.clear()
            await asyncio.wait([waiting := asyncio.ensure_future(self._arrived.wait())], timeout=timeout_ms / 1_000)
            waiting.cancel()
            found = self._take(max_records)
        return found

    def _take(self, max_records: int) -> dict[TopicPartition, Sequence[Record]]:
        found: dict[TopicPartition, Sequence[Record]] = {}
        for partition in sorted(self._assigned - self._paused):
            count = min(len(self._buffers[partition]), max_records)
            if count:
                messages = [self._buffers[partition].popleft() for _ in range(count)]
                found[partition] = [FaustRecord.of(it) for it in messages]
                self._read[partition].extend(messages)
                self._positions[partition] = messages[-1].offset + 1
                self._buffered -= count
                max_records -= count
        if found:
            self._moved.set()
        return found

    def pause(self, *partitions: TopicPartition) -> None:
        """Return no more of these until ``resume``."""
        self._paused.update(partitions)

    def resume(self, *partitions: TopicPartition) -> None:
        """Return records of these again."""
        self._paused.difference_update(partitions)
        self._arrived.set()

    async def commit(self, offsets: Mapping[TopicPartition, int]) -> None:
        """Acknowledge what was read before these offsets."""
        for partition, offset in offsets.items():
            read = self._read[partition]
            while read and read[0].offset < offset:
                read.popleft().ack(self._app.consumer)

    def connected(self) -> bool:
        """Whether the application runs: its connections are its own business."""
        return self._callbacks is not None

    def is_member(self) -> bool:
        """Faust tells of revoked partitions while they are ours."""
        return True

    def position(self, partition: TopicPartition) -> int | None:
        """The offset after the last record that was read."""
        return self._positions.get(partition)

    def highwater(self, partition: TopicPartition) -> int | None:
        """The offset after the last record that Faust has handed over: of what it has fetched nothing is known."""
        return self._ends.get(partition)

    async def end_offsets(self, partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, int]:
        """The log end of each partition, asked now."""
        ends = await self._app.consumer.highwaters(*(TP(*it) for it in partitions))
        return {TopicPartition(*it): end for it, end in ends.items()}

    async def committed(self, partition: TopicPartition) -> int | None:
        """Unknown: it is Faust that commits."""
        raise _only_faust(f"offsets of {partition.topic}")

    async def rewind(self, starts: Mapping[TopicPartition, int]) -> None:
        """There are no transactions after which to read again."""
        raise _only_faust(f"positions of {len(starts)} partitions")

    def membership(self) -> Membership:
        """There are no transactions to be a member for."""
        raise _only_faust("the group's membership")


class FaustProducer:
    """Implements ``interface.Producer`` by the producer of a Faust application."""

    def __init__(self, app: faust.App, inputs: Sequence[str], outputs: Mapping[str, TopicT | None]) -> None:
        """``outputs`` has the topics to write to; what is for one that is None is let go of."""
        self._app = app
        self._inputs = inputs
        self._outputs = outputs

    async def start(self) -> None:
        """Let Faust make the topics that it makes."""
        await self._app.maybe_start_producer()
        for topic in self._outputs.values():
            if topic is not None:
                await topic.maybe_declare()

    async def stop(self) -> None:
        """Everything was waited for; the producer is the application's."""

    def create_batch(self, max_bytes: int | None = None) -> BatchBuilder:
        """An empty batch."""
        own = self._app.conf.producer_max_request_size
        return MemoryBatch(own if max_bytes is None else min(max_bytes, own), int(time.time() * 1_000))

    async def send_batch(
        self,
        batch: BatchBuilder,
        topic: str,
        partition: int,
        *,
        patient: bool = True,  # noqa: ARG002 - how long is waited is Faust's business
    ) -> asyncio.Future[object]:
        """Hand a batch's records to Faust; the future resolves when all of them are acknowledged."""
        if not isinstance(batch, MemoryBatch):
            raise TypeError(f"{type(batch).__name__} is no batch of this producer's")
        sent: list[Awaitable[Any]] = []
        if self._writes(topic):
            producer = self._app.producer
            try:
                for timestamp_ms, key, value, headers in batch.records:
                    # Half a millisecond more, since Faust cuts what it multiplies.
                    timestamp_s = (timestamp_ms + 0.5) / 1_000
                    told: Any = list(headers)
                    sent.append(await producer.send(topic, key, value, partition, timestamp_s, told))
            except Exception as error:
                await asyncio.gather(*sent, return_exceptions=True)
                raise self._refused(error, topic, partition) from error
        return asyncio.ensure_future(self._acknowledged(sent, topic, partition))

    async def _acknowledged(self, sent: Sequence[Awaitable[Any]], topic: str, partition: int) -> object:
        for outcome in await asyncio.gather(*sent, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise self._refused(outcome, topic, partition) from outcome
        return None

    @staticmethod
    def _refused(error: BaseException, topic: str, partition: int) -> BrokerError:
        return BrokerError(f"could not write to partition {partition} of topic {topic}: {brief(error)}")

    async def partition_count(self, topic: str, *, operation: AclOperation = "Write") -> int:  # noqa: ARG002 - for our own errors
        """How many partitions the topic has; one that is not written to passes for one of a single partition."""
        if topic not in self._inputs and not self._writes(topic):
            return 1
        producer: Any = self._app.producer
        try:
            # Faust itself asks nobody: its topics have as many partitions as it was told, or are said to.
            async with asyncio.timeout(METADATA_TIMEOUT_S):
                return len(await producer._ensure_producer().partitions_for(topic))  # noqa: SLF001 - as above
        except TimeoutError as error:
            raise TopicMissingError(
                f"topic {topic} does not exist; create it, or give it internal=True, so that Faust does"
            ) from error
        except Exception as error:
            raise BrokerError(f"the partitions of topic {topic} cannot be found out: {brief(error)}") from error

    async def max_message_bytes(self, topic: str) -> int | None:
        """What the application's producer takes, and the topic's own limit where the application has told it."""
        limit = int(self._app.conf.producer_max_request_size)
        known = self._outputs.get(topic)
        told = None if known is None or known.config is None else known.config.get(MAX_MESSAGE_BYTES)
        return limit if told is None else min(limit, int(told))

    def _writes(self, topic: str) -> bool:
        if topic not in self._outputs:
            raise BrokerError(f"there is something to write to {topic}, and the agent was given no such topic")
        return self._outputs[topic] is not None


class FaustConnections:
    """Implements ``interface.Connections``: makes what one task needs, of one application."""

    def __init__(self, consumer: FaustConsumer, producer: FaustProducer) -> None:
        self._consumer = consumer
        self._producer = producer

    async def probe(self) -> None:
        """The application has reached its cluster."""

    def consumer(self, *, group_id: str, client_id: str, auto_offset_reset: OffsetReset) -> Consumer:  # noqa: ARG002 - Faust's
        """The stream's."""
        return self._consumer

    def producer(self, *, client_id: str, compression: Compression) -> Producer:  # noqa: ARG002 - Faust's
        """The application's."""
        return self._producer

    def transactional_producer(
        self,
        *,
        client_id: str,
        compression: Compression,  # noqa: ARG002 - there is none
        transactional_id: str,  # noqa: ARG002 - there is none
    ) -> TransactionalProducer:
        """There is none."""
        raise _only_faust(f"transactions of {client_id}")

    def partition_of_key(self, key: bytes, partitions: int) -> int:
        """The partition that Kafka's own clients choose for a key."""
        return partition_of_key(key, partitions)


def _only_faust(what: str) -> BrokerError:
    return BrokerError(f"{what} are Faust's own business in its application")
