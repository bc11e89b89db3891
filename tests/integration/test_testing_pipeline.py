"""``streamproc.testing.Pipeline``: records in, results out, faults on demand; and what it says when it cannot."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from streamproc.broker.memory_log import MemoryRecord
from streamproc.errors import SettingsError, SinkError, WorkerStartError
from streamproc.records import TopicPartition
from streamproc.replay import marks
from streamproc.settings import Settings
from streamproc.testing import NotInTimeError, Pipeline
from streamproc.testing.pipeline import UsageError

ROOT = Path(__file__).parents[2]


def settings_for(backend: str = "Identity", tasks: dict[str, Any] | None = None, **task: Any) -> Settings:
    return Settings.model_validate(
        {
            "name": "app",
            "backend": {"path": f"tests.support.backends:{backend}", "base_dir": str(ROOT)},
            "pool": {"restart_backoff_ms": 5, "start_attempts": 1},
            "topics_dir": "nowhere",
            "tasks": tasks or {"main": {"input": {"topics": ["in"]}, **task}},
        }
    )


@pytest.fixture
def make() -> Iterator[Callable[..., Pipeline]]:
    made: list[Pipeline] = []

    def make(*arguments: Any, **options: Any) -> Pipeline:
        made.append(Pipeline(*arguments, **options))
        return made[-1].__enter__()

    yield make
    for it in made:
        it.stop()


def test_what_came_of_records_is_in_the_order_of_the_records(make: Callable[..., Pipeline], tmp_path: Path) -> None:
    (tmp_path / "topics").mkdir()
    (tmp_path / "topics" / "in.yaml").write_text("topic: in\npartitions: 4\n")
    settings = settings_for("Scripted", on_error={"retries": 0}).model_copy(update={"topics_dir": tmp_path / "topics"})
    pipeline = make(settings, wall_clock=lambda: 1_000.0)
    poison = {3: {"do": "raise"}, 7: {"do": "refuse"}}
    outputs = pipeline.process([{"id": it, "user": f"u{it}", **poison.get(it, {})} for it in range(20)], key="user")
    assert [it.partition for it in outputs.sent] == [
        pipeline.broker.partition_of_key(it.key or b"", 4) for it in outputs.sent
    ]
    assert len({it.partition for it in outputs.sent}) == 4
    assert [value["id"] for value in outputs.values] == [it for it in range(20) if it not in poison]
    assert [it.key for it in outputs.results] == [b"u%d" % it for it in range(20) if it not in poison]
    assert [(it.cause, json.loads(it.record.value or b"")["id"]) for it in outputs.dead_letters] == [
        ("exception", 3),
        ("rejected", 7),
    ]
    assert {it.timestamp for it in outputs.sent} == {1_000_000}
    assert sum(it["records"] for it in outputs.metrics) == 20
    assert sum(pipeline.offsets().values()) == 20

    again = pipeline.process([{"id": 100}, {"id": 101}])
    assert [value["id"] for value in again.values] == [100, 101], "of these records only"
    assert sum(it["records"] for it in again.metrics) == 2
    assert len(pipeline.outputs().results) == 20
    assert pipeline.status().tasks["main"].counts.taken == 22


def test_any_value_and_records_of_a_capture_can_be_sent(make: Callable[..., Pipeline]) -> None:
    pipeline = make(settings_for())
    headers = ((marks.SOURCE, b"elsewhere/0/7"), ("trace", b"1"))
    captured = MemoryRecord("elsewhere", 5, 7, 123, b"k", b'{"a": 1}', headers)
    outputs = pipeline.process([b'{"b":2}', captured, None, b"{", [1]], headers=[("by", b"test")])
    assert outputs.values == [{"b": 2}, {"a": 1}]
    assert [letter.cause for letter in outputs.dead_letters] == ["invalid"] * 3
    sent = outputs.sent[1]
    assert (sent.key, sent.timestamp, sent.headers) == (b"k", 123, (*headers, ("by", b"test")))


def test_faults_cost_neither_records_nor_duplicates(make: Callable[..., Pipeline]) -> None:
    pipeline = make(settings_for())
    before = pipeline.status().workers[0].pid
    with pipeline.acknowledgements_held():
        pipeline.send([{"id": it} for it in range(100)])
        pipeline.until(lambda: pipeline.status().tasks["main"].counts.taken == 100, "everything is read")
        pipeline.kill_worker()
        assert pipeline.outputs().results == []
    pipeline.settle()
    pipeline.refuse_commits(2)
    pipeline.move_partitions()
    pipeline.process([{"id": it} for it in range(100, 150)])
    pipeline.restart()
    pipeline.process([{"id": it} for it in range(150, 200)])
    assert sorted(value["id"] for value in pipeline.outputs().values) == list(range(200))
    assert pipeline.offsets() == {TopicPartition("in", 0): 200}
    assert pipeline.status().workers[0].pid != before


def test_exactly_once_outlives_refused_writes_and_commits(make: Callable[..., Pipeline]) -> None:
    pipeline = make(settings_for(delivery="exactly_once"))
    pipeline.refuse_writes()
    pipeline.refuse_commits()
    assert len(pipeline.process([{"id": it} for it in range(50)]).values) == 50


def test_what_ends_the_processor_is_raised_where_it_is_noticed(make: Callable[..., Pipeline]) -> None:
    pipeline = make(settings_for())
    pipeline.refuse_writes()
    with pytest.raises(SinkError, match="refused by the test"):
        pipeline.process([{"id": 1}])
    with pytest.raises(SinkError):
        pipeline.settle()
    pipeline.restart()
    pipeline.settle()
    assert pipeline.outputs().values == [{"id": 1}], "nothing was committed before"


def test_what_does_not_come_in_time_is_told_with_where_it_stands(make: Callable[..., Pipeline], tmp_path: Path) -> None:
    pipeline = make(settings_for("Scripted"))
    with pytest.raises(NotInTimeError, match=r"after 0\.3 s still not: every record .*task main: 1 records taken"):
        pipeline.process([{"id": 1, "do": "compute", "until": str(tmp_path / "done")}], deadline_s=0.3)
    (tmp_path / "done").touch()
    pipeline.settle()
    assert len(pipeline.outputs().values) == 1


def test_a_backend_that_does_not_load_keeps_it_from_starting() -> None:
    with pytest.raises(WorkerStartError, match="Nothing"), Pipeline(settings_for("Nothing")):
        pytest.fail("it has started")


def test_several_tasks_and_topics_have_to_be_named(make: Callable[..., Pipeline]) -> None:
    tasks = {name: {"input": {"topics": [f"in.{name}"]}} for name in ("a", "b")}
    pipeline = make(settings_for("Identity", tasks))
    with pytest.raises(UsageError, match=r"say to which topic: in\.a, in\.b"):
        pipeline.send([{}])
    with pytest.raises(UsageError, match="say which task; the tasks are: a, b"):
        pipeline.offsets()
    with pytest.raises(UsageError, match="there is no task c"):
        pipeline.move_partitions("c")
    with pytest.raises(UsageError, match="no field 'user'"):
        pipeline.send([{}], topic="in.a", key="user")
    assert pipeline.process([{"id": 1}], topic="in.b").values == [{"id": 1}]
    assert pipeline.offsets("a") == {}
    assert pipeline.offsets("b") == {TopicPartition("in.b", 0): 1}


def test_a_file_is_read_with_what_goes_over_it(tmp_path: Path) -> None:
    file = tmp_path / "streamproc.yaml"
    file.write_text(json.dumps(settings_for().model_dump(mode="json", exclude_unset=True, exclude={"topics_dir"})))
    with Pipeline(file, environ={"STREAMPROC_TASKS__MAIN__BATCH__MAX_SIZE": "3"}) as pipeline:
        outputs = pipeline.process([{"id": it} for it in range(9)])
        assert {it["batch_size"] for it in outputs.metrics} == {3}
    with pytest.raises(UsageError, match="does not run"):
        pipeline.settle()
    assert len(pipeline.outputs().values) == 9, "what was written can still be read"
    with pytest.raises(UsageError, match="give the file's name"):
        Pipeline(settings_for(), environ={"STREAMPROC_NAME": "other"})
    with pytest.raises(SettingsError):
        Pipeline(tmp_path / "absent.yaml")
