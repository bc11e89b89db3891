"""Writes results, dead letters and metrics, and says when a span is acknowledged as a whole.

Producer batches are built here, one lane per output partition: while a batch is on its way, what comes next gathers for
the one after it, so that batches grow with the load and order within a partition is kept. ``write`` does not block; the
lanes' tasks wait for the broker. The client retries what can be retried; whatever still fails is final, and is reported
once through ``on_error``: nothing is given up here, since the offsets behind it are not settled. At shutdown ``flush``
waits until every lane is empty.

Records keep their key, and their partition where the output topic has as many as the input topic; otherwise their key
chooses it, as Kafka's own clients do.

Invariants: ``on_settled`` is called once per span, after every record of it that is to be written is acknowledged; a
result too large for its topic becomes a dead letter before anything is sent, because a batch that the broker refuses
would break the sequence of an idempotent producer.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from streamproc.broker.interface import Producer
from streamproc.errors import BrokerError, SinkError
from streamproc.records import BatchReport, Failure, Outcome, Record, Span, Status
from streamproc.runtime.codec import decode_failure
from streamproc.runtime.envelopes import RECORD_OVERHEAD_BYTES, Row, dead_letter_row, result_row, row_bytes
from streamproc.settings import TaskTopics

_NO_HEADERS: list[tuple[str, bytes | None]] = []


@dataclass(frozen=True, slots=True)
class OutputTopic:
    """What the sink knows of a topic it writes to: its partitions, and the largest batch it takes, in bytes."""

    name: str
    partitions: int
    max_message_bytes: int


@dataclass(slots=True)
class SinkEvents:
    """What the sink tells its owner: spans that are done, records acknowledged per output, and its end by an error."""

    on_settled: Callable[[Span], None]
    on_written: Callable[[str, int], None]
    on_dead: Callable[[Failure], None]
    on_error: Callable[[SinkError], None]


@dataclass(slots=True, eq=False)
class _Receipt:
    """A span whose records are on their way."""

    span: Span
    pending: int


@dataclass(slots=True, eq=False)
class _Parcel:
    rows: list[Row]
    receipt: _Receipt | None
    cursor: int = 0


@dataclass(slots=True, eq=False)
class _Lane:
    output: str
    topic: str
    partition: int
    parcels: deque[_Parcel] = field(default_factory=deque)
    busy: bool = False


class Sink:
    """The outputs of one task."""

    def __init__(
        self,
        producer: Producer,
        topics: TaskTopics,
        *,
        known: Mapping[str, OutputTopic],
        input_partitions: Mapping[str, int],
        partition_of_key: Callable[[bytes, int], int],
        events: SinkEvents,
        full_envelope: bool,
    ) -> None:
        self._producer = producer
        self._results = known[topics.results]
        self._dead = known[topics.dead]
        self._metrics = known[topics.metrics]
        self._input_partitions = input_partitions
        self._partition_of_key = partition_of_key
        self._events = events
        self._full_envelope = full_envelope
        self._lanes: dict[tuple[str, int], _Lane] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._failed = False

    def write(self, outcomes: Sequence[Outcome]) -> None:
        """Queue outcomes, in this order per output partition."""
        for outcome in outcomes:
            rows, dead = self._rows(outcome)
            receipt = _Receipt(outcome.span, len(rows) + len(dead))
            if receipt.pending == 0:
                self._events.on_settled(outcome.span)
                continue
            self._enqueue("results", self._results, rows, receipt)
            self._enqueue("dead_letters", self._dead, dead, receipt)

    def write_metrics(self, task: str, value: bytes) -> None:
        """Queue a batch's metrics record; it holds up no offset."""
        partition = self._partition_of_key(task.encode(), self._metrics.partitions)
        self._queue("metrics", self._metrics.name, partition, [(None, task.encode(), value, _NO_HEADERS)], None)

    async def flush(self) -> None:
        """Wait until everything queued is acknowledged, or an error has ended the sink."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def abort(self) -> None:
        """End the lanes without waiting for the broker; what is not acknowledged is not settled."""
        self._failed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- outcomes to rows

    def _rows(self, outcome: Outcome) -> tuple[list[Row], list[Row]]:
        """The rows to write to the result topic and to the dead-letter topic."""
        records, values, report = outcome.span.records, outcome.values, outcome.report
        if not any(outcome.statuses) and self._fits(outcome):
            if self._full_envelope:
                rows: list[Row] = [
                    (None, record.key, value, list(record.headers) if record.headers else _NO_HEADERS)  # type: ignore[misc]
                    for record, value in zip(records, values, strict=True)
                ]
                return rows, []
            return [result_row(r, v, report) for r, v in zip(records, values, strict=True)], []  # type: ignore[arg-type]
        results: list[Row] = []
        dead: list[Row] = []
        for status, record, value in zip(outcome.statuses, records, values, strict=True):
            if status == Status.RESULT and not isinstance(value, Failure):
                row = self._result_row(record, value, report)
                size = row_bytes(row)
                if size <= self._results.max_message_bytes:
                    results.append(row)
                    continue
                value = Failure(  # noqa: PLW2901 - the result has turned into a failure
                    "sink",
                    "ResultTooLarge",
                    f"the result of {len(row[2] or b'')} bytes does not fit topic {self._results.name}, whose "
                    f"max.message.bytes is {self._results.max_message_bytes}; raise it, or return less",
                    retriable=False,
                )
            if status != Status.DROPPED:
                failure = value if isinstance(value, Failure) else decode_failure(value)
                dead.append(dead_letter_row(record, failure, report, self._dead.max_message_bytes))
                self._events.on_dead(failure)
        return results, dead

    def _result_row(self, record: Record, value: bytes | memoryview, report: BatchReport) -> Row:
        if self._full_envelope:
            return (None, record.key, value, list(record.headers))
        return result_row(record, value, report)

    def _fits(self, outcome: Outcome) -> bool:
        """Whether no result can be too large, seen from all of them together."""
        total = sum([len(value) for value in outcome.values if not isinstance(value, Failure)])
        if any(record.headers for record in outcome.span.records) or not self._full_envelope:
            return total * 2 + 65_536 < self._results.max_message_bytes and self._headers_are_small(outcome)
        keys = sum([len(record.key or b"") for record in outcome.span.records])
        return total + keys + RECORD_OVERHEAD_BYTES < self._results.max_message_bytes

    @staticmethod
    def _headers_are_small(outcome: Outcome) -> bool:
        size = sum([len(name) + len(content or b"") for r in outcome.span.records for name, content in r.headers])
        return size + len(outcome.report.metrics) < 32_768

    # -- rows to lanes

    def _enqueue(self, output: str, topic: OutputTopic, rows: list[Row], receipt: _Receipt) -> None:
        if not rows:
            return
        source, partition = receipt.span.lease.partition
        if topic.partitions == self._input_partitions[source]:
            self._queue(output, topic.name, partition, rows, receipt)
            return
        apart: dict[int, list[Row]] = {}
        for row in rows:
            key = row[1]
            target = partition % topic.partitions if key is None else self._partition_of_key(key, topic.partitions)
            apart.setdefault(target, []).append(row)
        for target, some in apart.items():
            self._queue(output, topic.name, target, some, receipt)

    def _queue(self, output: str, topic: str, partition: int, rows: list[Row], receipt: _Receipt | None) -> None:
        lane = self._lanes.get((topic, partition))
        if lane is None:
            lane = self._lanes[topic, partition] = _Lane(output, topic, partition)
        lane.parcels.append(_Parcel(rows, receipt))
        if not lane.busy and not self._failed:
            lane.busy = True
            task = asyncio.get_running_loop().create_task(self._pump(lane))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(self, lane: _Lane) -> None:
        """Send a lane's parcels, one producer batch after the other, until it is empty."""
        try:
            while lane.parcels and not self._failed:
                batch = self._producer.create_batch()
                covered = self._fill(lane, batch.append)
                acknowledged = await self._producer.send_batch(batch, lane.topic, lane.partition)
                await acknowledged
                self._settle(lane.output, covered)
        except BrokerError as error:
            if not self._failed:
                self._failed = True
                self._events.on_error(
                    SinkError(
                        f"records cannot be written to topic {lane.topic}, partition {lane.partition}: {error}",
                        topic=lane.topic,
                        partition=lane.partition,
                    )
                )
        finally:
            lane.busy = False

    @staticmethod
    def _fill(lane: _Lane, append: Callable[..., object]) -> list[tuple[_Receipt | None, int]]:
        """Move rows into a producer batch until it is full; says how many of each receipt."""
        covered: list[tuple[_Receipt | None, int]] = []
        while lane.parcels:
            parcel = lane.parcels[0]
            begun = parcel.cursor
            for timestamp, key, value, headers in islice(parcel.rows, begun, None):
                if append(timestamp=timestamp, key=key, value=value, headers=headers) is None:
                    break
                parcel.cursor += 1
            if parcel.cursor > begun:
                covered.append((parcel.receipt, parcel.cursor - begun))
            if parcel.cursor < len(parcel.rows):
                break
            lane.parcels.popleft()
        return covered

    def _settle(self, output: str, covered: list[tuple[_Receipt | None, int]]) -> None:
        for receipt, count in covered:
            self._events.on_written(output, count)
            if receipt is not None:
                receipt.pending -= count
                if receipt.pending == 0:
                    self._events.on_settled(receipt.span)
