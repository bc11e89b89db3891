"""Feeds one worker process with batches, by the pool and the wire that a processor uses, and asks what it cost.

No broker takes part. The worker has always one batch running and one queued, as under load; every reply goes to the
caller, who verifies it. The worker's CPU time comes from the kernel's clock of its process, with all its threads, and
is read while it has nothing to do: before the first batch that counts and after the last one.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml
from aiokafka.structs import ConsumerRecord

from streamproc.errors import StreamprocError
from streamproc.records import Batch, Failure, Lease, Span, TopicPartition, value_sizes
from streamproc.runtime.pool import Pool, PoolEvents, Reply
from streamproc.settings import PoolSettings

TASK = "main"
TOPIC = "in"
PARTITIONS = 4
TIMESTAMP = 1_700_000_000_000


@dataclass(frozen=True, slots=True)
class Cost:
    """What some batches took: CPU seconds of the worker and of this process, and seconds from first to last."""

    worker_cpu_s: float
    parent_cpu_s: float
    wall_s: float


def spans_of(values: Sequence[bytes], first_offset: int = 1_000_000) -> list[Span]:
    """The values as spans of a few partitions, with records as the Kafka client makes them."""
    share = -(-len(values) // PARTITIONS)
    spans = []
    for partition in range(PARTITIONS):
        records = [
            ConsumerRecord(
                topic=TOPIC,
                partition=partition,
                offset=first_offset + index,
                timestamp=TIMESTAMP + index,
                timestamp_type=0,
                key=None,
                value=value,
                checksum=None,
                serialized_key_size=-1,
                serialized_value_size=len(value),
                headers=(),
            )
            for index, value in enumerate(values[partition * share : (partition + 1) * share])
        ]
        if records:
            lease = Lease(TopicPartition(TOPIC, partition), 0)
            spans.append(Span(lease, 0, records, value_sizes(records), 0.0))
    return spans


class Feeder:
    """A pool of one worker, and batches for it."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._batches: Sequence[Sequence[Span]] = ()
        self._submitted = self._wanted = self._answered = 0
        self._number = 0
        self._verify: Callable[[Reply], None] = _ignore
        self._done = asyncio.Event()
        self.error: BaseException | None = None

    async def feed(self, batches: Sequence[Sequence[Span]], count: int, verify: Callable[[Reply], None]) -> Cost:
        """Run ``count`` batches, these ones in turns; ``verify`` gets each reply."""
        self._batches, self._verify, self._wanted = batches, verify, count
        self._submitted = self._answered = 0
        self._done.clear()
        (worker,) = self._pool.workers()
        worker_cpu_s, parent_cpu_s, wall_s = cpu_s_of(worker.pid), time.process_time(), time.perf_counter()
        self.on_room()
        await self._done.wait()
        wall_s = time.perf_counter() - wall_s
        if self.error is not None:
            raise self.error
        return Cost(cpu_s_of(worker.pid) - worker_cpu_s, time.process_time() - parent_cpu_s, wall_s)

    def on_room(self) -> None:
        """Submit what the worker can take."""
        while self._submitted < self._wanted and self._pool.room():
            spans = self._batches[self._submitted % len(self._batches)]
            self._submitted += 1
            self._number += 1
            now = time.monotonic()
            self._pool.submit(Batch(self._number, TASK, spans, now, now, "size", 1.0))

    def on_reply(self, reply: Reply) -> None:
        """Verify, and count."""
        try:
            self._verify(reply)
        except Exception as error:  # noqa: BLE001 - raised where it was asked for
            self.fail(error)
        self._answered += 1
        if self._answered == self._wanted:
            self._done.set()

    def fail(self, error: BaseException) -> None:
        """End it with this error."""
        self.error = self.error or error
        self._wanted = 0
        self._done.set()

    def on_failed(self, _batch: Batch, failure: Failure, _executed: bool, _worker: int) -> None:
        """No batch may fail."""
        self.fail(AssertionError(f"a batch failed: {failure.message}"))

    def on_fatal(self, error: StreamprocError) -> None:
        """Nor the worker."""
        self.fail(error)


@contextlib.asynccontextmanager
async def one_worker(backend: str, *, envelope: str, config: dict[str, object] | None = None) -> AsyncIterator[Feeder]:
    """A pool of one worker that runs a backend of this folder."""
    settings = PoolSettings(threads_per_worker=1)
    setup = {
        "backend": {
            "path": backend,
            "loader": "local",
            "base_dir": str(Path(__file__).parent),
            "config": yaml.safe_dump(config or {}),
        },
        "tasks": {TASK: {"schemas": {}, "envelope": envelope, "max_value_bytes": 1_048_576, "warmup": []}},
        "shared_memory_threshold_bytes": settings.shared_memory_threshold_bytes,
        "logging": {"level": "error"},
    }
    ready = asyncio.Event()
    feeder: Feeder

    def on_room() -> None:
        ready.set()
        feeder.on_room()

    events = PoolEvents(
        on_reply=lambda reply: feeder.on_reply(reply),  # noqa: PLW0108 - the feeder is made after the pool
        on_failed=lambda *told: feeder.on_failed(*told),  # noqa: PLW0108 - as above
        on_room=on_room,
        on_restart=lambda cause: feeder.fail(AssertionError(f"the worker was started again: {cause}")),
        on_fatal=lambda error: feeder.on_fatal(error),  # noqa: PLW0108 - as above
    )
    pool = Pool(settings, setup, events, time.monotonic)
    feeder = Feeder(pool)
    await pool.start()
    try:
        async with asyncio.timeout(60):
            await ready.wait()
        yield feeder
    finally:
        await pool.stop()


def cpu_s_of(pid: int) -> float:
    """CPU seconds of a process, its threads included: to the nanosecond where the system has a clock for it."""
    if sys.platform == "linux":
        return time.clock_gettime((~pid << 3) | 2)  # what clock_getcpuclockid(3) gives
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def _ignore(_: Reply) -> None:
    """Before there is something to verify."""
