"""How a value says which schema it was written with, as Confluent's serializers have it.

byte 0          0, the magic byte
bytes 1 to 4    the schema's id in the registry, big-endian
then            of Protobuf only, which message of the schema: a count and as many indexes, zigzag; one 0 for the first
then            the value itself
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from streamproc.formats.values import FormatError

_HEADER = struct.Struct(">BI")
_MAX_INDEXES = 32
"""Levels of nested messages; protoc allows as many."""


def split(value: memoryview) -> tuple[int, memoryview]:
    """The id of a value's schema, and what stands behind it. Raises FormatError."""
    if len(value) < _HEADER.size or value[0] != 0:
        raise FormatError(
            "NoSchemaId",
            "the value does not begin with 0 and a schema's id, as what was written with a schema registry does",
        )
    return _HEADER.unpack_from(value)[1], value[_HEADER.size :]


def header(schema_id: int) -> bytes:
    """What a value of this schema begins with."""
    return _HEADER.pack(0, schema_id)


def split_indexes(body: memoryview) -> tuple[tuple[int, ...], memoryview]:
    """Which message of a Protobuf schema a value is, from the outermost in, and the message. Raises FormatError."""
    count, at = _zigzag(body, 0)
    if count == 0:
        return (0,), body[at:]
    if not 0 < count <= _MAX_INDEXES:
        raise FormatError("NoMessageIndex", "the value does not say which message of its schema it is")
    indexes = []
    for _ in range(count):
        index, at = _zigzag(body, at)
        indexes.append(index)
    return tuple(indexes), body[at:]


def indexes_header(indexes: Sequence[int]) -> bytes:
    """The indexes as a value has them."""
    if tuple(indexes) == (0,):
        return b"\0"
    return b"".join(map(_varint, (len(indexes), *indexes)))


def _varint(number: int) -> bytes:
    rest, encoded = number << 1, bytearray()
    while rest > 127:
        encoded.append(rest & 127 | 128)
        rest >>= 7
    return bytes((*encoded, rest))


def _zigzag(data: memoryview, at: int) -> tuple[int, int]:
    number = shift = 0
    while shift < 35 and at < len(data):
        byte = data[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number >> 1 ^ -(number & 1), at
        shift += 7
    raise FormatError("NoMessageIndex", "the value does not say which message of its schema it is")
