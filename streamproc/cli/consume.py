"""``streamproc consume``: records to lines, without a consumer group."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from streamproc.cli.kafka_options import BootstrapOption, connected, kafka_settings, run_async
from streamproc.cli.positions import WHERE_HELP, Where, offsets_of, parse_where, partitions_of
from streamproc.cli.terminal import ConfigOption
from streamproc.errors import StreamprocError
from streamproc.record_lines import write_full, write_value
from streamproc.records import TopicPartition

if TYPE_CHECKING:
    from streamproc.broker.reader import KafkaReader
    from streamproc.settings import KafkaSettings

app = typer.Typer()

_POLL_MS = 200


@app.command(
    epilog="Example: streamproc consume digits.results -n 5\n\nExample: streamproc consume digits.dead --full --from 1h"
)
def consume(
    topic: Annotated[str, typer.Argument(metavar="TOPIC", help="The topic to read.")],
    *,
    config: ConfigOption = None,
    bootstrap_servers: BootstrapOption = None,
    count: Annotated[int | None, typer.Option("-n", metavar="N", min=0, help="End after so many records.")] = None,
    begin: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="WHERE",
            help=f"{WHERE_HELP}.",
        ),
    ] = "beginning",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for further records at the end.")] = False,
    full: Annotated[
        bool, typer.Option("--full", help="With topic, partition, offset, timestamp, key, headers.")
    ] = False,
    partition: Annotated[int | None, typer.Option(metavar="N", min=0, help="Read this partition only.")] = None,
    uncommitted: Annotated[
        bool, typer.Option("--uncommitted", help="Also what transactions have not committed, or have aborted.")
    ] = False,
    timeout: Annotated[
        float | None, typer.Option(metavar="S", min=0, help="End when no record has come for so many seconds.")
    ] = None,
) -> None:
    """Read a topic as JSON lines, up to its end or for ever; commits nothing and disturbs no consumer group.

    Values that are JSON come out as they are, others as {"$text": "..."} or {"$base64": "..."}.
    With -n and --timeout, too few records are a failure (exit code 1). With --bootstrap-servers, no settings file is
    needed.
    """
    where = parse_where(begin, time.time(), "--from")
    settings = kafka_settings(config, bootstrap_servers)
    what = _What(topic, partition, uncommitted)
    written = run_async(lambda: _consume(settings, what, where, _Limits(count, follow, timeout), full=full))
    if count is not None and timeout is not None and written < count:
        raise StreamprocError(f"{written} of {count} records came from topic {topic}, then none for {timeout:g} s")


@dataclass(frozen=True, slots=True)
class _Limits:
    count: int | None
    follow: bool
    timeout_s: float | None


@dataclass(frozen=True, slots=True)
class _What:
    topic: str
    partition: int | None
    uncommitted: bool


async def _consume(settings: KafkaSettings, what: _What, where: Where, limits: _Limits, *, full: bool) -> int:
    from streamproc.broker.admin import KafkaAdmin  # noqa: PLC0415 - --help needs no Kafka client
    from streamproc.broker.reader import KafkaReader  # noqa: PLC0415 - as above

    async with connected(KafkaAdmin(settings, uncommitted=what.uncommitted), settings) as admin:
        partitions = await partitions_of(admin, [what.topic], what.partition)
        ends = await admin.end_offsets(partitions)
        positions = await offsets_of(where, admin, partitions, ends)
    async with KafkaReader(settings, client_id="streamproc-consume", uncommitted=what.uncommitted) as reader:
        return await _copy(reader, positions, ends, limits, full)


async def _copy(
    reader: KafkaReader,
    positions: Mapping[TopicPartition, int],
    ends: Mapping[TopicPartition, int],
    limits: _Limits,
    full: bool,
) -> int:
    """Write records until a limit, or the end, is reached; how many."""
    write = write_full if full else write_value
    output = sys.stdout.buffer
    reader.assign(positions)
    unread = {it for it in positions if limits.follow or positions[it] < ends[it]}
    written, last = 0, time.monotonic()
    while unread and written != limits.count:
        most = None if limits.count is None else limits.count - written
        wait_ms = _POLL_MS if limits.timeout_s is None else max(1, min(_POLL_MS, int(limits.timeout_s * 1_000)))
        found = await reader.getmany(timeout_ms=wait_ms, max_records=most)
        for it, records in found.items():
            # What came after we asked for the end is not ours, or a busy topic would have none.
            wanted = records if limits.follow else [record for record in records if record.offset < ends[it]]
            output.writelines([write(record) + b"\n" for record in wanted])
            written += len(wanted)
        if found:
            output.flush()
            last = time.monotonic()
        elif limits.timeout_s is not None and time.monotonic() - last >= limits.timeout_s:
            break
        if not limits.follow:
            done = [it for it in unread if await reader.position(it) >= ends[it]]
            reader.drop(*done)
            unread.difference_update(done)
    return written
