"""Protobuf by descriptors and by text: protobuf's own JSON is the oracle for what a record has to hold."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, json_format, message_factory
from hypothesis import given, settings
from hypothesis import strategies as st

from streamproc.formats.confluent import header, indexes_header, split, split_indexes
from streamproc.formats.protobuf import ProtobufSchema, _compiled
from streamproc.formats.values import FormatError, SchemaError

COMMON = 'syntax = "proto3"; package common; message Place { double x = 1; double y = 2; }'
TEXT = """
syntax = "proto3";
package app;
import "common/place.proto";
import "google/protobuf/timestamp.proto";
import "google/protobuf/duration.proto";
import "google/protobuf/wrappers.proto";
import "google/protobuf/struct.proto";
import "google/protobuf/any.proto";
message Other { string text = 1; message Inner { int32 n = 1; } }
message Main {
  enum Colour { NONE = 0; RED = 1; }
  int64 id = 1;
  uint64 large = 2;
  string text = 3;
  bytes image = 4;
  repeated float scores = 5;
  Colour colour = 6;
  repeated Colour colours = 7;
  map<string, int32> counts = 8;
  map<int64, Other> by_number = 9;
  map<bool, string> by_truth = 10;
  optional int32 maybe = 11;
  oneof choice { string word = 12; double number = 13; }
  common.Place place = 14;
  Main next = 15;
  google.protobuf.Timestamp at = 16;
  google.protobuf.Duration took = 17;
  google.protobuf.Int64Value wrapped = 18;
  google.protobuf.Struct free = 19;
  google.protobuf.Any any = 20;
  repeated Other others = 21;
  bool flag = 22;
}
"""
REFERENCES = {"common/place.proto": COMMON}
FILES = _compiled({**REFERENCES, "schema.proto": TEXT})
SERIALIZED = {file.name: base64.b64encode(file.SerializeToString()).decode() for file in FILES}
SCHEMA = ProtobufSchema(SERIALIZED["schema.proto"], {name: SERIALIZED[name] for name in REFERENCES})
MAIN = (1,)
ALWAYS = {
    "id": 0,
    "large": 0,
    "text": "",
    "image": b"",
    "scores": [],
    "colour": "NONE",
    "colours": [],
    "counts": {},
    "by_number": {},
    "by_truth": {},
    "others": [],
    "flag": False,
}
FULL: dict[str, Any] = {
    "id": -(2**63),
    "large": 2**64 - 1,
    "text": "é",
    "image": b"\xff\0",
    "scores": [0.5, -1.0],
    "colour": "RED",
    "colours": ["NONE", 7],
    "counts": {"a": 1},
    "by_number": {"-5": {"text": "x"}},
    "by_truth": {"true": "y"},
    "maybe": 0,
    "word": "",
    "place": {"x": 1.5, "y": 0.0},
    "next": ALWAYS,
    "at": "2024-01-31T12:00:00.500Z",
    "took": "1.500s",
    "wrapped": 0,
    "free": {"a": [1.0, None, {"b": True}]},
    "flag": True,
    "any": {"@type": "type.googleapis.com/app.Other", "value": b"\x0a\x01x"},
    "others": [{"text": ""}],
}


def encoded(output: Any, name: str | None = "Main") -> bytes:
    return SCHEMA.writer(name).encode(output)


def read(body: bytes, indexes: tuple[int, ...] = MAIN) -> Any:
    return SCHEMA.decode(indexes, memoryview(body))


def message_class() -> Any:
    return message_factory.GetMessageClass(SCHEMA._at(MAIN))


def test_a_record_has_every_field_that_cannot_be_unset_and_of_the_others_those_that_are_set() -> None:
    assert read(b"") == ALWAYS
    assert read(encoded(FULL)) == FULL


TYPED: dict[str, Callable[[str], Any]] = {"id": int, "large": int, "wrapped": int, "image": base64.b64decode}
"""What is text in protobuf's JSON, and is none here."""


def typed(told: Any) -> Any:
    if isinstance(told, dict):
        return {key: TYPED[key](inner) if key in TYPED else typed(inner) for key, inner in told.items()}
    return [typed(inner) for inner in told] if isinstance(told, list) else told


def test_protobufs_own_json_says_the_same() -> None:
    record = {**FULL, "any": None}
    message = message_class().FromString(encoded(record))
    told = json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    assert typed(told) == {key: value for key, value in record.items() if value is not None}


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "id": st.integers(-(2**63), 2**63 - 1),
            "text": st.text(),
            "image": st.binary(),
            "scores": st.lists(st.floats(width=32, allow_nan=False)),
            "counts": st.dictionaries(st.text(), st.integers(-(2**31), 2**31 - 1)),
            "maybe": st.integers(0, 9),
            "others": st.lists(st.fixed_dictionaries({"text": st.text()})),
            "place": st.fixed_dictionaries({"x": st.floats(allow_nan=False), "y": st.floats(allow_nan=False)}),
        },
    )
)
@settings(max_examples=100, deadline=None)
def test_what_is_written_is_read(output: dict[str, Any]) -> None:
    assert read(encoded(output)) == {**ALWAYS, **output}


@given(st.binary(max_size=80), st.lists(st.integers(-3, 3), min_size=1, max_size=3))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_a_record_that_can_be_written_again_or_refused(body: bytes, indexes: list[int]) -> None:
    try:
        record = read(body, tuple(indexes))
    except FormatError:
        return
    if tuple(indexes) == MAIN:
        assert repr(read(encoded(record))) == repr(record)


@pytest.mark.parametrize("body", [b"\x08", b"\x1a\x05x", b"\x1a\x01\xff", b"\x0b", b"\xff" * 20])
def test_what_is_no_message_is_refused(body: bytes) -> None:
    with pytest.raises(FormatError, match=r"no app\.Main") as raised:
        read(body)
    assert raised.value.kind == "InvalidProtobuf"


def nested(levels: int) -> bytes:
    body = b""
    for _ in range(levels):
        size, head = len(body), bytearray(b"\x7a")
        while size > 127:
            head.append(size & 127 | 128)
            size >>= 7
        body = bytes((*head, size)) + body
    return body


def test_no_depth_ends_the_process() -> None:
    with pytest.raises(FormatError):
        read(nested(20_000))
    assert read(nested(50))["next"]["next"]


def test_a_few_bytes_that_stand_for_very_many_values_are_refused_soon() -> None:
    wide = "message Wide { repeated Wide more = 1; " + "".join(f"int32 f{n} = {n + 2};" for n in range(200)) + "}"
    schema = ProtobufSchema(f'syntax = "proto3"; {wide}', {})
    begun = time.monotonic()
    with pytest.raises(FormatError, match="too many values"):
        schema.decode((0,), memoryview(b"\x0a\x00" * 500_000))
    assert time.monotonic() - begun < 20
    assert len(schema.decode((0,), memoryview(b"\x0a\x00" * 40))["more"]) == 40


def test_text_and_descriptors_of_one_schema_read_alike() -> None:
    by_text = ProtobufSchema(TEXT, REFERENCES)
    assert by_text.decode(MAIN, memoryview(encoded(FULL))) == FULL


@pytest.mark.parametrize(
    ("text", "references", "why"),
    [
        ("", {"../evil.proto": COMMON}, "no name of a file"),
        ("", {"/etc/evil.proto": COMMON}, "no name of a file"),
        ("message {", {}, "protoc refuses"),
        ('syntax = "proto3"; import "nowhere.proto"; message M {}', {}, r"nowhere\.proto"),
        (base64.b64encode(b"\x0a\x01x\x1a\x07missing").decode(), {}, "no Protobuf schema"),
    ],
)
def test_what_is_no_schema_cannot_be_used(text: str, references: dict[str, str], why: str) -> None:
    with pytest.raises(SchemaError, match=why):
        ProtobufSchema(text, references)


@pytest.mark.parametrize(
    ("output", "why"),
    [
        ({"nothing": 1}, "nothing is no field"),
        ({"others": [{"text": 5}]}, r"others\.0\.text"),
        ({"others": {}}, "others: it is no list"),
        ({"colour": "BLUE"}, "colour.*no such value"),
        ({"id": 2**63}, "id:"),
        ({"text": b"\xff"}, "text"),
        ({"place": 5}, "place is no object"),
        ({"at": "yesterday"}, "at"),
        ({"by_truth": {"maybe": "x"}}, "by_truth"),
        ({"id": object()}, "plain Python value"),
    ],
)
def test_an_output_that_the_message_does_not_allow_is_refused_with_its_field(output: Any, why: str) -> None:
    with pytest.raises((TypeError, ValueError), match=why):
        encoded(output)


def test_a_writer_takes_a_message_by_its_name_and_says_which_it_is() -> None:
    assert SCHEMA.writer(None).head == b"\0"
    assert SCHEMA.writer("app.Main").head == indexes_header(MAIN)
    assert SCHEMA.writer("Inner").head == indexes_header((0, 0))
    with pytest.raises(SchemaError, match="no message Nobody"):
        SCHEMA.writer("Nobody")


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 1_000), min_size=1, max_size=6), st.binary(max_size=20))
@settings(max_examples=100, deadline=None)
def test_ids_and_indexes_come_back(schema_id: int, indexes: list[int], body: bytes) -> None:
    read_id, rest = split(memoryview(header(schema_id) + indexes_header(indexes) + body))
    read_indexes, read_body = split_indexes(rest)
    assert (read_id, read_indexes, bytes(read_body)) == (schema_id, tuple(indexes), body)


@pytest.mark.parametrize("value", [b"", b"\0\0\0\1", b"\1\0\0\0\1", b'{"a": 1}'])
def test_a_value_without_an_id_is_refused(value: bytes) -> None:
    with pytest.raises(FormatError, match="schema registry"):
        split(memoryview(value))


@pytest.mark.parametrize("body", [b"", b"\x80", b"\x7f", b"\xff\xff\xff\xff\xff\x01", b"\x04\x02", b"\x01"])
def test_indexes_that_are_none_are_refused(body: bytes) -> None:
    with pytest.raises(FormatError, match="which message"):
        split_indexes(memoryview(body))


def test_the_descriptors_of_a_registry_need_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("a process was started"))
    assert isinstance(FILES[-1], descriptor_pb2.FileDescriptorProto)
    ProtobufSchema(SERIALIZED["schema.proto"], {name: SERIALIZED[name] for name in REFERENCES})
