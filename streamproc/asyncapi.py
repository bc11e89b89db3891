"""An application as an AsyncAPI 3 document: its topics as channels, what its tasks read and write as operations.

Pure: from the settings and the declared topics to plain data, ready for YAML or JSON. Payloads are the declared
schemas; what streamproc writes itself (envelopes, dead letters, metrics records) has its schema here, and tests hold
that against what is written.

Invariants:

- Of the settings only names, addresses and limits get in; no login, and nothing of ``backend.config``.
- Names of topics and tasks are the users'. What is named after one has an ending, or a slash, that ours have not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from streamproc.broker.declared_topics import FOREVER, DeclaredTopic
from streamproc.records import Cause
from streamproc.settings import REGISTERED, Format, KafkaSettings, OutputSettings, Settings

VERSION = "3.0.0"
CONTENT_TYPES: dict[Format, str] = {
    "json": "application/json",
    "msgpack": "application/vnd.msgpack",
    "raw": "application/octet-stream",
    "avro": "application/vnd.apache.avro",
    "protobuf": "application/x-protobuf",
    "json_schema": "application/json",
}
KAFKA_BINDING = "0.5.0"
UNVERSIONED = "0"
"""The document's version where ``backend.version`` names none: AsyncAPI asks for one."""

_JSON_SCHEMA = "application/schema+json;version=draft-{}"
_DRAFTS = ("2020-12", "2019-09", "draft-07", "draft-06", "draft-04")
_KEYED_BY_NAMES = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_HOLDING_VALUES = ("const", "enum", "default", "examples")

_NUMBER = {"type": "number", "minimum": 0}
_COUNT = {"type": "integer", "minimum": 0}
_MILLISECONDS_OR_NULL = {"type": ["number", "null"], "minimum": 0}
_TIMESTAMP = {"type": "integer", "description": "Milliseconds since 1970."}
_METRICS: dict[str, Any] = {
    "batch_size": {"type": "integer", "minimum": 0},
    "execution_times": {
        "type": "object",
        "description": "Milliseconds per step; null where the backend has no such step.",
        "properties": {
            "preprocess": _NUMBER,
            "transform_inputs": _MILLISECONDS_OR_NULL,
            "execute": _NUMBER,
            "transform_outputs": _MILLISECONDS_OR_NULL,
        },
        "required": ["preprocess", "transform_inputs", "execute", "transform_outputs"],
    },
    "total_execution_time": {**_NUMBER, "description": "Milliseconds of all steps."},
    "queue_time": {**_NUMBER, "description": "Milliseconds from arrival to dispatch."},
}
_SOURCE = {"topic": {"type": "string"}, "partition": _COUNT, "offset": _COUNT, "timestamp": _TIMESTAMP}


def asyncapi_document(settings: Settings, declared: Mapping[str, DeclaredTopic]) -> dict[str, Any]:
    """The document of an application; ``declared`` holds the topics of ``topics_dir`` by name."""
    document = _Document(settings, declared)
    for task in settings.tasks:
        document.add_task(task)
    return document.as_data()


class _Document:
    """A document under construction: tasks may share topics, so channels are filled as they are met."""

    def __init__(self, settings: Settings, declared: Mapping[str, DeclaredTopic]) -> None:
        self._settings = settings
        self._declared = declared
        self._channels: dict[str, dict[str, Any]] = {}
        self._operations: dict[str, dict[str, Any]] = {}
        self._messages: dict[str, dict[str, Any]] = {}
        self._schemas: dict[str, Any] = {}

    def add_task(self, task: str) -> None:
        settings, it = self._settings, self._settings.tasks[task]
        topics = settings.topics_of(task)
        for topic in topics.inputs:
            self._operation(
                f"{task}/receive/{topic}",
                ("receive", topic, self._input(topic, it.input.format)),
                f"Task {task} reads {topic}, in batches of up to {it.batch.max_size} records.",
                {
                    "groupId": {"type": "string", "const": settings.group_of(task)},
                    "clientId": {"type": "string", "const": settings.kafka.client_id or settings.name},
                },
            )
        promise = "exactly once" if it.delivery == "exactly_once" else "at least once"
        order = {
            "partition": "in the order of the input, partition by partition",
            "key": "in the order of the input, key by key",
            "unordered": "as they complete",
        }["partition" if it.delivery == "exactly_once" else it.ordering]
        results = self._result(task, topics.results, it.output)
        said = f"One result for each record of task {task} that passes: {promise}, {order}."
        self._operation(f"{task}/send/results", ("send", topics.results, results), said)
        dead = self._dead_letter()
        said = f"Records at fault of task {task}, as they came."
        self._operation(f"{task}/send/dead_letters", ("send", topics.dead, dead), said)
        said = f"What each batch of task {task} took and came to."
        self._operation(f"{task}/send/metrics", ("send", topics.metrics, self._batch_metrics()), said)

    def as_data(self) -> dict[str, Any]:
        settings = self._settings
        servers, schemes = _servers(settings.kafka)
        components = {"messages": self._messages, "schemas": self._schemas, "securitySchemes": schemes}
        return {
            "asyncapi": VERSION,
            "info": {
                "title": settings.name,
                "version": settings.backend.version or UNVERSIONED,
                "description": "A stream processor: records are read from the input topics, a model answers them in "
                "batches, and the answers are written to the output topics. Written by `streamproc asyncapi`.",
            },
            "defaultContentType": "application/json",
            "servers": servers,
            "channels": self._channels,
            "operations": self._operations,
            "components": {name: part for name, part in components.items() if part},
        }

    # -- channels and operations

    def _operation(
        self, name: str, what: tuple[str, str, str], summary: str, binding: Mapping[str, Any] | None = None
    ) -> None:
        action, topic, message = what
        channel = self._channels.setdefault(topic, _channel(topic, self._declared.get(topic)))
        channel["messages"][message] = {"$ref": _ref("components", "messages", message)}
        self._operations[name] = {
            "action": action,
            "channel": {"$ref": _ref("channels", topic)},
            "summary": summary,
            "messages": [{"$ref": _ref("channels", topic, "messages", message)}],
        }
        if binding is not None:
            self._operations[name]["bindings"] = {"kafka": {**binding, "bindingVersion": KAFKA_BINDING}}

    # -- messages, each by its name

    def _input(self, topic: str, value_format: Format) -> str:
        message = {"title": f"A record of {topic}", **_content(value_format)}
        message["payload"] = self._declared_schema(topic) or {"description": "Any record: no schema is declared."}
        return self._message(f"{topic}-record", message)

    def _result(self, task: str, topic: str, output: OutputSettings) -> str:
        payload = self._declared_schema(topic)
        message = {"title": f"A result of task {task}", **_content(output.format)}
        if output.envelope == "full":
            message["payload"] = payload or self._schema("result", _full_envelope())
        else:
            if output.envelope == "result":
                message["headers"] = self._schema("resultHeaders", _headers(_RESULT_HEADERS, _VERSION_HEADER))
            message["payload"] = payload or {"description": "The backend's output record: no schema is declared."}
        return self._message(f"{topic}-record", message)

    def _dead_letter(self) -> str:
        return self._message(
            "deadLetter",
            {
                "title": "A record at fault",
                "summary": "Key, value, headers and timestamp as they came; further headers say why it failed.",
                # Whatever bytes came: it may be a dead letter for that.
                "contentType": "application/octet-stream",
                "headers": self._schema("deadLetterHeaders", _headers(_DEAD_LETTER_HEADERS, _NOT_ALWAYS)),
            },
        )

    def _batch_metrics(self) -> str:
        message = {"title": "The metrics of a batch", "contentType": "application/json"}
        return self._message("batchMetrics", {**message, "payload": self._schema("batchMetrics", _batch_record())})

    def _message(self, name: str, message: dict[str, Any]) -> str:
        self._messages[name] = {"name": name, **message}
        return name

    # -- schemas

    def _declared_schema(self, topic: str) -> dict[str, Any] | None:
        """The reference to a topic's declared schema; None where it has none."""
        declared = self._declared.get(topic)
        if declared is None or declared.schema_document is None:
            return None
        return self._schema(f"{topic}-value", declared.schema_document)

    def _schema(self, name: str, schema: Any) -> dict[str, Any]:
        inside = _ref("components", "schemas", name, "schema")
        if isinstance(schema, dict):
            # A reference within the schema is one within the document now, whose base an own $id would change.
            schema = _relocated({key: it for key, it in schema.items() if key != "$id"}, inside)
        self._schemas[name] = {"schemaFormat": _JSON_SCHEMA.format(_draft(schema)), "schema": schema}
        return {"$ref": _ref("components", "schemas", name)}


def _ref(*parts: str) -> str:
    return "#/" + "/".join(part.replace("~", "~0").replace("/", "~1") for part in parts)


def _draft(schema: Any) -> str:
    named = str(schema.get("$schema", "")) if isinstance(schema, dict) else ""
    found = next((draft for draft in _DRAFTS if draft in named), _DRAFTS[0])  # the one that records are checked by
    return found.removeprefix("draft-")


def _relocated(schema: Any, root: str, *, names: bool = False) -> Any:
    """A schema whose references to its own parts begin at ``root``."""
    if isinstance(schema, list):
        return [_relocated(it, root) for it in schema]
    if not isinstance(schema, dict):
        return schema
    moved: dict[str, Any] = {}
    for key, it in schema.items():
        if names:
            moved[key] = _relocated(it, root)
        elif key == "$ref" and isinstance(it, str) and (it == "#" or it.startswith("#/")):
            moved[key] = root + it[1:]
        else:
            moved[key] = it if key in _HOLDING_VALUES else _relocated(it, root, names=key in _KEYED_BY_NAMES)
    return moved


def _channel(topic: str, declared: DeclaredTopic | None) -> dict[str, Any]:
    channel: dict[str, Any] = {"address": topic, "messages": {}}
    binding: dict[str, Any] = {"topic": topic}
    if declared is not None:
        if declared.description:
            channel["description"] = declared.description
        binding["partitions"] = declared.partitions
        if declared.replication > 0:
            binding["replicas"] = declared.replication
        if configs := dict(_configs(declared.configs)):
            binding["topicConfiguration"] = configs
    channel["bindings"] = {"kafka": {**binding, "bindingVersion": KAFKA_BINDING}}
    return channel


def _configs(configs: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    """As the binding types them."""
    for name, text in configs.items():
        if name == "cleanup.policy":
            yield name, text.split(",")
        elif text.isdecimal() or text == str(FOREVER):
            yield name, int(text)
        else:
            yield name, text


def _servers(kafka: KafkaSettings) -> tuple[dict[str, Any], dict[str, Any]]:
    """The brokers to ask first, and how one logs in there."""
    schemes: dict[str, Any] = {}
    if kafka.security_protocol.startswith("SASL"):
        kind = {"PLAIN": "plain", "SCRAM-SHA-256": "scramSha256", "SCRAM-SHA-512": "scramSha512"}[kafka.sasl_mechanism]
        schemes["sasl"] = {"type": kind}
    if kafka.ssl_cert_file is not None and kafka.security_protocol.endswith("SSL"):
        schemes["certificate"] = {"type": "X509"}
    server: dict[str, Any] = {"protocol": "kafka-secure" if kafka.security_protocol.endswith("SSL") else "kafka"}
    if schemes:
        server["security"] = [{"$ref": _ref("components", "securitySchemes", name)} for name in schemes]
    hosts = [host.strip() for host in kafka.bootstrap_servers.split(",") if host.strip()]
    names = ["kafka"] if len(hosts) == 1 else [f"kafka-{index}" for index in range(len(hosts))]
    return {name: {"host": host, **server} for name, host in zip(names, hosts, strict=True)}, schemes


# -- what streamproc writes itself


def _content(value_format: Format) -> dict[str, Any]:
    """What a value in this format is, for those who read it."""
    content: dict[str, Any] = {"contentType": CONTENT_TYPES[value_format]}
    if value_format in REGISTERED:
        content["summary"] = "A zero byte, the id of the schema in the registry in four, and the value."
    return content


def _object(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": dict(properties), "required": list(properties)}


def _full_envelope() -> dict[str, Any]:
    envelope = _object(
        {
            "result": {"description": "The backend's output record."},
            "metrics": {"description": "The batch that the record ran in.", **_object(_METRICS)},
            "source": {"description": "Where the record came from.", **_object(_SOURCE)},
            "task": {"type": "string"},
        }
    )
    envelope["properties"]["backend_version"] = {"type": "string", "description": "Where backend.version is set."}
    return envelope


_WHERE_THE_BACKEND_ANSWERED = ("execution_times", "total_execution_time", "queue_time")


def _batch_record() -> dict[str, Any]:
    text_or_null = {"type": ["string", "null"]}
    record = _object(
        {
            "task": {"type": "string"},
            "batch": {**_COUNT, "description": "Its number, since the processor began."},
            "records": _COUNT,
            "requested": {**_COUNT, "description": "Records of these that came over HTTP."},
            "results": _COUNT,
            "failed": _COUNT,
            "causes": {
                "type": "object",
                "additionalProperties": _COUNT,
                "description": "Of the records that failed, how many of each cause.",
            },
            **_METRICS,
            "wall_time": {**_NUMBER, "description": "Milliseconds from dispatch to answer."},
            "predicted_wall_time": _MILLISECONDS_OR_NULL,
            "memory": {"type": ["integer", "null"], "description": "The most bytes that the worker held meanwhile."},
            "predicted_memory": {"type": ["integer", "null"], "description": "Bytes."},
            "closed_by": {"type": "string", "description": "The rule that closed its window."},
            "fill": {**_NUMBER, "description": "Records over batch.max_size."},
            "padding_ratio": {**_MILLISECONDS_OR_NULL, "description": "Padded length over length; 1 is no padding."},
            "attempts": _COUNT,
            "replica": {"type": "string", "description": "kafka.group_instance_id, or host and process."},
            "worker": {"type": ["integer", "null"]},
            "backend_version": text_or_null,
            "timestamp": _TIMESTAMP,
        }
    )
    record["description"] = "Without times where no record of the batch got to the backend, or it did not answer."
    record["required"] = [name for name in record["required"] if name not in _WHERE_THE_BACKEND_ANSWERED]
    return record


_TEXT = {"type": "string"}
_DIGITS = {"type": "string", "pattern": "^[0-9]+$"}
_SOURCE_HEADERS = {
    "streamproc-source-topic": _TEXT,
    "streamproc-source-partition": _DIGITS,
    "streamproc-source-offset": _DIGITS,
}
_RESULT_HEADERS = {
    **_SOURCE_HEADERS,
    "streamproc-source-timestamp": {"type": "string", "description": "Milliseconds since 1970."},
    "streamproc-task": _TEXT,
    "streamproc-metrics": {"type": "string", "description": "The batch's metrics, as JSON."},
}
_VERSION_HEADER = {"streamproc-backend-version": {"type": "string", "description": "Where backend.version is set."}}
_DEAD_LETTER_HEADERS = {
    **_SOURCE_HEADERS,
    "streamproc-task": _TEXT,
    "streamproc-cause": {"type": "string", "enum": [str(cause) for cause in Cause]},
    "streamproc-stage": {"type": "string", "description": "Where it failed."},
    "streamproc-error-type": _TEXT,
    "streamproc-error-message": _TEXT,
    "streamproc-attempts": _DIGITS,
}
_NOT_ALWAYS = {
    "streamproc-worker": _DIGITS,
    "streamproc-error-traceback": _TEXT,
    "streamproc-headers-cut": {**_DIGITS, "description": "So many of the record's own did not fit."},
    "streamproc-key-cut-from-bytes": {**_DIGITS, "description": "The key did not fit; this long it was."},
    "streamproc-value-cut-from-bytes": {**_DIGITS, "description": "The value is cut; this long it was."},
}


def _headers(always: Mapping[str, Any], not_always: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Of a record that keeps the headers it came with; values are bytes in Kafka, and these are text in UTF-8."""
    schema = _object(always)
    schema["properties"] |= not_always or {}
    return schema
