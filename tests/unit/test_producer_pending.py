"""aiokafka's sender survives batches that fail while it is about to send them again.

The batches are put where aiokafka has them at that moment: between an answer that can be retried and the next request,
which no broker can be made to hit on purpose.
"""

from __future__ import annotations

import asyncio
from typing import Any

from aiokafka import errors as kafka
from aiokafka.structs import TopicPartition

from streamproc.broker.producer import KafkaProducer
from streamproc.settings import KafkaSettings


def test_a_batch_that_fails_while_it_waits_to_be_sent_again_is_taken_out_once() -> None:
    problems: list[Any] = []

    async def story() -> BaseException | None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
        producer = KafkaProducer(KafkaSettings(), client_id="test")
        producer._inner = inner = producer._make({}, enable_idempotence=False)
        accumulator = inner._message_accumulator
        batch = producer.create_batch()
        batch.append(timestamp=None, key=None, value=b"1", headers=[])
        sent = producer._queue(accumulator, batch, 1, TopicPartition("out", 0), patient=True)
        ((to, _),) = accumulator._batches.items()
        for _ in range(2):
            accumulator.reenqueue(accumulator._pop_batch(to))
        accumulator.fail_all(kafka.KafkaError("given up"))
        await asyncio.wait([sent])
        await asyncio.sleep(0)  # aiokafka's own callback
        inner._closed = True
        return sent.exception()

    assert "given up" in str(asyncio.run(story()))
    assert problems == []
