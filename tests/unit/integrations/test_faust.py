"""What stands between a Faust application and a processor: acknowledgements, assignments, and the settings."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import faust
import pytest
from faust.types import TP, Message
from faust.types.tuples import ConsumerMessage
from hypothesis import given
from hypothesis import strategies as st

from streamproc.broker.memory_clients import MemoryBatch
from streamproc.errors import BrokerError, SettingsError
from streamproc.integrations.faust import agent_settings, inference_agent
from streamproc.integrations.faust_clients import FaustConsumer, FaustProducer
from streamproc.records import TopicPartition
from tests.conftest import Run
from tests.support.asyncs import until

TOPIC = "texts"


@dataclass
class Acks:
    """Faust's consumer, as far as messages know it."""

    offsets: dict[int, list[int]] = field(default_factory=dict)

    def ack(self, message: Message) -> bool:
        self.offsets.setdefault(message.partition, []).append(message.offset)
        return True


@dataclass
class App:
    """An application, as far as the clients ask it."""

    consumer: Acks = field(default_factory=Acks)
    consumer_generation_id: int = 1


class Told:
    """A processor's side: which partitions it has."""

    def __init__(self) -> None:
        self.partitions: set[TopicPartition] = set()

    async def revoked(self, partitions: set[TopicPartition]) -> None:
        assert partitions == self.partitions
        self.partitions = set()

    async def assigned(self, partitions: set[TopicPartition]) -> None:
        self.partitions = partitions


def message(offset: int, *, partition: int = 0, generation: int = 1) -> Message:
    made = ConsumerMessage(
        TOPIC,
        partition,
        offset,
        timestamp=1_700_000_000.123,
        timestamp_type=0,
        headers=cast("Any", (("h", b"1"),)),
        key=b"k",
        value=b"v",
        checksum=None,
        tp=TP(TOPIC, partition),
        generation_id=generation,
    )
    made.refcount = 1
    return made


def consumer_of(app: App, max_buffered: int = 100) -> FaustConsumer:
    return FaustConsumer(cast("Any", app), [TOPIC], max_buffered)


async def started(app: App, partitions: set[int], max_buffered: int = 100) -> tuple[FaustConsumer, Told]:
    consumer, told = consumer_of(app, max_buffered), Told()
    await consumer.start([TOPIC], told.revoked, told.assigned)
    await consumer.assigned({TP(TOPIC, it) for it in partitions} | {TP("another", 0)})
    return consumer, told


async def read(consumer: FaustConsumer, most: int = 100) -> dict[int, list[int]]:
    found = await consumer.getmany(timeout_ms=1, max_records=most)
    return {partition.partition: [it.offset for it in records] for partition, records in found.items()}


def test_records_are_what_kafka_has_and_only_the_streams_partitions_are_told(run: Run) -> None:
    async def go() -> None:
        consumer, told = await started(App(), {0, 1})
        assert told.partitions == {TopicPartition(TOPIC, 0), TopicPartition(TOPIC, 1)}
        await consumer.feed(message(7))
        found = await consumer.getmany(timeout_ms=1_000, max_records=10)
        (record,) = found[TopicPartition(TOPIC, 0)]
        assert (record.offset, record.timestamp, record.key, record.value) == (7, 1_700_000_000_123, b"k", b"v")
        assert list(record.headers) == [("h", b"1")]

    run(go())


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("feed"), st.integers(0, 2)),
            st.tuples(st.just("read"), st.integers(1, 5)),
            st.tuples(st.just("commit"), st.integers(0, 4)),
            st.tuples(st.just("pause"), st.integers(0, 2)),
            st.tuples(st.just("rebalance"), st.just(0)),
        ),
        max_size=60,
    )
)
def test_events_are_acknowledged_in_order_once_committed_and_never_those_of_an_earlier_assignment(
    steps: list[tuple[str, int]],
) -> None:
    async def go() -> None:
        app = App()
        consumer, _ = await started(app, {0, 1, 2})
        fed, have, committed = dict.fromkeys(range(3), 0), dict.fromkeys(range(3), 0), dict.fromkeys(range(3), 0)
        acked: dict[int, list[int]] = {it: [] for it in range(3)}
        for step, number in steps:
            if step == "feed":
                await consumer.feed(message(fed[number], partition=number, generation=app.consumer_generation_id))
                fed[number] += 1
            elif step == "read":
                found = await consumer.getmany(timeout_ms=0, max_records=number)
                assert sum(map(len, found.values())) <= number
                for at, records in found.items():
                    assert [it.offset for it in records] == list(
                        range(have[at.partition], have[at.partition] + len(records))
                    )
                    have[at.partition] += len(records)
                    assert consumer.position(at) == have[at.partition]
            elif step == "commit":
                offsets = {it: min(committed[it] + number, have[it]) for it in range(3)}
                await consumer.commit({TopicPartition(TOPIC, it): offset for it, offset in offsets.items()})
                for it, offset in offsets.items():
                    acked[it] += range(committed[it], offset)
                    committed[it] = offset
            elif step == "pause":
                consumer.pause(TopicPartition(TOPIC, number))
                assert number not in await read_now(consumer, have)
                consumer.resume(TopicPartition(TOPIC, number))
            else:
                await consumer.revoked()
                app.consumer_generation_id += 1
                await consumer.assigned({TP(TOPIC, it) for it in range(3)})
                # Faust reads again from what is committed, which is at most what was acknowledged.
                fed, have = dict(committed), dict(committed)
            assert {it: app.consumer.offsets.get(it, []) for it in range(3)} == acked

    asyncio.run(go())


async def read_now(consumer: FaustConsumer, have: dict[int, int]) -> dict[int, list[int]]:
    found = await consumer.getmany(timeout_ms=0, max_records=1)
    for at, records in found.items():
        have[at.partition] += len(records)
    return {at.partition: [it.offset for it in records] for at, records in found.items()}


def test_a_message_waits_for_room_and_for_the_assignment_that_it_is_of(run: Run) -> None:
    async def go() -> None:
        app = App()
        consumer, _ = await started(app, set(), max_buffered=1)
        early = asyncio.ensure_future(consumer.feed(message(0)))
        await asyncio.sleep(0)
        assert await read(consumer) == {}
        await consumer.assigned({TP(TOPIC, 0)})
        await until(early.done, "it is taken once its partition is assigned")
        crowded = asyncio.ensure_future(consumer.feed(message(1)))
        await asyncio.sleep(0)
        assert not crowded.done()
        assert await read(consumer) == {0: [0]}
        await until(crowded.done, "it is taken once there is room")
        assert await read(consumer) == {0: [1]}

    run(go())


def test_a_message_that_waits_is_dropped_unacknowledged_when_the_group_shares_the_partitions_out_anew(run: Run) -> None:
    async def go() -> None:
        app = App()
        consumer, told = await started(app, {0}, max_buffered=1)
        await consumer.feed(message(0))
        waiting = asyncio.ensure_future(consumer.feed(message(1)))
        await asyncio.sleep(0)
        await consumer.revoked()
        assert told.partitions == set()
        app.consumer_generation_id = 2
        await consumer.assigned({TP(TOPIC, 0)})
        await until(waiting.done, "nobody waits with it")
        await consumer.feed(message(5, generation=1))
        assert await read(consumer) == {}
        assert app.consumer.offsets == {}

    run(go())


class Refusing:
    """Faust's producer where Kafka takes none of it, or not all."""

    def __init__(self, sent_well: int) -> None:
        self.sent = 0
        self._sent_well = sent_well

    async def send(self, *_: Any) -> asyncio.Future[None]:
        self.sent += 1
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self.sent > self._sent_well:
            future.set_exception(OSError("no"))
        else:
            future.set_result(None)
        return future


@pytest.mark.parametrize("sent_well", [0, 1])
def test_a_batch_is_acknowledged_only_if_all_of_its_records_are(sent_well: int, run: Run) -> None:
    async def go() -> None:
        app: Any = type("", (), {"producer": Refusing(sent_well)})()
        producer = FaustProducer(app, [TOPIC], {"out": cast("Any", object()), "metrics": None})
        batch = MemoryBatch(1_000, 0)
        for _ in range(2):
            assert batch.append(timestamp=None, key=None, value=b"v") is not None
        with pytest.raises(BrokerError, match="could not write to partition 3 of topic out"):
            await (await producer.send_batch(batch, "out", 3))
        assert app.producer.sent == 2
        await (await producer.send_batch(batch, "metrics", 0))
        assert app.producer.sent == 2, "nobody asked for metrics"
        with pytest.raises(BrokerError, match="given no such topic"):
            await producer.send_batch(batch, "dead", 0)

    run(go())


def settings(**changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "inputs": [TOPIC],
        "results": "out",
        "dead_letters": "dead",
        "metrics": None,
        "backend": {"path": "m:B"},
        "batch": {"max_size": 8, "max_wait_ms": 5},
        "task": {},
        "pool": {"workers": 2},
    }
    return agent_settings("inference", **{**arguments, **changes})


def test_the_arguments_go_before_what_the_task_says_and_nothing_is_kept_by_a_circuit() -> None:
    task: Mapping[str, Any] = {
        "input": {"topics": ["no"], "format": "msgpack"},
        "on_error": {"retries": 7, "then": "stop", "circuit": {"enabled": True}},
        "delivery": "exactly_once",
    }
    made = settings(task=task).tasks["inference"]
    assert (made.input.topics, made.input.format, made.output.topic) == ([TOPIC], "msgpack", "out")
    assert (made.on_error.retries, made.on_error.then, made.on_error.circuit.enabled) == (7, "stop", False)
    assert made.delivery == "at_least_once"
    assert settings(task=task, dead_letters=None).tasks["inference"].on_error.then == "drop"


def test_what_is_wrong_is_said_by_its_name() -> None:
    with pytest.raises(SettingsError, match=r"inference_agent: tasks\.inference\.batch\.max_size"):
        settings(batch={"max_size": 0, "max_wait_ms": 5})
    with pytest.raises(SettingsError, match="feed itself"):
        settings(results=TOPIC)


def test_a_topic_whose_values_faust_decodes_is_refused() -> None:
    app = faust.App("decoding", broker="kafka://nowhere")
    with pytest.raises(SettingsError, match="decoded by Faust"):
        inference_agent(app, "m:B", app.topic(TOPIC), app.topic("out"))
