"""What the worker does with bytes: values to records on the way in, results to values on the way out. JSON's part.

Pure functions of their input, no I/O, no state beyond a task's compiled schemas. A record that cannot be decoded or
does not match its topic's schema becomes a ``Failure`` of its own; the others of its batch go on.

JSON is read strictly: no NaN or Infinity, no duplicate meanings, nesting to 1024 levels, UTF-8 only, and integers of 64
bits, since a decoder that silently turns a larger one into a float changes the user's data.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any

import jsonschema_rs
import numpy as np
import orjson

from streamproc.backend.normalize import ensure_native_types
from streamproc.formats.values import json_form
from streamproc.records import Cause, Failure

DIGITS_BEYOND_64_BITS = 19
MAX_MESSAGE_CHARS = 1_000
_ENCODE = orjson.OPT_SERIALIZE_NUMPY


class Schema:
    """A JSON Schema, compiled: that of a topic, or one of the schema registry."""

    def __init__(
        self, topic: str, schema: Any, *, retriever: Callable[[str], Any] | None = None, of: str | None = None
    ) -> None:
        """``retriever`` gives the schemas that it refers to; ``of`` says whose it is where it is no topic's."""
        self._of = of or f"topic {topic}"
        self._validator = jsonschema_rs.validator_for(schema, mask="its value", retriever=retriever)

    def check(self, record: dict[str, Any]) -> Failure | None:
        """Why the record does not match, or None; the message names the field and the rule, never the record's data."""
        try:
            if self._validator.is_valid(record):
                return None
        except ValueError:  # bytes, which no JSON has
            record = json_form(record)
            if self._validator.is_valid(record):
                return None
        error = next(iter(self._validator.iter_errors(record)))
        field = ".".join(str(part) for part in error.instance_path) or "the record"
        rule = "/".join(str(part) for part in error.schema_path)
        message = f"{field}: {error.message} (schema of {self._of}, at {rule})"
        return Failure(Cause.INVALID, "schema", "SchemaViolation", shorten(message))


def shorten(text: str) -> str:
    """A message of at most 1,000 characters that has a UTF-8 form, which half a surrogate pair has not."""
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= MAX_MESSAGE_CHARS else text[: MAX_MESSAGE_CHARS - 1] + "…"


def decode(
    values: Sequence[memoryview | None], payload: memoryview, max_value_bytes: int
) -> list[dict[str, Any] | Failure]:
    """Each value as a record, or why it is none; ``payload`` is the values' bytes joined."""
    records: list[Any]
    if len(payload) > max_value_bytes and any(value is not None and len(value) > max_value_bytes for value in values):
        return [_decode_small(value, max_value_bytes) for value in values]
    try:
        records = list(map(orjson.loads, values))  # type: ignore[arg-type]  # a null raises, and the slow path says which
        clean = set(map(type, records)) <= {dict}
    except ValueError:
        clean = False
    if not clean:
        records = [_decode_one(value) for value in values]
    if _has_long_digit_run(payload):
        for index, value in enumerate(values):
            if value is not None and not isinstance(records[index], Failure):
                failure = _check_integers(value)
                if failure is not None:
                    records[index] = failure
    return records


def _decode_small(value: memoryview | None, max_value_bytes: int) -> dict[str, Any] | Failure:
    """As ``decode``, for one value of a batch in which some are too large."""
    if value is None or len(value) <= max_value_bytes:
        return decode([value], value if value is not None else memoryview(b""), max_value_bytes)[0]
    return too_large(value, max_value_bytes)


def too_large(value: memoryview, max_value_bytes: int) -> Failure:
    """What a value becomes that is larger than its task takes."""
    message = (
        f"the value has {len(value)} bytes, more than the task's input.max_value_bytes allows ({max_value_bytes}); "
        f"raise it, or send less"
    )
    return undecodable("ValueTooLarge", message)


def _decode_one(value: memoryview | None) -> dict[str, Any] | Failure:
    if value is None:
        return undecodable("NullValue", "the value is null (a tombstone), not a JSON object")
    try:
        record = orjson.loads(value)
    except orjson.JSONDecodeError as error:
        return undecodable("InvalidJSON", shorten(f"the value is not JSON: {error}"))
    if type(record) is not dict:
        kind = {list: "an array", str: "a string", type(None): "null", bool: "a boolean"}.get(type(record), "a number")
        return undecodable("NotAnObject", f"the value is {kind}, not a JSON object")
    return record


def undecodable(kind: str, message: str) -> Failure:
    """What a value becomes that is no record."""
    return Failure(Cause.INVALID, "decode", kind, message)


def _has_long_digit_run(payload: memoryview) -> bool:
    """Whether 19 digits stand in a row. The payload is looked at by whole arrays, and closely only where it must be."""
    if len(payload) < DIGITS_BEYOND_64_BITS:
        return False
    content = np.frombuffer(payload, dtype=np.uint8)
    # Two neighbours among every ninth byte are digits in any such run.
    ninth = _are_digits(content[::9])
    at = np.flatnonzero(ninth[1:] & ninth[:-1]) * 9
    for between in range(1, 9):
        if not at.size:
            return False
        at = at[_are_digits(content[at + between])]
    # Ten digits each: times in milliseconds are long enough. A run of 19 around them begins nine earlier at most.
    window = at[:, np.newaxis] + np.arange(-9, 19)
    run = _are_digits(content[window.clip(0, len(content) - 1)]) & (window >= 0) & (window < len(content))
    for more in (1, 2, 4, 8, 3):  # digits from each place on: 2, 4, 8, 16, 19
        run = run[:, more:] & run[:, :-more]
    return bool(run.any())


def _are_digits(content: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return (content - 48) < 10


def _check_integers(value: memoryview) -> Failure | None:
    """Why an integer of the value is lost by decoding, or None."""
    try:
        json.loads(bytes(value), parse_int=_refuse_wide, parse_float=_ignore)
    except _WideInteger as wide:
        message = f"the value holds an integer of {wide.digits} digits, beyond 64 bits; send it as a string"
        return undecodable("IntegerTooLarge", message)
    except RecursionError:
        return undecodable("InvalidJSON", "the value is nested too deeply to be checked")
    return None


class _WideInteger(Exception):  # noqa: N818 - a signal between two functions, never seen outside
    def __init__(self, digits: int) -> None:
        self.digits = digits
        super().__init__(digits)


def _refuse_wide(text: str) -> None:
    digits = len(text.lstrip("-"))
    if digits > 20 or (digits >= DIGITS_BEYOND_64_BITS and not -(2**63) <= int(text) < 2**64):
        raise _WideInteger(digits)


def _ignore(text: str) -> None:  # noqa: ARG001 - the parser's hook; only the integers matter
    return None


def encode(output: Any) -> bytes:
    """One output record as JSON; NaN becomes null.

    Arrays, tensors and images are converted as ``ensure_native_types`` does.

    Raises:
        TypeError: the record holds something that has no JSON form.
    """
    try:
        return orjson.dumps(output, ensure_native_types, _ENCODE)
    except TypeError:
        # Slower, and only needed for keys that are not strings.
        return orjson.dumps(output, ensure_native_types, _ENCODE | orjson.OPT_NON_STR_KEYS)


def encode_all(outputs: Sequence[dict[Any, Any]]) -> list[bytes] | None:
    """Each output as ``encode`` gives it; None where that raises for one of them."""
    try:
        return [orjson.dumps(output, ensure_native_types, _ENCODE) for output in outputs]
    except BaseException:  # noqa: BLE001 - the user's own objects raise it again where somebody looks at one by one
        return None


class Envelope:
    """Wraps the results of a batch: result, metrics, source, task and, where it has one, the backend's version.

    The parts that a batch's records share are encoded once.
    """

    def __init__(self, task: str, backend_version: str | None = None) -> None:
        version = b"" if backend_version is None else b',"backend_version":' + orjson.dumps(backend_version)
        self._tail = b'},"task":' + orjson.dumps(task) + version + b"}"
        self._sources: dict[tuple[str, int], bytes] = {}

    def wrap(
        self,
        results: Sequence[bytes],
        metrics: bytes,
        partition: tuple[str, int],
        offsets: Sequence[int],
        timestamps: Sequence[int],
    ) -> list[bytes]:
        """The envelopes of the encoded results of records of one partition."""
        source = self._sources.get(partition)
        if source is None:
            topic, number = partition
            text = b',"source":{"topic":' + orjson.dumps(topic) + b',"partition":%d,"offset":' % number
            source = self._sources[partition] = text
        parts = zip(
            repeat(b'{"result":'),
            results,
            repeat(b',"metrics":' + metrics + source),
            _digits(offsets),
            repeat(b',"timestamp":'),
            _digits(timestamps),
            repeat(self._tail),
            strict=False,
        )
        return list(map(b"".join, parts))


def _digits(numbers: Sequence[int]) -> list[bytes]:
    # All in one call: formatting them one by one takes five times as long.
    return orjson.dumps(numbers)[1:-1].split(b",")
