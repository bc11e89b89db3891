"""What all formats share: errors of a value and of a schema, times as text, and a backend's output in plain values.

Invariant: whatever the format, a record holds what JSON could hold (objects whose keys are text, lists, text, numbers,
true, false, null), and bytes. So a backend need not know in which format its records came.
"""

from __future__ import annotations

import base64
import datetime
import decimal
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from streamproc.backend.normalize import ensure_native_types

MAX_DEPTH = 100
"""Levels of an output; a deeper one, or one that holds itself, is refused."""
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_DAY_S = 86_400
_TIME = re.compile(r"(\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))?")
_INSTANT = re.compile(r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d(?:\.\d{1,9})?)([Zz]|[+-]\d\d:\d\d)?")
_KEPT = (bytes, datetime.datetime, datetime.date, datetime.time, decimal.Decimal, uuid.UUID)


class FormatError(Exception):
    """One value is not what its format says; ``kind`` says why in a word, for metrics. Quotes nothing of the value."""

    def __init__(self, kind: str, message: str) -> None:
        self.kind = kind
        super().__init__(message)


class SchemaError(Exception):
    """A schema that the registry has cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class RegisteredSchema:
    """A schema of the registry; ``references`` are the texts of those it refers to, by name, dependencies first."""

    id: int
    kind: str
    """``AVRO``, ``PROTOBUF`` or ``JSON``."""
    text: str
    references: Mapping[str, str] = field(default_factory=dict)


class UnknownSchemaError(Exception):
    """The registry has no such schema."""


def instant_text(units: int, digits: int, suffix: str = "Z") -> str:
    """An instant as RFC 3339 text, from its units since 1970, ``10**digits`` of them a second.

    Raises:
        OverflowError: it is before the year 1 or after 9999.
    """
    seconds, rest = divmod(units, 10**digits)
    whole = _moved(seconds // _DAY_S, seconds % _DAY_S)
    return f"{whole:%Y-%m-%dT%H:%M:%S}".rjust(19, "0") + _fraction(rest, digits) + suffix


def instant_units(text: str, digits: int) -> int:
    """The units since 1970 of an RFC 3339 text; without an offset it counts as UTC. Raises ValueError."""
    found = _INSTANT.fullmatch(text)
    if found is None:
        raise ValueError("expected a time such as 2024-01-31T12:00:00Z")
    day, time, offset = str(found[1]), str(found[2]), found[3]
    seconds = (datetime.date.fromisoformat(day) - _EPOCH.date()).days * _DAY_S
    if offset and offset not in "Zz":
        sign = -1 if offset[0] == "-" else 1
        seconds -= sign * (int(offset[1:3]) * 3_600 + int(offset[4:]) * 60)
    return seconds * int(10**digits) + time_units(time, digits)


def time_text(units: int, digits: int) -> str:
    """A time of day as text, from its units since midnight. Raises OverflowError where there is no such time."""
    seconds, rest = divmod(units, 10**digits)
    if not 0 <= seconds < _DAY_S:
        raise OverflowError("no time of day")
    return f"{seconds // 3_600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}{_fraction(rest, digits)}"


def time_units(text: str, digits: int) -> int:
    """The units since midnight of a time of day; what is finer than a unit is cut. Raises ValueError."""
    found = _TIME.fullmatch(text)
    if found is None:
        raise ValueError("expected a time of day such as 12:00:00")
    fraction = found[4] or "0"
    whole = int(found[1]) * 3_600 + int(found[2]) * 60 + int(found[3])
    if whole >= _DAY_S:
        raise ValueError("expected a time of day before 24:00:00")
    return whole * int(10**digits) + int(fraction.ljust(digits, "0")[:digits] or "0")


def date_text(days: int) -> str:
    """A date as text, from its days since 1970. Raises OverflowError."""
    return _moved(days, 0).date().isoformat()


def date_days(text: str) -> int:
    """The days since 1970 of a date such as 2024-01-31. Raises ValueError."""
    return (datetime.date.fromisoformat(text) - _EPOCH.date()).days


def _moved(days: int, seconds: int) -> datetime.datetime:
    try:
        return _EPOCH + datetime.timedelta(days, seconds)
    except OverflowError:
        raise OverflowError("a time that is not of the years 1 to 9999") from None


def _fraction(rest: int, digits: int) -> str:
    return f".{rest:0{digits}}" if rest else ""


def plain(value: Any, depth: int = 0) -> Any:
    """A backend's output in plain Python values, bytes, times and decimals kept.

    Raises:
        TypeError: it holds what cannot be converted, or is nested too deeply.
    """
    if depth > MAX_DEPTH:
        raise TypeError(f"it is nested more than {MAX_DEPTH} levels deep")
    kind = type(value)
    if kind in (str, int, float, bool, type(None)) or isinstance(value, _KEPT):
        return value
    if isinstance(value, dict):
        return {key: plain(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(inner, depth + 1) for inner in value]
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    return ensure_native_types(value)


def json_form(value: Any) -> Any:
    """A record as JSON Schemas see it: bytes as base64 text."""
    if isinstance(value, dict):
        return {key: json_form(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [json_form(inner) for inner in value]
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


def samples_in(input_format: str, samples: list[Any]) -> list[Any]:
    """Sample records, which are JSON, as a task of this format has them: ``{"$base64": "…"}`` stands for bytes."""
    return samples if input_format == "json" else [_from_sample(sample) for sample in samples]


def _from_sample(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"$base64"} and isinstance(value["$base64"], str):
            try:
                return base64.b64decode(value["$base64"], validate=True)
            except ValueError:
                raise ValueError("a sample record holds $base64 that is not base64") from None
        return {key: _from_sample(inner) for key, inner in value.items()}
    return [_from_sample(inner) for inner in value] if isinstance(value, list) else value
