"""Lengths and arrival times of real records, from a capture file or a list of numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson

from streamproc.backend.paths import read_field
from streamproc.errors import StreamprocError
from streamproc.replay.capture_file import read_capture
from streamproc.simulation.streams import Stream


class LengthsError(StreamprocError):
    """A file does not say how long records are."""


def read_lengths(path: Path) -> list[int]:
    """One whole number a line; empty lines are left out. Raises LengthsError."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise LengthsError(f"{path}: cannot be read ({error})") from error
    lengths = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                lengths.append(int(line))
            except ValueError:
                raise LengthsError(f"{path}:{number}: {line.strip()[:40]!r} is no whole number") from None
            if lengths[-1] < 0:
                raise LengthsError(f"{path}:{number}: a length is not negative")
    return _some(path, lengths)


def read_captured(path: Path, field: str | None) -> Stream:
    """The records of a capture, by their timestamps: a field's length, or without one the bytes of the value.

    A text is as long as its characters, a list as its elements, and a number says it itself. A record whose timestamp
    is before that of an earlier one arrives with it.

    Raises:
        CaptureFileError: the file is no capture.
        LengthsError: a record has no such field, or it has no length.
    """
    lengths, arrivals_s, begin_ms, now_ms = [], [], None, 0
    for record in read_capture(path):
        value = record.value or b""
        if field is None:
            lengths.append(len(value))
        else:
            place = f"{path}: {record.topic}[{record.partition}] at offset {record.offset}"
            lengths.append(_length_of(value, field, place))
        begin_ms = record.timestamp if begin_ms is None else begin_ms
        now_ms = max(now_ms, record.timestamp - begin_ms)
        arrivals_s.append(now_ms / 1_000)
    return Stream(arrivals_s, _some(path, lengths))


def _length_of(value: bytes, field: str, place: str) -> int:
    try:
        found: Any = read_field(orjson.loads(value), field, ".")
    except (orjson.JSONDecodeError, TypeError):
        raise LengthsError(f"{place}: the value is no JSON object, so that it has no field {field}") from None
    if isinstance(found, str | list):
        return len(found)
    if isinstance(found, int) and not isinstance(found, bool) and found >= 0:
        return found
    raise LengthsError(f"{place}: field {field} is {str(found)[:40]}, which is neither a text, a list nor a length")


def _some(path: Path, lengths: list[int]) -> list[int]:
    if not lengths:
        raise LengthsError(f"{path}: there is no record in it")
    return lengths
