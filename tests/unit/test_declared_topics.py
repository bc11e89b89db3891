from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from streamproc.broker.interface import TopicInfo
from streamproc.broker.topics import DeclaredTopic, Plan, apply, implied_topics, load_topics, plan
from streamproc.errors import SettingsError
from streamproc.settings import Settings
from streamproc.testing import MemoryBroker
from tests.conftest import Run

FULL = """\
topic: texts
description: What people write.
partitions: 6
replication: 3
retention: 7d
cleanup: delete,compact
max_message_bytes: 2000000
schema: schemas/texts.json
samples: samples/texts.jsonl
config:
  min.insync.replicas: 2
  preallocate: true
"""
SCHEMA = {"type": "object", "required": ["text"], "properties": {"text": {"type": "string"}}}


def folder(tmp_path: Path, **files: str) -> Path:
    directory = tmp_path / "topics"
    for part in (directory, directory / "schemas", directory / "samples"):
        part.mkdir(exist_ok=True)
    (directory / "schemas" / "texts.json").write_text(json.dumps(SCHEMA))
    (directory / "samples" / "texts.jsonl").write_text('{"text": "a"}\n\n{"text": "b"}\n')
    for name, text in files.items():
        (directory / f"{name}.yaml").write_text(text)
    return directory


def problem(directory: Path) -> str:
    with pytest.raises(SettingsError) as caught:
        load_topics(directory)
    return str(caught.value)


def test_a_topic_file_becomes_a_topic_with_kafkas_names(tmp_path: Path) -> None:
    directory = folder(tmp_path, texts=FULL)
    [topic] = load_topics(directory).values()
    assert (topic.name, topic.partitions, topic.replication) == ("texts", 6, 3)
    assert topic.configs == {
        "retention.ms": "604800000",
        "cleanup.policy": "compact,delete",
        "max.message.bytes": "2000000",
        "min.insync.replicas": "2",
        "preallocate": "true",
    }
    assert topic.schema_document == SCHEMA
    assert topic.samples == [{"text": "a"}, {"text": "b"}]
    assert topic.place == f"{directory}/texts.yaml:1"
    assert not topic.implied


def test_what_a_file_does_not_say_is_not_managed(tmp_path: Path) -> None:
    [topic] = load_topics(folder(tmp_path, texts="topic: texts\n")).values()
    assert (topic.partitions, topic.replication, topic.configs) == (1, -1, {})
    assert topic.schema_document is None


def test_without_a_folder_there_are_no_topics(tmp_path: Path) -> None:
    assert load_topics(tmp_path / "nowhere") == {}


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("500ms", 500),
        ("45s", 45_000),
        ("30m", 1_800_000),
        ("12h", 43_200_000),
        ("2w", 1_209_600_000),
        ("7 d", 604_800_000),
        ("-1", -1),
        ("'-1'", -1),
        ("forever", -1),
    ],
)
def test_retention_is_a_time_with_its_unit(tmp_path: Path, written: str, expected: int) -> None:
    [topic] = load_topics(folder(tmp_path, texts=f"topic: texts\nretention: {written}\n")).values()
    assert topic.configs == {"retention.ms": str(expected)}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("topic: texts\npartitons: 3\n", "texts.yaml:2: partitons: is no key of a topic; did you mean partitions?"),
        ("topic: texts\nowner: me\n", "texts.yaml:2: owner: is no key of a topic; known here: topic, description"),
        ("partitions: 3\n", "texts.yaml:1: topic: is missing; add it"),
        ("topic: a b\n", "texts.yaml:1: topic: "),
        (
            "topic: texts\n\npartitions: 0\n",
            "texts.yaml:3: partitions: input should be greater than or equal to",
        ),
        ("topic: texts\nretention: 7\n", "texts.yaml:2: retention: expected a time with its unit, such as 12h, 7d or"),
        ("topic: texts\ncleanup: shred\n", "texts.yaml:2: cleanup: "),
        (
            "topic: texts\nconfig:\n  a: b\n  retention.ms: 5\n",
            "texts.yaml:2: config: retention.ms has a key of",
        ),
        ("topic: texts\nconfig:\n  a: [1]\n", "texts.yaml:3: config.a: "),
        ("topic: texts\ntopic: others\n", "texts.yaml:2: 'topic' is given twice, first in line 1"),
        ("- topic: texts\n", "texts.yaml: the file declares no topic"),
        ("", "texts.yaml: the file declares no topic"),
        ("topic: texts\nschema: schemas/no.json\n", "texts.yaml:2: schema: there is no file"),
        ("topic: texts\nschema: ../../secret.json\n", "texts.yaml:2: schema: ../../secret.json is outside"),
    ],
)
def test_what_is_wrong_is_said_with_file_and_line(tmp_path: Path, text: str, told: str) -> None:
    assert told in problem(folder(tmp_path, texts=text))


def test_a_topic_declared_twice_is_refused_with_both_places(tmp_path: Path) -> None:
    directory = folder(tmp_path, a="topic: texts\n", b="# again\ntopic: texts\n")
    assert problem(directory) == (
        f"{directory}/b.yaml:2: topic: topic texts is declared in {directory}/a.yaml:1 already; "
        f"keep one of the two files"
    )


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        ('{"type": "object",\n "required": }', "texts.json:2: is not JSON"),
        ('{"properties": {"a": {"type": "txt"}}}', "texts.json: is no valid JSON Schema at properties/a/type"),
        ('{"$ref": "elsewhere.json"}', "texts.json: is no valid JSON Schema"),
    ],
)
def test_a_schema_must_be_a_json_schema(tmp_path: Path, schema: str, told: str) -> None:
    directory = folder(tmp_path, texts=FULL)
    (directory / "schemas" / "texts.json").write_text(schema)
    assert told in problem(directory)


@pytest.mark.parametrize(
    ("samples", "told"),
    [
        ('{"text": "a"}\n\n{"text": 3}\n', "texts.jsonl:3: does not match the topic's schema at text"),
        ('{"text": "a"}\n{}\n', "texts.jsonl:2: does not match the topic's schema:"),
        ('{"text": "a"}\n{"text"}\n', "texts.jsonl:2: is not JSON"),
        ("[1]\n", "texts.jsonl:1: is no JSON object"),
    ],
)
def test_samples_must_match_the_schema(tmp_path: Path, samples: str, told: str) -> None:
    directory = folder(tmp_path, texts=FULL)
    (directory / "samples" / "texts.jsonl").write_text(samples)
    assert told in problem(directory)


def settings(**tasks: Any) -> Settings:
    return Settings.model_validate({"name": "app", "backend": {"path": "m:B"}, "tasks": tasks})


def test_topics_that_tasks_use_are_implied_with_the_inputs_partitions() -> None:
    it = settings(text={"input": {"topics": ["texts"]}})
    declared = {"texts": DeclaredTopic("texts", 6, configs={"max.message.bytes": "5000000"})}
    implied = implied_topics(it, declared)
    assert {name: topic.partitions for name, topic in implied.items()} == {
        "texts.results": 6,
        "app.metrics": 1,
        "texts.dead": 6,
    }
    assert all(topic.implied for topic in implied.values())
    assert int(implied["texts.dead"].configs["max.message.bytes"]) > 5_000_000
    assert implied["texts.results"].configs == {}


def test_an_input_that_grows_takes_its_outputs_along_in_one_round(run: Run) -> None:
    it = settings(text={"input": {"topics": ["texts"]}})

    async def main() -> None:
        broker = MemoryBroker()
        admin = broker.admin()
        for partitions in (2, 5):
            declared = {"texts": DeclaredTopic("texts", partitions)}
            for changes in (True, False):
                wanted = declared | implied_topics(it, declared, await admin.topics())
                planned = await plan(wanted, admin)
                assert bool(planned.changes) is changes
                await apply(planned, admin)
            found = await admin.topics()
            assert {found[name].partitions for name in ("texts", "texts.results", "texts.dead")} == {partitions}

    run(main())


def test_the_clusters_partitions_count_where_they_are_more_than_the_declared_ones() -> None:
    it = settings(text={"input": {"topics": ["texts", "more"]}})
    declared = {"texts": DeclaredTopic("texts", 2)}
    implied = implied_topics(it, declared, {"texts": TopicInfo(8, 1)})
    assert implied["texts.results"].partitions == 8
    assert implied["more"].partitions == 1
    assert "texts" not in implied


def test_dead_letters_that_tasks_share_have_room_for_the_largest() -> None:
    dead = {"dead_letters": {"topic": "dead"}}
    it = settings(
        a={"input": {"topics": ["a"], "max_value_bytes": 9_000_000}, **dead},
        b={"input": {"topics": ["b"]}, **dead},
    )
    topic = implied_topics(it, {}, {"b": TopicInfo(4, 1)})["dead"]
    assert topic.partitions == 4
    assert int(topic.configs["max.message.bytes"]) > 9_000_000


def planned(broker: MemoryBroker, run: Run, *declared: DeclaredTopic, delete: bool = False) -> Plan:
    return run(plan({topic.name: topic for topic in declared}, broker.admin(), delete=delete))


def test_a_missing_topic_is_created_and_then_nothing_is_left_to_do(run: Run) -> None:
    broker = MemoryBroker()
    topic = DeclaredTopic("texts", 3, configs={"retention.ms": "1000"}, place="topics/texts.yaml:1")
    it = planned(broker, run, topic)
    assert [(change.action, change.topic, change.what) for change in it.changes] == [
        ("create", "texts", "partitions=3, replication=the cluster's default, retention.ms=1000")
    ]
    assert it.rows() == [("texts", "create", it.changes[0].what, "topics/texts.yaml:1")]
    assert broker.partitions_of("texts") == 0  # planning changes nothing
    applied = run(apply(it, broker.admin()))
    assert (len(applied.done), applied.refused) == (1, ())
    assert planned(broker, run, topic).changes == ()


def test_partitions_are_added_and_never_taken_away(run: Run) -> None:
    broker = MemoryBroker()
    broker.create_topic("texts", 2)
    it = planned(broker, run, DeclaredTopic("texts", 4))
    assert [(change.action, change.what, change.destructive) for change in it.changes] == [
        ("add partitions", "partitions 2 → 4", False)
    ]
    run(apply(it, broker.admin()))
    assert broker.partitions_of("texts") == 4
    it = planned(broker, run, DeclaredTopic("texts", 3))
    assert it.empty
    assert [(change.action, change.what) for change in it.drift] == [("drift", "partitions 4 → 3")]
    assert "declare 4" in it.drift[0].note


def test_replication_is_told_and_not_changed(run: Run) -> None:
    broker = MemoryBroker()
    broker.create_topic("texts")
    it = planned(broker, run, DeclaredTopic("texts", replication=3))
    assert it.empty
    assert "kafka-reassign-partitions" in it.drift[0].note


@pytest.mark.parametrize(
    ("setting", "old", "new", "destructive"),
    [
        ("retention.ms", "1000", "2000", False),
        ("retention.ms", "1000", "-1", False),
        ("retention.ms", "2000", "1000", True),
        ("retention.ms", "-1", "1000", True),
        ("retention.bytes", "-1", "1000", True),
        ("cleanup.policy", "delete", "compact", True),
        ("cleanup.policy", "compact", "delete", True),
        ("cleanup.policy", "compact", "compact,delete", True),
        ("cleanup.policy", "compact,delete", "compact", False),
        ("max.message.bytes", "2000", "1000", False),
        ("min.insync.replicas", "1", "2", False),
    ],
)
def test_what_could_lose_records_waits_for_leave(
    run: Run, setting: str, old: str, new: str, *, destructive: bool
) -> None:
    broker = MemoryBroker()
    broker.create_topic("texts", configs={setting: old, "kept": "as it is"})
    it = planned(broker, run, DeclaredTopic("texts", configs={setting: new}))
    assert [(change.what, change.destructive) for change in it.changes] == [(f"{setting} {old} → {new}", destructive)]
    applied = run(apply(it, broker.admin()))
    assert len(applied.refused) == destructive
    assert broker.topic("texts").configs[setting] == (old if destructive else new)
    applied = run(apply(it, broker.admin(), allow_destructive=True))
    assert applied.refused == ()
    assert broker.topic("texts").configs == {setting: new, "kept": "as it is"}
    assert planned(broker, run, DeclaredTopic("texts", configs={setting: new})).changes == ()


def test_the_same_said_otherwise_is_no_change(run: Run) -> None:
    broker = MemoryBroker()
    broker.create_topic("texts", configs={"cleanup.policy": "delete,compact", "preallocate": "True"})
    declared = DeclaredTopic("texts", configs={"cleanup.policy": "compact,delete", "preallocate": "true"})
    assert planned(broker, run, declared).changes == ()


def test_undeclared_topics_are_deleted_only_when_asked_and_allowed(run: Run) -> None:
    broker = MemoryBroker()
    for name in ("texts", "old", "__consumer_offsets"):
        broker.create_topic(name)
    assert planned(broker, run, DeclaredTopic("texts")).changes == ()
    it = planned(broker, run, DeclaredTopic("texts"), delete=True)
    assert [(change.action, change.topic, change.destructive) for change in it.changes] == [("delete", "old", True)]
    assert len(run(apply(it, broker.admin())).refused) == 1
    assert broker.partitions_of("old") == 1
    run(apply(it, broker.admin(), allow_destructive=True))
    assert broker.partitions_of("old") == 0


def test_an_implied_topic_only_grows(run: Run) -> None:
    broker = MemoryBroker()
    broker.create_topic("dead", 4, configs={"max.message.bytes": "9000000"})
    enough = DeclaredTopic("dead", 2, configs={"max.message.bytes": "2000000"}, implied=True)
    assert planned(broker, run, enough).changes == ()
    more = DeclaredTopic("dead", 6, configs={"max.message.bytes": "10000000"}, implied=True)
    it = planned(broker, run, more)
    assert [change.action for change in it.changes] == ["add partitions", "configure"]
    assert all(change.implied for change in it.changes)


def test_a_plan_can_be_written_as_json(run: Run) -> None:
    broker = MemoryBroker()
    broker.create_topic("texts", configs={"retention.ms": "2000"})
    it = planned(broker, run, DeclaredTopic("texts", configs={"retention.ms": "1000"}, place="a.yaml:1"))
    assert json.loads(json.dumps(it.as_json())) == {
        "empty": False,
        "changes": [
            {
                "action": "configure",
                "topic": "texts",
                "what": "retention.ms 2000 → 1000",
                "destructive": True,
                "implied": False,
                "setting": "retention.ms",
                "old": "2000",
                "new": "1000",
                "place": "a.yaml:1",
                "note": "records that are kept now may be deleted",
            }
        ],
    }
    assert run(apply(it, broker.admin())).as_json()["done"] == []


def test_the_topics_of_this_repository_are_right() -> None:
    assert load_topics(Path(__file__).resolve().parents[2] / "topics")
