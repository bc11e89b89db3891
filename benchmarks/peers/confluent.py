"""A bare confluent-kafka loop: ``consume`` and ``produce``, nothing else.

Chosen: 10,000 records a call; the partition of the input; no callback a record, since ``delivery.report.only.error``
and one callback for the whole producer tell of every failure; a flush before every commit, which is what makes it
at-least-once. librdkafka fetches and sends in threads of its own, beside Python. Acknowledged by all, idempotent.
"""

from __future__ import annotations

import time
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer

from benchmarks.peers.work import COMMIT_INTERVAL_MS, MAX_BATCH_BYTES, WORKS, Meter, Task

CONSUME = 10_000
FLUSH_S = 60


def run(task: Task) -> None:
    """Read all, write all, commit."""
    failures: list[Any] = []
    work, meter = WORKS[task.work], Meter()
    consumer = Consumer(
        {
            "bootstrap.servers": task.bootstrap,
            "group.id": task.group,
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
        }
    )
    producer = Producer(
        {
            "bootstrap.servers": task.bootstrap,
            "acks": "all",
            "enable.idempotence": True,
            "linger.ms": 5,
            "batch.size": MAX_BATCH_BYTES,
            "batch.num.messages": 100_000,
            "queue.buffering.max.messages": 1_000_000,
            "delivery.report.only.error": True,
            "on_delivery": lambda error, _: failures.append(error),
        }
    )

    def commit() -> None:
        if producer.flush(FLUSH_S) or failures:
            raise KafkaException(failures[0] if failures else "not all was acknowledged in time")
        try:
            consumer.commit(asynchronous=False)
        except KafkaException as error:
            if error.args[0].code() != KafkaError._NO_OFFSET:  # noqa: SLF001 - its public name; nothing is new since the last
                raise

    consumer.subscribe([task.source])
    most = task.batch if task.work == "model" else CONSUME
    count, committed_at = 0, time.monotonic()
    while count < task.records:
        messages = consumer.consume(most if count else 1, timeout=0.1)
        if not messages:
            continue
        meter.begin()
        for message in messages:
            if message.error() is not None:
                raise KafkaException(message.error())
        if work.is_identity:
            for message in messages:
                _produce(producer, task.output, message.value(), message.key(), message.partition())
        else:
            for message, value in zip(messages, work.batch([it.value() for it in messages]), strict=True):
                _produce(producer, task.output, value, message.key(), message.partition())
        count += len(messages)
        producer.poll(0)
        if time.monotonic() > committed_at + COMMIT_INTERVAL_MS / 1000:
            commit()
            committed_at = time.monotonic()
    commit()
    meter.end()
    consumer.close()


def _produce(producer: Any, topic: str, value: bytes, key: bytes | None, partition: int) -> None:
    while True:
        try:
            producer.produce(topic, value, key, partition)
        except BufferError:
            producer.poll(0.05)
        else:
            return


if __name__ == "__main__":
    run(Task.told())
