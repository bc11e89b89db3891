"""Fuzzes what a worker does with records, and what becomes of each of them.

- *Decoding*: any bytes as values are decoded to exactly what strict JSON says, or refused with a reason.
- *Outputs*: whatever a backend returns or raises, a worker answers each batch with one frame; retried and split as in a
  processor, every record ends exactly once, as a result that is valid JSON or as a failure.
- *Dead letters*: every failure's text is bounded and UTF-8, and every record's dead letter fits its topic, whole or cut
  with a header that says how much there was, and can be encoded by the producer.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import datetime
import decimal
import enum
import itertools
import json
import logging
import random
import re
import socket
import types
import uuid
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import orjson

from streamproc import InferenceBackend, RecordError
from streamproc.broker.producer import _Builder
from streamproc.observe.logs import JsonFormatter
from streamproc.records import (
    FIRST_GENERATION,
    Batch,
    BatchReport,
    Cause,
    Failure,
    Record,
    Span,
    Status,
    TopicPartition,
    value_sizes,
)
from streamproc.runtime.codec import MAX_MESSAGE_CHARS, decode
from streamproc.runtime.envelopes import dead_letter_row, result_rows, row_bytes
from streamproc.runtime.failures import decode_failure
from streamproc.runtime.isolation import Isolation, Retry, Split
from streamproc.runtime.pool import Generation, Reply, _answer
from streamproc.runtime.pool import Worker as PoolWorker
from streamproc.runtime.wire import (
    BATCHES_PER_WORKER,
    Frame,
    FrameReceiver,
    Kind,
    Segment,
    batch_parts,
)
from streamproc.runtime.worker import TRACEBACK_BYTES, TaskRunner, Worker
from streamproc.runtime.worker_process import WorkerProcess
from streamproc.settings import ErrorSettings, PoolSettings
from tests.fuzz.take import INT64, Take, mutated
from tests.support.spans import FakeRecord, batch, lease

MAX_VALUE_BYTES = 2_000
THRESHOLD_BYTES = 4_096
LIMITS_BYTES = (2_048, 3_000, 5_000, 100_000)
SCHEMAS: list[dict[str, Any]] = [
    {},
    {"in": {"type": "object", "properties": {"a": {"type": "integer", "minimum": 0}}, "required": ["a"]}},
    {"in": {"additionalProperties": {"type": "string", "pattern": "^(a|aa)+$", "maxLength": 30}}},
    {"in": {"properties": {"a": {"multipleOf": 0.1}}, "propertyNames": {"maxLength": 3}, "maxProperties": 4}},
    {"in": {"$defs": {"t": {"type": "object", "additionalProperties": {"$ref": "#/$defs/t"}}}, "$ref": "#/$defs/t"}},
]
TOKENS = [
    *(b"{", b"}", b"[", b"]", b":", b",", b'"', b"\\", b" ", b"\n", b"null", b"true", b"false", b'"a"', b'{"a":1}'),
    *(b"0", b"-0", b"1e400", b"-1e-400", b"1E5", b"0.1", b"-", b"+1", b"01", b"1.", b".5", b"NaN", b"Infinity"),
    *(b"-Infinity", b"9223372036854775807", b"-9223372036854775808", b"-9223372036854775809", b"18446744073709551615"),
    *(b"18446744073709551616", b"12345678901234567890.5", b"123456789012345678901234567890", b"9" * 400, b"0" * 30),
    *(
        b'"\\ud800"',
        b'"\\udc00\\ud800"',
        b'"\\ud83d\\ude00"',
        b'"\\u0000"',
        b'"\xed\xa0\x80"',
        b"\xff",
        b"\xef\xbb\xbf",
    ),
    *(b"\x00", b"\x7f", b"\xc3", b"\xe2\x80\xa8", b"[" * 300, b"]" * 300, b'{"a":' * 300, b"}" * 300, b'{"a":1,"a":2}'),
    *(b"//", b"'a'", b"\xf0\x9f\x98\x80", b"\xf4\x90\x80\x80", b"9" * 19, b"9" * 20, b"1" * 20, b"-" + b"9" * 19),
]
SEEDS = [
    bytes(64),
    *(bytes([kind, 1, kind, 7, 3]) + bytes(range(kind, kind + 120)) for kind in range(0, 130, 9)),
    b"\x00\x05" + b'{"a": 12345678901234567890123, "b": [1.5, "x"]}' * 3,
]


def check(data: bytes) -> None:
    """One input; raises AssertionError, or whatever the code under test should not have raised."""
    take = Take(data)
    script = take.blob(96)
    mode = take.below(16)
    schemas = SCHEMAS[take.below(16) if take.bit() else 0 :][:1] or [{}]
    envelope = "full" if take.bit() else "result"
    limit = take.one_of(LIMITS_BYTES)
    spans = _spans(take)
    for span in spans:
        _decodes_exactly([record.value for record in span.records])
    backend = _Scripted(script, mode)
    backend.odd_metrics = take.below(16)
    runner = TaskRunner(
        "text",
        backend,
        schemas=schemas[0],
        envelope=envelope,
        max_value_bytes=MAX_VALUE_BYTES,
        base_dir=__file__.rpartition("/")[0],
    )
    _accounts(spans, runner, envelope, limit)


# -- records


def _spans(take: Take) -> list[Span]:
    spans = []
    topic = take.one_of(("in", "t" * 249))
    for partition in range(1 + take.below(2)):
        rows = [
            FakeRecord(
                topic=topic,
                offset=take.int64(),
                timestamp=take.int64(),
                partition=partition,
                key=take.blob(40) if take.bit() else None,
                headers=_headers(take),
                value=_value(take),
            )
            for _ in range(1 + take.below(4))
        ]
        spans.append(Span(lease(partition, topic=topic), 0, rows, value_sizes(rows), 0.0))
    return spans


def _headers(take: Take) -> tuple[tuple[str, bytes | None], ...]:
    if take.below(4):
        return ()
    sizes = (0, 1, 20, 1_000, 9_000)
    return tuple(
        (
            take.blob(8).decode(errors="replace") * (1 + take.one_of(sizes)),
            None if take.bit() else b"x" * take.one_of(sizes),
        )
        for _ in range(1 + take.below(3))
    )


def _value(take: Take) -> bytes | None:  # noqa: PLR0911 - a way each
    match take.below(8):
        case 0:
            return None
        case 1:
            return take.blob()
        case 2:
            return b'{"a": ' + b"".join(take.one_of(TOKENS) for _ in range(take.below(6))) + b"}"
        case 3:
            return b"".join(take.one_of(TOKENS) for _ in range(take.below(12)))
        case 4:
            return mutated(_json(take, 0), take)
        case 5:
            return b'{"a": "' + b"x" * take.one_of((1, 1_990, 1_991, 1_992, 5_000)) + b'"}'
        case _:
            return b'{"a": ' + _json(take, 0) + b', "b\\n": ' + _json(take, 2) + b"}"


def _json(take: Take, depth: int) -> bytes:
    match take.below(6 if depth < 4 else 4):
        case 0:
            return str(take.one_of(INT64) * 10 ** take.below(4)).encode()
        case 1:
            return json.dumps(take.blob(12).decode("utf-8", "replace"), ensure_ascii=take.bit()).encode()
        case 2:
            return take.one_of(
                (b"null", b"true", b"1.5e10", b"0.1234567890123456789012345", b"-0", b'"1234567890123456789"')
            )
        case 3:
            return str(int.from_bytes(take.blob(12), "big")).encode()
        case 4:
            return b"[" + b",".join(_json(take, depth + 1) for _ in range(take.below(4))) + b"]"
        case _:
            return b"{" + b",".join(b'"%d":' % i + _json(take, depth + 1) for i in range(take.below(4))) + b"}"


class _NotStrictError(ValueError):
    """Valid for Python's decoder, and not for a strict one."""


def _refuse(text: str) -> Any:
    raise _NotStrictError(text)


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise _NotStrictError(text)
    return number


def _decodes_exactly(values: list[bytes | None]) -> None:
    payload = b"".join(value or b"" for value in values)
    views = [None if value is None else memoryview(value) for value in values]
    decoded = decode(views, memoryview(payload), MAX_VALUE_BYTES)
    assert len(decoded) == len(values)
    for value, record in zip(values, decoded, strict=True):
        assert type(record) is dict or isinstance(record, Failure)
        if value is None or len(value) > MAX_VALUE_BYTES:
            assert isinstance(record, Failure)
            assert record.kind == ("NullValue" if value is None else "ValueTooLarge")
            continue
        try:
            expected = json.loads(value.decode("utf-8"), parse_constant=_refuse, parse_float=_finite)
        except RecursionError:
            continue  # Python's decoder stops at fewer levels than ours
        except ValueError:
            assert isinstance(record, Failure), f"{value!r} is not strict JSON and was decoded to {record!r}"
            assert record.kind == "InvalidJSON"
            continue
        if isinstance(record, dict):
            assert _same(record, expected), f"{value!r} was decoded to {record!r}"
        elif record.kind == "InvalidJSON":
            stricter = re.search(rb"\\u[dD][89a-fA-F]", value) or any(abs(it) > 10**308 for it in _integers(value))
            assert stricter, f"{value!r} is strict JSON and was refused: {record.message}"
        elif record.kind == "IntegerTooLarge":
            assert any(not -(2**63) <= number < 2**64 for number in _integers(value)), f"{value!r}: {record.message}"
        else:
            assert record.kind == "NotAnObject"
            assert type(expected) is not dict


def _same(left: Any, right: Any) -> bool:
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(_same, left, right))
    return repr(left) == repr(right)


def _integers(value: bytes) -> list[int]:
    found: list[int] = []
    json.loads(value, parse_int=lambda text: found.append(int(text)))
    return found


# -- backends


class _Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("cannot be printed")

    __repr__ = __str__


class _RaisingError(Exception):
    def __str__(self) -> str:
        raise _RaisingError

    __repr__ = __str__


class _ExitingError(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)


class _FalseError(Exception):
    def __bool__(self) -> bool:
        raise KeyboardInterrupt


class _NoTextError(Exception):
    def __str__(self) -> str:
        return cast("str", 5)


class _OwnBaseError(BaseException):
    """Not an Exception."""


class _Liar(list[Any]):
    def __len__(self) -> int:
        return 1


class _Raiser(list[Any]):
    def __iter__(self) -> Any:
        raise ValueError("cannot be iterated")


class _OddDict(dict[str, Any]):
    def items(self) -> Any:
        raise RuntimeError("no items")

    keys = values = items


class _ClassLess:
    def __getattribute__(self, name: str) -> Any:
        raise ValueError("no attributes, not even a class")


class _Tensor:
    def numpy(self) -> Any:
        raise SystemExit(4)

    tolist = detach = numpy


class _Colour(enum.Enum):
    RED = "red"
    ODD = _Unprintable()


@dataclasses.dataclass
class _Point:
    x: Any = float("nan")


_Pair = collections.namedtuple("_Pair", "a b")  # noqa: PYI024 - untyped ones are what backends return
_HugeName = type("N" * 100_000, (Exception,), {})


def _cycle() -> Any:
    cycle: list[Any] = []
    cycle.append({"again": cycle})
    return cycle


def _array_cycle() -> Any:
    array = np.empty(2, dtype=object)
    array[0] = [array]
    return array


def _deep(levels: int) -> Any:
    deep: Any = 1
    for _ in range(levels):
        deep = {"a": [deep]}
    return deep


_UTC = datetime.UTC
VALUES: list[Any] = [
    *(None, True, 0, 2**63, 2**64 - 1, 2**64, -(2**63) - 1, 10**5000, -(10**30), 0.1, -0.0, 1e308, 5e-324, 1j),
    *(float("nan"), float("inf"), "", "a\0b", "\ud800", "😀", "x" * 5_000, b"\xff", bytearray(b"x"), memoryview(b"x")),
    *(..., NotImplemented, int, len, json, set(), {1, "a"}, frozenset([2]), (1, (2,)), range(3), slice(1)),
    *({1: 2}, {None: 1}, {1.5: 1, "1.5": 2}, {float("nan"): 1}, {(1,): 2}, {b"k": 1}, {True: 1}, {"\ud800": 1}),
    *({_Colour.RED: 1}, {2**70: 1}, {"a": {1: "\udfff"}}, decimal.Decimal("1.5"), decimal.Decimal("sNaN")),
    *(uuid.UUID(int=5), _Colour.RED, _Colour.ODD, _Point(), _Point(_Unprintable()), _Pair(1, object()), _Unprintable()),
    *(datetime.datetime(1, 1, 1), datetime.datetime(1, 1, 1, tzinfo=_UTC), datetime.date.max),  # noqa: DTZ001 - odd
    datetime.datetime(2024, 1, 1, tzinfo=datetime.timezone(datetime.timedelta(hours=-23, minutes=-59))),
    *(datetime.time(1, tzinfo=_UTC), datetime.timedelta(days=1), _Tensor(), _ClassLess(), ValueError("v")),
    *(np.float16("nan"), np.float32(0.1), np.longdouble("inf"), np.uint64(2**64 - 1), np.bool_(True), np.complex64(1j)),
    *(np.str_("s"), np.bytes_(b"b"), np.void(b"v"), np.datetime64("NaT"), np.datetime64(2**62, "s")),
    *(np.datetime64("2024", "Y"), np.datetime64("-9999-01-01"), np.timedelta64(1, "D"), np.datetime64(5, "as")),
    *(np.array(1.5), np.array([]), np.zeros((0, 3)), np.zeros((2, 0)), np.eye(3)[:, ::-1], np.array(["a", "\ud800"])),
    *(np.array([b"x"]), np.array([1j]), np.array([None, 1]), np.array([object()]), np.array([_Unprintable()])),
    *(
        np.ma.masked,
        np.ma.array([1, 2], mask=[False, True]),
        np.zeros(2, dtype=[("a", "i4")]),
        np.zeros(3, dtype=">i4"),
    ),
    *(np.array([np.nan, np.inf], dtype="f2"), np.zeros((1,) * 30), np.array([2**63], dtype="u8")),
    *(np.zeros(1, dtype=[("a", "O")]), np.array(["2024", "NaT"], dtype="M8[D]"), np.array([2**62], dtype="M8[s]")),
    *(collections.OrderedDict(a=1), collections.Counter("a"), collections.deque([1]), types.SimpleNamespace(a=1)),
    *(types.MappingProxyType({"a": 1}), _OddDict(a=1), _Liar([1, 2, 3]), _Raiser([1]), RecordError("bad")),
    *(RecordError("\ud800" * 2_000), RecordError("😀" * 2_000), RecordError(cast("str", _Unprintable()))),
    *(RecordError(cast("str", None)), RecordError(cast("str", _ExitingError()))),
    *(_cycle(), _array_cycle(), _deep(120), _deep(140), _deep(2_000)),
]
RAISES: list[Callable[[], BaseException]] = [
    *(ValueError, KeyError, MemoryError, RecursionError, StopIteration, SystemExit, KeyboardInterrupt, GeneratorExit),
    *(asyncio.CancelledError, _OwnBaseError, _RaisingError, _ExitingError, _FalseError, _NoTextError, _HugeName),
    lambda: ValueError("\ud800\n" * 3_000),
    lambda: ValueError("😀" * 3_000),
    lambda: ValueError(_Unprintable()),
    lambda: UnicodeDecodeError("utf-8", b"\xff" * 10_000, 0, 1, "odd"),
    lambda: OSError(5, _Unprintable()),
    lambda: ExceptionGroup("several", [_RaisingError(), ValueError(1)]),
    lambda: BaseExceptionGroup("several", [SystemExit(1), ValueError(1)]),
    lambda: SystemExit(_Unprintable()),
]


def _exception(take: Take) -> BaseException:
    return take.one_of(RAISES)()


def _odd(take: Take) -> Any:
    """Something that an output should not be, or hold."""
    kind = take.below(len(VALUES) + 2)
    if kind == len(VALUES):
        return (number for number in range(3))
    return itertools.repeat(1, 10_000) if kind > len(VALUES) else VALUES[kind]


class _Scripted(InferenceBackend):
    """Does what its bytes say: returns odd values, the wrong number of them, or raises."""

    def __init__(self, script: bytes, mode: int) -> None:
        super().__init__()
        self.script = script
        self.mode = mode
        self.odd_metrics = 0
        if mode == 15:
            self.transform_outputs = self._raise  # type: ignore[method-assign]  # steps may be defined at run time

    def _raise(self, _: Any) -> Any:
        take = Take(self.script)
        take.byte()
        raise _exception(take) from (_exception(take) if take.bit() else None)

    def execute(self, inputs: list[dict[str, Any]]) -> Any:  # noqa: PLR0911 - a way each
        take = Take(self.script)
        take.byte()
        match self.mode:
            case 0 | 1 | 2:
                return inputs
            case 3 | 4 | 5:
                return [{"value": _odd(take), "also": _odd(take)} for _ in inputs]
            case 6 | 7:
                return [_odd(take) if take.bit() else {"good": 1} for _ in inputs]
            case 8:
                return [{"good": 1}] * take.below(7)
            case 9:
                return _odd(take)
            case 10:
                return _Liar([{"good": 1}] * take.below(7))
            case 11:
                return _Raiser([{"good": 1}] * len(inputs))
            case 12 if len(inputs) > 1 + take.below(3):
                raise _exception(take)
            case 13:
                return {index: {"good": 1} for index, _ in enumerate(inputs)}
            case 14:
                self._raise(inputs)
        return [dict(reversed(record.items())) for record in inputs]

    def get_metrics(self) -> Any:
        """Sometimes metrics of the user's own."""
        odd: dict[int, Any] = {
            1: {"execution_times": [1, 2]},
            2: {"execution_times": {"execute": "long"}, "total_execution_time": 1},
            3: {"total_execution_time": "none"},
            4: {"execution_times": {1: 2}},
            5: [],
            6: {"mine": _Unprintable()},
            7: {"execution_times": {"execute": float("nan")}, "mine": "\ud800"},
        }
        if self.odd_metrics not in odd:
            return super().get_metrics()
        return types.SimpleNamespace(model_dump=lambda: odd[self.odd_metrics])


# -- from batch to account


class _Captured:
    """The worker's end of the socket: what it sends is kept."""

    def __init__(self) -> None:
        self.sent = b""

    def sendall(self, data: bytes) -> None:
        self.sent += data


class _Formats(logging.Handler):
    """Makes the lines of the log, tracebacks of the user's exceptions among them, and throws them away."""

    def emit(self, record: logging.LogRecord) -> None:
        """Nothing may fail here, not even in the way that logging would swallow."""
        assert self.format(record)


@contextlib.contextmanager
def _formatting() -> Iterator[None]:
    """Let the worker's log be formatted as in a processor."""
    logger, handler = logging.getLogger("streamproc.worker"), _Formats()
    handler.setFormatter(JsonFormatter())
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.propagate = True
        logger.removeHandler(handler)


_SEGMENTS = [Segment.create() for _ in range(2 * BATCHES_PER_WORKER)]


def _run(runner: TaskRunner, asked: Batch) -> Reply | Failure:
    """A batch through worker and wire, as the pool gets it back. What escapes here would have ended the worker."""
    connection = _Captured()
    worker = Worker(cast("socket.socket", connection), _SEGMENTS)
    worker._runners["text"] = runner
    worker._threshold = THRESHOLD_BYTES
    parts, size = batch_parts(asked.spans)
    spans = [(*span.lease.partition, len(span.records)) for span in asked.spans]
    head = {"id": asked.id, "task": "text", "opened_at": 0.0, "spans": spans}
    with _formatting():
        worker._answer(Frame(Kind.BATCH, head, memoryview(b"".join(parts))))
    assert size == sum(map(len, parts))
    frames: list[Frame] = []
    whys: list[str] = []
    receiver = FrameReceiver(frames.append, whys.append, lambda: None, max_body_bytes=THRESHOLD_BYTES)
    position = 0
    while position < len(connection.sent):
        buffer = receiver.get_buffer(-1)
        count = min(len(buffer), len(connection.sent) - position)
        buffer[:count] = connection.sent[position : position + count]
        receiver.buffer_updated(count)
        position += count
    assert (len(frames), whys) == (1, []), "not one answer"
    process = WorkerProcess(PoolSettings(), frames.append, whys.append, lambda: None)
    process.segments = _SEGMENTS
    seen_by_pool = PoolWorker(0, Generation(FIRST_GENERATION, PoolSettings(), {}), process=process)
    seen_by_pool.batches.append(asked)
    return _answer(seen_by_pool, frames[0])


def _accounts(spans: list[Span], runner: TaskRunner, envelope: str, limit: int) -> None:
    ids = itertools.count(2)
    isolation = Isolation(ErrorSettings(retries=1), lambda: next(ids), random.Random(0))
    waiting = [batch(spans)]
    size, executions = waiting[0].size, 0
    ends: collections.Counter[tuple[int, int]] = collections.Counter()
    while waiting:
        asked = waiting.pop()
        executions += 1
        assert executions <= 4 * size, "executed without end"
        answer = _run(runner, asked)
        report = BatchReport(asked, 0, b"{}", attempts=asked.attempt)
        if isinstance(answer, Failure):
            decision = isolation.decide(asked, answer)
            if isinstance(decision, Retry):
                waiting.append(decision.batch)
            elif isinstance(decision, Split):
                waiting.extend(decision.parts)
            else:
                _end(ends, asked.spans, [answer] * asked.size, report, limit)
            continue
        report.metrics = orjson.dumps(answer.metrics)
        outcomes: list[Failure | bytes] = [
            decode_failure(value) if status == Status.FAILED else bytes(value)
            for status, value in zip(answer.statuses, answer.values, strict=True)
        ]
        for outcome in outcomes:
            if isinstance(outcome, bytes):
                _is_a_result(outcome, envelope)
        _end(ends, asked.spans, outcomes, report, limit)
    expected = {(span.lease.partition.partition, span.first + i): 1 for span in spans for i in range(len(span.records))}
    assert ends == expected, "a record is unaccounted for, or twice"


def _end(
    ends: collections.Counter[tuple[int, int]],
    spans: Any,
    outcomes: list[Failure | bytes] | list[Failure],
    report: BatchReport,
    limit: int,
) -> None:
    records = [(span, index) for span in spans for index in range(len(span.records))]
    for (span, index), outcome in zip(records, outcomes, strict=True):
        ends[span.lease.partition.partition, span.first + index] += 1
        record = span.records[index]
        if isinstance(outcome, Failure):
            _is_a_dead_letter(span.lease.partition, record, outcome, report, limit)
        else:
            (row,) = result_rows(span.lease.partition, [record], [outcome], report)
            assert _Builder(10**7, 0).extend([row], 0) == 1


def _is_a_result(value: bytes, envelope: str) -> None:
    result = json.loads(value.decode("utf-8"), parse_constant=_refuse)
    orjson.loads(value)
    if envelope == "full":
        assert set(result) == {"result", "metrics", "source", "task"}
        result = result["result"]
    assert type(result) is dict


_CAUSES = {"decode": {Cause.INVALID}, "schema": {Cause.INVALID}, "output": {Cause.OUTPUT}, "encode": {Cause.OUTPUT}}
_RAISED = {Cause.EXCEPTION, Cause.OOM, Cause.REJECTED}
"""The causes of what failed at a stage; any other stage is a step of the backend's."""


def _is_a_dead_letter(
    partition: TopicPartition, record: Record, failure: Failure, report: BatchReport, limit: int
) -> None:
    assert failure.cause in _CAUSES.get(failure.stage, _RAISED)
    assert len(failure.traceback.encode()) <= TRACEBACK_BYTES
    for text in (failure.stage, failure.kind, failure.message):
        assert type(text) is str
        assert len(text.encode()) <= 4 * MAX_MESSAGE_CHARS
    assert len(failure.kind) <= 100
    assert failure.message
    row = dead_letter_row(partition, record, failure, report, limit)
    _, key, value, headers = row
    marks = {name: content for name, content in headers if name.startswith("streamproc-")}
    assert row_bytes(row) <= limit, f"a dead letter of {row_bytes(row)} bytes for {limit}"
    if "streamproc-error-traceback" in marks:
        assert marks["streamproc-error-traceback"] == failure.traceback.encode()
        assert not [name for name in marks if "-cut" in name], "the traceback goes first"
    if "streamproc-headers-cut" in marks:
        assert marks["streamproc-headers-cut"] == b"%d" % len(record.headers)
    else:
        assert list(headers[: len(record.headers)]) == list(record.headers)
    if "streamproc-key-cut-from-bytes" in marks:
        assert (key, marks["streamproc-key-cut-from-bytes"]) == (None, b"%d" % len(record.key or b""))
    else:
        assert key == record.key
    if "streamproc-value-cut-from-bytes" in marks:
        assert marks["streamproc-value-cut-from-bytes"] == b"%d" % len(record.value or b"")
        assert (record.value or b"").startswith(bytes(value or b""))
    else:
        assert value == record.value
    builder = _Builder(limit, 0)
    assert builder.extend([row], 0) == 1
    assert len(builder._build()) <= limit, "larger than what was allowed for"
