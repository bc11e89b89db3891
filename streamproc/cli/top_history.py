"""What ``streamproc top`` has seen of its replicas, and how fast things go by the difference of two statuses.

A status counts since the start of its process. Where a process began after the status before, or one of its counters is
below what it was, it was started anew: its counters are compared with zero, at the moment of its start.

A replica that does not answer is no error here: it is lost, with the reason, until it answers again. What is lost
counts in no total.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from streamproc.observe.status import (
    BatchTotals,
    Bucket,
    Observed,
    ProcessorStatus,
    RecordCounts,
    TaskStatus,
    WorkerStatus,
    quantile,
)

RATES_S = 5.0
"""Rates, means and quantiles are of so many seconds, or of the time between the last two statuses if that is longer."""
MAX_TREND = 600
_ZERO = (0, 0.0)


@dataclass(frozen=True, slots=True)
class Growth:
    """What was added to the counters of a task in a time."""

    elapsed_s: float
    taken: int
    results: int
    batches: dict[str, tuple[int, float]]
    """By the names of ``BatchTotals``, and ``step NAME`` for its steps: how many were added, and their sum."""
    latency_ms: list[Bucket]
    """How many were added to each."""


@dataclass(frozen=True, slots=True)
class TaskFigures:
    """A task, of one replica or of several together. Rates and means are of the last seconds; None is not known yet."""

    state: str
    """Of several replicas the first of: stopped, draining, starting, paused, running."""
    reason: str | None
    circuit: str
    """``closed``, ``open``, or of several replicas ``2 of 3 open``."""
    circuit_reason: str | None
    read_per_s: float | None
    results_per_s: float | None
    lag_records: int | None
    lag_seconds: float | None
    """Of the partition that is furthest behind."""
    latency_p50_ms: float | None
    """Of the records that were acknowledged in the last seconds, from their arrival in the processor on."""
    latency_p99_ms: float | None
    in_flight_records: int
    batches_per_s: float | None
    batch_records: float | None
    fill: float | None
    padding: float | None
    wait_ms: float | None
    wall_ms: float | None
    steps_ms: dict[str, float]
    retried: int
    dead: int
    dropped: int
    given_up_by_cause: dict[str, int]
    """Dead letters and dropped records since the start of the process, the most frequent cause first."""


@dataclass(frozen=True, slots=True)
class ReplicaFigures:
    """A replica. Of one that does not answer there is only what it is, as far as that was known."""

    url: str
    answers: bool
    error: str | None
    """Why it does not answer."""
    lost_s: float | None
    """For how long it has not."""
    restarts: int
    """How often its process was found to be another one."""
    name: str | None
    version: str | None
    uptime_s: float | None
    generation: int | None
    backend_version: str | None
    reloading: bool
    not_live: Sequence[str]
    not_ready: Sequence[str]
    tasks: dict[str, TaskFigures]
    workers: Sequence[WorkerStatus]


@dataclass(frozen=True, slots=True)
class Figures:
    """What a frame shows: every replica, and each task over all that answer."""

    replicas: Sequence[ReplicaFigures]
    tasks: dict[str, TaskFigures]
    read_per_s: float | None
    results_per_s: float | None
    lag_records: int | None
    lag_seconds: float | None
    in_flight_records: int
    trend: Sequence[float | None]
    """``results_per_s`` of this frame and those before it, the oldest first."""


@dataclass(slots=True)
class _Replica:
    url: str
    seen: deque[tuple[float, ProcessorStatus | None]] = field(default_factory=deque)
    """Statuses and when they came; None is the start of the process, with every counter at zero."""
    restarts: int = 0
    error: str | None = None
    lost_at: float | None = None

    @property
    def last(self) -> ProcessorStatus | None:
        return self.seen[-1][1] if self.seen else None

    def add(self, status: ProcessorStatus, now: float) -> None:
        before = self.last
        if before is not None and _started_anew(before, status):
            self.restarts += 1
            self.seen.clear()
            self.seen.append((now - max(status.uptime_s, 1e-3), None))
        self.seen.append((now, status))
        # Two at least: the last one, and what it is compared with.
        while len(self.seen) > 2 and self.seen[0][0] < now - RATES_S:
            self.seen.popleft()
        self.error = self.lost_at = None

    def lose(self, reason: str, now: float) -> None:
        self.error = reason
        if self.lost_at is None:
            self.lost_at = now

    def growth(self, task: str) -> Growth | None:
        """Of the task since the oldest status that is kept; None where there is only one."""
        status = self.last
        if status is None or len(self.seen) < 2:
            return None
        (begun, before), now = self.seen[0], self.seen[-1][0]
        earlier = None if before is None else before.tasks.get(task)
        return growth(earlier, status.tasks[task], max(now - begun, 1e-9))


class History:
    """What was seen of some replicas. ``now`` is any clock that only goes forward, in seconds."""

    def __init__(self, urls: Iterable[str]) -> None:
        self._replicas = {url: _Replica(url) for url in urls}
        self._trend: deque[float | None] = deque(maxlen=MAX_TREND)

    def add(self, url: str, status: ProcessorStatus, now: float) -> None:
        """A replica answered."""
        self._replicas[url].add(status, now)

    def lose(self, url: str, reason: str, now: float) -> None:
        """A replica did not answer."""
        self._replicas[url].lose(reason, now)

    def next_frame(self, now: float) -> Figures:
        """What there is to show; the throughput goes into the trend."""
        answering = [it for it in self._replicas.values() if it.last is not None and it.error is None]
        names = dict.fromkeys(name for it in answering if it.last for name in it.last.tasks)
        tasks = {name: _together(answering, name) for name in names}
        results_per_s = _sum(it.results_per_s for it in tasks.values())
        self._trend.append(results_per_s)
        behind = [it.lag_seconds for it in tasks.values() if it.lag_seconds is not None]
        lags = [it.lag_records for it in tasks.values() if it.lag_records is not None]
        return Figures(
            replicas=[_replica(it, now) for it in self._replicas.values()],
            tasks=tasks,
            read_per_s=_sum(it.read_per_s for it in tasks.values()),
            results_per_s=results_per_s,
            lag_records=sum(lags) if lags else None,
            lag_seconds=max(behind, default=None),
            in_flight_records=sum(it.in_flight_records for it in tasks.values()),
            trend=list(self._trend),
        )


def growth(before: TaskStatus | None, after: TaskStatus, elapsed_s: float) -> Growth:
    """What was added to a task's counters, ``before`` being None where all were at zero."""
    counts, totals = (RecordCounts(), BatchTotals()) if before is None else (before.counts, before.batches)
    held = {} if before is None else {(above, up_to): count for above, up_to, count in before.latency_ms.buckets}
    earlier = _observations(totals)
    return Growth(
        elapsed_s=elapsed_s,
        taken=after.counts.taken - counts.taken,
        results=after.counts.results - counts.results,
        batches={
            name: (observed.count - since[0], observed.sum - since[1])
            for name, observed in _observations(after.batches).items()
            for since in [(earlier[name].count, earlier[name].sum) if name in earlier else _ZERO]
        },
        latency_ms=[
            (above, up_to, count - held.get((above, up_to), 0)) for above, up_to, count in after.latency_ms.buckets
        ],
    )


def figures(task: Sequence[tuple[TaskStatus, Growth | None]]) -> TaskFigures:
    """A task from its status in each of some replicas, and what was added to its counters there."""
    statuses = [status for status, _ in task]
    growths = [it for _, it in task if it is not None]
    added: dict[str, tuple[int, float]] = {}
    for it in growths:
        for name, (count, sum_) in it.batches.items():
            before = added.get(name, _ZERO)
            added[name] = (before[0] + count, before[1] + sum_)
    latencies_ms = [bucket for it in growths for bucket in it.latency_ms]
    means = {name: sum_ / count for name, (count, sum_) in added.items() if count > 0}
    lags = [it.lag_records for status in statuses for it in status.partitions if it.lag_records is not None]
    behind = [it.lag_seconds for status in statuses for it in status.partitions if it.lag_seconds is not None]
    open_ = [it for it in statuses if it.circuit.state == "open"]
    causes: Counter[str] = Counter()
    for status in statuses:
        for failure in status.failures:
            causes[failure.cause] += failure.dead + failure.dropped
    return TaskFigures(
        state=min(map(_state, statuses), key=_STATES.index),
        reason=next((it.reason for it in statuses if it.reason and it.circuit.state == "closed"), None),
        circuit="closed" if not open_ else "open" if len(statuses) == 1 else f"{len(open_)} of {len(statuses)} open",
        circuit_reason=next((it.circuit.reason for it in open_), None),
        read_per_s=_sum(it.taken / it.elapsed_s for it in growths),
        results_per_s=_sum(it.results / it.elapsed_s for it in growths),
        lag_records=sum(lags) if lags else None,
        lag_seconds=max(behind, default=None),
        latency_p50_ms=quantile(latencies_ms, 0.5),
        latency_p99_ms=quantile(latencies_ms, 0.99),
        in_flight_records=sum(it.in_flight_records for it in statuses),
        batches_per_s=_sum(it.batches["size"][0] / it.elapsed_s for it in growths),
        batch_records=means.get("size"),
        fill=means.get("fill"),
        padding=means.get("padding"),
        wait_ms=means.get("wait_ms"),
        wall_ms=means.get("wall_ms"),
        steps_ms={name.removeprefix(_STEP): mean for name, mean in means.items() if name.startswith(_STEP)},
        retried=sum(it.counts.retried for it in statuses),
        dead=sum(it.counts.dead for it in statuses),
        dropped=sum(it.counts.dropped for it in statuses),
        given_up_by_cause=dict(causes.most_common()),
    )


_STATES = ("stopped", "draining", "starting", "paused", "running")
_STEP = "step "


def _state(task: TaskStatus) -> str:
    return "paused" if task.paused and task.state == "running" else task.state


def _observations(totals: BatchTotals) -> dict[str, Observed]:
    return {
        **{name: getattr(totals, name) for name in ("size", "fill", "padding", "wait_ms", "wall_ms")},
        **{f"{_STEP}{name}": observed for name, observed in totals.steps_ms.items()},
    }


def _started_anew(before: ProcessorStatus, after: ProcessorStatus) -> bool:
    if before.started_at != after.started_at:
        return True
    for name, task in after.tasks.items():
        if (was := before.tasks.get(name)) is None:
            continue
        counted, earlier = task.counts.model_dump(), was.counts.model_dump()
        if any(counted[it] < earlier[it] for it in counted) or task.batches.size.count < was.batches.size.count:
            return True
    return False


def _together(replicas: Sequence[_Replica], task: str) -> TaskFigures:
    return figures(
        [(it.last.tasks[task], it.growth(task)) for it in replicas if it.last is not None and task in it.last.tasks]
    )


def _replica(it: _Replica, now: float) -> ReplicaFigures:
    status = it.last
    answers = status is not None and it.error is None
    return ReplicaFigures(
        url=it.url,
        answers=answers,
        error=it.error,
        lost_s=None if it.lost_at is None else round(now - it.lost_at, 3),
        restarts=it.restarts,
        name=None if status is None else status.name,
        version=None if status is None else status.version,
        uptime_s=None if status is None or not answers else status.uptime_s,
        generation=None if status is None else status.generation,
        backend_version=None if status is None else status.backend_version,
        reloading=status is not None and answers and status.reloading,
        not_live=[] if status is None or not answers else status.not_live,
        not_ready=[] if status is None or not answers else status.not_ready,
        tasks={} if status is None or not answers else {name: _together([it], name) for name in status.tasks},
        workers=[] if status is None or not answers else status.workers,
    )


def _sum(values: Iterable[float | None]) -> float | None:
    known = [it for it in values if it is not None]
    return sum(known) if known else None
