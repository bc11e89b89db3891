"""``streamproc lag``: how far each task is behind, asked of Kafka; the processor need not run."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import orjson
import typer

from streamproc.cli.kafka_options import BootstrapOption, connected, run_async, with_address
from streamproc.cli.terminal import ConfigOption, JsonOption, print_json, print_table, stdout
from streamproc.records import TopicPartition

if TYPE_CHECKING:
    from streamproc.broker.interface import Admin
    from streamproc.broker.reader import KafkaReader
    from streamproc.settings import KafkaSettings, Settings

app = typer.Typer()

_READ_TIMEOUT_S = 5.0
_INTERVAL_S = 2.0


@dataclass(frozen=True, slots=True)
class PartitionLag:
    """How far one task is behind in one partition; ``seconds`` is None where the record's time cannot be had."""

    task: str
    topic: str
    partition: int
    committed: int | None
    end: int
    records: int
    seconds: float | None


@app.command(epilog="Example: streamproc lag -c streamproc.yaml --json")
def lag(
    *,
    config: ConfigOption = None,
    bootstrap_servers: BootstrapOption = None,
    as_json: JsonOption = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it again every two seconds.")] = False,
) -> None:
    """Show how far each task is behind, per partition: unread records, and the age of the oldest of them in seconds."""
    from streamproc.settings_loading import load_settings  # noqa: PLC0415 - --help needs no pydantic

    settings = load_settings(config, os.environ)
    kafka = with_address(settings.kafka, bootstrap_servers)
    run_async(lambda: _show(settings, kafka, as_json=as_json, watch=watch))


async def _show(settings: Settings, kafka: KafkaSettings, *, as_json: bool, watch: bool) -> None:
    from streamproc.broker.admin import KafkaAdmin  # noqa: PLC0415 - --help needs no Kafka client
    from streamproc.broker.reader import KafkaReader  # noqa: PLC0415 - as above

    async with (
        connected(KafkaAdmin(kafka), kafka) as admin,
        KafkaReader(kafka, client_id="streamproc-lag") as reader,
    ):
        while True:
            lags = await measure(settings, admin, reader, time.time())
            if as_json and watch:
                sys.stdout.write(orjson.dumps([asdict(it) for it in lags]).decode() + "\n")
                sys.stdout.flush()
            elif as_json:
                print_json([asdict(it) for it in lags])
            else:
                if watch and stdout.is_terminal:
                    stdout.clear()
                _print(lags)
            if not watch:
                return
            await asyncio.sleep(_INTERVAL_S)


async def measure(settings: Settings, admin: Admin, reader: KafkaReader, now: float) -> list[PartitionLag]:
    """The lag of every task in every partition of its topics.

    Without a committed offset, a task is behind by what ``auto_offset_reset`` will make it read.

    Raises:
        TopicMissingError: an input topic does not exist.
        BrokerError: Kafka does not answer, or refuses.
    """
    await admin.check_topics([name for task in settings.tasks.values() for name in task.input.topics], "Read")
    topics = await admin.topics()
    lags: list[PartitionLag] = []
    for name, task in settings.tasks.items():
        partitions = [TopicPartition(it, number) for it in task.input.topics for number in range(topics[it].partitions)]
        committed = await admin.committed(settings.group_of(name), partitions)
        begins = await admin.begin_offsets(partitions)
        ends = await admin.end_offsets(partitions)
        fresh = begins if task.input.auto_offset_reset == "earliest" else ends
        # Records that retention has deleted since the commit cannot be read any more: they are lost, not late.
        positions = {it: min(max(committed.get(it, fresh[it]), begins[it]), ends[it]) for it in partitions}
        unread = {it: offset for it, offset in positions.items() if offset < ends[it]}
        times = await _times(reader, unread)
        for it in partitions:
            at = times.get(it)
            seconds = 0.0 if it not in unread else None if at is None else round(max(0.0, now - at / 1_000), 3)
            behind = ends[it] - positions[it]
            lags.append(PartitionLag(name, it.topic, it.partition, committed.get(it), ends[it], behind, seconds))
    return lags


async def _times(reader: KafkaReader, positions: Mapping[TopicPartition, int]) -> dict[TopicPartition, int]:
    """The timestamp of the first record at or after each position, in milliseconds, where one can be read in time."""
    times: dict[TopicPartition, int] = {}
    reader.assign(positions)
    deadline = time.monotonic() + _READ_TIMEOUT_S
    while len(times) < len(positions) and (remaining := deadline - time.monotonic()) > 0:
        found = await reader.getmany(timeout_ms=int(min(remaining, 0.5) * 1_000) + 1)
        for it, records in found.items():
            partition = TopicPartition(*it)
            times.setdefault(partition, records[0].timestamp)
            reader.drop(partition)
    reader.assign({})
    return times


def _print(lags: Sequence[PartitionLag]) -> None:
    rows = [
        (
            it.task,
            it.topic,
            it.partition,
            "none" if it.committed is None else f"{it.committed:,}",
            f"{it.end:,}",
            f"{it.records:,}",
            "?" if it.seconds is None else f"{it.seconds:,.1f}",
        )
        for it in lags
    ]
    columns = ("task", "topic", "partition", "committed", "end", "lag (records)", "lag (s)")
    print_table(columns, rows, right=columns[2:], whole=columns[:1:-1], spare=("end", "committed"))
