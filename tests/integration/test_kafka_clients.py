"""What the clients promise beyond the contract: what happens over time, and when things go wrong behind them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka import errors as kafka_errors
from aiokafka.record.default_records import _DefaultRecordBatchBuilderPy
from aiokafka.structs import TopicPartition as KafkaTopicPartition

from streamproc.broker.client import KafkaAdmin, KafkaConsumer, KafkaProducer
from streamproc.broker.interface import Membership, NewTopic
from streamproc.broker.reader import KafkaReader
from streamproc.broker.transactional_producer import LAST_ABORT_S, KafkaTransactionalProducer
from streamproc.errors import (
    BrokerAuthorizationError,
    BrokerError,
    BrokerUnreachableError,
    CommitRejectedError,
    TransactionAbortedError,
)
from streamproc.records import TopicPartition
from streamproc.settings import KafkaSettings
from tests.conftest import Eventually, Run, TopicName
from tests.support.header_names import RawName

if TYPE_CHECKING:
    from deploy.kafka.kafka import KafkaCluster


async def ignore(_: set[TopicPartition]) -> None: ...


async def poll(consumer: KafkaConsumer) -> None:
    while True:
        await consumer.getmany(timeout_ms=100, max_records=10)


async def make(settings: KafkaSettings, topic: str, partitions: int = 1) -> str:
    async with KafkaAdmin(settings) as admin:
        await admin.create_topics([NewTopic(topic, partitions)])
    return topic


@contextlib.asynccontextmanager
async def started(settings: KafkaSettings) -> AsyncIterator[KafkaProducer]:
    producer = KafkaProducer(settings, client_id="p")
    await producer.start()
    try:
        yield producer
    finally:
        await producer.stop()


async def send(producer: KafkaProducer, topic: str, *values: bytes) -> asyncio.Future[object]:
    batch = producer.create_batch()
    for value in values:
        batch.append(timestamp=None, key=None, value=value, headers=())
    return await producer.send_batch(batch, topic, 0)


async def values_of(settings: KafkaSettings, topic: str, count: int) -> list[Any]:
    consumer = KafkaConsumer(settings, group_id=topic, client_id="c")
    await consumer.start([topic], ignore, ignore)
    found: list[Any] = []
    deadline = time.monotonic() + 20
    try:
        while len(found) < count and time.monotonic() < deadline:
            for records in (await consumer.getmany(timeout_ms=200, max_records=1_000)).values():
                found += [record.value for record in records]
    finally:
        await consumer.stop()
    return found


@pytest.fixture
def pausable(request: pytest.FixtureRequest) -> Iterator[KafkaCluster]:
    if os.environ.get("STREAMPROC_TEST_KAFKA"):
        pytest.skip("a broker of STREAMPROC_TEST_KAFKA is not ours to pause")
    request.getfixturevalue("kafka")
    cluster: KafkaCluster = request.getfixturevalue("_own_kafka")
    yield cluster
    cluster.resume(1)


def test_polling_with_everything_paused_keeps_the_membership(kafka: str, topic_name: TopicName, run: Run) -> None:
    async def main() -> None:
        settings = KafkaSettings(bootstrap_servers=kafka, session_timeout_ms=6_000, max_poll_interval_ms=1_500)
        topic = await make(settings, topic_name())
        told: list[str] = []
        consumer = KafkaConsumer(settings, group_id=topic, client_id="c")

        async def revoked(_: set[TopicPartition]) -> None:
            told.append("revoked")

        async def assigned(_: set[TopicPartition]) -> None:
            told.append("assigned")

        await consumer.start([topic], revoked, assigned)
        try:
            consumer.pause(TopicPartition(topic, 0))
            until = time.monotonic() + 5
            while time.monotonic() < until:
                assert await consumer.getmany(timeout_ms=200, max_records=10) == {}
            assert told == ["assigned"]
            await consumer.commit({TopicPartition(topic, 0): 0})
        finally:
            await consumer.stop()

    run(main())


def test_a_consumer_that_does_not_poll_leaves_its_group_and_comes_back(
    kafka: str, topic_name: TopicName, run: Run
) -> None:
    async def main() -> None:
        settings = KafkaSettings(bootstrap_servers=kafka, session_timeout_ms=6_000, max_poll_interval_ms=1_500)
        topic = await make(settings, topic_name())
        left, back = asyncio.Event(), asyncio.Event()
        consumer = KafkaConsumer(settings, group_id=topic, client_id="c")

        async def revoked(partitions: set[TopicPartition]) -> None:
            # Out of the group without a generation: Kafka would take this for a commit without a group.
            with pytest.raises(CommitRejectedError):
                await consumer.commit(dict.fromkeys(partitions, 5))
            left.set()

        async def assigned(_: set[TopicPartition]) -> None:
            if left.is_set():
                back.set()

        await consumer.start([topic], revoked, assigned)
        try:
            await asyncio.wait_for(left.wait(), 20)
            while not back.is_set():
                await consumer.getmany(timeout_ms=100, max_records=10)
            assert await consumer.committed(TopicPartition(topic, 0)) is None
            await consumer.commit({TopicPartition(topic, 0): 0})
        finally:
            await consumer.stop()

    run(main())


def test_what_fails_in_the_background_for_good_comes_out_of_getmany(
    kafka: str, topic_name: TopicName, run: Run
) -> None:
    async def main() -> None:
        settings = KafkaSettings(bootstrap_servers=kafka)
        topic = await make(settings, topic_name())
        consumer = KafkaConsumer(settings, group_id=topic, client_id="c")
        await consumer.start([topic], ignore, ignore)
        try:
            # As when the right to the group is taken away.
            coordinator = consumer._inner._coordinator
            pushed = asyncio.ensure_future(
                coordinator._push_error_to_user(kafka_errors.GroupAuthorizationFailedError(topic))
            )
            with pytest.raises(BrokerAuthorizationError, match=f"read as consumer group {topic}"):
                await poll(consumer)
            await pushed

            consumer._inner._fetcher._fetch_task.cancel()
            await asyncio.wait({consumer._inner._fetcher._fetch_task})
            consumer._inner._fetcher._fetch_task = failed = asyncio.get_running_loop().create_future()
            failed.set_exception(kafka_errors.KafkaError("Unexpected error during data retrieval"))
            with pytest.raises(BrokerError, match="data retrieval"):
                await consumer.getmany(timeout_ms=100, max_records=10)
            consumer._inner._fetcher._fetch_task = asyncio.ensure_future(asyncio.Event().wait())
        finally:
            await consumer.stop()

    run(main())


def test_sequence_numbers_begin_again_at_zero_after_the_largest(kafka: str, topic_name: TopicName, run: Run) -> None:
    async def main() -> None:
        settings = KafkaSettings(bootstrap_servers=kafka)
        topic = await make(settings, topic_name())
        async with started(settings) as producer:
            numbers = producer._inner._txn_manager._sequence_numbers
            numbers[KafkaTopicPartition(topic, 0)] = 2**31 - 3
            for number in range(4):
                await (await send(producer, topic, b"%d" % number, b"+"))
            assert numbers[KafkaTopicPartition(topic, 0)] == 5
        assert await values_of(settings, topic, 8) == [b"0", b"+", b"1", b"+", b"2", b"+", b"3", b"+"]

    run(main())


def test_a_producer_that_lost_its_count_takes_a_new_identity(
    kafka: str, topic_name: TopicName, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        settings = KafkaSettings(bootstrap_servers=kafka)
        topic = await make(settings, topic_name())
        async with started(settings) as producer:
            await (await send(producer, topic, b"0"))
            identity = producer._inner._txn_manager.producer_id
            producer._inner._txn_manager._sequence_numbers[KafkaTopicPartition(topic, 0)] = 50
            with pytest.raises(BrokerError, match="OutOfOrderSequenceNumber"):
                await (await send(producer, topic, b"refused"))
            for value in (b"1", b"2"):
                await (await send(producer, topic, value))
            assert producer._inner._txn_manager.producer_id != identity
        assert await values_of(settings, topic, 3) == [b"0", b"1", b"2"]

    with caplog.at_level(logging.WARNING, "streamproc"):
        run(main())
    assert "taking a new producer id" in caplog.text


def test_a_broker_without_idempotent_producers_is_told_of_once(
    embedded_broker: str, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with started(KafkaSettings(bootstrap_servers=embedded_broker)):
            pass

    with caplog.at_level(logging.INFO, "streamproc"):
        run(main())
    [told] = [(record.getMessage(), record.levelname) for record in caplog.records]
    assert told[0].startswith(f"the broker at {embedded_broker} supports no idempotent producers")
    assert told[1] == "INFO"


def test_a_broker_that_falls_silent_keeps_nobody_from_stopping(
    pausable: KafkaCluster, topic_name: TopicName, run: Run
) -> None:
    async def main() -> None:
        settings = KafkaSettings(
            bootstrap_servers=pausable.bootstrap_servers, session_timeout_ms=6_000, request_timeout_ms=2_000
        )
        topic = await make(settings, topic_name())
        consumer = KafkaConsumer(settings, group_id=topic, client_id="c")
        producer = KafkaProducer(settings, client_id="p")
        await producer.start()
        await consumer.start([topic], ignore, ignore)
        assert await producer.partition_count(topic) == 1
        pausable.pause(1)
        try:
            future = await send(producer, topic, b"x")
            with pytest.raises(BrokerUnreachableError, match=r"kafka\.request_timeout_ms"):
                await consumer.commit({TopicPartition(topic, 0): 0})
            began = time.monotonic()
            await asyncio.gather(producer.stop(), consumer.stop())
            assert time.monotonic() - began < 20
            with pytest.raises(BrokerUnreachableError):
                await future
        finally:
            pausable.resume(1)

    run(main(), timeout_s=60)


def test_batches_survive_a_broker_that_comes_back(pausable: KafkaCluster, topic_name: TopicName, run: Run) -> None:
    async def main() -> None:
        settings = KafkaSettings(bootstrap_servers=pausable.bootstrap_servers, request_timeout_ms=1_000)
        topic = await make(settings, topic_name())
        async with started(settings) as producer:
            await (await send(producer, topic, b"first"))
            pausable.pause(1)
            futures = [await send(producer, topic, b"%d" % number) for number in range(20)]
            done, _ = await asyncio.wait(futures, timeout=3)
            assert not done
            pausable.resume(1)
            await asyncio.gather(*futures)
        # Each of them once and in order, though requests were sent again: the producer is idempotent.
        assert await values_of(settings, topic, 21) == [b"first", *[b"%d" % number for number in range(20)]]

    run(main(), timeout_s=60)


def test_batches_that_are_too_much_for_one_request_are_written_in_several(
    kafka: str, topic_name: TopicName, run: Run
) -> None:
    async def main() -> None:
        settings = KafkaSettings(bootstrap_servers=kafka)
        topic, partitions = topic_name(), 20
        async with KafkaAdmin(settings) as admin:
            await admin.create_topics([NewTopic(topic, partitions, configs={"max.message.bytes": "12000000"})])
        async with started(settings) as producer:
            sending = []
            for partition in range(partitions):
                batch = producer.create_batch()
                batch.append(timestamp=None, key=None, value=b"x" * 11_000_000, headers=())
                sending.append(asyncio.ensure_future(producer.send_batch(batch, topic, partition)))
            for sent in sending:
                await (await sent)
        async with KafkaAdmin(settings) as admin:
            ends = await admin.end_offsets([TopicPartition(topic, number) for number in range(partitions)])
        assert list(ends.values()) == [1] * partitions

    # 220 MB in one request, and the broker would hang up.
    run(main(), 60)


def test_a_header_name_that_is_no_utf8_stops_nobody(run: Run, kafka: str, topic_name: TopicName) -> None:
    async def test() -> None:
        settings = KafkaSettings(bootstrap_servers=kafka)
        topic = await make(settings, topic_name())
        async with AIOKafkaProducer(bootstrap_servers=kafka) as producer:
            batch = producer.create_batch()
            batch._builder = _DefaultRecordBatchBuilderPy(2, 0, 0, -1, -1, 0, 100_000)  # lets names through
            for value, name in ((b"0", b"good"), (b"1", b"\xff\xfe"), (b"2", b"good"), (b"3", b"\xc3")):
                batch.append(timestamp=1, key=None, value=value, headers=[(RawName(name), b"x")])
            await (await producer.send_batch(batch, topic, partition=0))
            await producer.send_and_wait(topic, b"4", partition=0)
        assert await values_of(settings, topic, 5) == [b"0", b"1", b"2", b"3", b"4"]
        async with KafkaReader(settings) as reader:
            partition = TopicPartition(topic, 0)
            reader.assign({partition: 1})
            found: list[Any] = []
            while len(found) < 4:
                found += (await reader.getmany(timeout_ms=200)).get(partition, [])
            assert [(it.offset, it.value, it.headers) for it in found] == [
                (1, b"1", (("\\xff\\xfe", b"x"),)),
                (2, b"2", (("good", b"x"),)),
                (3, b"3", (("\\xc3", b"x"),)),
                (4, b"4", ()),
            ]

    run(test())


def in_transactions(settings: KafkaSettings, topic: str) -> KafkaTransactionalProducer:
    return KafkaTransactionalProducer(settings, client_id="p", transactional_id=topic)


async def write(producer: KafkaProducer, topic: str, size_bytes: int) -> object:
    return await (await send(producer, topic, b"x" * size_bytes))


def complaints_of(loop: asyncio.AbstractEventLoop) -> list[Any]:
    """What nobody took notice of from now on, as far as the loop is told."""
    complaints: list[Any] = []
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    return complaints


def test_giving_up_in_the_middle_of_writes_leaves_nothing_behind_and_the_next_epoch_works(
    kafka: str, topic_name: TopicName, run: Run
) -> None:
    async def main() -> None:
        complaints, before = complaints_of(asyncio.get_running_loop()), asyncio.all_tasks()
        settings = KafkaSettings(bootstrap_servers=kafka)
        topic = await make(settings, topic_name())
        producer = in_transactions(settings, topic)
        await producer.start()
        for _ in range(3):
            writes = [asyncio.create_task(write(producer, topic, 500_000)) for _ in range(8)]
            # Looked for at every turn of the loop: now and then one might look when all of them are through.
            async with asyncio.timeout(15.0):
                while not producer._inner._sender._in_flight:  # noqa: ASYNC110 - it has no event
                    await asyncio.sleep(0)
            await producer.abort()
            told = await asyncio.gather(*writes, return_exceptions=True)
            assert isinstance(told[-1], TransactionAbortedError)
        await write(producer, topic, 3)
        await producer.commit_transaction({}, Membership("group", -1, "", None))
        assert await values_of(settings, topic, 1) == [b"xxx"]
        await producer.stop()
        assert asyncio.all_tasks() == before
        assert complaints == []

    run(main())


def test_a_producer_of_transactions_stops_in_time_while_the_broker_does_not_answer(
    kafka: str, pausable: KafkaCluster, topic_name: TopicName, run: Run, eventually: Eventually
) -> None:
    async def main() -> None:
        complaints, before = complaints_of(asyncio.get_running_loop()), asyncio.all_tasks()
        settings = KafkaSettings(bootstrap_servers=kafka)
        topic = await make(settings, topic_name())
        producer = in_transactions(settings, topic)
        await producer.start()
        await write(producer, topic, 3)
        pausable.pause(1)
        # More than the sockets' buffers take, so that closing the connection politely would wait for the broker.
        writes = [asyncio.create_task(write(producer, topic, 1_000_000)) for _ in range(12)]
        await eventually(lambda: bool(producer._inner._sender._in_flight), what="a batch is on the wire")
        began = time.monotonic()
        await producer.stop()
        assert time.monotonic() - began < LAST_ABORT_S + 4
        assert all(isinstance(it, BrokerError) for it in await asyncio.gather(*writes, return_exceptions=True))
        assert asyncio.all_tasks() == before
        assert complaints == []

    run(main())
