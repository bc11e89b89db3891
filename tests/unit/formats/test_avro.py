"""Avro is read as fastavro writes it, and whatever else comes is refused: no depth, count or length does more harm."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import fastavro
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamproc.formats.avro import AvroReader, AvroWriter
from streamproc.formats.values import FormatError, SchemaError


def record_of(field: Any, **more: Any) -> dict[str, Any]:
    return {"type": "record", "name": "Outer", "fields": [{"name": "a", "type": field}], **more}


def written(schema: Any, value: Any) -> bytes:
    buffer = io.BytesIO()
    fastavro.schemaless_writer(buffer, fastavro.parse_schema(schema), value)
    return buffer.getvalue()


def read(schema: Any, data: bytes) -> Any:
    return AvroReader(json.dumps(schema), {}).decode(memoryview(data))


def long(number: int) -> bytes:
    return written("long", number)


LONGS = st.integers(-(2**63), 2**63 - 1)
CASES: dict[str, tuple[Any, st.SearchStrategy[Any]]] = {
    "null": ("null", st.none()),
    "boolean": ("boolean", st.booleans()),
    "int": ("int", st.integers(-(2**31), 2**31 - 1)),
    "long": ("long", LONGS),
    "float": ("float", st.floats(width=32)),
    "double": ("double", st.floats()),
    "bytes": ("bytes", st.binary(max_size=300)),
    "string": ("string", st.text(max_size=200)),
    "fixed": ({"type": "fixed", "name": "F", "size": 3}, st.binary(min_size=3, max_size=3)),
    "enum": ({"type": "enum", "name": "E", "symbols": ["A", "B", "C"]}, st.sampled_from("ABC")),
    "array": ({"type": "array", "items": "long"}, st.lists(LONGS, max_size=100)),
    "map": ({"type": "map", "values": ["null", "string"]}, st.dictionaries(st.text(), st.none() | st.text())),
    "union": (["null", "boolean", "string", "bytes"], st.none() | st.booleans() | st.text() | st.binary()),
    "nested": (
        {"type": "array", "items": {"type": "record", "name": "R", "fields": [{"name": "x", "type": ["null", "int"]}]}},
        st.lists(st.fixed_dictionaries({"x": st.none() | st.integers(0, 9)})),
    ),
}
NODE = record_of(["null", "Outer"])


def same(left: Any, right: Any) -> bool:
    if isinstance(left, float) and isinstance(right, float) and math.isnan(left):
        return math.isnan(right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return type(left) is type(right) and bool(left == right)


@pytest.mark.parametrize("name", CASES)
def test_what_fastavro_writes_is_read_and_what_is_cut_or_longer_is_refused(name: str) -> None:
    kind, values = CASES[name]
    schema = record_of(kind)
    reader, writer = AvroReader(json.dumps(schema), {}), AvroWriter(json.dumps(schema), {})

    @given(values)
    @settings(max_examples=60, deadline=None)
    def check(value: Any) -> None:
        data = written(schema, {"a": value})
        record = reader.decode(memoryview(data))
        assert same(record, {"a": value})
        assert writer.encode(record) == data
        with pytest.raises(FormatError, match="stand behind"):
            reader.decode(memoryview(data + b"\0"))
        for cut in {0, len(data) // 2, len(data) - 1} - {-1, len(data)}:
            with pytest.raises(FormatError):
                reader.decode(memoryview(data[:cut]))

    check()


@given(st.binary(max_size=60), st.sampled_from([*CASES, "node"]))
@settings(max_examples=500, deadline=None)
def test_any_bytes_are_a_record_that_can_be_written_again_or_refused(data: bytes, name: str) -> None:
    schema = NODE if name == "node" else record_of(CASES[name][0])
    try:
        record = read(schema, data)
    except FormatError:
        return
    assert same(read(schema, written(schema, record)), record)


@pytest.mark.parametrize(
    ("logical", "value", "text"),
    [
        ({"type": "bytes", "logicalType": "decimal", "precision": 30, "scale": 2}, "-12.50", "-12.50"),
        ({"type": "bytes", "logicalType": "decimal", "precision": 30, "scale": 0}, 10**29, "1" + "0" * 29),
        (
            {"type": "fixed", "name": "D", "size": 4, "logicalType": "decimal", "precision": 8, "scale": 8},
            0.5,
            "0.50000000",
        ),
        ({"type": "int", "logicalType": "date"}, "1969-12-31", "1969-12-31"),
        ({"type": "int", "logicalType": "time-millis"}, "23:59:59.001", "23:59:59.001"),
        ({"type": "long", "logicalType": "time-micros"}, "00:00:00", "00:00:00"),
        ({"type": "long", "logicalType": "timestamp-millis"}, "2024-01-31T12:00:00+01:00", "2024-01-31T11:00:00Z"),
        ({"type": "long", "logicalType": "timestamp-millis"}, -1, "1969-12-31T23:59:59.999Z"),
        ({"type": "long", "logicalType": "timestamp-micros"}, "0001-01-01T00:00:00Z", "0001-01-01T00:00:00Z"),
        (
            {"type": "long", "logicalType": "timestamp-nanos"},
            "2024-01-31T12:00:00.000000001Z",
            "2024-01-31T12:00:00.000000001Z",
        ),
        ({"type": "long", "logicalType": "local-timestamp-millis"}, "2024-01-31T12:00:00", "2024-01-31T12:00:00"),
        ({"type": "string", "logicalType": "uuid"}, *["12345678-1234-5678-1234-567812345678"] * 2),
        (
            {"type": "fixed", "name": "U", "size": 16, "logicalType": "uuid"},
            *["12345678-1234-5678-1234-567812345678"] * 2,
        ),
        ({"type": "long", "logicalType": "of-somebody"}, 7, 7),
    ],
)
def test_logical_types_are_text_in_a_record_and_text_is_taken_for_them(logical: Any, value: Any, text: Any) -> None:
    schema = record_of(["null", logical])
    data = AvroWriter(json.dumps(schema), {}).encode({"a": value})
    assert read(schema, data) == {"a": text}
    assert AvroWriter(json.dumps(schema), {}).encode({"a": text}) == data


def test_ours_is_what_fastavro_reads_by_the_same_schema() -> None:
    logical = {"type": "bytes", "logicalType": "decimal", "precision": 8, "scale": 2}
    data = AvroWriter(json.dumps(record_of(logical)), {}).encode({"a": "-12.5"})
    parsed = fastavro.parse_schema(record_of(logical))
    assert str(fastavro.schemaless_reader(io.BytesIO(data), parsed, None)) == "{'a': Decimal('-12.50')}"


@pytest.mark.parametrize(
    ("kind", "data", "why"),
    [
        ("bytes", long(2**40), "ends before"),
        ("bytes", long(-5), "ends before"),
        ("string", long(1) + b"\xff", "utf-8"),
        ("long", b"\xff" * 10, "64 bits"),
        ("long", b"\xff" * 100, "64 bits"),
        ("int", long(2**31), "32 bits"),
        ("boolean", b"\x02", "boolean"),
        (["null", "int"], long(-1) + b"\x02", "branch"),
        (["null", "int"], long(2), "branch"),
        ({"type": "enum", "name": "E", "symbols": ["A"]}, long(-1), "symbol"),
        ({"type": "array", "items": "int"}, long(2**40), "ends before"),
        ({"type": "array", "items": "int"}, long(-(2**40)) + long(2**40), "ends before"),
        ({"type": "array", "items": "null"}, long(8) + b"\0" * 9, "no bytes"),
        ({"type": "map", "values": "null"}, long(2**40), "ends before"),
        ({"type": "long", "logicalType": "timestamp-millis"}, long(2**62), "years 1 to 9999"),
        ({"type": "int", "logicalType": "time-millis"}, long(-1), "time of day"),
        ({"type": "bytes", "logicalType": "decimal", "precision": 9}, long(5_000) + b"1" * 5_000, "4,096"),
    ],
)
def test_what_no_writer_writes_is_refused_with_its_reason(kind: Any, data: bytes, why: str) -> None:
    with pytest.raises(FormatError, match=why):
        read(record_of(kind), data)


@pytest.mark.parametrize(
    ("schema", "data"),
    [
        (NODE, b"\x02" * 1_000_000 + b"\0"),
        (record_of("Outer"), b""),
        (record_of({"type": "array", "items": "Outer"}), b"\x02" * 1_000_000),
    ],
)
def test_no_depth_ends_the_process(schema: Any, data: bytes) -> None:
    with pytest.raises(FormatError, match=r"too deeply|ends before"):
        read(schema, data)


def test_nested_arrays_of_nothing_take_no_time_by_their_square() -> None:
    nothing = {"type": "array", "items": {"type": "array", "items": "null"}}
    with pytest.raises(FormatError, match="no bytes"):
        read(record_of(nothing), long(100_000) + (long(300_000) + b"\0") * 100_000)


def test_a_schema_may_refer_to_others() -> None:
    inner = json.dumps({"type": "record", "name": "org.Inner", "fields": [{"name": "x", "type": "int"}]})
    outer = json.dumps(record_of({"type": "array", "items": "org.Inner"}))
    references = {"org.Inner": inner}
    data = AvroWriter(outer, references).encode({"a": [{"x": 1}, {"x": 2}]})
    assert AvroReader(outer, references).decode(memoryview(data)) == {"a": [{"x": 1}, {"x": 2}]}


@pytest.mark.parametrize(
    "text", ["", "{}", "[", '"nothing"', '{"type": "record"}', "7", '{"type": "array"}', "[" * 5_000]
)
def test_what_is_no_schema_cannot_be_used(text: str) -> None:
    for make in (AvroReader, AvroWriter):
        with pytest.raises(SchemaError):
            make(text, {})


def test_a_value_that_is_no_record_is_none() -> None:
    with pytest.raises(FormatError, match="no record") as raised:
        AvroReader('"long"', {}).decode(memoryview(long(5)))
    assert raised.value.kind == "NotAnObject"


@pytest.mark.parametrize("output", [{}, {"a": "x"}, {"a": 1, "b": 2}, {"a": None}, {"a": 2**70}, {"a": object()}])
def test_an_output_that_the_schema_does_not_allow_is_refused(output: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        AvroWriter(json.dumps(record_of("long")), {}).encode(output)
