"""What crosses the socket between the parent and a child, and how: a worker, or the process that measures lengths.

A frame is a fixed header, a head (a small JSON object, one per batch) and a body (bytes). Bodies hold numpy-compatible
arrays in native byte order followed by the records' values, joined; nothing is pickled and the parent decodes no value.

    batch body   lengths int64[n] | offsets int64[n] | timestamps int64[n] | values     NULL_SIZE is a null's length
    reply body   statuses uint8[n] | lengths uint32[n] | values                         one status byte per record
    values body  lengths int64[n] | values                                              what is to be measured
    lengths body lengths int64[n]                                                       UNMEASURED where that failed

A body of ``shared_memory_threshold_bytes`` or more travels through a ``Segment`` instead: memory that the parent makes
and both map, so that nothing is left behind when a worker is killed. A worker has two segments each way, used in turn;
it never holds more than two batches, so a segment is free again before its turn comes.

Blocking: ``FrameReceiver`` and ``Segment`` never block; ``read_frame`` and ``write_frame``, the worker's side, do.
Order: frames arrive in the order in which they were sent.

The other end is not trusted: the user's code shares the worker's process, and may write where it should not. Whatever
comes is a frame as it was sent or a ``WireError``; a length is believed only below a limit, and a count only where
every byte of the body is accounted for.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import mmap
import os
import socket
import struct
import tempfile
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import accumulate, pairwise
from typing import Any

import orjson

from streamproc.records import NULL_SIZE, Span

HEADER = struct.Struct("=B3sIQ")
MAX_HEAD_BYTES = 67_108_864
"""A head holds the schemas and sample records of the tasks, or a batch's metrics."""
BATCHES_PER_WORKER = 2
MAX_REPLY_VALUE_BYTES = 2**32 - 1
MAX_CHUNK_RECORDS = 1_024
"""Records that are measured together: enough for the cost of a frame to be little, and a circuit soon counts them."""
UNMEASURED = -1
"""In the place of a length that could not be measured."""
MAX_LENGTH = 2**40
"""What is longer is no length: a record's cost grows with its square."""


class Kind(IntEnum):
    """What a frame says."""

    SETUP = 1
    BATCH = 2
    STOP = 3
    READY = 4
    NOT_READY = 5
    START_FAILED = 6
    REPLY = 7
    FAILED = 8
    MEASURE = 9
    LENGTHS = 10


_MARK = b"spw"
_KINDS = frozenset(Kind)
_RESULT_OR_FAILED = b"\x00\x01"


class WireError(Exception):
    """What came is not what streamproc's other end sends."""


@dataclass(slots=True)
class Frame:
    """One message: ``head`` is decoded JSON, ``body`` raw bytes."""

    kind: Kind
    head: dict[str, Any]
    body: memoryview | bytes = b""


class Segment:
    """Shared memory of one batch body: an unnamed file that lives as long as somebody maps it.

    It grows to the largest body that it had to hold, never beyond what the batch limits allow.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map: mmap.mmap | None = None

    @classmethod
    def create(cls) -> Segment:
        """A new, empty segment; its descriptor is passed to the worker when that is started."""
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("streamproc", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            # Memory that the other side cut off would end this process by SIGBUS.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
            return cls(fd)
        with tempfile.TemporaryFile() as file:
            return cls(os.dup(file.fileno()))

    def write(self, parts: Sequence[bytes | memoryview], size: int) -> None:
        """Copy the parts, ``size`` bytes together, to the segment's start."""
        view = self._mapped(size, grow=True)
        position = 0
        for part in parts:
            end = position + len(part)
            view[position:end] = part
            position = end

    def view(self, size: int) -> memoryview:
        """The first ``size`` bytes themselves, until the other side writes the next body.

        Raises WireError where there are not so many.
        """
        if not 0 < size <= os.fstat(self.fd).st_size:
            raise WireError(f"{size} bytes of shared memory were announced, which are not there")
        return memoryview(self._mapped(size, grow=False))[:size]

    def close(self) -> None:
        """Unmap and close; the memory is released when the other side does the same or ends."""
        self._unmap()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _unmap(self) -> None:
        if self._map is not None:
            # Where somebody still looks (an exception that the user's code keeps holds frames) it goes with the view.
            with contextlib.suppress(BufferError):
                self._map.close()
            self._map = None

    def _mapped(self, size: int, *, grow: bool) -> mmap.mmap:
        if self._map is None or len(self._map) < size:
            self._unmap()
            if grow and os.fstat(self.fd).st_size < size:
                os.ftruncate(self.fd, size)
            self._map = mmap.mmap(self.fd, os.fstat(self.fd).st_size)
        return self._map


def encode_frame(kind: Kind, head: dict[str, Any], parts: Sequence[bytes | memoryview] = (), size: int = 0) -> bytes:
    """A whole frame as one piece; ``size`` is the length of the parts together."""
    encoded = orjson.dumps(head)
    return b"".join((HEADER.pack(kind, _MARK, len(encoded), size), encoded, *parts))


def batch_parts(spans: Sequence[Span]) -> tuple[list[bytes | memoryview], int]:
    """The body of a batch frame as parts to join, and their length together."""
    records = [record for span in spans for record in span.records]
    lengths = array("q")
    for span in spans:
        lengths.extend(span.sizes)
    offsets = array("q")
    for span in spans:
        offsets.extend(span.offsets())
    timestamps = array("q", [record.timestamp for record in records])
    parts: list[bytes | memoryview] = [lengths.tobytes(), offsets.tobytes(), timestamps.tobytes()]
    parts.extend([record.value or b"" for record in records])
    return parts, 24 * len(records) + sum([span.size_bytes for span in spans])


@dataclass(slots=True)
class BatchBody:
    """A batch as the worker sees it: slices of the frame; a value is None where the record's is null."""

    values: list[memoryview | None]
    offsets: memoryview
    timestamps: memoryview


def decode_batch(body: memoryview | bytes, count: int) -> BatchBody:
    """The arrays and values of a batch body of ``count`` records. Raises WireError where it is none."""
    view = memoryview(body)
    if len(view) < 24 * count:
        raise WireError(f"a batch of {count} records in {len(view)} bytes")
    lengths = view[: 8 * count].cast("q").tolist()
    payload = view[24 * count :]
    has_nulls = NULL_SIZE in lengths
    ends = list(accumulate([max(0, length) for length in lengths] if has_nulls else lengths, initial=0))
    if ends[-1] != len(payload) or min(lengths, default=0) < NULL_SIZE:
        raise WireError(f"a batch whose values have {ends[-1]} bytes, and {len(payload)} came")
    values: list[memoryview | None] = [payload[start:stop] for start, stop in pairwise(ends)]
    if has_nulls:
        values = [None if length == NULL_SIZE else value for length, value in zip(lengths, values, strict=True)]
    return BatchBody(values, view[8 * count : 16 * count].cast("q"), view[16 * count : 24 * count].cast("q"))


def reply_parts(statuses: bytes, values: Sequence[bytes]) -> tuple[list[bytes | memoryview], int]:
    """The body of a reply frame as parts to join, and their length together."""
    lengths = array("I", [len(value) for value in values])
    return [statuses, lengths.tobytes(), *values], 5 * len(values) + sum(lengths)


def decode_reply(body: memoryview | bytes, counts: Sequence[int]) -> tuple[bytes, list[memoryview], list[int]]:
    """The statuses and values of a reply body, and the bytes of each span's values; ``counts`` are the spans' records.

    The values of a span are slices of a copy of their own: what waits keeps nothing else of the batch in memory.

    Raises:
        WireError: it is not a reply about so many records. Nothing is copied that is not there.
    """
    total = sum(counts)
    values: list[memoryview] = []
    sizes: list[int] = []
    first, position = 0, 5 * total
    with memoryview(body) as view:
        if len(view) < position:
            raise WireError(f"a reply about {total} records in {len(view)} bytes")
        statuses = bytes(view[:total])
        if statuses.translate(None, _RESULT_OR_FAILED):
            raise WireError("a reply with wrong statuses")
        lengths = array("I", view[total:position].tobytes())
        for count in counts:
            ends = list(accumulate(lengths[first : first + count], initial=0))
            if position + ends[-1] > len(view):
                raise WireError(f"a reply of {len(view)} bytes, which its values exceed")
            own = memoryview(bytes(view[position : position + ends[-1]]))
            values.extend([own[start:stop] for start, stop in pairwise(ends)])
            sizes.append(ends[-1])
            first, position = first + count, position + ends[-1]
        if position != len(view):
            raise WireError(f"a reply of {len(view)} bytes, of which its values explain {position}")
    return statuses, values, sizes


def values_parts(spans: Sequence[Span]) -> tuple[list[bytes | memoryview], int]:
    """The values of these records alone, as the parts of a body to join, and their length together."""
    lengths = array("q")
    values: list[bytes | memoryview] = [b""]
    for span in spans:
        lengths.extend(span.sizes)
        values.extend([record.value or b"" for record in span.records])
    values[0] = lengths.tobytes()
    return values, 8 * len(lengths) + sum([span.size_bytes for span in spans])


def decode_values(body: memoryview | bytes, count: int) -> list[memoryview | None]:
    """The values of a body of ``count`` records, None for a null. Raises WireError where it is none."""
    view = memoryview(body)
    if len(view) < 8 * count:
        raise WireError(f"the values of {count} records in {len(view)} bytes")
    lengths = view[: 8 * count].cast("q").tolist()
    payload = view[8 * count :]
    ends = list(accumulate([max(0, length) for length in lengths], initial=0))
    if ends[-1] != len(payload) or min(lengths, default=0) < NULL_SIZE:
        raise WireError(f"values of {ends[-1]} bytes, and {len(payload)} came")
    return [
        None if length == NULL_SIZE else payload[start:stop]
        for length, (start, stop) in zip(lengths, pairwise(ends), strict=True)
    ]


def decode_lengths(body: memoryview | bytes, count: int) -> list[int]:
    """The lengths of ``count`` records, ``UNMEASURED`` where that failed. Raises WireError where they are none."""
    if len(body) != 8 * count:
        raise WireError(f"the lengths of {count} records in {len(body)} bytes")
    with memoryview(body) as view, view.cast("q") as numbers:
        lengths = numbers.tolist()
    if lengths and not UNMEASURED <= min(lengths) <= max(lengths) <= MAX_LENGTH:
        raise WireError("lengths that are none")
    return lengths


def are_metrics(metrics: object) -> bool:
    """Whether these can be a batch's execution metrics: a mapping, with numbers or nulls as ``execution_times``."""
    if not isinstance(metrics, dict):
        return False
    times = metrics.get("execution_times")
    return times is None or (
        isinstance(times, dict) and all(isinstance(time, int | float | None) for time in times.values())
    )


class FrameReceiver(asyncio.BufferedProtocol):
    """The parent's end of a child's socket: reads straight into a buffer of the frame's size.

    ``on_frame`` gets each whole frame; it may raise WireError. ``on_garbage`` is called once where something else than
    a frame came, with what was wrong; nothing that comes later is looked at. ``on_closed`` is called once, at the end.
    """

    def __init__(
        self,
        on_frame: Callable[[Frame], None],
        on_garbage: Callable[[str], None],
        on_closed: Callable[[], None],
        *,
        max_body_bytes: int,
    ) -> None:
        self._on_frame = on_frame
        self._on_garbage = on_garbage
        self._on_closed = on_closed
        self._max_body_bytes = max_body_bytes
        self._deaf = False
        self._header = bytearray(HEADER.size)
        self._buffer = memoryview(self._header)
        self._filled = 0
        self._frame: tuple[Kind, int] | None = None

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - the protocol's signature; our sizes are exact
        """The rest of the header or frame that is being read."""
        return self._buffer[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """Go on to the frame after its header, and to the next header after the frame."""
        if self._deaf:
            return
        self._filled += nbytes
        if self._filled < len(self._buffer):
            return
        try:
            self._go_on()
        except WireError as error:
            self._deaf = True
            self._expect(memoryview(self._header))
            self._on_garbage(str(error))

    def _go_on(self) -> None:
        if self._frame is None:
            kind, head_size, body_size = _opened(self._header, self._max_body_bytes)
            self._frame = (kind, head_size)
            self._expect(memoryview(bytearray(head_size + body_size)))
            return
        kind, head_size = self._frame
        content = self._buffer
        self._frame = None
        self._expect(memoryview(self._header))
        self._on_frame(_frame(kind, content, head_size))

    def eof_received(self) -> bool:
        """Close our side too."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - a reset says no more than an end
        """The worker closed its end or died."""
        self._on_closed()

    def _expect(self, buffer: memoryview) -> None:
        self._buffer = buffer
        self._filled = 0


def _opened(header: bytes | bytearray | memoryview, max_body_bytes: int) -> tuple[Kind, int, int]:
    """What a header announces: the kind of the frame, and the bytes of its head and of its body."""
    kind, mark, head_size, body_size = HEADER.unpack(header)
    if mark != _MARK or kind not in _KINDS:
        raise WireError("something came that is no frame")
    # The smallest head is that of an empty object.
    if not len(b"{}") <= head_size <= MAX_HEAD_BYTES or body_size > max_body_bytes:
        raise WireError(f"a frame with a head of {head_size} bytes and a body of {body_size}")
    return Kind(kind), head_size, body_size


def _frame(kind: Kind, content: memoryview, head_size: int) -> Frame:
    try:
        head = orjson.loads(content[:head_size])
    except ValueError:
        head = None
    if not isinstance(head, dict):
        raise WireError("a frame whose head is no JSON object")
    return Frame(kind, head, content[head_size:])


def read_frame(connection: socket.socket, max_body_bytes: int) -> Frame | None:
    """The next frame, or None when the parent has closed its end. Blocks. Raises WireError."""
    header = _receive(connection, HEADER.size)
    if header is None:
        return None
    kind, head_size, body_size = _opened(header, max_body_bytes)
    content = _receive(connection, head_size + body_size)
    return None if content is None else _frame(kind, content, head_size)


def write_frame(
    connection: socket.socket,
    kind: Kind,
    head: dict[str, Any],
    parts: Sequence[bytes | memoryview] = (),
    size: int = 0,
) -> None:
    """Send a frame. Blocks until the parent has taken it."""
    connection.sendall(encode_frame(kind, head, parts, size))


def _receive(connection: socket.socket, size: int) -> memoryview | None:
    view = memoryview(bytearray(size))
    filled = 0
    while filled < size:
        count = connection.recv_into(view[filled:])
        if count == 0:
            return None
        filled += count
    return view
