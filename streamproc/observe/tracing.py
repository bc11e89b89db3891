"""What a trace shows of the processor: the spans of records, batches, results and requests.

    <the producer's span>
      └─ process in              a record, from its arrival until what became of it is acknowledged
           └─ publish in.results   its result, or its dead letter; the record that is written names this span
    execute main                 a batch in a worker; linked to the spans of its records, and they to it
      └─ decode, preprocess, transform_inputs, execute, transform_outputs, encode
    POST /tasks/{task}/predict   a request over HTTP

Only what is sampled is looked at twice: the records whose `traceparent` says so, and a share of those that have none.
Of these a ``Trace`` goes along with their span of records, and spans are made at the end, when all is known; what never
comes to its end here, since its partition has moved, leaves none. Nothing here blocks or waits, or raises for what a
record holds. No span has anything of a record's value, key and headers, nor what an exception quotes of them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
    set_span_in_context,
)

from streamproc.observe.trace_context import SAMPLED, TraceContext, context_of, read, written
from streamproc.records import Batch, BatchTrace, Failure, Outcome, Record, Span, Trace
from streamproc.records import Status as RecordStatus

STEPS = ("decode", "preprocess", "transform_inputs", "execute", "transform_outputs", "encode")
"""In the order in which a worker takes them, one after the other."""
MAX_MS = 1e12

Attributes = Mapping[str, str | int | float | bool | None]


class TracedRecord(NamedTuple):
    """A record on its way out: as it came, but for the headers that name the span which wrote it."""

    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes | None]]
    trace: Trace


class _Ids(IdGenerator):
    """Gives a span the ids that it was given long before it was made."""

    trace_id = span_id = 0

    def generate_trace_id(self) -> int:
        return self.trace_id

    def generate_span_id(self) -> int:
        return self.span_id


class Tracing:
    """The spans of a processor.

    Args:
        processor: Takes the spans that have ended, and must not block.
        resource: Who they are from.
        version: That of streamproc.
        sample_ratio: The share of records, and requests, without a `traceparent` that begin a trace, of 0 to 1.
        rng: Chooses them, and makes ids.
        wall_clock: Seconds since 1970.
    """

    def __init__(
        self,
        processor: SpanProcessor,
        resource: Resource,
        *,
        version: str,
        sample_ratio: float,
        rng: random.Random,
        wall_clock: Callable[[], float],
    ) -> None:
        self._ids = _Ids()
        provider = TracerProvider(ALWAYS_ON, resource, shutdown_on_exit=False, id_generator=self._ids)
        provider.add_span_processor(processor)
        self._tracer = provider.get_tracer("streamproc", version)
        self._ratio = sample_ratio
        self._rng = rng
        self._wall_clock = wall_clock
        self._passed_over = self._gap()
        """Records that begin no trace, before the next that may."""
        self.emitted = 0
        """Spans that were made so far."""

    def task(self, name: str, *, group: str, results: str, dead: str) -> TaskTracing:
        """Those of a task: its name, its consumer group, and the topics that it writes."""
        return TaskTracing(self, name, group=group, results=results, dead=dead)

    def now_ns(self) -> int:
        """Nanoseconds since 1970."""
        return int(self._wall_clock() * 1e9)

    def new_id(self, bits: int) -> int:
        """A random number that is not 0."""
        return self._rng.getrandbits(bits) or 1

    def begin(self, parent: TraceContext | None) -> Trace:
        """A span that begins now: in the trace of its parent, or in one of its own."""
        if parent is None:
            return Trace(self.new_id(128), self.new_id(64), None, SAMPLED, "", self.now_ns())
        return Trace(
            parent.trace_id, self.new_id(64), parent.span_id, parent.flags, parent.state, begun_ns=self.now_ns()
        )

    def emit(
        self,
        name: str,
        kind: SpanKind,
        trace: Trace | BatchTrace,
        attributes: Attributes,
        *,
        times_ns: tuple[int, int],
        child_id: int | None = None,
        links: Sequence[Link] = (),
        status: Status | None = None,
    ) -> None:
        """Make the span of a trace, or, by its id, a child of that."""
        parent_id = trace.parent_id if child_id is None else trace.span_id
        self._ids.trace_id, self._ids.span_id = trace.trace_id, child_id or trace.span_id
        parent = Context()
        if parent_id is not None:
            remote = child_id is None
            parent = set_span_in_context(NonRecordingSpan(_context(trace, parent_id, is_remote=remote)), parent)
        begun_ns, ended_ns = times_ns
        span = self._tracer.start_span(
            name,
            parent,
            kind,
            {key: value for key, value in attributes.items() if value is not None},
            links,
            begun_ns,
        )
        if status is not None:
            span.set_status(status)
        self.emitted += 1
        span.end(max(begun_ns, ended_ns))  # the time of day may have been set back

    # -- records that arrive

    def arrived(self, span: Span) -> None:
        """Find the records of a span that are traced."""
        traces: dict[int, Trace] = {}
        records, first, decided = span.records, span.first, set[int]()
        for index in [index for index, record in enumerate(records) if record.headers]:
            parent = read(records[index].headers)
            if parent is not None:
                decided.add(index)
                if parent.sampled:
                    traces[first + index] = self.begin(parent)
        for index in self._chosen(len(records)):
            if index not in decided:
                traces[first + index] = self.begin(None)
        if traces:
            span.traces = traces

    def _chosen(self, count: int) -> list[int]:
        """Which of so many records may begin a trace: each with the same chance, without a look at the others."""
        chosen: list[int] = []
        at = self._passed_over
        while at < count:
            chosen.append(int(at))
            at += 1 + self._gap()
        self._passed_over = at - count
        return chosen

    def _gap(self) -> float:
        if self._ratio >= 1:
            return 0
        if self._ratio <= 0:
            return math.inf
        return math.floor(math.log(1 - self._rng.random()) / math.log1p(-self._ratio))

    # -- requests over HTTP

    def request(self, headers: Iterable[tuple[str, bytes | None]]) -> Trace | None:
        """The span of a request that comes now, where it is sampled."""
        parent = read(headers)
        if parent is None:
            return self.begin(None) if self._chosen(1) else None
        return self.begin(parent) if parent.sampled else None

    def answered(self, trace: Trace, task: str, status: int) -> None:
        """A request is answered."""
        attributes: Attributes = {
            "http.request.method": "POST",
            "http.route": "/tasks/{task}/predict",
            "url.path": f"/tasks/{task}/predict",
            "url.scheme": "http",
            "http.response.status_code": status,
            "error.type": str(status) if status >= 500 else None,
            "streamproc.task": task,
        }
        self.emit(
            "POST /tasks/{task}/predict",
            SpanKind.SERVER,
            trace,
            attributes,
            times_ns=(trace.begun_ns, self.now_ns()),
            links=[_link(it) for it in trace.executions],
            status=Status(StatusCode.ERROR) if status >= 500 else None,
        )


class TaskTracing:
    """The spans of one task: what its stream tells of its records and batches."""

    def __init__(self, tracing: Tracing, task: str, *, group: str, results: str, dead: str) -> None:
        self.arrived = tracing.arrived
        self._tracing = tracing
        self._task = task
        self._group = group
        self._results = results
        self._dead = dead

    # -- batches

    def dispatched(self, batch: Batch) -> None:
        """A batch goes to a worker; it has a span of its own where one of its records has."""
        tracing = self._tracing
        traced = any(_traced(span) for span in batch.spans if span.traces)
        batch.trace = BatchTrace(tracing.new_id(128), tracing.new_id(64), tracing.now_ns()) if traced else None

    def executed(
        self, batch: Batch, *, worker: int, wall_ms: float, steps_ms: Mapping[str, float | None], results: int
    ) -> None:
        """A batch was executed; ``steps_ms`` says how long each of ``STEPS`` took."""
        if (trace := batch.trace) is None:
            return
        ended_ns = self._tracing.now_ns()
        counts = {"streamproc.batch.results": results, "streamproc.batch.failed": batch.size - results}
        attributes = {**counts, "streamproc.batch.wall_ms": wall_ms, "streamproc.worker.index": worker}
        self._emit_batch(batch, trace, attributes, ended_ns=ended_ns)
        begun_ns = max(trace.begun_ns, ended_ns - _ns(wall_ms))
        for name in STEPS:
            if (took_ms := steps_ms.get(name)) is not None:
                stop_ns = min(begun_ns + _ns(took_ms), ended_ns)
                self._tracing.emit(
                    name,
                    SpanKind.INTERNAL,
                    trace,
                    {"streamproc.task": self._task},
                    times_ns=(begun_ns, stop_ns),
                    child_id=self._tracing.new_id(64),
                )
                begun_ns = stop_ns

    def failed(self, batch: Batch, failure: Failure, worker: int) -> None:
        """The execution of a batch failed as a whole."""
        if (trace := batch.trace) is not None:
            attributes: Attributes = {**_error(failure), "streamproc.worker.index": worker}
            now_ns = self._tracing.now_ns()
            self._emit_batch(batch, trace, attributes, ended_ns=now_ns, status=_status(failure))

    def _emit_batch(
        self,
        batch: Batch,
        trace: BatchTrace,
        attributes: Attributes,
        *,
        ended_ns: int,
        status: Status | None = None,
    ) -> None:
        # A request's records have one trace.
        records = list(dict.fromkeys(trace for span in batch.spans if span.traces for _, trace in _traced(span)))
        for it in records:
            it.executions.append(trace)
        self._tracing.emit(
            f"execute {self._task}",
            SpanKind.INTERNAL,
            trace,
            {
                "streamproc.task": self._task,
                "messaging.batch.message_count": batch.size,
                "streamproc.batch.id": batch.id,
                "streamproc.batch.attempt": batch.attempt,
                "streamproc.batch.closed_by": batch.closed_by,
                "streamproc.batch.fill": batch.fill,
                "streamproc.batch.padding_ratio": batch.padding_ratio,
                "streamproc.batch.predicted_ms": batch.predicted_ms,
                "process.pid": trace.worker_pid,
                **attributes,
            },
            times_ns=(trace.begun_ns, ended_ns),
            links=[_link(it) for it in records],
            status=status,
        )

    # -- what becomes of records

    def publishing(self, outcomes: Sequence[Outcome]) -> None:
        """What became of these is written now: the traced ones of their records get the headers to be written with."""
        for outcome in outcomes:
            span = outcome.span
            if not span.traces or not (found := _traced(span)):
                continue
            records, now_ns = list(span.records), self._tracing.now_ns()
            for index, trace in found:
                value, status = outcome.values[index], outcome.statuses[index]
                trace.failure = value if isinstance(value, Failure) else None
                if status == RecordStatus.DROPPED:
                    continue
                trace.publish_id, trace.publish_ns = self._tracing.new_id(64), now_ns
                trace.published_to = self._results if status == RecordStatus.RESULT else self._dead
                records[index] = _outgoing(records[index], trace)
            span.records = records

    def too_large(self, record: Record, failure: Failure, *, dropped: bool) -> None:
        """The result of a record does not fit its topic: it is no result, but a dead letter, or nothing."""
        if isinstance(record, TracedRecord):
            record.trace.failure = failure
            record.trace.published_to = self._dead
            if dropped:
                record.trace.publish_id = None

    def settled(self, span: Span) -> None:
        """Everything of these records that is to be written is acknowledged."""
        if not span.traces:
            return
        now_ns = self._tracing.now_ns()
        topic, partition = span.lease.partition
        for index, trace in _traced(span):
            record, failure = span.records[index], trace.failure
            error = {} if failure is None else _error(failure)
            status = None if failure is None else _status(failure)
            attributes: Attributes = {
                **_messaging("process", "process", topic),
                "messaging.destination.partition.id": str(partition),
                "messaging.kafka.offset": record.offset,
                "messaging.kafka.message.tombstone": True if record.value is None else None,
                "messaging.message.body.size": len(record.value or b""),
                "messaging.consumer.group.name": self._group,
                "streamproc.task": self._task,
                "streamproc.executions": len(trace.executions),
                **error,
            }
            self._tracing.emit(
                f"process {topic}",
                SpanKind.CONSUMER,
                trace,
                attributes,
                times_ns=(trace.begun_ns, now_ns),
                links=[_link(it) for it in trace.executions],
                status=status,
            )
            if trace.publish_id is not None:
                self._tracing.emit(
                    f"publish {trace.published_to}",
                    SpanKind.PRODUCER,
                    trace,
                    {**_messaging("publish", "send", trace.published_to), "streamproc.task": self._task, **error},
                    times_ns=(trace.publish_ns, now_ns),
                    child_id=trace.publish_id,
                )


def _traced(span: Span) -> list[tuple[int, Trace]]:
    """The traced records of a span, by their index: its ``traces`` may have those of its neighbours too."""
    traces = span.traces or {}
    if len(traces) < len(span.records):
        return [(at - span.first, trace) for at, trace in traces.items() if span.first <= at < span.stop]
    return [(at - span.first, traces[at]) for at in range(span.first, span.stop) if at in traces]


def _outgoing(record: Record, trace: Trace) -> TracedRecord:
    headers = written(record.headers, context_of(trace, trace.publish_id))
    return TracedRecord(record.offset, record.timestamp, record.key, record.value, headers, trace)


def _context(trace: Trace | BatchTrace, span_id: int, *, is_remote: bool = False) -> SpanContext:
    state = TraceState.from_header([trace.state]) if trace.state else None
    return SpanContext(trace.trace_id, span_id, is_remote, TraceFlags(trace.flags), state)


def _link(trace: Trace | BatchTrace) -> Link:
    return Link(_context(trace, trace.span_id))


def _messaging(name: str, kind: str, topic: str) -> dict[str, str]:
    return {
        "messaging.system": "kafka",
        "messaging.operation.name": name,
        "messaging.operation.type": kind,
        "messaging.destination.name": topic,
    }


def _error(failure: Failure) -> dict[str, str]:
    return {"error.type": failure.kind, "streamproc.cause": failure.cause, "streamproc.stage": failure.stage}


def _status(failure: Failure) -> Status:
    return Status(StatusCode.ERROR, failure.summary)


def _ns(ms: float) -> int:
    """Nanoseconds of so many milliseconds; of a time that is none, as a backend may say it, 0."""
    return int(ms * 1e6) if 0 <= ms < MAX_MS else 0
