"""One run of the demo: broker, topics, processor, records in, results out, everything stopped again.

The processor is the one that ``streamproc run`` starts, from a settings file like any user's. What came of the records
is read back from Kafka as any consumer would read it, and judged by ``report``.

Order of the end: the processor drains and flushes, then the output topics are read to their ends, so that a result that
was written twice is seen, then the broker goes. An error or a cancellation at any point takes the same way out.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import orjson

from streamproc.broker.admin import KafkaAdmin
from streamproc.broker.client import KafkaProducer
from streamproc.broker.connections import KafkaConnections
from streamproc.broker.embedded import EmbeddedBroker
from streamproc.broker.interface import NewTopic
from streamproc.broker.reader import KafkaReader
from streamproc.demo.inference import IMAGES, sample_records
from streamproc.demo.report import Figures, Tally
from streamproc.errors import EmbeddedBrokerError, StreamprocError
from streamproc.records import TopicPartition
from streamproc.runtime.app import Application
from streamproc.settings import Settings, TaskTopics
from streamproc.settings_loading import load_settings

SETTINGS = Path(__file__).with_name("streamproc.yaml")
TASK = "digits"
PARTITIONS = 2
"""Few: a fetch from the embedded broker waits for each partition that has nothing new, 50 ms, one after the other."""
SLICE = 500
READ_RECORDS = 2_000
POLL_MS = 100
STALLED_S = 60.0
END_TIMEOUT_S = 15.0


@dataclass(frozen=True, slots=True)
class Options:
    """What the user may choose."""

    workers: int = 1
    batch_size: int = 64
    port: int = 0
    records: int = IMAGES

    def environment(self, bootstrap_servers: str) -> dict[str, str]:
        """What goes over the settings file. The user's own environment is for the user's own application."""
        return {
            "STREAMPROC_KAFKA__BOOTSTRAP_SERVERS": bootstrap_servers,
            "STREAMPROC_POOL__WORKERS": str(self.workers),
            f"STREAMPROC_TASKS__{TASK.upper()}__BATCH__MAX_SIZE": str(self.batch_size),
            "STREAMPROC_HTTP__PORT": str(self.port),
        }


class Audience(Protocol):
    """Who is told how the run goes."""

    def say(self, text: str) -> None:
        """Something has happened."""

    def advance(self, results: int, batch_size: int | None) -> None:
        """So many results have come so far; the latest batch was this large."""


async def run(options: Options, audience: Audience) -> Figures:
    """Run the demo and return its figures.

    Raises:
        StreamprocError: it could not be run to its end.
    """
    # Each of four producers would say that the embedded broker has no idempotent ones: known, and no news here.
    logging.getLogger("streamproc.broker.producer").setLevel(logging.ERROR)
    loading = asyncio.ensure_future(asyncio.to_thread(sample_records))
    async with EmbeddedBroker() as broker:
        settings = load_settings(SETTINGS, options.environment(broker.bootstrap_servers))
        topics = settings.topics_of(TASK)
        async with KafkaAdmin(settings.kafka) as admin, KafkaReader(settings.kafka) as reader:
            await _create_topics(admin, topics)
            audience.say(f"embedded broker at {broker.bootstrap_servers}, topics {topics.inputs[0]} → {topics.results}")
            outputs = Outputs(reader, topics)
            await _stream(_Run(settings, options, broker, outputs, audience), await loading)
            await outputs.read_to(await admin.end_offsets(list(outputs.positions)))
            ends = await admin.end_offsets(_partitions(topics.inputs[0]))
    return outputs.tally.figures({it.partition: end for it, end in ends.items()}, options.workers)


@dataclass(frozen=True, slots=True)
class _Run:
    settings: Settings
    options: Options
    broker: EmbeddedBroker
    outputs: Outputs
    audience: Audience


async def _stream(it: _Run, images: Sequence[Mapping[str, Any]]) -> None:
    """Run the processor until each record has become something."""
    begun = time.monotonic()
    async with Application(it.settings) as application:
        await _unless_it_ends(application.processor.until_ready(), application, it.broker)
        many = f"{it.options.workers} workers" if it.options.workers > 1 else "1 worker"
        where = f", sidecar at {application.sidecar.url}" if application.sidecar is not None else ""
        it.audience.say(f"{many} trained and ready after {time.monotonic() - begun:.1f} s{where}")
        await _unless_it_ends(_send_and_read(it, images), application, it.broker)


async def _send_and_read(it: _Run, images: Sequence[Mapping[str, Any]]) -> None:
    """Both at once, so that there is something to see; what one of them raises ends the other."""
    sending = asyncio.ensure_future(send(it.settings, images, it.options.records))
    reading = asyncio.ensure_future(it.outputs.read_until_settled(it.options.records, it.audience))
    try:
        done, _ = await asyncio.wait({sending, reading}, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
    finally:
        for task in (sending, reading):
            task.cancel()
        await asyncio.gather(sending, reading, return_exceptions=True)


async def _unless_it_ends(work: Coroutine[Any, Any, None], application: Application, broker: EmbeddedBroker) -> None:
    """Do the work; raise at once what ends the processor or the broker meanwhile."""
    working = asyncio.ensure_future(work)
    processor = asyncio.ensure_future(application.processor.wait())
    brokering = asyncio.ensure_future(broker.wait())
    try:
        await asyncio.wait({working, processor, brokering}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
        elif processor.done():
            processor.result()
            raise StreamprocError("the processor stopped before its work was done")
        else:
            raise EmbeddedBrokerError(f"the embedded broker ended by itself; its log says:\n{broker.log_tail()}")
    finally:
        for task in (working, processor, brokering):
            task.cancel()
        await asyncio.gather(working, processor, brokering, return_exceptions=True)


async def _create_topics(admin: KafkaAdmin, topics: TaskTopics) -> None:
    names = (topics.inputs[0], topics.results, topics.dead)
    wanted = [NewTopic(name, partitions=PARTITIONS, replication=1) for name in names]
    await admin.create_topics([*wanted, NewTopic(topics.metrics, partitions=1, replication=1)])


async def send(settings: Settings, images: Sequence[Mapping[str, Any]], records: int) -> None:
    """Write so many records to the input topic, the images over and over, keyed by their ids."""
    topic = settings.topics_of(TASK).inputs[0]
    choose = KafkaConnections(settings.kafka).partition_of_key
    rows = [(b"%d" % image["id"], orjson.dumps(image)) for image in images]
    producer = KafkaProducer(settings.kafka, client_id="demo")
    await producer.start()
    try:
        acknowledged = []
        for start in range(0, records, SLICE):
            batches = {partition: producer.create_batch() for partition in range(PARTITIONS)}
            for number in range(start, min(start + SLICE, records)):
                key, value = rows[number % len(rows)]
                batches[choose(key, PARTITIONS)].append(timestamp=None, key=key, value=value, headers=[])
            for partition, batch in batches.items():
                if batch.record_count():
                    acknowledged.append(await producer.send_batch(batch, topic, partition))
        await asyncio.gather(*acknowledged)
    finally:
        await producer.stop()


@dataclass
class Outputs:
    """Reads what the processor wrote, without a consumer group, and tallies it."""

    reader: KafkaReader
    topics: TaskTopics
    tally: Tally = field(default_factory=Tally)
    positions: dict[TopicPartition, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.positions = {
            **dict.fromkeys(_partitions(self.topics.results), 0),
            **dict.fromkeys(_partitions(self.topics.dead), 0),
            TopicPartition(self.topics.metrics, 0): 0,
        }
        self.reader.assign(self.positions)

    async def read_until_settled(self, records: int, audience: Audience) -> None:
        """Read until every record has become a result or a dead letter and every batch is accounted for."""
        moved_at = time.monotonic()
        while not self.tally.is_settled(records):
            if await self._read():
                moved_at = time.monotonic()
                audience.advance(self.tally.total, self.tally.latest_batch_size)
            elif time.monotonic() - moved_at > STALLED_S:
                raise StreamprocError(
                    f"after {STALLED_S:.0f} s without a new one, {self.tally.total:,} results and {self.tally.dead:,} "
                    f"dead letters for {records:,} records; what is said above may tell why"
                )

    async def read_to(self, ends: Mapping[TopicPartition, int]) -> None:
        """Read what is still there, up to the given log ends."""
        deadline = time.monotonic() + END_TIMEOUT_S
        while any(self.positions[partition] < end for partition, end in ends.items()):
            if not await self._read() and time.monotonic() > deadline:
                raise StreamprocError(
                    f"topics {self.topics.results} and {self.topics.metrics} cannot be read to their ends"
                )

    async def _read(self) -> bool:
        found = await self.reader.getmany(timeout_ms=POLL_MS, max_records=READ_RECORDS)
        for partition, records in found.items():
            self.positions[TopicPartition(partition.topic, partition.partition)] = records[-1].offset + 1
            for record in records:
                if partition.topic == self.topics.results:
                    self.tally.add_result(record.value or b"", record.timestamp)
                elif partition.topic == self.topics.metrics:
                    self.tally.add_metrics(record.value or b"")
                else:
                    self.tally.add_dead_letter(record.headers)
        return bool(found)


def _partitions(topic: str) -> list[TopicPartition]:
    return [TopicPartition(topic, partition) for partition in range(PARTITIONS)]
