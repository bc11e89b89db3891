"""What a record is padded by, from its value: a field's length, or what the backend's function answers.

Runs in the measuring process, never in the parent. A record that has no such length fails by itself; a value that no
worker would take (it is no record, or too large) has length 0, and the worker says what is wrong with it.

The function is the user's: whatever it raises fails the record that it was asked about.
"""

from __future__ import annotations

import operator
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import orjson

from streamproc.backend.paths import read_field
from streamproc.backend.tasks import MultiTaskBackend, resolve_task
from streamproc.errors import InferenceBackendLoadError, RegistryError, name_of_type, text_of
from streamproc.formats.values import FormatError
from streamproc.runtime.codec import shorten
from streamproc.runtime.decoders import DecodeOne, decode_one_for
from streamproc.runtime.wire import MAX_LENGTH, UNMEASURED

if TYPE_CHECKING:
    from streamproc.formats.registry import Registry

LengthOf = Callable[[dict[str, Any]], object]

_TYPES = {"characters": str, "bytes": str, "items": list}
_NEEDED = {"characters": "a text", "bytes": "a text", "items": "a list", "value": "a number"}
_KINDS = {
    bytes: "bytes",
    str: "a text",
    list: "a list",
    dict: "an object",
    bool: "true or false",
    int: "a number",
    float: "a number",
}


class LengthError(Exception):
    """A record has no length; ``kind`` says why in a word, for metrics."""

    def __init__(self, kind: str, message: str) -> None:
        self.kind = kind
        super().__init__(message)


def checked(length: object, what: str) -> int:
    """A length as an integer from 0 to 2^40; ``what`` was measured, for sentences. Raises LengthError."""
    if type(length) is not int:
        if isinstance(length, bool) or not hasattr(length, "__index__"):
            raise LengthError("NotAnInteger", f"{what} is no integer, but of type {name_of_type(length)}")
        length = operator.index(length)
    if not 0 <= length <= MAX_LENGTH:
        raise LengthError("NotALength", f"{what} is {'negative' if length < 0 else 'beyond 2^40'}")
    return length


def of_field(field: str, unit: str) -> LengthOf:
    """The length of a field, by a unit of ``batch.length``: characters, bytes, items or value."""

    def length(record: dict[str, Any]) -> object:
        value = read_field(record, field, ".")
        if unit == "value":
            if value is not None:
                return value
        elif unit == "bytes" and type(value) is bytes:
            return len(value)
        elif type(value) is _TYPES[unit]:
            return len(value.encode("utf-8", "surrogatepass") if unit == "bytes" else value)
        if value is None:
            raise LengthError("MissingField", f"the record has no field {field}, or null in it")
        raise LengthError("WrongType", f"the field {field} is {_KINDS[type(value)]}, not {_NEEDED[unit]}")

    return length


def of_backend(backend: object, task: str) -> LengthOf:
    """The method ``length`` of what serves the task: a plain backend's, or the task's own, or else that of its backend.

    Raises:
        InferenceBackendLoadError: there is none.
    """
    serving = resolve_task(backend, task)
    places = [serving, backend] if isinstance(backend, MultiTaskBackend) else [serving]
    for place in places:
        length = getattr(place, "length", None)
        if callable(length):
            found: LengthOf = length
            return found
    names = " nor ".join(type(place).__name__ for place in places)
    raise InferenceBackendLoadError(
        f"tasks.{task}.batch.length is backend, but {'neither ' if len(places) > 1 else ''}{names} has"
        f"{'' if len(places) > 1 else ' no'} method length(record); define it, or measure a field"
    )


class Meter:
    """Measures the records of one task."""

    def __init__(
        self, length_of: LengthOf, what: str, max_value_bytes: int, decode_one: DecodeOne = orjson.loads
    ) -> None:
        """``what`` is measured, for sentences: ``the field text``; ``decode_one`` is the task's."""
        self._length_of = length_of
        self._what = what
        self._max_value_bytes = max_value_bytes
        self._decode_one = decode_one

    def measure(self, values: Sequence[memoryview | None]) -> tuple[array[int], list[tuple[str, str, BaseException]]]:
        """The length of each record, and for each that has none (``UNMEASURED``) kind, sentence and exception."""
        return self.measure_records(map(self._record, values), len(values))

    def _record(self, value: memoryview | None) -> object:
        if value is None or len(value) > self._max_value_bytes:
            return None
        try:
            return self._decode_one(value)
        except (ValueError, FormatError, RegistryError):
            return None  # the worker meets it too, and says so

    def measure_records(
        self, records: Iterable[object], count: int
    ) -> tuple[array[int], list[tuple[str, str, BaseException]]]:
        """As ``measure``, of ``count`` records that are decoded."""
        lengths = array("q", bytes(8 * count))
        failures: list[tuple[str, str, BaseException]] = []
        for index, record in enumerate(records):
            if type(record) is not dict:
                continue
            try:
                lengths[index] = checked(self._length_of(record), self._what)
            except LengthError as error:
                lengths[index] = UNMEASURED
                failures.append((error.kind, shorten(str(error)), error))
            except BaseException as error:  # noqa: BLE001 - cancellations and exits of the user's are no end of ours
                lengths[index] = UNMEASURED
                message = shorten(f"{self._what} raised {name_of_type(error)}: {text_of(error)}")
                failures.append((name_of_type(error), message, error))
        return lengths, failures


def meter_for(setup: Mapping[str, Any], backend: object, task: str, registry: Registry | None = None) -> Meter:
    """Measures a task's records as ``startup.length_setup`` says; ``backend`` is needed for its own lengths only.

    Raises:
        InferenceBackendLoadError: the backend has none.
    """
    if setup["of"] == "field":
        length_of, what = of_field(setup["field"], setup["unit"]), f"the field {setup['field']}"
    else:
        length_of = of_backend(backend, task)
        what = f"length() of {type(getattr(length_of, '__self__', backend)).__name__}"
    return Meter(length_of, what, setup["max_value_bytes"], decode_one_for(setup["input_format"], registry))
