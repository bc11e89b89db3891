"""Writes results, dead letters and metrics, and says when a span is acknowledged as a whole.

Producer batches are built here, one lane per output partition: while a batch is on its way, what comes next gathers for
the one after it, so that batches grow with the load and order within a partition is kept. ``write`` does not block; the
lanes' tasks wait for the broker. The client retries what can be retried; whatever still fails is final, and is reported
once through ``on_error``: nothing is given up here, since the offsets behind it are not settled. Only metrics are given
up, with a warning, where their topic refuses them or falls behind. At shutdown ``flush`` waits for the lanes to empty.

Records keep their key, and their partition where the output topic has as many as the input topic; otherwise their key
chooses it, as Kafka's own clients do.

With transactions, ``hold`` keeps new outcomes back until ``release``, so that what was written before can be committed
as a whole, and refuses where it is no whole: a lane has ended with rows that nobody knows to be written. A transaction
that was given up is reported through ``on_aborted``, and ``reset`` forgets what it held.

Invariants: ``on_settled`` is called once per span, after every record of it that is to be written is acknowledged; a
result too large for its topic is found before anything is sent, because a batch that the broker refuses would break the
sequence of an idempotent producer; its owner says whether it becomes a dead letter.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from streamproc.broker.interface import BatchBuilder, Producer, Row
from streamproc.errors import (
    BrokerError,
    InternalError,
    RecordTooLargeError,
    SinkError,
    StreamprocError,
    TransactionAbortedError,
)
from streamproc.records import BatchReport, Cause, Failure, Lease, Outcome, Record, Span, Status, TopicPartition
from streamproc.runtime.envelopes import dead_letter_row, result_rows, row_bytes
from streamproc.settings import TaskTopics, Then

MAX_METRICS_ROWS = 200
MAX_METRICS_PARCELS = 50
METRICS_GRACE_S = 5.0
log = logging.getLogger(__name__)
_NO_HEADERS: list[tuple[str, bytes | None]] = []


@dataclass(frozen=True, slots=True)
class OutputTopic:
    """What the sink knows of a topic it writes to: its partitions, and the largest batch it takes, in bytes."""

    name: str
    partitions: int
    max_message_bytes: int


@dataclass(slots=True)
class SinkEvents:
    """What the sink tells its owner.

    Spans that are done; each acknowledged batch of an output and its records; dead letters; a result that is too large,
    of which it asks what should become; outputs that refused a batch; transactions that were given up; and the error
    that ends the sink.
    """

    on_settled: Callable[[Span], None]
    on_written: Callable[[str, int], None]
    on_dead: Callable[[Failure, TopicPartition, Record], None]
    on_too_large: Callable[[Failure, TopicPartition, Record], Then]
    on_refused: Callable[[str], None]
    on_aborted: Callable[[BaseException], None]
    on_error: Callable[[StreamprocError], None]


@dataclass(slots=True, eq=False)
class _Receipt:
    """A span whose records are on their way."""

    span: Span
    pending: int


@dataclass(slots=True, eq=False)
class _Rows:
    """Rows to write and the records they come from, side by side."""

    rows: list[Row]
    records: list[Record]
    report: BatchReport | None


@dataclass(slots=True, eq=False)
class _Parcel:
    """Rows for one partition; those before ``cursor`` are on their way."""

    rows: _Rows
    receipt: _Receipt | None
    cursor: int = 0


@dataclass(slots=True, eq=False)
class _Lane:
    output: str
    topic: OutputTopic
    partition: int
    parcels: deque[_Parcel] = field(default_factory=deque)
    task: asyncio.Task[None] | None = None

    @property
    def receipted(self) -> bool:
        """Whether offsets wait for it."""
        return self.output != "metrics"


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
        facts_in_headers: bool,
    ) -> None:
        """``facts_in_headers``: whether results say in headers what they are of, as their values do not."""
        self._producer = producer
        self._results = known[topics.results]
        self._dead = known[topics.dead]
        self._metrics = known[topics.metrics]
        self._input_partitions = input_partitions
        self._partition_of_key = partition_of_key
        self._events = events
        self._facts_in_headers = facts_in_headers
        self._metrics_rows: list[Row] = []
        self._lanes: dict[tuple[str, int], _Lane] = {}
        self._failed = False
        """Whether no lane sends anything any more."""
        self._torn = False
        """Whether a lane was ended before what it had was acknowledged; other lanes' rows of its spans may be."""
        self._metrics_lost = False
        self._held: list[Outcome] | None = None
        """What came since ``hold``, if it was called."""
        self.acknowledged = 0
        """Producer batches that the broker has taken."""

    def write(self, outcomes: Sequence[Outcome]) -> None:
        """Queue outcomes, in this order per output partition."""
        if self._held is not None:
            self._held.extend(outcomes)
            return
        for outcome in outcomes:
            results, dead = self._split(outcome)
            receipt = _Receipt(outcome.span, len(results.rows) + len(dead.rows))
            if receipt.pending == 0:
                self._events.on_settled(outcome.span)
                continue
            self._enqueue("results", self._results, results, receipt)
            self._enqueue("dead_letters", self._dead, dead, receipt)

    def write_metrics(self, task: str, value: bytes) -> None:
        """Keep a batch's metrics record for ``send_metrics``; it holds up no offset."""
        self._metrics_rows.append((None, task.encode(), value, _NO_HEADERS))
        if len(self._metrics_rows) >= MAX_METRICS_ROWS:
            self.send_metrics()

    def send_metrics(self) -> None:
        """Queue the metrics records that were kept: a request for each of them would cost more than its batch."""
        if not self._metrics_rows or self._held is not None:
            return
        rows, self._metrics_rows = self._metrics_rows, []
        partition = self._partition_of_key(rows[0][1] or b"", self._metrics.partitions)
        lane = self._lanes.get((self._metrics.name, partition))
        if lane is not None and len(lane.parcels) >= MAX_METRICS_PARCELS:
            self._events.on_refused("metrics")
            return
        self._queue("metrics", self._metrics, partition, _Parcel(_Rows(rows, [], None), None))

    def unacknowledged(self) -> list[tuple[str, int]]:
        """The topics and partitions that the broker has been sent something for, and for which offsets wait."""
        return [to for to, lane in self._lanes.items() if lane.task is not None and lane.receipted]

    async def flush(self) -> None:
        """Wait until everything is acknowledged, or an error has ended the sink; for metrics only so long."""
        self.send_metrics()
        while tasks := [lane.task for lane in self._lanes.values() if lane.task is not None and lane.receipted]:
            await asyncio.wait(tasks)
        if tasks := [lane.task for lane in self._lanes.values() if lane.task is not None]:
            await asyncio.wait(tasks, timeout=METRICS_GRACE_S)

    async def hold(self) -> None:
        """Keep back what comes from now on, and wait until everything before is acknowledged, metrics too.

        Raises TransactionAbortedError where that cannot be, since a lane was ended in the middle.
        """
        self.send_metrics()
        self._held = self._held or []
        while tasks := [lane.task for lane in self._lanes.values() if lane.task is not None]:
            await asyncio.wait(tasks)
        if self._torn:
            raise TransactionAbortedError(
                "not all that was written is acknowledged, so that the transaction is given up; nothing of it is "
                "visible, and its records are processed again"
            )

    def release(self) -> None:
        """Queue what was kept back, and no longer keep anything."""
        held, self._held = self._held, None
        self.write(held or [])

    def forget(self, leases: Collection[Lease]) -> None:
        """Drop what was not begun to be sent of leases that have ended: their records are read again."""
        if self._held is not None:
            self._held[:] = [outcome for outcome in self._held if outcome.span.lease not in leases]
        for lane in self._lanes.values():
            kept = [
                parcel
                for parcel in lane.parcels
                if parcel.cursor or parcel.receipt is None or parcel.receipt.span.lease not in leases
            ]
            if len(kept) < len(lane.parcels):
                lane.parcels.clear()
                lane.parcels.extend(kept)

    def reset(self) -> None:
        """Forget everything that is on its way or waits: its transaction was given up."""
        lanes, self._lanes = list(self._lanes.values()), {}
        self._metrics_rows.clear()
        self._torn = False
        if self._held is not None:
            self._held.clear()
        current = asyncio.current_task()
        for lane in lanes:
            lane.parcels.clear()
            if lane.task is not None and lane.task is not current:
                lane.task.cancel()

    async def abort(self) -> None:
        """End the lanes without waiting for the broker; what is not acknowledged is not settled."""
        self._failed = True
        tasks = [lane.task for lane in self._lanes.values() if lane.task is not None]
        self._torn = self._torn or bool(tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- outcomes to rows

    def _split(self, outcome: Outcome) -> tuple[_Rows, _Rows]:
        """The rows for the result topic and for the dead-letter topic."""
        records, values, report = outcome.span.records, outcome.values, outcome.report
        partition = outcome.span.lease.partition
        if not any(outcome.statuses):
            rows = self._result_rows(partition, records, values, report)
            return _Rows(rows, list(records), report), _Rows([], [], report)
        good = [
            (r, v) for status, r, v in zip(outcome.statuses, records, values, strict=True) if status == Status.RESULT
        ]
        kept, results = [record for record, _ in good], [value for _, value in good]
        dead, failed = [], []
        for status, record, value in zip(outcome.statuses, records, values, strict=True):
            if status == Status.FAILED:
                if not isinstance(value, Failure):
                    raise AssertionError("a failed record came without its failure")
                dead.append(self._dead_letter(partition, record, value, report))
                failed.append(record)
        rows = self._result_rows(partition, kept, results, report)
        return _Rows(rows, kept, report), _Rows(dead, failed, report)

    def _result_rows(
        self, partition: TopicPartition, records: Sequence[Record], values: Sequence[Any], report: BatchReport
    ) -> list[Row]:
        if self._facts_in_headers:
            return result_rows(partition, records, values, report)
        return [
            (None, record.key, value, list(record.headers) if record.headers else _NO_HEADERS)
            for record, value in zip(records, values, strict=True)
        ]

    def _dead_letter(self, partition: TopicPartition, record: Record, failure: Failure, report: BatchReport) -> Row:
        self._events.on_dead(failure, partition, record)
        return dead_letter_row(partition, record, failure, report, self._dead.max_message_bytes)

    # -- rows to lanes

    def _enqueue(self, output: str, topic: OutputTopic, rows: _Rows, receipt: _Receipt) -> None:
        if not rows.rows:
            return
        source, partition = receipt.span.lease.partition
        if topic.partitions == self._input_partitions[source] and partition < topic.partitions:
            self._queue(output, topic, partition, _Parcel(rows, receipt))
            return
        apart: dict[int, _Rows] = {}
        for row, record in zip(rows.rows, rows.records, strict=True):
            key = row[1]
            target = partition % topic.partitions if key is None else self._partition_of_key(key, topic.partitions)
            some = apart.setdefault(target, _Rows([], [], rows.report))
            some.rows.append(row)
            some.records.append(record)
        for target, some in apart.items():
            self._queue(output, topic, target, _Parcel(some, receipt))

    def _queue(self, output: str, topic: OutputTopic, partition: int, parcel: _Parcel) -> None:
        lane = self._lanes.get((topic.name, partition))
        if lane is None:
            lane = self._lanes[topic.name, partition] = _Lane(output, topic, partition)
        lane.parcels.append(parcel)
        if lane.task is None and not self._failed:
            lane.task = asyncio.get_running_loop().create_task(self._pump(lane))

    async def _pump(self, lane: _Lane) -> None:
        """Send a lane's parcels, one producer batch after the other, until it is empty."""
        try:
            while lane.parcels and not self._failed:
                batch = self._producer.create_batch(lane.topic.max_message_bytes)
                covered = self._fill(lane, batch)
                if covered:
                    await self._write(lane, batch, covered)
        except Exception as error:  # noqa: BLE001 - a lane that ended unseen would hold its offsets for ever
            self._refused(lane, error)
        finally:
            lane.task = None

    async def _write(self, lane: _Lane, batch: BatchBuilder, covered: list[tuple[_Parcel, int]]) -> None:
        """Send a batch and wait for its acknowledgement; too large for its topic, it is made anew by the new limit."""
        name, made_for = lane.topic.name, lane.topic.max_message_bytes
        try:
            # What holds up no offset is not worth waiting for a topic that has gone.
            acknowledged = await self._producer.send_batch(batch, name, lane.partition, patient=lane.receipted)
            await acknowledged
        except RecordTooLargeError:
            limit = await self._producer.max_message_bytes(name)
            if limit is None or limit >= made_for:
                raise
            if limit < lane.topic.max_message_bytes:
                self._lower(name, limit)
            for parcel, count in reversed(covered):
                parcel.cursor -= count
                if not lane.parcels or lane.parcels[0] is not parcel:
                    lane.parcels.appendleft(parcel)
        else:
            self._settle(lane.output, covered)

    def _lower(self, topic: str, max_message_bytes: int) -> None:
        """A topic takes less than it did."""
        log.warning("topic %s takes batches of %d bytes at most from now on", topic, max_message_bytes)
        lowered = [
            replace(it, max_message_bytes=max_message_bytes) if it.name == topic else it
            for it in (self._results, self._dead, self._metrics)
        ]
        self._results, self._dead, self._metrics = lowered
        for lane in self._lanes.values():
            if lane.topic.name == topic:
                lane.topic = replace(lane.topic, max_message_bytes=max_message_bytes)

    def _refused(self, lane: _Lane, error: Exception) -> None:
        """What a lane was about to write is not written; without its receipts, offsets stay where they are."""
        if isinstance(error, TransactionAbortedError):
            self._events.on_aborted(error)
            return
        self._events.on_refused(lane.output)
        name, partition = lane.topic.name, lane.partition
        if not lane.receipted and isinstance(error, BrokerError):
            lane.parcels.clear()
            if not self._metrics_lost:
                self._metrics_lost = True
                log.warning(
                    "metrics records are lost, as long as topic %s, partition %d, refuses them: %s",
                    *(name, partition, error),
                    extra={"topic": name, "partition": partition},
                )
        elif not self._failed:
            self._failed = self._torn = True
            message = f"records cannot be written to topic {name}, partition {partition}: {error}"
            known = isinstance(error, BrokerError)
            self._events.on_error(
                SinkError(message, topic=name, partition=partition) if known else InternalError(error, where="the sink")
            )

    def _fill(self, lane: _Lane, batch: BatchBuilder) -> list[tuple[_Parcel, int]]:
        """Move rows into a producer batch until it is full; says how many of each parcel."""
        covered: list[tuple[_Parcel, int]] = []
        while lane.parcels:
            parcel = lane.parcels[0]
            # Only a batch's first record may exceed its limit: any later one is left for the next batch.
            if not covered and lane.output == "results" and self._is_too_large(lane, parcel):
                if not self._refuse(lane, parcel):
                    break
            elif (added := batch.extend(parcel.rows.rows, parcel.cursor)) > 0:
                parcel.cursor += added
                covered.append((parcel, added))
            if parcel.cursor < len(parcel.rows.rows):
                if covered:
                    break
            else:
                lane.parcels.popleft()
        return covered

    @staticmethod
    def _is_too_large(lane: _Lane, parcel: _Parcel) -> bool:
        return row_bytes(parcel.rows.rows[parcel.cursor]) > lane.topic.max_message_bytes

    def _refuse(self, lane: _Lane, parcel: _Parcel) -> bool:
        """Do with a result that its topic would not take what its policy says, before it is sent; whether to go on."""
        index = parcel.cursor
        size, limit = len(parcel.rows.rows[index][2] or b""), lane.topic.max_message_bytes
        message = (
            f"the result of {size} bytes does not fit topic {lane.topic.name}, whose max.message.bytes is {limit}; "
            f"raise it, or return less"
        )
        failure = Failure(Cause.TOO_LARGE, "sink", "ResultTooLarge", message)
        record, report = parcel.rows.records[index], parcel.rows.report
        if parcel.receipt is None or report is None:
            raise AssertionError("only results are refused, and they have a receipt")
        partition = parcel.receipt.span.lease.partition
        then = self._events.on_too_large(failure, partition, record)
        if then == "stop":
            self._failed = self._torn = True
            return False
        parcel.cursor += 1
        if then == "drop":
            self._acknowledge(parcel.receipt, 1)
        else:
            rows = _Rows([self._dead_letter(partition, record, failure, report)], [record], report)
            self._enqueue("dead_letters", self._dead, rows, parcel.receipt)
        return True

    def _settle(self, output: str, covered: list[tuple[_Parcel, int]]) -> None:
        self._events.on_written(output, sum([count for _, count in covered]))
        self.acknowledged += 1
        if output == "metrics":
            self._metrics_lost = False
        for parcel, count in covered:
            if parcel.receipt is not None:
                self._acknowledge(parcel.receipt, count)

    def _acknowledge(self, receipt: _Receipt, count: int) -> None:
        receipt.pending -= count
        if receipt.pending == 0:
            self._events.on_settled(receipt.span)
