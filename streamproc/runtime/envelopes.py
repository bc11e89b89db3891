"""What a processor writes beside the results: result headers, dead letters and the metrics record of a batch.

Pure functions. Header names are public: users filter and route by them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from streamproc.broker.interface import Row
from streamproc.records import BatchReport, Cause, Failure, Record, TopicPartition

RECORD_OVERHEAD_BYTES = 128
"""Bounds what Kafka's format adds to key, value and headers of a record that is alone in its batch."""
MARKS_BYTES = 200
"""Kept free in a dead letter for the headers that say what was cut."""
HEADER_OVERHEAD_BYTES = 10
"""Bounds what Kafka's format adds to a header's name and value."""


def _partition_headers(partition: TopicPartition) -> list[tuple[str, bytes | None]]:
    """Where records came from."""
    return [
        ("streamproc-source-topic", partition.topic.encode()),
        ("streamproc-source-partition", b"%d" % partition.partition),
    ]


def result_rows(
    partition: TopicPartition,
    records: Sequence[Record],
    values: Sequence[bytes | memoryview],
    report: BatchReport,
) -> list[Row]:
    """Results with ``envelope: result``: the facts of the full envelope are in the headers."""
    before = _partition_headers(partition)
    after: list[tuple[str, bytes | None]] = [("streamproc-task", report.batch.task.encode())]
    if report.backend_version is not None:
        after.append(("streamproc-backend-version", report.backend_version.encode()))
    after.append(("streamproc-metrics", report.metrics))
    return [
        (
            None,
            record.key,
            value,
            [
                *record.headers,
                *before,
                ("streamproc-source-offset", b"%d" % record.offset),
                ("streamproc-source-timestamp", b"%d" % record.timestamp),
                *after,
            ],
        )
        for record, value in zip(records, values, strict=True)
    ]


def dead_letter_row(
    partition: TopicPartition, record: Record, failure: Failure, report: BatchReport, limit_bytes: int
) -> Row:
    """A record that failed, as it came, with the reason in its headers.

    What does not fit the dead-letter topic is cut, and a header says how much there was: the value, and where that is
    not enough the record's headers, its key and at last the message. A topic that takes 2 KiB takes any dead letter.
    The traceback is only there where all else fits.
    """
    message = failure.message.encode()
    ours: list[tuple[str, bytes | None]] = [
        *_partition_headers(partition),
        ("streamproc-source-offset", b"%d" % record.offset),
        ("streamproc-task", report.batch.task.encode()),
        ("streamproc-cause", failure.cause.encode()),
        ("streamproc-stage", failure.stage.encode()),
        ("streamproc-error-type", failure.kind.encode()),
        ("streamproc-error-message", message),
        # A record that never reached the backend was looked at once, however often its batch was executed.
        ("streamproc-attempts", b"%d" % (1 if failure.cause is Cause.INVALID else report.attempts)),
    ]
    if report.worker is not None:
        ours.append(("streamproc-worker", b"%d" % report.worker))
    key, headers = record.key, [*record.headers, *ours]
    limit_bytes -= MARKS_BYTES
    if failure.traceback:
        whole = [*headers, ("streamproc-error-traceback", failure.traceback.encode())]
        if row_bytes((None, key, record.value, whole)) <= limit_bytes:
            headers = whole
    if row_bytes((None, key, None, headers)) > limit_bytes:
        headers = [*ours, ("streamproc-headers-cut", b"%d" % len(record.headers))]
    if row_bytes((None, key, None, headers)) > limit_bytes:
        headers.append(("streamproc-key-cut-from-bytes", b"%d" % len(key or b"")))
        key = None
    if (over := row_bytes((None, key, None, headers)) - limit_bytes) > 0:
        short = message[: max(0, len(message) - over - len("…".encode()))].decode(errors="ignore") + "…"
        at = headers.index(("streamproc-error-message", message))
        headers[at] = ("streamproc-error-message", short.encode())
    value, room = record.value, limit_bytes - row_bytes((None, key, None, headers))
    if value is not None and len(value) > room:
        headers.append(("streamproc-value-cut-from-bytes", b"%d" % len(value)))
        value = value[: max(room, 0)]
    return (record.timestamp, key, value, headers)


def row_bytes(row: Row) -> int:
    """An upper bound of what a row takes in a batch of its own, uncompressed."""
    _, key, value, headers = row
    names = sum([len(name.encode()) + len(content or b"") + HEADER_OVERHEAD_BYTES for name, content in headers])
    return RECORD_OVERHEAD_BYTES + len(key or b"") + len(value or b"") + names


def batch_record(
    report: BatchReport,
    *,
    metrics: dict[str, Any],
    results: int,
    failed: int,
    wall_ms: float,
    peak_bytes: float | None,
    ended_at_ms: int,
    replica: str,
    causes: Mapping[str, int],
) -> bytes:
    """The value of a batch's record in the metrics topic.

    packflow's execution metrics, and around them: ``records`` the batch was made of and what became of them, with the
    ``causes`` of those that failed, the rule that closed its window, fill of its maximum size, time and memory in the
    worker, what was predicted of both, and who ran it. Times are milliseconds, memory is in bytes, null where it is not
    known. ``padding_ratio`` is null where the task's records have no length; so are the predictions, unless there is an
    estimate or a target. Records that have no length where they should are told of together, as ``closed_by: length``;
    those that fit no batch, as ``oversized``.
    """
    batch = report.batch
    return orjson.dumps(
        {
            "task": batch.task,
            "batch": batch.id,
            "records": batch.size,
            "requested": batch.requested,
            "results": results,
            "failed": failed,
            "causes": causes,
            **metrics,
            "wall_time": round(wall_ms, 5),
            "predicted_wall_time": None if batch.predicted_ms is None else round(batch.predicted_ms, 5),
            "predicted_memory": None if batch.predicted_bytes is None else int(batch.predicted_bytes),
            "memory": None if peak_bytes is None else int(peak_bytes),
            "closed_by": batch.closed_by,
            "fill": round(batch.fill, 5),
            "padding_ratio": None if batch.padding_ratio is None else round(batch.padding_ratio, 5),
            "attempts": report.attempts,
            "replica": replica,
            "worker": report.worker,
            "backend_version": report.backend_version,
            "timestamp": ended_at_ms,
        },
        default=str,
    )
