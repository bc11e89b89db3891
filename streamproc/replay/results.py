"""What a record of an output topic says: of which source record it is, and what became of that. Pure functions.

The source is the record that was captured, where the result has the header of a replay (``marks``); otherwise the one
that the envelope, or the headers of ``envelope: result``, tell of. Results of a replay and of the stream that was
captured have the same sources so, and match.

Invariant: a value that has all four parts of the full envelope is one. A record with a dead letter's headers is a dead
letter, whatever its value; those that a result has inherited from its input come before its own, which tells them
apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from streamproc.record_lines import write_value
from streamproc.records import TopicRecord
from streamproc.replay.marks import Source, source_of

_ENVELOPE = {"result", "metrics", "source", "task"}
_LATER = {"backend_version"}
"""What an envelope has where the settings say so."""
_CAUSE = "streamproc-cause"
_METRICS = "streamproc-metrics"


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a source record.

    ``value`` is the output, or a dead letter's reason; ``cause`` is None for an output. ``metrics`` are those of the
    batch, ``latency_ms`` is from the source record's timestamp to the result's; both only where they are known.
    """

    task: str
    source: Source
    key: bytes | None
    value: Any
    cause: str | None
    timestamp: int
    metrics: dict[str, Any] | None
    latency_ms: int | None


def read(record: TopicRecord) -> Result | None:
    """What a record says; None where it tells of no source, and is nobody's result."""
    headers = dict(record.headers)  # of several with one name the last counts, as everywhere
    if _CAUSE in headers and not _metrics_come_last(record, headers):
        return _dead_letter(record, headers)
    document = _document(record)
    if type(document) is dict and document.keys() - _LATER == _ENVELOPE and type(document["source"]) is dict:
        return _enveloped(record, headers, document)
    source = _source(record, headers)
    if source is None:
        return None
    at = _number(headers, "streamproc-source-timestamp")
    metrics = _json(headers.get(_METRICS))
    return Result(
        _text(headers, "streamproc-task"),
        source,
        record.key,
        document,
        None,
        record.timestamp,
        metrics if type(metrics) is dict else None,
        None if at is None else record.timestamp - at,
    )


def _enveloped(record: TopicRecord, headers: dict[str, bytes | None], document: dict[str, Any]) -> Result | None:
    told = document["source"]
    source = source_of(record.headers) if headers else None
    if source is None:
        place = (told.get("topic"), told.get("partition"), told.get("offset"))
        if not (isinstance(place[0], str) and isinstance(place[1], int) and isinstance(place[2], int)):
            return None
        source = Source(*place)
    at, metrics = told.get("timestamp"), document["metrics"]
    return Result(
        str(document["task"]),
        source,
        record.key,
        document["result"],
        None,
        record.timestamp,
        metrics if type(metrics) is dict else None,
        record.timestamp - at if isinstance(at, int) else None,
    )


def _dead_letter(record: TopicRecord, headers: dict[str, bytes | None]) -> Result | None:
    source = _source(record, headers)
    if source is None:
        return None
    cause = _text(headers, _CAUSE)
    reason = {
        "cause": cause,
        "stage": _text(headers, "streamproc-stage"),
        "error": _text(headers, "streamproc-error-type"),
        "message": _text(headers, "streamproc-error-message"),
    }
    task = _text(headers, "streamproc-task")
    return Result(task, source, record.key, reason, cause, record.timestamp, None, None)


def _metrics_come_last(record: TopicRecord, headers: dict[str, bytes | None]) -> bool:
    """Whether the headers of a result stand behind those of a dead letter, which its input record once was."""
    if _METRICS not in headers:
        return False
    names = [name for name, _ in record.headers]
    return names[::-1].index(_METRICS) < names[::-1].index(_CAUSE)


def _source(record: TopicRecord, headers: dict[str, bytes | None]) -> Source | None:
    if (replayed := source_of(record.headers)) is not None:
        return replayed
    topic = _text(headers, "streamproc-source-topic")
    partition = _number(headers, "streamproc-source-partition")
    offset = _number(headers, "streamproc-source-offset")
    return None if not topic or partition is None or offset is None else Source(topic, partition, offset)


def _document(record: TopicRecord) -> Any:
    """The value as JSON, from MessagePack too; what is neither as ``record_lines`` wraps it."""
    try:
        return orjson.loads(record.value or b"")
    except orjson.JSONDecodeError:
        return _packed(record.value) or orjson.loads(write_value(record))


def _packed(value: bytes | None) -> Any:
    """What a value holds that is a map in MessagePack, bytes as base64; None of any other, and without the package."""
    try:
        from streamproc.formats.msgpack import decode  # noqa: PLC0415 - a package that only some have
        from streamproc.formats.values import FormatError, json_form  # noqa: PLC0415 - imports numpy
    except ImportError:
        return None
    try:
        return json_form(decode(memoryview(value or b"")))
    except FormatError:
        return None


def _json(text: bytes | None) -> Any:
    try:
        return orjson.loads(text or b"null")
    except orjson.JSONDecodeError:
        return None


def _text(headers: dict[str, bytes | None], name: str) -> str:
    return (headers.get(name) or b"").decode(errors="replace")


def _number(headers: dict[str, bytes | None], name: str) -> int | None:
    text = _text(headers, name)
    return int(text) if text.isdecimal() else None
