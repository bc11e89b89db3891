"""What ``GET /status`` answers: models of a processor's state, for people and for scripts.

Times are milliseconds or seconds as the names say; ``None`` means not known yet. A trip through JSON keeps everything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from streamproc.observe.metric_table import ReloadOutcome, WorkerState
from streamproc.records import FIRST_GENERATION

TaskState = Literal["starting", "running", "draining", "stopped"]


class StatusModel(BaseModel):
    """A part of the status. Keys that a reader does not know come from a newer version, and are ignored."""

    model_config = ConfigDict(frozen=True, populate_by_name=True, use_attribute_docstrings=True)


class PartitionStatus(StatusModel):
    """A partition that this replica holds."""

    topic: str
    partition: int
    epoch: int
    """The number of this assignment; a later assignment of the same partition has a higher one."""
    position: int | None = None
    """The next offset to read."""
    committed: int | None = None
    """The next offset to read after a restart."""
    lag_records: int | None = None
    """Offsets between the committed one and the partition's end."""
    lag_seconds: float | None = None
    """Age of the oldest record that is not committed."""
    in_flight: int = 0
    """Records read and not yet settled."""
    paused: bool = False
    """Whether back-pressure keeps it from being read: too much of it, or of everything, is outstanding."""


class WindowStatus(StatusModel):
    """The batch that is being collected."""

    size: int = 0
    age_ms: float = 0.0


class RecordCounts(StatusModel):
    """Records since the start of the process."""

    taken: int = Field(default=0, alias="in")
    """Read from the input topics."""
    results: int = Field(default=0, alias="out")
    """Written to the result topic and acknowledged."""
    dead: int = 0
    """Written to the dead-letter topic."""
    dropped: int = 0
    """Dropped because the settings say so."""
    retried: int = 0
    """Executed again, counted at each execution beyond the first."""


class TargetStatus(StatusModel):
    """The latency that a task is to keep, and the records that were answered within it and beyond since the start."""

    latency_ms: float
    within: int = 0
    beyond: int = 0


class CostStatus(StatusModel):
    """What batches of a task are predicted to cost, and what limits them. See docs/batching.md for the coefficients."""

    trusted: bool
    """Whether times are more than a guess."""
    alpha_ms: float
    beta_ms: float
    gamma_ms: float
    delta_ms: float
    a_bytes: float
    b_bytes: float
    c_bytes: float
    d_bytes: float
    kappa: float
    """The factor on memory at present."""
    estimate: str | None = None
    """The file that it began with."""
    memory_budget_mb: float | None = None
    """Most memory that a worker may hold while it runs a batch, in MiB."""
    memory_budget_source: str | None = None
    max_size: int
    max_padded: int | None = None


class RequestStatus(StatusModel):
    """Predictions over HTTP."""

    waiting: int = 0
    """Requests that wait for their results."""
    waiting_bytes: int = 0
    """Bytes of their bodies."""
    counts: dict[str, int] = Field(default_factory=dict)
    """Since the start of the process, by what became of them: the outcomes of `streamproc_requests_total`."""


class LastBatch(StatusModel):
    """The batch that a worker answered last."""

    id: int
    size: int
    fill: float
    """Its records over `batch.max_size`."""
    closed_by: str
    """The rule that closed its window."""
    attempts: int
    worker: int
    wait_ms: float
    """From the opening of its window to its dispatch."""
    wall_ms: float
    """From its dispatch to its answer."""


class Observed(StatusModel):
    """Values since the start of the process. Between two readings their mean is the growth of `sum` over `count`'s."""

    count: int = 0
    sum: float = 0.0


Bucket = tuple[float, float | None, int]
"""Above what values are, up to what (None: no limit), and how many."""


class Spread(Observed):
    """Values since the start of the process, by size. Between two readings, quantiles are of the buckets' growth."""

    buckets: list[Bucket] = Field(default_factory=list)
    """Above what values are, up to what (null: no limit), and how many; only of buckets that hold some."""
    p50: float | None = None
    """What half of them do not exceed, as near as the buckets tell."""
    p99: float | None = None


def quantile(buckets: Iterable[Bucket], share: float) -> float | None:
    """What this share of the values in some buckets does not exceed; None where there are none.

    The values of a bucket are taken to be spread evenly, as in Prometheus's ``histogram_quantile``; those without a
    limit to be at its lower bound. A bucket may come more than once, as it does from several replicas.
    """
    held: Counter[tuple[float, float | None]] = Counter()
    for above, up_to, count in buckets:
        held[above, up_to] += count
    rank, value = share * held.total(), None
    for (above, up_to), count in sorted(held.items(), key=lambda it: it[0][0]):
        if count > 0:
            value = above if up_to is None else above + (up_to - above) * min(rank / count, 1.0)
            if rank <= count:
                break
            rank -= count
    return value


class BatchTotals(StatusModel):
    """Batches since the start of the process, executions beyond the first included."""

    size: Observed = Observed()
    """Records in a batch."""
    fill: Observed = Observed()
    """Its records over `batch.max_size`."""
    padding: Observed = Observed()
    """Its padded length over the lengths of its records: 1 is no padding; where `batch.length` is set."""
    wait_ms: Observed = Observed()
    """From the opening of its window to its dispatch."""
    wall_ms: Observed = Observed()
    """From its dispatch to its answer."""
    steps_ms: dict[str, Observed] = Field(default_factory=dict)
    """What a worker spends on it, in this order: `decode`, each of the backend's steps, `encode`."""


class FailureStatus(StatusModel):
    """Records that were given up for one reason since the start of the process."""

    cause: str
    stage: str
    """Where they failed."""
    kind: str
    """The type of the error."""
    dead: int = 0
    """Those that became dead letters."""
    dropped: int = 0
    """Those that were dropped because the settings say so."""
    message: str
    """What was said of the last one, shortened."""
    topic: str
    """Where the last one was read."""
    partition: int
    offset: int


class CircuitStatus(StatusModel):
    """The limit on failed records: while it is open, the task takes nothing."""

    state: Literal["closed", "open"] = "closed"
    opened_at: datetime | None = None
    reason: str | None = None
    """What opened it."""
    bad: int = 0
    """Records that failed within `on_error.circuit.window_s`; of an open circuit, up to its opening."""
    decided: int = 0
    """Records that succeeded or failed within that time."""
    closes_in_s: float | None = None
    """When it closes by itself; null where it does not."""
    openings: int = 0
    """How often it opened since the start of the process."""


class TaskStatus(StatusModel):
    """A task: its stream, and how far it is."""

    state: TaskState
    paused: bool = False
    """Whether nothing is fetched at the moment."""
    reason: str | None = None
    """Why it is paused, in whole or in part, or stopped."""
    circuit: CircuitStatus = CircuitStatus()
    topics: list[str]
    group: str
    weight: float = 1.0
    """Its share of the workers' time, over the weights of all tasks that want it."""
    target: TargetStatus | None = None
    """Null where `batch.target_latency_ms` is not set."""
    partitions: list[PartitionStatus] = Field(default_factory=list)
    in_flight_records: int = 0
    in_flight_bytes: int = 0
    """Of the values of these records, and of their results until they are acknowledged."""
    measuring: int = 0
    """Records whose lengths are not known yet; they go to the window once they are."""
    window: WindowStatus = WindowStatus()
    counts: RecordCounts = RecordCounts()
    latency_ms: Spread = Spread()
    """From a record's arrival in the processor until Kafka has acknowledged what became of it."""
    requests: RequestStatus = RequestStatus()
    last_batch: LastBatch | None = None
    cost: CostStatus | None = None
    """Null where records have no length and there is no estimate."""
    batches: BatchTotals = BatchTotals()
    failures: list[FailureStatus] = Field(default_factory=list)
    """Why records were given up, the most frequent reason first."""


class WorkerStatus(StatusModel):
    """A worker process."""

    index: int
    pid: int | None = None
    state: WorkerState
    batches: int = 0
    """Batches that this process ran."""
    restarts: int = 0
    """Processes that were replaced at this index."""
    rss_mb: float | None = None
    """Resident memory after its last batch, in MiB."""
    running_batch_ms: float | None = None
    """How long its present batch has been computing."""
    running_task: str | None = None
    """The task of that batch."""
    running_records: int | None = None
    """The records in it."""


class MeasurerStatus(StatusModel):
    """The process that measures the lengths of records."""

    pid: int | None = None
    state: Literal["starting", "ready"]
    restarts: int = 0
    """How often it was replaced."""


class ReloadStatus(StatusModel):
    """How a reload ended."""

    outcome: ReloadOutcome
    reason: str | None = None
    """Why it was refused."""
    ended_at: datetime
    took_s: float
    generation: int
    """That of the workers which work since then."""
    backend_version: str | None = None
    """`backend.version` of the settings that hold since then."""


class ProcessorStatus(StatusModel):
    """A processor: one replica of an application."""

    name: str
    version: str
    started_at: datetime
    uptime_s: float
    not_live: list[str] = Field(default_factory=list)
    """Why `/livez` answers 503; empty where it does not."""
    not_ready: list[str] = Field(default_factory=list)
    """Why `/readyz` answers 503; empty where it does not."""
    tasks: dict[str, TaskStatus]
    workers: list[WorkerStatus]
    measurer: MeasurerStatus | None = None
    """Null where no task has lengths that it would measure."""
    generation: int = FIRST_GENERATION
    """That of the workers; each reload that is taken begins another."""
    backend_version: str | None = None
    """`backend.version` of the settings in force."""
    reloading: bool = False
    """Whether a reload is under way."""
    last_reload: ReloadStatus | None = None
    """Null where there was none since the start of the process."""


EXAMPLE = ProcessorStatus(
    name="sentiment",
    version="0.1.0",
    started_at=datetime.fromisoformat("2024-05-01T12:00:00+00:00"),
    uptime_s=61.5,
    tasks={
        "text": TaskStatus(
            state="running",
            circuit=CircuitStatus(bad=1, decided=4096),
            topics=["sentiment.text"],
            group="sentiment.text",
            partitions=[
                PartitionStatus(
                    topic="sentiment.text",
                    partition=0,
                    epoch=1,
                    position=4224,
                    committed=4096,
                    lag_records=130,
                    lag_seconds=0.05,
                    in_flight=128,
                )
            ],
            in_flight_records=128,
            in_flight_bytes=16_384,
            window=WindowStatus(size=12, age_ms=3.1),
            counts=RecordCounts(taken=4224, results=4095, dead=1),
            latency_ms=Spread(
                count=4096, sum=57_344.0, buckets=[(10.0, 15.0, 3072), (15.0, 20.0, 1024)], p50=13.333, p99=19.8
            ),
            last_batch=LastBatch(
                id=66, size=64, fill=1.0, closed_by="size", attempts=1, worker=0, wait_ms=1.2, wall_ms=12.9
            ),
            batches=BatchTotals(
                size=Observed(count=66, sum=4224),
                fill=Observed(count=66, sum=66),
                wait_ms=Observed(count=66, sum=81.3),
                wall_ms=Observed(count=66, sum=872.5),
                steps_ms={"decode": Observed(count=66, sum=20.4), "execute": Observed(count=66, sum=790.1)},
            ),
            failures=[
                FailureStatus(
                    cause="invalid",
                    stage="decode",
                    kind="JSONDecodeError",
                    dead=1,
                    message="the value is no JSON: unexpected end of data: line 1 column 9 (char 8)",
                    topic="sentiment.text",
                    partition=0,
                    offset=17,
                )
            ],
        )
    },
    workers=[
        WorkerStatus(
            index=0,
            pid=4711,
            state="busy",
            batches=66,
            restarts=0,
            rss_mb=212.4,
            running_batch_ms=8.3,
            running_task="text",
            running_records=64,
        )
    ],
    generation=2,
    backend_version="2024-05",
    last_reload=ReloadStatus(
        outcome="taken",
        ended_at=datetime.fromisoformat("2024-05-01T12:00:40+00:00"),
        took_s=3.2,
        generation=2,
        backend_version="2024-05",
    ),
)
"""The example in the OpenAPI document."""
