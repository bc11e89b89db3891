"""What is in flight stays within its limits, whatever does not come: acknowledgements, one partition's results."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from streamproc.broker.interface import BatchBuilder
from streamproc.records import TopicPartition
from streamproc.runtime.processor import Processor
from streamproc.runtime.task_stream import TaskStream
from streamproc.testing import MemoryBroker
from tests.conftest import TopicName
from tests.integration.test_processor import PARTITIONS, make_broker, put, run, settings_for, setup_for, sources
from tests.support.app import App, create, produce, read_to_end
from tests.support.asyncs import until

MB = 1_000_000
WORKER_DESCRIPTORS = 8
"""Two segments each way, and the duplicate of its descriptor that Python keeps for a mapping."""


@contextlib.asynccontextmanager
async def processing(broker: MemoryBroker, *, max_value_bytes: int = MB, **options: Any) -> AsyncIterator[Processor]:
    settings = settings_for(**options)
    setup = setup_for(settings)
    setup["tasks"]["main"]["max_value_bytes"] = max_value_bytes
    processor = Processor(settings, setup, broker, rng=random.Random(1))
    try:
        await processor.start()
        yield processor
    finally:
        await processor.stop()


class Watch:
    """The most that a task had in flight, looked at in every turn of the loop."""

    def __init__(self, task: TaskStream) -> None:
        self.records = self.value_bytes = self.output_bytes = 0
        self._task = asyncio.ensure_future(self._look(task))

    async def _look(self, task: TaskStream) -> None:
        ledger = task.ledger
        while True:
            self.records = max(self.records, ledger.outstanding_records)
            self.value_bytes = max(self.value_bytes, ledger.in_flight_bytes - ledger.output_bytes)
            self.output_bytes = max(self.output_bytes, ledger.output_bytes)
            await asyncio.sleep(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._task.cancel()


def ends(broker: MemoryBroker) -> dict[TopicPartition, int]:
    """The log ends of the partitions that have records."""
    logs = {TopicPartition("in", number): len(broker.records("in", number)) for number in range(PARTITIONS)}
    return {partition: end for partition, end in logs.items() if end}


async def everything_committed(broker: MemoryBroker, **wait: float) -> None:
    await until(lambda: broker.committed("app.main") == ends(broker), "everything is committed", **wait)


def idle(processor: Processor) -> bool:
    """Whether no worker has a batch."""
    return not any(it.batches for it in processor.pool.workers())


@pytest.mark.parametrize("ordering", ["partition", "key", "unordered"])
def test_acknowledgements_that_stop_stop_the_reading_at_the_limits(ordering: str) -> None:
    async def test() -> None:
        broker = make_broker()
        limits = {"max_in_flight_records": 300, "max_in_flight_bytes": 60_000}
        options = {"limits": limits, "ordering": ordering, "batch": {"max_size": 16}}
        async with processing(broker, backend="Identity", task=options) as processor:
            task = processor.tasks["main"]
            put(broker, 3, pad="x" * 400)
            await everything_committed(broker)
            with Watch(task) as most, broker.acknowledgements_held():
                put(broker, 6_000, start=3, pad="x" * 400)
                await until(
                    lambda: task.crowded and idle(processor) and len(task.source.paused) == PARTITIONS, "it stops"
                )
                taken, status = task.counts.taken, processor.status().tasks["main"]
                for _ in range(200):
                    await asyncio.sleep(0)
                assert task.counts.taken == taken < 1_000
                assert status.paused
                assert status.reason == "back-pressure"
                assert status.in_flight_bytes == task.ledger.in_flight_bytes > 60_000
                processor._inspector.observe(processor.clock())
                assert processor.metrics.task("main").in_flight_bytes._value.get() == status.in_flight_bytes
            await everything_committed(broker)
            assert task.ledger.in_flight_bytes == task.ledger.output_bytes == task.ledger.outstanding_records == 0
        assert most.records <= 300
        # The results of one batch that is running, and of the one queued behind it, come in any case.
        assert most.value_bytes <= 60_000 + 500
        assert most.output_bytes <= 60_000 + 2 * 16 * 1_000
        assert sorted(sources(broker.records("in.results"))) == sorted(
            (partition.partition, offset) for partition, end in ends(broker).items() for offset in range(end)
        )

    run(test)


@pytest.mark.parametrize("ordering", ["partition", "key", "unordered"])
def test_a_partition_that_is_stuck_leaves_the_others_room(ordering: str) -> None:
    async def test() -> None:
        broker = make_broker()
        options = {
            "limits": {"max_in_flight_records": 120},
            "ordering": ordering,
            "on_error": {"retries": 1, "backoff_ms": 60_000},
        }
        async with processing(broker, task=options, shutdown_timeout_s=0.2) as processor:
            task = processor.tasks["main"]
            broker.append("in", json.dumps({"id": 0, "do": "raise"}).encode(), key=b"k")
            await until(lambda: task._retries, "the retry waits")
            for index in range(1, 1_000):
                broker.append("in", json.dumps({"id": index}).encode(), key=b"k")
            stuck = TopicPartition("in", 0)
            await until(lambda: stuck in task.source.paused, "no more is read of the partition that is stuck")
            with Watch(task) as most:
                for index in range(4_000):
                    broker.append("in", json.dumps({"id": index}).encode(), partition=1 + index % 2)
                others = {TopicPartition("in", number): 2_000 for number in (1, 2)} | {TopicPartition("in", 0): 0}
                await until(lambda: broker.committed("app.main") == others, "the others are committed to their ends")
            assert most.records <= 120
            assert stuck in task.source.paused
            status = processor.status().tasks["main"]
            assert not status.paused
            assert [it.paused for it in status.partitions] == [True, False, False]
            assert task._retries, "it is stuck still"
            # What was read of it is bounded also where the results behind the one that is missing were written.
            assert task.counts.taken - 4_000 <= 120

    run(test)


@pytest.mark.parametrize("ordering", ["partition", "unordered"])
def test_a_partition_that_waits_for_the_broker_leaves_the_others_room(
    ordering: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        broker = make_broker()
        options = {"limits": {"max_in_flight_records": 120}, "ordering": ordering}
        async with processing(broker, task=options) as processor:
            task = processor.tasks["main"]
            answers = asyncio.Event()
            send = task._producer.send_batch

            async def send_batch(
                batch: BatchBuilder, topic: str, partition: int, *, patient: bool
            ) -> asyncio.Future[object]:
                sent = await send(batch, topic, partition, patient=patient)

                async def late() -> object:
                    await answers.wait()
                    return await sent

                return asyncio.ensure_future(late()) if partition == 0 else sent

            monkeypatch.setattr(task._producer, "send_batch", send_batch)
            with Watch(task) as most:
                put(broker, 6_000)
                others = {TopicPartition("in", number): 2_000 for number in (1, 2)} | {TopicPartition("in", 0): 0}
                await until(lambda: broker.committed("app.main") == others, "the others are committed to their ends")
                assert most.records <= 120
                assert task.source.paused == {TopicPartition("in", 0)}
                answers.set()
                await everything_committed(broker)
                assert most.records <= 120
        assert sorted(sources(broker.records("in.results"))) == sorted(
            (partition.partition, offset) for partition, end in ends(broker).items() for offset in range(end)
        )

    run(test)


def test_what_is_read_behind_a_missing_result_is_bounded_by_the_offsets_that_a_crash_would_repeat() -> None:
    async def test() -> None:
        broker = make_broker()
        options = {
            "limits": {"max_in_flight_records": 60},
            "ordering": "unordered",
            "on_error": {"retries": 1, "backoff_ms": 60_000},
        }
        async with processing(broker, task=options, shutdown_timeout_s=0.2) as processor:
            task = processor.tasks["main"]
            broker.append("in", json.dumps({"id": 0, "do": "raise"}).encode())
            await until(lambda: task._retries, "the retry waits")
            for index in range(1, 1_000):
                broker.append("in", json.dumps({"id": index}).encode())
            await until(lambda: task.source.paused and task.ledger.in_flight_records == 1, "all but one are settled")
            assert task.ledger.outstanding_records <= 60
            assert len(broker.records("in.results")) == task.ledger.outstanding_records - 1

    run(test)


def test_values_of_ten_megabytes_are_taken_one_or_two_at_a_time() -> None:
    async def test() -> None:
        broker = MemoryBroker(max_batch_bytes=12 * MB)
        large = {"max.message.bytes": str(12 * MB)}
        for name in ("in", "in.results", "in.dead"):
            broker.create_topic(name, PARTITIONS, configs=large)
        broker.create_topic("app.metrics")
        options = {"limits": {"max_in_flight_bytes": 20 * MB}, "input": {"topics": ["in"]}}
        async with processing(broker, max_value_bytes=11 * MB, backend="Identity", task=options) as processor:
            task = processor.tasks["main"]
            put(broker, 1, pad="x" * 10 * MB)
            await everything_committed(broker)
            with Watch(task) as most:
                put(broker, 12, start=1, pad="x" * 10 * MB)
                await everything_committed(broker, deadline_s=90)
        assert most.value_bytes <= 31 * MB
        assert most.output_bytes <= 20 * MB + 3 * 11 * MB
        results = [json.loads(it.value or b"")["result"] for it in broker.records("in.results")]
        assert sorted(it["id"] for it in results) == list(range(13))
        assert {len(it["pad"]) for it in results} == {10 * MB}

    run(test)


def test_results_of_ten_megabytes_from_small_records_hold_up_new_batches() -> None:
    async def test() -> None:
        broker = MemoryBroker(max_batch_bytes=12 * MB)
        broker.create_topic("in", PARTITIONS)
        for name in ("in.results", "in.dead"):
            broker.create_topic(name, PARTITIONS, configs={"max.message.bytes": str(12 * MB)})
        broker.create_topic("app.metrics")
        options = {"limits": {"max_in_flight_bytes": 20 * MB}, "batch": {"max_size": 1}}
        async with processing(broker, backend="Growing", task=options) as processor:
            task = processor.tasks["main"]
            with Watch(task) as most, broker.acknowledgements_held():
                put(broker, 15, bytes=10 * MB)
                await until(lambda: task.crowded and idle(processor), "it stops")
                assert task.batcher.size >= 10
                assert processor._alarm.at is None, "nothing is looked for while results wait"
            await everything_committed(broker, deadline_s=90)
        # Two waited, which is not above the limit; one ran then, and one was queued.
        assert 20 * MB < most.output_bytes <= 4 * 10.1 * MB
        assert [len(json.loads(it.value or b"")["result"]["pad"]) for it in broker.records("in.results")] == [
            10 * MB
        ] * 15

    run(test)


def shared_memory() -> tuple[int, int]:
    """The descriptors and the mappings of shared memory that this process holds."""

    def names() -> Iterator[str]:
        for link in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                yield str(link.readlink())

    mapped = Path("/proc/self/maps").read_text().splitlines()
    return sum("memfd:streamproc" in it for it in names()), sum("memfd:streamproc" in it for it in mapped)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks for shared memory as Linux shows it")
def test_shared_memory_is_released_when_workers_are_killed_amid_large_batches() -> None:
    async def test() -> None:
        broker = make_broker()
        before = shared_memory()
        options = {"batch": {"max_size": 8, "max_wait_ms": 5}}
        async with processing(broker, backend="Identity", task=options) as processor:
            task = processor.tasks["main"]
            sent = 0
            killed: set[int] = set()
            while len(killed) < 12:
                put(broker, 60, start=sent, pad="x" * 60_000)
                sent += 60
                done = task.progress
                await until(lambda: task.progress > done, "a batch is executed")  # noqa: B023 - it is awaited here
                # A record that stands alone is spared: to die with it twice would pass for its own fault.
                busy = [
                    it.pid
                    for it in processor.pool.workers()
                    if it.batches and it.batches[0].size > 1 and it.pid not in killed
                ]
                for pid in busy:
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)
                    await until(
                        lambda: processor.pool.idle() or any(it.open for it in processor.pool.workers()),
                        "there is another worker",
                    )
                assert shared_memory()[0] <= before[0] + 2 * WORKER_DESCRIPTORS, "of one that ends, and of the next"
            await everything_committed(broker, deadline_s=90)
            await until(lambda: shared_memory()[0] <= before[0] + WORKER_DESCRIPTORS, "the dead have left nothing")
            assert shared_memory()[1] <= before[1] + WORKER_DESCRIPTORS // 2
        assert shared_memory() == before
        assert len(broker.records("in.results")) == sent
        assert broker.records("in.dead") == []

    run(test)


EMPTY_BYTES = 100 * MB
"""What the parent takes with nothing in flight."""
FACTOR = 5.0
"""The parent's memory over its limit of bytes in flight, at most, with values and results of 10 MB.

Beside what is in flight there is what the client has fetched ahead (``kafka.fetch_max_bytes``, in the request's answer
and as records), one batch of each partition on its way to the broker, and shared memory for two batches each way.
"""


def peak_rss_bytes(pid: int) -> int:
    """The most resident memory that a process ever had."""
    line = next(it for it in Path(f"/proc/{pid}/status").read_text().splitlines() if it.startswith("VmHWM:"))
    return int(line.split()[1]) * 1_024


@pytest.mark.timeout(300)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks for the peak as Linux tells it")
@pytest.mark.parametrize("backend", ["Identity", "Growing"])
def test_the_memory_of_a_processor_of_ten_megabytes_a_record_is_bounded(
    kafka: str, tmp_path: Path, topic_name: TopicName, backend: str
) -> None:
    topic, count, limit = topic_name(), 60, 100 * MB
    create(kafka, {topic: PARTITIONS, f"{topic}.results": PARTITIONS}, **{"max.message.bytes": str(12 * MB)})
    create(kafka, {f"{topic}.dead": PARTITIONS, f"{topic}.metrics": 1})
    settings = {
        "name": topic,
        "kafka": {"bootstrap_servers": kafka, "fetch_max_bytes": 20 * MB},
        "backend": {"path": f"tests.support.backends:{backend}", "base_dir": str(Path(__file__).parents[2])},
        "tasks": {
            "main": {
                "input": {"topics": [topic], "max_value_bytes": 11 * MB},
                "batch": {"max_size": 2},
                "limits": {"max_in_flight_bytes": limit, "max_in_flight_records": 60},
            }
        },
    }
    field = {"pad": "x" * 10 * MB} if backend == "Identity" else {"bytes": 10 * MB}

    for number in range(count):
        produce(kafka, topic, {number % PARTITIONS: [(None, json.dumps({"id": number, **field}).encode())]})
    in_flight = [0]

    def done(status: dict[str, Any]) -> bool:
        in_flight.append(status["tasks"]["main"]["in_flight_bytes"])
        return bool(status["tasks"]["main"]["counts"]["out"] == count)

    with App(tmp_path, settings) as app:
        app.until(done, "everything is processed", 200)
        peak = peak_rss_bytes(app.process.pid)
        assert app.terminate() == 0
    # Values, results, and those of two batches that were running when the results reached the limit.
    assert max(in_flight) <= 2 * limit + 5 * 11 * MB
    assert peak <= EMPTY_BYTES + FACTOR * limit
    results = read_to_end(kafka, f"{topic}.results", PARTITIONS)
    told = [json.loads(it.value or b"")["result"] for it in results]
    assert sorted(it["id"] for it in told) == list(range(count))
    assert {len(it["pad"]) for it in told} == {10 * MB}
