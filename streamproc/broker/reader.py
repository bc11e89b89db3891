"""Reads partitions from given offsets on, without a consumer group: nothing is committed, nobody is disturbed.

For the commands: ``consume``, and the age of unread records in ``lag``. The data path uses ``KafkaConsumer``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Self, cast

from aiokafka import AIOKafkaConsumer
from aiokafka import errors as kafka
from aiokafka.structs import TopicPartition as KafkaTopicPartition

from streamproc.broker import fetched_records
from streamproc.broker.connection import client_options, ended, first_connection, is_embedded, isolation_level
from streamproc.broker.privileges import Privilege
from streamproc.broker.translation import translate
from streamproc.records import TopicPartition, TopicRecord
from streamproc.settings import KafkaSettings

fetched_records.install()

MAX_PARTITION_FETCH_BYTES = 1 << 20
"""As in Kafka's own client."""


class KafkaReader:
    """Reads from where it is told; an asynchronous context manager.

    A position that the log does not hold any more goes on at the log's first record.

    Raises:
        BrokerError: on entering, when the cluster cannot be used; later, when reading fails for good.
    """

    def __init__(
        self,
        settings: KafkaSettings,
        *,
        client_id: str = "streamproc",
        uncommitted: bool = False,
        max_partition_fetch_bytes: int = MAX_PARTITION_FETCH_BYTES,
    ) -> None:
        """With ``uncommitted``, records of transactions that are open or were aborted are read too.

        Of each partition at most ``max_partition_fetch_bytes``, or one batch, wait here to be asked for.
        """
        self._settings = settings
        self._max_partition_fetch_bytes = max_partition_fetch_bytes
        self._uncommitted = uncommitted
        self._client_id = client_id
        self._inner: Any = None

    async def __aenter__(self) -> Self:
        async with first_connection(self._settings, self._client_id) as connection:
            uncommitted = self._uncommitted or is_embedded(connection)
        inner = AIOKafkaConsumer(
            **client_options(self._settings, self._client_id),
            group_id=None,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level=isolation_level(uncommitted),
            fetch_max_bytes=self._settings.fetch_max_bytes,
            max_partition_fetch_bytes=self._max_partition_fetch_bytes,
        )
        try:
            await inner.start()
        except BaseException as error:
            await inner.stop()
            if isinstance(error, kafka.KafkaError | OSError):
                raise translate(error, self._settings, doing="connect a reader") from error
            raise
        self._inner = inner
        return self

    async def __aexit__(self, *_: object) -> None:
        # A reader that is closed at once ends in a cancellation of aiokafka's own, which is not ours.
        stopping = await ended(self._inner.stop(), self._inner._client)  # noqa: SLF001 - what it has to wait for
        if not stopping.cancelled():
            stopping.result()

    def assign(self, positions: Mapping[TopicPartition, int]) -> None:
        """Read these partitions, from these offsets on, in place of what was read before."""
        asked = {KafkaTopicPartition(*partition): offset for partition, offset in positions.items()}
        self._inner.assign(list(asked))
        for partition, offset in asked.items():
            self._inner.seek(partition, offset)

    def drop(self, *partitions: TopicPartition) -> None:
        """Read no more of these."""
        for partition in partitions:
            self._inner.pause(KafkaTopicPartition(*partition))

    async def getmany(
        self, *, timeout_ms: int, max_records: int | None = None, partitions: Collection[TopicPartition] = ()
    ) -> Mapping[TopicPartition, Sequence[TopicRecord]]:
        """Records by partition, in offset order, as soon as there are any; empty after ``timeout_ms``.

        With ``partitions``, those of these only; what was fetched of the others is kept.
        """
        try:
            found = await self._inner.getmany(
                *[KafkaTopicPartition(*partition) for partition in partitions],
                timeout_ms=timeout_ms,
                max_records=max_records,
            )
        except (kafka.KafkaError, OSError) as error:
            topics = sorted({topic for topic, _ in self._inner.assignment()})
            needs = [Privilege("Read", "Topic", topic) for topic in topics]
            raise translate(error, self._settings, doing="read", needs=needs) from error
        return cast("Mapping[TopicPartition, Sequence[TopicRecord]]", found)

    async def position(self, partition: TopicPartition) -> int:
        """The next offset to read, past what is no record (transaction markers)."""
        return cast("int", await self._inner.position(KafkaTopicPartition(*partition)))
