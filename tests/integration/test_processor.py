"""The processor as a whole over the in-memory broker, with real worker processes: what a broker can do to it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from streamproc.errors import BrokerError, CommitRejectedError, InternalError, SinkError, TaskStoppedError
from streamproc.observe.health import ProgressWatch
from streamproc.observe.metric_table import RESTART_CAUSES
from streamproc.records import TopicPartition
from streamproc.runtime.processor import Processor
from streamproc.settings import Settings
from streamproc.testing import MemoryBroker, MemoryConsumer, MemoryRecord
from tests.support.asyncs import until

TESTS = Path(__file__).parents[2]
PARTITIONS = 3


def settings_for(**options: Any) -> Settings:
    task = {"batch": {"max_size": 8, "max_wait_ms": 5}, "commit_interval_ms": 20, **options.pop("task", {})}
    return Settings.model_validate(
        {
            "name": "app",
            "backend": {"path": f"tests.support.backends:{options.pop('backend', 'Scripted')}"},
            "pool": {"restart_backoff_ms": 5, **options.pop("pool", {})},
            "tasks": {"main": {"input": {"topics": ["in"]}, **task}},
            **options,
        }
    )


def make_broker(**topic_configs: str) -> MemoryBroker:
    broker = MemoryBroker()
    for name in ("in", "in.results", "in.dead"):
        broker.create_topic(name, PARTITIONS, configs=topic_configs if name == "in.results" else None)
    broker.create_topic("app.metrics")
    return broker


def setup_for(settings: Settings) -> dict[str, Any]:
    return {
        "backend": {"path": settings.backend.path, "loader": "local", "base_dir": str(TESTS), "config": "{}"},
        "tasks": {"main": {"schemas": {}, "envelope": "full", "max_value_bytes": 100_000, "warmup": []}},
        "shared_memory_threshold_bytes": 262_144,
        "logging": {"level": "error", "format": "json"},
    }


@contextlib.asynccontextmanager
async def processing(broker: MemoryBroker, **options: Any) -> AsyncIterator[Processor]:
    wall_clock = options.pop("wall_clock", time.time)
    settings = settings_for(**options)
    processor = Processor(settings, setup_for(settings), broker, rng=random.Random(1), wall_clock=wall_clock)
    try:
        await processor.start()
        yield processor
    finally:
        await processor.stop()


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(test())


def put(broker: MemoryBroker, count: int, *, start: int = 0, **fields: Any) -> None:
    for index in range(start, start + count):
        broker.append("in", json.dumps({"id": index, **fields}).encode(), partition=index % PARTITIONS)


def sources(records: list[MemoryRecord]) -> list[tuple[int, int]]:
    told = [json.loads(record.value or b"")["source"] for record in records]
    return [(it["partition"], it["offset"]) for it in told]


def everything(count: int) -> list[tuple[int, int]]:
    return sorted((index % PARTITIONS, index // PARTITIONS) for index in range(count))


async def all_committed(broker: MemoryBroker, count: int) -> None:
    done = f"{count} records are committed"
    await until(lambda: sum(broker.committed("app.main").values()) == count, done, deadline_s=90)


def test_everything_is_delivered_once_and_committed() -> None:
    async def test() -> None:
        broker = make_broker()
        put(broker, 100)
        async with processing(broker) as processor:
            await all_committed(broker, 100)
            assert processor.ready().ok
            assert processor.live().ok
        assert sources(broker.records("in.results")) == everything(100)

    run(test)


def test_how_long_a_record_took_is_known_once_what_became_of_it_is_acknowledged() -> None:
    async def test() -> None:
        broker = make_broker()
        async with processing(broker) as processor:
            with broker.acknowledgements_held():
                put(broker, 20)
                put(broker, 1, start=20, do="raise")
                await until(lambda: processor.tasks["main"].ledger.in_flight_records == 21, "they are read")
                assert processor.status().tasks["main"].latency_ms.count == 0
            await all_committed(broker, 21)
            latency = processor.status().tasks["main"].latency_ms
            assert latency.count == sum(count for *_, count in latency.buckets) == 21
            assert latency.p50 is not None
            assert latency.p99 is not None
            assert 0 < latency.p50 <= latency.p99
        assert len(broker.records("in.dead")) == 1

    run(test)


def test_gaps_in_the_offsets_are_committed_over() -> None:
    async def test() -> None:
        broker = make_broker()
        put(broker, 30)
        for offset in (0, 3, 4, 9):
            broker.remove("in", 0, offset)
        async with processing(broker):
            await until(lambda: len(broker.records("in.results")) == 26, "what is left is processed")
            await until(lambda: broker.committed("app.main").get(TopicPartition("in", 0)) == 9, "0 is committed")
        assert [offset for partition, offset in sources(broker.records("in.results")) if partition == 0] == [
            *(1, 2, 5, 6, 7, 8)
        ]

    run(test)


def test_nothing_is_committed_that_is_not_acknowledged_and_reading_stops_at_the_limit() -> None:
    async def test() -> None:
        broker = make_broker()
        limits = {"max_in_flight_records": 40}
        async with processing(broker, task={"limits": limits}) as processor:
            task = processor.tasks["main"]
            with broker.acknowledgements_held():
                put(broker, 300)
                await until(lambda: task.source.paused, "reading pauses")
                assert task.ledger.in_flight_records == 40
                for _ in range(50):
                    await asyncio.sleep(0)
                    assert task.ledger.in_flight_records <= 40
                assert set(broker.committed("app.main").values()) <= {0}
                assert processor.status().tasks["main"].reason == "back-pressure"
            await all_committed(broker, 300)
            assert not task.source.paused
            assert processor.metrics.task("main").pauses._value.get() >= 1
        assert sources(broker.records("in.results")) == everything(300)

    run(test)


def test_bytes_in_flight_are_bounded_too() -> None:
    async def test() -> None:
        broker = make_broker()
        limits = {"max_in_flight_bytes": 50_000}
        async with processing(broker, backend="Identity", task={"limits": limits}) as processor:
            task = processor.tasks["main"]
            put(broker, 1, pad="x" * 10_000)
            await all_committed(broker, 1)
            with broker.acknowledgements_held():
                put(broker, 60, start=1, pad="x" * 10_000)
                await until(lambda: task.source.paused, "reading pauses")
                ledger = task.ledger
                assert 50_000 / 2 < ledger.in_flight_bytes - ledger.output_bytes < 50_000 + 10_100
            await all_committed(broker, 61)

    run(test)


def test_a_commit_that_fails_is_tried_again() -> None:
    async def test() -> None:
        broker = make_broker()
        broker.fail_next("commit", BrokerError("the coordinator is moving"), times=3)
        put(broker, 10)
        async with processing(broker) as processor:
            await all_committed(broker, 10)
            assert processor.metrics.task("main").commit_failures._value.get() == 3

    run(test)


def test_a_rejected_commit_is_no_failure() -> None:
    async def test() -> None:
        broker = make_broker()
        broker.fail_next("commit", CommitRejectedError("another generation"))
        put(broker, 10)
        async with processing(broker) as processor:
            await all_committed(broker, 10)
            assert processor.failure is None

    run(test)


def test_results_that_cannot_be_written_end_the_processor_and_commit_nothing() -> None:
    async def test() -> None:
        broker = make_broker()
        put(broker, 10)
        broker.fail_next("write", BrokerError("not authorized"), times=50)
        with pytest.raises(SinkError, match=r"cannot be written to topic .* not authorized"):
            async with processing(broker) as processor:
                await processor.wait()
        assert set(broker.committed("app.main").values()) <= {0}
        broker._faults.clear()  # what the operator mended
        async with processing(broker):
            await all_committed(broker, 10)

    run(test)


def test_a_result_too_large_for_its_topic_becomes_a_dead_letter_that_says_so() -> None:
    async def test() -> None:
        broker = make_broker(**{"max.message.bytes": "2000"})
        async with processing(broker, backend="Identity"):
            put(broker, 5)
            put(broker, 1, start=5, pad="x" * 3_000)
            put(broker, 5, start=6)
            await all_committed(broker, 11)
        assert len(broker.records("in.results")) == 10
        (letter,) = broker.records("in.dead")
        told = dict(letter.headers)
        assert told["streamproc-error-type"] == b"ResultTooLarge"
        assert told["streamproc-cause"] == b"too_large"
        assert b"max.message.bytes is 2000" in (told["streamproc-error-message"] or b"")
        assert json.loads(letter.value or b"")["id"] == 5

    run(test)


def test_a_partition_that_moves_while_its_batch_computes_is_waited_for(tmp_path: Path) -> None:
    async def test() -> None:
        broker = make_broker()
        done = tmp_path / "done"
        async with processing(broker, rebalance_drain_s=20) as processor:
            broker.append("in", json.dumps({"id": 0, "do": "compute", "until": str(done)}).encode())
            await until(lambda: any(it.batches for it in processor.pool.workers()), "the batch computes")
            joining = asyncio.ensure_future(join(broker))
            await until(lambda: not processor.tasks["main"].source.assigned_partitions, "the rebalance has begun")
            done.touch()
            other = await joining
            await broker.settled()
            await all_committed(broker, 1)
            assert len(broker.records("in.results")) == 1
            await other.stop()

    run(test)


@pytest.mark.parametrize("reset", ["earliest", "latest"])
def test_a_partition_that_does_not_drain_in_time_is_let_go_and_its_late_outcome_counts_for_nothing(
    tmp_path: Path, reset: str
) -> None:
    async def test() -> None:
        broker = make_broker()
        done = tmp_path / "done"
        reading = {"input": {"topics": ["in"], "auto_offset_reset": reset}}
        async with processing(broker, rebalance_drain_s=0.05, task=reading) as processor:
            await until(lambda: processor.ready().ok, "it reads")
            record = {"id": 0, "do": "compute", "until": str(done), "once": str(tmp_path / "once")}
            broker.append("in", json.dumps(record).encode())
            await until((tmp_path / "once").exists, "the batch computes")
            other = await join(broker)
            await broker.settled()
            assert set(broker.committed("app.main").values()) <= {0}
            await other.stop()
            await broker.settled()
            done.touch()
            await all_committed(broker, 1)
            await until(lambda: processor.tasks["main"].counts.results == 1, "there is one result")
        assert len(broker.records("in.results")) == 1

    run(test)


def test_a_member_that_was_thrown_out_comes_back_and_nothing_is_lost() -> None:
    async def test() -> None:
        broker = make_broker()
        put(broker, 30)
        async with processing(broker) as processor:
            await all_committed(broker, 30)
            consumer = processor.tasks["main"].consumer
            assert isinstance(consumer, MemoryConsumer)
            broker.expel(consumer)
            put(broker, 30, start=30)
            await all_committed(broker, 60)
        assert set(sources(broker.records("in.results"))) == set(everything(60))

    run(test)


def test_what_a_member_that_was_thrown_out_has_in_flight_is_left_to_the_new_owner(tmp_path: Path) -> None:
    async def test() -> None:
        broker = make_broker()
        done = tmp_path / "done"
        async with processing(broker, rebalance_drain_s=60) as processor:
            task = processor.tasks["main"]
            record = {"id": 0, "do": "compute", "until": str(done), "once": str(tmp_path / "once")}
            broker.append("in", json.dumps(record).encode())
            await until((tmp_path / "once").exists, "the batch computes")
            (lease,) = [it for it in task.ledger.leases() if it.partition.partition == 0]
            assert isinstance(task.consumer, MemoryConsumer)
            broker.expel(task.consumer)
            # It does not wait for its batch before it joins again: nobody would want the result.
            await until(lambda: not task.ledger.is_live(lease) and task.ledger.assigned(), "it is a member again")
            assert broker.records("in.results") == []
            done.touch()
            await all_committed(broker, 1)
        assert len(broker.records("in.results")) == 1

    run(test)


def test_records_in_a_window_are_given_back_at_shutdown_and_read_again() -> None:
    async def test() -> None:
        broker = make_broker()
        waiting = {"batch": {"max_size": 100, "max_wait_ms": 60_000}}
        async with processing(broker, task=waiting) as processor:
            task = processor.tasks["main"]
            await until(lambda: processor.ready().ok, "ready")
            # With a backlog nothing waits; one record at the log's end does.
            put(broker, 1)
            await until(lambda: task.batcher.size == 1 or task.counts.results == 1, "it is read")
        async with processing(broker):
            await all_committed(broker, 1)
        assert len(broker.records("in.results")) == 1

    run(test)


def test_a_record_at_fault_stops_the_task_where_the_settings_say_so() -> None:
    async def test() -> None:
        broker = make_broker()
        options = {"on_error": {"retries": 0, "then": "stop"}}
        with pytest.raises(TaskStoppedError, match=r"topic in, partition 0, offset 0") as caught:
            async with processing(broker, task=options) as processor:
                broker.append("in", b'{"id": 0, "do": "raise"}')
                await processor.wait()
        assert (caught.value.topic, caught.value.partition, caught.value.offset) == ("in", 0, 0)
        assert set(broker.committed("app.main").values()) <= {0}

    run(test)


def letters(broker: MemoryBroker) -> dict[int, dict[str, str]]:
    """The headers of each dead letter, by its record's id."""
    found = broker.records("in.dead")
    told = {json.loads(it.value or b"")["id"]: {k: (v or b"").decode() for k, v in it.headers} for it in found}
    assert len(told) == len(found), "a record became two dead letters"
    return told


def restarts(processor: Processor) -> dict[str, int]:
    """Workers replaced, by cause."""
    counts = {cause: int(processor.metrics.worker_restarts.labels(cause)._value.get()) for cause in RESTART_CAUSES}
    return {cause: count for cause, count in counts.items() if count}


@pytest.mark.parametrize(
    ("action", "cause", "kind", "deaths"),
    [
        ("die", "crash", "WorkerDied", ("killed", 7)),
        ("compute", "timeout", "DeadlineExceeded", ("deadline", 6)),
        ("allocate", "oom", "OutOfMemory", ("oom", 7)),
        ("raise", "exception", "ValueError", None),
    ],
)
def test_one_poison_record_among_64_becomes_the_only_dead_letter(
    action: str, cause: str, kind: str, deaths: tuple[str, int] | None, tmp_path: Path
) -> None:
    async def test() -> None:
        broker = make_broker()
        for index in range(64):
            poison = {"do": action, "until": str(tmp_path / "never")} if index == 37 else {}
            broker.append("in", json.dumps({"id": index, **poison}).encode())
        pool = {"batch_timeout_s": 1 if cause == "timeout" else 60, "max_worker_memory_mb": 200}
        async with processing(broker, task={"batch": {"max_size": 64, "max_wait_ms": 60_000}}, pool=pool) as processor:
            await all_committed(broker, 64)
            found = restarts(processor)
            counts = processor.tasks["main"].counts
            assert (counts.taken, counts.results, counts.dead) == (64, 63, 1)
            dead = processor.metrics.records_dead
            stage = "execute" if deaths is None else "worker"
            assert dead.labels(task="main", cause=cause, stage=stage, kind=kind)._value.get() == 1
        done = sorted(json.loads(it.value or b"")["result"]["id"] for it in broker.records("in.results"))
        assert done == [index for index in range(64) if index != 37]
        ((culprit, told),) = letters(broker).items()
        assert (culprit, told["streamproc-cause"], told["streamproc-error-type"]) == (37, cause, kind)
        assert found == (dict([deaths]) if deaths else {})
        if cause == "exception":
            assert told["streamproc-error-traceback"].endswith("\nValueError: record 37 is at fault")
            assert 'File "tests/support/backends.py"' in told["streamproc-error-traceback"]
        if cause == "oom":
            assert "more than pool.max_worker_memory_mb (200) allows" in told["streamproc-error-message"]

    run(test)


def test_a_backend_that_is_out_of_memory_keeps_its_worker() -> None:
    async def test() -> None:
        broker = make_broker()
        async with processing(broker) as processor:
            await until(lambda: processor.ready().ok, "ready")
            (worker,) = processor.pool.workers()
            broker.append("in", b'{"id": 0, "do": "memory"}')
            broker.append("in", b'{"id": 1, "do": "device"}')
            put(broker, 6, start=2)
            await all_committed(broker, 8)
            assert processor.pool.workers() == [worker]
            assert restarts(processor) == {}
        told = letters(broker)
        assert {number: it["streamproc-cause"] for number, it in told.items()} == {0: "oom", 1: "oom"}
        assert told[0]["streamproc-error-traceback"].endswith("MemoryError: no more")

    run(test)


def test_records_of_one_batch_go_by_the_policy_of_their_own_cause() -> None:
    async def test() -> None:
        broker = make_broker()
        causes = {"invalid": {"then": "drop"}, "output": {"then": "dead_letter"}, "exception": {"retries": 1}}
        task = {"on_error": {"then": "drop", "causes": {**causes, "rejected": {"then": "dead_letter"}}}}
        async with processing(broker, task=task) as processor:
            for value in (b"{", b'{"id": 1, "do": "refuse", "why": "no"}', b'{"id": 2, "do": "list"}', b'{"id": 3}'):
                broker.append("in", value)
            broker.append("in", b'{"id": 4, "do": "raise"}', partition=1)
            await all_committed(broker, 5)
            counts = processor.tasks["main"].counts
            assert (counts.results, counts.dead, counts.dropped) == (1, 2, 2)
            dropped = processor.metrics.records_dropped
            invalid = {"task": "main", "cause": "invalid", "stage": "decode", "kind": "InvalidJSON"}
            raised = {"task": "main", "cause": "exception", "stage": "execute", "kind": "ValueError"}
            assert [dropped.labels(**it)._value.get() for it in (invalid, raised)] == [1, 1]
        causes_told = {number: it["streamproc-cause"] for number, it in letters(broker).items()}
        assert causes_told == {1: "rejected", 2: "output"}

    run(test)


def test_a_cause_that_says_stop_stops_at_its_record_and_no_other() -> None:
    async def test() -> None:
        broker = make_broker()
        task = {"on_error": {"causes": {"rejected": {"then": "stop"}}}, "batch": {"max_size": 1}}
        broker.append("in", b"{")
        broker.append("in", b'{"id": 1, "do": "refuse", "why": "no"}')
        with pytest.raises(TaskStoppedError, match=r"on_error\.causes\.rejected\.then says, .* offset 1"):
            async with processing(broker, task=task) as processor:
                await processor.wait()
        assert broker.committed("app.main") == {TopicPartition("in", 0): 1}
        assert len(broker.records("in.dead")) == 1

    run(test)


def test_a_result_too_large_is_dropped_or_stops_where_its_policy_says_so() -> None:
    async def test() -> None:
        broker = make_broker(**{"max.message.bytes": "2000"})
        put(broker, 1, pad="x" * 3_000)
        put(broker, 5, start=1)
        stop = {"on_error": {"causes": {"too_large": {"then": "stop"}}}}
        with pytest.raises(TaskStoppedError, match=r"on_error\.causes\.too_large\.then says, .* partition 0, offset 0"):
            async with processing(broker, backend="Identity", task=stop) as processor:
                await processor.wait()
        assert broker.committed("app.main").get(TopicPartition("in", 0), 0) == 0
        drop = {"on_error": {"causes": {"too_large": {"then": "drop"}}}}
        async with processing(broker, backend="Identity", task=drop) as processor:
            await all_committed(broker, 6)
            assert processor.tasks["main"].counts.dropped == 1
        assert not broker.records("in.dead")
        ids = [json.loads(it.value or b"")["result"]["id"] for it in broker.records("in.results")]
        assert set(ids) == {1, 2, 3, 4, 5}

    run(test)


def test_retries_do_not_hold_up_other_partitions() -> None:
    async def test() -> None:
        broker = make_broker()
        options = {"on_error": {"retries": 1, "backoff_ms": 30_000}, "batch": {"max_size": 1}}
        async with processing(broker, task=options) as processor:
            await until(lambda: processor.ready().ok, "ready")
            broker.append("in", json.dumps({"id": 0, "do": "raise"}).encode(), partition=0)
            for index in range(10):
                broker.append("in", json.dumps({"id": index}).encode(), partition=1)
            await until(lambda: len(broker.records("in.results", 1)) == 10, "the other partition goes on")
            assert broker.records("in.dead") == []
            processor.settings = processor.settings.model_copy(update={"shutdown_timeout_s": 0.1})

    run(test)


def test_reading_goes_on_after_a_rebalance_under_back_pressure(tmp_path: Path) -> None:
    async def test() -> None:
        broker = make_broker()
        options = {"limits": {"max_in_flight_records": 40}, "batch": {"max_size": 8}}
        ready = tmp_path / "ready"
        pool = {"env": {"READY_FILE": str(ready)}}
        async with processing(broker, backend="ReadyWhenTold", task=options, pool=pool) as processor:
            put(broker, 120)
            await until(lambda: processor.tasks["main"].source.paused, "reading pauses, since nobody is ready")
            other = await join(broker)
            await broker.settled()
            await other.stop()
            await broker.settled()
            ready.touch()
            await all_committed(broker, 120)

    run(test)


def test_a_value_too_large_does_not_hold_up_a_shutdown() -> None:
    async def test() -> None:
        broker = make_broker()
        waiting = {"batch": {"max_size": 100, "max_wait_ms": 60_000}}
        async with processing(broker, task=waiting, shutdown_timeout_s=30) as processor:
            task = processor.tasks["main"]
            await until(lambda: processor.ready().ok, "ready")
            put(broker, 3)
            put(broker, 3, start=3, pad="x" * 200_000)
            await until(lambda: task.counts.taken == 6, "everything is read")
            begun = processor.clock()
        assert processor.clock() - begun < 20
        async with processing(broker):
            await all_committed(broker, 6)
        assert {dict(it.headers)["streamproc-error-type"] for it in broker.records("in.dead")} == {b"ValueTooLarge"}

    run(test)


def test_a_failure_while_it_drains_ends_it_at_once_and_is_told(tmp_path: Path) -> None:
    async def test() -> None:
        broker = make_broker()
        done = tmp_path / "done"
        async with processing(broker, shutdown_timeout_s=30) as processor:
            await until(lambda: processor.ready().ok, "ready")
            broker.append("in", json.dumps({"id": 0, "do": "compute", "until": str(done)}).encode())
            await until(lambda: any(it.batches for it in processor.pool.workers()), "the batch computes")
            broker.fail_next("write", BrokerError("not authorized"), times=50)
            begun = processor.clock()
            stopping = asyncio.ensure_future(processor.stop())
            await until(lambda: processor.tasks["main"].state == "draining", "it drains")
            done.touch()
            await stopping
        assert processor.clock() - begun < 20
        assert isinstance(processor.failure, SinkError)

    run(test)


@pytest.mark.parametrize("operation", ["getmany", "commit", "send_batch"])
def test_an_unexpected_error_anywhere_ends_the_processor_and_says_where(operation: Any) -> None:
    async def test() -> None:
        broker = make_broker()
        put(broker, 10)
        broker.fail_next(operation, RuntimeError("never seen before"), times=50)
        with pytest.raises(InternalError, match="never seen before"):
            async with processing(broker) as processor:
                await processor.wait()

    run(test)


def test_a_metrics_topic_that_refuses_costs_metrics_and_nothing_else() -> None:
    async def test() -> None:
        broker = make_broker()
        async with processing(broker) as processor:
            await until(lambda: processor.ready().ok, "ready")
            broker.drop_topic("app.metrics")
            put(broker, 50)
            await all_committed(broker, 50)
            errors = processor.metrics.task("main").producer_errors["metrics"]
            await until(lambda: errors._value.get() >= 1, "the loss is counted")
            assert processor.failure is None
        assert len(broker.records("in.results")) == 50

    run(test)


def test_an_input_topic_that_grew_is_written_where_its_output_topic_can_hold_it() -> None:
    async def test() -> None:
        broker = make_broker()
        async with processing(broker):
            put(broker, 9)
            await all_committed(broker, 9)
            broker.grow_topic("in", PARTITIONS + 2)
            broker.append("in", b'{"id": 9}', partition=PARTITIONS + 1)
            await all_committed(broker, 10)
        assert len(broker.records("in.results")) == 10

    run(test)


def test_headers_too_large_for_the_dead_letter_topic_are_cut_and_counted() -> None:
    async def test() -> None:
        broker = make_broker()
        async with processing(broker):
            headers = [("large", b"x" * 1_048_300)]
            broker.append("in", b"{", headers=headers)
            await all_committed(broker, 1)
        (letter,) = broker.records("in.dead")
        told = dict(letter.headers)
        assert told["streamproc-headers-cut"] == b"1"
        assert letter.value == b"{"

    run(test)


def test_commits_that_always_fail_are_a_stall() -> None:
    async def test() -> None:
        broker = make_broker()
        broker.fail_next("commit", BrokerError("the coordinator is gone"), times=1_000_000)
        async with processing(broker) as processor:
            processor._inspector._commits["main"] = ProgressWatch(0.5)  # the setting is no less than a batch may take
            put(broker, 30)
            await until(lambda: processor.tasks["main"].counts.results == 30, "everything is processed")
            await until(lambda: not processor.live().ok, "the stall is seen")
            assert "committed" in processor.live().reasons[0]
            broker._faults.clear()  # what the operator mended
            await until(lambda: processor.live().ok, "it is alive again")

    run(test)


def test_lag_under_back_pressure_counts_what_kafka_holds() -> None:
    async def test() -> None:
        broker = make_broker()
        async with processing(broker, task={"limits": {"max_in_flight_records": 8}}) as processor:
            task = processor.tasks["main"]
            await until(lambda: processor.ready().ok, "ready")
            with broker.acknowledgements_held():
                broker.append("in", b'{"id": 0}', timestamp=1_000)
                put(broker, 59, start=3)
                await until(lambda: task.source.paused, "reading pauses")
                put(broker, 30, start=63)
                await until(
                    lambda: sum(it.lag_records or 0 for it in processor.status().tasks["main"].partitions) == 90,
                    "the lag is seen",
                )
                oldest = max(it.lag_seconds or 0 for it in processor.status().tasks["main"].partitions)
                assert oldest > 1_000_000_000
            await all_committed(broker, 90)

    run(test)


@pytest.mark.parametrize("ordering", ["partition", "unordered"])
def test_a_retry_that_waits_does_not_hold_up_a_rebalance(ordering: str) -> None:
    async def test() -> None:
        broker = make_broker()
        options = {
            "ordering": ordering,
            "batch": {"max_size": 1},
            "on_error": {"retries": 2, "backoff_ms": 30_000},
        }
        async with processing(broker, task=options, rebalance_drain_s=60) as processor:
            task = processor.tasks["main"]
            broker.append("in", b'{"id": 0, "do": "raise"}')
            await until(lambda: task._retries, "the retry waits")
            for index in range(1, 5):
                broker.append("in", json.dumps({"id": index}).encode())
            await until(lambda: task.progress >= 5 and not task.batcher.size, "the others are executed")
            begun = processor.clock()
            other = await join(broker)
            assert processor.clock() - begun < 20
            assert not broker.records("in.dead"), "the next owner has all its attempts"
            await other.stop()

    run(test)


def test_a_broker_that_never_answers_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*_: object) -> None:
        await asyncio.Event().wait()

    async def test() -> None:
        broker = make_broker()
        monkeypatch.setattr("streamproc.runtime.processor.CLOSE_TIMEOUT_S", 0.5)
        async with processing(broker) as processor:
            put(broker, 3)
            await until(lambda: len(broker.records("in.results")) == 3, "everything is processed")
            for name in ("commit", "stop"):
                monkeypatch.setattr(processor.tasks["main"].consumer, name, never)
            begun = processor.clock()
        assert processor.clock() - begun < 20

    run(test)


async def join(broker: MemoryBroker) -> MemoryConsumer:
    """Another member of the group, which reads nothing."""

    async def ignore(_: set[TopicPartition]) -> None:
        return

    other = broker.consumer(group_id="app.main")
    await other.start(["in"], ignore, ignore)
    return other


DAY_S = 86_400.0


@pytest.mark.parametrize("jumps", [(0.0,), (3 * DAY_S,), (-3 * DAY_S,), (5 * DAY_S, -5 * DAY_S)], ids=str)
def test_a_time_of_day_that_jumps_changes_nothing(tmp_path: Path, jumps: tuple[float, ...]) -> None:
    """Whatever is waited for while it jumps: a window, a retry's pause, a batch's deadline, a commit."""
    began, looks = time.time(), itertools.count()
    shifts = itertools.cycle((0.0, *jumps))

    def wall_clock() -> float:
        # At its start the processor takes the time once; from then on it jumps at every look.
        return began if next(looks) == 0 else time.time() + next(shifts)

    async def test() -> None:
        broker = make_broker()
        put(broker, 60)
        broker.append("in", json.dumps({"id": 60, "do": "raise"}).encode(), partition=0)
        broker.append("in", json.dumps({"id": 61, "do": "compute", "until": str(tmp_path / "x")}).encode(), partition=1)
        put(broker, 60, start=62)
        options = {
            "task": {"on_error": {"retries": 1, "backoff_ms": 100}, "batch": {"max_size": 8, "max_wait_ms": 50}},
            "pool": {"batch_timeout_s": 0.5},
        }
        lags: list[float] = []

        def look() -> bool:
            for it in processor.status().tasks["main"].partitions:
                lags.extend(lag for lag in (it.lag_seconds, it.lag_records) if lag is not None)
            return sum(broker.committed("app.main").values()) == 122

        async with processing(broker, wall_clock=wall_clock, **options) as processor:
            await until(look, "everything is committed")
            assert processor.live().ok
            assert processor.status().uptime_s < 60
        results = [json.loads(it.value or b"")["result"]["id"] for it in broker.records("in.results")]
        assert sorted(results) == [*range(60), *range(62, 122)]
        causes = sorted(dict(it.headers)["streamproc-cause"] or b"" for it in broker.records("in.dead"))
        assert causes == [b"exception", b"timeout"]
        assert min(lags) >= 0
        assert next(looks) > 10, "it was looked at"

    run(test)
