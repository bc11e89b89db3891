"""The circuit in a processor with real workers, over the in-memory broker: a model that fails on everything."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from streamproc.observe.http import create_app
from streamproc.records import TopicPartition
from streamproc.runtime.processor import Processor
from streamproc.runtime.task_stream import TaskStream
from streamproc.settings import Settings
from streamproc.testing import MemoryBroker, MemoryConsumer
from tests.support.asyncs import until

TESTS = Path(__file__).parents[2]
PARTITIONS = 3
QUICK_S = 20
"""Less than the times that a drain may take here, and more than a busy machine needs."""


def settings_for(circuit: dict[str, Any], on_error: dict[str, Any], **task: Any) -> Settings:
    limits = {"max_rate": 0.5, "min_records": 20, "max_run": None, "close_after_s": None, **circuit}
    errors = {"retries": 0, "backoff_ms": 1, "circuit": limits, **on_error}
    common = {"batch": {"max_size": 8, "max_wait_ms": 5}, "commit_interval_ms": 20}
    return Settings.model_validate(
        {
            "name": "app",
            "backend": {"path": "tests.support.backends:Scripted"},
            "pool": {"restart_backoff_ms": 5, "workers": 1},
            "rebalance_drain_s": 60,
            "shutdown_timeout_s": 60,
            "tasks": {
                "main": {
                    "input": {"topics": ["in"]},
                    "on_error": errors,
                    "limits": {"max_in_flight_records": 80},
                    **common,
                    **task,
                },
                "other": {"input": {"topics": ["other"]}, **common},
            },
        }
    )


def make_broker(**results: str) -> MemoryBroker:
    broker = MemoryBroker()
    for name in ("in", "other"):
        broker.create_topic(name, PARTITIONS)
        broker.create_topic(f"{name}.results", PARTITIONS, configs=results)
        broker.create_topic(f"{name}.dead", PARTITIONS)
    broker.create_topic("app.metrics")
    return broker


class Clock:
    """Goes as time does, and further when it is told to."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead_s


@contextlib.asynccontextmanager
async def processing(
    broker: MemoryBroker,
    *,
    clock: Clock | None = None,
    circuit: dict[str, Any] | None = None,
    on_error: dict[str, Any] | None = None,
    **task: Any,
) -> AsyncIterator[tuple[Processor, TaskStream]]:
    settings = settings_for(circuit or {}, on_error or {}, **task)
    told = {"schemas": {}, "envelope": "full", "max_value_bytes": 100_000, "warmup": []}
    setup = {
        "backend": {"path": settings.backend.path, "loader": "local", "base_dir": str(TESTS), "config": "{}"},
        "tasks": {"main": told, "other": told},
        "shared_memory_threshold_bytes": 262_144,
        "logging": {"level": "error", "format": "json"},
    }
    processor = Processor(settings, setup, broker, rng=random.Random(1), clock=clock or time.monotonic)
    try:
        await processor.start()
        yield processor, processor.tasks["main"]
    finally:
        begun = time.monotonic()
        await processor.stop()
        assert time.monotonic() - begun < QUICK_S


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(test())


def put(broker: MemoryBroker, count: int, *, topic: str = "in", start: int = 0, **fields: Any) -> None:
    for index in range(start, start + count):
        broker.append(topic, json.dumps({"id": index, **fields}).encode(), partition=index % PARTITIONS)


def settled(broker: MemoryBroker, topic: str = "in") -> Counter[tuple[int, int]]:
    """How often each input record, by partition and offset, is a result or a dead letter."""
    told = [json.loads(it.value or b"")["source"] for it in broker.records(f"{topic}.results")]
    letters = [dict(it.headers) for it in broker.records(f"{topic}.dead")]
    return Counter((it["partition"], it["offset"]) for it in told) + Counter(
        (int(it["streamproc-source-partition"] or 0), int(it["streamproc-source-offset"] or 0)) for it in letters
    )


def each(count: int) -> Counter[tuple[int, int]]:
    return Counter((index % PARTITIONS, index // PARTITIONS) for index in range(count))


async def all_committed(broker: MemoryBroker, count: int, task: str = "main") -> None:
    await until(lambda: sum(broker.committed(f"app.{task}").values()) == count, f"{count} records are committed")


async def opened(processor: Processor, task: TaskStream) -> None:
    """The circuit is open, and what ran then is finished and written."""
    await until(lambda: task.circuit.is_open, "the circuit opens")
    await until(lambda: not any(it.batches for it in processor.pool.workers()), "what runs is finished")
    assert task._sink is not None
    await task._sink.flush()


async def ask(processor: Processor, method: str, path: str) -> httpx.Response:
    app = create_app(processor, processor.metrics, processor.settings.http)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://sidecar") as client:
        return await client.request(method, path, headers={"content-type": "application/json"})


def test_a_broken_model_opens_the_circuit_other_tasks_go_on_and_a_mended_one_delivers_everything_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        broker, mended = make_broker(), tmp_path / "mended"
        async with processing(broker) as (processor, task):
            await until(lambda: processor.ready().ok, "ready")
            put(broker, 300, do="fail", until=str(mended))
            await opened(processor, task)
            dead = len(broker.records("in.dead"))
            assert 20 <= dead < 80
            assert task.again, "halves wait for it to close"

            put(broker, 100, topic="other")
            await all_committed(broker, 100, "other")
            assert settled(broker, "other") == each(100)
            assert len(broker.records("in.dead")) == dead
            assert broker.records("in.results") == []
            assert task.counts.taken == task.ledger.in_flight_records + dead < 300
            await until(lambda: processor.metrics.task("main").paused_partitions._value.get() == 3, "a tick")

            answer = await ask(processor, "GET", "/readyz")
            assert answer.status_code == 503
            assert answer.json()["reasons"] == [f"task main: {processor.status().tasks['main'].reason}"]
            (reason,) = answer.json()["reasons"]
            assert reason.startswith(
                "task main: the circuit is open: 20 of the last 20 records failed, most often with"
            )
            assert "the model is broken" in reason
            assert reason.endswith("; closes with `streamproc circuit close main`")
            assert (await ask(processor, "GET", "/livez")).status_code == 200
            status = (await ask(processor, "GET", "/status")).json()["tasks"]
            assert status["other"]["circuit"]["state"] == "closed"
            assert status["main"]["paused"]
            circuit = status["main"]["circuit"]
            assert abs(datetime.now(UTC) - datetime.fromisoformat(circuit.pop("opened_at"))) < timedelta(minutes=1)
            assert circuit.pop("reason") in reason
            assert circuit == {"state": "open", "bad": 20, "decided": 20, "closes_in_s": None, "openings": 1}
            metrics = processor.metrics.registry
            assert metrics.get_sample_value("streamproc_circuit_open", {"task": "main"}) == 1
            assert metrics.get_sample_value("streamproc_circuit_open", {"task": "other"}) == 0
            assert metrics.get_sample_value("streamproc_circuit_openings_total", {"task": "main"}) == 1

            mended.touch()
            answer = await ask(processor, "POST", "/tasks/main/circuit/close")
            assert (answer.status_code, answer.json()["state"]) == (200, "closed")
            assert (await ask(processor, "GET", "/readyz")).status_code == 200
            await all_committed(broker, 300)
            assert metrics.get_sample_value("streamproc_circuit_open", {"task": "main"}) == 0
            assert len(broker.records("in.dead")) == dead, "none but those before"
        assert settled(broker) == each(300)

    with caplog.at_level(logging.WARNING, logger="streamproc.runtime.task_stream"):
        run(test)
    lines = [it.getMessage() for it in caplog.records if "circuit" in it.getMessage()]
    assert len(lines) == 2
    assert lines[0].startswith("task main: the circuit is open: 20 of the last 20 records failed")
    assert "`streamproc circuit close main`; dead letters are in topic in.dead" in lines[0]
    assert lines[1].startswith("task main: the circuit closes by command after")


def test_it_closes_by_itself_after_its_time_and_opens_anew_while_the_model_is_broken(tmp_path: Path) -> None:
    async def test() -> None:
        broker, mended, clock = make_broker(), tmp_path / "mended", Clock()
        async with processing(broker, clock=clock, circuit={"close_after_s": 300}) as (processor, task):
            put(broker, 200, do="fail", until=str(mended))
            await opened(processor, task)
            assert "; closes by itself in " in processor.ready().reasons[0]
            assert "or with `streamproc circuit close main`" in processor.ready().reasons[0]
            closes_in_s = processor.status().tasks["main"].circuit.closes_in_s
            assert closes_in_s is not None
            assert 0 < closes_in_s <= 300
            clock.ahead_s += 301
            await until(lambda: task.circuit.openings == 2, "it closes, and opens anew")
            await opened(processor, task)
            assert len(broker.records("in.dead")) < 200
            mended.touch()
            clock.ahead_s += 301
            await all_committed(broker, 200)
            assert not task.circuit.is_open
        assert settled(broker) == each(200)

    run(test)


@pytest.mark.parametrize("ordering", ["partition", "key", "unordered"])
def test_a_rebalance_while_it_is_open_is_quick_and_loses_nothing(tmp_path: Path, ordering: str) -> None:
    async def test() -> None:
        broker, mended = make_broker(), tmp_path / "mended"
        # Retries wait their pause while others of the batches' halves wait for the circuit.
        errors = {"retries": 1, "backoff_ms": 50}
        async with processing(broker, ordering=ordering, on_error=errors) as (processor, task):
            put(broker, 200, do="fail", until=str(mended))
            await opened(processor, task)
            assert task.again or task._retries
            begun = time.monotonic()
            other = await join(broker)
            assert time.monotonic() - begun < QUICK_S
            await broker.settled()
            assert not task.again
            taken = task.counts.taken
            await other.stop()
            await broker.settled()
            await until(lambda: task.source.assigned_partitions == PARTITIONS, "everything is assigned again")
            assert task.circuit.is_open, "another assignment mends nothing"
            put(broker, 100, topic="other")
            await all_committed(broker, 100, "other")
            assert task.counts.taken == taken, "nothing is read of the new assignment"
            mended.touch()
            task.close_circuit()
            await all_committed(broker, 200)
        found = settled(broker)
        assert found.keys() == each(200).keys()
        if ordering == "partition":
            assert found == each(200)

    run(test)


def test_a_stop_while_it_is_open_is_quick_and_the_next_start_loses_nothing(tmp_path: Path) -> None:
    async def test() -> None:
        broker, mended = make_broker(), tmp_path / "mended"
        async with processing(broker) as (processor, task):  # which holds the time that stopping takes
            put(broker, 200, do="fail", until=str(mended))
            await opened(processor, task)
            assert task.again
        assert 0 < sum(broker.committed("app.main").values()) < 200
        mended.touch()
        async with processing(broker):
            await all_committed(broker, 200)
        assert settled(broker) == each(200)

    run(test)


def test_what_fails_while_a_stop_waits_for_it_is_handed_back_where_the_circuit_is_open(tmp_path: Path) -> None:
    async def test() -> None:
        broker, done = make_broker(), tmp_path / "done"
        async with processing(broker, batch={"max_size": 8, "max_wait_ms": 5}) as (processor, task):
            await until(lambda: processor.ready().ok, "ready")
            put(broker, 24, do="compute", until=str(done))
            await until(lambda: task.counts.taken == 24, "everything is read")
            await until(lambda: len(processor.pool.workers()[0].batches) == 2, "one computes, one is queued")
            stopping = asyncio.ensure_future(processor.stop())
            await until(lambda: task.state == "draining", "it drains")
            task.open_circuit()
            # The batch that computes comes back as halves, the queued one as it was; neither is executed again.
            os.kill(processor.pool.workers()[0].pid, signal.SIGKILL)
            begun = time.monotonic()
            await stopping
            assert time.monotonic() - begun < QUICK_S
            assert task.progress - task.commits == 1, "one execution, that of the worker that was killed"
        done.touch()
        async with processing(broker):
            await all_committed(broker, 24)
        assert settled(broker) == each(24)

    run(test)


def test_a_task_paused_by_hand_keeps_what_it_read_and_is_not_taken_for_stuck(tmp_path: Path) -> None:
    async def test() -> None:
        broker, done = make_broker(), tmp_path / "done"
        async with processing(broker, batch={"max_size": 8, "max_wait_ms": 300}) as (processor, task):
            await until(lambda: processor.ready().ok, "ready")
            put(broker, 1, do="compute", until=str(done))
            await until(lambda: task.batcher.size, "it waits for others")
            answer = await ask(processor, "POST", "/tasks/main/circuit/open")
            assert (answer.status_code, answer.json()["reason"]) == (200, "opened by hand")
            assert answer.json()["closes_in_s"] is None
            put(broker, 10, start=1)
            await until(lambda: processor._alarm.at is None, "its deadline passes, and no other is set")
            put(broker, 10, topic="other")
            await all_committed(broker, 10, "other")
            assert task.batcher.size == task.counts.taken == task.ledger.in_flight_records == 1, "nothing more is read"
            inspector, now = processor._inspector, processor.clock()
            inspector.observe(now)
            assert inspector.live(now + 100_000).ok
            assert processor.ready().reasons == [
                "task main: the circuit is open: opened by hand; closes with `streamproc circuit close main`"
            ]

            await ask(processor, "POST", "/tasks/main/circuit/close")
            await until(lambda: any(it.batches for it in processor.pool.workers()), "it computes")
            inspector.observe(now)
            assert "no batch was executed for 100000 s" in inspector.live(now + 100_000).reasons[0]
            done.touch()
            await all_committed(broker, 11)
        assert settled(broker) == each(11)

    run(test)


def test_records_that_are_dropped_by_policy_open_it_too(tmp_path: Path) -> None:
    async def test() -> None:
        broker, mended = make_broker(), tmp_path / "mended"
        async with processing(broker, on_error={"then": "drop"}, circuit={"max_rate": None, "max_run": 30}) as (
            processor,
            task,
        ):
            put(broker, 200, do="fail", until=str(mended))
            await opened(processor, task)
            assert "30 records in a row failed" in processor.ready().reasons[0]
            assert broker.records("in.dead") == []
            dropped = task.counts.dropped
            assert 30 <= dropped < 80
            mended.touch()
            task.close_circuit()
            await all_committed(broker, 200)
            assert task.counts.dropped == dropped
        assert len(settled(broker)) == 200 - dropped

    run(test)


def test_results_that_do_not_fit_their_topic_open_it_though_the_model_made_them() -> None:
    async def test() -> None:
        broker = make_broker(**{"max.message.bytes": "150"})
        async with processing(broker) as (processor, task):
            put(broker, 200)
            await opened(processor, task)
            assert "most often with sink ResultTooLarge" in processor.ready().reasons[0]
            assert len(broker.records("in.dead")) < 200

    run(test)


async def join(broker: MemoryBroker) -> MemoryConsumer:
    """Another member of the group, which reads nothing."""

    async def ignore(_: set[TopicPartition]) -> None:
        return

    other = broker.consumer(group_id="app.main")
    await other.start(["in"], ignore, ignore)
    return other
