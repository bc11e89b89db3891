"""The processor's metrics, built from the metric table, in a registry of their own.

Invariants:

- No globals: two processors in one process have two sets of metrics.
- The data path touches metrics per batch, never per record, and through children that were bound when the task started:
  ``metrics.task("text").records_in.inc(64)`` looks nothing up.
- Everything belongs to the event loop's thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector
from prometheus_client.exposition import choose_encoder

from streamproc.observe.histogram import Histogram, HistogramFamily
from streamproc.observe.metric_table import (
    CLOSE_RULES,
    PRODUCER_OUTPUTS,
    RELOAD_OUTCOMES,
    REQUEST_OUTCOMES,
    RESTART_CAUSES,
    STEPS,
    TABLE,
    WORKER_STATES,
    MetricKind,
    MetricSpec,
    ProducerOutput,
    ReloadOutcome,
    RequestOutcome,
    RestartCause,
    Step,
)
from streamproc.records import Batch, Cause, Failure, TopicPartition

MAX_FAILURE_KINDS = 50
"""Causes, stages and kinds of failure that a task counts apart: kinds are type names that a user's backend chooses."""


def package_version() -> str:
    """The installed version of streamproc; ``unknown`` in a source tree that is not installed."""
    try:
        return installed_version("streamproc")
    except PackageNotFoundError:
        return "unknown"


class Metrics:
    """All metrics of one processor. Its attributes are the rows of the metric table, without the prefix."""

    def __init__(  # noqa: PLR0915 - a line for each metric
        self, registry: CollectorRegistry | None = None, *, version: str | None = None
    ) -> None:
        self.registry = CollectorRegistry() if registry is None else registry
        self.records_in = self._counter("streamproc_records_in_total")
        self.records_out = self._counter("streamproc_records_out_total")
        self.records_dead = self._counter("streamproc_records_dead_total")
        self.records_dropped = self._counter("streamproc_records_dropped_total")
        self.records_retried = self._counter("streamproc_records_retried_total")
        self.record_length = self._histogram("streamproc_record_length_seconds")
        self.record_queue = self._histogram("streamproc_record_queue_seconds")
        self.record_latency = self._histogram("streamproc_record_latency_seconds")
        self.records_target = self._counter("streamproc_records_target_total")
        self.batches = self._counter("streamproc_batches_total")
        self.batches_closed = self._counter("streamproc_batches_closed_total")
        self.batch_size = self._histogram("streamproc_batch_size_records")
        self.batch_fill = self._histogram("streamproc_batch_fill_ratio")
        self.batch_padding = self._histogram("streamproc_batch_padding_ratio")
        self.batch_wait = self._histogram("streamproc_batch_wait_seconds")
        self.batch_wall = self._histogram("streamproc_batch_wall_seconds")
        self.time_over_predicted = self._histogram("streamproc_batch_time_over_predicted_ratio")
        self.memory_over_predicted = self._histogram("streamproc_batch_memory_over_predicted_ratio")
        self.memory_factor = self._gauge("streamproc_memory_factor_ratio")
        self.out_of_memory = self._counter("streamproc_batches_out_of_memory_total")
        self.step = self._histogram("streamproc_step_seconds")
        self.codec = self._histogram("streamproc_codec_seconds")
        self.in_flight_records = self._gauge("streamproc_in_flight_records")
        self.in_flight_bytes = self._gauge("streamproc_in_flight_bytes")
        self.paused_partitions = self._gauge("streamproc_paused_partitions")
        self.pauses = self._counter("streamproc_pauses_total")
        self.circuit_open = self._gauge("streamproc_circuit_open")
        self.circuit_openings = self._counter("streamproc_circuit_openings_total")
        self.lag_records = self._gauge("streamproc_lag_records")
        self.lag_seconds = self._gauge("streamproc_lag_seconds")
        self.committed_offset = self._gauge("streamproc_committed_offset")
        self.commits = self._counter("streamproc_commits_total")
        self.commit_failures = self._counter("streamproc_commit_failures_total")
        self.transactions_aborted = self._counter("streamproc_transactions_aborted_total")
        self.rebalances = self._counter("streamproc_rebalances_total")
        self.producer_batches = self._counter("streamproc_producer_batches_total")
        self.producer_errors = self._counter("streamproc_producer_errors_total")
        self.requests = self._counter("streamproc_requests_total")
        self.request = self._histogram("streamproc_request_seconds")
        self.waiting_requests = self._gauge("streamproc_waiting_requests")
        self.waiting_bytes = self._gauge("streamproc_waiting_bytes")
        self.workers = self._gauge("streamproc_workers")
        self.worker_restarts = self._counter("streamproc_worker_restarts_total")
        self.measurer_restarts = self._counter("streamproc_measurer_restarts_total")
        self.reloads = self._counter("streamproc_reloads_total")
        self.worker_rss = self._gauge("streamproc_worker_rss_bytes")
        self.build_info = self._gauge("streamproc_build_info")
        ProcessCollector(registry=self.registry)

        self._tasks: dict[str, TaskMetrics] = {}
        self._restarts = {cause: self.worker_restarts.labels(cause) for cause in RESTART_CAUSES}
        self._measurer_restarts = {cause: self.measurer_restarts.labels(cause) for cause in RESTART_CAUSES}
        self._reloads = {outcome: self.reloads.labels(outcome) for outcome in RELOAD_OUTCOMES}
        self.set_workers({})
        self.build_info.labels(version or package_version()).set(1)

    def task(self, name: str) -> TaskMetrics:
        """The metrics of one task, the same object at every call."""
        if name not in self._tasks:
            self._tasks[name] = TaskMetrics(self, name)
        return self._tasks[name]

    def set_workers(self, counts: Mapping[str, int]) -> None:
        """Set how many workers are in each state; a state that is left out has none."""
        for state in WORKER_STATES:
            self.workers.labels(state).set(counts.get(state, 0))

    def worker_restarted(self, cause: RestartCause) -> None:
        """Count a worker that was replaced."""
        self._restarts[cause].inc()

    def measurer_restarted(self, cause: RestartCause) -> None:
        """Count a measuring process that was replaced."""
        self._measurer_restarts[cause].inc()

    def reloaded(self, outcome: ReloadOutcome) -> None:
        """Count a reload that has ended."""
        self._reloads[outcome].inc()

    def set_worker_rss(self, worker: int, rss_bytes: int) -> None:
        """Set the resident memory of the worker with this index."""
        self.worker_rss.labels(str(worker)).set(rss_bytes)

    def forget_worker(self, worker: int) -> None:
        """End the series of a worker that is gone for good."""
        self.worker_rss.remove(str(worker))

    def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """Everything as text, and its content type: OpenMetrics where ``accept`` asks for it, Prometheus' own else."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def _counter(self, name: str) -> Counter:
        spec = _row(name, "counter")
        return Counter(spec.name, spec.help, spec.labels, registry=self.registry)

    def _gauge(self, name: str) -> Gauge:
        spec = _row(name, "gauge")
        return Gauge(spec.name, spec.help, spec.labels, unit=spec.unit, registry=self.registry)

    def _histogram(self, name: str) -> HistogramFamily:
        spec = _row(name, "histogram")
        family = HistogramFamily(spec.name, spec.help, spec.labels, unit=spec.unit, buckets=spec.buckets)
        self.registry.register(family)
        return family


def _row(name: str, kind: MetricKind) -> MetricSpec:
    return next(spec for spec in TABLE if (spec.name, spec.kind) == (name, kind))


class TaskMetrics:
    """The metrics of one task: bound to its name, so that the data path looks nothing up."""

    def __init__(self, metrics: Metrics, task: str) -> None:
        self._metrics = metrics
        self._task = task
        self._failures: dict[tuple[Counter, Cause, str, str], Counter] = {}
        self._partitions: dict[TopicPartition, PartitionMetrics] = {}
        self.records_in = metrics.records_in.labels(task)
        self.records_out = metrics.records_out.labels(task)
        self.records_retried = metrics.records_retried.labels(task)
        self.record_queue = metrics.record_queue.labels(task)
        self.record_latency = metrics.record_latency.labels(task)
        self.within_target = metrics.records_target.labels(task, "within")
        self.beyond_target = metrics.records_target.labels(task, "beyond")
        self.batches_ok = metrics.batches.labels(task, "ok")
        self.batches_failed = metrics.batches.labels(task, "failed")
        self.batches_closed: dict[str, Counter] = {
            rule: metrics.batches_closed.labels(task, rule) for rule in CLOSE_RULES
        }
        self.length = metrics.record_length.labels(task)
        self.batch_size = metrics.batch_size.labels(task)
        self.batch_padding = metrics.batch_padding.labels(task)
        self.batch_fill = metrics.batch_fill.labels(task)
        self.batch_wait = metrics.batch_wait.labels(task)
        self.batch_wall = metrics.batch_wall.labels(task)
        self.time_over_predicted = metrics.time_over_predicted.labels(task)
        self.memory_over_predicted = metrics.memory_over_predicted.labels(task)
        self.memory_factor = metrics.memory_factor.labels(task)
        self.memory_factor.set(1.0)
        self.out_of_memory = metrics.out_of_memory.labels(task)
        self.steps: dict[Step, Histogram] = {step: metrics.step.labels(task, step) for step in STEPS}
        self.decode = metrics.codec.labels(task, "decode")
        self.encode = metrics.codec.labels(task, "encode")
        self.in_flight_records = metrics.in_flight_records.labels(task)
        self.in_flight_bytes = metrics.in_flight_bytes.labels(task)
        self.paused_partitions = metrics.paused_partitions.labels(task)
        self.pauses = metrics.pauses.labels(task)
        self.circuit_open = metrics.circuit_open.labels(task)
        self.circuit_openings = metrics.circuit_openings.labels(task)
        self.commits = metrics.commits.labels(task)
        self.commit_failures = metrics.commit_failures.labels(task)
        self.transactions_aborted = metrics.transactions_aborted.labels(task)
        self.rebalances = metrics.rebalances.labels(task)
        self.producer_batches: dict[ProducerOutput, Counter] = {
            output: metrics.producer_batches.labels(task, output) for output in PRODUCER_OUTPUTS
        }
        self.producer_errors: dict[ProducerOutput, Counter] = {
            output: metrics.producer_errors.labels(task, output) for output in PRODUCER_OUTPUTS
        }

        self.requests: dict[RequestOutcome, Counter] = {
            outcome: metrics.requests.labels(task, outcome) for outcome in REQUEST_OUTCOMES
        }
        self.request = metrics.request.labels(task)
        self.waiting_requests = metrics.waiting_requests.labels(task)
        self.waiting_bytes = metrics.waiting_bytes.labels(task)

    def batch_dispatched(self, batch: Batch, now: float) -> None:
        """Count a batch that goes to a worker. Its waiting counts once, at the first attempt."""
        self.batches_closed[batch.closed_by].inc()
        self.batch_size.observe(batch.size)
        self.batch_fill.observe(batch.fill)
        if batch.padding_ratio is not None:
            self.batch_padding.observe(batch.padding_ratio)
        if batch.attempt > 1:
            self.records_retried.inc(batch.size)
            return
        self.batch_wait.observe(now - batch.opened_at)
        for span in batch.spans:
            self.record_queue.observe(now - span.arrived_at, len(span.records))

    def steps_ran(self, times_ms: Mapping[str, float | None]) -> None:
        """Take a batch's ``execution_times`` in milliseconds, by packflow's names; a step that did not run has none."""
        for step, histogram in self.steps.items():
            time_ms = times_ms.get(step)
            if time_ms is not None:
                histogram.observe(time_ms / 1_000)

    def dead(self, failure: Failure) -> Counter:
        """The counter of dead letters that failed like this."""
        return self._failure(self._metrics.records_dead, failure)

    def dropped(self, failure: Failure) -> Counter:
        """The counter of dropped records that failed like this."""
        return self._failure(self._metrics.records_dropped, failure)

    def partition(self, partition: TopicPartition) -> PartitionMetrics:
        """The gauges of a partition that this replica holds."""
        if partition not in self._partitions:
            labels = (self._task, partition.topic, str(partition.partition))
            self._partitions[partition] = PartitionMetrics(
                self._metrics.lag_records.labels(*labels),
                self._metrics.lag_seconds.labels(*labels),
                self._metrics.committed_offset.labels(*labels),
            )
        return self._partitions[partition]

    def forget(self, partition: TopicPartition) -> None:
        """End the series of a partition that was given up, which would stand still and look like a stall."""
        if self._partitions.pop(partition, None) is not None:
            for gauge in (self._metrics.lag_records, self._metrics.lag_seconds, self._metrics.committed_offset):
                gauge.remove(self._task, partition.topic, str(partition.partition))

    def _failure(self, family: Counter, failure: Failure) -> Counter:
        key = (family, failure.cause, failure.stage, failure.kind)
        known = self._failures.get(key)
        if known is not None:
            return known
        if len(self._failures) >= MAX_FAILURE_KINDS:
            return family.labels(self._task, failure.cause, failure.stage, "other")
        counter = self._failures[key] = family.labels(self._task, failure.cause, failure.stage, failure.kind)
        return counter


class PartitionMetrics(NamedTuple):
    """The gauges of one partition."""

    lag_records: Gauge
    lag_seconds: Gauge
    committed_offset: Gauge
