"""MessagePack: values to records, outputs to values, and the full envelope. By ormsgpack, orjson's kin.

Strict as JSON is: keys are text, text is UTF-8, nothing stands behind the value, nesting to 1024 levels. Timestamps
become text; other extension types are refused.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from itertools import repeat
from typing import Any

import orjson
import ormsgpack

from streamproc.backend.normalize import ensure_native_types
from streamproc.formats.values import FormatError, instant_text

_TIMESTAMP = -1
_ENCODE = ormsgpack.OPT_SERIALIZE_NUMPY
# ormsgpack reads one value and says nothing of what stands behind it. So each is read as the first of two, and the
# second has to be this, which nobody knows outside this process.
_SENTINEL = secrets.token_bytes(16)
_BEFORE, _BEHIND = b"\x92", ormsgpack.packb(_SENTINEL)


def decode(value: memoryview) -> dict[str, Any]:
    """A value as a record. Raises FormatError."""
    try:
        record, behind = ormsgpack.unpackb(b"".join((_BEFORE, value, _BEHIND)), ext_hook=_extension)
    except (ValueError, OverflowError) as error:  # a time beyond the year 9999
        raise FormatError("InvalidMessagePack", f"the value is not MessagePack: {error}") from None
    if behind != _SENTINEL:
        raise FormatError("InvalidMessagePack", "the value is not MessagePack: more stands behind it")
    if type(record) is not dict:
        raise FormatError("NotAnObject", "the value is no map, which a record has to be")
    return record


def _extension(tag: int, data: bytes) -> str:
    if tag != _TIMESTAMP or len(data) not in (4, 8, 12):
        raise ValueError(f"extension type {tag} is not known")
    if len(data) == 4:
        return instant_text(int.from_bytes(data, "big"), 0)
    if len(data) == 8:
        both = int.from_bytes(data, "big")
        nanoseconds, seconds = both >> 34, both & (2**34 - 1)
    else:
        nanoseconds, seconds = int.from_bytes(data[:4], "big"), int.from_bytes(data[4:], "big", signed=True)
    if nanoseconds >= 10**9:
        raise ValueError("a timestamp with more than 999,999,999 nanoseconds")
    return instant_text(seconds * 10**9 + nanoseconds, 9)


def encode(output: Any) -> bytes:
    """One output; arrays, tensors and images as in JSON, bytes as they are, NaN as NaN.

    Raises:
        TypeError: it has no such form.
    """
    return ormsgpack.packb(output, _other, _ENCODE)


def _other(value: Any) -> Any:
    return bytes(value) if isinstance(value, bytearray | memoryview) else ensure_native_types(value)


class Envelope:
    """Wraps the results of a batch as ``codec.Envelope`` does, in MessagePack."""

    def __init__(self, task: str, backend_version: str | None = None) -> None:
        ours = {"task": task} if backend_version is None else {"task": task, "backend_version": backend_version}
        self._head = bytes([0x83 + len(ours)]) + ormsgpack.packb("result")
        self._tail = ormsgpack.packb(ours)[1:]  # without the head of a map of its own

    def wrap(
        self,
        results: Sequence[bytes],
        metrics: bytes,
        partition: tuple[str, int],
        offsets: Sequence[int],
        timestamps: Sequence[int],
    ) -> list[bytes]:
        """The envelopes of the encoded results of records of one partition; ``metrics`` are JSON."""
        topic, number = partition
        source = b"\x84" + b"".join(map(ormsgpack.packb, ("topic", topic, "partition", number, "offset")))
        parts = zip(
            repeat(self._head),
            results,
            repeat(
                b"".join(map(ormsgpack.packb, ("metrics", orjson.loads(metrics), "source"))) + source,
            ),
            map(ormsgpack.packb, offsets),
            repeat(ormsgpack.packb("timestamp")),
            map(ormsgpack.packb, timestamps),
            repeat(self._tail),
            strict=False,
        )
        return list(map(b"".join, parts))
