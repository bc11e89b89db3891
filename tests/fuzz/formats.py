"""Fuzzes the formats beside JSON: what a worker does with any bytes in MessagePack, raw, Avro, Protobuf, JSON Schema.

- Whatever comes, the worker answers each batch with one frame, and every record ends once, as a result or a failure.
- What is decoded is what JSON could hold, and bytes; written in its format and read again it is the same.
- A length is measured of exactly the values that are records.
"""

from __future__ import annotations

import base64
import functools
import json
import math
from typing import Any

import ormsgpack

from streamproc.formats import msgpack
from streamproc.formats.avro import AvroReader, AvroWriter
from streamproc.formats.confluent import header, indexes_header
from streamproc.formats.protobuf import ProtobufSchema, _compiled
from streamproc.formats.registry import Registry
from streamproc.formats.values import RegisteredSchema, UnknownSchemaError
from streamproc.records import Failure, Span, value_sizes
from streamproc.runtime.decoders import decode_one_for, decoder_for
from streamproc.runtime.lengths import Meter
from streamproc.runtime.worker import TaskRunner
from tests.fuzz.decoding import LIMITS_BYTES, MAX_VALUE_BYTES, _accounts, _Scripted
from tests.fuzz.take import INT64, Take, mutated
from tests.support.spans import FakeRecord, lease

FORMATS = ("msgpack", "raw", "avro", "protobuf", "json_schema")
AVRO = {
    "type": "record",
    "name": "Node",
    "fields": [
        {"name": "next", "type": ["null", "Node"]},
        {"name": "items", "type": {"type": "array", "items": ["long", "string", "bytes", "null"]}},
        {"name": "map", "type": {"type": "map", "values": "double"}},
        {"name": "at", "type": ["null", {"type": "long", "logicalType": "timestamp-millis"}]},
        {"name": "price", "type": ["null", {"type": "bytes", "logicalType": "decimal", "precision": 9, "scale": 2}]},
        {"name": "kind", "type": {"type": "enum", "name": "Kind", "symbols": ["A", "B"]}},
        {"name": "flag", "type": "boolean"},
        {"name": "nothing", "type": {"type": "array", "items": "null"}},
    ],
}
PROTOBUF = """
syntax = "proto3";
import "google/protobuf/timestamp.proto";
import "google/protobuf/struct.proto";
message Node {
  enum Kind { A = 0; B = 1; }
  Node next = 1; repeated sint64 items = 2; map<int32, double> map = 3; google.protobuf.Timestamp at = 4;
  optional bytes data = 5; Kind kind = 6; oneof one { string text = 7; float number = 8; } repeated Node more = 9;
  google.protobuf.Struct free = 10;
  message Inner { bool flag = 1; }
}
"""
JSON_SCHEMA = {"properties": {"a": {"type": "integer", "minimum": 0}}, "maxProperties": 3}
IDS = {"avro": 1, "protobuf": 2, "json_schema": 3}
SEEDS = [
    *(bytes([kind % 5, 1, 0, kind, 7]) + bytes(range(kind, kind + 100)) for kind in range(0, 150, 7)),
    bytes(40),
    b"\2" * 80,
]


class _Registry(Registry):
    """Knows three schemas, and is never away."""

    def __init__(self) -> None:
        super().__init__(url="http://127.0.0.1:1")

    def by_id(self, schema_id: int, *, serialized: bool = False) -> RegisteredSchema:
        known = {
            1: ("AVRO", json.dumps(AVRO)),
            2: ("PROTOBUF", _serialized() if serialized else PROTOBUF),
            3: ("JSON", json.dumps(JSON_SCHEMA)),
        }
        if schema_id not in known:
            raise UnknownSchemaError("no such schema")
        return RegisteredSchema(schema_id, *known[schema_id])


@functools.cache
def _serialized() -> str:
    return base64.b64encode(_compiled({"schema.proto": PROTOBUF})[-1].SerializeToString()).decode()


@functools.cache
def _writers() -> dict[str, Any]:
    return {
        "msgpack": msgpack.encode,
        "avro": AvroWriter(json.dumps(AVRO), {}).encode,
        "protobuf": ProtobufSchema(_serialized(), {}).writer(None).encode,
    }


@functools.cache
def _reader() -> AvroReader:
    return AvroReader(json.dumps(AVRO), {})


def check(data: bytes) -> None:
    """One input; raises AssertionError, or whatever the code under test should not have raised."""
    take = Take(data)
    name = take.one_of(FORMATS)
    limit, envelope = take.one_of(LIMITS_BYTES), "full" if take.bit() else "result"
    backend = _Scripted(b"", 0)
    registry = _Registry()
    rows = [
        FakeRecord(topic="in", offset=number, timestamp=take.int64(), partition=0, value=_value(name, take))
        for number in range(1 + take.below(4))
    ]
    views = [None if row.value is None else memoryview(row.value) for row in rows]
    decoded = decoder_for(name, MAX_VALUE_BYTES, registry)(views, memoryview(b""))
    for record in decoded:
        if not isinstance(record, Failure):
            assert type(record) is dict
            _is_plain(record)
            _comes_back(name, record)
    meter = Meter(lambda _: 7, "it", MAX_VALUE_BYTES, decode_one_for(name, registry))
    lengths, failures = meter.measure(views)
    measured = [not isinstance(record, Failure) for record in decoded]
    # The rules of a schema are the worker's business.
    assert name == "json_schema" or [length == 7 for length in lengths] == measured
    assert failures == []
    runner = TaskRunner(
        "text",
        backend,
        schemas={},
        envelope=envelope,
        max_value_bytes=MAX_VALUE_BYTES,
        base_dir="/nowhere",
        input_format=name,
        registry=registry,
    )
    _accounts([Span(lease(0, topic="in"), 0, rows, value_sizes(rows), 0.0)], runner, envelope, limit)


def _value(name: str, take: Take) -> bytes | None:
    kind = take.below(8)
    if kind == 0:
        return None
    head = b"" if name in ("msgpack", "raw") else header(IDS[name] if take.below(8) else take.below(5))
    if kind == 1:
        return take.blob()
    if name == "protobuf":
        head += indexes_header([take.below(3)] * (1 + take.below(2))) if take.bit() else b"\0"
    if kind <= 3:
        return head + take.blob()
    if kind == 4:
        return head + take.blob(12) * (1 + take.below(200))  # deep, or wide
    body = _body(name, take)
    return head + (mutated(body, take) if kind <= 6 else body)


def _body(name: str, take: Take) -> bytes:
    match name:
        case "msgpack":
            return ormsgpack.packb({"a": _any(take, 0), take.blob(5).decode(errors="replace"): _any(take, 0)})
        case "avro":
            return bytes(_writers()["avro"](_node(take, 0)))
        case "protobuf":
            node = _node(take, 0)
            record = {"map": node["map"], "kind": node["kind"], "text": "é", "more": [{}] * take.below(5)}
            return bytes(_writers()["protobuf"]({**record, "data": take.blob(9), "items": [take.int64()]}))
        case _:
            return json.dumps({"a": take.one_of(INT64), "b": take.blob(6).decode(errors="replace")}).encode()


def _any(take: Take, depth: int) -> Any:
    match take.below(7 if depth < 4 else 5):
        case 0:
            return take.one_of((None, True, 0.5, math.nan, 2**64 - 1))
        case 1:
            return take.int64()
        case 2:
            return take.blob(20)
        case 3 | 4:
            return take.blob(9).decode(errors="replace")
        case 5:
            return [_any(take, depth + 1) for _ in range(take.below(4))]
        case _:
            return {str(number): _any(take, depth + 1) for number in range(take.below(4))}


def _node(take: Take, depth: int) -> dict[str, Any]:
    return {
        "next": _node(take, depth + 1) if depth < 5 and take.bit() else None,
        "items": [take.one_of((5, "text", b"\xff", None)) for _ in range(take.below(4))],
        "map": {str(number): 0.5 for number in range(take.below(3))},
        "at": take.below(60_000) if take.bit() else None,
        "price": take.one_of((None, "1.25", "-3")),
        "kind": take.one_of("AB"),
        "flag": take.bit(),
        "nothing": [],
    }


def _is_plain(value: Any) -> None:
    kinds = (str, int, float, bool, bytes, type(None))
    if type(value) is dict:
        for key, inner in value.items():
            assert type(key) is str
            _is_plain(inner)
    elif type(value) is list:
        for inner in value:
            _is_plain(inner)
    else:
        assert type(value) in kinds, f"a record holds a {type(value)}"


def _comes_back(name: str, record: dict[str, Any]) -> None:
    if name == "msgpack":
        assert repr(msgpack.decode(memoryview(msgpack.encode(record)))) == repr(record)
    elif name == "avro" and _depth(record) < 60:
        assert repr(_reader().decode(memoryview(_writers()["avro"](record)))) == repr(record)


def _depth(record: dict[str, Any]) -> int:
    depth = 0
    node: Any = record
    while node is not None:
        node, depth = node["next"], depth + 1
    return depth
