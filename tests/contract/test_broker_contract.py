"""What every broker behind ``streamproc.broker.interface`` does alike: Kafka, the embedded and the in-memory one."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import streamproc
from streamproc.broker.client import KafkaAdmin
from streamproc.broker.connections import KafkaConnections
from streamproc.broker.interface import (
    Admin,
    BatchBuilder,
    Compression,
    Connections,
    Consumer,
    Headers,
    Membership,
    NewTopic,
    OffsetReset,
    Producer,
    Reader,
    Row,
    TransactionalProducer,
)
from streamproc.broker.memory_log import MemoryRecord
from streamproc.broker.reader import KafkaReader
from streamproc.errors import (
    BrokerError,
    CommitRejectedError,
    RecordTooLargeError,
    TopicMissingError,
    TransactionAbortedError,
)
from streamproc.records import Record, TopicPartition, TopicRecord
from streamproc.settings import KafkaSettings
from streamproc.testing import MemoryBroker
from tests.conftest import Eventually, Run, TopicName

DEADLINE_S = 30.0


@dataclass
class World:
    """A broker under test."""

    connections: Connections
    admin: Callable[[], Admin]
    reader: Callable[[], Reader]
    refuses_large_batches: bool = True
    grows: bool = True


def memory_world(_: pytest.FixtureRequest) -> World:
    broker = MemoryBroker()
    return World(broker, broker.admin, broker.reader)


def embedded_world(request: pytest.FixtureRequest) -> World:
    # It lets the first member of a group wait for others for half of the session timeout.
    settings = KafkaSettings(bootstrap_servers=request.getfixturevalue("embedded_broker"), session_timeout_ms=1_500)
    return World(
        KafkaConnections(settings),
        lambda: KafkaAdmin(settings),
        lambda: KafkaReader(settings),
        refuses_large_batches=False,
        grows=False,
    )


def kafka_world(request: pytest.FixtureRequest) -> World:
    settings = KafkaSettings(bootstrap_servers=request.getfixturevalue("kafka"), session_timeout_ms=6_000)
    return World(KafkaConnections(settings), lambda: KafkaAdmin(settings), lambda: KafkaReader(settings))


WORLDS = {"memory": memory_world, "embedded": embedded_world, "kafka": kafka_world}
IMPLEMENTATIONS = {
    "KafkaConsumer",
    "KafkaProducer",
    "KafkaTransactionalProducer",
    "KafkaAdmin",
    "KafkaConnections",
    "KafkaReader",
    "MemoryConsumer",
    "MemoryProducer",
    "MemoryTransactionalProducer",
    "MemoryAdmin",
    "MemoryBroker",
    "MemoryReader",
}


@pytest.fixture(
    params=[
        "memory",
        pytest.param("embedded", marks=pytest.mark.embedded),
        pytest.param("kafka", marks=pytest.mark.kafka),
    ]
)
def world(request: pytest.FixtureRequest) -> World:
    return WORLDS[request.param](request)


@pytest.fixture(params=["memory", pytest.param("kafka", marks=pytest.mark.kafka)])
def transactional_world(request: pytest.FixtureRequest) -> World:
    """The brokers that have transactions: all but the embedded one."""
    return WORLDS[request.param](request)


@dataclass
class Member:
    """A consumer, and what it was told of its partitions."""

    consumer: Consumer
    log: list[tuple[str, str, set[TopicPartition]]]
    name: str = "a"
    owned: set[TopicPartition] = field(default_factory=set)
    before_revocation: Callable[[set[TopicPartition]], object] | None = None

    async def revoked(self, partitions: set[TopicPartition]) -> None:
        if self.before_revocation is not None:
            await self.before_revocation(partitions)  # type: ignore[misc]
        self.log.append((self.name, "revoked", set(partitions)))
        self.owned -= partitions

    async def assigned(self, partitions: set[TopicPartition]) -> None:
        self.log.append((self.name, "assigned", set(partitions)))
        self.owned |= partitions

    async def start(self, *topics: str) -> Member:
        await self.consumer.start(list(topics), self.revoked, self.assigned)
        return self

    async def read(self, count: int) -> list[TopicRecord]:
        """At least ``count`` records, in the order in which they came."""
        found: list[TopicRecord] = []
        deadline = time.monotonic() + DEADLINE_S
        while len(found) < count:
            assert time.monotonic() < deadline, f"only {len(found)} of {count} records came"
            for of, records in (await self.consumer.getmany(timeout_ms=200, max_records=1_000)).items():
                found += [
                    MemoryRecord(*of, it.offset, it.timestamp, it.key, it.value, tuple(it.headers)) for it in records
                ]
        return found

    async def owns(self, count: int) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while len(self.owned) != count:
            assert time.monotonic() < deadline, f"owns {self.owned}, not {count} partitions"
            await self.consumer.getmany(timeout_ms=50, max_records=1)


@contextlib.asynccontextmanager
async def member(
    world: World,
    *topics: str,
    group: str,
    name: str = "a",
    log: list[tuple[str, str, set[TopicPartition]]] | None = None,
    reset: OffsetReset = "earliest",
) -> AsyncIterator[Member]:
    consumer = world.connections.consumer(group_id=group, client_id=name, auto_offset_reset=reset)
    it = Member(consumer, [] if log is None else log, name)
    try:
        yield await it.start(*topics)
    finally:
        await consumer.stop()


@contextlib.asynccontextmanager
async def producer(world: World, compression: Compression = "none") -> AsyncIterator[Producer]:
    it = world.connections.producer(client_id="producer", compression=compression)
    await it.start()
    try:
        yield it
    finally:
        await it.stop()


@contextlib.asynccontextmanager
async def transactions(world: World, transactional_id: str) -> AsyncIterator[TransactionalProducer]:
    it = world.connections.transactional_producer(
        client_id="producer", compression="none", transactional_id=transactional_id
    )
    await it.start()
    try:
        yield it
    finally:
        await it.stop()


async def add(producer: Producer, topic: str, *values: bytes, partition: int = 0) -> None:
    await (await producer.send_batch(fill(producer.create_batch(), values), topic, partition))


async def make(world: World, topic: str, partitions: int = 1, **configs: str) -> str:
    async with world.admin() as admin:
        await admin.create_topics(
            [NewTopic(topic, partitions, 1, {k.replace("_", "."): v for k, v in configs.items()})]
        )
    return topic


def fill(batch: BatchBuilder, values: Iterable[bytes], key: bytes | None = None, headers: Headers = ()) -> BatchBuilder:
    for value in values:
        assert batch.append(timestamp=None, key=key, value=value, headers=headers) is not None
    return batch


async def write(world: World, topic: str, partition: int, values: Sequence[bytes]) -> None:
    async with producer(world) as it:
        await (await it.send_batch(fill(it.create_batch(), values), topic, partition))


def values_of(records: Iterable[Record]) -> list[bytes | None]:
    return [record.value for record in records]


def test_every_implementation_is_held_to_this_contract() -> None:
    telling = ({"getmany", "commit"}, {"getmany", "assign"}, {"send_batch"}, {"create_topics"}, {"partition_of_key"})
    found = set()
    for path in Path(next(iter(streamproc.__path__))).rglob("*.py"):
        if path.parent.name == "integrations":  # over somebody else's clients, with tests of their own
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and not any(getattr(base, "id", "") == "Protocol" for base in node.bases):
                methods = {it.name for it in node.body if isinstance(it, ast.FunctionDef | ast.AsyncFunctionDef)}
                if any(names <= methods for names in telling):
                    found.add(node.name)
    assert found == IMPLEMENTATIONS, "add the new implementation to WORLDS, and here"


def test_records_come_back_in_order_with_keys_headers_and_timestamps(
    world: World, topic_name: TopicName, run: Run
) -> None:
    async def main() -> None:
        topic = await make(world, topic_name())
        async with producer(world) as out:
            batch = out.create_batch()
            batch.append(timestamp=1_700_000_000_001, key=b"k", value=b"one", headers=[("a", b"1"), ("n", None)])
            batch.append(timestamp=1_700_000_000_002, key=None, value=memoryview(b"two"), headers=())
            batch.append(timestamp=1_700_000_000_003, key=b"gone", value=None, headers=(("a", b""),))
            assert batch.record_count() == 3
            await (await out.send_batch(batch, topic, 0))
        async with member(world, topic, group=topic) as it:
            records = await it.read(3)
        assert [(r.topic, r.partition, r.offset) for r in records] == [(topic, 0, 0), (topic, 0, 1), (topic, 0, 2)]
        assert [r.timestamp for r in records] == [1_700_000_000_001, 1_700_000_000_002, 1_700_000_000_003]
        assert [(r.key, r.value) for r in records] == [(b"k", b"one"), (None, b"two"), (b"gone", None)]
        assert [tuple(r.headers) for r in records] == [(("a", b"1"), ("n", None)), (), (("a", b""),)]

    run(main())


def test_a_record_without_a_timestamp_gets_the_time_of_its_writing(
    world: World, topic_name: TopicName, run: Run
) -> None:
    async def main() -> None:
        topic = await make(world, topic_name())
        before = int(time.time() * 1000)
        await write(world, topic, 0, [b"x"])
        async with member(world, topic, group=topic) as it:
            [record] = await it.read(1)
        assert before <= record.timestamp <= int(time.time() * 1000)

    run(main())


@pytest.mark.parametrize("compression", ["gzip", "snappy", "lz4", "zstd"])
def test_compressed_batches_read_the_same(
    world: World, topic_name: TopicName, run: Run, compression: Compression
) -> None:
    async def main() -> None:
        topic = await make(world, topic_name())
        async with producer(world, compression) as out:
            await (await out.send_batch(fill(out.create_batch(), [b"x" * 1_000, b"y"]), topic, 0))
        async with member(world, topic, group=topic) as it:
            assert values_of(await it.read(2)) == [b"x" * 1_000, b"y"]

    run(main())


def test_no_more_records_come_at_once_than_asked_for(world: World, topic_name: TopicName, run: Run) -> None:
    async def main() -> None:
        topic = await make(world, topic_name(), 2)
        for partition in (0, 1):
            await write(world, topic, partition, [b"%d" % i for i in range(10)])
        async with member(world, topic, group=topic) as it:
            found: dict[int, list[bytes | None]] = {0: [], 1: []}
            deadline = time.monotonic() + DEADLINE_S
            while sum(map(len, found.values())) < 20:
                assert time.monotonic() < deadline
                got = await it.consumer.getmany(timeout_ms=200, max_records=3)
                assert sum(map(len, got.values())) <= 3
                for at, records in got.items():
                    found[at.partition].extend(values_of(records))
        assert found[0] == found[1] == [b"%d" % i for i in range(10)]

    run(main())


def test_without_records_getmany_comes_back_empty_when_its_time_is_up(
    world: World, topic_name: TopicName, run: Run
) -> None:
    async def main() -> None:
        topic = await make(world, topic_name())
        async with member(world, topic, group=topic) as it:
            await it.owns(1)
            assert await it.consumer.getmany(timeout_ms=0, max_records=1) == {}
            began = time.monotonic()
            assert await it.consumer.getmany(timeout_ms=300, max_records=1) == {}
            assert 0.25 <= time.monotonic() - began < 2.0

    run(main())


def test_a_paused_partition_gives_nothing_and_the_others_go_on(world: World, topic_name: TopicName, run: Run) -> None:
    async def main() -> None:
        topic = await make(world, topic_name(), 2)
        zero, one = TopicPartition(topic, 0), TopicPartition(topic, 1)
        await write(world, topic, 0, [b"a0", b"a1"])
        await write(world, topic, 1, [b"b0", b"b1"])
        async with member(world, topic, group=topic) as it:
            await it.owns(2)
            it.consumer.pause(zero)
            rest = await it.read(1) if it.log[-1][1] == "assigned" else []
            seen = {TopicPartition(record.topic, record.partition) for record in rest}
            already = 2 if zero in seen else 0  # fetched between the assignment and the pause
            await write(world, topic, 0, [b"a2"])
            await write(world, topic, 1, [b"b2"])
            while len([record for record in rest if record.partition == 1]) < 3:
                more = await it.read(1)
                assert {record.partition for record in more} == {1}
                rest += more
            assert await it.consumer.getmany(timeout_ms=300, max_records=10) == {}
            it.consumer.pause(one)
            await write(world, topic, 1, [b"b3"])
            assert await it.consumer.getmany(timeout_ms=300, max_records=10) == {}
            it.consumer.resume(zero, one)
            rest += await it.read(4 - already)
        assert [record.value for record in rest if record.partition == 0] == [b"a0", b"a1", b"a2"]
        assert [record.value for record in rest if record.partition == 1] == [b"b0", b"b1", b"b2", b"b3"]

    run(main())


def test_resuming_wakes_a_waiting_getmany(world: World, topic_name: TopicName, run: Run) -> None:
    async def main() -> None:
        topic = await make(world, topic_name())
        async with member(world, topic, group=topic) as it:
            await it.owns(1)
            it.consumer.pause(TopicPartition(topic, 0))
            await write(world, topic, 0, [b"x"])
            assert await it.consumer.getmany(timeout_ms=300, max_records=10) == {}
            waiting = asyncio.create_task(it.consumer.getmany(timeout_ms=20_000, max_records=10))
            await asyncio.sleep(0)
            began = time.monotonic()
            it.consumer.resume(TopicPartition(topic, 0))
            assert [len(records) for records in (await waiting).values()] == [1]
            assert time.monotonic() - began < 5.0

    run(main())


def test_commits_survive_the_consumer(world: World, topic_name: TopicName, run: Run) -> None:
    async def main() -> None:
        topic = await make(world, topic_name(), 2)
        zero, one = TopicPartition(topic, 0), TopicPartition(topic, 1)
        await write(world, topic, 0, [b"a", b"b", b"c"])
        async with member(world, topic, group=topic) as it:
            assert len(await it.read(3)) == 3
            assert await it.consumer.committed(zero) is None
            await it.consumer.commit({zero: 2})
            assert await it.consumer.committed(zero) == 2
            assert await it.consumer.committed(one) is None
        async with member(world, topic, group=topic) as it:
            assert values_of(await it.read(1)) == [b"c"]
        async with member(world, topic, group=f"{topic}-other") as it:
            assert values_of(await it.read(3)) == [b"a", b"b", b"c"]
        async with world.admin() as admin:
            assert await admin.committed(topic, [zero, one]) == {zero: 2}
            assert await admin.committed(f"{topic}-unknown", [zero]) == {}

    run(main())


def test_stopping_commits_nothing_and_may_be_repeated(world: World, topic_name: TopicName, run: Run) -> None:
    async def main() -> None:
        topic = await make(world, topic_name())
        await write(world, topic, 0, [b"a"])
        async with member(world, topic, group=topic) as it:
            await it.read(1)
            await it.consumer.stop()
            await it.consumer.stop()
            with pytest.raises(CommitRejectedError):
                await it.consumer.commit({TopicPartition(topic, 0): 1})
        async with world.admin() as admin:
            assert await admin.committed(topic, [TopicPartition(topic, 0)]) == {}

    run(main())


def test_a_new_group_may_begin_at_the_end(world: World, topic_name: TopicName, run: Run) -> None:
    async def main() -> None:
        topic = await make(world, topic_name())
        await write(world, topic, 0, [b"old"])
        async with member(world, topic, group=topic, reset="latest") as it:
            deadline = time.monotonic() + DEADLINE_S
            while it.consumer.position(TopicPartition(topic, 0)) is None:
                assert time.monotonic() < deadline
                await it.consumer.getmany(timeout_ms=50, max_records=1)
            await write(world, topic, 0, [b"new"])
            assert values_of(await it.read(1)) == [b"new"]

    run(main())


def test_a_second_member_takes_part_and_the_first_is_told_before(
    world: World, topic_name: TopicName, run: Run, eventually: Eventually
) -> None:
    async def main() -> None:
        topic = await make(world, topic_name(), 4)
        log: list[tuple[str, str, set[TopicPartition]]] = []
        async with member(world, topic, group=topic, name="a", log=log) as a:
            await a.owns(4)
            polling = asyncio.create_task(poll(a))
            async with member(world, topic, group=topic, name="b", log=log) as b:
                await eventually(lambda: len(a.owned) == 2 and len(b.owned) == 2, DEADLINE_S, "an even share")
                assert not a.owned & b.owned
                assert (log[0][:2], log[1][:2]) == (("a", "assigned"), ("a", "revoked"))
                assert log[1][2] == {TopicPartition(topic, number) for number in range(4)}
                assert {entry[:2] for entry in log[2:4]} == {("a", "assigned"), ("b", "assigned")}
            await eventually(lambda: len(a.owned) == 4, DEADLINE_S, "everything once more")
            polling.cancel()
            await asyncio.wait({polling})

    run(main(), timeout_s=90)


async def poll(it: Member) -> None:
    while True:
        await it.consumer.getmany(timeout_ms=100, max_records=100)


def test_what_is_committed_while_a_partition_is_given_up_is_where_the_next_owner_begins(
    world: World, topic_name: TopicName, run: Run, eventually: Eventually
) -> None:
    async def main() -> None:
        topic = await make(world, topic_name(), 2)
        for partition in (0, 1):
            await write(world, topic, partition, [b"0", b"1", b"2", b"3"])
        async with member(world, topic, group=topic, name="a") as a:
            await a.read(8)

            async def commit(partitions: set[TopicPartition]) -> None:
                await a.consumer.commit(dict.fromkeys(partitions, 3))

            a.before_revocation = commit
            polling = asyncio.create_task(poll(a))
            async with member(world, topic, group=topic, name="b") as b:
                assert values_of(await b.read(1)) == [b"3"]
                await eventually(lambda: len(a.owned) == 1, DEADLINE_S, "the first one's share")
                assert not polling.done()
            polling.cancel()
            await asyncio.wait({polling})

    run(main(), timeout_s=90)


def test_a_commit_from_an_old_generation_is_rejected(
    world: World, topic_name: TopicName, run: Run, eventually: Eventually
) -> None:
    async def main() -> None:
        topic = await make(world, topic_name(), 2)
        for partition in (0, 1):
            await write(world, topic, partition, [b"0", b"1"])
        async with member(world, topic, group=topic, name="a") as a:
            await a.read(4)
            polling = asyncio.create_task(poll(a))
            async with member(world, topic, group=topic, name="b") as b:
                await eventually(lambda: len(a.owned) == 1 and len(b.owned) == 1, DEADLINE_S, "an even share")
                [mine], [others] = a.owned, b.owned
                with pytest.raises(CommitRejectedError):
                    await a.consumer.commit({others: 2})
                with pytest.raises(CommitRejectedError):  # all or none
                    await a.consumer.commit({mine: 2, others: 2})
                assert await a.consumer.committed(mine) is None
                await a.consumer.commit({mine: 1})
                assert await b.consumer.committed(others) is None
            polling.cancel()
            await asyncio.wait({polling})

    run(main(), timeout_s=90)


def test_during_a_rebalance_getmany_still_keeps_to_its_time(
    world: World, topic_name: TopicName, run: Run, eventually: Eventually
) -> None:
    async def main() -> None:
        topic = await make(world, topic_name(), 2)
        draining, drained = asyncio.Event(), asyncio.Event()

        async def drain(_: set[TopicPartition]) -> None:
            draining.set()
            await drained.wait()

        async with member(world, topic, group=topic, name="a") as a:
            await a.owns(2)
            a.before_revocation = drain
            b = Member(world.connections.consumer(group_id=topic, client_id="b", auto_offset_reset="earliest"), [], "b")
            joining = asyncio.create_task(b.start(topic))
            await asyncio.wait_for(draining.wait(), DEADLINE_S)
            await write(world, topic, 0, [b"x"])
            await write(world, topic, 1, [b"x"])
            for _ in range(3):
                began = time.monotonic()
                assert await a.consumer.getmany(timeout_ms=100, max_records=10) == {}
                assert time.monotonic() - began < 2.0
            drained.set()
            polling = asyncio.create_task(poll(a))
            try:
                await joining
                await eventually(lambda: len(a.owned) == 1 and len(b.owned) == 1, DEADLINE_S, "an even share")
            finally:
                await b.consumer.stop()
                polling.cancel()
                await asyncio.wait({polling})

    run(main(), timeout_s=90)


def test_what_a_rebalance_callback_raises_comes_out_of_getmany(world: World, topic_name: TopicName, run: Run) -> None:
    async def main() -> None:
        topic = await make(world, topic_name())
        consumer = world.connections.consumer(group_id=topic, client_id="a", auto_offset_reset="earliest")

        async def revoked(_: set[TopicPartition]) -> None: ...

        async def assigned(_: set[TopicPartition]) -> None:
            raise BrokerError("the ledger is full")

        try:
            await consumer.start([topic], revoked, assigned)
            with pytest.raises(BrokerError, match="the ledger is full"):
                await poll(Member(consumer, []))
        finally:
            await consumer.stop()

    run(main())


def test_log_ends_and_positions_are_known(world: World, topic_name: TopicName, run: Run) -> None:
    async def main() -> None:
        topic = await make(world, topic_name(), 2)
        zero, one = TopicPartition(topic, 0), TopicPartition(topic, 1)
        await write(world, topic, 0, [b"a", b"b", b"c"])
        await write(world, topic, 0, [b"d", b"e"])
        async with member(world, topic, group=topic) as it:
            assert it.consumer.highwater(TopicPartition(topic, 9)) is None
            assert it.consumer.position(TopicPartition(topic, 9)) is None
            assert len(await it.read(5)) == 5
            assert it.consumer.highwater(zero) == 5
            assert it.consumer.position(zero) == 5
            assert await it.consumer.end_offsets([zero, one]) == {zero: 5, one: 0}
        async with world.admin() as admin:
            assert await admin.end_offsets([zero, one]) == {zero: 5, one: 0}
            assert await admin.begin_offsets([zero, one]) == {zero: 0, one: 0}

    run(main())


def test_batches_arrive_in_the_order_of_their_submission(world: World, topic_name: TopicName, run: Run) -> None:
    async def main() -> None:
        topic = await make(world, topic_name(), 2)
        async with producer(world) as out:
            sending = [
                out.send_batch(fill(out.create_batch(), [b"%d-%d" % (number, i) for i in range(3)]), topic, number % 2)
                for number in range(200)
            ]
            await asyncio.gather(*await asyncio.gather(*sending))
        async with member(world, topic, group=topic) as it:
            records = await it.read(600)
        for partition in (0, 1):
            got = [record.value for record in records if record.partition == partition]
            assert got == [b"%d-%d" % (number, i) for number in range(partition, 200, 2) for i in range(3)]

    run(main())


def test_stopping_a_producer_writes_what_was_submitted(world: World, topic_name: TopicName, run: Run) -> None:
    async def main() -> None:
        topic = await make(world, topic_name())
        async with producer(world) as out:
            futures = [await out.send_batch(fill(out.create_batch(), [b"%d" % i]), topic, 0) for i in range(20)]
        assert all(future.done() and future.exception() is None for future in futures)
        with pytest.raises(BrokerError, match="stopped"):
            await out.send_batch(out.create_batch(), topic, 0)
        await out.stop()

    run(main())


def test_giving_up_a_future_does_not_take_the_batch_back(world: World, topic_name: TopicName, run: Run) -> None:
    async def main() -> None:
        topic = await make(world, topic_name())
        async with producer(world) as out:
            (await out.send_batch(fill(out.create_batch(), [b"0"]), topic, 0)).cancel()
            await (await out.send_batch(fill(out.create_batch(), [b"1"]), topic, 0))
        async with member(world, topic, group=topic) as it:
            assert values_of(await it.read(2)) == [b"0", b"1"]

    run(main())


def test_after_stop_getmany_returns_nothing(world: World, topic_name: TopicName, run: Run) -> None:
    async def main() -> None:
        topic = await make(world, topic_name())
        await write(world, topic, 0, [b"x"])
        async with member(world, topic, group=topic) as it:
            await it.owns(1)
            waiting = asyncio.create_task(poll(it))
            await it.consumer.stop()
            assert await it.consumer.getmany(timeout_ms=1_000, max_records=1) == {}
            waiting.cancel()
            await asyncio.wait({waiting})

    run(main())


def test_a_batch_takes_records_until_it_is_full_and_then_none(world: World, run: Run) -> None:
    async def main() -> None:
        async with producer(world) as out:
            batch = out.create_batch(10_000)
            fill(batch, [b"x" * 1_000] * 9)
            assert batch.append(timestamp=None, key=None, value=b"x" * 1_000, headers=()) is None
            assert batch.append(timestamp=None, key=None, value=b"x", headers=()) is None
            assert batch.record_count() == 9
            alone = fill(out.create_batch(1_000), [b"x" * 5_000])
            assert alone.append(timestamp=None, key=None, value=b"x", headers=()) is None
            bounded = out.create_batch(2**31)  # the producer's own limit is the lower one
            fill(bounded, [b"x" * 500_000] * 2)
            assert bounded.append(timestamp=None, key=None, value=b"x" * 500_000, headers=()) is None

    run(main())


def test_a_batch_takes_rows_as_far_as_they_fit(world: World, topic_name: TopicName, run: Run) -> None:
    async def main() -> None:
        topic = await make(world, topic_name())
        rows: list[Row] = [(1_700_000_000_000 + i, b"k", memoryview(b"%d" % i * 1_000), [("h", b"")]) for i in range(5)]
        async with producer(world) as out:
            batch = out.create_batch(3_500)
            assert batch.extend(rows, 1) == 3
            assert batch.extend(rows, 4) == 0
            assert batch.record_count() == 3
            rest = out.create_batch(3_500)
            assert rest.extend(rows, 4) == 1
            assert rest.extend(rows, 5) == 0
            futures = [await out.send_batch(it, topic, 0) for it in (batch, rest)]
            await asyncio.gather(*futures)
        async with member(world, topic, group=topic) as it:
            records = await it.read(4)
        assert values_of(records) == [b"%d" % i * 1_000 for i in range(1, 5)]
        assert [record.timestamp for record in records] == [1_700_000_000_000 + i for i in range(1, 5)]

    run(main())


def test_too_large_a_batch_is_refused_and_the_next_ones_are_not(world: World, topic_name: TopicName, run: Run) -> None:
    if not world.refuses_large_batches:
        pytest.skip("the embedded broker has max.message.bytes and does not keep to it")

    async def main() -> None:
        topic = await make(world, topic_name(), max_message_bytes="2000")
        async with producer(world) as out:
            assert await out.max_message_bytes(topic) == 2_000
            futures = [
                await out.send_batch(fill(out.create_batch(), [b"%d" % i * size]), topic, 0)
                for i, size in enumerate([10, 5_000, 10, 5_000, 5_000, 10])
            ]
            told = await asyncio.gather(*futures, return_exceptions=True)
            assert [isinstance(it, RecordTooLargeError) for it in told] == [False, True, False, True, True, False]
            assert f"max.message.bytes of topic {topic}" in str(told[1])
            # Alone, too, and with nothing else under way.
            with pytest.raises(RecordTooLargeError):
                await (await out.send_batch(fill(out.create_batch(), [b"y" * 5_000]), topic, 0))
            await (await out.send_batch(fill(out.create_batch(), [b"end"]), topic, 0))
        async with member(world, topic, group=topic) as it:
            assert values_of(await it.read(4)) == [b"0" * 10, b"2" * 10, b"5" * 10, b"end"]

    run(main())


def test_a_missing_topic_is_named_at_once_and_not_created_by_asking(
    world: World, topic_name: TopicName, run: Run
) -> None:
    async def main() -> None:
        topic, gone, lost = await make(world, topic_name()), topic_name("gone"), topic_name("lost")
        consumer = world.connections.consumer(group_id=topic, client_id="a", auto_offset_reset="earliest")

        async def ignore(_: set[TopicPartition]) -> None: ...

        with pytest.raises(TopicMissingError) as caught:
            await consumer.start([gone, topic, lost], ignore, ignore)
        assert set(caught.value.topics) == {gone, lost}
        await consumer.stop()
        async with producer(world) as out:
            for call in (
                out.partition_count(gone),
                out.send_batch(fill(out.create_batch(), [b"x"]), gone, 0),
            ):
                with pytest.raises(TopicMissingError, match=gone):
                    await call
            assert await out.partition_count(topic) == 1
        async with world.admin() as admin:
            with pytest.raises(TopicMissingError, match=gone):
                await admin.describe_configs(gone)
            with pytest.raises(TopicMissingError, match=gone):
                await admin.end_offsets([TopicPartition(gone, 0)])
            there = await admin.topics()
            assert topic in there
            assert gone not in there
            assert lost not in there

    run(main())


def test_a_missing_partition_is_refused(world: World, topic_name: TopicName, run: Run) -> None:
    async def main() -> None:
        topic = await make(world, topic_name(), 3)
        async with producer(world) as out:
            assert await out.partition_count(topic) == 3
            with pytest.raises(BrokerError, match="3 partitions"):
                await out.send_batch(fill(out.create_batch(), [b"x"]), topic, 3)

    run(main())


def test_topics_can_be_made_described_configured_and_deleted(world: World, topic_name: TopicName, run: Run) -> None:
    async def main() -> None:
        topic = topic_name()
        async with world.admin() as admin:
            await admin.create_topics([NewTopic(topic, 3, configs={"retention.ms": "3600000"})])
            info = (await admin.topics())[topic]
            assert (info.partitions, info.internal) == (3, False)
            configs = await admin.describe_configs(topic)
            assert (configs["retention.ms"].value, configs["retention.ms"].own) == ("3600000", True)
            await admin.set_configs(topic, {"max.message.bytes": "5000"})
            configs = await admin.describe_configs(topic)
            assert configs["max.message.bytes"].value == "5000"
            assert configs["retention.ms"].value == "3600000"
            assert await admin.max_message_bytes(topic) == 5_000
            with pytest.raises(BrokerError, match=topic):
                await admin.create_topics([NewTopic(topic, 1)])
            await admin.delete_topics([topic])
            assert topic not in await admin.topics()
            with pytest.raises(TopicMissingError):
                await admin.delete_topics([topic])

    run(main())


def test_a_topic_can_grow(world: World, topic_name: TopicName, run: Run) -> None:
    if not world.grows:
        pytest.skip("the embedded broker cannot add partitions")

    async def main() -> None:
        topic = await make(world, topic_name(), 1)
        async with world.admin() as admin, producer(world) as out:
            assert await out.partition_count(topic) == 1
            await admin.add_partitions(topic, 3)
            assert (await admin.topics())[topic].partitions == 3
            await (await out.send_batch(fill(out.create_batch(), [b"x"]), topic, 2))
            assert await out.partition_count(topic) == 3
            with pytest.raises(BrokerError):
                await admin.add_partitions(topic, 2)

    run(main())


def test_offsets_are_found_by_time(world: World, topic_name: TopicName, run: Run) -> None:
    async def main() -> None:
        topic = await make(world, topic_name(), 2)
        zero, one = TopicPartition(topic, 0), TopicPartition(topic, 1)
        await write(world, topic, 0, [b"x"])
        async with world.admin() as admin:
            found = await admin.offsets_for_times({zero: 1_000, one: 1_000})
            assert found == {zero: 0, one: None}
            assert await admin.offsets_for_times({zero: int(time.time() * 1000) + 3_600_000}) == {zero: None}

    run(main())


def test_a_reader_reads_from_where_it_is_told_until_it_is_told_otherwise(
    world: World, topic_name: TopicName, run: Run
) -> None:
    async def read(reader: Reader, count: int) -> list[bytes | None]:
        found: list[TopicRecord] = []
        deadline = time.monotonic() + DEADLINE_S
        while len(found) < count:
            assert time.monotonic() < deadline, f"only {len(found)} of {count} records came"
            for records in (await reader.getmany(timeout_ms=200, max_records=2)).values():
                assert len(records) <= 2
                found.extend(records)
        return sorted(values_of(found), key=lambda value: value or b"")

    async def main() -> None:
        topic = await make(world, topic_name(), 2)
        zero, one = TopicPartition(topic, 0), TopicPartition(topic, 1)
        await write(world, topic, 0, [b"a", b"b", b"c", b"d"])
        await write(world, topic, 1, [b"v", b"w"])
        async with world.reader() as reader:
            reader.assign({zero: 1, one: 1})
            assert await reader.position(one) == 1
            assert await read(reader, 4) == [b"b", b"c", b"d", b"w"]
            assert (await reader.position(zero), await reader.position(one)) == (4, 2)
            assert await reader.getmany(timeout_ms=50) == {}
            reader.assign({zero: 0, one: 0})
            reader.drop(one)
            assert await read(reader, 4) == [b"a", b"b", b"c", b"d"]
            await write(world, topic, 1, [b"x"])
            await write(world, topic, 0, [b"e"])
            assert await read(reader, 1) == [b"e"]

    run(main())


def test_offsets_are_committed_from_outside_only_where_nobody_is_a_member(
    world: World, topic_name: TopicName, run: Run
) -> None:
    async def main() -> None:
        topic = await make(world, topic_name(), 2)
        zero, one = TopicPartition(topic, 0), TopicPartition(topic, 1)
        await write(world, topic, 0, [b"a", b"b", b"c"])
        async with world.admin() as admin:
            await admin.commit(topic, {zero: 2})
            assert await admin.committed(topic, [zero, one]) == {zero: 2}
            await admin.commit(topic, {zero: 1, one: 0})
            assert await admin.committed(topic, [zero, one], stable=True) == {zero: 1, one: 0}
            async with member(world, topic, group=topic) as a:
                assert values_of(await a.read(2)) == [b"b", b"c"]
                with pytest.raises(CommitRejectedError):
                    await admin.commit(topic, {zero: 0})
            assert await admin.committed(topic, [zero]) == {zero: 1}

    run(main(), timeout_s=60)


def test_who_is_no_member_commits_offsets_in_a_transaction_unless_it_is_fenced(
    transactional_world: World, topic_name: TopicName, run: Run
) -> None:
    world = transactional_world

    async def main() -> None:
        source, results = await make(world, topic_name()), await make(world, topic_name())
        zero, nobody = TopicPartition(source, 0), Membership.none(source)
        async with world.admin() as admin:
            async with transactions(world, source) as earlier:
                await add(earlier, results, b"kept")
                await earlier.commit_transaction({zero: 5}, nobody)
                assert await admin.committed(source, [zero], stable=True) == {zero: 5}
                await add(earlier, results, b"lost")
                async with transactions(world, source) as later:
                    # What the earlier one left open is ended, and nothing will change the offsets any more.
                    assert await admin.committed(source, [zero], stable=True) == {zero: 5}
                    with pytest.raises(TransactionAbortedError):
                        await earlier.commit_transaction({zero: 6}, nobody)
                    await later.commit_transaction({zero: 7}, nobody)
            assert await admin.committed(source, [zero], stable=True) == {zero: 7}
        async with member(world, results, group=results) as reader:
            assert values_of(await reader.read(1)) == [b"kept"]

    run(main(), timeout_s=60)


def test_a_key_has_the_partition_that_kafka_gives_it(world: World) -> None:
    # As computed by Kafka's DefaultPartitioner (Utils.toPositive(Utils.murmur2(key)) % n).
    assert [
        world.connections.partition_of_key(key, 1_000_003) for key in (b"21", b"foobar", b"a-little-bit-long-string")
    ]
    assert world.connections.partition_of_key(b"21", 1_000) == (-973932308 & 0x7FFFFFFF) % 1_000
    assert world.connections.partition_of_key(b"foobar", 1_000) == (-790332482 & 0x7FFFFFFF) % 1_000


def test_the_cluster_can_be_probed(world: World, run: Run) -> None:
    run(world.connections.probe())


def test_a_transaction_is_visible_with_its_commit_and_its_offsets_too(
    transactional_world: World, topic_name: TopicName, run: Run
) -> None:
    world = transactional_world

    async def main() -> None:
        source, results = await make(world, topic_name(), 2), await make(world, topic_name(), 2)
        zero, one = TopicPartition(source, 0), TopicPartition(source, 1)
        await write(world, source, 0, [b"a", b"b"])
        async with (
            member(world, source, group=source) as a,
            member(world, results, group=results) as reader,
            transactions(world, source) as it,
        ):
            await a.read(2)
            assert not it.in_transaction
            for turn in (1, 2, 3):
                await add(it, results, b"r%d" % turn)
                await add(it, results, b"s%d" % turn, partition=1)
                assert it.in_transaction
                assert await reader.consumer.getmany(timeout_ms=100, max_records=10) == {}
                assert await a.consumer.committed(zero) == (None if turn == 1 else turn - 1)
                await it.commit_transaction({zero: turn, one: 0}, a.consumer.membership())
                assert not it.in_transaction
                assert sorted(values_of(await reader.read(2))) == [b"r%d" % turn, b"s%d" % turn]
            async with world.admin() as admin:
                assert await admin.committed(source, [zero, one]) == {zero: 3, one: 0}

    run(main(), timeout_s=60)


def test_an_aborted_transaction_is_never_read_and_the_next_one_is(
    transactional_world: World, topic_name: TopicName, run: Run
) -> None:
    world = transactional_world

    async def main() -> None:
        source, results = await make(world, topic_name()), await make(world, topic_name())
        await write(world, source, 0, [b"a"])
        async with (
            member(world, source, group=source) as a,
            member(world, results, group=results) as reader,
            transactions(world, source) as it,
        ):
            await a.read(1)
            await add(it, results, b"lost")
            aborting = it.abort()
            assert not it.in_transaction
            with pytest.raises(TransactionAbortedError):
                await it.send_batch(fill(it.create_batch(), [b"late"]), results, 0)
            await aborting
            await add(it, results, b"kept")
            await it.commit_transaction({TopicPartition(source, 0): 1}, a.consumer.membership())
            assert values_of(await reader.read(1)) == [b"kept"]
            await write(world, results, 0, [b"end"])
            assert values_of(await reader.read(1)) == [b"end"]

    run(main(), timeout_s=60)


def test_a_member_of_an_old_generation_commits_no_transaction(
    transactional_world: World, topic_name: TopicName, run: Run, eventually: Eventually
) -> None:
    world = transactional_world

    async def main() -> None:
        source, results = await make(world, topic_name(), 2), await make(world, topic_name())
        async with (
            member(world, source, group=source, name="a") as a,
            member(world, results, group=results) as reader,
            transactions(world, source) as it,
        ):
            before = a.consumer.membership()
            polling = asyncio.create_task(poll(a))
            async with member(world, source, group=source, name="b") as b:
                await eventually(lambda: len(a.owned) == 1 and len(b.owned) == 1, DEADLINE_S, "an even share")
                await add(it, results, b"zombie's")
                with pytest.raises(CommitRejectedError):
                    await it.commit_transaction({TopicPartition(source, 0): 1}, before)
                assert not it.in_transaction
                await it.abort()
                await add(it, results, b"member's")
                await it.commit_transaction({TopicPartition(source, 0): 1}, a.consumer.membership())
                assert values_of(await reader.read(1)) == [b"member's"]
            polling.cancel()
            await asyncio.wait({polling})

    run(main(), timeout_s=90)


def test_of_two_producers_with_one_id_the_later_one_fences_the_earlier(
    transactional_world: World, topic_name: TopicName, run: Run
) -> None:
    world = transactional_world

    async def main() -> None:
        source, results = await make(world, topic_name()), await make(world, topic_name())
        async with (
            member(world, source, group=source) as a,
            member(world, results, group=results) as reader,
            transactions(world, source) as earlier,
        ):
            await add(earlier, results, b"earlier")
            async with transactions(world, source) as later:
                with pytest.raises(TransactionAbortedError):
                    await earlier.commit_transaction({TopicPartition(source, 0): 5}, a.consumer.membership())
                await add(later, results, b"later")
                await later.commit_transaction({}, a.consumer.membership())
            assert values_of(await reader.read(1)) == [b"later"]
            assert await a.consumer.committed(TopicPartition(source, 0)) is None

    run(main(), timeout_s=60)


def test_a_batch_that_is_refused_for_itself_leaves_the_transaction_as_it_is(
    transactional_world: World, topic_name: TopicName, run: Run
) -> None:
    world = transactional_world

    async def main() -> None:
        source = await make(world, topic_name())
        results = await make(world, topic_name(), max_message_bytes="2000")
        async with (
            member(world, source, group=source) as a,
            member(world, results, group=results) as reader,
            transactions(world, source) as it,
        ):
            await add(it, results, b"first")
            with pytest.raises(RecordTooLargeError):
                await add(it, results, b"x" * 5_000)
            await add(it, results, b"second")
            await it.commit_transaction({TopicPartition(source, 0): 1}, a.consumer.membership())
            assert values_of(await reader.read(2)) == [b"first", b"second"]

    run(main(), timeout_s=60)


def test_rewinding_goes_to_the_committed_offset_or_to_where_it_is_told(
    transactional_world: World, topic_name: TopicName, run: Run
) -> None:
    world = transactional_world

    async def main() -> None:
        topic = await make(world, topic_name(), 2)
        zero, one, other = TopicPartition(topic, 0), TopicPartition(topic, 1), TopicPartition(topic, 7)
        for partition in (0, 1):
            await write(world, topic, partition, [b"%d.%d" % (partition, i) for i in range(4)])
        async with member(world, topic, group=topic) as it:
            assert len(await it.read(8)) == 8
            await it.consumer.commit({zero: 3})
            await it.consumer.rewind({zero: 0, one: 2, other: 0})
            assert sorted(values_of(await it.read(3))) == [b"0.3", b"1.2", b"1.3"]  # type: ignore[type-var]

    run(main(), timeout_s=60)
