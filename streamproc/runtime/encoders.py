"""From a task's output format to what encodes its results, in the worker.

JSON is the ``codec``'s; the modules of the other formats are imported where a task has them. The schema of a result is
fetched before a batch runs, so that no backend computes for nothing while the registry is away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import orjson

from streamproc.errors import RegistryError
from streamproc.formats.confluent import header
from streamproc.formats.values import RegisteredSchema, SchemaError, UnknownSchemaError, json_form, plain
from streamproc.runtime import codec
from streamproc.runtime.decoders import json_schema_of

if TYPE_CHECKING:
    from streamproc.formats.registry import Registry


def _nothing() -> None:
    """There is nothing to fetch."""


@dataclass(frozen=True, slots=True)
class Encoder:
    """Encodes the outputs of a task; ``name`` is its format's, for sentences.

    ``encode`` raises where an output has no such form, ``encode_all`` gives None then. ``prepare`` fetches what is
    needed first, and raises RegistryError.
    """

    name: str
    encode: Callable[[Any], bytes]
    encode_all: Callable[[Sequence[dict[Any, Any]]], list[bytes] | None]
    prepare: Callable[[], None] = _nothing


class Envelope(Protocol):
    """Wraps results, see ``codec.Envelope``."""

    def wrap(
        self,
        results: Sequence[bytes],
        metrics: bytes,
        partition: tuple[str, int],
        offsets: Sequence[int],
        timestamps: Sequence[int],
    ) -> list[bytes]:
        """The envelopes of the encoded results of records of one partition."""


JSON = Encoder("JSON", codec.encode, codec.encode_all)


def encoder_for(output: Mapping[str, Any] | None, registry: Registry | None) -> Encoder:
    """What encodes a task's outputs, as ``startup.output_setup`` says. A schema registry's formats need one."""
    output_format = "json" if output is None else output["format"]
    if output is None or output_format == "json":
        return JSON
    if output_format == "raw":
        return Encoder("raw", encode_raw, _one_by_one(encode_raw))
    if output_format == "msgpack":
        from streamproc.formats.msgpack import encode  # noqa: PLC0415 - a package that only some have

        return Encoder("MessagePack", encode, _one_by_one(encode))
    if registry is None:
        raise ValueError(f"{output_format} needs a schema registry")
    writer = _Writer(registry, output)
    return Encoder(writer.name, writer.encode, _one_by_one(writer.encode), writer.prepare)


def encode_without_schema(output_format: str) -> Callable[[Any], bytes] | None:
    """What encodes outputs where no registry is asked, and whether they fit a schema plays no part; None for JSON."""
    if output_format == "json":
        return None
    if output_format in ("raw", "msgpack"):
        return encoder_for({"format": output_format}, None).encode
    return lambda output: orjson.dumps(json_form(plain(output)), default=str)


def envelope_for(task: str, output: Mapping[str, Any] | None) -> Envelope:
    """What wraps a task's encoded outputs into the full envelope, in their own format."""
    if output is None:
        return codec.Envelope(task)
    if output["format"] == "json":
        return codec.Envelope(task, output["backend_version"])
    from streamproc.formats import msgpack  # noqa: PLC0415 - a package that only some have

    return msgpack.Envelope(task, output["backend_version"])


def _one_by_one(encode: Callable[[Any], bytes]) -> Callable[[Sequence[dict[Any, Any]]], list[bytes] | None]:
    def encode_all(outputs: Sequence[dict[Any, Any]]) -> list[bytes] | None:
        try:
            return [encode(output) for output in outputs]
        except BaseException:  # noqa: BLE001 - the user's own objects raise it again where somebody looks at one by one
            return None

    return encode_all


def encode_raw(output: Any) -> bytes:
    """The bytes of an output's field ``value``, its only one; text is UTF-8. Raises TypeError."""
    value = output.get("value")
    if len(output) != 1 or not isinstance(value, bytes | bytearray | memoryview | str):
        raise TypeError('a raw result is {"value": ...} with bytes or text, and no other field')
    if isinstance(value, str):
        return value.encode()
    return value if type(value) is bytes else bytes(value)


class _Writer:
    """Writes by a schema of the registry."""

    def __init__(self, registry: Registry, output: Mapping[str, Any]) -> None:
        self._registry = registry
        self._output = output
        self._encode: Callable[[Any], bytes] | None = None
        self._make, self._kind, self.name = {
            "avro": (self._avro, "AVRO", "Avro"),
            "protobuf": (self._protobuf, "PROTOBUF", "Protobuf"),
            "json_schema": (self._json_schema, "JSON", "JSON Schema"),
        }[output["format"]]

    def prepare(self) -> None:
        """Fetch the schema, once. Raises RegistryError."""
        if self._encode is not None:
            return
        subject = self._output["subject"]
        try:
            schema = self._registry.of_subject(
                subject, self._output["version"], serialized=self._output["format"] == "protobuf"
            )
            self._encode = self._made(schema)
        except (UnknownSchemaError, SchemaError) as error:
            raise RegistryError(
                f"there is no schema to write results with, subject {subject}: {error}; register one, or name another "
                "in output.subject"
            ) from None

    def _made(self, schema: RegisteredSchema) -> Callable[[Any], bytes]:
        if schema.kind != self._kind:
            raise SchemaError(f"it is {schema.kind}, not {self._kind}")
        return self._make(schema)

    def encode(self, output: Any) -> bytes:
        """One output. Raises where the schema does not allow it."""
        if self._encode is None:
            raise RuntimeError("prepare() comes first")
        return self._encode(output)

    @staticmethod
    def _avro(schema: RegisteredSchema) -> Callable[[Any], bytes]:
        from streamproc.formats.avro import AvroWriter  # noqa: PLC0415 - a package that only some have

        writer, head = AvroWriter(schema.text, schema.references), header(schema.id)
        return lambda output: head + writer.encode(output)

    def _protobuf(self, schema: RegisteredSchema) -> Callable[[Any], bytes]:
        from streamproc.formats.protobuf import ProtobufSchema  # noqa: PLC0415 - a package that only some have

        writer = ProtobufSchema(schema.text, schema.references).writer(self._output["message"])
        head = header(schema.id) + writer.head
        return lambda output: head + writer.encode(output)

    @staticmethod
    def _json_schema(schema: RegisteredSchema) -> Callable[[Any], bytes]:
        checked, head = json_schema_of(schema), header(schema.id)

        def encode(output: Any) -> bytes:
            encoded = codec.encode(output)
            record = codec.decode([memoryview(encoded)], memoryview(encoded), len(encoded))[0]
            failure = checked.check(record) if isinstance(record, dict) else record
            if failure is not None:
                raise ValueError(failure.message)
            return head + encoded

        return encode
