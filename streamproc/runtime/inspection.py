"""What is seen of a processor from outside: lag, liveness, readiness, status.

Reads the stages' state and changes nothing in them. Liveness is progress: not alive is a task for which records
wait while no batch was executed for longer than one may compute, or offsets wait while none is committed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Literal, cast

from streamproc.observe.health import Health, ProgressWatch
from streamproc.observe.histogram import Histogram
from streamproc.observe.metric_table import WorkerState
from streamproc.observe.metrics import TaskMetrics, package_version
from streamproc.observe.status import (
    BatchTotals,
    CircuitStatus,
    CostStatus,
    FailureStatus,
    LastBatch,
    MeasurerStatus,
    Observed,
    PartitionStatus,
    ProcessorStatus,
    RecordCounts,
    RequestStatus,
    Spread,
    TargetStatus,
    TaskStatus,
    WindowStatus,
    WorkerStatus,
    quantile,
)
from streamproc.runtime.isolation import MAX_BACKOFF_S
from streamproc.runtime.ledger import PartitionBooks

UNACKNOWLEDGED_AFTER_S = 10.0
"""What is written is acknowledged in milliseconds; after so long something is wrong that is worth telling."""
MAX_MESSAGE_CHARS = 300
"""A backend's errors may be as long as it likes; the dead letter has the whole."""

if TYPE_CHECKING:
    from streamproc.runtime.pool import Worker
    from streamproc.runtime.processor import Processor
    from streamproc.runtime.task_stream import TaskStream
    from streamproc.runtime.verdicts import GivenUp


class Inspector:
    """Looks at a processor."""

    def __init__(self, processor: Processor, wall_clock: Callable[[], float]) -> None:
        self._processor = processor
        self._wall_clock = wall_clock
        self._started_at = datetime.fromtimestamp(wall_clock(), UTC)
        self._begun = processor.clock()
        self.reload()

    def reload(self) -> None:
        """Watch for progress by the settings of now, from now on."""
        settings = self._processor.settings
        # A batch may compute until its deadline, and a retry may wait: that is work, not a stall.
        longest_s = settings.pool.batch_timeout_s + MAX_BACKOFF_S
        self._stalled_after_s = max(settings.http.stalled_after_s, longest_s * 1.1)
        self._work = {name: ProgressWatch(self._stalled_after_s) for name in settings.tasks}
        self._commits = {name: ProgressWatch(self._stalled_after_s) for name in settings.tasks}
        self._writes = {name: ProgressWatch(UNACKNOWLEDGED_AFTER_S) for name in settings.tasks}

    def observe(self, now: float) -> None:
        """Bring the gauges up to date, and watch for progress."""
        processor = self._processor
        for name, task in processor.tasks.items():
            metrics = processor.metrics.task(name)
            metrics.in_flight_records.set(task.ledger.in_flight_records)
            metrics.in_flight_bytes.set(task.ledger.in_flight_bytes)
            metrics.paused_partitions.set(
                task.source.assigned_partitions if task.source.held else len(task.source.paused)
            )
            metrics.waiting_requests.set(len(task.requests))
            metrics.waiting_bytes.set(task.requests.size_bytes)
            waiting = 0
            for books in task.ledger.partitions():
                lag_records, lag_seconds = self._lag(task, books)
                gauges = metrics.partition(books.partition)
                if books.committed is not None:
                    gauges.committed_offset.set(books.committed)
                if lag_records is not None:
                    gauges.lag_records.set(lag_records)
                if lag_seconds is not None:
                    gauges.lag_seconds.set(lag_seconds)
                waiting += lag_records or 0
            # While no worker can take a batch, readiness says so, and pool.initialize_timeout_s bounds it. An open
            # circuit is no stall either: it pauses the task on purpose, and a restart would not mend what opened it.
            able = any(worker.open for worker in processor.pool.workers()) and not task.circuit.is_open
            self._work[name].observe(waiting if able else 0, task.progress, now)
            self._commits[name].observe(len(task.ledger.committable()), task.commits, now)
            unacknowledged, acknowledged = task.writes()
            self._writes[name].observe(len(unacknowledged) + task.recovering, acknowledged, now)
        processor.metrics.set_workers(self._worker_states())

    def live(self, now: float) -> Health:
        """Not alive after a failure, or when records have waited too long without a commit."""
        failure = self._processor.failure
        reasons = [str(failure)] if failure is not None else []
        for task, watch in self._work.items():
            if (stalled_s := watch.stalled(now)) is not None:
                reasons.append(f"task {task}: records wait, and no batch was executed for {stalled_s:.0f} s")
        for task, watch in self._commits.items():
            if (stalled_s := watch.stalled(now)) is not None:
                reasons.append(f"task {task}: offsets wait to be committed, and none was for {stalled_s:.0f} s")
        return Health.of(*reasons)

    def ready(self) -> Health:
        """Ready when the partitions are assigned and every worker is warm."""
        processor = self._processor
        reasons = [str(processor.failure)] if processor.failure is not None else []
        if processor.stopping and processor.failure is None:
            reasons.append("the processor is stopping")
        for name, task in processor.tasks.items():
            if task.state == "running" and not task.consumer.connected():
                reasons.append(f"task {name}: no connection to Kafka at {processor.settings.kafka.bootstrap_servers}")
            elif (why := self._unacknowledged(task, processor.clock())) is not None:
                reasons.append(f"task {name}: {why}")
            if not task.assigned.is_set():
                reasons.append(f"task {name}: no partitions are assigned yet in group {task.group}")
            if task.circuit.is_open:
                reasons.append(f"task {name}: {_open_because(task, self._processor.clock())}")
        ready = {worker.index for worker in processor.pool.workers() if worker.open}
        for index in range(processor.settings.pool.workers):
            if index not in ready:
                worker = next((it for it in processor.pool.workers() if it.index == index), None)
                initialized = worker is not None and worker.initialize_s is not None
                what = "says that its backend is not ready" if initialized else "is starting"
                reasons.append(f"worker {index} {what}")
        if processor.measuring is not None and not processor.measuring.ready:
            reasons.append("the process that measures lengths is starting")
        return Health.of(*reasons)

    def status(self, now: float) -> ProcessorStatus:
        """Tasks, partitions and workers as they are now."""
        processor = self._processor
        return ProcessorStatus(
            name=processor.settings.name,
            version=package_version(),
            started_at=self._started_at,
            uptime_s=round(now - self._begun, 3),
            not_live=self.live(now).reasons,
            not_ready=self.ready().reasons,
            tasks={name: self._task(task, now) for name, task in processor.tasks.items()},
            workers=[self._worker(worker, now) for worker in processor.pool.workers()],
            measurer=self._measurer(),
            generation=processor.pool.generation,
            backend_version=processor.settings.backend.version,
            reloading=processor.reloading,
            last_reload=processor.last_reload,
        )

    def circuit(self, task: str, now: float) -> CircuitStatus:
        """The state of a task's circuit."""
        circuit = self._processor.tasks[task].circuit
        bad, decided = circuit.counts(now)
        if circuit.opened_at is None:
            return CircuitStatus(bad=bad, decided=decided, openings=circuit.openings)
        return CircuitStatus(
            state="open",
            opened_at=self._started_at + timedelta(seconds=round(circuit.opened_at - self._begun, 3)),
            reason=circuit.reason,
            bad=bad,
            decided=decided,
            closes_in_s=None if circuit.closes_at is None else round(max(circuit.closes_at - now, 0.0), 3),
            openings=circuit.openings,
        )

    def _lag(self, task: TaskStream, books: PartitionBooks) -> tuple[int | None, float | None]:
        """Records and seconds behind; None for what is not known before the first fetch.

        Seconds are the age of the oldest record that was read and is not settled. While none is, but Kafka holds more,
        they are the age of the last record that was read: the next one is no older.
        """
        fetched, asked = task.consumer.highwater(books.partition), task.ends.get(books.partition)
        end = max((it for it in (fetched, asked) if it is not None), default=None)
        position = task.consumer.position(books.partition)
        if end is None or position is None:
            return None, None
        if books.in_flight_records:
            done = books.next_offset
            dated = books.oldest_timestamp
        else:
            done, dated = position, books.last_timestamp
        behind = max(end - (done or 0), 0)
        if behind == 0:
            return 0, 0.0
        return behind, None if dated is None else max(self._wall_clock() - dated / 1_000, 0.0)

    def _unacknowledged(self, task: TaskStream, now: float) -> str | None:
        """Why nothing is written, as far as it is known here; None while something is."""
        waits_s, (waiting, _) = self._writes[task.name].stalled(now), task.writes()
        if waits_s is None or not (waiting or task.recovering):
            return None
        if not waiting:
            return (
                f"Kafka has acknowledged nothing for {waits_s:.0f} s, a transaction was given up, and none can be "
                f"begun; the log says what it answers"
            )
        (topic, partition), *others = waiting
        return (
            f"Kafka has acknowledged nothing for {waits_s:.0f} s of what is to be written to topic {topic}, partition "
            f"{partition}{f', and {len(others)} more' if others else ''}; the log says what it answers"
        )

    def _task(self, task: TaskStream, now: float) -> TaskStatus:
        processor = self._processor
        partitions = []
        for books in task.ledger.partitions():
            lag_records, lag_seconds = self._lag(task, books)
            partitions.append(
                PartitionStatus(
                    topic=books.partition.topic,
                    partition=books.partition.partition,
                    epoch=books.epoch,
                    position=books.position,
                    committed=books.committed,
                    lag_records=lag_records,
                    lag_seconds=lag_seconds,
                    in_flight=books.in_flight_records,
                    paused=task.source.held or books.partition in task.source.paused,
                )
            )
        failure = processor.failure
        reason = "back-pressure" if task.source.paused else None
        reason = self._unacknowledged(task, now) or reason
        if failure is not None:
            reason = str(failure)
        elif task.circuit.is_open:
            reason = _open_because(task, now)
        opened_at = task.batcher.opened_at
        settings = self._processor.settings.tasks[task.name]
        latency_ms = settings.batch.target_latency_ms
        return TaskStatus(
            state=cast("Literal['starting', 'running', 'draining', 'stopped']", task.state),
            paused=_paused(task),
            reason=reason,
            circuit=self.circuit(task.name, now),
            topics=list(task.topics.inputs),
            group=task.group,
            weight=settings.weight,
            target=None
            if latency_ms is None
            else TargetStatus(latency_ms=latency_ms, within=task.counts.within, beyond=task.counts.beyond),
            partitions=partitions,
            in_flight_records=task.ledger.in_flight_records,
            in_flight_bytes=task.ledger.in_flight_bytes,
            measuring=0 if processor.measuring is None else processor.measuring.size(task.name),
            window=WindowStatus(
                size=task.batcher.size, age_ms=0.0 if opened_at is None else round((now - opened_at) * 1_000, 3)
            ),
            counts=RecordCounts(
                taken=task.counts.taken,
                results=task.counts.results,
                dead=task.counts.dead,
                dropped=task.counts.dropped,
                retried=task.counts.retried,
            ),
            latency_ms=_spread_ms(processor.metrics.task(task.name).record_latency),
            requests=RequestStatus(
                waiting=len(task.requests), waiting_bytes=task.requests.size_bytes, counts=dict(task.counts.requests)
            ),
            last_batch=self._last_batch(task),
            batches=_totals(processor.metrics.task(task.name)),
            failures=[_failure(it) for it in task.given_up()],
            cost=self._cost(task),
        )

    @staticmethod
    def _cost(task: TaskStream) -> CostStatus | None:
        cost, plan = task.batcher.cost, task.plan
        if cost is None:
            return None
        return CostStatus(
            trusted=cost.trusted,
            **asdict(cost.model),
            kappa=cost.kappa,
            estimate=None if plan.path is None else str(plan.path),
            memory_budget_mb=None if plan.budget is None else round(plan.budget.size_bytes / 1_048_576, 1),
            memory_budget_source=None if plan.budget is None else plan.budget.source,
            max_size=plan.batch.max_size,
            max_padded=plan.batch.max_padded,
        )

    @staticmethod
    def _last_batch(task: TaskStream) -> LastBatch | None:
        if task.last is None:
            return None
        report, wall_ms = task.last
        batch = report.batch
        return LastBatch(
            id=batch.id,
            size=batch.size,
            fill=batch.fill,
            closed_by=batch.closed_by,
            attempts=batch.attempt,
            worker=report.worker,
            wait_ms=round((batch.closed_at - batch.opened_at) * 1_000, 3),
            wall_ms=round(wall_ms, 3),
        )

    def _measurer(self) -> MeasurerStatus | None:
        measuring = self._processor.measuring
        if measuring is None:
            return None
        return MeasurerStatus(
            pid=measuring.pid, state="ready" if measuring.ready else "starting", restarts=measuring.restarts
        )

    def _worker(self, worker: Worker, now: float) -> WorkerStatus:
        running_ms = None if worker.running_since is None else round((now - worker.running_since) * 1_000, 3)
        running = worker.batches[0] if worker.batches and worker.running_since is not None else None
        return WorkerStatus(
            index=worker.index,
            pid=worker.pid or None,
            state=_worker_state(worker),
            batches=worker.batches_done,
            restarts=self._processor.pool.restarts(worker.index),
            rss_mb=round(worker.rss_bytes / 1_048_576, 1) if worker.rss_bytes else None,
            running_batch_ms=running_ms,
            running_task=None if running is None else running.task,
            running_records=None if running is None else running.size,
        )

    def _worker_states(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for worker in self._processor.pool.workers():
            state = _worker_state(worker)
            counts[state] = counts.get(state, 0) + 1
        return counts


def _totals(metrics: TaskMetrics) -> BatchTotals:
    return BatchTotals(
        size=_observed(metrics.batch_size),
        fill=_observed(metrics.batch_fill),
        padding=_observed(metrics.batch_padding),
        wait_ms=_observed(metrics.batch_wait, 1_000),
        wall_ms=_observed(metrics.batch_wall, 1_000),
        steps_ms={
            "decode": _observed(metrics.decode, 1_000),
            **{step: _observed(histogram, 1_000) for step, histogram in metrics.steps.items()},
            "encode": _observed(metrics.encode, 1_000),
        },
    )


def _observed(histogram: Histogram, scale: float = 1) -> Observed:
    return Observed(count=histogram.count, sum=round(histogram.sum * scale, 6))


def _spread_ms(histogram: Histogram) -> Spread:
    buckets = [
        (round(above * 1_000, 6), None if up_to is None else round(up_to * 1_000, 6), count)
        for above, up_to, count in histogram.held()
    ]
    p50, p99 = (None if (it := quantile(buckets, share)) is None else round(it, 3) for share in (0.5, 0.99))
    return Spread(**dict(_observed(histogram, 1_000)), buckets=buckets, p50=p50, p99=p99)


def _failure(it: GivenUp) -> FailureStatus:
    message = it.failure.message
    return FailureStatus(
        cause=it.failure.cause,
        stage=it.failure.stage,
        kind=it.kind,
        dead=it.dead,
        dropped=it.dropped,
        message=message if len(message) <= MAX_MESSAGE_CHARS else f"{message[: MAX_MESSAGE_CHARS - 1]}…",
        topic=it.partition.topic,
        partition=it.partition.partition,
        offset=it.offset,
    )


def _paused(task: TaskStream) -> bool:
    source = task.source
    return source.held or 0 < source.assigned_partitions == len(source.paused)


def _open_because(task: TaskStream, now: float) -> str:
    circuit = task.circuit
    command = f"with `streamproc circuit close {task.name}`"
    itself = "" if circuit.closes_at is None else f"by itself in {max(circuit.closes_at - now, 0):.0f} s, or "
    return f"the circuit is open: {circuit.reason}; closes {itself}{command}"


def _worker_state(worker: Worker) -> WorkerState:
    if worker.state == "starting":
        return "starting"
    if worker.state == "ended":
        return "stopped"
    if worker.state == "retiring":
        return "stopping"
    if worker.batches:
        return "busy"
    return "ready" if worker.ready else "starting"
