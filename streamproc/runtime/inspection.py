"""What is seen of a processor from outside: lag, liveness, readiness, status.

Reads the stages' state and changes nothing in them. Liveness is progress: lag above zero and a committed offset that
has not moved for longer than a batch may compute is not alive.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal, cast

from streamproc.observe.health import Health, ProgressWatch
from streamproc.observe.metric_table import WorkerState
from streamproc.observe.metrics import package_version
from streamproc.observe.status import (
    LastBatch,
    PartitionStatus,
    ProcessorStatus,
    RecordCounts,
    TaskStatus,
    WindowStatus,
    WorkerStatus,
)
from streamproc.records import TopicPartition
from streamproc.runtime.ledger import PartitionBooks

if TYPE_CHECKING:
    from streamproc.runtime.pool import Worker
    from streamproc.runtime.processor import Processor
    from streamproc.runtime.task_stream import TaskStream


class Inspector:
    """Looks at a processor."""

    def __init__(self, processor: Processor, wall_clock: Callable[[], float]) -> None:
        self._processor = processor
        self._wall_clock = wall_clock
        self._started_at = datetime.fromtimestamp(wall_clock(), UTC)
        self._begun = processor.clock()
        settings = processor.settings
        # A batch may compute until its deadline, as often as it is retried: that is work, not a stall.
        self._stalled_after_s = max(settings.http.stalled_after_s, settings.pool.batch_timeout_s * 1.1)
        self._watches: dict[tuple[str, TopicPartition, int], ProgressWatch] = {}

    def observe(self, now: float) -> None:
        """Bring the gauges up to date, and watch for progress."""
        processor = self._processor
        watches: dict[tuple[str, TopicPartition, int], ProgressWatch] = {}
        for name, task in processor.tasks.items():
            metrics = processor.metrics.task(name)
            metrics.in_flight_records.set(task.ledger.in_flight_records)
            metrics.in_flight_bytes.set(task.ledger.in_flight_bytes)
            for books in task.ledger.partitions():
                lag_records, lag_seconds = self._lag(task, books)
                gauges = metrics.partition(books.partition)
                if books.committed is not None:
                    gauges.committed_offset.set(books.committed)
                if lag_records is not None:
                    gauges.lag_records.set(lag_records)
                    gauges.lag_seconds.set(lag_seconds or 0.0)
                key = (name, books.partition, books.epoch)
                watch = watches[key] = self._watches.get(key) or ProgressWatch(self._stalled_after_s)
                watch.observe(lag_records or 0, books.committed or 0, now)
        self._watches = watches
        processor.metrics.set_workers(self._worker_states())

    def live(self, now: float) -> Health:
        """Not alive after a failure, or when records have waited too long without a commit."""
        failure = self._processor.failure
        reasons = [str(failure)] if failure is not None else []
        for (task, (topic, partition), _), watch in self._watches.items():
            if (stalled_s := watch.stalled(now)) is not None:
                reasons.append(
                    f"task {task}: records wait in topic {topic}, partition {partition}, and no offset was committed "
                    f"for {stalled_s:.0f} s"
                )
        return Health.of(*reasons)

    def ready(self) -> Health:
        """Ready when the partitions are assigned and every worker is warm."""
        processor = self._processor
        reasons = [str(processor.failure)] if processor.failure is not None else []
        if processor.stopping and processor.failure is None:
            reasons.append("the processor is stopping")
        for name, task in processor.tasks.items():
            if not task.assigned.is_set():
                reasons.append(f"task {name}: no partitions are assigned yet in group {task.group}")
        ready = {worker.index for worker in processor.pool.workers() if worker.open}
        for index in range(processor.settings.pool.workers):
            if index not in ready:
                worker = next((it for it in processor.pool.workers() if it.index == index), None)
                initialized = worker is not None and worker.initialize_s is not None
                what = "says that its backend is not ready" if initialized else "is starting"
                reasons.append(f"worker {index} {what}")
        return Health.of(*reasons)

    def status(self, now: float) -> ProcessorStatus:
        """Tasks, partitions and workers as they are now."""
        processor = self._processor
        return ProcessorStatus(
            name=processor.settings.name,
            version=package_version(),
            started_at=self._started_at,
            uptime_s=round(now - self._begun, 3),
            tasks={name: self._task(task, now) for name, task in processor.tasks.items()},
            workers=[self._worker(worker, now) for worker in processor.pool.workers()],
        )

    def _lag(self, task: TaskStream, books: PartitionBooks) -> tuple[int | None, float | None]:
        """Records and seconds behind; (None, None) before the first fetch.

        Seconds are the age of the oldest record that was read and is not settled. While none is, but Kafka holds more,
        the oldest of those is about to be read; its age is not known before.
        """
        end = task.consumer.highwater(books.partition)
        done = books.next_offset if books.next_offset is not None else books.first_offset
        if end is None:
            return None, None
        if done is None or books.in_flight_records == 0:
            position = task.consumer.position(books.partition)
            return max(end - position, 0) if position is not None else None, 0.0
        age = max(self._wall_clock() - books.oldest_timestamp / 1_000, 0.0) if books.oldest_timestamp else 0.0
        return max(end - done, 0), age

    def _task(self, task: TaskStream, now: float) -> TaskStatus:
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
                )
            )
        failure = self._processor.failure
        opened_at = task.batcher.opened_at
        return TaskStatus(
            state=cast("Literal['starting', 'running', 'draining', 'stopped']", task.state),
            paused=task.source.paused,
            reason=str(failure) if failure is not None else ("back-pressure" if task.source.paused else None),
            topics=list(task.topics.inputs),
            group=task.group,
            partitions=partitions,
            in_flight_records=task.ledger.in_flight_records,
            in_flight_bytes=task.ledger.in_flight_bytes,
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
            last_batch=self._last_batch(task),
        )

    @staticmethod
    def _last_batch(task: TaskStream) -> LastBatch | None:
        if task.last is None:
            return None
        reply = task.last
        batch = reply.batch
        return LastBatch(
            id=batch.id,
            size=batch.size,
            fill=batch.fill,
            closed_by=batch.closed_by,
            attempts=batch.attempt,
            worker=reply.worker,
            wait_ms=round((batch.closed_at - batch.opened_at) * 1_000, 3),
            wall_ms=round(reply.wall_ms, 3),
        )

    def _worker(self, worker: Worker, now: float) -> WorkerStatus:
        running_ms = None if worker.running_since is None else round((now - worker.running_since) * 1_000, 3)
        return WorkerStatus(
            index=worker.index,
            pid=worker.pid or None,
            state=_worker_state(worker),
            batches=worker.batches_done,
            restarts=self._processor.pool.restarts(worker.index),
            rss_mb=round(worker.rss_bytes / 1_048_576, 1) if worker.rss_bytes else None,
            running_batch_ms=running_ms,
        )

    def _worker_states(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for worker in self._processor.pool.workers():
            state = _worker_state(worker)
            counts[state] = counts.get(state, 0) + 1
        return counts


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
