"""What is told and learnt of a task's batches as they run: metrics, spans, log lines, metrics records, costs.

Nothing here decides where a record goes. What another version of the backend took says nothing of this one's costs:
batches know the generation of the worker that they were given to.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import orjson

from streamproc.observe.metrics import TaskMetrics
from streamproc.records import FIRST_GENERATION, Batch, BatchReport, Failure, trace_id
from streamproc.runtime.batch_plan import BatchPlan
from streamproc.runtime.batcher import Batcher
from streamproc.runtime.envelopes import batch_record
from streamproc.runtime.pool import Reply
from streamproc.runtime.verdicts import Counts, count_of
from streamproc.settings import Settings

if TYPE_CHECKING:
    from streamproc.observe.tracing import TaskTracing

log = logging.getLogger(__name__)


class Executions:
    """Those of one task.

    Args:
        name: The task's.
        settings: Those in force.
        plan: How its batches begin.
        metrics: Where to count.
        counts: As well; for ``/status``.
        tracing: Makes spans; there are none without.
        clock: A clock that does not go back, in seconds.
        wall_clock: Seconds since 1970.
    """

    def __init__(
        self,
        name: str,
        settings: Settings,
        plan: BatchPlan,
        *,
        metrics: TaskMetrics,
        counts: Counts,
        tracing: TaskTracing | None,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
    ) -> None:
        self._name = name
        self._replica = settings.kafka.group_instance_id or f"{socket.gethostname()}-{os.getpid()}"
        self._metrics, self._counts, self._tracing = metrics, counts, tracing
        self._clock, self._wall_clock = clock, wall_clock
        self._versions: dict[int, str | None] = {}
        self.reload(settings, plan, FIRST_GENERATION)
        self.last: tuple[BatchReport, float] | None = None
        """The batch that was executed last, and its time in the worker, in milliseconds."""

    def reload(self, settings: Settings, plan: BatchPlan, generation: int) -> None:
        """Go on by other settings, with workers of this generation."""
        target_ms = settings.tasks[self._name].batch.target_latency_ms
        self._target_s = None if target_ms is None else target_ms / 1_000
        self._estimate = plan.estimate
        self._generation = generation
        self._versions[generation] = settings.backend.version

    def is_of_now(self, batch: Batch) -> bool:
        """Whether the version ran it that works now."""
        return batch.generation == self._generation

    def report(self, batch: Batch, worker: int | None, metrics: bytes = b"{}") -> BatchReport:
        """What its records' results and dead letters say of it; its metrics as JSON, where they are to."""
        version = self._versions[batch.generation or self._generation]
        return BatchReport(batch, worker, metrics, batch.attempt, version)

    def ran(self, reply: Reply, batcher: Batcher, *, results: int, told: bool) -> BatchReport:
        """A batch was executed, and has so many results; ``batcher`` is the one that it is from.

        ``told``: its records say its metrics.
        """
        batch, metrics = reply.batch, self._metrics
        times_ms = reply.metrics.get("execution_times") or {}
        metrics.batches_ok.inc()
        metrics.batch_wall.observe(reply.wall_ms / 1_000)
        metrics.steps_ran(times_ms)
        metrics.decode.observe(reply.decode_ms / 1_000)
        metrics.encode.observe(reply.encode_ms / 1_000)
        if self._target_s is not None:
            self._answered(batch, self._target_s)
        report = self.report(batch, reply.worker, orjson.dumps(reply.metrics) if told else b"")
        self.last = (report, reply.wall_ms)
        if self.is_of_now(batch):
            batcher.ran(batch, reply.wall_ms)
            self._observe_memory(reply, batcher)
        if batch.predicted_ms:
            metrics.time_over_predicted.observe(reply.wall_ms / batch.predicted_ms)
        if self._tracing is not None:
            steps_ms = {"decode": reply.decode_ms, **times_ms, "encode": reply.encode_ms}
            self._tracing.executed(
                batch, worker=reply.worker, wall_ms=reply.wall_ms, steps_ms=steps_ms, results=results
            )
        if log.isEnabledFor(logging.DEBUG):
            self._log_executed(reply, results)
        return report

    def failed(self, batch: Batch, failure: Failure, worker: int) -> None:
        """A batch was begun, and not executed to its end."""
        self._metrics.batches_failed.inc()
        if self._tracing is not None:
            self._tracing.failed(batch, failure, worker)
        log.warning(
            "task %s: batch %d (%s) failed in worker %d, execution %d, %s: %s",
            *(self._name, batch.id, count_of(batch.size, "record"), worker, batch.attempt),
            *(failure.cause, failure.summary),
            extra={
                **_facts(batch, worker),
                "cause": failure.cause,
                "stage": failure.stage,
                "error_type": failure.kind,
            },
        )

    def out_of_memory(self, batch: Batch, batcher: Batcher) -> None:
        """A batch ran out of memory: those to come are smaller."""
        self._metrics.out_of_memory.inc()
        most = batcher.out_of_memory(batch) if self.is_of_now(batch) else None
        if most is not None:
            padded = "" if batch.longest is None else f" padded to {batch.longest}"
            log.warning(
                "task %s: a batch of %d records%s ran out of memory; from now on such a batch has at most %s, and "
                "slowly more again as batches run; see batch.max_size, and `streamproc estimate --task %s`",
                *(self._name, batch.size, padded, count_of(most, "record"), self._name),
                extra={"task": self._name},
            )

    def record(
        self, report: BatchReport, reply: Reply | None, *, results: int, failed: int, causes: Mapping[str, int]
    ) -> bytes:
        """A batch's record in the metrics topic; without a reply it was not executed to its end."""
        return batch_record(
            report,
            metrics={"batch_size": 0} if reply is None else reply.metrics,
            results=results,
            failed=failed,
            wall_ms=0.0 if reply is None else reply.wall_ms,
            peak_bytes=None if reply is None else reply.peak_bytes,
            ended_at_ms=int(self._wall_clock() * 1_000),
            replica=self._replica,
            causes=causes,
        )

    def _answered(self, batch: Batch, target_s: float) -> None:
        """Count the records that were answered within the target, and those that were not."""
        since = self._clock() - target_s
        within = sum([len(span.records) for span in batch.spans if span.arrived_at >= since])
        self._counts.within += within
        self._counts.beyond += batch.size - within
        self._metrics.within_target.inc(within)
        self._metrics.beyond_target.inc(batch.size - within)

    def _observe_memory(self, reply: Reply, batcher: Batcher) -> None:
        cost, estimate = batcher.cost, self._estimate
        if cost is None or estimate is None or reply.peak_bytes is None or not reply.batch.model_bytes:
            return
        if reply.peak_of == (estimate.measured.memory if estimate.measured is not None else "host"):
            self._metrics.memory_over_predicted.observe(reply.peak_bytes / (cost.kappa * reply.model_bytes))
            batcher.held(reply.model_bytes, reply.peak_bytes)
            self._metrics.memory_factor.set(cost.kappa)

    def _log_executed(self, reply: Reply, results: int) -> None:
        batch, failed = reply.batch, reply.batch.size - results
        log.debug(
            "task %s: batch %d (%s, closed by %s) ran in worker %d in %.1f ms, execution %d: %s, %d failed",
            *(self._name, batch.id, count_of(batch.size, "record"), batch.closed_by, reply.worker, reply.wall_ms),
            *(batch.attempt, count_of(results, "result"), failed),
            extra={
                **_facts(batch, reply.worker),
                "results": results,
                "failed": failed,
                "wall_ms": reply.wall_ms,
                "queue_ms": reply.metrics.get("queue_time"),
                "steps_ms": reply.metrics.get("execution_times"),
                "decode_ms": reply.decode_ms,
                "encode_ms": reply.encode_ms,
            },
        )


def _facts(batch: Batch, worker: int) -> dict[str, object]:
    """Of a batch's execution, for the log: what it is found by, from its records or from its trace."""
    facts: dict[str, object] = {
        "task": batch.task,
        "batch": batch.id,
        "worker": worker,
        "trace_id": trace_id(batch.trace),
        "attempt": batch.attempt,
        "records": batch.size,
        "closed_by": batch.closed_by,
        "offsets": [
            f"{span.lease.partition.topic}/{span.lease.partition.partition} "
            f"{span.records[0].offset}-{span.records[-1].offset}"
            for span in batch.spans
            if not span.lease.is_request
        ],
    }
    if batch.size == 1 and not batch.requested:
        (span,) = batch.spans
        topic, partition = span.lease.partition
        facts |= {"topic": topic, "partition": partition, "offset": span.records[0].offset}
    return facts
