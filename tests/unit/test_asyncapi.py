"""The AsyncAPI document: valid against the published schema, complete, and without a secret."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from streamproc.asyncapi import asyncapi_document
from streamproc.broker.declared_topics import DeclaredTopic, load_topics
from streamproc.cli import root
from streamproc.settings import Settings
from tests.support.published_schemas import asyncapi_validator

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*/*.yaml"))


def settings_of(**changed: Any) -> Settings:
    plain = {"name": "app", "backend": {"path": "a:B"}, "tasks": {"text": {"input": {"topics": ["in"]}}}}
    return Settings.model_validate({**plain, **changed})


def faults(document: dict[str, Any]) -> list[str]:
    errors = asyncapi_validator().iter_errors(document)
    return [f"{'.'.join(map(str, error.instance_path))}: {error.message}"[:300] for error in errors]


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, it in value.items():
            if key == "$ref" and isinstance(it, str):
                yield it
            else:
                yield from references(it)
    elif isinstance(value, list):
        for it in value:
            yield from references(it)


def resolve(document: dict[str, Any], reference: str) -> Any:
    found: Any = document
    for part in reference.removeprefix("#/").split("/"):
        found = found[part.replace("~1", "/").replace("~0", "~")]
    return found


def is_sound(document: dict[str, Any]) -> None:
    assert not faults(document)
    for reference in references(document):
        resolve(document, reference)
    for operation in document["operations"].values():
        channel = operation["channel"]["$ref"]
        assert all(it["$ref"].startswith(f"{channel}/messages/") for it in operation["messages"])


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda it: str(it.relative_to(ROOT / "examples")))
def test_the_document_of_every_example_is_valid(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    written = []
    for flags in ([], ["--json"]):
        with pytest.raises(SystemExit) as ended:
            root.command()(args=["asyncapi", "-c", str(file), *flags], prog_name="streamproc")
        assert not ended.value.code
        written.append(capsys.readouterr().out)
    assert "&id" not in written[0], "an anchor, which not every reader knows"
    assert yaml.safe_load(written[0]) == json.loads(written[1])
    is_sound(json.loads(written[1]))


def test_the_schema_finds_a_wrong_document() -> None:
    document = asyncapi_document(settings_of(), {})
    assert not faults(document)
    document["operations"]["text/send/results"]["action"] = "publish"
    assert faults(document)


def test_every_topic_is_a_channel_and_what_a_task_does_with_it_an_operation() -> None:
    tasks = {
        "a": {"input": {"topics": ["x", "y"]}, "metrics": {"topic": "shared"}},
        "b": {"input": {"topics": ["x"]}, "output": {"topic": "b.out"}, "metrics": {"topic": "shared"}},
    }
    settings = settings_of(tasks=tasks)
    document = asyncapi_document(settings, {})
    is_sound(document)
    told = {
        name: (it["action"], document["channels"][it["channel"]["$ref"].removeprefix("#/channels/")]["address"])
        for name, it in document["operations"].items()
    }
    assert told == {
        "a/receive/x": ("receive", "x"),
        "a/receive/y": ("receive", "y"),
        "a/send/results": ("send", "x.results"),
        "a/send/dead_letters": ("send", "x.dead"),
        "a/send/metrics": ("send", "shared"),
        "b/receive/x": ("receive", "x"),
        "b/send/results": ("send", "b.out"),
        "b/send/dead_letters": ("send", "x.dead"),
        "b/send/metrics": ("send", "shared"),
    }
    assert set(document["channels"]) == {"x", "y", "x.results", "x.dead", "shared", "b.out"}
    group = document["operations"]["b/receive/x"]["bindings"]["kafka"]["groupId"]
    assert group["const"] == settings.group_of("b")


def test_messages_say_the_format_of_their_values() -> None:
    tasks = {"a": {"input": {"topics": ["x"], "format": "msgpack"}, "output": {"format": "avro"}}}
    settings = settings_of(tasks=tasks, schema_registry={"url": "http://registry:8081"})
    document = asyncapi_document(settings, {})
    is_sound(document)
    messages = document["components"]["messages"]
    assert messages["x-record"]["contentType"] == "application/vnd.msgpack"
    assert messages["x.results-record"]["contentType"] == "application/vnd.apache.avro"
    assert "id of the schema" in messages["x.results-record"]["summary"]
    assert messages["batchMetrics"]["contentType"] == "application/json"


def test_what_a_declared_topic_says_is_in_its_channel_and_its_schema_in_the_messages() -> None:
    declared = load_topics(ROOT / "topics")
    tasks = {"digits": {"input": {"topics": ["digits"]}, "dead_letters": {"topic": "digits.dead"}}}
    document = asyncapi_document(settings_of(name="digits", tasks=tasks), declared)
    is_sound(document)
    for name, topic in declared.items():
        channel = document["channels"][name]
        binding = channel["bindings"]["kafka"]
        assert channel["description"] == topic.description
        assert (binding["topic"], binding["partitions"]) == (name, topic.partitions)
        assert binding["topicConfiguration"]["retention.ms"] == int(topic.configs["retention.ms"])
    for name in ("digits", "digits.results"):
        ((_, message),) = document["channels"][name]["messages"].items()
        payload = resolve(document, resolve(document, message["$ref"])["payload"]["$ref"])
        assert payload["schemaFormat"] == "application/schema+json;version=draft-2020-12"
        given_schema = dict(declared[name].schema_document)
        given_schema.pop("$id")
        assert payload["schema"] == given_schema


def test_references_within_a_schema_are_those_of_the_document_and_values_stay_as_they_are() -> None:
    schema = {
        "$id": "https://example.org/in",
        "$defs": {"point": {"type": "object", "properties": {"$ref": {"$ref": "#/$defs/number"}}}, "number": {}},
        "items": {"$ref": "#/$defs/point"},
        "not": {"$ref": "#"},
        "const": {"$ref": "#/no"},
        "examples": [{"$ref": "#/no"}],
    }
    document = asyncapi_document(settings_of(), {"in": DeclaredTopic("in", schema_document=schema)})
    moved = document["components"]["schemas"]["in-value"]["schema"]
    inside = "#/components/schemas/in-value/schema"
    assert moved == {
        "$defs": {
            "point": {"type": "object", "properties": {"$ref": {"$ref": f"{inside}/$defs/number"}}},
            "number": {},
        },
        "items": {"$ref": f"{inside}/$defs/point"},
        "not": {"$ref": inside},
        "const": {"$ref": "#/no"},
        "examples": [{"$ref": "#/no"}],
    }
    assert resolve(document, moved["items"]["$ref"]) is moved["$defs"]["point"]


@pytest.mark.parametrize(
    ("named", "draft"),
    [
        (None, "2020-12"),
        ("https://json-schema.org/draft/2020-12/schema", "2020-12"),
        ("https://json-schema.org/draft/2019-09/schema", "2019-09"),
        ("http://json-schema.org/draft-07/schema#", "07"),
        ("http://json-schema.org/draft-04/schema#", "04"),
    ],
)
def test_a_schema_is_of_the_draft_that_it_names(named: str | None, draft: str) -> None:
    schema = {"type": "object"} | ({"$schema": named} if named else {})
    document = asyncapi_document(settings_of(), {"in": DeclaredTopic("in", schema_document=schema)})
    assert not faults(document)
    written = document["components"]["schemas"]["in-value"]
    assert written["schemaFormat"] == f"application/schema+json;version=draft-{draft}"
    if named is None:
        with pytest.raises(jsonschema_rs.ValidationError):
            jsonschema_rs.validator_for(schema).validate([])


@pytest.mark.parametrize("schema", [True, {}, {"type": "string"}])
def test_any_schema_will_do(schema: Any) -> None:
    is_sound(asyncapi_document(settings_of(), {"in": DeclaredTopic("in", schema_document=schema)}))


def test_the_servers_are_the_brokers_with_the_kind_of_login_and_no_secret(tmp_path: Path) -> None:
    for name in ("ca", "cert", "key"):
        (tmp_path / name).write_text("hunter2")
    kafka = {
        "bootstrap_servers": "one:9093, two:9093",
        "security_protocol": "SASL_SSL",
        "sasl_mechanism": "SCRAM-SHA-512",
        "sasl_username": "hunter2",
        "sasl_password": "hunter2",
        "ssl_cert_file": str(tmp_path / "cert"),
        "ssl_key_file": str(tmp_path / "key"),
    }
    settings = settings_of(
        kafka=kafka, backend={"path": "a:B", "config": {"key": "hunter2"}}, pool={"env": {"TOKEN": "hunter2"}}
    )
    document = asyncapi_document(settings, {})
    is_sound(document)
    assert [it["host"] for it in document["servers"].values()] == ["one:9093", "two:9093"]
    assert {it["protocol"] for it in document["servers"].values()} == {"kafka-secure"}
    kinds = {it["type"] for it in document["components"]["securitySchemes"].values()}
    assert kinds == {"scramSha512", "X509"}
    written = json.dumps(document)
    assert "hunter2" not in written
    assert str(tmp_path) not in written


def test_a_cluster_without_login_has_none() -> None:
    document = asyncapi_document(settings_of(), {})
    assert document["servers"] == {"kafka": {"host": "localhost:9092", "protocol": "kafka"}}
    assert "securitySchemes" not in document["components"]


NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,12}", fullmatch=True)
OURS = ["result", "results", "deadLetter", "batchMetrics", "resultHeaders", "in-record", "in-value", "a.receive"]


@given(
    tasks=st.dictionaries(
        NAMES | st.sampled_from(OURS), st.sampled_from(["full", "result", "none"]), min_size=1, max_size=4
    ),
    make=st.sampled_from([lambda task: f"in.{task}", lambda task: task, lambda task: f"{task}-value"]),
)
def test_no_name_of_a_task_or_topic_takes_the_place_of_another(
    tasks: dict[str, str], make: Callable[[str], str]
) -> None:
    topics = {make(task) for task in tasks}
    outputs = {f"{topic}{end}" for topic in topics for end in (".results", ".dead")} | {"app.metrics"}
    if outputs & topics or len(outputs) != 2 * len(topics) + 1:
        return
    written = {task: {"input": {"topics": [make(task)]}, "output": {"envelope": it}} for task, it in tasks.items()}
    declared = {it: DeclaredTopic(it, schema_document={"title": it}) for it in topics | outputs}
    document = asyncapi_document(settings_of(tasks=written), declared)
    assert not faults(document)
    assert len(document["operations"]) == 4 * len(tasks)
    assert set(document["channels"]) == topics | outputs
    for name, channel in document["channels"].items():
        assert channel["address"] == name
        if not name.endswith(".dead") and name != "app.metrics":
            (message,) = channel["messages"].values()
            payload = resolve(document, resolve(document, message["$ref"])["payload"]["$ref"])
            assert payload["schema"] == {"title": name}
