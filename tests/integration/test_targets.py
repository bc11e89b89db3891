"""Latencies to keep, and tasks' shares of the workers, in a running processor."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from benchmarks import lateness
from benchmarks.in_memory import running, settings_for
from streamproc.records import Batch
from streamproc.runtime.processor import HANDOVER_S
from streamproc.testing import Pipeline
from tests.support.asyncs import until

ROOT = Path(__file__).parents[2]
FOR_EVER_MS = 60_000


@pytest.mark.parametrize("length", [None, "bytes"])
def test_a_window_closes_in_time_for_its_target_and_who_kept_it_is_counted(length: str | None) -> None:
    batch = {"max_wait_ms": FOR_EVER_MS, "target_latency_ms": 5_000, "target_margin_ms": 4_900, "length": length}
    with Pipeline(settings_for("tests.support.backends:Identity", {"main": {"batch": batch}})) as pipeline:
        outputs = pipeline.process([{"id": 1}, {"id": 2}])
        assert {it["closed_by"] for it in outputs.metrics} == {"slo"}
        assert all(it["predicted_wall_time"] > 0 for it in outputs.metrics)
        target = pipeline.status().tasks["main"].target
        assert target is not None
        assert (target.latency_ms, target.within, target.beyond) == (5_000, 2, 0)


def test_what_was_answered_too_late_is_counted_too() -> None:
    """Each batch takes 5 ms."""
    batch = {"max_wait_ms": 0, "target_latency_ms": 1, "target_margin_ms": 0}
    with Pipeline(settings_for("benchmarks.working:FiveMilliseconds", {"main": {"batch": batch}})) as pipeline:
        pipeline.process([{"id": 1}, {"id": 2}])
        status = pipeline.status().tasks["main"]
        assert status.target is not None
        assert (status.target.within, status.target.beyond, status.weight) == (0, 2, 1.0)


def test_a_task_of_weight_three_gets_three_times_the_workers_time() -> None:
    """Both have more than the worker can do, in batches of 5 ms each, until the heavy one is through."""
    batches: dict[str, int] = {"one": 0, "three": 0}
    wanted = 90

    async def test() -> None:
        tasks: dict[str, dict[str, Any]] = {"one": {}, "three": {"weight": 3}}
        settings = settings_for(
            "benchmarks.working:FiveMilliseconds",
            {name: {"batch": {"max_size": 4}, **it} for name, it in tasks.items()},
        )
        async with running(settings) as (processor, broker):
            assert {name: it.weight for name, it in processor.status().tasks.items()} == {"one": 1, "three": 3}
            submit = processor.pool.submit

            def submitted(batch: Batch) -> None:
                submit(batch)
                if batches["three"] < wanted and all(it.batcher.size for it in processor.tasks.values()):
                    batches[batch.task] += 1

            processor.pool.submit = submitted  # type: ignore[method-assign]  # to look on
            for name in tasks:
                for number in range(4 * wanted + 40):
                    broker.append(name, b'{"id":%d}' % number)
            await until(lambda: batches["three"] == wanted, "the heavy task has had its batches", deadline_s=30)

    asyncio.run(test())
    assert batches["one"] * 3 == pytest.approx(wanted, rel=0.2)


def test_no_window_that_its_wait_closes_is_early_by_more_than_its_hand_over() -> None:
    """How late they are depends on the machine: the benchmark says that."""
    figures = lateness.measure([1.0, 2.3], 60)
    assert figures["alarm"]["all"]["windows"] == figures["loop"]["all"]["windows"] == 60
    assert figures["alarm"]["all"]["earliest_ms"] >= -HANDOVER_S * 1_000 - 0.001
