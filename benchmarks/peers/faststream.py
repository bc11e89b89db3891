"""FastStream: a batch subscriber and ``publish_batch``, with its aiokafka broker or its confluent one.

Chosen: ``apply_types=False`` (no validation of types) and a decoder that hands the message over as it is, so that
FastStream neither parses nor validates a record; batches of 5,000; a batch of results for each partition, sent side by
side and confirmed before the offsets are committed by hand, which FastStream does once a batch at any rate. uvloop.
The aiokafka broker packs a batch by itself. The confluent one starts a task a record, and is about three times slower.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import uvloop
from faststream import AckPolicy
from faststream.confluent import KafkaBroker as ConfluentBroker
from faststream.kafka import KafkaBroker

from benchmarks.peers.work import MAX_BATCH_BYTES, WORKS, Meter, Task

BATCH = 5_000
ROW_BYTES = 100
"""More than what a record's header and framing take in a batch."""


def chunks(values: list[bytes]) -> Iterator[list[bytes]]:
    """The values in parts that fit into a batch each."""
    part: list[bytes] = []
    size = 0
    for value in values:
        if part and size + len(value) + ROW_BYTES > MAX_BATCH_BYTES:
            yield part
            part, size = [], 0
        part.append(value)
        size += len(value) + ROW_BYTES
    yield part


async def as_it_is(message: Any) -> Any:
    """The decoder: the message, records unread."""
    return message


async def run(task: Task) -> None:
    """Run until the last batch is committed."""
    work, meter = WORKS[task.work], Meter()
    left, done = task.records, asyncio.Event()
    is_confluent = task.variant == "confluent"
    shared: dict[str, Any] = {"acks": "all", "enable_idempotence": True, "apply_types": False, "logger": None}
    if is_confluent:
        broker: Any = ConfluentBroker(task.bootstrap, linger_ms=5, **shared)
    else:
        broker = KafkaBroker(task.bootstrap, max_batch_size=MAX_BATCH_BYTES, **shared)

    subscriber = broker.subscriber(
        task.source,
        group_id=task.group,
        batch=True,
        max_records=1,  # the first alone begins the measurement
        auto_offset_reset="earliest",
        ack_policy=AckPolicy.MANUAL,
        decoder=as_it_is,
    )

    @subscriber  # type: ignore[untyped-decorator]  # FastStream is not installed where this is checked
    async def handle(message: Any) -> None:
        nonlocal left
        meter.begin()
        subscriber.max_records = task.batch if task.work == "model" else BATCH
        records = message.raw_message
        values = [record.value() for record in records] if is_confluent else [record.value for record in records]
        results = work.batch(values)
        where: dict[int, list[bytes]] = {}
        for record, result in zip(records, results, strict=True):
            where.setdefault(record.partition() if is_confluent else record.partition, []).append(result)
        await asyncio.gather(
            *[
                broker.publish_batch(*part, topic=task.output, partition=partition)
                for partition, its in where.items()
                for part in chunks(its)
            ]
        )
        await message.ack()
        left -= len(records)
        if left == 0:
            done.set()

    await broker.start()
    await done.wait()
    meter.end()
    await broker.stop()


if __name__ == "__main__":
    uvloop.run(run(Task.told()))
