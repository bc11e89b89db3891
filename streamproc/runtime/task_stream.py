"""One task's stream: its consumer, producer and stages, wired in the order in which a record meets them.

    source ─ ─ (measuring) ─ ─ batcher ─ ─ (processor, pool) ─ ─ isolation → sequencer → sink → ledger
    requests ─ ─ (measuring) ─ ─ batcher ─ ─ (processor, pool) ─ ─ isolation → requests

The processor decides when a batch goes to the shared pool, and brings its answer back here. So it does with records
whose length the measuring process tells. A task rebalances, lags and pushes back apart from the others.

Invariants:

- A record that was read is, until its partition goes away, in exactly one place: the measuring, the batcher, the pool,
  a retry that waits, the sequencer, or the sink; and the ledger counts it as in flight until it is settled.
- A record of a request goes the same way to its outcome and no further. It counts for no offset, order, transaction,
  circuit or dead letter, whatever batch it is in.
- While the circuit is open nothing is read and nothing dispatched; what was read stays where it is, and what waits for
  a worker is handed back when its partition goes or the task drains. Requests are refused.
- When partitions are revoked: nothing more is taken from them, what was not dispatched goes back to Kafka, what was has
  a bounded time to finish, then offsets are committed and the leases end. Whatever comes later counts for nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from streamproc.broker.interface import Connections, Producer, TransactionalProducer
from streamproc.errors import (
    BrokerError,
    CommitRejectedError,
    InternalError,
    RequestsFullError,
    StreamprocError,
    TaskUnavailableError,
    TransactionAbortedError,
)
from streamproc.observe.metric_table import ProducerOutput, RequestOutcome
from streamproc.observe.metrics import TaskMetrics
from streamproc.records import (
    Batch,
    BatchReport,
    Cause,
    Failure,
    Lease,
    Outcome,
    Record,
    Span,
    Status,
    TopicPartition,
    value_sizes,
)
from streamproc.runtime.batch_plan import BatchPlan
from streamproc.runtime.batcher import Batcher
from streamproc.runtime.circuit import Circuit
from streamproc.runtime.delivery import AtLeastOnce, Delivery, ExactlyOnce
from streamproc.runtime.executions import Executions
from streamproc.runtime.failures import decode_failure
from streamproc.runtime.isolation import Isolation, Retry, Split
from streamproc.runtime.ledger import Ledger
from streamproc.runtime.measuring import Measuring
from streamproc.runtime.pool import Reply
from streamproc.runtime.requests import Request, RequestEvents, Requests
from streamproc.runtime.sequencer import make_sequencer
from streamproc.runtime.sink import OutputTopic, Sink, SinkEvents
from streamproc.runtime.source import Room, Source
from streamproc.runtime.verdicts import Counts, GivenUp, Verdicts, count_of
from streamproc.settings import Settings, Then

if TYPE_CHECKING:
    from streamproc.observe.tracing import TaskTracing, Tracing

DEFAULT_MAX_MESSAGE_BYTES = 1_048_576
"""What a topic takes where the broker does not say: Kafka's own default, less its overhead."""

LONG_JOIN_S = 5.0
LAST_FLUSH_S = 2.0
LAST_COMMIT_S = 5.0
RETRY_AFTER_S = 5
"""When to try again where a task takes no requests, and does not know when it will."""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class RequestLane:
    """What asks for workers beside a task: its requests, where they batch apart from Kafka's records."""

    name: str
    """Its account; no task has such a name."""
    batcher: Batcher
    backlog: bool = False
    crowded: bool = False


class TaskStream:
    """A task of a processor while it runs."""

    def __init__(
        self,
        name: str,
        settings: Settings,
        connections: Connections,
        metrics: TaskMetrics,
        *,
        plan: BatchPlan,
        measuring: Measuring | None,
        tracing: Tracing | None,
        next_id: Callable[[], int],
        rng: random.Random,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        on_work: Callable[[], None],
        on_fatal: Callable[[StreamprocError], None],
    ) -> None:
        """``measuring`` tells the lengths of the task's records, where it has some that are not those of their values.

        ``plan`` says how its batches begin; ``tracing`` makes spans, where there is any. ``on_work`` is called when
        there may be something to dispatch, ``on_fatal`` once the task cannot go on.
        """
        self.name, self._log = name, logging.LoggerAdapter(log, {"task": name})
        self.group, self.topics = settings.group_of(name), settings.topics_of(name)
        self._settings = settings.tasks[name]
        self._application = settings
        self._metrics = metrics
        self._clock = clock
        self._on_work = on_work
        self._on_fatal = on_fatal
        self._connections = connections
        client_id = f"{settings.kafka.client_id or settings.name}.{name}"
        self.consumer = connections.consumer(
            group_id=self.group, client_id=client_id, auto_offset_reset=self._settings.input.auto_offset_reset
        )
        self._transactions, self._producer = self._make_producer(client_id, settings.kafka.group_instance_id, rng)
        self._measuring, self._tracing = measuring, self._make_tracing(tracing)
        self.plan = plan
        self._next_id, self._rng = next_id, rng
        self.batcher, self.lanes = self._make_lanes()
        self.requests = Requests(
            self.topics.inputs[0],
            settings.http.predict,
            RequestEvents(self._take_in, self._on_request_ended),
            clock=clock,
            wall_clock=wall_clock,
        )
        self.ledger = Ledger()
        self._isolation = Isolation(self._settings.on_error, next_id, rng)
        self.circuit = Circuit(self._settings.on_error.circuit)
        # A transaction holds an unbroken run of every partition, since it commits one offset for it.
        self._sequencer = make_sequencer("partition" if self._transactions else self._settings.ordering)
        self.source = Source(
            self.consumer,
            self._make_room(),
            lambda: (self.ledger.outstanding_records, self.ledger.in_flight_bytes),
            self.ledger.loads,
            on_records=self._on_records,
            on_pause=self._on_pause,
        )
        self._sink: Sink | None = None
        self._delivery: Delivery = AtLeastOnce(self.consumer)
        self.again: list[Batch] = []
        """Batches to be executed once more, which go before new ones."""
        self._retries: dict[int, tuple[asyncio.TimerHandle, Batch]] = {}
        self._background: list[asyncio.Task[None]] = []
        self._commit_lock = asyncio.Lock()
        self._letting_go: set[Lease] = set()
        """Leases that are about to end: what fails now is left to whoever reads it next."""
        self._settled = asyncio.Event()
        self.assigned = asyncio.Event()
        self.state = "starting"
        self.counts = Counts()
        self._executions = Executions(
            name,
            settings,
            plan,
            metrics=metrics,
            counts=self.counts,
            tracing=self._tracing,
            clock=clock,
            wall_clock=wall_clock,
        )
        self._verdicts = Verdicts(
            name,
            self._settings.on_error,
            topic=self.topics.dead,
            metrics=metrics,
            counts=self.counts,
            on_stop=on_fatal,
        )
        self.progress = 0
        """Batches that were executed, well or not, and commits: what moves while there is work and nothing is stuck."""
        self.commits = 0
        self._lost_at: float | None = None
        self._patience: asyncio.TimerHandle | None = None
        """Ends when it is time to say that joining takes long."""
        self.ends: dict[TopicPartition, int] = {}
        """Log ends asked for while reading pauses, when no fetch brings them."""
        self._late = 0

    def _make_tracing(self, tracing: Tracing | None) -> TaskTracing | None:
        if tracing is None:
            return None
        return tracing.task(self.name, group=self.group, results=self.topics.results, dead=self.topics.dead)

    def _make_room(self) -> Room:
        limits = self._settings.limits
        return Room(limits.max_in_flight_records, limits.max_in_flight_bytes)

    def _make_lanes(self) -> tuple[Batcher, tuple[TaskStream | RequestLane, ...]]:
        """The batcher, and what asks for workers, each by a batcher of its own; that of the last has the requests."""
        plan, cost, next_id = self.plan, self.plan.make_cost(), self._next_id

        def made(account: str) -> Batcher:
            budget_bytes = plan.memory_budget_bytes
            return Batcher(self.name, plan.batch, next_id, cost=cost, memory_budget_bytes=budget_bytes, account=account)

        batcher = made("")
        if self._application.http.predict.batch_with == "kafka":
            return batcher, (self,)
        account = f"{self.name} over HTTP"
        return batcher, (self, RequestLane(account, made(account)))

    def _make_producer(
        self, client_id: str, instance: str | None, rng: random.Random
    ) -> tuple[TransactionalProducer | None, Producer]:
        """The producer, twice where it is one of transactions."""
        compression = self._settings.output.compression
        if self._settings.delivery == "at_least_once":
            return None, self._connections.producer(client_id=client_id, compression=compression)
        # A name of its own for every start will do, since fencing goes by the generation of the group.
        transactional_id = f"{self.group}.{instance or f'{rng.getrandbits(64):016x}'}"
        producer = self._connections.transactional_producer(
            client_id=client_id, compression=compression, transactional_id=transactional_id
        )
        return producer, producer

    # -- another version

    def reload(self, settings: Settings, plan: BatchPlan, generation: int) -> None:
        """Go on by other settings, as far as they may differ (``reload``), with workers of this generation.

        What is in flight stays where it is. What was learnt of the old version, its costs and failures, is forgotten;
        a circuit that these have opened closes, one that was opened by hand does not.
        """
        self._application, self._settings = settings, settings.tasks[self.name]
        self.plan = plan
        self._executions.reload(settings, plan, generation)
        batcher, lanes = self._make_lanes()
        batcher.take_over(self.batcher)
        self.batcher = batcher
        for lane, made in zip(self.lanes[1:], lanes[1:], strict=True):
            made.batcher.take_over(lane.batcher)
            lane.batcher = made.batcher
        self._isolation = Isolation(self._settings.on_error, self._next_id, self._rng)
        self._verdicts.reload(self._settings.on_error)
        self.source.reload(self._make_room())
        if self.circuit.is_open and not self.circuit.by_hand:
            self.close_circuit("with the reload")
        self.circuit.reload(self._settings.on_error.circuit)
        self._on_work()

    # -- start and stop

    async def connect(self) -> None:
        """Connect the producer and look at the topics. Raises BrokerError, TopicMissingError."""
        await self._producer.start()
        written = dict.fromkeys((self.topics.results, self.topics.dead, self.topics.metrics))
        topics = [*written, *(topic for topic in self.topics.inputs if topic not in written)]
        # All at once: a client asks for metadata ten times a second at most.
        asking = [
            self._producer.partition_count(topic, operation="Write" if topic in written else "Read") for topic in topics
        ]
        counts = dict(zip(topics, await asyncio.gather(*asking), strict=True))
        limits = await asyncio.gather(*map(self._producer.max_message_bytes, written))
        known = {
            topic: OutputTopic(topic, counts[topic], limit or DEFAULT_MAX_MESSAGE_BYTES)
            for topic, limit in zip(written, limits, strict=True)
        }
        self._sink = Sink(
            self._producer,
            self.topics,
            known=known,
            input_partitions={topic: counts[topic] for topic in self.topics.inputs},
            partition_of_key=self._connections.partition_of_key,
            events=SinkEvents(
                self._on_settled,
                self._on_written,
                self._verdicts.dead,
                self._on_too_large,
                self._on_refused,
                self._on_transaction_lost,
                self._on_fatal,
            ),
            facts_in_headers=self._settings.output.envelope == "result",
        )
        if self._transactions is not None:
            self._delivery = ExactlyOnce(
                self.consumer,
                self._transactions,
                self._sink,
                self,
                guard=self._guard,
                session_timeout_s=self._application.kafka.session_timeout_ms / 1_000,
                on_aborted=self._on_aborted,
            )

    def dispatched(self, batch: Batch, now: float) -> None:
        """Count a batch that goes to a worker; one that comes back unexecuted and goes again is the same batch."""
        if not batch.dispatched:
            batch.dispatched = True
            self._metrics.batch_dispatched(batch, now)
            if batch.attempt > 1:
                self.counts.retried += batch.size
        if self._tracing is not None:
            self._tracing.dispatched(batch)

    async def join(self) -> None:
        """Join the group and begin to read. Raises BrokerError."""
        self._log.info("task %s: joining group %s", self.name, self.group)
        self._patience = asyncio.get_running_loop().call_later(LONG_JOIN_S, self._waits)
        await self.consumer.start(list(self.topics.inputs), self._on_revoked, self._on_assigned)
        self.state = "running"
        loop = asyncio.get_running_loop()
        self._background = [
            loop.create_task(self._guard(self.source.run()), name=f"{self.name}: source"),
            loop.create_task(self._guard(self._commit_regularly()), name=f"{self.name}: commits"),
        ]

    async def drain(self) -> None:
        """Take nothing more, give back what was not dispatched, and wait until everything else is settled."""
        self.state = "draining"
        self.source.stop()
        self._letting_go.update(self.ledger.leases())
        self._give_back(self._undispatched(None))
        self._refuse_requests()
        await self._until_settled(self.ledger.assigned())
        while len(self.requests):
            self._settled.clear()
            await self._settled.wait()
        if self._sink is not None:
            await self._sink.flush()

    async def stop(self) -> None:
        """Commit what is settled, leave the group and close the connections."""
        self.state = "stopped"
        self._verdicts.log(math.inf)
        self._stop_waiting()
        for lease in self.requests.leases():
            self.requests.refuse(lease, self._unavailable())
        for handle, _ in self._retries.values():
            handle.cancel()
        self._retries.clear()
        if self._sink is not None:
            # After a failure elsewhere, what is on its way had better be acknowledged than come twice.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LAST_FLUSH_S):
                    await self._sink.flush()
            await self._sink.abort()
        try:
            async with asyncio.timeout(LAST_COMMIT_S):
                await self._commit()
        except (BrokerError, TimeoutError) as error:
            self._log.warning(
                "task %s: the last commit failed, so that some records will be read again: %s", self.name, error
            )
        finally:
            for task in self._background:
                task.cancel()
            await asyncio.gather(*self._background, return_exceptions=True)
            await self._delivery.close()
            await asyncio.gather(self.consumer.stop(), self._producer.stop())

    async def _guard(self, work: Any) -> None:
        try:
            await work
        except StreamprocError as error:
            self._on_fatal(error)
        except Exception as error:
            log.exception("task %s", self.name, extra={"task": self.name})
            self._on_fatal(InternalError(error, where=f"task {self.name}"))

    # -- records in

    def _on_records(self, partition: TopicPartition, records: Sequence[Record]) -> int:
        lease = self.ledger.lease(partition)
        if lease is None:
            return 0
        sizes = value_sizes(records)
        largest = max(sizes)
        span = Span(lease, self.ledger.next_sequence(lease), records, sizes, self._clock())
        if self._tracing is not None:
            self._tracing.arrived(span)
        self.ledger.read(span)
        self._sequencer.expect(span)
        self._metrics.records_in.inc(len(records))
        self.counts.taken += len(records)
        self._take_in(span)
        return largest

    def _take_in(self, span: Span) -> None:
        """Records that came go on to the batcher, by way of their lengths where the measuring process tells those."""
        if self._measuring is not None:
            self._measuring.add(self.name, span)
        else:
            if self._settings.batch.length is not None:
                span.lengths = [max(size, 0) for size in span.sizes]
            self._add(span)
        self._on_work()

    def _add(self, span: Span) -> None:
        """Records whose lengths are known, where they have some, go into the window."""
        batcher = self.lanes[-1].batcher if span.lease.is_request else self.batcher
        if not (refused := batcher.refused(span)):
            batcher.add(span)
            return
        start = 0
        for index, _ in refused:
            if index > start:
                batcher.add(span.part(start, index))
            start = index + 1
        if start < len(span.records):
            batcher.add(span.part(start, len(span.records)))
        self._fail_unexecuted([(span.part(index, index + 1), [failure]) for index, failure in refused], "oversized")

    def _batcher_of(self, batch: Batch) -> Batcher:
        """The one that a batch is from."""
        return self.batcher if batch.account == self.name else self.lanes[-1].batcher

    def measured(self, spans: Sequence[Span]) -> None:
        """The lengths of these records are known."""
        now = self._clock()
        for span in spans:
            self._metrics.length.observe(now - span.arrived_at, len(span.records))
            self._add(span)
        self._on_work()

    def unmeasured(self, failed: Sequence[tuple[Span, Sequence[Failure]]]) -> None:
        """These records have no length, and fail for it, each for its own reason."""
        self._fail_unexecuted(failed, "length")

    def _fail_unexecuted(self, failed: Sequence[tuple[Span, Sequence[Failure]]], closed_by: str) -> None:
        self.progress += 1
        spans, now = [span for span, _ in failed], self._clock()
        opened_at = min([span.arrived_at for span in spans])
        batch = Batch(self._next_id(), self.name, spans, opened_at, closed_at=now, closed_by=closed_by, fill=0.0)
        report = self._executions.report(batch, None)
        self._report(report, None, 0, batch.size, Counter(it.cause.value for _, failures in failed for it in failures))
        for span, failures in failed:
            self._complete(Outcome(span, bytes([Status.FAILED]) * len(failures), failures, report))
        batch.release()

    def _on_pause(self, paused: bool) -> None:
        if paused:
            self._metrics.pauses.inc()

    @property
    def crowded(self) -> bool:
        """Whether so many bytes of results wait to be written that no window is to be dispatched.

        What the results wait for does not wait for them: the broker's answer, or an earlier record of their partition,
        which left the batcher before them, and runs, or runs again, whatever waits.
        """
        return self.ledger.output_bytes > self._settings.limits.max_in_flight_bytes

    @property
    def backlog(self) -> bool:
        """Whether Kafka is known to hold more records than were read."""
        for partition in self.ledger.assigned():
            position, end = self.consumer.position(partition), self.consumer.highwater(partition)
            if position is not None and end is not None and position < end:
                return True
        return False

    @property
    def last(self) -> tuple[BatchReport, float] | None:
        """The batch that was executed last, and its time in the worker, in milliseconds."""
        return self._executions.last

    def given_up(self) -> list[GivenUp]:
        """Why records were given up since the start, the most frequent reason first."""
        return self._verdicts.given_up()

    # -- batches back from the pool

    def replied(self, reply: Reply) -> None:
        """A batch was executed."""
        batch = reply.batch
        self.progress += 1
        in_headers = self._settings.output.envelope == "result"
        results, told = reply.statuses.count(Status.RESULT), in_headers or bool(batch.requested)
        report = self._executions.ran(reply, self._batcher_of(batch), results=results, told=told)
        values: Sequence[memoryview | Failure] = reply.values
        causes: Mapping[str, int] = {}
        if results < batch.size:
            values = [
                decode_failure(value) if status == Status.FAILED else value
                for status, value in zip(reply.statuses, reply.values, strict=True)
            ]
            causes = Counter(it.cause.value for it in values if isinstance(it, Failure))
        self._report(report, reply, results, batch.size - results, causes)
        start = 0
        for span, size_bytes in zip(batch.spans, reply.sizes, strict=True):
            stop = start + len(span.records)
            self.ledger.produced(span, size_bytes)
            self._complete(Outcome(span, reply.statuses[start:stop], values[start:stop], report))
            start = stop
        batch.release()

    def failed(self, batch: Batch, failure: Failure, executed: bool, worker: int) -> None:
        """A batch was not executed to its end; ``executed`` says whether it was begun."""
        if not executed:
            self._queue_again(batch)
            return
        self.progress += 1
        self._executions.failed(batch, failure, worker)
        if failure.cause is Cause.OOM:
            self._executions.out_of_memory(batch, self._batcher_of(batch))
        decision = self._isolation.decide(batch, failure)
        if isinstance(decision, Retry) and all(self._lets_go(span.lease) for span in batch.spans):
            self._give_back(batch.spans)
        elif isinstance(decision, Retry):
            handle = asyncio.get_running_loop().call_later(decision.delay_s, self._retry, decision.batch.id)
            self._retries[decision.batch.id] = (handle, decision.batch)
        elif isinstance(decision, Split):
            self._queue_again(*decision.parts)
        else:
            if failure.cause is Cause.OOM and self._executions.is_of_now(batch):
                self._batcher_of(batch).forgive(batch)
            self._give_up(batch, failure, worker)

    def take_again(self) -> Batch | None:
        """The next batch to execute once more, without the records whose partitions have gone."""
        while self.again:
            batch = self.again.pop(0)
            live = [span for span in batch.spans if self._is_live(span.lease)]
            if not live:
                continue
            if len(live) < len(batch.spans):
                batch.restrict(live)
            self._batcher_of(batch).predict(batch)
            return batch
        return None

    def _is_live(self, lease: Lease) -> bool:
        """Whether outcomes of this lease still count."""
        return self.requests.waits(lease) if lease.is_request else self.ledger.is_live(lease)

    def _retry(self, batch_id: int) -> None:
        _, batch = self._retries.pop(batch_id)
        self._queue_again(batch)

    def _queue_again(self, *batches: Batch) -> None:
        self.again.extend(batches)
        self._hand_back_held()
        self._on_work()

    def _give_up(self, batch: Batch, failure: Failure, worker: int) -> None:
        """Every record of the batch has failed for good."""
        report = self._executions.report(batch, worker)
        self._report(report, None, 0, batch.size, {failure.cause.value: batch.size})
        for span in batch.spans:
            count = len(span.records)
            self._complete(Outcome(span, bytes([Status.FAILED]) * count, [failure] * count, report))
        batch.release()

    def _report(
        self, report: BatchReport, reply: Reply | None, results: int, failed: int, causes: Mapping[str, int]
    ) -> None:
        """Write a batch's record in the metrics topic; without a reply it was not executed to its end."""
        if not all(span.lease.is_request or self.ledger.is_live(span.lease) for span in report.batch.spans):
            return  # its partition has moved, and the new owner will report these records
        record = self._executions.record(report, reply, results=results, failed=failed, causes=causes)
        self._open_sink.write_metrics(self.name, record)

    def _complete(self, outcome: Outcome) -> None:
        if outcome.span.lease.is_request:
            self.requests.complete(outcome)
            return
        if not self.ledger.is_live(outcome.span.lease):
            self._late += len(outcome.span.records)
            self._log.info(
                "task %s: %d outcomes of %s came after the partition had moved, and are dropped; its new owner "
                "processes the records again (%d so far)",
                *(self.name, len(outcome.span.records), outcome.span.lease.partition, self._late),
            )
            return
        if any(outcome.statuses):
            judged = self._verdicts.judge(outcome)
            if judged is None:
                return
            outcome = judged
        if self.circuit.take(outcome, self._clock()):
            self._on_open()
        released = self._sequencer.complete(outcome)
        if self._tracing is not None:
            self._tracing.publishing(released)
        self._open_sink.write(released)

    def _on_too_large(self, failure: Failure, partition: TopicPartition, record: Record) -> Then:
        # To the circuit it was a result so far.
        if self.circuit.turned_bad(failure, self._clock()):
            self._on_open()
        then = self._verdicts.of(failure, partition, record)
        if self._tracing is not None:
            self._tracing.too_large(record, failure, dropped=then == "drop")
        return then

    # -- requests over HTTP

    @property
    def lanes_in_use(self) -> Sequence[TaskStream | RequestLane]:
        """Those that may have something for a worker: without requests nobody looks for some."""
        return self.lanes if self.requests.waiting else self.lanes[:1]

    @property
    def _takes_requests(self) -> bool:
        return self.state == "running" and not self.circuit.is_open

    def request(self) -> Request:
        """A place for a request. Raises TaskUnavailableError or RequestsFullError."""
        if not self._takes_requests:
            self._count_request("unavailable")
            raise self._unavailable()
        try:
            return self.requests.open()
        except RequestsFullError:
            self._count_request("full")
            raise

    def _on_request_ended(self, lease: Lease, outcome: RequestOutcome, seconds: float) -> None:
        self._count_request(outcome)
        if outcome in ("ok", "failed"):
            self._metrics.request.observe(seconds)
        else:
            self._undispatched({lease})
        self._settled.set()

    def _count_request(self, outcome: RequestOutcome) -> None:
        self._metrics.requests[outcome].inc()
        self.counts.requests[outcome] += 1

    def _refuse_requests(self) -> None:
        """Refuse the requests that no worker has yet; what runs is finished, and what fails now is not tried again."""
        for lease in self.requests.incomplete():
            self.requests.refuse(lease, self._unavailable())
        self._give_back(self._undispatched(set(self.requests.leases())))
        self._hand_back_waiting()

    def _unavailable(self) -> TaskUnavailableError:
        """Why there are no results for requests now."""
        if self.state == "starting":
            return TaskUnavailableError(f"task {self.name} is starting", retry_after_s=RETRY_AFTER_S)
        if self.circuit.is_open:
            closes_at = self.circuit.closes_at
            wait_s = RETRY_AFTER_S if closes_at is None else math.ceil(max(closes_at - self._clock(), 1.0))
            message = f"the circuit of task {self.name} is open: {self.circuit.reason}"
            return TaskUnavailableError(message, retry_after_s=wait_s)
        return TaskUnavailableError("the processor is stopping", retry_after_s=RETRY_AFTER_S)

    # -- results out

    @property
    def _open_sink(self) -> Sink:
        if self._sink is None:
            raise AssertionError("the task has not been started")
        return self._sink

    def _on_settled(self, span: Span) -> None:
        crowded = self.crowded
        if self._tracing is not None:
            self._tracing.settled(span)
        if self.ledger.settle(span):
            self._metrics.record_latency.observe(self._clock() - span.arrived_at, len(span.records))
            self._settled.set()
            self.source.relieved()
            if crowded and not self.crowded:
                self._on_work()

    def _on_written(self, output: str, count: int) -> None:
        self._metrics.producer_batches[cast("ProducerOutput", output)].inc()
        if output == "results":
            self._metrics.records_out.inc(count)
            self.counts.results += count

    def _on_refused(self, output: str) -> None:
        self._metrics.producer_errors[cast("ProducerOutput", output)].inc()

    # -- the circuit

    def open_circuit(self) -> None:
        """Pause the task until ``close_circuit``."""
        was_open = self.circuit.is_open
        self.circuit.open_by_hand(self._clock())
        if not was_open:
            self._on_open()

    def close_circuit(self, how: str = "by command") -> None:
        """Go on where the circuit is open; ``how`` it came to that is for the log."""
        circuit = self.circuit
        if circuit.opened_at is None:
            return
        self._log.warning(
            "task %s: the circuit closes %s after %.0f s (opening %d so far): reading goes on, and so do %s in flight; "
            "it was open because: %s",
            *(self.name, how, self._clock() - circuit.opened_at, circuit.openings),
            *(count_of(self.in_flight(), "record"), circuit.summary),
        )
        circuit.close()
        self._metrics.circuit_open.set(0)
        self.source.release()
        self._on_work()

    def watch_circuit(self) -> None:
        """Close the circuit once its time is over."""
        if self.circuit.due(self._clock()):
            self.close_circuit("by itself")

    def _on_open(self) -> None:
        closes_at, now = self.circuit.closes_at, self._clock()
        self._log.error(
            "task %s: the circuit is open: %s; nothing more is read or executed, and %s in flight are kept; it closes "
            "%swith `streamproc circuit close %s`; dead letters are in topic %s",
            *(self.name, self.circuit.summary, count_of(self.in_flight(), "record")),
            "" if closes_at is None else f"by itself in {closes_at - now:.0f} s, or ",
            *(self.name, self.topics.dead),
        )
        self._metrics.circuit_open.set(1)
        self._metrics.circuit_openings.inc()
        self.source.hold()
        self._refuse_requests()

    # -- offsets and rebalances

    async def _commit_regularly(self) -> None:
        while True:
            await asyncio.sleep(self._settings.commit_interval_s)
            self._open_sink.send_metrics()
            self._verdicts.log(self._clock())
            try:
                await self._commit()
            except TransactionAbortedError:
                continue  # the recovery says so
            except BrokerError as error:
                if self._transactions is not None:
                    raise
                self._log.warning(
                    "task %s: %s; trying again in %g s", self.name, error, self._settings.commit_interval_s
                )

    async def _commit(self) -> None:
        async with self._commit_lock:
            try:
                offsets = dict(await self._delivery.commit(self.ledger.committable))
            except CommitRejectedError as error:
                self._metrics.commit_failures.inc()
                self._log.info("task %s: %s", self.name, error)
            except BrokerError:
                self._metrics.commit_failures.inc()
                raise
            else:
                if offsets:
                    self._metrics.commits.inc()
                    self.commits += 1
                    self.progress += 1
                    self.ledger.committed(offsets)

    async def _on_assigned(self, partitions: set[TopicPartition]) -> None:
        self._metrics.rebalances.inc()
        self._delivery.reassigned()
        self.ledger.open(sorted(partitions))
        self.source.assigned(partitions)
        self.assigned.set()
        self._stop_waiting()
        if partitions:
            assigned = count_of(len(partitions), "partition")
            self._log.info("task %s: %s assigned in group %s", self.name, assigned, self.group)
        else:
            self._log.warning(
                "task %s: no partition is left for this replica in group %s; add partitions, or run fewer replicas",
                *(self.name, self.group),
            )
        self._on_work()

    def watch_connection(self) -> None:
        """Say when Kafka is gone, and when it is there again."""
        if self.state != "running":
            return
        connected = self.consumer.connected()
        if not connected and self._lost_at is None:
            self._lost_at = self._clock()
            self._log.warning("task %s: the connection to Kafka is lost; trying to get it back", self.name)
        elif connected and self._lost_at is not None:
            self._log.warning("task %s: Kafka is back after %.0f s", self.name, self._clock() - self._lost_at)
            self._lost_at = None

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _waits(self) -> None:
        self._log.info(
            "task %s: group %s is not ready yet; members that left without notice are waited for until their session "
            "ends, up to kafka.session_timeout_ms",
            *(self.name, self.group),
        )

    async def _on_revoked(self, partitions: set[TopicPartition]) -> None:
        self.source.revoked(partitions)
        self.ends.clear()
        leases = {lease for partition in partitions if (lease := self.ledger.lease(partition)) is not None}
        self._give_back(self._undispatched(leases))
        self._letting_go |= leases
        self._hand_back_waiting()
        if not self.consumer.is_member():
            self._log.warning(
                "task %s: group %s went on without this replica; %s in flight are left to the new owners of %s",
                *(self.name, self.group, count_of(self.ledger.in_flight(partitions), "record")),
                count_of(len(partitions), "partition"),
            )
        try:
            async with asyncio.timeout(self._application.rebalance_drain_s):
                # What the group has given to others is theirs to finish: each result from here would be one too many.
                if self.consumer.is_member():
                    await self._until_settled(partitions)
        except TimeoutError:
            self._log.warning(
                "task %s: %d records of %d revoked partitions did not finish within rebalance_drain_s (%g s); their "
                "new owner processes them again",
                *(self.name, self.ledger.in_flight(partitions), len(partitions), self._application.rebalance_drain_s),
            )
        with contextlib.suppress(BrokerError, TimeoutError):
            async with asyncio.timeout(LAST_COMMIT_S):
                await self._commit()
        self._delivery.reassigned()
        self._end_leases(partitions)
        self.source.revoked(partitions)  # again: a recovery may have ended meanwhile, and gone on with them
        for partition in partitions:
            self._metrics.forget(partition)
        self.assigned.clear()

    def _end_leases(self, partitions: Iterable[TopicPartition]) -> None:
        """Whatever still comes for these counts for nothing."""
        leases = {lease for partition in partitions if (lease := self.ledger.lease(partition)) is not None}
        self._undispatched(leases)
        self.ledger.close(lease.partition for lease in leases)
        self._letting_go -= leases
        self._sequencer.forget(leases)
        self._open_sink.forget(leases)
        self._settled.set()

    # -- transactions that were given up: delivery.Assignment

    def abandon(self) -> dict[TopicPartition, int]:
        """End the leases of the partitions that were read from; the offset at which each was begun."""
        begun = {it.partition: it.first_offset for it in self.ledger.partitions() if it.first_offset is not None}
        self._end_leases(begun)
        self.source.suspend(set(begun))
        return begun

    def resume(self, partitions: Iterable[TopicPartition]) -> None:
        """Begin new leases of partitions that are read again from their committed offsets."""
        leases = self.ledger.open(partitions)
        self.source.go_on({lease.partition for lease in leases})
        self._log.info("task %s: reading %s again", self.name, count_of(len(leases), "partition"))

    def _on_transaction_lost(self, error: BaseException) -> None:
        self._delivery.aborted(error)

    def _on_aborted(self, reason: str) -> None:
        self._metrics.transactions_aborted.inc()
        self._log.warning("task %s: %s", self.name, reason)

    def _undispatched(self, leases: set[Lease] | None) -> list[Span]:
        """Take out what no worker has got yet, of these leases or all of them."""
        unmeasured = [] if self._measuring is None else self._measuring.discard(self.name, leases)
        return [*unmeasured, *(span for lane in self.lanes for span in lane.batcher.discard(leases))]

    def _give_back(self, spans: Sequence[Span]) -> None:
        """Let go of records that are not executed: Kafka still has its own, and requests are refused."""
        for span in spans:
            if span.lease.is_request:
                self.requests.refuse(span.lease, self._unavailable())
            else:
                self.ledger.discard(span)
        self._settled.set()

    def _lets_go(self, lease: Lease) -> bool:
        """Whether what fails now of this lease is left to whoever reads it next; requests are refused then."""
        return lease in self._letting_go or (lease.is_request and not self._takes_requests)

    def _hand_back_waiting(self) -> None:
        """Leave what waits for its next execution, of leases that end, to whoever reads the records next.

        That is the retries that wait out their pause, and all that an open circuit keeps from the workers.
        """
        for number, (handle, batch) in list(self._retries.items()):
            if all(self._lets_go(span.lease) for span in batch.spans):
                handle.cancel()
                del self._retries[number]
                self._give_back(batch.spans)
        self._hand_back_held()

    def _hand_back_held(self) -> None:
        if not self.circuit.is_open:
            return
        waiting, self.again = self.again, []
        for batch in waiting:
            self._give_back([span for span in batch.spans if self._lets_go(span.lease)])
            staying = [span for span in batch.spans if not self._lets_go(span.lease)]
            if staying:
                batch.restrict(staying)
                self.again.append(batch)

    async def _until_settled(self, partitions: Iterable[TopicPartition]) -> None:
        partitions = list(partitions)
        while self.ledger.is_awaited(partitions):
            self._settled.clear()
            await self._settled.wait()

    async def ask_for_ends(self) -> None:
        """Bring ``ends`` up to date."""
        self.ends = dict(await self.consumer.end_offsets(self.ledger.assigned()))

    def writes(self) -> tuple[list[tuple[str, int]], int]:
        """Where offsets wait for the broker to acknowledge something, and how often it has."""
        return ([], 0) if self._sink is None else (self._sink.unacknowledged(), self._sink.acknowledged)

    @property
    def recovering(self) -> bool:
        """Whether a transaction was given up, and its records cannot be read again yet."""
        return self._delivery.recovering

    def in_flight(self) -> int:
        """Records that are read and not settled."""
        return self.ledger.in_flight_records
