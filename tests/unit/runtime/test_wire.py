"""Frames and bodies make the round trip, whole and in pieces, through sockets and shared memory."""

from __future__ import annotations

import os
import socket
import sys
import threading
import tracemalloc
from array import array
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamproc.records import Span, Status, value_sizes
from streamproc.runtime.wire import (
    HEADER,
    Frame,
    FrameReceiver,
    Kind,
    Segment,
    WireError,
    batch_parts,
    decode_batch,
    decode_reply,
    encode_frame,
    read_frame,
    reply_parts,
    write_frame,
)
from tests.support.spans import FakeRecord, lease

values = st.lists(st.one_of(st.none(), st.binary(max_size=300)), min_size=1, max_size=20)


@given(values=values, data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_batch_body_makes_the_round_trip(values: list[bytes | None], data: st.DataObject) -> None:
    count = len(values)
    # Those of a span rise, as they do in a partition; near each other or not.
    gaps = st.one_of(st.just(1), st.integers(1, 3), st.integers(1, 2**57))
    offsets = list(accumulate(data.draw(st.lists(gaps, min_size=count, max_size=count))))
    records = [
        FakeRecord(offset=offset, value=value, timestamp=data.draw(st.integers(-(2**40), 2**60)))
        for offset, value in zip(offsets, values, strict=True)
    ]
    cut = data.draw(st.integers(0, len(records)))
    spans = [
        Span(lease(), first, some, value_sizes(some), 0.0)
        for first, some in ((0, records[:cut]), (cut, records[cut:]))
        if some
    ]
    parts, size = batch_parts(spans)
    body = b"".join(parts)
    assert len(body) == size
    decoded = decode_batch(body, len(records))
    assert [None if value is None else bytes(value) for value in decoded.values] == values
    assert list(decoded.offsets) == [record.offset for record in records]
    assert list(decoded.timestamps) == [record.timestamp for record in records]


@given(
    results=st.lists(
        st.tuples(st.sampled_from([Status.RESULT, Status.FAILED]), st.binary(max_size=300)), min_size=1, max_size=20
    ),
    data=st.data(),
)
@settings(max_examples=200, deadline=None)
def test_a_reply_body_makes_the_round_trip(results: list[tuple[Status, bytes]], data: st.DataObject) -> None:
    statuses = bytes(status for status, _ in results)
    parts, size = reply_parts(statuses, [value for _, value in results])
    body = b"".join(parts)
    assert len(body) == size
    cut = data.draw(st.integers(0, len(results) - 1))
    counts = [cut, len(results) - cut] if cut else [len(results)]
    decoded_statuses, decoded, sizes = decode_reply(body, counts)
    assert decoded_statuses == statuses
    assert [bytes(value) for value in decoded] == [value for _, value in results]
    spans = [results[:cut], results[cut:]] if cut else [results]
    assert sizes == [sum(len(value) for _, value in some) for some in spans]
    # A value keeps the bytes of its own span in memory, and no others.
    kept = [size for size, count in zip(sizes, counts, strict=True) for _ in range(count)]
    assert [len(bytes(value.obj)) for value in decoded] == kept


def test_a_segment_that_was_looked_at_can_grow_and_close() -> None:
    segment = Segment.create()
    segment.write([b"abc"], 3)
    with segment.view(3) as view:
        assert bytes(view) == b"abc"
    segment.write([b"x" * 100_000], 100_000)
    with segment.view(100_000) as view:
        assert bytes(view) == b"x" * 100_000
    segment.close()


def test_a_segment_that_is_still_looked_at_can_grow_and_close_too() -> None:
    segment = Segment.create()
    segment.write([b"abc"], 3)
    before = segment.view(3)
    segment.write([b"x" * 100_000], 100_000)
    after = segment.view(100_000)
    segment.close()
    assert bytes(after) == b"x" * 100_000
    assert bytes(before) == b"xxx"  # the same memory, and no copy of it


def test_a_large_batch_is_copied_into_shared_memory_and_nowhere_else() -> None:
    rows = [FakeRecord(offset=index, value=bytes(150_000)) for index in range(32)]
    spans = [Span(lease(), 0, rows, value_sizes(rows), 0.0)]
    segment = Segment.create()
    tracemalloc.start()
    try:
        parts, size = batch_parts(spans)
        segment.write(parts, size)
        assert tracemalloc.get_traced_memory()[1] < 20_000
    finally:
        tracemalloc.stop()
    segment.close()


def test_the_results_of_a_large_batch_are_copied_out_of_shared_memory_once() -> None:
    parts, size = reply_parts(bytes(32), [bytes(150_000)] * 32)
    segment = Segment.create()
    segment.write(parts, size)
    tracemalloc.start()
    try:
        with segment.view(size) as body:
            decode_reply(body, [16, 16])
        assert tracemalloc.get_traced_memory()[1] < 32 * 150_000 + 20_000
    finally:
        tracemalloc.stop()
    segment.close()


@given(
    frames=st.lists(
        st.tuples(st.sampled_from(list(Kind)), st.dictionaries(st.text(), st.integers(0, 9)), st.binary(max_size=99)),
        max_size=5,
    ),
    chunk=st.integers(1, 50),
)
@settings(max_examples=200, deadline=None)
def test_the_parent_reads_frames_however_the_socket_cuts_them(
    frames: list[tuple[Kind, dict[str, int], bytes]], chunk: int
) -> None:
    stream = b"".join(encode_frame(kind, head, [body], len(body)) for kind, head, body in frames)
    received: list[Frame] = []
    closed: list[bool] = []
    whys: list[str] = []
    receiver = FrameReceiver(received.append, whys.append, lambda: closed.append(True), max_body_bytes=1_000)
    position = 0
    while position < len(stream):
        buffer = receiver.get_buffer(-1)
        count = min(len(buffer), chunk, len(stream) - position)
        buffer[:count] = stream[position : position + count]
        receiver.buffer_updated(count)
        position += count
    receiver.connection_lost(None)
    assert [(it.kind, it.head, bytes(it.body)) for it in received] == frames
    assert (closed, whys) == ([True], [])


def test_frames_cross_a_socket_larger_than_its_buffers() -> None:
    ours, theirs = socket.socketpair()
    body = bytes(range(256)) * 40_000
    with ours, theirs:
        writer = threading.Thread(target=write_frame, args=(ours, Kind.BATCH, {"id": 7}, [body], len(body)))
        writer.start()
        frame = read_frame(theirs, 2**24)
        writer.join()
        assert frame is not None
        assert (frame.kind, frame.head, bytes(frame.body)) == (Kind.BATCH, {"id": 7}, body)
        ours.close()
        assert read_frame(theirs, 2**24) is None


def test_a_connection_that_ends_within_a_frame_gives_no_frame() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(encode_frame(Kind.STOP, {"a": 1})[:-2])
        ours.close()
        assert read_frame(theirs, 2**24) is None


def test_both_sides_of_a_segment_see_the_same_bytes_while_it_grows() -> None:
    parent = Segment.create()
    worker = Segment(parent.fd)
    parent.write([b"abc", b"def"], 6)
    assert bytes(worker.view(6)) == b"abcdef"
    large = b"x" * 100_000
    parent.write([large, b"y"], 100_001)
    assert bytes(worker.view(100_001)) == large + b"y"
    worker.write([b"back"], 4)
    assert bytes(parent.view(4)) == b"back"
    worker.fd = -1
    worker.close()
    parent.close()


# -- what no end of ours sends

GARBAGE = [
    b"printed where it should not be\n",
    HEADER.pack(Kind.REPLY, b"...", 2, 0) + b"{}",
    HEADER.pack(99, b"spw", 2, 0) + b"{}",
    HEADER.pack(Kind.REPLY, b"spw", 2**32 - 1, 0) + b"{}",
    HEADER.pack(Kind.REPLY, b"spw", 2, 2**64 - 1) + b"{}",
    HEADER.pack(Kind.REPLY, b"spw", 2, 1_001) + b"{}",
    HEADER.pack(Kind.REPLY, b"spw", 0, 0),
    HEADER.pack(Kind.REPLY, b"spw", 2, 0) + b"[]",
    HEADER.pack(Kind.REPLY, b"spw", 2, 0) + b"{]",
]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_is_reported_once_allocates_nothing_and_ends_the_listening(garbage: bytes) -> None:
    received: list[Frame] = []
    whys: list[str] = []
    receiver = FrameReceiver(received.append, whys.append, lambda: None, max_body_bytes=1_000)
    for byte in encode_frame(Kind.READY, {}) + garbage + encode_frame(Kind.READY, {}):
        buffer = receiver.get_buffer(-1)
        assert 0 < len(buffer) < 2_000
        buffer[0] = byte
        receiver.buffer_updated(1)
    assert len(received) == 1
    assert len(whys) == 1


@pytest.mark.parametrize("garbage", GARBAGE)
def test_the_worker_refuses_garbage(garbage: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(garbage)
        with pytest.raises(WireError):
            read_frame(theirs, 1_000)


def test_an_answer_that_cannot_be_taken_ends_the_listening_too() -> None:
    whys: list[str] = []

    def on_frame(_: Frame) -> None:
        raise WireError("no such batch")

    receiver = FrameReceiver(on_frame, whys.append, lambda: None, max_body_bytes=0)
    for byte in 2 * encode_frame(Kind.REPLY, {}):
        receiver.get_buffer(-1)[0] = byte
        receiver.buffer_updated(1)
    assert whys == ["no such batch"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        bytes(47),
        bytes(48) + b"x",
        array("q", [2, 0, 0, 0, 0, 0]).tobytes() + b"x",
        array("q", [-2, 3, 0, 0, 0, 0]).tobytes() + b"x",
    ],
)
def test_a_batch_body_that_does_not_add_up_is_refused(body: bytes) -> None:
    with pytest.raises(WireError):
        decode_batch(body, 2)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        bytes(9),
        bytes(10) + b"x",
        b"\0\0" + array("I", [1, 2]).tobytes() + b"ab",
        b"\0\2" + array("I", [1, 1]).tobytes() + b"ab",
    ],
)
def test_a_reply_body_that_does_not_add_up_is_refused(body: bytes) -> None:
    for counts in ([2], [1, 1]):
        with pytest.raises(WireError):
            decode_reply(body, counts)
    segment = Segment.create()
    segment.write([body, b"\0"], len(body) + 1)
    refused: list[WireError] = []
    try:
        with segment.view(len(body)) as view:
            decode_reply(view, [2])
    except WireError as error:
        refused.append(error)
    assert refused
    segment.close()  # which nobody looks at any more, although the error is still there


def test_what_a_reply_says_to_be_long_is_not_made_room_for() -> None:
    body = b"\0" * 4 + array("I", [3, 2**32 - 1, 2**32 - 1, 2**32 - 1]).tobytes() + b"abc"
    tracemalloc.start()
    try:
        with pytest.raises(WireError):
            decode_reply(body, [1, 3])
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_a_size_that_a_segment_has_not_is_refused() -> None:
    segment = Segment.create()
    for size in (-1, 0, 1, 2**62):
        with pytest.raises(WireError):
            segment.view(size)
    segment.close()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux seals memory")
def test_the_other_side_cannot_cut_a_segment_off_while_it_is_read() -> None:
    segment = Segment.create()
    segment.write([b"abc"], 3)
    with pytest.raises(PermissionError):
        os.ftruncate(segment.fd, 0)
    assert bytes(segment.view(3)) == b"abc"
    segment.close()
