"""Every format through a whole processor with real workers: good records live, bad ones fail alone, and a registry that
is away is waited for, and no longer than is said."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fastavro
import pytest

from streamproc.errors import SettingsError
from streamproc.formats import msgpack
from streamproc.formats.avro import AvroReader
from streamproc.formats.confluent import header, split, split_indexes
from streamproc.formats.protobuf import ProtobufSchema
from streamproc.runtime import startup
from streamproc.runtime.startup import worker_setup
from streamproc.settings import Settings
from streamproc.testing import Pipeline
from tests.support.schema_registry import SchemaRegistry

ROOT = Path(__file__).parents[2]
RECORDS: list[dict[str, Any]] = [{"id": number, "text": f"text {number}", "data": b"\xff\0"} for number in range(5)]
FIELDS = [{"name": "id", "type": "long"}, {"name": "text", "type": "string"}, {"name": "data", "type": "bytes"}]
AVRO = {"type": "record", "name": "Example", "fields": FIELDS}
PROTOBUF = 'syntax = "proto3"; message Example { int64 id = 1; string text = 2; bytes data = 3; }'
JSON_SCHEMA = {"type": "object", "properties": {"id": {"type": "integer", "minimum": 0}}, "required": ["id"]}
Make = Callable[..., Pipeline]


@pytest.fixture
def registry() -> Iterator[SchemaRegistry]:
    with SchemaRegistry() as registry:
        yield registry


@pytest.fixture
def make(registry: SchemaRegistry) -> Iterator[Make]:
    made: list[Pipeline] = []

    def make(input_format: str, output: dict[str, Any] | None = None, **task: Any) -> Pipeline:
        settings = settings_of(registry, input_format, output, **task)
        made.append(Pipeline(settings, deadline_s=60.0))
        return made[-1].__enter__()

    yield make
    for it in made:
        it.stop()


def settings_of(registry: SchemaRegistry, input_format: str, output: dict[str, Any] | None, **task: Any) -> Settings:
    return Settings.model_validate(
        {
            "name": "app",
            "schema_registry": {"url": registry.url, "timeout_s": 5},
            "backend": {"path": "tests.support.backends:Identity", "base_dir": str(ROOT)},
            "topics_dir": "nowhere",
            "logging": {"level": "error"},
            "tasks": {
                "main": {
                    "input": {"topics": ["in"], "format": input_format},
                    "output": output or {},
                    "on_error": {"circuit": {"enabled": False}, **task.pop("on_error", {})},
                    "batch": {"max_wait_ms": 5, **task.pop("batch", {})},
                    **task,
                }
            },
        }
    )


def avro(schema_id: int, record: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    fastavro.schemaless_writer(buffer, fastavro.parse_schema(AVRO), record)
    return header(schema_id) + buffer.getvalue()


def protobuf(schema_id: int, record: dict[str, Any]) -> bytes:
    writer = ProtobufSchema(PROTOBUF, {}).writer(None)
    return header(schema_id) + writer.head + writer.encode(record)


def values_of(pipeline: Pipeline) -> list[bytes]:
    records = sorted(pipeline.broker.records("in.results"), key=lambda it: it.offset)
    return [record.value or b"" for record in records]


def why(pipeline: Pipeline) -> list[tuple[Any, str, str, str]]:
    return [(it.source.offset, it.cause, it.stage, it.error_type) for it in pipeline.outputs().dead_letters]


def with_bad_ones(good: list[bytes], bad: list[bytes]) -> list[bytes]:
    """A good one, then the bad ones, then the other good ones."""
    return [good[0], *bad, *good[1:]]


def test_messagepack_in_and_out_with_the_full_envelope(make: Make) -> None:
    pipeline = make("msgpack", {"format": "msgpack"})
    bad = [b"", b"\xc1", b"\xdd\xff\xff\xff\xff", b"\x93\x01\x02\x03", b'{"id": 1}']
    outputs = pipeline.process(with_bad_ones([*map(msgpack.encode, RECORDS)], bad), partition=0)
    envelopes = [msgpack.decode(memoryview(value)) for value in values_of(pipeline)]
    assert [it["result"] for it in envelopes] == RECORDS
    assert [it["source"]["offset"] for it in envelopes] == [0, *range(len(bad) + 1, len(bad) + 5)]
    assert all(it["metrics"]["batch_size"] and it["task"] == "main" for it in envelopes)
    assert [it[1:3] for it in why(pipeline)] == [("invalid", "decode")] * len(bad)
    assert [letter.record.value for letter in outputs.dead_letters] == bad
    assert outputs.values == [{**it, "data": base64.b64encode(it["data"]).decode()} for it in RECORDS]


def test_raw_values_are_bytes_in_and_bytes_out(make: Make) -> None:
    pipeline = make("raw", {"format": "raw"}, batch={"length": {"field": "value", "unit": "bytes"}})
    values = [b"", b"\xff\0\xfe", b'{"id": 1}', bytes(300_000)]
    pipeline.process([*values, None], partition=0)
    assert sorted(values_of(pipeline)) == sorted(values)
    assert why(pipeline) == [(4, "invalid", "decode", "NullValue")]


def test_a_value_too_large_fails_alone_in_every_format(make: Make) -> None:
    pipeline = make("raw", {"format": "raw"}, input={"topics": ["in"], "format": "raw", "max_value_bytes": 10})
    pipeline.process([b"x" * 10, b"x" * 11], partition=0)
    assert (values_of(pipeline), why(pipeline)) == ([b"x" * 10], [(1, "invalid", "decode", "ValueTooLarge")])


def test_avro_in_and_out_by_the_registry(make: Make, registry: SchemaRegistry) -> None:
    schema_id = registry.register("in-value", "AVRO", AVRO)
    out_id = registry.register("in.results-value", "AVRO", AVRO)
    other = registry.register("other", "PROTOBUF", PROTOBUF)
    pipeline = make("avro", {"format": "avro"}, batch={"length": {"field": "text"}})
    good = [avro(schema_id, record) for record in RECORDS]
    bad = [good[0][:-1], good[0] + b"\0", header(99) + b"x", header(other) + b"x", b"\x01", b'{"id": 1}']
    pipeline.process(with_bad_ones(good, bad), partition=0)
    results = [split(memoryview(value)) for value in values_of(pipeline)]
    assert {it[0] for it in results} == {out_id}
    reader = AvroReader(json.dumps(AVRO), {})
    assert sorted((reader.decode(body) for _, body in results), key=lambda it: it["id"]) == RECORDS
    assert [it[3] for it in why(pipeline)] == [
        *("InvalidAvro", "InvalidAvro", "UnknownSchema", "WrongSchemaType", "NoSchemaId", "NoSchemaId")
    ]
    assert registry.asked.count(f"/schemas/ids/{schema_id}") == 2, "once for the worker and once for measuring"


@pytest.mark.parametrize("knows_serialized", [True, False])
def test_protobuf_in_and_out_by_the_registry(make: Make, registry: SchemaRegistry, knows_serialized: bool) -> None:
    registry.knows_serialized = knows_serialized
    schema_id = registry.register("in-value", "PROTOBUF", PROTOBUF)
    registry.register("results", "PROTOBUF", PROTOBUF)
    pipeline = make("protobuf", {"format": "protobuf", "subject": "results", "message": "Example"})
    good = [protobuf(schema_id, record) for record in RECORDS]
    bad = [good[0][:-1], header(schema_id) + b"\x02\x0a", header(schema_id) + b"\0\xff"]
    pipeline.process(with_bad_ones(good, bad), partition=0)
    schema = ProtobufSchema(PROTOBUF, {})
    read = [split_indexes(split(memoryview(value))[1]) for value in values_of(pipeline)]
    assert [schema.decode(*it) for it in read] == RECORDS
    assert [it[3] for it in why(pipeline)] == ["InvalidProtobuf", "NoMessageIndex", "InvalidProtobuf"]


def test_json_schema_in_and_out_by_the_registry(make: Make, registry: SchemaRegistry) -> None:
    schema_id = registry.register("in-value", "JSON", JSON_SCHEMA)
    registry.register("in.results-value", "JSON", {**JSON_SCHEMA, "maxProperties": 1})
    pipeline = make("json_schema", {"format": "json_schema"})
    values = [b'{"id": 1}', b'{"id": -1}', b"{}", b'{"id": NaN}', b'{"id": 2, "x": 3}', b'{"id": 3}']
    pipeline.process([header(schema_id) + value for value in values], partition=0)
    assert [bytes(split(memoryview(value))[1]) for value in values_of(pipeline)] == [b'{"id":1}', b'{"id":3}']
    assert [it[1:] for it in why(pipeline)] == [
        ("invalid", "schema", "SchemaViolation"),
        ("invalid", "schema", "SchemaViolation"),
        ("invalid", "decode", "InvalidJSON"),
        ("output", "encode", "ValueError"),
    ]


def test_bytes_have_no_json_form_and_the_dead_letter_says_so(make: Make) -> None:
    pipeline = make("msgpack")
    outputs = pipeline.process([msgpack.encode({"id": 1}), msgpack.encode(RECORDS[0])], partition=0)
    assert outputs.values == [{"id": 1}]
    (letter,) = outputs.dead_letters
    assert "bytes" in letter.message


def test_a_registry_that_comes_back_in_time_costs_no_record(make: Make, registry: SchemaRegistry) -> None:
    schema_id = registry.register("in-value", "AVRO", AVRO)
    registry.answers = [503, 503]
    pipeline = make("avro", {"format": "msgpack"}, on_error={"causes": {"registry": {"backoff_ms": 1_100}}})
    pipeline.process([avro(schema_id, record) for record in RECORDS], partition=0)
    assert [msgpack.decode(memoryview(it))["result"] for it in values_of(pipeline)] == RECORDS
    assert why(pipeline) == []
    assert registry.asked.count(f"/schemas/ids/{schema_id}") >= 3


def test_a_registry_that_stays_away_ends_in_dead_letters_and_the_others_live(
    make: Make, registry: SchemaRegistry
) -> None:
    schema_id, late_id = (registry.register(subject, "AVRO", AVRO) for subject in ("in-value", "late"))
    pipeline = make("avro", {"format": "msgpack"}, on_error={"causes": {"registry": {"retries": 1, "backoff_ms": 1}}})
    pipeline.process([avro(schema_id, RECORDS[0])], partition=0)
    registry.is_down = True
    known, late = (avro(it, RECORDS[1]) for it in (schema_id, late_id))
    outputs = pipeline.process([known, late, known, late, known, known], partition=0)
    assert [it.source.offset for it in outputs.results] == [1, 3, 5, 6]
    assert [it[1:] for it in why(pipeline)] == [("registry", "registry", "RegistryError")] * 2
    assert f"{registry.url} refuses /schemas/ids/{late_id} with status 503" in outputs.dead_letters[0].message


def test_results_without_a_schema_fail_before_the_backend_runs(make: Make) -> None:
    pipeline = make("json", {"format": "avro"}, on_error={"causes": {"registry": {"retries": 0}}})
    outputs = pipeline.process([{"id": 1}], partition=0)
    assert [it[1] for it in why(pipeline)] == ["registry"]
    assert "subject in.results-value" in outputs.dead_letters[0].message
    assert [it["batch_size"] for it in outputs.metrics if "batch_size" in it] in ([], [0])


def test_a_package_that_is_missing_is_one_sentence(registry: SchemaRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "_is_installed", lambda module: module != "fastavro")
    with pytest.raises(SettingsError, match=r"tasks\.main\.input\.format: avro needs .* install streamproc\[formats\]"):
        worker_setup(settings_of(registry, "avro", None), {})
