"""Fuzzes the wire format between the parent and its children, a worker or the process that measures lengths.

- *Round trip*: frames with batches and replies of any numbers, values and sizes arrive as they were sent, in whatever
  pieces the socket hands them over, at the parent and at the worker, and through shared memory.
- *Lengths*: so it is with the process that measures: of its answers, right or changed, the parent takes lengths that
  are some, of exactly the records it asked about, or ends the process; every record comes out once.
- *Garbage*: of a stream of a worker's answers that was changed, cut or made up, the parent takes over whole answers
  about exactly the records it asked about, or ends the worker; every batch is answered exactly once, the processor is
  never stopped, nothing is taken over after garbage, and no buffer is larger than the limits. A worker that reads
  garbage ends with an error of ours.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import socket
from array import array
from dataclasses import asdict, dataclass, field
from itertools import accumulate, pairwise
from typing import Any, cast

import orjson

from streamproc.errors import StreamprocError
from streamproc.records import Batch, Cause, Failure, Span, Status, value_sizes
from streamproc.runtime.failures import encode_failure
from streamproc.runtime.measuring import Measurer, Measuring, MeasuringEvents
from streamproc.runtime.pool import Pool, PoolEvents, Reply, Worker
from streamproc.runtime.wire import (
    BATCHES_PER_WORKER,
    HEADER,
    MAX_HEAD_BYTES,
    MAX_LENGTH,
    UNMEASURED,
    Frame,
    FrameReceiver,
    Kind,
    Segment,
    WireError,
    batch_parts,
    decode_batch,
    decode_lengths,
    decode_reply,
    decode_values,
    encode_frame,
    read_frame,
    reply_parts,
)
from streamproc.runtime.worker_process import WorkerProcess
from streamproc.settings import PoolSettings
from tests.fuzz.take import Take, mutated
from tests.support.spans import FakeRecord, batch, lease

THRESHOLD_BYTES = 4_096
METRICS = {"batch_size": 1, "execution_times": {"execute": 0.5}, "total_execution_time": 0.5}
SEEDS = [
    b"\0" * 64,
    b"\0\2" + bytes(range(200)),
    b"\1\1\2" + bytes(range(255, 0, -1)),
    b"\1\2\0\1\7" + b"\0\1\2\3\4\5\6\7" * 20,
    b"\3\1\2" + bytes(range(100)),
    b"\3" + b"\0\1\2\3\4\5\6\7" * 9,
    b"\2" + encode_frame(Kind.READY, {"initialize_s": 0.1}) + encode_frame(Kind.STOP, {}),
    b"\2" + HEADER.pack(Kind.REPLY, b"spw", 2**32 - 1, 2**64 - 1),
    b"\2"
    + encode_frame(
        Kind.FAILED, {"id": 1, "failure": {"cause": "oom", "stage": "execute", "kind": "E", "message": "m"}}
    ),
]


def check(data: bytes) -> None:
    """One input; raises AssertionError, or whatever the code under test should not have raised."""
    take = Take(data)
    match take.below(4):
        case 0:
            _round_trip(take)
        case 1:
            _answers(take)
        case 2:
            _garbage(take.rest())
        case _:
            _lengths(take)


# -- round trips


def _spans(take: Take) -> list[Span]:
    spans = []
    for number in range(1 + take.below(4)):
        rows = [
            FakeRecord(offset=take.int64(), timestamp=take.int64(), value=None if take.bit() else take.blob())
            for _ in range(1 + take.below(4))
        ]
        spans.append(Span(lease(number), 0, rows, value_sizes(rows), 0.0))
    return spans


def _round_trip(take: Take) -> None:
    sent: list[tuple[Kind, dict[str, Any], bytes]] = []
    bodies: list[tuple[list[Span], list[tuple[int, bytes]]]] = []
    for number in range(1 + take.below(3)):
        spans = _spans(take)
        records = [record for span in spans for record in span.records]
        parts, size = batch_parts(spans)
        sent.append((Kind.BATCH, {"id": number, "text": take.blob(9).hex()}, b"".join(parts)))
        assert size == len(sent[-1][2])
        values = [(take.below(2), take.blob()) for _ in records]
        parts, size = reply_parts(bytes(status for status, _ in values), [value for _, value in values])
        sent.append((Kind.REPLY, {"id": number}, b"".join(parts)))
        assert size == len(sent[-1][2])
        bodies.append((spans, values))
    stream = b"".join(encode_frame(kind, head, [body], len(body)) for kind, head, body in sent)

    received, why = _feed(stream, take, max_body_bytes=2**20)
    assert why is None
    assert [(it.kind, it.head, bytes(it.body)) for it in received] == sent
    connection = _Pieces(stream, take)
    for kind, head, body in sent:
        frame = _read(connection, 2**20)
        assert frame is not None
        assert (frame.kind, frame.head, bytes(frame.body)) == (kind, head, body)
    assert _read(connection, 2**20) is None

    segment = Segment.create()
    try:
        for (spans, values), asked, answered in zip(bodies, received[::2], received[1::2], strict=True):
            _same_batch(spans, asked.body)
            segment.write([asked.body], len(asked.body))
            _same_batch(spans, segment.view(len(asked.body)))
            _same_reply(spans, values, answered.body)
            segment.write([answered.body], len(answered.body))
            with segment.view(len(answered.body)) as view:
                _same_reply(spans, values, view)
    finally:
        segment.close()


def _same_batch(spans: list[Span], body: memoryview | bytes) -> None:
    records = [record for span in spans for record in span.records]
    decoded = decode_batch(body, len(records))
    assert [None if value is None else bytes(value) for value in decoded.values] == [it.value for it in records]
    assert list(decoded.offsets) == [it.offset for it in records]
    assert list(decoded.timestamps) == [it.timestamp for it in records]


def _same_reply(spans: list[Span], sent: list[tuple[int, bytes]], body: memoryview | bytes) -> None:
    statuses, values, sizes = decode_reply(body, [len(span.records) for span in spans])
    assert [(status, bytes(value)) for status, value in zip(statuses, values, strict=True)] == sent
    ends = list(accumulate([len(span.records) for span in spans], initial=0))
    assert sizes == [sum(len(value) for _, value in sent[first:stop]) for first, stop in pairwise(ends)]


def _piece(take: Take) -> int:
    return 1 + take.below(256) if take.left else 4_096


class _Pieces:
    """The worker's end of a socket that hands over a stream in pieces."""

    def __init__(self, stream: bytes, take: Take) -> None:
        self._stream = stream
        self._take = take

    def recv_into(self, view: memoryview) -> int:
        if not self._stream or not len(view):
            return 0
        size = min(len(view), len(self._stream), _piece(self._take))
        view[:size], self._stream = self._stream[:size], self._stream[size:]
        return size


def _read(connection: _Pieces, max_body_bytes: int) -> Frame | None:
    return read_frame(cast("socket.socket", connection), max_body_bytes)


def _feed(stream: bytes, take: Take, *, max_body_bytes: int) -> tuple[list[Frame], str | None]:
    received: list[Frame] = []
    whys: list[str] = []

    def on_frame(frame: Frame) -> None:
        assert not whys, "a frame after garbage"
        received.append(frame)

    receiver = FrameReceiver(on_frame, whys.append, lambda: None, max_body_bytes=max_body_bytes)
    _push(receiver, stream, take, max_body_bytes)
    assert len(whys) <= 1
    return received, whys[0] if whys else None


def _push(receiver: FrameReceiver, stream: bytes, take: Take, max_body_bytes: int) -> None:
    position = 0
    while position < len(stream):
        buffer = receiver.get_buffer(-1)
        assert 0 < len(buffer) <= MAX_HEAD_BYTES + max_body_bytes
        size = min(len(buffer), len(stream) - position, _piece(take))
        buffer[:size] = stream[position : position + size]
        receiver.buffer_updated(size)
        position += size


# -- garbage


@dataclass
class _Seen:
    replies: list[Reply] = field(default_factory=list)
    failed: list[tuple[Batch, Failure]] = field(default_factory=list)
    fatal: list[StreamprocError] = field(default_factory=list)
    rooms: int = 0

    def room(self) -> None:
        self.rooms += 1


class _Process(WorkerProcess):
    """The parent's end of a worker that is not there."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.segments = _SEGMENTS
        self.killed = False

    def write(self, frame: bytes) -> None:
        """Forget it."""

    def kill(self) -> bool:
        """Note it."""
        self.killed = True
        return True

    def hears(self, stream: bytes, take: Take) -> None:
        """Have this come from the socket."""
        _push(self._receiver, stream, take, THRESHOLD_BYTES)


class _Pool(Pool):
    """The pool with one worker, and no process."""

    def __init__(self, seen: _Seen) -> None:
        events = PoolEvents(
            on_reply=seen.replies.append,
            on_failed=lambda batch, failure, *_: seen.failed.append((batch, failure)),
            on_room=seen.room,
            on_restart=lambda _: None,
            on_fatal=seen.fatal.append,
        )
        settings = PoolSettings(shared_memory_threshold_bytes=THRESHOLD_BYTES)
        super().__init__(settings, {}, events, lambda: 0.0)
        worker = self.worker = Worker(0, self._generation, state="ready", ready=True, pid=-1)
        self.process = worker.process = _Process(
            settings,
            lambda frame: self._on_frame(worker, frame),
            lambda why: self._on_garbage(worker, why),
            lambda: self._on_disconnected(worker),
        )
        self._workers[0] = worker

    def _spawn(self, index: int, *, delay_s: float = 0.0, replaces: Worker | None = None) -> None:
        """No process is started."""


_SEGMENTS = [Segment.create() for _ in range(2 * BATCHES_PER_WORKER)]
_LOOP = asyncio.new_event_loop()
atexit.register(_LOOP.close)


def _answers(take: Take) -> None:
    """What the pool makes of a worker's answers to two batches, right or changed."""
    asked = [batch(_spans(take), number=number) for number in (1, 2)]
    stream = b""
    for slot, it in enumerate(asked):
        stream += _answer_to(it, slot, take)
    if changed := take.bit():
        stream = mutated(stream, take)
    stream += take.blob(64)
    _LOOP.run_until_complete(_through_the_pool(asked, stream, take, exact=not changed))


def _answer_to(asked: Batch, slot: int, take: Take) -> bytes:
    head: dict[str, Any] = {"id": asked.id}
    if take.below(4) == 0:
        failure = Failure(take.one_of(list(Cause)), "execute", "ValueError", take.blob(9).hex(), "line 1\nline 2")
        fields = asdict(failure)
        name = take.one_of(list(fields))
        fields[name] = _odd(fields[name], take)
        head["failure"] = _odd(fields, take)
        return encode_frame(Kind.FAILED, head)
    head |= {"metrics": _odd(METRICS, take), "decode_ms": 1, "encode_ms": _odd(0.5, take), "wall_ms": 2.5}
    values = [
        (Status.FAILED, encode_failure(Failure(Cause.OUTPUT, "encode", "TypeError", "no")))
        if take.below(4) == 0
        else (Status(take.below(3)) if take.below(16) == 0 else Status.RESULT, take.blob())
        for _ in range(asked.size)
    ]
    parts, size = reply_parts(bytes(status for status, _ in values), [value for _, value in values])
    if take.below(4) == 0:
        _SEGMENTS[BATCHES_PER_WORKER + slot].write(parts, size)
        shared = {"slot": _odd(slot, take), "shared": _odd(size, take)}
        return encode_frame(Kind.REPLY, {**head, **shared})
    return encode_frame(Kind.REPLY, head, parts, size)


def _odd(usual: object, take: Take) -> object:
    """What is usually there, and rarely something else that JSON can hold."""
    if take.below(16):
        return usual
    odd: list[object] = [
        None,
        "text",
        [],
        {},
        {"execution_times": [1]},
        {"execution_times": {"execute": "x"}},
        -1,
        2**62,
        True,
        1.5,
    ]
    return take.one_of(odd)


async def _through_the_pool(asked: list[Batch], stream: bytes, take: Take, *, exact: bool) -> None:
    seen = _Seen()
    pool = _Pool(seen)
    for it in asked:
        pool.submit(it)
    pool.process.hears(stream, take)
    answered = len(seen.replies) + len(seen.failed)
    assert len(pool.worker.batches) == len(asked) - answered
    if pool.process.killed:
        assert not pool.worker.ready, "a worker that is to be killed would be given batches"
        assert pool.room() == 0
    pool._cancel_timer(pool.worker)
    pool._ended(pool.worker, -9)
    pool._cancel_timer(pool.worker)
    assert not seen.fatal, seen.fatal
    told = [it.batch.id for it in seen.replies] + [it.id for it, _ in seen.failed]
    assert sorted(told) == [it.id for it in asked], "a batch was not answered exactly once"
    for reply in seen.replies:
        assert len(reply.statuses) == len(reply.values) == reply.batch.size
        assert sum(reply.sizes) == sum(map(len, reply.values))
        assert len(reply.sizes) == len(reply.batch.spans)
        assert not set(reply.statuses) - {Status.RESULT, Status.FAILED}
        assert isinstance(reply.metrics, dict)
    for _, failure in seen.failed:
        failure.message.encode()
    if exact and not pool.process.killed:
        assert answered == len(asked)


class _Measuring(Measuring):
    """The measuring without a process."""

    def __init__(self, seen: _Measured) -> None:
        events = MeasuringEvents(
            lambda _, spans: seen.measured.extend(spans),
            lambda _, failed: seen.unmeasured.extend(failed),
            lambda: None,
            lambda _: None,
            seen.fatal.append,
        )
        super().__init__(PoolSettings(), {"tasks": {"main": {}}}, events, lambda: 0.0)
        measurer = self._measurer = Measurer(PoolSettings(), {}, state="ready")
        self.process = measurer.process = _Process(
            PoolSettings(shared_memory_threshold_bytes=THRESHOLD_BYTES),
            lambda frame: self._on_frame(measurer, frame),
            lambda why: self._on_garbage(measurer, why),
            lambda: None,
        )

    def _spawn(self, *, delay_s: float = 0.0) -> None:
        """No process is started."""


@dataclass
class _Measured:
    measured: list[Span] = field(default_factory=list)
    unmeasured: list[tuple[Span, list[Failure]]] = field(default_factory=list)
    fatal: list[StreamprocError] = field(default_factory=list)


def _lengths(take: Take) -> None:
    """What the measuring makes of answers to two chunks, right or changed."""
    spans = [_spans(take), _spans(take)]
    stream = b""
    for number, some in enumerate(spans, 1):
        told = [take.below(300) - take.bit() * 256 for span in some for _ in span.records]
        lengths = array("q", [max(it, UNMEASURED) if take.below(16) else it for it in told])
        failures = _odd([["Kind", take.blob(9).hex()] for it in lengths if it == UNMEASURED], take)
        head = {"id": _odd(number, take), "failures": failures}
        stream += encode_frame(Kind.LENGTHS, head, [lengths.tobytes()], 8 * len(lengths))
    if take.bit():
        stream = mutated(stream, take)
    stream += take.blob(64)
    _LOOP.run_until_complete(_through_the_measuring(spans, stream, take))


async def _through_the_measuring(chunks: list[list[Span]], stream: bytes, take: Take) -> None:
    seen = _Measured()
    measuring = _Measuring(seen)
    for some in chunks:
        for span in some:
            measuring.add("main", span)
        measuring.send()
    measuring.process.hears(stream, take)
    measuring._cancel_timer(measuring._measurer)
    measuring._ended(measuring._measurer, -9)
    assert not seen.fatal, seen.fatal
    out = [*seen.measured, *(span for span, _ in seen.unmeasured), *measuring.discard("main")]
    records = [(id(record)) for span in out for record in span.records]
    asked = [(id(record)) for some in chunks for span in some for record in span.records]
    assert sorted(records) == sorted(asked), "a record came out twice, or not at all"
    for span in seen.measured:
        assert span.lengths is not None
        assert len(span.lengths) == len(span.records)
        assert 0 <= min(span.lengths) <= max(span.lengths) <= MAX_LENGTH
    for span, failures in seen.unmeasured:
        assert len(failures) == len(span.records)
        assert {(it.cause, it.stage) for it in failures} == {(Cause.INVALID, "length")}


def _garbage(stream: bytes) -> None:
    """Bytes that nobody of ours has sent."""
    received, _ = _feed(stream, Take(b"\xff" * 4_096), max_body_bytes=THRESHOLD_BYTES)
    connection = _Pieces(stream, Take(b"\xff" * 4_096))
    read: list[Frame] = []
    with contextlib.suppress(WireError):
        while (frame := _read(connection, THRESHOLD_BYTES)) is not None:
            read.append(frame)
    assert [(it.kind, orjson.dumps(it.head), bytes(it.body)) for it in read] == [
        (it.kind, orjson.dumps(it.head), bytes(it.body)) for it in received
    ], "the two ends understand a stream differently"
    for count in (0, 1, 3, len(stream) // 24):
        with contextlib.suppress(WireError):
            assert len(decode_batch(stream, count).values) == count
        with contextlib.suppress(WireError):
            assert len(decode_values(stream, count)) == count
        with contextlib.suppress(WireError):
            assert all(UNMEASURED <= length <= MAX_LENGTH for length in decode_lengths(stream, count))
        with contextlib.suppress(WireError):
            statuses, values, sizes = decode_reply(stream, [count, count])
            assert len(statuses) == len(values) == 2 * count
            assert 10 * count + sum(sizes) == len(stream)
