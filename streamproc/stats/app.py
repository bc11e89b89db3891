"""The Faust application: reads the metrics topics into windows, publishes those that close, keeps all by changelog.

Each metrics topic has a table, whose changelog has as many partitions as the topic: Faust gives both to the same
process, and reads the changelog before it reads on. All state is in the tables, and what reads and writes them is
``Windows``, which counts every record once however often it is read. For that to hold here:

- the changelog records of some metrics records are acknowledged by Kafka before these are acknowledged to Faust, so
  that committed offsets never run ahead of the state;
- they are written in the order in which ``Windows`` writes, by one producer, to one partition;
- an older value never replaces a newer one when a changelog is read: a process that was paused while its partitions
  moved may have written it late.

Only what is committed is read of transactions: metrics of ``exactly_once`` tasks that were given up do not count.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import faust
import orjson
from faust.tables.table import Table
from faust.transport.drivers import aiokafka as driver
from faust.types import TP

from streamproc.broker.connection import bootstrap_hosts, client_options
from streamproc.broker.privileges import Privilege
from streamproc.broker.translation import translate
from streamproc.errors import BrokerAuthorizationError, InternalError, StatsError, StreamprocError
from streamproc.observe.health import Health
from streamproc.settings import Settings
from streamproc.stats.view import fleet, published
from streamproc.stats.windows import Windows

MAX_RECORDS = 1_000
"""The most that are applied before they are written: each changed window is one changelog record then."""
WITHIN_S = 0.2
TICK_S = 1.0
QUIET_S = 10.0
"""Without records for this long, and at least the grace, a partition's time goes on by the clock."""
COMMIT_INTERVAL_S = 1.0
SHARED_OUT_S = 0.02
"""How often records that came early look whether their tables are whole."""
_TO_SESSION = 10

log = logging.getLogger(__name__)
_faust_log = logging.getLogger("faust.stats")
"""Faust's services log each of their steps under the module of their class, which would be this one."""


class ChangelogTable(Table[str, Any]):
    """A table whose keys begin with their partition, and whose values hold the offset that they are of."""

    logger = _faust_log

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._writing: list[Any] = []

    def partition_for_key(self, key: str) -> int:
        """The partition in the key: Faust would take that of the record at hand, and here are many at once."""
        return int(key.split("/", 1)[0])

    def send_changelog(self, *args: Any, **kwargs: Any) -> Any:
        """Write a record, to be waited for."""
        writing = super().send_changelog(*args, **kwargs)
        self._writing.append(writing)
        return writing

    async def written(self) -> None:
        """Wait until Kafka has acknowledged all changelog records so far."""
        writing, self._writing = self._writing, []
        await asyncio.gather(*writing)

    def apply_changelog_batch(self, batch: Iterable[Any]) -> None:
        """Take what a changelog has, but for values that are older than the one there is."""
        newest: dict[str, int] = {}
        kept = []
        for event in batch:
            value = event.value
            if value is not None:
                known = newest[event.key] if event.key in newest else self.data.get(event.key, value)["applied"]
                if value["applied"] < known:
                    continue
            newest[event.key] = -1 if value is None else value["applied"]
            kept.append(event)
        super().apply_changelog_batch(kept)


class _CommittedThread(driver.AIOKafkaConsumerThread):
    logger = _faust_log

    def _create_worker_consumer(self, transport: Any) -> Any:
        consumer = super()._create_worker_consumer(transport)
        # Faust knows it only together with transactions of its own; aiokafka looks at it when it starts.
        consumer._isolation_level = "read_committed"  # noqa: SLF001 - as above
        return consumer


class _CommittedConsumer(driver.Consumer):
    logger = _faust_log

    def _new_consumer_thread(self) -> Any:
        return _CommittedThread(self, loop=self.loop, beacon=self.beacon)


class CommittedTransport(driver.Transport):
    """Reads what is committed alone."""

    Consumer = _CommittedConsumer


class _App(faust.App):
    logger = _faust_log

    async def on_first_start(self) -> None:
        """Make no folders, as Faust would: nothing is kept in files."""


class StatsApp:
    """The statistics of one process: those of the partitions that its group gives it.

    Made and used in an event loop. ``failed`` is set to what ends it.
    """

    def __init__(
        self,
        settings: Settings,
        partitions: Mapping[str, int],
        *,
        embedded: bool,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """``partitions`` has the metrics topics, and how many each has; an embedded broker has no transactions."""
        self._settings = settings
        self._partitions = partitions
        self._wall_clock = wall_clock
        self._lock = asyncio.Lock()
        self._quiet_since: defaultdict[tuple[str, int], float] = defaultdict(time.monotonic)
        self.failed: asyncio.Future[StreamprocError] = asyncio.get_running_loop().create_future()
        self.faust = _App(settings.stats_group, **faust_options(settings))
        if not embedded:
            self.faust.transport = CommittedTransport(self.faust.conf.broker_consumer, self.faust)
        self._published = self._topic(settings.stats_topic)
        self._tables: dict[str, ChangelogTable] = {}
        self._windows: dict[str, Windows] = {}
        for topic, count in partitions.items():
            table = cast("ChangelogTable", self.faust.Table(topic, key_type=str, partitions=count))
            self._tables[topic] = table
            self._windows[topic] = Windows(table, grace_ms=int(settings.stats.grace_s * 1_000))
            self.faust.agent(self._topic(topic), name=f"stats of {topic}")(self._reader(topic))

    def _topic(self, name: str) -> Any:
        return self.faust.topic(name, key_type=bytes, value_type=bytes, key_serializer="raw", value_serializer="raw")

    async def run(self) -> None:
        """Start, and go on until ``stop``. Raises StreamprocError where it cannot."""
        await self.faust.start()
        log.info("reading %s", ", ".join(self._partitions))
        ended = asyncio.ensure_future(self.faust.wait_for_stopped(asyncio.get_running_loop().create_future()))
        ticking = asyncio.ensure_future(self._tick())
        waiting: set[asyncio.Future[Any]] = {ended, ticking, self.failed}
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if self.failed.done():
                raise self.failed.result()
            if self.faust.crash_reason is not None:
                raise self._error(self.faust.crash_reason)
            if ticking.done():
                ticking.result()
        finally:
            for it in (ended, ticking):
                it.cancel()
            await asyncio.gather(ended, ticking, return_exceptions=True)

    async def stop(self) -> None:
        """Commit what is counted, leave the group, end. May be called at any time."""
        if self.faust.started:
            if self.failed.done():
                # Faust would wait for the records that are read and not counted, which nobody counts any more.
                self.faust.conf.stream_wait_empty = False
            await self.faust.stop()

    # -- records in, windows out

    def _reader(self, topic: str) -> Callable[[Any], Any]:
        async def read(stream: Any) -> None:
            try:
                async for events in stream.noack_take(MAX_RECORDS, within=WITHIN_S):
                    await self._take(topic, [it.message for it in events])
            except Exception as error:  # noqa: BLE001 - Faust would log it and start the agent again
                if not self.failed.done():
                    self.failed.set_result(self._error(error))

        return read

    async def _take(self, topic: str, messages: Sequence[Any]) -> None:
        """Count what was read.

        Faust hands records over a moment before it says that their tables are whole, and those are not read again: they
        wait for it here. What was read before the group shared its partitions out anew is read again by whoever has
        them now, from the last commit on; to count it would skip what lies between.
        """
        while True:
            async with self._lock:
                if self._is_whole:
                    generation = self.faust.consumer_generation_id
                    await self._count(topic, [it for it in messages if it.generation_id == generation])
                    return
            await asyncio.sleep(SHARED_OUT_S)

    async def _count(self, topic: str, messages: Sequence[Any]) -> None:
        apart: defaultdict[int, list[Any]] = defaultdict(list)
        for message in messages:
            apart[message.partition].append(message)
        for partition, its in apart.items():
            self._quiet_since[topic, partition] = time.monotonic()
            self._windows[topic].apply(partition, [(it.offset, it.value) for it in its], self._now_ms())
        await self._tables[topic].written()
        for message in messages:
            message.ack(self.faust.consumer)
        for partition in apart:
            await self._close(topic, partition)

    async def _close(self, topic: str, partition: int) -> None:
        """Publish what is due of a partition; then note that it is."""
        windows = self._windows[topic]
        if not windows.has_due(partition):
            return
        sent = [
            await self._published.send(key=key.encode(), value=orjson.dumps(row))
            for key, row in published(topic, windows.due(partition))
        ]
        await asyncio.gather(*sent)
        windows.closed(partition)
        await self._tables[topic].written()

    async def _tick(self) -> None:
        """Close windows of partitions to which nothing comes any more, and what a kill left to be closed."""
        while True:
            await asyncio.sleep(TICK_S)
            for topic in self._partitions:
                for partition in sorted(self._held(topic)):
                    async with self._lock:
                        if partition in self._held(topic):
                            await self._let_time_go_on(topic, partition)
                            await self._close(topic, partition)

    async def _let_time_go_on(self, topic: str, partition: int) -> None:
        now_ms, windows = self._now_ms(), self._windows[topic]
        quiet_s = time.monotonic() - self._quiet_since[topic, partition]
        if quiet_s < max(QUIET_S, self._settings.stats.grace_s) or not windows.is_behind(partition, now_ms):
            return
        at = TP(topic, partition)
        consumer = self.faust.consumer
        ends = await consumer.highwaters(at)
        position = await consumer.position(at)
        if position is not None and position >= (ends.get(at) or 0) and not consumer.unacked:
            windows.advance(partition, now_ms)
            await self._tables[topic].written()

    # -- what is seen from outside

    @property
    def _is_whole(self) -> bool:
        """Whether the windows of its partitions are here; not while the group shares the partitions out."""
        return not self.faust.rebalancing and bool(self.faust.tables.actives_ready)

    def _held(self, topic: str) -> set[int]:
        """The partitions of a topic whose windows are here, whole; none while the group shares them out."""
        if not self._is_whole:
            return set()
        return {it.partition for it in self.faust.consumer.assignment() if it.topic == topic}

    def live(self) -> Health:
        """Whether it goes on."""
        reason = self.faust.crash_reason
        return Health.of() if reason is None else Health.of(f"it has ended: {reason}")

    def ready(self) -> Health:
        """Whether its tables are those of its partitions."""
        app = self.faust
        if not app.started or app.rebalancing or not app.tables.actives_ready:
            return Health.of("the group shares the partitions out, or their windows are read from the changelog")
        return Health.of()

    def windows(self, *, width_s: int, last: int, task: str | None) -> dict[str, Any]:
        """The newest windows of a width, and how far each partition is read."""
        tables = {topic: (windows, sorted(self._held(topic))) for topic, windows in self._windows.items()}
        return {
            "name": self._settings.name,
            "window_s": width_s,
            "partitions": [
                {"topic": topic, "partition": partition, **windows.progress(partition).state()}
                for topic, (windows, partitions) in tables.items()
                for partition in partitions
            ],
            "windows": fleet(tables, width_s=width_s, last=last, task=task),
        }

    def _now_ms(self) -> int:
        return int(self._wall_clock() * 1_000)

    def _error(self, error: BaseException) -> StreamprocError:
        if isinstance(error, StreamprocError):
            return error
        if type(error).__module__.startswith(("aiokafka", "kafka", "faust", "mode")):
            written = [*(table.changelog_topic_name for table in self._tables.values()), self._settings.stats_topic]
            needs = [Privilege("Write", "Topic", topic) for topic in written]
            told = translate(error, self._settings.kafka, doing="write the statistics", needs=needs)
            if isinstance(told, BrokerAuthorizationError):
                return told
            said = str(error) or type(error).__name__
            return StatsError(
                f"Kafka ended the statistics: {type(error).__name__}: {said}; "
                f"nothing that is counted is lost, start it again ({self._settings.kafka.bootstrap_servers})"
            )
        return InternalError(error, where="the statistics")


def faust_options(settings: Settings) -> dict[str, Any]:
    """What Faust has to know of the settings: Kafka, and that there is neither a web server nor a folder of its own."""
    kafka = settings.kafka
    options = client_options(kafka, settings.stats_group)
    session_s = kafka.session_timeout_ms / 1_000
    hosts = [(f"[{host}]" if ":" in host else host, port) for host, port in bootstrap_hosts(kafka)]
    return {
        "broker": ";".join(f"kafka://{host}:{port}" for host, port in hosts),
        "broker_credentials": _credentials(options),
        "broker_client_id": kafka.client_id or settings.name,
        "broker_request_timeout": max(kafka.request_timeout_ms / 1_000, session_s),
        "broker_session_timeout": session_s,
        "broker_heartbeat_interval": session_s / _TO_SESSION,
        "broker_max_poll_interval": kafka.max_poll_interval_ms / 1_000,
        "broker_max_poll_records": MAX_RECORDS,
        "broker_commit_interval": COMMIT_INTERVAL_S,
        "consumer_group_instance_id": kafka.group_instance_id,
        "consumer_auto_offset_reset": "earliest",
        "producer_acks": -1,
        "producer_linger": 0.005,
        "store": "memory://",
        "Table": ChangelogTable,
        "table_standby_replicas": 0,
        "topic_allow_declare": False,
        "topic_disable_leader": True,
        "stream_recovery_delay": 0,
        "web_enabled": False,
        "autodiscover": False,
        "worker_redirect_stdouts": False,
    }


def _credentials(options: Mapping[str, Any]) -> Any:
    """The client's own options in Faust's terms."""
    context = options.get("ssl_context")
    if "sasl_mechanism" in options:
        return faust.SASLCredentials(
            username=options["sasl_plain_username"],
            password=options["sasl_plain_password"],
            mechanism=options["sasl_mechanism"],
            ssl_context=context,
        )
    return None if context is None else faust.SSLCredentials(context)
