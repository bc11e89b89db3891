"""The two contestants that need nothing but this project: the bare aiokafka loop, and streamproc.

    python -m benchmarks.contestants TASK

TASK is a ``benchmarks.peers.work.Task`` as JSON, whose variant is ``bare``, or ``1`` or ``2`` (workers of streamproc),
or ``2-none`` (two, whose results have no envelope), or ``exactly-once``. `benchmarks.passthrough` and
`benchmarks.throughput` run this in processes of its own.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import uvloop
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from benchmarks.peers.work import MAX_BATCH_BYTES, WORKS, Meter, Task
from streamproc.runtime.app import Application
from streamproc.runtime.cycles import look_for_cycles_seldom
from streamproc.runtime.heap import keep_freed_memory
from streamproc.settings import Settings

BARE, EXACTLY_ONCE = "bare", "exactly-once"
TASK = "main"
BACKENDS = {
    "json": "identity:Backend",
    "bytes": "identity:Backend",
    "numpy": "working:Doubling",
    "model": "working:FiveMilliseconds",
}
POLLED = 5_000
"""Most records in a call of ``getmany``."""
DECODED_BYTES = 640 * 1024
"""Most bytes of JSON in a batch of streamproc's, 64 records of 10 KB: the objects of more are in no cache any more."""
COMMIT_INTERVAL_MS = 100
"""streamproc's, ten times as often as its default: a run ends with its last commit, and nothing can ask for one."""


async def bare(task: Task) -> None:
    """The least that a Python process can do with this client: for identity the bytes pass through unread."""
    work, meter = WORKS[task.work], Meter()
    consumer = AIOKafkaConsumer(
        task.source,
        bootstrap_servers=task.bootstrap,
        group_id=task.group,
        auto_offset_reset="earliest",
        enable_auto_commit=False,
    )
    producer = AIOKafkaProducer(
        bootstrap_servers=task.bootstrap, acks="all", enable_idempotence=True, max_batch_size=MAX_BATCH_BYTES
    )
    await producer.start()
    await consumer.start()
    count = 0
    most = task.batch if task.work == "model" else POLLED
    pending: set[asyncio.Future[Any]] = set()
    while count < task.records:
        polled = await consumer.getmany(timeout_ms=200, max_records=most if count else 1)
        if not polled:
            continue
        meter.begin()
        if not work.is_identity:
            results = iter(work.batch([record.value for some in polled.values() for record in some]))
        for partition, some in polled.items():
            batch = producer.create_batch()
            for record in some:
                value = record.value if work.is_identity else next(results)
                if batch.append(timestamp=None, key=record.key, value=value, headers=[]) is None:
                    pending.add(await producer.send_batch(batch, task.output, partition=partition.partition))
                    batch = producer.create_batch()
                    batch.append(timestamp=None, key=record.key, value=value, headers=[])
            pending.add(await producer.send_batch(batch, task.output, partition=partition.partition))
            count += len(some)
        pending = {future for future in pending if not future.done()}
    await asyncio.gather(*pending)
    await consumer.commit()
    meter.end()
    await consumer.stop()
    await producer.stop()


async def streamproc(task: Task) -> None:
    """The processor, everything on: sequencer, ledger, metrics, envelope, sidecar."""
    is_exact = task.variant == EXACTLY_ONCE
    workers, _, envelope = ("1" if is_exact else task.variant).partition("-")
    wrapping = {"envelope": envelope} if envelope else {}
    value_format = "raw" if task.work == "bytes" else "json"
    settings = Settings.model_validate(
        {
            "name": task.group,
            "kafka": {"bootstrap_servers": task.bootstrap},
            "backend": {"path": BACKENDS[task.work], "base_dir": str(Path(__file__).parent)},
            "pool": {"workers": int(workers)},
            "tasks": {
                TASK: {
                    "input": {"topics": [task.source], "format": value_format},
                    "output": {"topic": task.output, "format": value_format, **wrapping},
                    "metrics": {"topic": f"{task.output}.metrics"},
                    "dead_letters": {"topic": f"{task.output}.dead"},
                    "batch": {"max_size": task.batch, **({"max_bytes": DECODED_BYTES} if task.work == "json" else {})},
                    "delivery": "exactly_once" if is_exact else "at_least_once",
                    "commit_interval_ms": COMMIT_INTERVAL_MS,
                }
            },
            "http": {"port": 0},
        }
    )
    await until_committed(settings, task.records)


async def until_committed(settings: Settings, records: int) -> None:
    """A processor of one task, ``TASK``, until it has committed so many records; it measures itself."""
    meter = Meter()
    look_for_cycles_seldom()
    keep_freed_memory()
    application = Application(settings)
    running = application.processor.tasks[TASK]

    def committed() -> int:
        return sum([books.committed or 0 for books in running.ledger.partitions()])

    async with application:
        while running.counts.taken == 0:
            await asyncio.sleep(0.001)
        skipped = committed()
        meter.begin()
        while committed() < records:
            await asyncio.sleep(0.005)
        meter.end(share=(records - skipped) / records)


def main() -> None:
    """Run one contestant."""
    task = Task.told()
    uvloop.run(bare(task) if task.variant == BARE else streamproc(task))


if __name__ == "__main__":
    main()
