"""The epochs of a transactional producer: what ends with one, and what nothing of it may do to the next.

aiokafka's producer and the coordinators are stand-ins; those of Kafka are in tests/contract and tests/integration.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import errors as kafka
from aiokafka.structs import TopicPartition as KafkaTopicPartition

from streamproc.broker.interface import Membership
from streamproc.broker.transactional_producer import KafkaTransactionalProducer
from streamproc.errors import BrokerAuthorizationError, BrokerUnreachableError, TransactionAbortedError
from streamproc.records import TopicPartition
from streamproc.settings import KafkaSettings
from tests.support.asyncs import until

MEMBER = Membership("group", 5, "member", None)
PARTITIONS = {0, 1, 2}
NOT_ALLOWED = BrokerAuthorizationError("not allowed")


class Protocol:
    """The coordinators, as one epoch sees them; they answer once they are let."""

    def __init__(self) -> None:
        self.announced: list[set[TopicPartition]] = []
        self.committed: list[Mapping[TopicPartition, int]] = []
        self.ready = asyncio.Event()
        self.ready.set()
        self.forbidden: set[str] = set()
        self.error: BaseException | None = None

    async def add_partitions(self, partitions: Iterable[TopicPartition]) -> None:
        asked = set(partitions)
        self.announced.append(asked)
        await self._answer()
        if any(it.topic in self.forbidden for it in asked):
            raise NOT_ALLOWED

    async def commit(self, offsets: Mapping[TopicPartition, int], _: Membership) -> None:
        self.committed.append(offsets)
        await self._answer()

    async def _answer(self) -> None:
        await self.ready.wait()
        if self.error is not None:
            raise self.error


class Inner:
    """aiokafka's producer: an accumulator whose batches nobody sends, and a client without connections."""

    def __init__(self) -> None:
        self.closed = False
        self.client = SimpleNamespace(
            cluster=self, _conns={}, close=self._close, get_random_node=lambda: 0, send=self._nobody
        )
        self.topics = {"out", "dead", "metrics"}
        self._message_accumulator = self
        self._batches: dict[Any, deque[Any]] = {KafkaTopicPartition("out", it): deque() for it in PARTITIONS}
        self._batch_ttl = 0.0
        self._compression_type = 0
        self._exception: BaseException | None = None
        self._waiter = asyncio.get_running_loop().create_future()

    def partitions_for_topic(self, topic: str) -> set[int] | None:
        return PARTITIONS if topic in self.topics else None

    def brokers(self) -> list[Any]:
        return []

    async def _nobody(self, _node: int, _request: Any) -> Any:
        raise kafka.NodeNotReadyError

    def waiter(self) -> asyncio.Future[None]:
        return self._waiter

    def fail_all(self, error: BaseException) -> None:
        self._exception = error
        for batches in self._batches.values():
            for batch in batches:
                batch.failure(error)

    def queued(self) -> list[Any]:
        return [batch for batches in self._batches.values() for batch in batches]

    async def _close(self) -> None:
        self.closed = True


class World:
    """A producer whose epochs are opened without a broker."""

    def __init__(self) -> None:
        self.producer = KafkaTransactionalProducer(KafkaSettings(), client_id="c", transactional_id="id")
        self.protocols: list[Protocol] = []
        self.inners: list[Inner] = []
        self.opening_fails: list[BaseException] = []
        self.acknowledgements: list[asyncio.Future[object]] = []
        self.producer._open = self._open  # type: ignore[method-assign]

    async def _open(self) -> None:
        await asyncio.sleep(0)
        if self.opening_fails:
            raise self.opening_fails.pop(0)
        producer, protocol, inner = self.producer, Protocol(), Inner()
        self.protocols.append(protocol)
        self.inners.append(inner)
        producer._protocol, producer._inner = protocol, inner  # type: ignore[assignment]
        producer._working, producer._lost, producer._uncommitted = set(), None, False
        producer._announced, producer._to_announce, producer._announcing = set(), set(), None

    def sending(self, topic: str = "out", partition: int = 0) -> asyncio.Task[Any]:
        return asyncio.get_running_loop().create_task(self._send(topic, partition))

    async def _send(self, topic: str, partition: int) -> asyncio.Future[object]:
        batch = self.producer.create_batch()
        assert batch.append(timestamp=None, key=None, value=b"x", headers=()) is not None
        self.acknowledgements.append(await self.producer.send_batch(batch, topic, partition))
        return self.acknowledgements[-1]

    def committing(self, offsets: Mapping[TopicPartition, int] | None = None) -> asyncio.Task[None]:
        return asyncio.get_running_loop().create_task(self.producer.commit_transaction(offsets or {}, MEMBER))


def story(test: Callable[[World], Coroutine[Any, Any, None]]) -> None:
    """Run a test with a producer that has begun; nothing of it may be left over, nor have gone unnoticed."""

    async def whole() -> None:
        loop = asyncio.get_running_loop()
        complaints: list[Any] = []
        loop.set_exception_handler(lambda _, context: complaints.append(context))
        world = World()
        await world._open()
        await test(world)
        await world.producer.stop()
        assert all(it.closed for it in world.inners)
        assert all(it.done() for it in world.acknowledgements)
        await asyncio.gather(*world.acknowledgements, return_exceptions=True)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        del world
        assert complaints == []

    asyncio.run(whole())


def test_partitions_that_are_wanted_at_once_are_announced_at_once_and_once_a_transaction() -> None:
    async def test(world: World) -> None:
        protocol = world.protocols[0]
        await asyncio.gather(*[world.sending(partition=it) for it in (0, 1, 0)])
        await world.sending(partition=1)
        assert protocol.announced == [{TopicPartition("out", 0), TopicPartition("out", 1)}]
        await world.committing()
        await world.sending(partition=1)
        assert protocol.announced[1:] == [{TopicPartition("out", 1)}]
        assert len(world.inners[0].queued()) == 5

    story(test)


def test_a_partition_that_is_wanted_while_others_are_announced_waits_for_its_own_turn() -> None:
    async def test(world: World) -> None:
        protocol = world.protocols[0]
        protocol.ready.clear()
        first = world.sending(partition=0)
        await until(lambda: protocol.announced, "the first is announced")
        second = world.sending(partition=1)
        for _ in range(5):
            await asyncio.sleep(0)
        assert world.inners[0].queued() == []
        protocol.ready.set()
        await asyncio.gather(first, second)
        assert protocol.announced == [{TopicPartition("out", 0)}, {TopicPartition("out", 1)}]

    story(test)


def test_what_is_on_its_way_is_in_the_transaction_before_its_partition_is_announced() -> None:
    async def test(world: World) -> None:
        world.protocols[0].ready.clear()
        sending = world.sending()
        assert not world.producer.in_transaction
        await asyncio.sleep(0)
        assert world.producer.in_transaction
        world.protocols[0].ready.set()
        await sending
        assert world.producer.in_transaction
        await world.committing()
        assert not world.producer.in_transaction

    story(test)


def test_offsets_alone_are_a_transaction_while_they_are_committed() -> None:
    async def test(world: World) -> None:
        world.protocols[0].ready.clear()
        committing = world.committing({TopicPartition("in", 0): 1})
        await until(lambda: world.protocols[0].committed, "the coordinators are asked")
        assert world.producer.in_transaction
        world.protocols[0].ready.set()
        await committing
        assert not world.producer.in_transaction

    story(test)


def test_senders_that_are_cancelled_while_they_wait_leave_the_announcement_to_the_others() -> None:
    async def test(world: World) -> None:
        protocol = world.protocols[0]
        protocol.ready.clear()
        gone, there = world.sending(partition=0), world.sending(partition=0)
        await until(lambda: protocol.announced, "it is announced")
        gone.cancel()
        await asyncio.wait({gone})
        protocol.ready.set()
        await there
        assert len(protocol.announced) == len(world.inners[0].queued()) == 1

    story(test)


def test_an_announcement_that_fails_with_nobody_waiting_still_ends_the_transaction() -> None:
    async def test(world: World) -> None:
        protocol = world.protocols[0]
        protocol.ready.clear()
        protocol.error = TransactionAbortedError("fenced")
        gone = world.sending()
        await until(lambda: protocol.announced, "it is announced")
        gone.cancel()
        await asyncio.wait({gone})
        protocol.ready.set()
        await until(lambda: not world.producer.in_transaction, "the transaction is lost")
        with pytest.raises(TransactionAbortedError):
            await world.sending()
        with pytest.raises(TransactionAbortedError):
            await world.committing()

    story(test)


def test_a_topic_that_may_not_be_written_to_is_no_reason_for_the_others() -> None:
    async def test(world: World) -> None:
        protocol = world.protocols[0]
        protocol.forbidden = {"metrics", "dead"}
        told = await asyncio.gather(
            *[world.sending(topic) for topic in ("metrics", "out", "dead")], return_exceptions=True
        )
        assert [it is NOT_ALLOWED for it in told] == [True, False, True]
        assert world.producer.in_transaction
        await world.committing()

    story(test)


def test_a_transaction_into_which_nothing_was_admitted_needs_no_coordinator_to_end() -> None:
    async def test(world: World) -> None:
        world.protocols[0].forbidden = {"metrics"}
        with pytest.raises(BrokerAuthorizationError):
            await world.sending("metrics")
        await world.committing()
        assert world.protocols[0].committed == []

    story(test)


def test_a_topic_that_nobody_can_be_asked_about_ends_the_transaction_and_no_more() -> None:
    async def test(world: World) -> None:
        world.inners[0].topics.clear()
        with pytest.raises(TransactionAbortedError):
            await world.sending()
        assert not world.producer.in_transaction
        await world.producer.abort()
        await world.sending()

    story(test)


def test_giving_up_tells_everybody_who_waits_and_a_new_epoch_begins_empty() -> None:
    async def test(world: World) -> None:
        protocol = world.protocols[0]
        acknowledgement = await world.sending(partition=0)
        protocol.ready.clear()
        announcing, committing = world.sending(partition=1), world.committing({TopicPartition("in", 0): 1})
        await until(lambda: protocol.committed and len(protocol.announced) == 2, "both are asked")
        ended = world.producer.abort()
        assert not world.producer.in_transaction
        for waiting in (acknowledgement, announcing, committing):
            with pytest.raises(TransactionAbortedError):
                await waiting
        await ended
        assert world.inners[0].closed
        assert not world.producer.in_transaction
        await world.sending(partition=1)
        assert world.protocols[1].announced == [{TopicPartition("out", 1)}]

    story(test)


def test_nothing_that_comes_late_of_an_epoch_ends_the_next_one() -> None:
    async def test(world: World) -> None:
        await world.sending()
        (late,) = world.inners[0].queued()
        lose, first = world.producer._lose, world.producer._protocol
        await world.producer.abort()
        await world.sending()
        lose(first, kafka.KafkaError("late"))
        late.failure(kafka.ProducerFenced())
        assert world.producer.in_transaction
        await world.committing()

    story(test)


def test_a_commit_that_is_cancelled_gives_the_transaction_up() -> None:
    async def test(world: World) -> None:
        world.protocols[0].ready.clear()
        committing = world.committing({TopicPartition("in", 0): 1})
        await until(lambda: world.protocols[0].committed, "the coordinators are asked")
        committing.cancel()
        await asyncio.wait({committing})
        assert committing.cancelled()
        assert not world.producer.in_transaction
        with pytest.raises(TransactionAbortedError):
            await world.sending()

    story(test)


def test_giving_up_twice_begins_one_epoch_and_a_broker_that_is_away_is_tried_again() -> None:
    async def test(world: World) -> None:
        world.opening_fails = [BrokerUnreachableError("nobody is there")]
        await asyncio.gather(world.producer.abort(), world.producer.abort())
        assert len(world.protocols) == 2

    story(test)


def test_a_refusal_to_begin_an_epoch_is_told_to_who_waits_and_is_no_complaint_where_nobody_does() -> None:
    async def test(world: World) -> None:
        world.opening_fails = [NOT_ALLOWED]
        world.producer.abort()
        with pytest.raises(BrokerAuthorizationError):
            await world.producer.abort()

    story(test)


def test_stopping_ends_what_is_open_and_does_not_wait_for_a_broker_that_is_away() -> None:
    async def test(world: World) -> None:
        acknowledgement = await world.sending()
        await world.producer.stop()
        assert len(world.protocols) == 2, "the new epoch has ended the transaction"
        with pytest.raises(TransactionAbortedError):
            await acknowledgement
        # A late rebalance may still want to give up what it thinks is open.
        await world.producer.abort()
        assert len(world.protocols) == 2

    async def away(world: World) -> None:
        await world.sending()
        world.opening_fails = [BrokerUnreachableError("nobody is there")] * 1_000
        await world.producer.stop()
        assert len(world.protocols) == 1

    story(test)
    story(away)
