"""What the in-memory broker has beyond the contract: faults on demand, gaps, expulsion, held acknowledgements."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from streamproc.errors import (
    BrokerError,
    BrokerUnreachableError,
    CommitRejectedError,
    RecordTooLargeError,
    TopicMissingError,
)
from streamproc.records import TopicPartition
from streamproc.testing import MemoryBroker, MemoryConsumer
from tests.conftest import Run


class Owner:
    """A consumer with what it was told, in order."""

    def __init__(self, broker: MemoryBroker, group: str = "g") -> None:
        self.consumer: MemoryConsumer = broker.consumer(group_id=group)
        self.told: list[tuple[str, list[int]]] = []

    async def start(self, *topics: str) -> Owner:
        await self.consumer.start(topics, self.revoked, self.assigned)
        return self

    async def revoked(self, partitions: set[TopicPartition]) -> None:
        self.told.append(("revoked", sorted(it.partition for it in partitions)))

    async def assigned(self, partitions: set[TopicPartition]) -> None:
        self.told.append(("assigned", sorted(it.partition for it in partitions)))

    async def values(self, *, timeout_ms: int = 0, max_records: int = 100) -> list[Any]:
        found = await self.consumer.getmany(timeout_ms=timeout_ms, max_records=max_records)
        return [record.value for records in found.values() for record in records]


def broker_with(topic: str = "t", partitions: int = 1, values: Sequence[bytes] = ()) -> MemoryBroker:
    broker = MemoryBroker(clock=lambda: 1_700_000_000.5)
    broker.create_topic(topic, partitions)
    for value in values:
        broker.append(topic, value)
    return broker


def test_records_without_a_timestamp_have_the_brokers_time() -> None:
    broker = broker_with(values=[b"a"])
    assert broker.append("t", b"b", timestamp=5, key=b"k", headers=[("h", None)]).timestamp == 5
    assert [(it.offset, it.timestamp, it.value) for it in broker.records("t")] == [
        (0, 1_700_000_000_500, b"a"),
        (1, 5, b"b"),
    ]


def test_offsets_may_have_gaps(run: Run) -> None:
    async def main() -> None:
        broker = broker_with(values=[b"0", b"1", b"2", b"3"])
        broker.remove("t", 0, 1)
        broker.remove("t", 0, 1)
        broker.truncate("t", 0, 1)
        owner = await Owner(broker).start("t")
        found = await owner.consumer.getmany(timeout_ms=0, max_records=10)
        assert [it.offset for records in found.values() for it in records] == [2, 3]
        async with broker.admin() as admin:
            at = TopicPartition("t", 0)
            assert (await admin.begin_offsets([at]), await admin.end_offsets([at])) == ({at: 1}, {at: 4})
        await owner.consumer.stop()

    run(main())


def test_a_fault_comes_as_often_as_told_and_then_no_more(run: Run) -> None:
    async def main() -> None:
        broker = broker_with(values=[b"a"])
        owner = await Owner(broker).start("t")
        at = TopicPartition("t", 0)
        broker.fail_next("commit", BrokerUnreachableError("down"), times=2)
        for _ in range(2):
            with pytest.raises(BrokerUnreachableError, match="down"):
                await owner.consumer.commit({at: 1})
        assert broker.committed("g") == {}
        await owner.consumer.commit({at: 1})
        assert broker.committed("g") == {at: 1}

        broker.fail_next("getmany", BrokerError("no"))
        with pytest.raises(BrokerError, match="no"):
            await owner.values()
        assert await owner.values() == [b"a"]
        await owner.consumer.stop()

    run(main())


def test_every_operation_can_be_made_to_fail(run: Run) -> None:
    async def main() -> None:
        broker = broker_with()
        at = TopicPartition("t", 0)
        consumer, producer = (await Owner(broker).start("t")).consumer, broker.producer()
        for operation, call in (
            ("probe", broker.probe),
            ("start", producer.start),
            ("committed", lambda: consumer.committed(at)),
            ("end_offsets", lambda: consumer.end_offsets([at])),
            ("partition_count", lambda: producer.partition_count("t")),
            ("send_batch", lambda: producer.send_batch(producer.create_batch(), "t", 0)),
            ("admin", broker.admin().__aenter__),
        ):
            broker.fail_next(operation, BrokerError(operation))  # type: ignore[arg-type]
            with pytest.raises(BrokerError, match=operation):
                await call()
            await call()
        await producer.stop()
        await consumer.stop()

    run(main())


def test_a_failed_write_is_told_by_its_future_and_writes_nothing(run: Run) -> None:
    async def main() -> None:
        broker = broker_with()
        producer = broker.producer()
        broker.fail_next("write", BrokerError("full"))
        futures = []
        for value in (b"lost", b"kept"):
            batch = producer.create_batch()
            batch.append(timestamp=None, key=None, value=value, headers=())
            futures.append(await producer.send_batch(batch, "t", 0))
        told = await asyncio.gather(*futures, return_exceptions=True)
        assert isinstance(told[0], BrokerError)
        assert told[1] == 0
        assert [it.value for it in broker.records("t")] == [b"kept"]
        await producer.stop()

    run(main())


def test_acknowledgements_can_be_held_back(run: Run) -> None:
    async def main() -> None:
        broker = broker_with()
        producer = broker.producer()
        with broker.acknowledgements_held():
            futures = []
            for value in (b"a", b"b"):
                batch = producer.create_batch()
                batch.append(timestamp=None, key=None, value=value, headers=())
                futures.append(await producer.send_batch(batch, "t", 0))
            await broker.settled()
            assert not any(future.done() for future in futures)
            assert broker.records("t") == []
        assert await asyncio.gather(*futures) == [0, 1]
        assert [it.value for it in broker.records("t")] == [b"a", b"b"]
        await producer.stop()

    run(main())


def test_an_expelled_member_cannot_commit_and_finds_out_when_it_polls(run: Run) -> None:
    async def main() -> None:
        broker = broker_with(partitions=2)
        a, b = await Owner(broker).start("t"), Owner(broker)
        await b.start("t")
        [mine] = a.consumer.assigned
        broker.expel(a.consumer)
        assert (a.consumer.is_member(), b.consumer.is_member()) == (False, True)
        await broker.settled()
        assert b.told[-1] == ("assigned", [0, 1])
        assert a.told == [("assigned", [0, 1]), ("revoked", [0, 1]), ("assigned", [mine.partition])]
        with pytest.raises(CommitRejectedError):
            await a.consumer.commit({mine: 1})
        assert await a.values() == []
        await broker.settled()
        assert a.told[3] == ("revoked", [mine.partition])
        assert a.told[4][0] == "assigned"
        assert a.consumer.is_member()
        assert len(a.consumer.assigned) == len(b.consumer.assigned) == 1
        await a.consumer.commit({next(iter(a.consumer.assigned)): 1})
        await a.consumer.stop()
        await b.consumer.stop()

    run(main())


def test_a_member_that_gives_up_partitions_may_commit_until_its_callback_returns(run: Run) -> None:
    async def main() -> None:
        broker = broker_with()
        a, b = Owner(broker), Owner(broker)
        at = TopicPartition("t", 0)
        let_go = asyncio.Event()
        late: list[BaseException] = []

        async def revoked(_: set[TopicPartition]) -> None:
            await a.consumer.commit({at: 7})
            let_go.set()

        async def commit_late() -> None:
            await let_go.wait()
            try:
                await a.consumer.commit({at: 9})
            except CommitRejectedError as error:
                late.append(error)

        await a.consumer.start(["t"], revoked, a.assigned)
        task = asyncio.create_task(commit_late())
        await b.start("t")
        await task
        assert broker.committed("g") == {at: 7}
        assert len(late) == 1
        for owner in (a, b):
            await owner.consumer.stop()

    run(main())


def test_a_topic_that_grows_makes_its_readers_rebalance(run: Run) -> None:
    async def main() -> None:
        broker = broker_with()
        owner = await Owner(broker).start("t")
        async with broker.admin() as admin:
            await admin.add_partitions("t", 3)
        await broker.settled()
        assert owner.told == [("assigned", [0]), ("revoked", [0]), ("assigned", [0, 1, 2])]
        await owner.consumer.stop()

    run(main())


def test_members_share_the_partitions_of_the_topics_that_they_read(run: Run) -> None:
    async def main() -> None:
        broker = broker_with("t", 3)
        broker.create_topic("u", 2)
        a, b = await Owner(broker).start("t", "u"), Owner(broker)
        await b.start("t")
        assert {it.topic for it in b.consumer.assigned} == {"t"}
        assert {it for it in a.consumer.assigned if it.topic == "u"} == {TopicPartition("u", 0), TopicPartition("u", 1)}
        assert len(a.consumer.assigned | b.consumer.assigned) == 5
        assert not a.consumer.assigned & b.consumer.assigned
        await a.consumer.stop()
        await b.consumer.stop()

    run(main())


def test_what_is_too_large_or_missing_is_refused_without_a_producer_too() -> None:
    broker = MemoryBroker()
    broker.create_topic("t", configs={"max.message.bytes": "100"})
    with pytest.raises(RecordTooLargeError):
        broker.append("t", b"x" * 100)
    with pytest.raises(TopicMissingError) as caught:
        broker.append("u", b"x")
    assert caught.value.topics == ("u",)
    with pytest.raises(BrokerError, match="exists"):
        broker.create_topic("t")


def test_a_group_that_begins_beyond_what_is_kept_begins_anew(run: Run) -> None:
    async def main() -> None:
        broker = broker_with(values=[b"0", b"1", b"2"])
        owner = await Owner(broker).start("t")
        await owner.consumer.commit({TopicPartition("t", 0): 1})
        await owner.consumer.stop()
        broker.truncate("t", 0, 2)
        again = await Owner(broker).start("t")
        assert await again.values() == [b"2"]
        await again.consumer.stop()

    run(main())


def test_the_same_calls_give_the_same_records_in_the_same_order(run: Run) -> None:
    async def main() -> list[Any]:
        broker = broker_with(partitions=3)
        for number in range(30):
            broker.append("t", b"%d" % number, partition=number % 3)
        owner = await Owner(broker).start("t")
        seen = []
        while values := await owner.values(max_records=4):
            seen.append(values)
        await owner.consumer.stop()
        return seen

    assert run(main()) == run(main())
