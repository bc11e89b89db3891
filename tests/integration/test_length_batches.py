"""Batches by length in a running processor: order, books and shutdown where records leave the window out of order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from streamproc.settings import Settings
from streamproc.testing import Pipeline

ROOT = Path(__file__).parents[2]
FOR_EVER_MS = 60_000


def settings_for(*, limits: dict[str, Any] | None = None, ordering: str = "partition", **batch: Any) -> Settings:
    return Settings.model_validate(
        {
            "name": "app",
            "backend": {"path": "tests.support.backends:Identity", "base_dir": str(ROOT)},
            "pool": {"restart_backoff_ms": 5, "start_attempts": 1},
            "topics_dir": "nowhere",
            "rebalance_drain_s": 50,
            "shutdown_timeout_s": 500,
            "tasks": {
                "main": {
                    "input": {"topics": ["in"]},
                    "ordering": ordering,
                    "batch": {"length": "bytes", **batch},
                    "limits": limits or {},
                }
            },
        }
    )


@pytest.fixture
def make() -> Iterator[Callable[..., Pipeline]]:
    made: list[Pipeline] = []

    def make(*arguments: Any, **options: Any) -> Pipeline:
        made.append(Pipeline(*arguments, deadline_s=20.0, **options))
        return made[-1].__enter__()

    yield make
    for it in made:
        it.stop()


def record(number: int, length: int) -> dict[str, Any]:
    return {"id": number, "pad": "x" * length}


def ids(pipeline: Pipeline) -> list[int]:
    return [value["id"] for value in pipeline.outputs().values]


@pytest.mark.parametrize("strategy", ["none", "fifo", "bucketed", "exact"])
def test_results_keep_their_order_and_the_metrics_say_how_much_was_padded(
    make: Callable[..., Pipeline], strategy: str
) -> None:
    pipeline = make(settings_for(strategy=strategy, max_size=8, max_padded=20_000))
    outputs = pipeline.process([record(it, 4 ** (it % 6)) for it in range(600)])
    assert [value["id"] for value in outputs.values] == list(range(600))
    assert sum(it["records"] for it in outputs.metrics) == 600
    ratios = [it["padding_ratio"] for it in outputs.metrics]
    assert min(ratios) >= 1
    if strategy == "none":
        assert set(ratios) == {1.0}
    assert all(it["predicted_wall_time"] > 0 for it in outputs.metrics)
    # What each batch was padded to is between its mean and what the limit allows, unless one record was alone.
    assert all(it["records"] == 1 or it["records"] <= 8 for it in outputs.metrics)


def test_without_a_length_the_metrics_know_nothing_of_padding(make: Callable[..., Pipeline]) -> None:
    pipeline = make(settings_for(length=None))
    (metrics,) = pipeline.process([record(1, 5)]).metrics
    assert (metrics["padding_ratio"], metrics["predicted_wall_time"]) == (None, None)


def overtake(pipeline: Pipeline) -> None:
    """Two short records fill a batch and run, while a long one that came before them waits for company."""
    pipeline.send([record(0, 5_000), record(1, 10), record(2, 10)])
    pipeline.until(lambda: pipeline.status().tasks["main"].last_batch, "the short ones are executed")
    assert pipeline.status().tasks["main"].in_flight_records == 3, "their results wait for the long one"


def test_a_record_that_was_overtaken_does_not_hold_up_a_rebalance(make: Callable[..., Pipeline]) -> None:
    pipeline = make(settings_for(max_size=2, max_wait_ms=1_000))
    overtake(pipeline)
    pipeline.move_partitions()
    pipeline.settle()
    assert ids(pipeline) == [0, 1, 2]


def test_a_record_that_was_overtaken_does_not_hold_up_a_shutdown(make: Callable[..., Pipeline]) -> None:
    pipeline = make(settings_for(max_size=2, max_wait_ms=1_000))
    overtake(pipeline)
    pipeline.restart()
    pipeline.settle()
    assert ids(pipeline) == [0, 1, 2]


def test_a_record_that_was_overtaken_goes_where_the_results_that_wait_for_it_leave_no_room(
    make: Callable[..., Pipeline],
) -> None:
    """They are more than the limit: nothing else is dispatched, and nothing else would let them go."""
    pipeline = make(settings_for(limits={"max_in_flight_bytes": 3_000}, max_size=20, max_wait_ms=FOR_EVER_MS))
    outputs = pipeline.process([record(10, 600), *(record(it, 10) for it in range(11, 31))])
    assert [value["id"] for value in outputs.values] == list(range(10, 31))
    assert [(it["records"], it["closed_by"]) for it in outputs.metrics] == [(20, "size"), (1, "overtaken")]
