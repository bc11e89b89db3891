"""Shadow runs with real workers: both sides see every record, their results are matched, and memory is bounded."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from streamproc.broker.memory_log import MemoryRecord
from streamproc.errors import SettingsError
from streamproc.records import TopicPartition, TopicRecord
from streamproc.replay import shadow as shadowing
from streamproc.replay.diff import CANDIDATE, Comparison, Verdict
from streamproc.replay.shadow import Shadow, ShadowError
from streamproc.replay.values import Rules
from streamproc.settings import Settings
from tests.support.asyncs import until

ROOT = Path(__file__).parents[2]

MODELS = """
import time
from pathlib import Path
from streamproc import InferenceBackend, RecordError

class Old(InferenceBackend):
    def execute(self, inputs):
        return [{"id": it["id"], "label": "even" if it["id"] % 2 == 0 else "odd"} for it in inputs]

class New(InferenceBackend):
    def execute(self, inputs):
        return [{"id": it["id"], "label": "EVEN" if it["id"] % 10 == 0 else ["odd", "even"][it["id"] % 2 == 0]}
                for it in inputs]

class Failing(Old):
    def execute(self, inputs):
        return [RecordError("no") if it["id"] % 7 == 0 else out for it, out in zip(inputs, super().execute(inputs))]

class Waiting(Old):
    def execute(self, inputs):
        while not (Path(__file__).parent / "go").exists():
            time.sleep(0.005)
        return super().execute(inputs)

class Broken(InferenceBackend):
    def initialize(self):
        raise ValueError("no weights")
    def execute(self, inputs):
        return inputs
"""


def settings_for(folder: Path, backend: str, topics: Sequence[str] = ("in",), **task: Any) -> Settings:
    (folder / "models.py").write_text(MODELS)
    return Settings.model_validate(
        {
            "name": "app",
            "backend": {"path": f"models:{backend}", "base_dir": str(folder)},
            "pool": {"start_attempts": 1},
            "tasks": {"main": {"input": {"topics": list(topics)}, "batch": {"max_size": 16, "max_wait_ms": 5}, **task}},
            "logging": {"level": "error"},
            "topics_dir": str(folder / "topics"),
        }
    )


def record(number: int, topic: str = "in") -> MemoryRecord:
    value = json.dumps({"id": number}).encode()
    return MemoryRecord(topic, number % 3, 100 + number // 3, 5, b"k%d" % number, value)


async def chunks(records: Sequence[TopicRecord], size: int = 50) -> AsyncIterator[Sequence[TopicRecord]]:
    for start in range(0, len(records), size):
        yield records[start : start + size]


def compared(
    baseline: Settings, candidate: Settings, records: Sequence[TopicRecord], count: int | None = None
) -> Comparison:
    async def go() -> Comparison:
        with Comparison(Rules(), examples=1_000) as comparison:
            async with Shadow(baseline, candidate, comparison) as shadow:
                await shadow.feed(chunks(records), count)
                assert await shadow.drain(60)
                assert shadow.in_flight == comparison.waiting == 0
                assert shadow.fed == min(len(records), count or len(records))
            return comparison

    return asyncio.run(go())


def ids(comparison: Comparison, verdict: Verdict) -> list[int]:
    """The ids of the records with a verdict, by where they were in the live topic."""
    found = [it.source for it in comparison.examples if it.verdict is verdict]
    return sorted((it.offset - 100) * 3 + it.partition for it in found)


@pytest.mark.parametrize("task", [{}, {"output": {"envelope": "result"}}, {"delivery": "exactly_once"}])
def test_the_same_backend_twice_differs_in_nothing(tmp_path: Path, task: dict[str, Any]) -> None:
    settings = settings_for(tmp_path, "Old", **task)
    found = compared(settings, settings, [record(number) for number in range(300)])
    assert found.verdicts == {Verdict.EQUAL: 300}
    assert [it.results for it in found.sides] == [300, 300]
    assert all(it.latency_ms.weight == pytest.approx(300) for it in found.sides)
    assert all("execute" in it.steps_ms for it in found.sides)


def test_exactly_the_records_that_a_new_model_judges_differently_are_told(tmp_path: Path) -> None:
    old, new = settings_for(tmp_path, "Old"), settings_for(tmp_path, "New")
    found = compared(old, new, [record(number) for number in range(300)])
    assert found.verdicts == {Verdict.EQUAL: 270, Verdict.CHANGED: 30}
    assert ids(found, Verdict.CHANGED) == list(range(0, 300, 10))
    assert found.fields["label"].transitions == {('"even"', '"EVEN"'): 30}


def test_what_the_settings_would_drop_or_stop_for_is_told_as_failed(tmp_path: Path) -> None:
    circuit = {"min_records": 1, "max_run": 1, "max_rate": 0.01}
    causes = {"rejected": {"then": "stop"}}
    failing = settings_for(tmp_path, "Failing", on_error={"then": "drop", "circuit": circuit, "causes": causes})
    found = compared(settings_for(tmp_path, "Old"), failing, [record(number) for number in range(70)])
    assert found.verdicts == {Verdict.EQUAL: 60, Verdict.FAILED: 10}
    assert ids(found, Verdict.FAILED) == list(range(0, 70, 7))
    assert found.sides[CANDIDATE].causes == {"rejected": 10}


def test_it_ends_after_so_many_records_and_leaves_out_topics_that_no_task_reads(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, "Old", ["in", "more"])
    records = [record(number, ("in", "more", "other")[number % 3]) for number in range(300)]

    async def go() -> None:
        with Comparison(Rules()) as comparison:
            async with Shadow(settings, settings, comparison) as shadow:
                await shadow.feed(chunks(records), 100)
                assert await shadow.drain(60)
                assert (shadow.fed, shadow.skipped) == (100, 49)
            assert comparison.verdicts == {Verdict.EQUAL: 100}

    asyncio.run(go())


def test_reading_waits_for_the_slower_side_and_what_is_done_is_let_go_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shadowing, "MAX_RECORDS", 40)
    old, waiting = settings_for(tmp_path, "Old"), settings_for(tmp_path, "Waiting")

    async def go() -> None:
        with Comparison(Rules()) as comparison:
            async with Shadow(old, waiting, comparison) as shadow:
                feeding = asyncio.ensure_future(shadow.feed(chunks([record(number) for number in range(300)])))
                await until(lambda: comparison.waiting == 40, "the faster side has answered for all that it was given")
                assert (shadow.fed, shadow.in_flight) == (40, 40)
                (tmp_path / "go").touch()
                await feeding
                assert await shadow.drain(60)
                await until(lambda: _held(shadow) == 0, "everything is let go of", deadline_s=60)
            assert comparison.verdicts == {Verdict.EQUAL: 300}

    asyncio.run(go())


def _held(shadow: Shadow) -> int:
    """Records that the brokers hold, which only they know."""
    return sum(
        len(side.broker.log(TopicPartition(topic, partition)).records)
        for side in shadow._sides
        for topic in side.broker.topic_names()
        for partition in range(shadowing.PARTITIONS)
    )


def test_large_values_are_in_flight_by_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadowing, "MAX_BYTES", 10_000)
    old, waiting = settings_for(tmp_path, "Old"), settings_for(tmp_path, "Waiting")
    large = [MemoryRecord("in", 0, it, 5, None, json.dumps({"id": it, "pad": "x" * 3_000}).encode()) for it in range(9)]

    async def go() -> None:
        with Comparison(Rules()) as comparison:
            async with Shadow(old, waiting, comparison) as shadow:
                feeding = asyncio.ensure_future(shadow.feed(chunks(large)))
                await until(lambda: comparison.waiting == 4, "the faster side has answered for four")
                assert shadow.fed == 4
                (tmp_path / "go").touch()
                await feeding
                assert await shadow.drain(60)
            assert comparison.verdicts == {Verdict.EQUAL: 9}

    asyncio.run(go())


def test_a_backend_that_does_not_load_is_told_with_its_side(tmp_path: Path) -> None:
    old, broken = settings_for(tmp_path, "Old"), settings_for(tmp_path, "Broken")
    with pytest.raises(ShadowError, match=r"the candidate: .*no weights") as caught:
        compared(old, broken, [record(0)])
    assert caught.value.side == CANDIDATE


def test_settings_that_read_other_topics_cannot_be_compared(tmp_path: Path) -> None:
    old, other = settings_for(tmp_path, "Old"), settings_for(tmp_path, "Old", ["elsewhere"])
    with pytest.raises(SettingsError, match="task main reads in in the baseline and elsewhere in the candidate"):
        compared(old, other, [])
