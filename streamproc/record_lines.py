"""Records as lines of JSON: what ``consume`` writes and ``produce`` reads. Pure functions.

A value that is JSON stands for itself. Everything else is wrapped, so that a line is always JSON and nothing is lost:
``{"$text": "..."}`` for UTF-8 that is no JSON, ``{"$base64": "..."}`` for other bytes, ``null`` for no value at all.
Keys and header values are JSON strings, wrapped where they are no UTF-8.

Invariants:

- ``read_full(write_full(record))`` has the record's key, headers and timestamp, byte for byte, and a value that is the
  same JSON (white space and the spelling of numbers aside) or the same bytes.
- ``read_exact(write_exact(record))`` is the record, byte for byte. So the lines of a capture file are written and read.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson

from streamproc.records import TopicRecord

TEXT = "$text"
BASE64 = "$base64"
_BEFORE_VALUE = b',"value":'


@dataclass(frozen=True, slots=True)
class Line:
    """A record to write: what a line says of it."""

    value: bytes | None
    key: bytes | None = None
    timestamp: int | None = None
    headers: Sequence[tuple[str, bytes | None]] = ()


class PlacedRecord(NamedTuple):
    """A record and where it was read from; it has the attributes of ``records.Record``."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes | None]]


class LineError(ValueError):
    """A line is not what it should be; the message quotes nothing of it."""


def write_value(record: TopicRecord) -> bytes:
    """A record's value as one line."""
    return _value(record.value)


def write_full(record: TopicRecord) -> bytes:
    """A record with its place, key, headers and timestamp as one line; the value comes last, for people."""
    return _placed(record, _value(record.value))


def write_exact(record: TopicRecord) -> bytes:
    """As ``write_full``, but JSON on several lines is wrapped, so that every value comes back byte for byte."""
    value = record.value
    if value is not None and (b"\n" in value or b"\r" in value):
        return _placed(record, orjson.dumps(_wrapped(value)))
    return _placed(record, _value(value))


def _placed(record: TopicRecord, value: bytes) -> bytes:
    return orjson.dumps(
        {
            "topic": record.topic,
            "partition": record.partition,
            "offset": record.offset,
            "timestamp": record.timestamp,
            "key": _text(record.key),
            "headers": [[name, _text(value)] for name, value in record.headers],
            "value": orjson.Fragment(value),
        }
    )


def read_value(line: bytes) -> Line:
    """A line whose JSON is the value. Raises LineError."""
    document = _checked(line)
    if type(document) is dict and (TEXT in document or BASE64 in document) and len(document) == 1:
        return Line(_unwrap(document, "the line"))
    return Line(None if document is None else line.strip())


def read_keyed(line: bytes, field: str) -> Line:
    """As ``read_value``, with a field's value as the key: text as it is, other values as JSON. Raises LineError."""
    document = _checked(line)
    found: Any = document
    for name in field.split("."):
        if type(found) is not dict or name not in found:
            raise LineError(f"has no field {field} to take the key from")
        found = found[name]
    key = None if found is None else found.encode() if isinstance(found, str) else orjson.dumps(found)
    return Line(line.strip(), key)


def read_full(line: bytes) -> Line:
    """A line as ``write_full`` writes it; topic, partition and offset are where it came from. Raises LineError."""
    _checked(line)
    document = json.loads(line)  # unlike orjson's, its integers have no limit: the value goes through unchanged
    if type(document) is not dict or "value" not in document:
        raise LineError('has no "value": it is no record as `streamproc consume --full` writes them')
    timestamp = document.get("timestamp")
    if timestamp is not None and type(timestamp) is not int:
        raise LineError('"timestamp" is not a whole number of milliseconds')
    headers = _headers(document.get("headers") or [])
    value = document["value"]
    encoded: bytes | None
    if type(value) is dict and len(value) == 1 and (TEXT in value or BASE64 in value):
        encoded = _unwrap(value, '"value"')
    else:
        encoded = None if value is None else json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    return Line(encoded, _bytes(document.get("key"), '"key"'), timestamp, headers)


def read_exact(line: bytes) -> PlacedRecord:
    """A line as ``write_exact`` writes it. Raises LineError.

    The value is taken from the line as it stands there. A line whose value does not come last is read as ``read_full``
    does it.
    """
    at = line.find(_BEFORE_VALUE)
    raw = line[at + len(_BEFORE_VALUE) :].rstrip()
    if at < 0 or raw[-1:] != b"}":
        return _read_any(line)
    try:
        # Where both are JSON, what was found is the name of the value, and not within a header or the value of another.
        placed = orjson.loads(line[:at] + b"}")
        document = orjson.loads(raw[:-1])
    except orjson.JSONDecodeError:
        return _read_any(line)
    if "value" in placed:
        return _read_any(line)
    if document is None:
        value = None
    elif type(document) is dict and len(document) == 1 and (TEXT in document or BASE64 in document):
        value = _unwrap(document, '"value"')
    else:
        value = raw[:-1]
    return _with_place(placed, value)


def _read_any(line: bytes) -> PlacedRecord:
    """As ``read_exact``, of any line: also those that a person has edited."""
    plain = read_full(line)
    return _with_place(json.loads(line), plain.value)


def _with_place(placed: Any, value: bytes | None) -> PlacedRecord:
    try:
        topic, partition, offset, timestamp = (
            placed["topic"],
            placed["partition"],
            placed["offset"],
            placed["timestamp"],
        )
    except KeyError as error:
        raise LineError(f"has no {error.args[0]!r}: it is no record of a capture file") from None
    if type(topic) is not str:
        raise LineError('"topic" is no text')
    if not type(partition) is type(offset) is type(timestamp) is int or partition < 0 or offset < 0:
        raise LineError('"partition", "offset" and "timestamp" are not whole numbers')
    key, listed = placed.get("key"), placed.get("headers")
    return PlacedRecord(
        topic,
        partition,
        offset,
        timestamp,
        key.encode() if type(key) is str else _bytes(key, '"key"'),
        value,
        _headers(listed) if listed else [],
    )


def _headers(listed: Any) -> list[tuple[str, bytes | None]]:
    pairs = list(listed.items()) if isinstance(listed, dict) else listed
    if type(pairs) is not list or not all(_is_pair(pair) for pair in pairs):
        raise LineError('"headers" is not a list of [name, value] pairs')
    return [(name, _bytes(header, '"headers"')) for name, header in pairs]


def _checked(line: bytes) -> Any:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise LineError(f"is not JSON ({error.msg} at column {error.colno})") from None


def _value(value: bytes | None) -> bytes:
    if value is None:
        return b"null"
    try:
        document = orjson.loads(value)
    except orjson.JSONDecodeError:
        return orjson.dumps(_wrapped(value))
    if document is None or (type(document) is dict and len(document) == 1 and (TEXT in document or BASE64 in document)):
        return orjson.dumps(_wrapped(value))  # what would be read back as something else
    # JSON's strings hold no raw line breaks, so these stand between tokens.
    return value.replace(b"\r", b" ").replace(b"\n", b" ") if b"\n" in value or b"\r" in value else value


def _wrapped(value: bytes) -> dict[str, str]:
    try:
        return {TEXT: value.decode()}
    except UnicodeDecodeError:
        return {BASE64: base64.b64encode(value).decode()}


def _text(value: bytes | None) -> str | dict[str, str] | None:
    if value is None:
        return None
    wrapped = _wrapped(value)
    return wrapped.get(TEXT, wrapped)


def _bytes(text: Any, what: str) -> bytes | None:
    if text is None:
        return None
    if isinstance(text, str):
        return text.encode()
    return _unwrap(text, what)


def _unwrap(wrapped: Any, what: str) -> bytes:
    if type(wrapped) is dict and isinstance(wrapped.get(TEXT), str):
        return str(wrapped[TEXT]).encode()
    if type(wrapped) is dict and isinstance(wrapped.get(BASE64), str):
        try:
            return base64.b64decode(wrapped[BASE64], validate=True)
        except (binascii.Error, ValueError):
            raise LineError(f"{what} holds {BASE64} that is not base64") from None
    raise LineError(f'{what} is neither text nor {{"{BASE64}": "..."}}')


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str)
