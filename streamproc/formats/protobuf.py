"""Protobuf: values to records, and outputs to values, by schemas of the registry.

A record has the fields by their names in the ``.proto`` file. A field that cannot be unset is always there, with its
default where the value says nothing; one that can (a message, ``optional``, ``oneof``) only where it is set. Enums are
the names of their values, numbers where they have none. 64-bit integers are numbers, bytes are bytes, keys of maps are
text. ``Timestamp``, ``Duration``, ``FieldMask``, wrappers, ``Struct`` and its parts are what they are in JSON; ``Any``
is its type and its bytes. What a record holds is taken for an output too.
"""

from __future__ import annotations

import base64
import binascii
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from google.protobuf import (
    any_pb2,
    descriptor_pb2,
    descriptor_pool,
    duration_pb2,
    empty_pb2,
    field_mask_pb2,
    json_format,
    message_factory,
    struct_pb2,
    timestamp_pb2,
    wrappers_pb2,
)
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, EncodeError, Message

from streamproc.formats.confluent import indexes_header
from streamproc.formats.values import FormatError, SchemaError, plain

_WELL_KNOWN = (
    *(any_pb2, duration_pb2, empty_pb2, field_mask_pb2, struct_pb2, timestamp_pb2, wrappers_pb2),
    descriptor_pb2,
)
_AS_IN_JSON = frozenset(
    f"google.protobuf.{name}" for name in ("Timestamp", "Duration", "FieldMask", "Struct", "Value", "ListValue")
)
_WRAPPERS = frozenset(
    f"google.protobuf.{kind}Value"
    for kind in ("Double", "Float", "Int64", "UInt64", "Int32", "UInt32", "Bool", "String", "Bytes")
)
_PROTOC_TIMEOUT_S = 60
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
MIN_BUDGET = 10_000
"""Values that any value may become. Beyond, it is four for each byte: two bytes may stand for a message of a hundred
fields, all of them at their defaults."""


class ProtobufSchema:
    """A schema of the registry: its messages, by their indexes and by name."""

    def __init__(self, text: str, references: Mapping[str, str]) -> None:
        """``text`` is base64 of a ``FileDescriptorProto`` or the ``.proto`` file itself, and so are those it refers to.

        Raises:
            SchemaError: it cannot be used.
        """
        files = _descriptors(text, references)
        self._pool = descriptor_pool.DescriptorPool()
        try:
            for module in _WELL_KNOWN:
                if module.DESCRIPTOR.name not in {file.name for file in files}:
                    self._pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
            for file in files:
                self._pool.AddSerializedFile(file.SerializeToString())
            self._file = self._pool.FindFileByName(files[-1].name)
        except (TypeError, KeyError, ValueError) as error:
            raise SchemaError(f"it is no Protobuf schema: {error}") from None
        self._top = list(self._file.message_types_by_name.values())
        self._converters: dict[str, _Converter] = {}

    def decode(self, indexes: Sequence[int], body: memoryview) -> dict[str, Any]:
        """A message as a record. Raises FormatError."""
        descriptor = self._at(indexes)
        message = message_factory.GetMessageClass(descriptor)()
        try:
            message.ParseFromString(bytes(body))
        except (DecodeError, RuntimeError) as error:
            raise FormatError("InvalidProtobuf", f"the value is no {descriptor.full_name}: {error}") from None
        try:
            record = self._converter(descriptor).record(message, [max(MIN_BUDGET, 4 * len(body))])
        except (ValueError, json_format.Error) as error:
            raise FormatError("InvalidProtobuf", f"the value is no {descriptor.full_name}: {error}") from None
        if type(record) is not dict:
            raise FormatError("NotAnObject", f"the value is a {descriptor.full_name}, which is no object")
        return record

    def writer(self, name: str | None) -> ProtobufWriter:
        """Writes messages of this name, in full or without the package; of the first without. Raises SchemaError."""
        found = list(_nested(self._top, ()))
        if not found:
            raise SchemaError("it has no message")
        for indexes, descriptor in found:
            if name is None or name in (descriptor.full_name, descriptor.name):
                return ProtobufWriter(descriptor, indexes)
        names = ", ".join(descriptor.full_name for _, descriptor in found[:5])
        raise SchemaError(f"it has no message {name}, but {names}")

    def _at(self, indexes: Sequence[int]) -> Descriptor:
        level: Sequence[Descriptor] = self._top
        found = None
        for index in indexes:
            if not 0 <= index < len(level):
                raise FormatError("NoMessageIndex", "the value is of a message that its schema does not have")
            found = level[index]
            level = found.nested_types
        assert found is not None, "there is one index at least"  # noqa: S101 - confluent.split_indexes sees to it
        return found

    def _converter(self, descriptor: Descriptor) -> _Converter:
        name = descriptor.full_name
        if name not in self._converters:
            self._converters[name] = _Converter(descriptor, self._converter)
        return self._converters[name]


def _nested(level: Sequence[Descriptor], above: tuple[int, ...]) -> Any:
    for index, descriptor in enumerate(level):
        yield (*above, index), descriptor
        yield from _nested(descriptor.nested_types, (*above, index))


# -- reading


class _Converter:
    """Messages of one type to plain values; made once a type."""

    def __init__(self, descriptor: Descriptor, converter: Callable[[Descriptor], _Converter]) -> None:
        self._name = descriptor.full_name
        self._descriptor = descriptor
        self._converter = converter
        self._fields: list[tuple[str, bool, Callable[[Any, list[int]], Any]]] | None = None

    def record(self, message: Any, budget: list[int]) -> Any:
        """A message as a plain value; ``budget`` is how many values there may still be. Raises ValueError."""
        if self._name in _AS_IN_JSON:
            return json_format.MessageToDict(message)
        if self._name in _WRAPPERS:
            return message.value
        if self._name == "google.protobuf.Any":
            return {"@type": message.type_url, "value": message.value}
        if self._fields is None:
            self._fields = [
                (field.name, field.has_presence, self._of_field(field)) for field in self._descriptor.fields
            ]
        budget[0] -= len(self._fields)
        if budget[0] < 0:
            raise ValueError("it stands for too many values")
        record: dict[str, Any] = {}
        for name, has_presence, convert in self._fields:
            if not has_presence or message.HasField(name):
                record[name] = convert(getattr(message, name), budget)
        return record

    def _of_field(self, field: FieldDescriptor) -> Callable[[Any, list[int]], Any]:
        if _is_map(field):
            key, value = _message_of(field).fields
            one = self._of_one(value)
            if key.type == FieldDescriptor.TYPE_STRING:
                return lambda pairs, budget: {key: one(pairs[key], budget) for key in pairs}
            return lambda pairs, budget: {_key_text(key): one(pairs[key], budget) for key in pairs}
        one = self._of_one(field)
        if field.is_repeated:
            if field.type in (FieldDescriptor.TYPE_MESSAGE, FieldDescriptor.TYPE_GROUP, FieldDescriptor.TYPE_ENUM):
                return lambda values, budget: [one(value, budget) for value in values]
            return lambda values, _: list(values)
        return one

    def _of_one(self, field: FieldDescriptor) -> Callable[[Any, list[int]], Any]:
        if field.type in (FieldDescriptor.TYPE_MESSAGE, FieldDescriptor.TYPE_GROUP):
            return self._converter(_message_of(field)).record
        if field.enum_type is not None:
            names = {number: value.name for number, value in field.enum_type.values_by_number.items()}
            return lambda value, _: names.get(value, value)
        return lambda value, _: value


def _is_map(field: FieldDescriptor) -> bool:
    return field.is_repeated and field.message_type is not None and field.message_type.GetOptions().map_entry


def _message_of(field: FieldDescriptor) -> Descriptor:
    assert field.message_type is not None, "asked of fields that are messages"  # noqa: S101 - the type has to be told
    return field.message_type


def _key_text(key: bool | int) -> str:
    return str(key).lower() if isinstance(key, bool) else str(key)


# -- writing


class ProtobufWriter:
    """Writes messages of one type; ``head`` says in each value which one it is."""

    def __init__(self, descriptor: Descriptor, indexes: Sequence[int]) -> None:
        self._class = message_factory.GetMessageClass(descriptor)
        self.head = indexes_header(indexes)

    def encode(self, output: Any) -> bytes:
        """An output. Raises TypeError or ValueError where the message does not allow it."""
        message = self._class()
        try:
            _fill(message, plain(output), "")
            return message.SerializeToString()
        except (EncodeError, json_format.Error) as error:
            raise ValueError(str(error)) from None


def _fill(message: Any, value: Any, at: str) -> None:
    name = message.DESCRIPTOR.full_name
    if name in _AS_IN_JSON:
        # Which also takes a Timestamp's or a Duration's text.
        json_format.ParseDict(value, message)
        message.SetInParent()
        return
    if name in _WRAPPERS:
        message.value = value
        message.SetInParent()
        return
    if not isinstance(value, dict):
        raise TypeError(f"{at or 'the output'} is no object, but a {name} is one")
    if name == "google.protobuf.Any":
        value = {"type_url" if key == "@type" else key: inner for key, inner in value.items()}
    message.SetInParent()
    fields = message.DESCRIPTOR.fields_by_name
    for key, inner in value.items():
        place = f"{at}.{key}" if at else str(key)
        if key not in fields:
            raise ValueError(f"{place} is no field of {name}")
        if inner is not None:
            try:
                _set(message, fields[key], inner, place)
            except (TypeError, ValueError, OverflowError) as error:
                if str(error).startswith((place, "the output")):
                    raise
                raise ValueError(f"{place}: {error}") from None


def _set(message: Message, field: FieldDescriptor, value: Any, place: str) -> None:
    if _is_map(field):
        key_field, value_field = _message_of(field).fields
        pairs = getattr(message, field.name)
        for text, inner in dict(value).items():
            key = _key(text, key_field)
            if value_field.message_type is not None:
                _fill(pairs[key], inner, f"{place}.{text}")
            else:
                pairs[key] = _scalar(inner, value_field)
    elif field.is_repeated:
        if not isinstance(value, list):
            raise TypeError("it is no list")
        values: Any = getattr(message, field.name)
        for index, inner in enumerate(value):
            if field.message_type is not None:
                _fill(values.add(), inner, f"{place}.{index}")
            else:
                values.append(_scalar(inner, field))
    elif field.message_type is not None:
        _fill(getattr(message, field.name), value, place)
    else:
        setattr(message, field.name, _scalar(value, field))


def _scalar(value: Any, field: FieldDescriptor) -> Any:
    if field.enum_type is not None and isinstance(value, str):
        if value not in field.enum_type.values_by_name:
            raise ValueError(f"{field.enum_type.full_name} has no such value")
        return field.enum_type.values_by_name[value].number
    return value


def _key(text: Any, field: FieldDescriptor) -> Any:
    if field.type == FieldDescriptor.TYPE_STRING or not isinstance(text, str):
        return text
    if field.type == FieldDescriptor.TYPE_BOOL:
        if text not in ("true", "false"):
            raise ValueError("a key is neither true nor false")
        return text == "true"
    return int(text)


# -- descriptors


def _descriptors(text: str, references: Mapping[str, str]) -> list[descriptor_pb2.FileDescriptorProto]:
    """The files of a schema, dependencies first, the schema itself last."""
    if all(_is_serialized(it) for it in (text, *references.values())):
        files = []
        for name, it in (*references.items(), ("schema.proto", text)):
            file = descriptor_pb2.FileDescriptorProto.FromString(base64.b64decode(it))
            file.name = name  # as it is imported
            files.append(file)
        return files
    return _compiled({**references, "schema.proto": text})


def _is_serialized(text: str) -> bool:
    try:
        descriptor_pb2.FileDescriptorProto.FromString(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError, DecodeError):
        return False
    return True


def _compiled(sources: Mapping[str, str]) -> list[descriptor_pb2.FileDescriptorProto]:
    """What protoc makes of ``.proto`` files, the last of which is the schema. In a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in sources.items():
            if _SAFE_NAME.fullmatch(name) is None:
                raise SchemaError(f"it refers to {name!r}, which is no name of a file")
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
        out = Path(folder, "schema.descriptors")
        command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{folder}", "--include_imports"]
        # The folder of Google's own files lies within grpc_tools, which adds it by itself.
        try:
            done = subprocess.run(  # noqa: S603 - names are checked above, and are files of a folder of ours
                [*command, f"--descriptor_set_out={out}", list(sources)[-1]],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_PROTOC_TIMEOUT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise SchemaError(f"protoc cannot be run: {error}") from None
        if done.returncode:
            raise SchemaError(f"protoc refuses it: {done.stderr.strip().replace(folder, '')[:500]}")
        return list(descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file)
