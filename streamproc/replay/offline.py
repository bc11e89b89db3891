"""Replays a capture straight through a backend, without Kafka: the real processor and workers, a broker in memory.

Invariants:

- The processor is the one that ``streamproc run`` runs, with its batches, workers, retries and dead letters. Only the
  circuit is off, since a capture ends, and offsets are committed ten times a second.
- What is committed goes from the broker's memory, and so does output once it is in its file: no more is held than
  ``limits.max_in_flight_records`` twice, or ``MAX_OUTSTANDING_BYTES``, of records, and what came of them.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self

from streamproc.broker.interface import Producer
from streamproc.broker.memory import MemoryBroker
from streamproc.errors import StreamprocError
from streamproc.record_lines import PlacedRecord
from streamproc.records import TopicPartition
from streamproc.replay.capture_file import Writer
from streamproc.runtime.batch_plan import batch_plans
from streamproc.runtime.processor import Processor
from streamproc.runtime.startup import declared_topics, worker_setup
from streamproc.settings import Settings

PARTITIONS = 12
"""Of every topic here; records of further partitions share them, in their order."""
MAX_OUTSTANDING_BYTES = 128 << 20
_COMMIT_INTERVAL_MS = 100
_LOOK_EVERY_S = 0.02


class Offline:
    """A processor of one task over a broker in memory; an asynchronous context manager.

    Args:
        settings: As for ``streamproc run``; Kafka's are not used.
        task: The task that the records are for.
        outputs: By topic of the task (see ``Settings.topics_of``): where its records go. Others are let go.

    Raises:
        StreamprocError: on entering, when the workers cannot be started; later, when the processor has ended.
    """

    def __init__(self, settings: Settings, task: str, outputs: Mapping[str, Writer]) -> None:
        self._settings = _for_one_task(settings, task)
        self._group = settings.group_of(task)
        self._topics = settings.topics_of(task)
        self._outputs = outputs
        self._bound = 2 * settings.tasks[task].limits.max_in_flight_records
        self._broker = MemoryBroker()
        for topic in self._topics.inputs:
            # What was in a topic goes into this one, whatever that one's limit was.
            self._broker.create_topic(topic, PARTITIONS, configs={"max.message.bytes": str(MAX_OUTSTANDING_BYTES)})
        for topic in (self._topics.results, self._topics.dead, self._topics.metrics):
            self._broker.create_topic(topic, PARTITIONS)
        self._processor: Processor | None = None
        self._fed: deque[tuple[int, int]] = deque()
        """Records and bytes that were given, and are not committed: in parts, in their order."""
        self._given = 0
        self._waiting_bytes = 0
        self.written: dict[str, int] = dict.fromkeys((self._topics.results, self._topics.dead), 0)
        """Results and dead letters, by topic."""

    async def __aenter__(self) -> Self:
        settings = self._settings
        self._processor = Processor(
            settings,
            worker_setup(settings, declared_topics(settings)),
            self._broker,
            plans=batch_plans(settings, os.environ),
        )
        try:
            await self._processor.start()
            await self._processor.until_ready()
        except BaseException:
            await self._processor.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._processor is not None:
            await self._processor.stop()
        self._collect()

    def producer(self) -> Producer:
        """Writes to the task's input topics."""
        return self._broker.producer()

    def target_of(self, topic: str) -> str:
        """The input topic for a topic of the capture: the same, or the only one. Raises StreamprocError."""
        inputs = self._topics.inputs
        if topic in inputs:
            return topic
        if len(inputs) > 1:
            raise StreamprocError(
                f"the capture has topic {topic}, and the task reads {', '.join(inputs)}; say which with --topic-map "
                f"{topic}={inputs[0]}"
            )
        return inputs[0]

    async def take_in(self, records: Sequence[PlacedRecord]) -> None:
        """Wait until there is room for records that are about to be written. Raises what has ended the processor."""
        await self._until(lambda done: self._given - done < self._bound and self._waiting_bytes < MAX_OUTSTANDING_BYTES)
        size = sum([len(record.value or b"") for record in records])
        self._given += len(records)
        self._waiting_bytes += size
        self._fed.append((self._given, size))

    async def finish(self) -> None:
        """Wait until everything is processed and committed. Raises what has ended the processor."""
        await self._until(lambda done: done >= self._given)

    async def _until(self, condition: Callable[[int], bool]) -> None:
        while not condition(self._collect()):
            if self._processor is not None and self._processor.failure is not None:
                raise self._processor.failure
            await asyncio.sleep(_LOOK_EVERY_S)

    def _collect(self) -> int:
        """Move output into its files, and let go of what is committed; how many records are."""
        for topic in (self._topics.results, self._topics.dead, self._topics.metrics):
            for number in range(PARTITIONS):
                log = self._broker.log(TopicPartition(topic, number))
                if not log.records:
                    continue
                if (writer := self._outputs.get(topic)) is not None:
                    writer.write(log.records)
                if topic in self.written:
                    self.written[topic] += len(log.records)
                log.truncate(log.end)
        committed = self._broker.committed(self._group)
        for partition, offset in committed.items():
            self._broker.log(partition).truncate(offset)
        done = sum(committed.values())
        while self._fed and self._fed[0][0] <= done:
            self._waiting_bytes -= self._fed.popleft()[1]
        return done


def _for_one_task(settings: Settings, name: str) -> Settings:
    task = settings.tasks[name]
    circuit = task.on_error.circuit.model_copy(update={"enabled": False})
    changed = task.model_copy(
        update={
            "input": task.input.model_copy(update={"auto_offset_reset": "earliest"}),
            "on_error": task.on_error.model_copy(update={"circuit": circuit}),
            "commit_interval_ms": min(_COMMIT_INTERVAL_MS, int(task.commit_interval_s * 1_000)),
        }
    )
    return settings.model_copy(update={"tasks": {name: changed}})
