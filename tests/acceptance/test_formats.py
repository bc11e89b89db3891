"""Every format as a user meets it: `streamproc run` on a broker, with a schema registry beside it."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fastavro
import ormsgpack
import pytest

from streamproc.formats.confluent import header
from tests.support.app import ROOT, App, committed, create, headers, produce, read_to_end
from tests.support.schema_registry import SchemaRegistry

COUNT = 50
PASSWORD = "not-to-be-seen"  # noqa: S105 - of a registry that looks at none
AVRO = {"type": "record", "name": "Example", "fields": [{"name": "id", "type": "long"}]}
PROTOBUF = 'syntax = "proto3"; message Example { int64 id = 1; }'
JSON_SCHEMA = {"type": "object", "required": ["id"]}
SCHEMAS = {"avro": ("AVRO", AVRO), "protobuf": ("PROTOBUF", PROTOBUF), "json_schema": ("JSON", JSON_SCHEMA)}
FORMATS = ("msgpack", "raw", *SCHEMAS)


@pytest.fixture
def registry() -> Iterator[SchemaRegistry]:
    with SchemaRegistry() as registry:
        yield registry


def avro(number: int) -> bytes:
    buffer = io.BytesIO()
    fastavro.schemaless_writer(buffer, fastavro.parse_schema(AVRO), {"id": number})
    return buffer.getvalue()


def body(format_: str, number: int) -> bytes:
    """The record with this number, of at most 63, without what stands before it."""
    return {
        "msgpack": ormsgpack.packb({"id": number}),
        "raw": b"\xff%d" % number,
        "avro": avro(number),
        "protobuf": b"\0\x08" + bytes([number]),
        "json_schema": b'{"id":%d}' % number,
    }[format_]


def test_each_format_goes_through_and_a_bad_value_of_each_is_a_dead_letter_as_it_came(
    embedded_broker: str, tmp_path: Path, topic_name: Callable[..., str], registry: SchemaRegistry
) -> None:
    name, secret = topic_name(), tmp_path / "secret"
    secret.write_text(PASSWORD)
    topics = {format_: f"{name}.{format_}" for format_ in FORMATS}
    every = [f"{topic}{suffix}" for topic in topics.values() for suffix in ("", ".results", ".dead")]
    create(embedded_broker, dict.fromkeys([*every, f"{name}.metrics"], 1))
    before: dict[str, tuple[bytes, bytes]] = {"msgpack": (b"", b""), "raw": (b"", b"")}
    for format_, (kind, schema) in SCHEMAS.items():
        ids = [registry.register(f"{topics[format_]}{role}-value", kind, schema) for role in ("", ".results")]
        before[format_] = (header(ids[0]), header(ids[1]))
    settings: dict[str, Any] = {
        "name": name,
        "kafka": {"bootstrap_servers": embedded_broker},
        "schema_registry": {"url": registry.url, "username": "me", "password_file": str(secret)},
        "backend": {"path": "tests.support.backends:Identity", "base_dir": str(ROOT)},
        "logging": {"level": "debug"},
        "tasks": {
            format_: {
                "input": {"topics": [topic], "format": format_},
                "output": {"format": format_, "envelope": "result"},
                "commit_interval_ms": 100,
            }
            for format_, topic in topics.items()
        },
    }
    bad = b'{"id": '
    for format_, topic in topics.items():
        values: list[bytes | None] = [before[format_][0] + body(format_, number) for number in range(1, COUNT + 1)]
        values.insert(7, None if format_ == "raw" else bad)
        produce(embedded_broker, topic, {0: [(None, value) for value in values]})
    with App(tmp_path, settings) as app:
        for format_, topic in topics.items():
            group = f"{name}.{format_}"
            app.until(
                lambda _, group=group, topic=topic: committed(embedded_broker, group, topic, 1) == {0: COUNT + 1},  # type: ignore[misc]
                f"all of {format_} is committed",
            )
        assert app.terminate() == 0
        log = app.log()
    for format_, topic in topics.items():
        results = [it.value for it in read_to_end(embedded_broker, f"{topic}.results", 1)]
        assert results == [before[format_][1] + body(format_, number) for number in range(1, COUNT + 1)]
        (letter,) = read_to_end(embedded_broker, f"{topic}.dead", 1)
        assert letter.value == (None if format_ == "raw" else bad)
        told = headers(letter)
        assert (told["streamproc-cause"], told["streamproc-source-offset"]) == ("invalid", "7")
    for shown in (PASSWORD, base64.b64encode(f"me:{PASSWORD}".encode()).decode()):
        assert shown not in log
    assert set(registry.authorizations) == {f"Basic {base64.b64encode(f'me:{PASSWORD}'.encode()).decode()}"}


def test_a_registry_that_stays_away_pauses_the_task_and_says_so(
    embedded_broker: str, tmp_path: Path, topic_name: Callable[..., str], registry: SchemaRegistry
) -> None:
    topic = topic_name()
    create(embedded_broker, {topic: 1, f"{topic}.results": 1, f"{topic}.dead": 1, f"{topic}.metrics": 1})
    schema_id = registry.register(f"{topic}-value", "AVRO", AVRO)
    registry.is_down = True
    settings = {
        "name": topic,
        "kafka": {"bootstrap_servers": embedded_broker},
        "schema_registry": {"url": registry.url},
        "backend": {"path": "tests.support.backends:Identity", "base_dir": str(ROOT)},
        "tasks": {
            "main": {
                "input": {"topics": [topic], "format": "avro"},
                "on_error": {
                    "circuit": {"max_run": 20, "close_after_s": None},
                    # Retries come in any order: the first record might still wait for its own, and no letter go.
                    "causes": {"registry": {"retries": 0}},
                },
                "batch": {"max_size": 10},
                "commit_interval_ms": 100,
            }
        },
    }
    produce(embedded_broker, topic, {0: [(None, header(schema_id) + avro(number)) for number in range(COUNT)]})
    with App(tmp_path, settings) as app:
        app.until(lambda status: status["tasks"]["main"]["circuit"]["state"] == "open", "the circuit opens")
        (reason,) = app.get("/readyz").json()["reasons"]
        assert f"the schema registry at {registry.url} refuses /schemas/ids/{schema_id} with status 503" in reason
        assert app.terminate() == 0
    letters = read_to_end(embedded_broker, f"{topic}.dead", 1)
    assert {headers(it)["streamproc-cause"] for it in letters} == {"registry"}
    assert [it.value for it in letters] == [header(schema_id) + avro(number) for number in range(len(letters))]
    assert len(letters) < COUNT, "the rest waits in Kafka"
