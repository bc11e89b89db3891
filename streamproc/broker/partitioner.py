"""Which partition a key belongs to, as Kafka's own clients have it, so that all producers of a topic agree."""

from __future__ import annotations

from aiokafka.partitioner import murmur2


def partition_of_key(key: bytes, partitions: int) -> int:
    """The partition that Kafka's own clients choose for a key: murmur2, made positive, modulo the count."""
    return int(murmur2(key) & 0x7FFFFFFF) % partitions
