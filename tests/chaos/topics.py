"""Reading whole topics for the oracle, with the client itself: nothing of streamproc is in between."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any, Literal

from aiokafka import AIOKafkaConsumer, TopicPartition

from tests.chaos.oracle import TaskOracle

Isolation = Literal["read_uncommitted", "read_committed"]
NOTHING_FOR_S = 60.0


async def read_whole(
    bootstrap_servers: str, topic: str, partitions: int, isolation: Isolation
) -> AsyncIterator[list[Any]]:
    """Every record of a topic, each partition in its order."""
    everything = [TopicPartition(topic, number) for number in range(partitions)]
    consumer = AIOKafkaConsumer(
        bootstrap_servers=bootstrap_servers,
        isolation_level=isolation,
        auto_offset_reset="earliest",
        enable_auto_commit=False,
        max_partition_fetch_bytes=4 << 20,
    )
    await consumer.start()
    try:
        consumer.assign(everything)
        ends = await consumer.end_offsets(everything)
        last = time.monotonic()
        while any([await consumer.position(partition) < end for partition, end in ends.items()]):
            found = await consumer.getmany(timeout_ms=500, max_records=20_000)
            if found:
                last = time.monotonic()
            elif time.monotonic() > last + NOTHING_FOR_S:
                raise TimeoutError(f"topic {topic} cannot be read to its end")
            for records in found.values():
                yield records
            await asyncio.sleep(0)
    finally:
        await consumer.stop()


async def show(oracle: TaskOracle, bootstrap_servers: str, topic: str, partitions: int, isolation: Isolation) -> None:
    """Give the oracle a task's topics."""
    async for records in read_whole(bootstrap_servers, topic, partitions, "read_uncommitted"):
        for it in records:
            oracle.input(it.partition, it.offset, it.value)
    async for records in read_whole(bootstrap_servers, f"{topic}.results", partitions, isolation):
        for it in records:
            oracle.result(it.partition, it.offset, it.timestamp, it.value)
    async for records in read_whole(bootstrap_servers, f"{topic}.dead", partitions, isolation):
        for it in records:
            oracle.dead(it.partition, it.offset, it.timestamp, it.value, it.headers)
