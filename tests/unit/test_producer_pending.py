"""aiokafka's sender survives batches that fail while it is about to send them again.

The batches are put where aiokafka has them at that moment: between an answer that can be retried and the next request,
which no broker can be made to hit on purpose.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from aiokafka import errors as kafka
from aiokafka.structs import TopicPartition

from streamproc.broker.producer import KafkaProducer, Sequences
from streamproc.errors import BrokerError
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


def test_a_batch_whose_topic_is_gone_for_good_takes_no_other_batch_with_it() -> None:
    """Where the first fails while the sender takes the next from the queue, with the identity that the first lost."""

    async def story() -> tuple[BaseException | None, bool, list[tuple[int, int]]]:
        producer = KafkaProducer(KafkaSettings(), client_id="test")
        producer._inner = inner = producer._make({}, enable_idempotence=True)
        accumulator, manager, sender = inner._message_accumulator, inner._txn_manager, inner._sender
        producer._sequences = Sequences(manager)
        producer._sequences.renew_before_sending(sender)
        manager.set_pid_and_epoch(7, 0)
        gone, there = TopicPartition("gone", 0), TopicPartition("there", 0)
        inner.client.cluster.leader_for_partition = {gone: None, there: 1}.get
        sent = {}
        for to in (gone, there):
            batch = producer.create_batch()
            batch.append(timestamp=None, key=None, value=b"1", headers=[])
            sent[to] = producer._queue(accumulator, batch, 1, to, patient=True)
        accumulator.reenqueue(accumulator._pop_batch(gone))
        accumulator._batches[gone][0]._is_hopeless = lambda: True
        accumulator._batches[there] = accumulator._batches.pop(there)  # behind the other

        drained, _ = accumulator.drain_by_nodes(ignore_nodes=())

        await asyncio.wait([sent[gone]])
        identities = [(manager.producer_id, manager.sequence_number(there))]
        sender._do_init_pid = partial(_identify, manager)
        await sender._maybe_wait_for_pid()
        identities.append((manager.producer_id, manager.sequence_number(there)))
        inner._closed = True
        sent[there].cancel()
        return sent[gone].exception(), there in drained[1], identities

    error, drained, identities = asyncio.run(story())
    assert isinstance(error, BrokerError)
    assert drained
    assert identities == [(7, 1), (8, 0)], "the other one goes out under the old identity, later ones under a new one"


async def _identify(manager: Any, _: object) -> bool:
    manager.set_pid_and_epoch(8, 0)
    return True
