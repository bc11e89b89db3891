"""From a task's input format to what decodes its values, in the worker and in the measuring process.

JSON is the ``codec``'s; the modules of the other formats are imported where a task has them. A value that is not what
its format says becomes a ``Failure`` of its own, as with JSON; that a schema cannot be had is nobody's fault among the
records, and is raised.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import orjson

from streamproc.formats.confluent import split, split_indexes
from streamproc.formats.values import FormatError, RegisteredSchema, SchemaError, UnknownSchemaError
from streamproc.records import Failure
from streamproc.runtime.codec import Schema, decode, shorten, too_large, undecodable

if TYPE_CHECKING:
    from streamproc.formats.registry import Registry

Decoded = dict[str, Any] | Failure
Decode = Callable[[Sequence[memoryview | None], memoryview], list[Decoded]]
"""Each value as a record, or why it is none; the second argument is the values' bytes joined. Raises RegistryError."""
DecodeOne = Callable[[memoryview], Any]

log = logging.getLogger(__name__)


def registry_of(setup: Mapping[str, Any] | None) -> Registry | None:
    """The registry that ``startup.registry_setup`` tells of, if there is one."""
    if setup is None:
        return None
    from streamproc.formats.registry import Registry  # noqa: PLC0415 - HTTP and TLS, which others do without

    return Registry(**setup)


def decoder_for(input_format: str, max_value_bytes: int, registry: Registry | None = None) -> Decode:
    """What decodes the values of a task. The formats of a schema registry need one."""
    if input_format == "json":
        return partial(decode, max_value_bytes=max_value_bytes)
    decode_one = decode_one_for(input_format, registry)
    return partial(_decode_each, decode_one=decode_one, max_value_bytes=max_value_bytes)


def decode_one_for(input_format: str, registry: Registry | None = None) -> DecodeOne:
    """What decodes one value of a task; a record is a dict. Raises ValueError, FormatError or RegistryError then."""
    if input_format == "json":
        return orjson.loads
    if input_format == "raw":
        return _raw
    if input_format == "msgpack":
        from streamproc.formats import msgpack  # noqa: PLC0415 - a package that only some have

        return msgpack.decode
    if registry is None:
        raise ValueError(f"{input_format} needs a schema registry")
    return {"avro": _avro, "protobuf": _protobuf, "json_schema": _json_schema}[input_format](registry)


def _decode_each(
    values: Sequence[memoryview | None],
    payload: memoryview,  # noqa: ARG001 - of use to JSON alone
    *,
    decode_one: DecodeOne,
    max_value_bytes: int,
) -> list[Decoded]:
    records: list[Decoded] = []
    for value in values:
        if value is None:
            records.append(undecodable("NullValue", "the value is null (a tombstone), and is no record"))
        elif len(value) > max_value_bytes:
            records.append(too_large(value, max_value_bytes))
        else:
            try:
                records.append(decode_one(value))
            except FormatError as error:
                records.append(undecodable(error.kind, shorten(str(error))))
    return records


def _raw(value: memoryview) -> Decoded:
    # A copy, as JSON's text is one: the view's memory is the next batch's.
    return {"value": bytes(value)}


class _Schemas:
    """The schemas of values by their ids, each made ready once."""

    def __init__(
        self, registry: Registry, kind: str, make: Callable[[RegisteredSchema], Any], *, serialized: bool = False
    ) -> None:
        self._registry = registry
        self._kind = kind
        self._make = make
        self._serialized = serialized
        self._made: dict[int, Any] = {}

    def of(self, schema_id: int) -> Any:
        """What was made of the schema of this id. Raises FormatError where there is none of use, or RegistryError."""
        found = self._made.get(schema_id)
        if found is None:
            found = self._make_ready(schema_id)
        if isinstance(found, FormatError):
            raise found
        return found

    def _make_ready(self, schema_id: int) -> Any:
        try:
            schema = self._registry.by_id(schema_id, serialized=self._serialized)
        except UnknownSchemaError as error:
            raise FormatError("UnknownSchema", f"the value's schema has the id {schema_id}: {error}") from None
        made: Any
        if schema.kind != self._kind:
            made = FormatError("WrongSchemaType", f"the value's schema {schema_id} is {schema.kind}, not {self._kind}")
        else:
            try:
                made = self._make(schema)
            except SchemaError as error:
                made = FormatError("UnusableSchema", f"the value's schema {schema_id} cannot be used: {error}")
                log.warning("schema %d of the registry cannot be used: %s", schema_id, error)
        self._made[schema_id] = made
        return made


def _avro(registry: Registry) -> DecodeOne:
    from streamproc.formats.avro import AvroReader  # noqa: PLC0415 - a package that only some have

    schemas = _Schemas(registry, "AVRO", lambda schema: AvroReader(schema.text, schema.references))

    def decode_one(value: memoryview) -> Decoded:
        schema_id, body = split(value)
        record: dict[str, Any] = schemas.of(schema_id).decode(body)
        return record

    return decode_one


def _protobuf(registry: Registry) -> DecodeOne:
    from streamproc.formats.protobuf import ProtobufSchema  # noqa: PLC0415 - a package that only some have

    schemas = _Schemas(
        registry, "PROTOBUF", lambda schema: ProtobufSchema(schema.text, schema.references), serialized=True
    )

    def decode_one(value: memoryview) -> Decoded:
        schema_id, rest = split(value)
        indexes, body = split_indexes(rest)
        record: dict[str, Any] = schemas.of(schema_id).decode(indexes, body)
        return record

    return decode_one


def _json_schema(registry: Registry) -> DecodeOne:
    schemas = _Schemas(registry, "JSON", json_schema_of)

    def decode_one(value: memoryview) -> Decoded:
        schema_id, body = split(value)
        schema: Schema = schemas.of(schema_id)
        (record,) = decode([body], body, len(body))
        if type(record) is dict and (failure := schema.check(record)) is not None:
            return failure
        return record

    return decode_one


def json_schema_of(schema: RegisteredSchema) -> Schema:
    """A JSON Schema of the registry, compiled. Raises SchemaError. Nothing is fetched but by the registry."""

    def retrieve(uri: str) -> Any:
        for name, text in schema.references.items():
            if uri == name or uri.endswith(f"/{name}"):
                return orjson.loads(text)
        raise LookupError(f"{uri} is none of its references")

    try:
        return Schema("", orjson.loads(schema.text), retriever=retrieve, of=f"id {schema.id}")
    except Exception as error:  # noqa: BLE001 - whatever a schema of others makes the compiler raise
        raise SchemaError(f"it is no JSON Schema: {error}") from None
