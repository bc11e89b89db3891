"""Avro: values to records, and outputs to values, by schemas of the registry.

Reading is ours, and strict: fastavro's reader follows a value into any depth, beyond the end of the C stack, allocates
whatever a count announces, and takes an index before the first for one from the end. Here a value of a worker's bytes
can do no more than fail. Writing is fastavro's, which is given the user's own data.

A record is read by the schema that it was written with, no other. What JSON has no value for becomes text: decimals
(``"12.50"``), dates, times, timestamps (RFC 3339, UTC) and UUIDs; bytes and fixed stay bytes. When written, such text
is taken as well as Python's own types.
"""

from __future__ import annotations

import decimal
import io
import struct
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import fastavro
import orjson
from fastavro.schema import SchemaParseException, UnknownType
from fastavro.write import LOGICAL_WRITERS

from streamproc.formats.values import (
    FormatError,
    SchemaError,
    date_days,
    date_text,
    instant_text,
    instant_units,
    plain,
    time_text,
    time_units,
)

Read = Callable[[bytes, int], tuple[Any, int]]

_DOUBLE, _FLOAT = struct.Struct("<d"), struct.Struct("<f")
_OURS = "streamproc-"
_MAX_DECIMAL_BYTES = 4_096
"""A decimal of 10,000 digits; turning bytes into digits takes time by their square."""


# -- reading


def _long(data: bytes, at: int) -> tuple[int, int]:
    byte = data[at]
    at += 1
    if byte < 128:
        return byte >> 1 ^ -(byte & 1), at
    number, shift = byte & 127, 7
    while True:
        byte = data[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128:
            if number >= 2**64:
                raise ValueError("a number of more than 64 bits")
            return number >> 1 ^ -(number & 1), at
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _int(data: bytes, at: int) -> tuple[int, int]:
    number, at = _long(data, at)
    if not -(2**31) <= number < 2**31:
        raise ValueError("an int of more than 32 bits")
    return number, at


def _null(data: bytes, at: int) -> tuple[None, int]:  # noqa: ARG001 - takes no bytes
    return None, at


def _boolean(data: bytes, at: int) -> tuple[bool, int]:
    if data[at] > 1:
        raise ValueError("a boolean that is neither 0 nor 1")
    return data[at] == 1, at + 1


def _float(data: bytes, at: int) -> tuple[float, int]:
    return _FLOAT.unpack_from(data, at)[0], at + 4


def _double(data: bytes, at: int) -> tuple[float, int]:
    return _DOUBLE.unpack_from(data, at)[0], at + 8


def _bytes(data: bytes, at: int) -> tuple[bytes, int]:
    size, at = _long(data, at)
    end = at + size
    if size < 0 or end > len(data):
        raise IndexError
    return data[at:end], end


def _string(data: bytes, at: int) -> tuple[str, int]:
    value, at = _bytes(data, at)
    return value.decode(), at


_PRIMITIVES: dict[str, Read] = {
    "null": _null,
    "boolean": _boolean,
    "int": _int,
    "long": _long,
    "float": _float,
    "double": _double,
    "bytes": _bytes,
    "string": _string,
}


def _instant(digits: int, suffix: str) -> Callable[[int], str]:
    return lambda units: instant_text(units, digits, suffix)


_INSTANTS = [
    (f"long-{local}timestamp-{name}", digits, "" if local else "Z")
    for name, digits in (("millis", 3), ("micros", 6), ("nanos", 9))
    for local in ("", "local-")
]
_LOGICAL: dict[str, Callable[[int], str]] = {
    "int-date": date_text,
    "int-time-millis": lambda units: time_text(units, 3),
    "long-time-micros": lambda units: time_text(units, 6),
    **{logical: _instant(digits, suffix) for logical, digits, suffix in _INSTANTS},
}


class _Compiler:
    """Makes a reader of a parsed schema; named types may refer to each other, and to themselves."""

    def __init__(self) -> None:
        self._named: dict[str, Read] = {}
        self._complex: dict[str, Callable[[Any], Read]] = {
            "record": self._record,
            "error": self._record,
            "enum": lambda schema: self._known(schema, self._enum(schema["symbols"])),
            "array": lambda schema: self._array(self.reader(schema["items"])),
            "map": lambda schema: self._map(self.reader(schema["values"])),
            "fixed": lambda schema: self._known(schema, self._logical(schema, self._fixed(schema["size"]))),
        }

    def reader(self, schema: Any) -> Read:
        """What reads values of a schema, as ``fastavro.parse_schema`` gives it."""
        if isinstance(schema, list):
            return self._union(schema)
        if isinstance(schema, str):
            return _PRIMITIVES.get(schema) or self._later(schema)
        kind = schema["type"]
        if not isinstance(kind, str):
            return self.reader(kind)
        if kind in self._complex:
            return self._complex[kind](schema)
        read = _PRIMITIVES.get(kind)
        return self._later(kind) if read is None else self._logical(schema, read)

    def _known(self, schema: Any, read: Read) -> Read:
        self._named[schema["name"]] = read
        return read

    def _later(self, name: str) -> Read:
        """A named type, which may be the one that is being compiled."""
        named = self._named

        def read(data: bytes, at: int) -> tuple[Any, int]:
            return named[name](data, at)

        return named.get(name) or read

    def _record(self, schema: Any) -> Read:
        fields: list[tuple[str, Read]] = []

        def read(data: bytes, at: int) -> tuple[dict[str, Any], int]:
            record: dict[str, Any] = {}
            for name, read_field in fields:
                record[name], at = read_field(data, at)
            return record, at

        self._known(schema, read)
        fields += [(field["name"], self.reader(field["type"])) for field in schema["fields"]]
        return read

    def _union(self, branches: list[Any]) -> Read:
        readers = [self.reader(branch) for branch in branches]

        def read(data: bytes, at: int) -> tuple[Any, int]:
            index, at = _long(data, at)
            if not 0 <= index < len(readers):
                raise ValueError("a union's branch that its schema does not have")
            return readers[index](data, at)

        return read

    @staticmethod
    def _enum(symbols: list[str]) -> Read:
        def read(data: bytes, at: int) -> tuple[str, int]:
            index, at = _long(data, at)
            if not 0 <= index < len(symbols):
                raise ValueError("an enum's symbol that its schema does not have")
            return symbols[index], at

        return read

    @staticmethod
    def _fixed(size: int) -> Read:
        def read(data: bytes, at: int) -> tuple[bytes, int]:
            if at + size > len(data):
                raise IndexError
            return data[at : at + size], at + size

        return read

    @staticmethod
    def _array(read_item: Read) -> Read:
        def read(data: bytes, at: int) -> tuple[list[Any], int]:
            values: list[Any] = []
            while True:
                count, at = _block(data, at)
                if not count:
                    return values, at
                before = at
                for _ in range(count):
                    value, at = read_item(data, at)
                    values.append(value)
                if at - before < count:
                    # Counted before, in _block: not more than the bytes that are left. But items of nothing, nested,
                    # would be the square of that.
                    raise ValueError("an array whose items take no bytes")

        return read

    @staticmethod
    def _map(read_value: Read) -> Read:
        def read(data: bytes, at: int) -> tuple[dict[str, Any], int]:
            values: dict[str, Any] = {}
            while True:
                count, at = _block(data, at)
                if not count:
                    return values, at
                for _ in range(count):
                    key, at = _string(data, at)
                    values[key], at = read_value(data, at)

        return read

    @staticmethod
    def _logical(schema: Any, read: Read) -> Read:
        logical, kind = schema.get("logicalType"), schema["type"]
        if logical == "decimal" and kind in ("bytes", "fixed"):
            scale = schema.get("scale", 0)

            def read_decimal(data: bytes, at: int) -> tuple[str, int]:
                value, at = read(data, at)
                return _decimal_text(value, scale), at

            return read_decimal
        if logical == "uuid" and kind == "fixed" and schema["size"] == 16:

            def read_uuid(data: bytes, at: int) -> tuple[str, int]:
                value, at = read(data, at)
                return str(uuid.UUID(bytes=value)), at

            return read_uuid
        text_of = _LOGICAL.get(f"{kind}-{logical}")
        if text_of is None:
            return read

        def read_text(data: bytes, at: int) -> tuple[str, int]:
            number, at = read(data, at)
            return text_of(number), at

        return read_text


def _block(data: bytes, at: int) -> tuple[int, int]:
    """The items of a block of an array or map; 0 at the end."""
    count, at = _long(data, at)
    if count < 0:
        size, at = _long(data, at)
        if not 0 <= size <= len(data) - at:
            raise IndexError
        count = -count
    if count > len(data) - at:
        raise IndexError  # each takes a byte at least
    return count, at


def _decimal_text(value: bytes, scale: int) -> str:
    if len(value) > _MAX_DECIMAL_BYTES:
        raise ValueError("a decimal of more than 4,096 bytes")
    unscaled = int.from_bytes(value, "big", signed=True)
    with decimal.localcontext(prec=decimal.MAX_PREC):
        return f"{decimal.Decimal(unscaled).scaleb(-scale):f}"


class AvroReader:
    """Reads values of one schema."""

    def __init__(self, schema: str, references: Mapping[str, str]) -> None:
        """``references`` are the texts of the schemas that this one refers to, dependencies first.

        Raises:
            SchemaError: it cannot be used.
        """
        compiler = _Compiler()
        named: dict[str, Any] = {}
        try:
            for text in references.values():
                compiler.reader(fastavro.parse_schema(_loaded(text), named))
            self._read = compiler.reader(fastavro.parse_schema(_loaded(schema), named))
        except (SchemaParseException, UnknownType, KeyError, TypeError, ValueError, RecursionError) as error:
            raise SchemaError(f"it is no Avro schema: {error}") from None

    def decode(self, body: memoryview) -> dict[str, Any]:
        """A record. Raises FormatError."""
        data = bytes(body)
        try:
            record, at = self._read(data, 0)
        except (IndexError, struct.error):
            raise FormatError("InvalidAvro", "the value ends before its Avro schema does") from None
        except (ValueError, OverflowError) as error:
            raise FormatError("InvalidAvro", f"the value is not what its Avro schema says: {error}") from None
        except RecursionError:
            raise FormatError("InvalidAvro", "the value is nested too deeply") from None
        if at != len(data):
            raise FormatError("InvalidAvro", f"{len(data) - at} bytes stand behind what its Avro schema says")
        if type(record) is not dict:
            raise FormatError("NotAnObject", "the value's Avro schema is no record")
        return record


def _loaded(text: str) -> Any:
    # A primitive may stand there without quotes.
    return text if text in _PRIMITIVES else orjson.loads(text)


# -- writing


def _or_text(of_text: Callable[[str], Any], logical: str) -> Callable[[Any, Any], Any]:
    """What fastavro has for a logical type, and before it the conversion of text."""
    own = LOGICAL_WRITERS.get(logical)

    def prepare(value: Any, schema: Any) -> Any:
        if isinstance(value, str):
            return of_text(value)
        return value if own is None else own(value, schema)

    return prepare


def _units(digits: int) -> Callable[[str], int]:
    return lambda text: instant_units(text, digits)


def _decimal_writer(logical: str) -> Callable[[Any, Any], Any]:
    own = LOGICAL_WRITERS[logical]

    def prepare(value: Any, schema: Any) -> Any:
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            value = decimal.Decimal(str(value))
        return own(value, schema)

    return prepare


# Under names of our own, since a backend may use fastavro too: it keeps these functions by name for all of a process.
LOGICAL_WRITERS.update(
    {
        f"int-{_OURS}date": _or_text(date_days, "int-date"),
        f"int-{_OURS}time-millis": _or_text(lambda text: time_units(text, 3), "int-time-millis"),
        f"long-{_OURS}time-micros": _or_text(lambda text: time_units(text, 6), "long-time-micros"),
        f"bytes-{_OURS}decimal": _decimal_writer("bytes-decimal"),
        f"fixed-{_OURS}decimal": _decimal_writer("fixed-decimal"),
        f"string-{_OURS}uuid": _or_text(str, "string-uuid"),
        f"fixed-{_OURS}uuid": _or_text(lambda text: uuid.UUID(text).bytes, "fixed-uuid"),
        **{
            logical.replace("long-", f"long-{_OURS}", 1): _or_text(_units(digits), logical)
            for logical, digits, _ in _INSTANTS
        },
    }
)


def _renamed(schema: Any) -> Any:
    """The schema with our names for its logical types, where we convert them."""
    if isinstance(schema, list):
        return [_renamed(branch) for branch in schema]
    if not isinstance(schema, dict):
        return schema
    renamed = {key: _renamed(value) if key in ("type", "items", "values") else value for key, value in schema.items()}
    if isinstance(schema.get("fields"), list):
        renamed["fields"] = [_renamed(field) for field in schema["fields"]]
    logical = schema.get("logicalType")
    if f"{schema.get('type')}-{_OURS}{logical}" in LOGICAL_WRITERS:
        renamed["logicalType"] = f"{_OURS}{logical}"
    return renamed


class AvroWriter:
    """Writes values of one schema."""

    def __init__(self, schema: str, references: Mapping[str, str]) -> None:
        """As an ``AvroReader``'s."""
        named: dict[str, Any] = {}
        try:
            for text in references.values():
                fastavro.parse_schema(_renamed(_loaded(text)), named)
            self._schema = fastavro.parse_schema(_renamed(_loaded(schema)), named)
        except (SchemaParseException, UnknownType, KeyError, TypeError, ValueError, RecursionError) as error:
            raise SchemaError(f"it is no Avro schema: {error}") from None

    def encode(self, output: Any) -> bytes:
        """An output. Raises TypeError or ValueError where the schema does not allow it."""
        buffer = io.BytesIO()
        try:
            fastavro.schemaless_writer(buffer, self._schema, plain(output), strict_allow_default=True)
        except (TypeError, ValueError):
            raise
        except Exception as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        return buffer.getvalue()
