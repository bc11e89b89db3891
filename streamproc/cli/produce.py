"""``streamproc produce``: lines to records.

Blocks on the input in a thread of its own, so that records go out while the input pauses; stops at the first line that
is not what it should be, with what came before it written. Order is the input's, per partition. Every record that is
counted in the end was acknowledged.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from streamproc.cli.kafka_options import BootstrapOption, kafka_settings, run_async, waiting_for
from streamproc.cli.terminal import (
    ConfigOption,
    JsonOption,
    Progress,
    UsageError,
    count_of,
    no_such_partition,
    print_json,
    say,
)
from streamproc.errors import StreamprocError
from streamproc.record_lines import Line, LineError, read_full, read_keyed, read_value

if TYPE_CHECKING:
    from streamproc.broker.interface import BatchBuilder, Producer
    from streamproc.settings import KafkaSettings

app = typer.Typer()

_CHUNK_BYTES = 1 << 20
_CHUNKS_AHEAD = 8
_STICKY_RECORDS = 256
"""The most records without a key that go to one partition before the next: batches fill, and partitions stay even."""
_RATE_STEP_S = 0.05
_BOM = b"\xef\xbb\xbf"


class InputError(StreamprocError):
    """The input holds a line that cannot be written, or cannot be read."""


@app.command(
    epilog="Example: streamproc produce digits samples.jsonl --key id\n\n"
    "Example: streamproc consume digits --full | streamproc produce digits-copy --full"
)
def produce(
    topic: Annotated[str, typer.Argument(metavar="TOPIC", help="The topic to write to; it must exist.")],
    file: Annotated[str, typer.Argument(metavar="FILE|-", help="JSON lines; - is standard input.")] = "-",
    *,
    config: ConfigOption = None,
    bootstrap_servers: BootstrapOption = None,
    key: Annotated[
        str | None, typer.Option(metavar="FIELD", help="Take the key from this field (a.b: nested).")
    ] = None,
    partition: Annotated[int | None, typer.Option(metavar="N", min=0, help="Write to this partition only.")] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Read lines as `consume --full` writes them: key, headers, timestamp, value.")
    ] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Write every line as it is, JSON or not.")] = False,
    rate: Annotated[float | None, typer.Option(metavar="N", help="Write at most N records a second.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write JSON lines to a topic, one record a line, and wait until Kafka has them all.

    A record with a key goes to the partition that Kafka's own clients choose for it; the others are spread.
    With --bootstrap-servers, no settings file is needed.
    """
    if sum((full, raw, key is not None)) > 1:
        raise typer.BadParameter("--key, --full and --raw exclude each other")
    if rate is not None and rate <= 0:
        raise typer.BadParameter("--rate must be above 0")
    read = read_full if full else Line if raw else partial(read_keyed, field=key) if key else read_value
    settings = kafka_settings(config, bootstrap_servers)
    if quiet:
        logging.getLogger("streamproc").setLevel(logging.ERROR)
    name = "standard input" if file == "-" else file
    with _opened(file) as descriptor:
        progress = Progress("wrote", quiet=quiet)
        lines = _Lines(descriptor, name, read, keep_blank=raw)
        try:
            run_async(lambda: _produce(settings, topic, lines, progress, partition=partition, rate=rate))
        except KeyboardInterrupt:
            # What was submitted is acknowledged by now: the producer stops only after that.
            if not quiet:
                say(f"interrupted; {count_of(progress.count, 'record')} written and acknowledged")
            raise
        finally:
            if as_json:
                print_json({"topic": topic, **progress.as_json()})


async def _produce(
    settings: KafkaSettings, topic: str, lines: _Lines, progress: Progress, *, partition: int | None, rate: float | None
) -> None:
    from streamproc.broker.connections import KafkaConnections  # noqa: PLC0415 - --help needs no Kafka client

    connections = KafkaConnections(settings)
    producer = connections.producer(client_id="streamproc-produce", compression="none")
    with waiting_for(settings):
        await producer.start()
    try:
        count = await producer.partition_count(topic)
        if partition is not None and partition >= count:
            raise UsageError(no_such_partition(topic, count))
        place = _Placer(count, partition, connections.partition_of_key)
        writer = _Writer(producer, topic, place, progress)
        failure: InputError | None = None
        async for chunk in lines.chunks(rate):
            place.expect(len(chunk.lines))
            for line in chunk.lines:
                await writer.add(line)
            if chunk.error is not None:
                failure = chunk.error
                break
            if chunk.last_for_now:
                await writer.flush()
            writer.check()
        await writer.finish()
    finally:
        await producer.stop()
    progress.finish()
    if failure is not None:
        raise failure


class _Writer:
    """Fills a batch per partition, submits the full ones, counts the acknowledged."""

    def __init__(self, producer: Producer, topic: str, place: _Placer, progress: Progress) -> None:
        self._producer = producer
        self._topic = topic
        self._place = place
        self._progress = progress
        self._open: dict[int, BatchBuilder] = {}
        self._pending: set[asyncio.Future[object]] = set()
        self._error: BaseException | None = None

    async def add(self, line: Line) -> None:
        """Put a record into its partition's batch."""
        partition = self._place(line.key)
        batch = self._open.get(partition)
        if batch is None:
            batch = self._open[partition] = self._producer.create_batch()
        if not self._append(batch, line):
            await self._submit(partition)
            batch = self._open[partition] = self._producer.create_batch()
            self._append(batch, line)

    async def flush(self) -> None:
        """Submit what is there."""
        for partition in list(self._open):
            await self._submit(partition)

    async def finish(self) -> None:
        """Submit the rest and wait until all is acknowledged."""
        await self.flush()
        if self._pending:
            await asyncio.wait(self._pending)
        self.check()

    def check(self) -> None:
        """Raise what a batch failed with."""
        if self._error is not None:
            raise self._error

    @staticmethod
    def _append(batch: BatchBuilder, line: Line) -> bool:
        appended = batch.append(timestamp=line.timestamp, key=line.key, value=line.value, headers=line.headers)
        return appended is not None

    async def _submit(self, partition: int) -> None:
        batch = self._open.pop(partition)
        future = await self._producer.send_batch(batch, self._topic, partition)
        self._pending.add(future)
        future.add_done_callback(partial(self._done, batch.record_count()))

    def _done(self, records: int, future: asyncio.Future[object]) -> None:
        self._pending.discard(future)
        if future.cancelled():
            return
        if (error := future.exception()) is not None:
            self._error = self._error or error
        else:
            self._progress.add(records)


class _Placer:
    """Chooses partitions: the given one, the key's, or one after the other."""

    def __init__(self, count: int, fixed: int | None, of_key: Callable[[bytes, int], int]) -> None:
        self._count = count
        self._fixed = fixed
        self._of_key = of_key
        self._current = 0
        self._here = 0
        self._sticky = 1

    def expect(self, records: int) -> None:
        """So many come together: they are spread over all partitions, also where they are few."""
        self._sticky = min(max(1, records // self._count), _STICKY_RECORDS)

    def __call__(self, key: bytes | None) -> int:
        if self._fixed is not None:
            return self._fixed
        if key is not None:
            return self._of_key(key, self._count)
        if self._here >= self._sticky:
            self._current, self._here = (self._current + 1) % self._count, 0
        self._here += 1
        return self._current


@dataclass(slots=True)
class _Chunk:
    """Lines that came together; ``last_for_now`` when no further ones are at hand."""

    lines: list[Line]
    last_for_now: bool
    error: InputError | None = None


class _Lines:
    """The input's lines, parsed, in the chunks in which they come."""

    def __init__(self, descriptor: int, name: str, read: Callable[[bytes], Line], *, keep_blank: bool) -> None:
        self._descriptor = descriptor
        self._name = name
        self._read = read
        self._keep_blank = keep_blank
        self._number = 0

    async def chunks(self, rate: float | None) -> AsyncIterator[_Chunk]:
        """The chunks, not faster than ``rate`` records a second; the one with an error is the last."""
        begun, count = time.monotonic(), 0
        step = max(1, int(rate * _RATE_STEP_S)) if rate else sys.maxsize
        async for texts, more in self._texts():
            for first in range(0, len(texts), step):
                chunk = self._parse(texts[first : first + step])
                chunk.last_for_now = rate is not None or not more
                yield chunk
                if chunk.error is not None:
                    return
                count += len(chunk.lines)
                if rate is not None:
                    await asyncio.sleep(max(0.0, begun + count / rate - time.monotonic()))

    def _parse(self, texts: list[bytes]) -> _Chunk:
        chunk = _Chunk([], last_for_now=False)
        for text in texts:
            self._number += 1
            if not self._keep_blank and not text.strip():
                continue
            try:
                chunk.lines.append(self._read(text))
            except LineError as error:
                chunk.error = InputError(
                    f"{self._name}:{self._number}: the line {error}; the lines before it are written, mend it and go "
                    f"on from there (--raw writes lines as they are)"
                )
                break
        return chunk

    async def _texts(self) -> AsyncIterator[tuple[list[bytes], bool]]:
        """Lines as bytes, and whether more are at hand already."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[bytes | OSError] = asyncio.Queue()
        places = threading.Semaphore(_CHUNKS_AHEAD)

        def read() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended without us
                while True:
                    places.acquire()
                    try:
                        data: bytes | OSError = os.read(self._descriptor, _CHUNK_BYTES)
                    except OSError as error:
                        data = error
                    loop.call_soon_threadsafe(queue.put_nowait, data)
                    if not data or isinstance(data, OSError):
                        return

        # A daemon: Ctrl-C shall not wait for a terminal's next line, as the loop's own threads would.
        threading.Thread(target=read, name="produce-input", daemon=True).start()
        rest, first = b"", True
        while True:
            data = await queue.get()
            places.release()
            if isinstance(data, OSError):
                raise InputError(f"{self._name}: cannot be read ({data.strerror})") from data
            if first:
                data, first = data.removeprefix(_BOM), False
            *texts, rest = (rest + data).split(b"\n") if data else ([rest, b""] if rest else [b""])
            yield [text.removesuffix(b"\r") for text in texts], not queue.empty()
            if not data:
                return


@contextlib.contextmanager
def _opened(file: str) -> Iterator[int]:
    if file == "-":
        yield sys.stdin.fileno()
        return
    try:
        stream = Path(file).open("rb", buffering=0)  # noqa: SIM115 - closed below
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); name a file of JSON lines, or -") from error
    with stream:
        yield stream.fileno()
