"""Frames and bodies make the round trip, whole and in pieces, through sockets and shared memory."""

from __future__ import annotations

import socket
import threading

from hypothesis import given, settings
from hypothesis import strategies as st

from streamproc.records import Span, Status, value_sizes
from streamproc.runtime.wire import (
    Frame,
    FrameReceiver,
    Kind,
    Segment,
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
    records = [
        FakeRecord(
            offset=data.draw(st.integers(0, 2**62)), value=value, timestamp=data.draw(st.integers(-(2**40), 2**60))
        )
        for value in values
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


@given(st.lists(st.tuples(st.sampled_from(list(Status)), st.binary(max_size=300)), min_size=1, max_size=20), st.data())
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
    receiver = FrameReceiver(received.append, lambda: closed.append(True))
    position = 0
    while position < len(stream):
        buffer = receiver.get_buffer(-1)
        count = min(len(buffer), chunk, len(stream) - position)
        buffer[:count] = stream[position : position + count]
        receiver.buffer_updated(count)
        position += count
    receiver.connection_lost(None)
    assert [(it.kind, it.head, bytes(it.body)) for it in received] == frames
    assert closed == [True]


def test_frames_cross_a_socket_larger_than_its_buffers() -> None:
    ours, theirs = socket.socketpair()
    body = bytes(range(256)) * 40_000
    with ours, theirs:
        writer = threading.Thread(target=write_frame, args=(ours, Kind.BATCH, {"id": 7}, [body], len(body)))
        writer.start()
        frame = read_frame(theirs)
        writer.join()
        assert frame is not None
        assert (frame.kind, frame.head, bytes(frame.body)) == (Kind.BATCH, {"id": 7}, body)
        ours.close()
        assert read_frame(theirs) is None


def test_a_connection_that_ends_within_a_frame_gives_no_frame() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(encode_frame(Kind.STOP, {"a": 1})[:-2])
        ours.close()
        assert read_frame(theirs) is None


def test_both_sides_of_a_segment_see_the_same_bytes_while_it_grows() -> None:
    parent = Segment.create()
    worker = Segment(parent.fd)
    parent.write([b"abc", b"def"], 6)
    assert worker.read(6) == b"abcdef"
    large = b"x" * 100_000
    parent.write([large, b"y"], 100_001)
    assert worker.read(100_001) == large + b"y"
    worker.write([b"back"], 4)
    assert parent.read(4) == b"back"
    worker.fd = -1
    worker.close()
    parent.close()
