"""THE metric table: every metric's name, type, unit, labels, buckets and meaning, in one place.

``metrics.py`` builds the metrics from it and ``docs/metrics.md`` is generated from it, so neither says anything else:

    python -m streamproc.observe.metric_table > docs/metrics.md

Invariants, held by tests:

- Base units only (seconds, bytes, ratios), and a name ends in its unit, as Prometheus and OpenMetrics ask for.
- Every label has a bounded set of values; nothing that a record carries is ever a label.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal, get_args

from streamproc.records import Cause

MetricKind = Literal["counter", "gauge", "histogram"]
Step = Literal["preprocess", "transform_inputs", "execute", "transform_outputs"]
CloseRule = Literal["size", "bytes", "padding", "memory", "wait", "slo", "knee", "backlog", "overtaken", "split"]
ProducerOutput = Literal["results", "metrics", "dead_letters"]
WorkerState = Literal["starting", "ready", "busy", "stopping", "stopped"]
ReloadOutcome = Literal["taken", "refused"]
RequestOutcome = Literal["ok", "failed", "invalid", "full", "unavailable", "timeout", "left"]
RestartCause = Literal["exited", "killed", "oom", "deadline", "recycled", "start_failed"]

STEPS: tuple[Step, ...] = get_args(Step)
CLOSE_RULES: tuple[CloseRule, ...] = get_args(CloseRule)
PRODUCER_OUTPUTS: tuple[ProducerOutput, ...] = get_args(ProducerOutput)
WORKER_STATES: tuple[WorkerState, ...] = get_args(WorkerState)
RELOAD_OUTCOMES: tuple[ReloadOutcome, ...] = get_args(ReloadOutcome)
REQUEST_OUTCOMES: tuple[RequestOutcome, ...] = get_args(RequestOutcome)
RESTART_CAUSES: tuple[RestartCause, ...] = get_args(RestartCause)

# From 0.1 ms to the longest batch that anyone waits for; dense around 1 ms, where a small model's steps are.
TIME_BUCKETS = (
    *(0.0001, 0.0002, 0.0003, 0.0005, 0.0007, 0.001, 0.0013, 0.0016, 0.002, 0.0025, 0.003, 0.004, 0.005, 0.0075),
    *(0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75),
    *(1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)
SIZE_BUCKETS = (*(float(2**power) for power in range(17)), 100_000.0)
PADDING_BUCKETS = (1.0, 1.02, 1.05, 1.1, 1.15, 1.2, 1.3, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0)
PREDICTION_BUCKETS = (0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.3, 1.5, 2.0, 4.0)
# Records beyond 0.99 are in full batches.
RATIO_BUCKETS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99, 1.0)


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One row of the table. ``unit`` ends the name, save for a counter's ``_total``; empty for bare counts."""

    group: str
    name: str
    kind: MetricKind
    help: str
    labels: tuple[str, ...] = ()
    unit: str = ""
    buckets: tuple[float, ...] = ()


BUCKETS = {"seconds": TIME_BUCKETS, "records": SIZE_BUCKETS, "ratio": RATIO_BUCKETS}
"""By unit, where a histogram has none of its own."""


def _spec(
    group: str, kind: MetricKind, name: str, text: str, *labels: str, unit: str = "", buckets: tuple[float, ...] = ()
) -> MetricSpec:
    if kind == "histogram" and not buckets:
        buckets = BUCKETS[unit]
    return MetricSpec(group, f"streamproc_{name}", kind, text, labels, unit, buckets)


def _records() -> tuple[MetricSpec, ...]:
    group = "Records"
    return (
        _spec(group, "counter", "records_in_total", "Records read from the input topics.", "task"),
        _spec(group, "counter", "records_out_total", "Results that the broker acknowledged.", "task"),
        _spec(
            group,
            "counter",
            "records_dead_total",
            "Records that became dead letters, by why and where they failed and the type of the error.",
            *("task", "cause", "stage", "kind"),
        ),
        _spec(
            group,
            "counter",
            "records_dropped_total",
            "Failed records that were dropped because on_error says so, for all causes or for theirs.",
            *("task", "cause", "stage", "kind"),
        ),
        _spec(
            group,
            "counter",
            "records_retried_total",
            "Records executed again after a failure, counted at each execution beyond the first.",
            "task",
        ),
        _spec(
            group,
            "histogram",
            "record_length_seconds",
            "Time from a record's arrival in the processor until its length is known, of every record that the "
            "measuring process measured; where batch.length is a field or the backend's.",
            "task",
            unit="seconds",
        ),
        _spec(
            group,
            "histogram",
            "record_queue_seconds",
            "Time from a record's arrival in the processor to the dispatch of its batch, of every record.",
            "task",
            unit="seconds",
        ),
        _spec(
            group,
            "histogram",
            "record_latency_seconds",
            "Time from a record's arrival in the processor until Kafka has acknowledged what became of it, of every "
            "record; of one that is dropped, until that is decided.",
            "task",
            unit="seconds",
        ),
        _spec(
            group,
            "counter",
            "records_target_total",
            "Records that a worker answered within batch.target_latency_ms of their arrival in the processor, and "
            "beyond; where it is set.",
            *("task", "target"),
        ),
    )


def _batches() -> tuple[MetricSpec, ...]:
    group = "Batches"
    return (
        _spec(
            group,
            "counter",
            "batches_total",
            "Batches that a worker ran, or died of; ok when it answered with a status for each record.",
            *("task", "outcome"),
        ),
        _spec(
            group,
            "counter",
            "batches_closed_total",
            "Batches handed to a worker, by the rule that closed their window.",
            *("task", "rule"),
        ),
        _spec(group, "histogram", "batch_size_records", "Records in a batch.", "task", unit="records"),
        _spec(
            group,
            "histogram",
            "batch_fill_ratio",
            "A batch's records over batch.max_size.",
            "task",
            unit="ratio",
        ),
        _spec(
            group,
            "histogram",
            "batch_padding_ratio",
            "A batch's padded length over the lengths of its records: 1 is no padding; where batch.length is set.",
            "task",
            unit="ratio",
            buckets=PADDING_BUCKETS,
        ),
        _spec(
            group,
            "histogram",
            "batch_wait_seconds",
            "Time from the opening of a batch's window, which its first record does, to its dispatch.",
            "task",
            unit="seconds",
        ),
        _spec(
            group,
            "histogram",
            "batch_wall_seconds",
            "Time from a batch's dispatch to its answer: the worker's queue, the transport and all steps.",
            "task",
            unit="seconds",
        ),
        _spec(
            group,
            "histogram",
            "batch_time_over_predicted_ratio",
            "Time of a batch in its worker over what was predicted of it; where the task has lengths or an estimate.",
            "task",
            unit="ratio",
            buckets=PREDICTION_BUCKETS,
        ),
        _spec(
            group,
            "histogram",
            "batch_memory_over_predicted_ratio",
            "Most memory that a worker held during a batch over what was predicted of the largest that its process has "
            "run; where the task has an estimate of memory.",
            "task",
            unit="ratio",
            buckets=PREDICTION_BUCKETS,
        ),
        _spec(
            group,
            "gauge",
            "memory_factor_ratio",
            "What predictions of memory are multiplied by; it rises when workers hold more than predicted.",
            "task",
            unit="ratio",
        ),
        _spec(group, "counter", "batches_out_of_memory_total", "Batches that ran out of memory.", "task"),
        _spec(
            group,
            "histogram",
            "step_seconds",
            "Time of each of the backend's steps on a batch.",
            *("task", "step"),
            unit="seconds",
        ),
        _spec(
            group,
            "histogram",
            "codec_seconds",
            "Time that the worker spends on decoding a batch's values or encoding its results.",
            *("task", "direction"),
            unit="seconds",
        ),
    )


def _flow() -> tuple[MetricSpec, ...]:
    group = "Flow"
    return (
        _spec(
            group,
            "gauge",
            "in_flight_records",
            "Records read and not yet settled; back-pressure begins at limits.max_in_flight_records.",
            "task",
            unit="records",
        ),
        _spec(
            group,
            "gauge",
            "in_flight_bytes",
            "Bytes of the values of these records, and of their results while they wait; back-pressure begins at "
            "limits.max_in_flight_bytes.",
            "task",
            unit="bytes",
        ),
        _spec(
            group,
            "gauge",
            "paused_partitions",
            "Partitions from which nothing is fetched because the pipeline is full or the circuit is open.",
            "task",
            unit="partitions",
        ),
        _spec(group, "counter", "pauses_total", "How often back-pressure began to pause partitions.", "task"),
        _spec(
            group,
            "gauge",
            "circuit_open",
            "1 while the task is paused because too many records failed (on_error.circuit), or by hand; else 0.",
            "task",
        ),
        _spec(
            group, "counter", "circuit_openings_total", "How often the circuit opened, by itself or by hand.", "task"
        ),
        _spec(
            group,
            "gauge",
            "lag_records",
            "Offsets between the committed one and the partition's end.",
            *("task", "topic", "partition"),
            unit="records",
        ),
        _spec(
            group,
            "gauge",
            "lag_seconds",
            "Age of the oldest record that is not committed; 0 without lag.",
            *("task", "topic", "partition"),
            unit="seconds",
        ),
        _spec(
            group,
            "gauge",
            "committed_offset",
            "The next offset to read after a restart, as last committed.",
            *("task", "topic", "partition"),
        ),
    )


def _kafka() -> tuple[MetricSpec, ...]:
    group = "Kafka"
    return (
        _spec(group, "counter", "commits_total", "Offset commits that the broker accepted.", "task"),
        _spec(group, "counter", "commit_failures_total", "Offset commits that failed or were rejected.", "task"),
        _spec(
            group,
            "counter",
            "transactions_aborted_total",
            "Transactions that were given up, and their records processed again; with exactly_once.",
            "task",
        ),
        _spec(group, "counter", "rebalances_total", "Assignments of partitions to this replica.", "task"),
        _spec(
            group,
            "counter",
            "producer_batches_total",
            "Producer batches that the broker acknowledged, by what they hold.",
            *("task", "output"),
        ),
        _spec(
            group,
            "counter",
            "producer_errors_total",
            "Producer batches that failed, by what they hold; those that are sent again succeed later.",
            *("task", "output"),
        ),
    )


def _requests() -> tuple[MetricSpec, ...]:
    group = "Requests"
    return (
        _spec(
            group,
            "counter",
            "requests_total",
            "Predictions over HTTP that were asked for, by what became of them.",
            *("task", "outcome"),
        ),
        _spec(
            group,
            "histogram",
            "request_seconds",
            "Time from a request's first byte until its results are there, where there are some.",
            "task",
            unit="seconds",
        ),
        _spec(
            group,
            "gauge",
            "waiting_requests",
            "Requests that wait for their results; http.predict.max_requests is the most.",
            "task",
            unit="requests",
        ),
        _spec(
            group,
            "gauge",
            "waiting_bytes",
            "Bytes of their bodies; http.predict.max_waiting_bytes is the most.",
            "task",
            unit="bytes",
        ),
    )


def _workers() -> tuple[MetricSpec, ...]:
    group = "Workers"
    return (
        _spec(group, "gauge", "workers", "Worker processes by state.", "state"),
        _spec(group, "counter", "worker_restarts_total", "Workers replaced, by cause.", "cause"),
        _spec(group, "counter", "reloads_total", "Hot reloads: new versions taken, and those refused.", "outcome"),
        _spec(
            group,
            "counter",
            "measurer_restarts_total",
            "Replacements of the process that measures the records' lengths, by cause.",
            "cause",
        ),
        _spec(
            group,
            "gauge",
            "worker_rss_bytes",
            "Resident memory of a worker after its last batch.",
            "worker",
            unit="bytes",
        ),
    )


TABLE: tuple[MetricSpec, ...] = (
    *_records(),
    *_batches(),
    *_flow(),
    *_kafka(),
    *_requests(),
    *_workers(),
    _spec("Build", "gauge", "build_info", "Always 1; the version of streamproc is in its label.", "version"),
)

LABEL_MEANINGS: dict[str, str] = {
    "task": "the task's name in the settings",
    "stage": "where the record failed: `length`, `batch`, `decode`, `schema`, `preprocess`, `transform_inputs`, "
    "`execute`, `transform_outputs`, `output`, `encode`, `worker` or `sink`",
    "kind": "the type of the error; `other` after the first 50 of a task, by cause, stage and kind",
    "target": "`within` or `beyond`",
    "outcome": "of a batch: `ok` or `failed`; of a request: `ok`, `failed` (one of its records at least), `invalid` "
    "(no JSON, or too large), `full`, `unavailable` (the circuit is open, or the processor starts or stops), "
    "`timeout`, or `left`, where its client hung up; "
    f"of a reload: {' or '.join(f'`{it}`' for it in RELOAD_OUTCOMES)}",
    "rule": ", ".join(f"`{rule}`" for rule in CLOSE_RULES),
    "step": ", ".join(f"`{step}`" for step in STEPS),
    "direction": "`decode` or `encode`",
    "topic": "an input topic",
    "partition": "a partition that this replica holds; its series end when it is given up",
    "output": ", ".join(f"`{output}`" for output in PRODUCER_OUTPUTS),
    "state": ", ".join(f"`{state}`" for state in WORKER_STATES),
    "cause": f"of a failed record: {', '.join(f'`{cause}`' for cause in Cause)}; "
    f"of a replacement: {', '.join(f'`{cause}`' for cause in RESTART_CAUSES)}",
    "worker": "the worker's index, from 0",
    "version": "streamproc's version",
}

_INTRODUCTION = """\
# Metrics

<!-- Generated by `python -m streamproc.observe.metric_table > docs/metrics.md`; a test holds the two equal. -->

`GET /metrics` serves these in the Prometheus text format, or as OpenMetrics where the `Accept` header asks for it.
Units are base units. Series of a task exist, at 0, from its start, save those by type of error, which begin with the
first; series of a partition exist while this replica holds it. On Linux there are also the usual `process_*` metrics of
the parent process, without the workers. Every counter has a `_created` series beside it: since when it counts.
"""


def render_markdown() -> str:
    """The table as the text of ``docs/metrics.md``."""
    lines = [_INTRODUCTION]
    for group in dict.fromkeys(spec.group for spec in TABLE):
        lines += [f"## {group}", "", "| name | type | unit | labels | meaning |", "|---|---|---|---|---|"]
        lines += [
            f"| `{spec.name}` | {spec.kind} | {spec.unit} | {', '.join(f'`{label}`' for label in spec.labels)} "
            f"| {spec.help} |"
            for spec in TABLE
            if spec.group == group
        ]
        lines.append("")
    lines += ["## Labels", "", "| label | values |", "|---|---|"]
    lines += [f"| `{label}` | {meaning} |" for label, meaning in LABEL_MEANINGS.items()]
    lines += ["", "## Buckets", "", "| unit | upper bounds |", "|---|---|"]
    own = {
        f"{spec.unit}, of `{spec.name}`": spec.buckets
        for spec in TABLE
        if spec.buckets and spec.buckets != BUCKETS[spec.unit]
    }
    buckets = {**BUCKETS, **own}
    lines += [f"| {unit} | {', '.join(f'{bound:g}' for bound in bounds)} |" for unit, bounds in buckets.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(render_markdown())
