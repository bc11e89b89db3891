"""Topics as files: one YAML a topic, with the JSON Schema of its values and samples beside it.

    topics/
      texts.yaml                  topic, description, partitions, replication, retention, cleanup, …
      schemas/texts.schema.json   named by ``schema``
      samples/texts.jsonl         named by ``samples``: JSON lines, each a value that the schema accepts

What a file does not say is not managed: no plan will touch it. Every error names the file and the line.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema_rs
import orjson
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from streamproc.errors import SettingsError
from streamproc.settings import TopicName
from streamproc.yaml_lines import PlaceOf, load_yaml

FOREVER = -1
_UNITS_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 604_800_000}
_OWN_KEYS = {"retention.ms": "retention", "cleanup.policy": "cleanup", "max.message.bytes": "max_message_bytes"}


@dataclass(frozen=True, slots=True)
class DeclaredTopic:
    """A topic as it should be.

    ``configs`` holds what Kafka is to be told, by Kafka's names. An ``implied`` topic stands in no file: tasks use it,
    and its partitions and sizes are the least that will do.
    """

    name: str
    partitions: int = 1
    replication: int = -1
    configs: Mapping[str, str] = field(default_factory=dict)
    description: str = ""
    schema_document: Any = None
    samples: Sequence[dict[str, Any]] = ()
    place: str = ""
    implied: bool = False


def load_topics(directory: Path) -> dict[str, DeclaredTopic]:
    """Every topic declared in a folder, by name; none where there is no such folder.

    Raises:
        SettingsError: a file is wrong; one sentence with file, line and what to do.
    """
    topics: dict[str, DeclaredTopic] = {}
    for path in sorted([*directory.glob("*.yaml"), *directory.glob("*.yml")]):
        topic = _load(path, directory)
        if topic.name in topics:
            raise SettingsError(
                f"topic {topic.name} is declared in {topics[topic.name].place} already",
                setting="topic",
                place=topic.place,
                hint="keep one of the two files",
            )
        topics[topic.name] = topic
    return topics


def _to_milliseconds(value: object) -> object:
    if value == FOREVER or (isinstance(value, str) and value.strip().lower() in ("forever", "-1")):
        return FOREVER
    found = re.fullmatch(r"(\d+)\s*(ms|s|m|h|d|w)", value.strip().lower()) if isinstance(value, str) else None
    if found is None:
        raise ValueError("expected a time with its unit, such as 12h, 7d or forever")
    return int(found[1]) * _UNITS_MS[found[2]]


def _to_text(value: object) -> object:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int | float) else value


def _not_our_own(configs: dict[str, str]) -> dict[str, str]:
    for name in configs:
        if name in _OWN_KEYS:
            raise ValueError(f"{name} has a key of its own: {_OWN_KEYS[name]}")
    return configs


def _in_order(value: object) -> object:
    return ",".join(sorted(part.strip() for part in value.split(","))) if isinstance(value, str) else value


CleanUp = Annotated[Literal["delete", "compact", "compact,delete"], BeforeValidator(_in_order)]
Milliseconds = Annotated[int, BeforeValidator(_to_milliseconds)]
ConfigValue = Annotated[str, BeforeValidator(_to_text)]


class _TopicFile(BaseModel):
    """What a topic's file may say."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    topic: TopicName
    description: str = ""
    partitions: int = Field(default=1, ge=1, le=100_000)
    replication: int = Field(default=-1, ge=-1, le=32_767)
    retention: Milliseconds | None = None
    cleanup: CleanUp | None = None
    max_message_bytes: int | None = Field(default=None, ge=1)
    schema_path: str | None = Field(default=None, alias="schema")
    samples: str | None = None
    config: Annotated[dict[str, ConfigValue], AfterValidator(_not_our_own)] = Field(default_factory=dict)

    def configs(self) -> dict[str, str]:
        """By Kafka's names."""
        own = {
            "retention.ms": self.retention,
            "max.message.bytes": self.max_message_bytes,
            "cleanup.policy": self.cleanup,
        }
        return {name: str(value) for name, value in own.items() if value is not None} | self.config


def _load(path: Path, directory: Path) -> DeclaredTopic:
    data, place_of = load_yaml(path)
    if not isinstance(data, dict):
        raise SettingsError("the file declares no topic", place=str(path), hint="begin with `topic: <name>`")
    try:
        it = _TopicFile.model_validate(data)
    except ValidationError as error:
        raise _explained(error.errors(include_url=False)[0], place_of) from None
    document = None
    validator = None
    if it.schema_path is not None:
        file = _beside(it.schema_path, directory, "schema", place_of)
        document, validator = _load_schema(file, place_of(("schema",)))
    samples: list[dict[str, Any]] = []
    if it.samples is not None:
        file = _beside(it.samples, directory, "samples", place_of)
        samples = _load_samples(file, validator, place_of(("samples",)))
    return DeclaredTopic(
        name=it.topic,
        partitions=it.partitions,
        replication=it.replication or -1,
        configs=it.configs(),
        description=it.description,
        schema_document=document,
        samples=samples,
        place=place_of(("topic",)),
    )


def _explained(error: ErrorDetails, place_of: PlaceOf) -> SettingsError:
    loc = tuple(part for part in error["loc"] if part != "[key]")
    name, place = ".".join(map(str, loc)), place_of(loc)
    if error["type"] == "extra_forbidden":
        known = [field.alias or key for key, field in _TopicFile.model_fields.items()]
        near = difflib.get_close_matches(str(loc[-1]), known, 1)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}; Kafka's own go under config"
        return SettingsError("is no key of a topic", setting=name, place=place, hint=hint)
    if error["type"] == "missing":
        return SettingsError("is missing", setting=name, place=place, hint="add it")
    message = error["msg"].removeprefix("Value error, ")
    given = error["input"]
    got = f", got {given!r}" if isinstance(given, str | int | float) else ""
    return SettingsError(f"{message[:1].lower()}{message[1:]}{got}", setting=name, place=place, hint="change it")


def _beside(name: str, directory: Path, key: str, place_of: PlaceOf) -> Path:
    file = directory / name
    if not file.resolve().is_relative_to(directory.resolve()):
        raise SettingsError(
            f"{name} is outside {directory}", setting=key, place=place_of((key,)), hint="keep it beside the topic"
        )
    if not file.is_file():
        raise SettingsError(
            f"there is no file {file}", setting=key, place=place_of((key,)), hint=f"paths are relative to {directory}"
        )
    return file


def _load_schema(file: Path, place: str) -> tuple[Any, Any]:
    try:
        document = orjson.loads(file.read_bytes())
    except orjson.JSONDecodeError as error:
        raise SettingsError(
            f"is not JSON: {error.msg}", place=f"{file}:{error.lineno}", hint=f"it is the schema named at {place}"
        ) from error
    try:
        jsonschema_rs.meta.validate(document)
        return document, jsonschema_rs.validator_for(document)
    except (jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError) as error:
        at = "/".join(str(part) for part in getattr(error, "instance_path", ()))
        problem = getattr(error, "message", None) or str(error)
        raise SettingsError(
            f"is no valid JSON Schema{f' at {at}' if at else ''}: {problem}",
            place=str(file),
            hint=f"it is the schema named at {place}",
        ) from error


def _load_samples(file: Path, validator: Any, place: str) -> list[dict[str, Any]]:
    samples: list[dict[str, Any]] = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        at = f"{file}:{number}"
        try:
            sample = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise SettingsError(
                f"is not JSON: {error.msg} in column {error.colno}", place=at, hint="write one JSON object a line"
            ) from error
        if not isinstance(sample, dict):
            raise SettingsError("is no JSON object", place=at, hint="write one JSON object a line")
        if validator is not None and (mismatch := next(validator.iter_errors(sample), None)) is not None:
            where = "/".join(str(part) for part in mismatch.instance_path)
            raise SettingsError(
                f"does not match the topic's schema{f' at {where}' if where else ''}: {mismatch.message}",
                place=at,
                hint=f"correct the sample or the schema, both named in {place.rpartition(':')[0]}",
            )
        samples.append(sample)
    return samples
