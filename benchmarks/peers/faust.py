"""Faust (faust-streaming): an agent that takes batches with ``stream.take``.

Chosen: values as bytes (``raw``), decoded with orjson like everybody's; batches of 5,000, results sent without waiting
and awaited together before the batch is acknowledged; uvloop, no web server, no leader topic, larger buffers, polls and
producer batches; acks of all. Faust makes its producer idempotent only for exactly-once, so here it is not.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

import mode.loop

mode.loop.use("uvloop")  # before Faust's own imports, as its command line does

import faust  # noqa: E402 - see above

from benchmarks.peers.work import COMMIT_INTERVAL_MS, MAX_BATCH_BYTES, WORKS, Meter, Task  # noqa: E402 - as above

BATCH = 5_000


def run(task: Task) -> None:
    """Run until all is committed."""
    work, meter = WORKS[task.work], Meter()
    app = faust.App(
        task.group,
        broker=f"kafka://{task.bootstrap}",
        store="memory://",
        key_serializer="raw",
        value_serializer="raw",
        web_enabled=False,
        worker_redirect_stdouts=False,
        topic_disable_leader=True,
        topic_allow_declare=False,
        broker_commit_interval=COMMIT_INTERVAL_MS / 1000,
        broker_commit_every=1_000_000,
        broker_max_poll_records=BATCH,
        stream_buffer_maxsize=2 * BATCH,
        stream_wait_empty=False,
        consumer_auto_offset_reset="earliest",
        producer_acks=-1,
        producer_linger_ms=5,
        producer_max_batch_size=MAX_BATCH_BYTES,
    )
    source, output = app.topic(task.source), app.topic(task.output)

    @app.agent(source)
    async def handle(stream: Any) -> None:
        left = task.records
        stream.add_processor(first)
        async for values in stream.take(task.batch if task.work == "model" else BATCH, within=0.02):
            await asyncio.gather(*[await output.send(value=value) for value in work.batch(values)])
            left -= len(values)
            if left == 0:
                asyncio.get_running_loop().create_task(finish())

    def first(value: bytes) -> bytes:
        meter.begin()
        return value

    async def finish() -> None:
        while app.consumer.unacked:
            await asyncio.sleep(0.005)
        # The first may do no more than wait for one that was under way.
        for _ in range(2):
            await app.consumer.commit()
        meter.end()
        # Faust's own way out takes seconds, and nothing is left to do.
        os._exit(0)

    # Its loggers are open to debug messages whatever the level of its handlers, which costs it a fifth of its time.
    logging.disable(logging.INFO)
    faust.Worker(app, loglevel="ERROR").execute_from_commandline()


if __name__ == "__main__":
    run(Task.told())
