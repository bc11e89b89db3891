"""Makes the clients of a processor that talks to Kafka."""

from __future__ import annotations

from streamproc.broker.connection import probe
from streamproc.broker.consumer import KafkaConsumer
from streamproc.broker.interface import Compression, Consumer, OffsetReset, Producer, TransactionalProducer
from streamproc.broker.partitioner import partition_of_key
from streamproc.broker.producer import KafkaProducer
from streamproc.broker.transactional_producer import KafkaTransactionalProducer
from streamproc.settings import KafkaSettings


class KafkaConnections:
    """Implements ``interface.Connections`` for a cluster."""

    def __init__(self, settings: KafkaSettings) -> None:
        self._settings = settings

    async def probe(self) -> None:
        """Reach the cluster once. Raises the BrokerError that says why it cannot be used."""
        await probe(self._settings)

    def consumer(self, *, group_id: str, client_id: str, auto_offset_reset: OffsetReset) -> Consumer:
        """A member-to-be of a consumer group."""
        return KafkaConsumer(
            self._settings, group_id=group_id, client_id=client_id, auto_offset_reset=auto_offset_reset
        )

    def producer(self, *, client_id: str, compression: Compression) -> Producer:
        """A producer, idempotent where the broker can do it."""
        return KafkaProducer(self._settings, client_id=client_id, compression=compression)

    def transactional_producer(
        self, *, client_id: str, compression: Compression, transactional_id: str
    ) -> TransactionalProducer:
        """A producer of transactions; it needs Apache Kafka."""
        return KafkaTransactionalProducer(
            self._settings, client_id=client_id, transactional_id=transactional_id, compression=compression
        )

    def partition_of_key(self, key: bytes, partitions: int) -> int:
        """The partition that Kafka's own clients choose for a key."""
        return partition_of_key(key, partitions)
