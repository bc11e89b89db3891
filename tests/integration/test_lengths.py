"""Lengths by a real measuring process: its deaths and hangs, and partitions that move meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import lengths
from streamproc.errors import WorkerStartError
from streamproc.settings import Settings
from streamproc.testing import Pipeline

ROOT = Path(__file__).parents[2]
FOR_EVER_MS = 60_000
Make = Callable[..., Pipeline]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Pipeline] = []

    def make(
        length: Any,
        *,
        backend: str = "Measured",
        pool: dict[str, Any] | None = None,
        task: dict[str, Any] | None = None,
        **batch: Any,
    ) -> Pipeline:
        settings = Settings.model_validate(
            {
                "name": "app",
                "backend": {"path": f"tests.support.backends:{backend}", "base_dir": str(ROOT)},
                "pool": {"restart_backoff_ms": 5, **(pool or {})},
                "topics_dir": "nowhere",
                "rebalance_drain_s": 50,
                "shutdown_timeout_s": 500,
                "logging": {"level": "error"},
                "tasks": {
                    "main": {
                        "input": {"topics": ["in"]},
                        "on_error": {"circuit": {"enabled": False}},
                        **(task or {}),
                        "batch": {"length": length, "max_wait_ms": 5, **batch},
                    }
                },
            }
        )
        made.append(Pipeline(settings, deadline_s=30.0))
        return made[-1].__enter__()

    yield make
    for it in made:
        it.stop()


def record(number: int, words: int, **fields: Any) -> dict[str, Any]:
    return {"id": number, "text": " ".join(["word"] * words), "list": list(range(words)), "words": words, **fields}


def delivered(pipeline: Pipeline) -> list[int]:
    return [value["id"] for value in pipeline.outputs().values]


def why(pipeline: Pipeline) -> list[tuple[Any, str, str, str]]:
    return [(it.source.offset, it.cause, it.stage, it.error_type) for it in pipeline.outputs().dead_letters]


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        ("backend", [1, 2, 3, 6]),
        ({"field": "text"}, [4, 9, 14, 29]),
        ({"field": "text", "unit": "bytes"}, [4, 9, 14, 29]),
        ({"field": "list", "unit": "items"}, [1, 2, 3, 6]),
        ({"field": "words", "unit": "value"}, [1, 2, 3, 6]),
    ],
)
def test_batches_are_padded_by_the_length_that_the_settings_name(make: Make, length: Any, expected: list[int]) -> None:
    pipeline = make(length, strategy="fifo", max_size=4, max_wait_ms=FOR_EVER_MS)
    outputs = pipeline.process([record(it, words) for it, words in enumerate([1, 2, 3, 6])], partition=0)
    assert delivered(pipeline) == [0, 1, 2, 3]
    (metrics,) = outputs.metrics
    assert metrics["padding_ratio"] == round(4 * max(expected) / sum(expected), 5)


@pytest.mark.parametrize("strategy", ["fifo", "bucketed", "exact"])
@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
def test_thousands_of_records_keep_their_order(make: Make, strategy: str, delivery: str) -> None:
    pipeline = make("backend", strategy=strategy, task={"delivery": delivery}, max_padded=200)
    outputs = pipeline.process([record(it, it % 50) for it in range(5_000)])
    assert delivered(pipeline) == list(range(5_000))
    assert sum(it["records"] for it in outputs.metrics) == 5_000
    assert pipeline.status().tasks["main"].measuring == 0


def test_a_record_without_a_length_is_a_dead_letter_and_no_other_is(make: Make) -> None:
    pipeline = make({"field": "text"}, max_size=4)
    records = [record(0, 1), {"id": 1}, b"no JSON", record(3, 2), {"id": 4, "text": 7}, None, record(6, 3)]
    outputs = pipeline.process(records, partition=0)
    assert delivered(pipeline) == [0, 3, 6]
    assert why(pipeline) == [
        (1, "invalid", "length", "MissingField"),
        (2, "invalid", "decode", "InvalidJSON"),
        (4, "invalid", "length", "WrongType"),
        (5, "invalid", "decode", "NullValue"),
    ]
    assert "the record has no field text" in outputs.dead_letters[0].message
    assert outputs.dead_letters[0].worker == ""
    assert sum(it["records"] for it in outputs.metrics) == 7
    assert sum(it["failed"] for it in outputs.metrics if it["closed_by"] == "length") == 2


def test_what_the_function_raises_or_answers_wrongly_fails_its_record(make: Make) -> None:
    pipeline = make("backend")
    pipeline.process(
        [
            record(0, 1),
            record(1, 1, measure="raise"),
            record(2, 1, measure="answer", answer=-1),
            record(3, 1, measure="answer", answer="7"),
            record(4, 1),
        ],
        partition=0,
    )
    assert delivered(pipeline) == [0, 4]
    assert why(pipeline) == [
        (1, "invalid", "length", "ValueError"),
        (2, "invalid", "length", "NotALength"),
        (3, "invalid", "length", "NotAnInteger"),
    ]


def test_on_error_decides_about_records_without_a_length_too(make: Make) -> None:
    pipeline = make({"field": "text"}, task={"on_error": {"causes": {"invalid": {"then": "drop"}}}})
    pipeline.process([record(0, 1), {"id": 1}, record(2, 1)])
    assert delivered(pipeline) == [0, 2]
    assert why(pipeline) == []


def test_a_record_that_kills_the_measuring_process_fails_alone(make: Make) -> None:
    pipeline = make("backend")
    pipeline.process([record(it, 1, **({"measure": "die"} if it == 7 else {})) for it in range(20)], partition=0)
    assert delivered(pipeline) == [it for it in range(20) if it != 7]
    assert why(pipeline) == [(7, "crash", "length", "MeasurerDied")]
    status = pipeline.status().measurer
    assert status is not None
    assert (status.state, status.restarts) == ("ready", 4)


def test_what_the_function_writes_to_the_socket_is_no_answer(make: Make) -> None:
    pipeline = make("backend")
    pipeline.process([record(0, 1), record(1, 1, measure="print"), record(2, 1)], partition=0)
    assert delivered(pipeline) == [0, 2]
    assert why(pipeline) == [(1, "crash", "length", "MeasurerDied")]


def test_a_record_that_hangs_the_measuring_process_fails_alone(make: Make, tmp_path: Path) -> None:
    pipeline = make("backend", pool={"batch_timeout_s": 0.5})
    slow = record(2, 1, measure="wait", began=str(tmp_path / "began"), until=str(tmp_path / "never"))
    pipeline.process([record(0, 1), record(1, 1), slow, record(3, 1)], partition=0)
    assert delivered(pipeline) == [0, 1, 3]
    assert why(pipeline) == [(2, "timeout", "length", "DeadlineExceeded")]


def measurer(pipeline: Pipeline) -> int:
    status = pipeline.status().measurer
    assert status is not None
    assert status.pid is not None
    return status.pid


def waiting_record(number: int, tmp_path: Path) -> dict[str, Any]:
    return record(number, 1, measure="wait", began=str(tmp_path / "began"), until=str(tmp_path / "go on"))


def begin(pipeline: Pipeline, tmp_path: Path) -> None:
    """Send records of which one is being measured, some more wait behind it, and one before it is out."""
    pipeline.process([record(0, 1)], partition=0)
    pipeline.send([waiting_record(1, tmp_path), *(record(it, 1) for it in range(2, 50))], partition=0)
    pipeline.until((tmp_path / "began").exists, "the second record is measured")
    pipeline.until(lambda: pipeline.status().tasks["main"].measuring == 49, "the others wait")


def test_a_measuring_process_that_is_killed_costs_no_record(make: Make, tmp_path: Path) -> None:
    pipeline = make("backend")
    begin(pipeline, tmp_path)
    old = measurer(pipeline)
    (tmp_path / "go on").touch()
    os.kill(old, signal.SIGKILL)
    pipeline.settle()
    assert delivered(pipeline) == list(range(50))
    assert measurer(pipeline) != old
    assert Counter(delivered(pipeline)).most_common(1)[0][1] == 1


def test_records_that_are_being_measured_are_handed_back_when_their_partition_goes(make: Make, tmp_path: Path) -> None:
    pipeline = make("backend")
    begin(pipeline, tmp_path)
    pipeline.move_partitions()
    (tmp_path / "go on").touch()
    pipeline.settle()
    assert delivered(pipeline) == list(range(50))


def test_records_that_are_being_measured_hold_up_no_shutdown(make: Make, tmp_path: Path) -> None:
    pipeline = make("backend")
    begin(pipeline, tmp_path)
    pipeline.restart()
    (tmp_path / "go on").touch()
    pipeline.settle()
    assert delivered(pipeline) == list(range(50))


def test_while_the_circuit_is_open_nothing_is_measured(make: Make) -> None:
    pipeline = make({"field": "misspelt"}, task={"on_error": {"circuit": {"max_run": 10, "close_after_s": None}}})
    pipeline.send([record(it, 1) for it in range(5_000)])
    pipeline.until(lambda: pipeline.status().tasks["main"].circuit.state == "open", "the circuit is open")
    pipeline.until(lambda: pipeline.status().tasks["main"].counts.dead, "what had failed is written")
    task = pipeline.status().tasks["main"]
    # What the process had already got, no more: two chunks.
    assert task.counts.dead <= 2 * 1_024
    assert task.measuring >= 5_000 - 2 * 1_024 - (5_000 - task.counts.taken)
    pipeline.restart()  # what waits is handed back at once


@pytest.mark.parametrize("of", [{"field": "pad"}, "backend"])
def test_the_benchmark_measures_every_record(of: Any) -> None:
    measured = asyncio.run(lengths.alone(of, 3_000))
    assert 0 < measured["cpu_s"] < 60
    assert 0 < measured["wall_s"] < 60


def test_the_benchmark_sees_a_wrong_length() -> None:
    with pytest.raises(AssertionError, match="lengths that are others', or are wrong"):
        asyncio.run(lengths.alone({"field": "name"}, 3_000))


def test_a_backend_that_tells_no_lengths_does_not_start(make: Make) -> None:
    with pytest.raises(WorkerStartError) as caught:
        make("backend", backend="Identity")
    assert str(caught.value) == (
        "the process that measures lengths did not start: tasks.main.batch.length is backend, but Identity has no "
        "method length(record); define it, or measure a field"
    )


def test_a_processor_without_such_lengths_has_no_measuring_process(make: Make) -> None:
    pipeline = make("bytes")
    pipeline.process([record(0, 1)])
    assert pipeline.status().measurer is None
