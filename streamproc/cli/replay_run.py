"""``streamproc replay run``: a capture into topics, or straight through a backend."""

from __future__ import annotations

import contextlib
import os
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import typer

from streamproc.cli.kafka_options import BootstrapOption, connected, kafka_settings, run_async, waiting_for
from streamproc.cli.terminal import ConfigOption, JsonOption, Progress, UsageError, count_of, print_json, say
from streamproc.errors import BrokerAuthorizationError

if TYPE_CHECKING:
    from streamproc.broker.interface import Admin, Producer
    from streamproc.record_lines import PlacedRecord
    from streamproc.replay.lanes import Lanes, PartitionOfKey, Stamp
    from streamproc.replay.pace import Deviation, Pace
    from streamproc.settings import KafkaSettings, Settings

app = typer.Typer()

WAIT_TIMEOUT_S = 60.0
_LOOKS = 20


@app.command(
    epilog="Example: streamproc replay run orders.jsonl.gz --to orders-test --speed 10\n\n"
    "Example: streamproc replay run orders.jsonl.gz --backend -o results.jsonl.gz"
)
def run(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A capture: *.jsonl, *.jsonl.gz or *.parquet.")],
    *,
    to: Annotated[
        str | None,
        typer.Option(metavar="TOPIC", help="Write everything to this topic, and not to those of the capture."),
    ] = None,
    topic_map: Annotated[
        list[str] | None,
        typer.Option(metavar="FROM=TO", help="Write what is of topic FROM to topic TO; may be repeated."),
    ] = None,
    config: ConfigOption = None,
    bootstrap_servers: BootstrapOption = None,
    speed: Annotated[
        float | None, typer.Option(metavar="N", help="N times as fast as it was.", show_default="1, the original pace")
    ] = None,
    rate: Annotated[float | None, typer.Option(metavar="N", help="N records a second, whatever it was.")] = None,
    as_fast: Annotated[bool, typer.Option("--as-fast-as-possible", "--max", help="Do not wait at all.")] = False,
    timestamps: Annotated[
        Literal["keep", "now", "shift"],
        typer.Option(help="Those of the capture, the time of writing, or moved so that the first one is now."),
    ] = "keep",
    by_key: Annotated[
        bool, typer.Option("--by-key", help="Let the key choose the partition, and not where the record was.")
    ] = False,
    run_id: Annotated[
        str | None, typer.Option(metavar="ID", help="Goes into the headers of every record.", show_default="made up")
    ] = None,
    limit: Annotated[int | None, typer.Option("-n", "--limit", metavar="N", min=1, help="The first N records.")] = None,
    into_source: Annotated[
        bool, typer.Option("--into-source", help="Also write into the very topic that was captured.")
    ] = False,
    wait_for: Annotated[
        list[str] | None,
        typer.Option(metavar="GROUP", help="Then wait until this consumer group has everything; may be repeated."),
    ] = None,
    wait_timeout: Annotated[
        float, typer.Option(metavar="S", min=0, help="Fail when the group has committed nothing for so many seconds.")
    ] = WAIT_TIMEOUT_S,
    backend: Annotated[
        bool, typer.Option("--backend", help="Without Kafka: straight through the settings' backend.")
    ] = False,
    task: Annotated[
        str | None, typer.Option(metavar="NAME", help="With --backend: the task, where there are several.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="With --backend: where the results go.")
    ] = None,
    dead_letters: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --backend: where the dead letters go.")
    ] = None,
    metrics: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --backend: where the metrics records go.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace these files.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Replay a capture into topics, at the pace at which it was captured, or straight through a backend.

    Every record has the id of the run, and the place that it was captured from, in its headers
    (streamproc-replay-run, streamproc-replay-source); results carry them on. With --bootstrap-servers, no settings file
    is needed. With --backend there is no Kafka, and the pace is as fast as possible unless told.
    """
    if sum((speed is not None, rate is not None, as_fast)) > 1:
        raise typer.BadParameter("--speed, --rate and --as-fast-as-possible exclude each other")
    for option, number in (("--speed", speed), ("--rate", rate)):
        if number is not None and number <= 0:
            raise typer.BadParameter(f"{option} must be above 0")
    if to is not None and topic_map:
        raise typer.BadParameter("--to and --topic-map exclude each other")
    _check_mode(
        backend=backend,
        kafka_only={
            "--to": to,
            "--bootstrap-servers": bootstrap_servers,
            "--by-key": by_key,
            "--wait-for": wait_for,
            "--into-source": into_source,
        },
        backend_only={"--task": task, "--output": output, "--dead-letters": dead_letters, "--metrics": metrics},
    )
    if backend and output is None:
        raise typer.BadParameter("--backend needs --output FILE for the results")
    from streamproc.replay.capture_file import read_capture  # noqa: PLC0415 - --help needs it not
    from streamproc.replay.run import make_run_id  # noqa: PLC0415 - as above
    from streamproc.runtime.cycles import look_for_cycles_seldom  # noqa: PLC0415 - as above
    from streamproc.runtime.heap import keep_freed_memory  # noqa: PLC0415 - as above

    look_for_cycles_seldom()
    keep_freed_memory()

    asked = _Asked(
        file=file,
        run=run_id or make_run_id(time.time(), random.SystemRandom()),
        topics=_parse_map(topic_map or []),
        to=to,
        by_key=by_key,
        timestamps=timestamps,
        pace=_Pace(speed, rate, as_fast or (backend and speed is None and rate is None)),
        quiet=quiet,
    )
    records = islice(read_capture(file), limit)
    replaying = _Replaying(asked, records)
    try:
        if backend:
            outputs = _Outputs({"results": output, "dead": dead_letters, "metrics": metrics}, force=force)
            _through_backend(replaying, config, task, outputs)
        else:
            settings = kafka_settings(config, bootstrap_servers)
            waits = _Waits(wait_for or [], wait_timeout)
            run_async(lambda: _into_topics(replaying, settings, waits, into_source=into_source))
    except KeyboardInterrupt:
        if not quiet and backend:
            say(f"interrupted; {output} is not written")
        elif not quiet:
            say(f"interrupted; {count_of(replaying.shown.count, 'record')} written and acknowledged, run {asked.run}")
        raise
    replaying.tell(as_json=as_json)


@dataclass(frozen=True, slots=True)
class _Pace:
    speed: float | None
    rate: float | None
    as_fast: bool

    def make(self) -> Pace:
        from streamproc.replay.pace import FixedRate, OriginalPace, Unpaced  # noqa: PLC0415 - --help needs it not

        if self.as_fast:
            return Unpaced()
        return FixedRate(self.rate) if self.rate is not None else OriginalPace(self.speed or 1.0)

    def __str__(self) -> str:
        if self.as_fast:
            return "as fast as possible"
        if self.rate is not None:
            return f"{self.rate:g} records/s"
        return "original" if self.speed in (None, 1.0) else f"{self.speed:g} times the original"


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the command line says."""

    file: Path
    run: str
    topics: dict[str, str]
    to: str | None
    by_key: bool
    timestamps: str
    pace: _Pace
    quiet: bool


@dataclass(frozen=True, slots=True)
class _Waits:
    groups: list[str]
    timeout_s: float


class _Replaying:
    """One run, wherever it goes to."""

    def __init__(self, asked: _Asked, records: Iterator[PlacedRecord]) -> None:
        from streamproc.replay.pace import Deviation  # noqa: PLC0415 - --help needs it not

        self.asked = asked
        self.shown = Progress("replayed", quiet=asked.quiet)
        self.deviation: Deviation | None = None if asked.pace.as_fast else Deviation()
        self.written: Counter[str] = Counter()
        """Of a backend: results and dead letters, by topic."""
        self._first_timestamp: int | None = None
        self._started_ms = int(time.time() * 1_000)
        self._read: Counter[str] = Counter()
        self._records = self._counted(records)

    def _counted(self, records: Iterator[PlacedRecord]) -> Iterator[PlacedRecord]:
        for record in records:
            self._read[record.topic] += 1
            yield record

    def target_of(self, topic: str) -> str:
        """The topic to write to."""
        return self.asked.to or self.asked.topics.get(topic, topic)

    def stamp(self) -> Stamp:
        """The timestamps to write."""
        if self.asked.timestamps == "keep":
            return lambda timestamp: timestamp if timestamp >= 0 else None  # the oldest producers wrote none
        return self._shifted if self.asked.timestamps == "shift" else lambda _: None

    def _shifted(self, timestamp: int) -> int:
        if self._first_timestamp is None:
            self._first_timestamp = timestamp
            self._started_ms = int(time.time() * 1_000)
        return timestamp - self._first_timestamp + self._started_ms

    async def go(
        self,
        producer: Producer,
        target_of: Callable[[str], str],
        *,
        partition_of_key: PartitionOfKey | None = None,
        before_topic: Any = None,
        before_sending: Any = None,
    ) -> Lanes:
        """Replay everything, and wait until it is acknowledged."""
        from streamproc.replay.lanes import Lanes  # noqa: PLC0415 - --help needs it not
        from streamproc.replay.run import replay  # noqa: PLC0415 - as above

        if not self.asked.quiet:
            say(f"run {self.asked.run}")
        self.shown = Progress("replayed", quiet=self.asked.quiet)  # connecting is no part of it
        lanes = Lanes(
            producer,
            self.asked.run,
            target_of=target_of,
            stamp=self.stamp(),
            partition_of_key=partition_of_key,
            before_topic=before_topic,
            on_acknowledged=self.shown.add,
            deviation=self.deviation,
        )
        pace = self.asked.pace.make()
        await replay(self._records, lanes, pace, clock=time.perf_counter, before_sending=before_sending)
        return lanes

    def tell(self, *, as_json: bool) -> None:
        """The result: to people on standard error, to scripts on standard output."""
        asked, deviation = self.asked, self.deviation
        pace: dict[str, Any] = {"asked": str(asked.pace)}
        if deviation is not None:
            for name, of in (("inter_arrival_error_ms", deviation.between_ms), ("late_ms", deviation.late_ms)):
                pace[name] = {"p50": of(0.5), "p99": of(0.99), "max": of(1.0)}
        if not asked.quiet:
            self.shown.finish()
            if deviation is not None and self.shown.count:
                say(
                    f"pace {asked.pace}: time between records off by at most {deviation.between_ms(0.99):.1f} ms for "
                    f"99 % of them, {deviation.between_ms(1.0):.1f} ms for all; late by at most "
                    f"{deviation.late_ms(1.0):.1f} ms"
                )
            for topic, count in self.written.items():
                say(f"{topic}: {count_of(count, 'record')}")
        if as_json:
            written = {"written": dict(self.written)} if self.written else {}
            print_json(
                {"run": asked.run, "file": str(asked.file), **self.shown.as_json(), "topics": dict(self._read)}
                | {"pace": pace, **written}
            )


# -- into Kafka


async def _into_topics(replaying: _Replaying, settings: KafkaSettings, waits: _Waits, *, into_source: bool) -> None:
    from streamproc.broker.admin import KafkaAdmin  # noqa: PLC0415 - --help needs no Kafka client
    from streamproc.broker.connections import KafkaConnections  # noqa: PLC0415 - as above
    from streamproc.replay.run import wait_for_groups  # noqa: PLC0415 - as above

    connections = KafkaConnections(settings)
    async with connected(KafkaAdmin(settings), settings) as admin:
        guard = _Guard(settings, admin, replaying, into_source=into_source)
        async with _started(
            connections.producer(client_id="streamproc-replay", compression="none"), settings
        ) as producer:
            lanes = await replaying.go(
                producer,
                replaying.target_of,
                partition_of_key=connections.partition_of_key if replaying.asked.by_key else None,
                before_topic=guard.look_at,
            )
        if waits.groups:
            with _Waiting(waits.groups, quiet=replaying.asked.quiet) as waiting:
                await wait_for_groups(
                    admin,
                    waits.groups,
                    lanes.partitions,
                    timeout_s=waits.timeout_s,
                    clock=time.monotonic,
                    on_lag=waiting.lag,
                )


@contextlib.asynccontextmanager
async def _started(producer: Producer, settings: KafkaSettings) -> AsyncIterator[Producer]:
    with waiting_for(settings):
        await producer.start()
    try:
        yield producer
    finally:
        await producer.stop()


class _Guard:
    """Looks at each topic before it is written to."""

    def __init__(self, settings: KafkaSettings, admin: Admin, replaying: _Replaying, *, into_source: bool) -> None:
        self._settings = settings
        self._admin = admin
        self._replaying = replaying
        self._into_source = into_source

    async def look_at(self, record: PlacedRecord, topic: str) -> None:
        """Raise where the topic is the one that was captured; warn where Kafka would delete old records at once."""
        if topic == record.topic and not self._into_source and await self._is_there(record):
            raise UsageError(
                f"topic {topic} at {self._settings.bootstrap_servers} is the very one that was captured, and whoever "
                f"reads it would read these records again; name another with --to, or say --into-source"
            )
        await self._warn_of_retention(record, topic)

    async def _is_there(self, record: PlacedRecord) -> bool:
        """Whether Kafka has this record where the capture has it from."""
        from streamproc.broker.reader import KafkaReader  # noqa: PLC0415 - --help needs no Kafka client
        from streamproc.records import TopicPartition  # noqa: PLC0415 - as above

        place = TopicPartition(record.topic, record.partition)
        info = (await self._admin.topics()).get(record.topic)
        if info is None or record.partition >= info.partitions:
            return False
        begin = (await self._admin.begin_offsets([place]))[place]
        end = (await self._admin.end_offsets([place]))[place]
        if not begin <= record.offset < end:
            return False
        async with KafkaReader(self._settings, client_id="streamproc-replay", uncommitted=True) as reader:
            reader.assign({place: record.offset})
            for _ in range(_LOOKS):
                for records in (await reader.getmany(timeout_ms=500, max_records=1)).values():
                    return records[0].offset == record.offset and records[0].timestamp == record.timestamp
                if await reader.position(place) > record.offset:
                    break  # there is nothing but what transactions leave behind
        return False

    async def _warn_of_retention(self, record: PlacedRecord, topic: str) -> None:
        if self._replaying.asked.timestamps != "keep" or self._replaying.asked.quiet:
            return
        try:
            entry = (await self._admin.describe_configs(topic)).get("retention.ms")
        except BrokerAuthorizationError as error:
            say(f"warning: whether Kafka keeps these records is not known: {error}")
            return
        kept_ms = int(entry.value) if entry is not None and entry.value else -1
        if 0 <= kept_ms < time.time() * 1_000 - record.timestamp:
            say(
                f"warning: topic {topic} keeps records for {kept_ms / 86_400_000:g} days (retention.ms), and these are "
                f"older: Kafka may delete them at any time; --timestamps now or shift keeps them"
            )


class _Waiting:
    """Says how far the groups are behind; on a terminal, in one line."""

    def __init__(self, groups: list[str], *, quiet: bool) -> None:
        from streamproc.cli.terminal import stderr  # noqa: PLC0415 - beside what uses it

        self._console = stderr
        self._what = ", ".join(groups)
        self._live = stderr.is_terminal and not quiet
        if not quiet and not self._live:
            say(f"waiting for {self._what} …")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._console.print("", end="\n")

    def lag(self, records: int) -> None:
        """So many records are left."""
        if self._live:
            line = f"waiting for {self._what}: {records:,} records to go        "
            self._console.print(line, end="\r", highlight=False, soft_wrap=True)


# -- through a backend


class _Outputs:
    """The files that a backend's records go to, by what they are."""

    def __init__(self, paths: dict[str, Path | None], *, force: bool) -> None:
        self._paths = {kind: path for kind, path in paths.items() if path is not None}
        if len(set(self._paths.values())) < len(self._paths):
            raise typer.BadParameter("--output, --dead-letters and --metrics need files of their own")
        for path in self._paths.values():
            if path.exists() and not force:
                raise UsageError(f"{path}: is there already; name another file, or replace it with --force")

    @contextlib.contextmanager
    def opened(self, topics: dict[str, str]) -> Iterator[dict[str, Any]]:
        """Writers by topic. The files are there once everything is in them."""
        from streamproc.replay.capture_file import part_of, write_capture  # noqa: PLC0415 - --help needs it not

        parts = {kind: part_of(path) for kind, path in self._paths.items()}
        try:
            with contextlib.ExitStack() as stack:
                writers = {}
                for kind, part in parts.items():
                    part.unlink(missing_ok=True)
                    writers[topics[kind]] = stack.enter_context(write_capture(part))
                yield writers
            for kind, part in parts.items():
                part.replace(self._paths[kind])
        finally:
            for part in parts.values():
                part.unlink(missing_ok=True)


def _through_backend(replaying: _Replaying, config: Path | None, task: str | None, outputs: _Outputs) -> None:
    from streamproc.observe.logs import configure_logging  # noqa: PLC0415 - --help needs no processor
    from streamproc.settings_loading import load_settings  # noqa: PLC0415 - as above

    settings = load_settings(config, os.environ)
    name = task_of(settings, task)
    # The processor's own news (a worker that starts, a partition that is assigned) are none here.
    level = "error" if replaying.asked.quiet else "warning"
    settings = settings.model_copy(update={"logging": settings.logging.model_copy(update={"level": level})})
    configure_logging(sys.stderr, **settings.logging.model_dump())
    topics = settings.topics_of(name)
    with outputs.opened({"results": topics.results, "dead": topics.dead, "metrics": topics.metrics}) as writers:
        run_async(lambda: _process(replaying, settings, name, writers))


async def _process(replaying: _Replaying, settings: Settings, task: str, writers: dict[str, Any]) -> None:
    from streamproc.replay.offline import Offline  # noqa: PLC0415 - --help needs no processor

    async with Offline(settings, task, writers) as offline:
        await replaying.go(
            offline.producer(),
            lambda topic: offline.target_of(replaying.target_of(topic)),
            before_sending=offline.take_in,
        )
        await offline.finish()
    replaying.written.update(offline.written)


def task_of(settings: Settings, task: str | None) -> str:
    """The task that is meant: the named one, or the only one. Raises UsageError."""
    names = list(settings.tasks)
    if task is None and len(names) == 1:
        return names[0]
    if task is None:
        raise UsageError(f"there are tasks {', '.join(names)}; say which with --task")
    if task not in names:
        raise UsageError(f"there is no task {task}; there is {', '.join(names)}")
    return task


def _check_mode(*, backend: bool, kafka_only: dict[str, object], backend_only: dict[str, object]) -> None:
    for option, given in (kafka_only if backend else backend_only).items():
        if given:
            raise typer.BadParameter(f"{option} does not go with --backend" if backend else f"{option} needs --backend")


def _parse_map(pairs: list[str]) -> dict[str, str]:
    parsed = {}
    for pair in pairs:
        source, separator, target = pair.partition("=")
        if not separator or not source or not target:
            raise typer.BadParameter(f"--topic-map {pair} is no FROM=TO")
        parsed[source] = target
    return parsed
