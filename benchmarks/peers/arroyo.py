"""sentry-arroyo: RunTask, RunTaskWithMultiprocessing, and either with batches for the model.

Chosen: ``use_simple_futures`` (arroyo's faster futures), the commit policy ``ONCE_PER_SECOND`` (its default), more
fetched ahead and larger batches sent by librdkafka. ``Produce`` keeps its default of 10,000 records: fewer and more are
slower. With processes: two, as many as the machine has cores, ``prefetch_batches``, batches of 5,000 and blocks that
hold them. A model gets batches, made by ``BatchStep`` and taken apart by ``Unfold``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from arroyo.backends.kafka import KafkaConsumer, KafkaPayload, KafkaProducer
from arroyo.backends.kafka.configuration import (
    build_kafka_consumer_configuration,
    build_kafka_producer_configuration,
)
from arroyo.commit import ONCE_PER_SECOND
from arroyo.processing import StreamProcessor
from arroyo.processing.strategies import (
    BatchStep,
    CommitOffsets,
    ProcessingStrategyFactory,
    Produce,
    RunTask,
    RunTaskWithMultiprocessing,
    Unfold,
)
from arroyo.processing.strategies.run_task_with_multiprocessing import MultiprocessingPool
from arroyo.types import Commit, Message, Partition, Topic, Value

from benchmarks.peers.work import MAX_BATCH_BYTES, WORKS, Meter, Task

PROCESSES = 2
BATCH = 5_000
POLL_S = 0.01
BLOCK_BYTES = 64 * 1024 * 1024


def one(work: str, message: Message[KafkaPayload]) -> KafkaPayload:
    """The work on one record."""
    payload = message.payload
    return KafkaPayload(payload.key, WORKS[work].one(payload.value), [])


def many(work: str, message: Message[Any]) -> list[Value[KafkaPayload]]:
    """The work on a batch: its records, each with its offset."""
    values = message.payload
    results = WORKS[work].batch([it.payload.value for it in values])
    return [
        Value(KafkaPayload(it.payload.key, result, []), it.committable, it.timestamp)
        for it, result in zip(values, results, strict=True)
    ]


class Last(CommitOffsets):  # type: ignore[misc]  # arroyo is not installed where this is checked
    """Commits as ever, and at once behind the last record."""

    def __init__(self, commit: Commit, task: Task, meter: Meter) -> None:
        super().__init__(commit)
        self.left, self.meter = task.records, meter

    def submit(self, message: Message[Any]) -> None:
        """One more is written."""
        super().submit(message)
        self.left -= 1
        if self.left == 0:
            self.join()
            self.meter.end()
            running[0].signal_shutdown()


class Steps(ProcessingStrategyFactory):  # type: ignore[misc]  # as Last
    """The steps of one assignment."""

    def __init__(self, task: Task, meter: Meter) -> None:
        self.task, self.meter = task, meter
        self.pool = MultiprocessingPool(PROCESSES) if task.variant == "processes" else None
        self.producer = KafkaProducer(
            build_kafka_producer_configuration(
                {},
                bootstrap_servers=[task.bootstrap],
                override_params={
                    "acks": "all",
                    "enable.idempotence": True,
                    "linger.ms": 5,
                    "batch.size": MAX_BATCH_BYTES,
                    "batch.num.messages": 100_000,
                    "queue.buffering.max.messages": 1_000_000,
                },
            ),
            use_simple_futures=True,
        )

    def create_with_partitions(self, commit: Commit, _: Mapping[Partition, int]) -> Any:
        """From the last step to the first."""
        task = self.task
        last = Produce(self.producer, Topic(task.output), Last(commit, task, self.meter))
        batched = task.work == "model"
        work = partial(many if batched else one, task.work)
        if batched:
            last = Unfold(list, last)
        if self.pool is None:
            step = RunTask(work, last)
        else:
            step = RunTaskWithMultiprocessing(
                work,
                last,
                max_batch_size=PROCESSES if batched else BATCH,
                max_batch_time=0.1,
                pool=self.pool,
                input_block_size=BLOCK_BYTES,
                output_block_size=BLOCK_BYTES,
                prefetch_batches=True,
            )
        return BatchStep(task.batch, 0.02, step) if batched else step

    def shutdown(self) -> None:
        """End the processes and the producer."""
        if self.pool is not None:
            self.pool.close()
        self.producer.close()


class Consumer(KafkaConsumer):  # type: ignore[misc]  # as Last
    """Says when the first record came, and waits less.

    Arroyo's loop waits for a second where nothing is left to read, and looks after what was produced only then.
    """

    meter: Meter

    def poll(self, timeout: float | None = None) -> Any:  # noqa: ARG002 - arroyo's argument, always one second
        """The next record."""
        value = super().poll(POLL_S)
        if value is not None:
            self.meter.begin()
        return value


running: list[Any] = []


def run(task: Task) -> None:
    """Run until the last record is committed."""
    meter = Meter()
    consumer = Consumer(
        build_kafka_consumer_configuration(
            {},
            task.group,
            auto_offset_reset="earliest",
            bootstrap_servers=[task.bootstrap],
            queued_min_messages=100_000,
            enable_auto_commit=False,
        )
    )
    consumer.meter = meter
    processor = StreamProcessor(consumer, Topic(task.source), Steps(task, meter), ONCE_PER_SECOND)
    running.append(processor)
    processor.run()


if __name__ == "__main__":
    run(Task.told())
