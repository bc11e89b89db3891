"""What streamproc asks of a Kafka client, and no more.

Three brokers stand behind it: Apache Kafka and the embedded broker through ``client.py``, and the in-memory stand-in of
``streamproc.testing``. One contract suite runs over all three, tests/contract/test_broker_contract.py. Everything is
asynchronous and belongs to one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, Self

from streamproc.broker.privileges import AclOperation
from streamproc.records import Record, TopicPartition, TopicRecord

Headers = Sequence[tuple[str, bytes | None]]
Row = tuple[int | None, bytes | None, bytes | memoryview | None, list[tuple[str, bytes | None]]]
"""A record to write: timestamp in milliseconds or None for now, key, value, headers."""
Compression = Literal["none", "gzip", "snappy", "lz4", "zstd"]
OffsetReset = Literal["earliest", "latest"]
NO_GENERATION = -1
"""The generation of who is no member."""
Rebalanced = Callable[[set[TopicPartition]], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Membership:
    """A member of a consumer group in one generation of the group."""

    group_id: str
    generation: int
    member_id: str
    instance_id: str | None

    @classmethod
    def none(cls, group_id: str) -> Self:
        """That of who only keeps offsets in a group, without being a member: its transactional id alone fences it."""
        return cls(group_id, NO_GENERATION, "", None)


class Consumer(Protocol):
    """A member of one consumer group. Offsets are committed only by ``commit``, or by a transaction.

    Records of transactions are read once these are committed; those of aborted ones are not read.

    A rebalance takes all partitions from all members and hands them out anew, so ``on_revoked`` and ``on_assigned`` are
    called with everything that the member had and has. They run in a task of the client's, beside whoever calls
    ``getmany``; what they raise, the next ``getmany`` raises.
    """

    async def start(self, topics: Sequence[str], on_revoked: Rebalanced, on_assigned: Rebalanced) -> None:
        """Connect and join; returns with the first assignment, ``on_assigned`` may then still be running.

        ``on_revoked`` is awaited before partitions are given up, and may still commit; it is not called by ``stop``.

        Raises:
            TopicMissingError: at once, for all topics that do not exist.
            BrokerError: the cluster cannot be reached or does not let us in.
        """

    async def stop(self) -> None:
        """Leave the group (a static member stays) and close the connections. Commits nothing by itself."""

    async def getmany(self, *, timeout_ms: int, max_records: int) -> Mapping[TopicPartition, Sequence[Record]]:
        """Records by partition, in offset order, as soon as there are any; empty after ``timeout_ms``.

        Never waits longer, also while the group rebalances. Returns nothing of a partition from the call of
        ``on_revoked`` on until ``on_assigned`` has returned, nor while the group has been silent for longer than a
        session. Calling it keeps the membership alive, whatever is paused.

        Raises:
            BrokerError: reading or the membership failed in the background, and does not mend itself.
        """

    def pause(self, *partitions: TopicPartition) -> None:
        """Return no more of these until ``resume``, without losing what was fetched; revocation forgets it."""

    def resume(self, *partitions: TopicPartition) -> None:
        """Fetch these again."""

    async def commit(self, offsets: Mapping[TopicPartition, int]) -> None:
        """Commit the next offset to read of each partition; all of them or none.

        Raises:
            CommitRejectedError: the group has rebalanced since, or is about to and ``on_revoked`` has returned.
            BrokerError: the broker did not take it for another reason.
        """

    def connected(self) -> bool:
        """Whether there is a connection to any broker at this moment."""

    def is_member(self) -> bool:
        """Whether the group has not gone on without this consumer, as far as it knows.

        Where it has, the partitions are somebody else's already when ``on_revoked`` is called.
        """

    def position(self, partition: TopicPartition) -> int | None:
        """The next offset to fetch of an assigned partition, past what is no record (transaction markers)."""

    def highwater(self, partition: TopicPartition) -> int | None:
        """The log end of an assigned partition as of its last fetch, or None where nothing was fetched yet."""

    async def end_offsets(self, partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, int]:
        """The log end of each partition, asked now."""

    async def committed(self, partition: TopicPartition) -> int | None:
        """The group's committed offset of an assigned partition."""

    async def rewind(self, starts: Mapping[TopicPartition, int]) -> None:
        """Read these partitions from their committed offsets on, or from ``starts`` where there is none.

        Waits while a transaction that is not ended yet would change the committed offsets. Partitions that are not
        assigned any more are passed over, and nothing is changed where the group rebalanced meanwhile. No record comes
        between the change of the positions and the return.

        Raises:
            BrokerError: the committed offsets cannot be had.
        """

    def membership(self) -> Membership:
        """Who we are in the group, for offsets that a transaction commits. Raises CommitRejectedError as ``commit``."""


class BatchBuilder(Protocol):
    """A producer batch under construction, for one partition."""

    def append(
        self, *, timestamp: int | None, key: bytes | None, value: bytes | memoryview | None, headers: Headers
    ) -> object | None:
        """Add a record; None when it does not fit any more, and the batch takes no further ones."""

    def extend(self, rows: Sequence[Row], start: int) -> int:
        """Add ``rows[start:]`` as far as they fit; how many did. Where not all did, it takes no further ones."""

    def record_count(self) -> int:
        """How many records it holds."""


class Producer(Protocol):
    """Writes whole batches to partitions; batches for one partition arrive in the order of their submission."""

    async def start(self) -> None:
        """Connect."""

    async def stop(self) -> None:
        """Flush what was submitted and close the connections; what cannot be written in time fails."""

    def create_batch(self, max_bytes: int | None = None) -> BatchBuilder:
        """An empty batch of at most ``max_bytes``, or of the producer's own limit; a first record always fits."""

    async def send_batch(
        self, batch: BatchBuilder, topic: str, partition: int, *, patient: bool = True
    ) -> asyncio.Future[object]:
        """Queue a batch, waiting for a place; the future resolves when the broker acknowledged it.

        A topic that is deleted after it was first written to may be waited for, unless the caller is not ``patient``.

        A batch that the broker refuses does not disturb the ones after it. From the future come RecordTooLargeError,
        when the topic's limit refuses the batch, and BrokerError otherwise.

        Raises:
            TopicMissingError: there is no such topic.
            BrokerError: there is no such partition, or the producer can write nothing any more.
        """

    async def partition_count(self, topic: str, *, operation: AclOperation = "Write") -> int:
        """How many partitions the topic has. Raises TopicMissingError.

        ``operation`` is what one wants to do with it, for BrokerAuthorizationError where it is hidden from us.
        """

    async def max_message_bytes(self, topic: str) -> int | None:
        """The size of the largest batch that the topic takes, or None where the broker does not say."""


class TransactionalProducer(Producer, Protocol):
    """A producer whose batches become visible together, with the offsets of the records that they were made from.

    The first batch begins a transaction. What a transaction holds is visible to ``read_committed`` consumers once
    ``commit_transaction`` has returned, and never if it failed. A transaction that cannot go on is given up: its
    batches' futures, ``send_batch`` and ``commit_transaction`` raise TransactionAbortedError until ``abort`` returned.
    """

    @property
    def in_transaction(self) -> bool:
        """Whether something was sent since the last commit that can still be committed."""

    async def commit_transaction(self, offsets: Mapping[TopicPartition, int], member: Membership) -> None:
        """Commit what was sent and acknowledged, and these offsets, or nothing of it.

        Nothing may be sent meanwhile. Whatever it raises, and also when it is cancelled, the transaction is given up.

        Raises:
            CommitRejectedError: the group has moved on since: the member has no say over these offsets any more.
            TransactionAbortedError: the broker has ended the transaction, or it is not known whether it did.
            BrokerAuthorizationError: transactions, or offsets of this group, are not allowed to us.
        """

    def abort(self) -> Awaitable[None]:
        """Give up, at once, what was sent since the last commit; done when the broker has ended the transaction.

        Tries for as long as the broker cannot be reached. Raises BrokerError when it refuses for good.
        """


class Reader(Protocol):
    """Reads partitions from where it is told, as a member of no group; an asynchronous context manager.

    Records of transactions are read as by a ``Consumer``. A position that the log does not hold any more goes on at the
    log's first record. Every method may raise BrokerError.
    """

    async def __aenter__(self) -> Self: ...
    async def __aexit__(self, *exc: object) -> None: ...

    def assign(self, positions: Mapping[TopicPartition, int]) -> None:
        """Read these partitions, from these offsets on, in place of what was read before."""

    def drop(self, *partitions: TopicPartition) -> None:
        """Read no more of these."""

    async def getmany(
        self, *, timeout_ms: int, max_records: int | None = None, partitions: Collection[TopicPartition] = ()
    ) -> Mapping[TopicPartition, Sequence[TopicRecord]]:
        """Records by partition, in offset order, as soon as there are any; empty after ``timeout_ms``.

        With ``partitions``, those of these only; what was fetched of the others is kept.
        """

    async def position(self, partition: TopicPartition) -> int:
        """The next offset to read, past what is no record (transaction markers)."""


class Connections(Protocol):
    """Makes the clients of a processor: one consumer and one producer per task."""

    async def probe(self) -> None:
        """Reach the cluster once. Raises the BrokerError that says why it cannot be used."""

    def consumer(self, *, group_id: str, client_id: str, auto_offset_reset: OffsetReset) -> Consumer:
        """A member-to-be of a consumer group; it connects when it is started."""

    def producer(self, *, client_id: str, compression: Compression) -> Producer:
        """A producer; it connects when it is started."""

    def transactional_producer(
        self, *, client_id: str, compression: Compression, transactional_id: str
    ) -> TransactionalProducer:
        """A producer of transactions. Of those with one id, the one that was started last ends what the others do."""

    def partition_of_key(self, key: bytes, partitions: int) -> int:
        """The partition that Kafka's own clients choose for a key."""


@dataclass(frozen=True, slots=True)
class TopicInfo:
    """A topic as the cluster has it."""

    partitions: int
    replication: int
    internal: bool = False


@dataclass(frozen=True, slots=True)
class NewTopic:
    """A topic to create; a replication of -1 is the cluster's default."""

    name: str
    partitions: int
    replication: int = -1
    configs: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ConfigEntry:
    """One configuration of a topic; ``own`` when the topic sets it itself, rather than inheriting a default."""

    value: str | None
    own: bool


class Admin(Protocol):
    """Looks at and changes a cluster; an asynchronous context manager. Every method may raise BrokerError."""

    async def __aenter__(self) -> Self: ...
    async def __aexit__(self, *exc: object) -> None: ...

    async def topics(self) -> Mapping[str, TopicInfo]:
        """All topics that we may describe, Kafka's internal ones included and marked."""

    async def check_topics(self, names: Sequence[str], operation: AclOperation) -> None:
        """See that the topics are there, and not hidden from us, before something is done with them.

        Raises TopicMissingError, BrokerAuthorizationError.
        """

    async def create_topics(self, topics: Sequence[NewTopic]) -> None:
        """Create topics, and return when clients can see them; existing ones are an error."""

    async def delete_topics(self, names: Sequence[str]) -> None:
        """Delete topics with all their records."""

    async def describe_configs(self, topic: str) -> Mapping[str, ConfigEntry]:
        """The configurations of a topic, inherited ones included. Raises TopicMissingError."""

    async def set_configs(self, topic: str, changes: Mapping[str, str]) -> None:
        """Change some configurations of a topic and leave the others alone."""

    async def add_partitions(self, topic: str, total: int) -> None:
        """Give a topic more partitions, ``total`` altogether."""

    async def end_offsets(self, partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, int]:
        """The offset after the last record of each partition."""

    async def begin_offsets(self, partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, int]:
        """The offset of the first record that each partition still has."""

    async def offsets_for_times(self, times_ms: Mapping[TopicPartition, int]) -> Mapping[TopicPartition, int | None]:
        """The first offset at or after a time; None where all records are older."""

    async def committed(
        self, group_id: str, partitions: Sequence[TopicPartition], *, stable: bool = False
    ) -> Mapping[TopicPartition, int]:
        """The committed offsets of a group, without joining it; partitions without one are left out.

        With ``stable``, a transaction that is about to change them is waited for.
        """

    async def commit(self, group_id: str, offsets: Mapping[TopicPartition, int]) -> None:
        """Commit offsets of a group that has no members. Raises CommitRejectedError where it has some."""

    async def max_message_bytes(self, topic: str) -> int | None:
        """The largest batch in bytes that a topic takes; None where that is not known. Raises TopicMissingError."""
