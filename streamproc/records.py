"""What crosses a stage boundary: records, spans, batches and outcomes.

A record is whatever the Kafka client hands out, untouched: the parent process reads its attributes and never decodes
its value. Everything else here describes *runs* of records, so that the cost of bookkeeping is per batch:

    Lease     one assignment of one partition to this process; its epoch tells it from earlier and later ones
    Span      records of one lease that are neighbours in reading order
    Batch     spans of one task that a worker runs together
    Outcome   what became of one span: a status and a value per record
    Failure   why a record or a batch failed, as data

Invariants:

- Sequence numbers count the records of a lease from 0 in the order in which they were read, without gaps; offsets may
  have gaps (compaction, transactions). Order and completeness are decided by sequence numbers, commits by offsets.
- A span is never empty, and every record of a lease is in exactly one live span.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import NamedTuple, Protocol

NULL_SIZE = -1
"""The size of a value that is null, which an empty one is not."""

NO_PARTITION = -1
"""The partition of a record that came over HTTP: none has it."""

SPLIT_SINGLY = 4
"""A failed batch of so few records is split into single ones, a larger one in halves."""


class TopicPartition(NamedTuple):
    """A partition of a topic. Equal to, and hashes like, the Kafka client's own type."""

    topic: str
    partition: int


class Record(Protocol):
    """A Kafka record as a client gives it. Where it was read is known of many at once: a span's lease says it."""

    @property
    def offset(self) -> int:
        """Its place in the partition."""

    @property
    def timestamp(self) -> int:
        """Milliseconds since 1970."""

    @property
    def key(self) -> bytes | None:
        """Its key, if it has one."""

    @property
    def value(self) -> bytes | None:
        """Its value; null for a tombstone."""

    @property
    def headers(self) -> Sequence[tuple[str, bytes | None]]:
        """Names and values."""


class TopicRecord(Record, Protocol):
    """A record that also says where it was read: what a reader gives, record by record."""

    @property
    def topic(self) -> str:
        """The topic it was read from."""

    @property
    def partition(self) -> int:
        """The partition it was read from."""


@dataclass(frozen=True, slots=True, eq=False)
class Lease:
    """One assignment of one partition to this process. Compared by identity: a new assignment is a new lease.

    A request over HTTP is a lease too, of ``NO_PARTITION``: its records have no offsets, and its end is its answer.
    """

    partition: TopicPartition
    epoch: int

    @property
    def is_request(self) -> bool:
        """Whether it is a request's: neither ledger nor sequencer knows it."""
        return self.partition.partition == NO_PARTITION


@dataclass(slots=True, eq=False)
class BatchTrace:
    """What is traced of a batch's execution: the span of its own that is made once it has ended."""

    trace_id: int
    span_id: int
    begun_ns: int
    """Nanoseconds since 1970."""
    worker_pid: int | None = None
    parent_id: None = None
    flags: int = 1
    state: str = ""

    @property
    def traceparent(self) -> str:
        """For the worker: the parent of what the backend makes of spans."""
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-{self.flags:02x}"


@dataclass(slots=True, eq=False)
class Trace:
    """What is traced of a record, or of a request over HTTP, until its span is made at the end of its way."""

    trace_id: int
    span_id: int
    parent_id: int | None
    """The span that it comes from, of its producer or client; None where the trace begins here."""
    flags: int
    state: str
    begun_ns: int
    executions: list[BatchTrace] = field(default_factory=list)
    """Of the batches that it was in, failed ones among them."""
    failure: Failure | None = None
    publish_id: int | None = None
    """The span of its result or dead letter; None where nothing is written."""
    publish_ns: int = 0
    published_to: str = ""


def trace_id(trace: Trace | BatchTrace | None) -> str | None:
    """The id of a trace as its headers and the log have it."""
    return None if trace is None else f"{trace.trace_id:032x}"


@dataclass(slots=True, eq=False)
class Span:
    """A run of records of one lease, neighbours in reading order; ``first`` is the sequence number of the first.

    ``sizes`` holds the bytes of each value, ``NULL_SIZE`` for a null; ``arrived_at`` is in seconds of the processor's
    clock; ``lengths`` is what each record is padded by, at least 0, where its task measures that. ``traces`` has the
    records that are traced, by sequence number, maybe some of neighbouring spans too; nearly always there are none.
    """

    lease: Lease
    first: int
    records: Sequence[Record]
    sizes: Sequence[int]
    arrived_at: float
    lengths: Sequence[int] | None = None
    traces: Mapping[int, Trace] | None = None
    size_bytes: int = field(init=False)
    """The bytes of the values together."""
    output_bytes: int = field(init=False, default=0)
    """The bytes of the results, once there are some: the ledger counts them until the span is settled."""

    def __post_init__(self) -> None:
        self.size_bytes = sum(self.sizes) - NULL_SIZE * self.sizes.count(NULL_SIZE)

    @property
    def stop(self) -> int:
        """The sequence number after the last record's."""
        return self.first + len(self.records)

    @property
    def next_offset(self) -> int:
        """The offset to commit once every record up to this span's end is settled."""
        return self.records[-1].offset + 1

    def offsets(self) -> Iterable[int]:
        """The records' offsets; nearly always they have no gaps, and are not asked for one by one."""
        records = self.records
        first, last = records[0].offset, records[-1].offset
        if last - first == len(records) - 1:
            return range(first, last + 1)
        return [record.offset for record in records]

    def split(self, count: int) -> tuple[Span, Span]:
        """The first ``count`` records and the rest; ``count`` is at least 1 and less than the span's length."""
        return self.part(0, count), self.part(count, len(self.records))

    def part(self, start: int, stop: int) -> Span:
        """The records from index ``start`` to before ``stop``; there is one at least."""
        return Span(
            self.lease,
            self.first + start,
            self.records[start:stop],
            self.sizes[start:stop],
            self.arrived_at,
            None if self.lengths is None else self.lengths[start:stop],
            self.traces,
        )

    def singles(self) -> list[Span]:
        """A span for each record."""
        return [self.part(index, index + 1) for index in range(len(self.records))]


def value_sizes(records: Sequence[Record]) -> list[int]:
    """The bytes of each record's value; ``NULL_SIZE`` for a null."""
    return [NULL_SIZE if (value := record.value) is None else len(value) for record in records]


FIRST_GENERATION = 1
"""Of the workers that a processor starts with; each reload begins another."""


class Status(IntEnum):
    """What became of a record; one byte of it per record crosses the wire."""

    RESULT = 0
    FAILED = 1
    DROPPED = 2


class Cause(StrEnum):
    """Why something failed, in the one word that policies, dead letters and metrics go by. The values are public."""

    INVALID = "invalid"
    """The value is no record in its task's format, does not match its topic's schema, or is too large."""
    REJECTED = "rejected"
    """The backend put a RecordError in the record's place."""
    EXCEPTION = "exception"
    """A step of the backend raised."""
    OUTPUT = "output"
    """The backend answered with something else than one output per record, or with one that its format cannot hold."""
    CRASH = "crash"
    """The worker process died."""
    TIMEOUT = "timeout"
    """The batch computed for longer than its deadline."""
    OOM = "oom"
    """Memory ran out: the worker's, the device's, or what the worker may have."""
    TOO_LARGE = "too_large"
    """The record fits no batch, or the result not its topic."""
    REGISTRY = "registry"
    """The schema registry does not answer, or refuses to."""


OWN_STAGES = frozenset({"batch", "decode", "schema", "output", "worker", "registry", "sink"})
"""Stages whose messages are streamproc's own words, and have nothing of a record in them."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a record, or a whole batch, failed.

    ``stage`` is where on the path it happened (``length``, ``batch``, ``decode``, ``schema``, ``preprocess``,
    ``transform_inputs``, ``execute``, ``transform_outputs``, ``output``, ``encode``, ``worker``, ``sink``); ``kind``
    the error's type; ``message`` the sentence for people; ``traceback`` the last lines of an exception's, where one was
    raised.
    """

    cause: Cause
    stage: str
    kind: str
    message: str
    traceback: str = ""

    @property
    def summary(self) -> str:
        """What failed, for logs and traces: the message, unless it may quote a record, or what is secret to a backend.

        Exceptions quote what they choke on, and reasons to reject a record are the user's. Dead letters have both.
        """
        return self.message if self.stage in OWN_STAGES else f"{self.stage} failed with {self.kind}"

    @property
    def killed(self) -> bool:
        """Whether the worker process ended with it, for another reason than the batch's deadline."""
        return self.stage == "worker" and self.cause is not Cause.TIMEOUT


@dataclass(slots=True, eq=False)
class Batch:
    """Records of one task that a worker runs together.

    ``closed_by`` says which rule closed its window; ``attempt`` counts the executions that were begun, this one
    included; ``fill`` is its size over the task's maximum; ``predicted_ms`` and ``predicted_bytes`` are what a cost
    model expected of it when its window closed, where the task has one, and ``model_bytes`` what the estimate by itself
    has for it; ``account`` is whose share of the workers' time it takes, its task's by default. Of the executions
    before: ``retried`` has the cause of each after which all of its records were retried together, ``died_alone`` that
    of each that a worker died of with nothing but this one record.
    """

    id: int
    task: str
    spans: Sequence[Span]
    opened_at: float
    closed_at: float
    closed_by: str
    fill: float
    attempt: int = 1
    retried: tuple[Cause, ...] = ()
    died_alone: tuple[Cause, ...] = ()
    dispatched: bool = False
    generation: int = 0
    """The generation of the worker that it was given to last; 0 before."""
    predicted_ms: float | None = None
    predicted_bytes: float | None = None
    model_bytes: float = 0.0
    account: str = ""
    trace: BatchTrace | None = None
    """Of its execution, where one of its records is traced."""
    size: int = field(init=False)
    size_bytes: int = field(init=False)
    longest: int | None = field(init=False)
    """The length that its records are padded to; None where they have none."""
    padding_ratio: float | None = field(init=False)
    """Its padded length over that of its records: 1 is no padding; None where they have no length."""

    def __post_init__(self) -> None:
        self.account = self.account or self.task
        self.restrict(self.spans)

    def restrict(self, spans: Sequence[Span]) -> None:
        """Keep only these spans."""
        self.spans = spans
        self.size = sum([len(span.records) for span in self.spans])
        self.size_bytes = sum([span.size_bytes for span in self.spans])
        self.longest = self.padding_ratio = None
        if spans and spans[0].lengths is not None:
            lengths = [span.lengths for span in spans if span.lengths is not None]
            self.longest = max(map(max, lengths))
            total = sum(map(sum, lengths))
            self.padding_ratio = self.size * self.longest / total if total else 1.0

    @property
    def requested(self) -> int:
        """Its records that came over HTTP, until it lets go of them."""
        return sum([len(span.records) for span in self.spans if span.lease.is_request])

    def release(self) -> None:
        """Let go of the records, and keep what describes the batch: a report outlives most of its records."""
        self.spans = ()

    def parts(self) -> list[list[Span]]:
        """The spans of the batches to split this one into: halves, or single records of four or fewer.

        The records of halves differ by at most one in number. Four one by one are as many executions as two halves of
        which one fails, and a culprit among them fails once less.
        """
        if self.size > SPLIT_SINGLY:
            return list(self._halves())
        return [[one] for span in self.spans for one in span.singles()]

    def _halves(self) -> tuple[list[Span], list[Span]]:
        wanted = self.size // 2
        left: list[Span] = []
        right: list[Span] = []
        for span in self.spans:
            if wanted >= len(span.records):
                left.append(span)
                wanted -= len(span.records)
            elif wanted > 0:
                head, tail = span.split(wanted)
                left.append(head)
                right.append(tail)
                wanted = 0
            else:
                right.append(span)
        return left, right


@dataclass(slots=True, eq=False)
class BatchReport:
    """What is known of a batch once it ran: what the metrics topic and the results' envelope say of it.

    ``worker`` is the index of the one that ran it, None where its records failed before; ``metrics`` is the backend's
    execution metrics as JSON, packflow's names, milliseconds, where somebody asks for them; ``attempts`` how often the
    records had been executed when this came out; ``backend_version`` that of the settings of who ran it.
    """

    batch: Batch
    worker: int | None
    metrics: bytes
    attempts: int
    backend_version: str | None = None


@dataclass(slots=True, eq=False)
class Outcome:
    """What became of one span: per record a ``Status`` and a value.

    The value is the result to publish, or the failure: as JSON text when a worker wrote it, as a ``Failure`` when the
    parent did.
    """

    span: Span
    statuses: bytes
    values: Sequence[bytes | memoryview | Failure]
    report: BatchReport
