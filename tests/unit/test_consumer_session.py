"""What a consumer takes for a proof that it is still a member of its group.

The clock and the coordinator are stand-ins, put where the consumer keeps aiokafka's: a coordinator that is loading its
groups, as one is for a moment after its broker died, cannot be had on purpose.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import errors as kafka

from streamproc.broker import consumer as module
from streamproc.broker.consumer import KafkaConsumer
from streamproc.errors import BrokerUnreachableError
from streamproc.records import TopicPartition
from streamproc.settings import KafkaSettings

SESSION_S = 6.0


class Coordinator:
    """aiokafka's, as far as it is asked here."""

    member_id = "me"

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.answer_after_s = 0.0
        self.beats = 0

    async def _do_heartbeat(self) -> bool:
        self.beats += 1
        self._clock.now += self.answer_after_s
        return True


class Clock:
    now = 1_000.0

    def monotonic(self) -> float:
        return self.now


class Group:
    """A consumer that has just been given its partition."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = Clock()
        self.coordinator = Coordinator(self.clock)
        self.loading = False
        self.asked: list[Any] = []
        self.consumer = KafkaConsumer(KafkaSettings(), group_id="group", client_id="test")
        self.consumer._inner = SimpleNamespace(_coordinator=self.coordinator, _client=None)
        self.consumer._session_s = SESSION_S
        monkeypatch.setattr(module, "time", self.clock)
        monkeypatch.setattr(module, "committed_offsets", self._committed_offsets)

    async def _committed_offsets(self, client: Any, group_id: str, partitions: list[TopicPartition]) -> dict[Any, int]:
        self.asked.append((client, group_id, partitions))
        if self.loading:
            raise kafka.GroupLoadInProgressError
        return {}

    async def assigned(self) -> None:
        async def nothing(_: set[TopicPartition]) -> None:
            return None

        await self.consumer._assign({TopicPartition("in", 0)}, nothing)

    async def beat(self) -> bool:
        """What aiokafka's heartbeat task calls."""
        return await self.coordinator._do_heartbeat()

    def reads(self) -> bool:
        return self.consumer._in_session()


def test_it_reads_while_heartbeats_are_answered_and_for_a_session_after_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def story() -> None:
        group = Group(monkeypatch)
        await group.assigned()
        for _ in range(3):
            group.clock.now += SESSION_S
            assert group.reads()
            assert await group.beat()
        assert group.asked == []
        group.clock.now += SESSION_S + 0.1
        assert not group.reads()
        assert await group.beat()
        assert group.reads()

    asyncio.run(story())


def test_a_session_counts_from_when_the_heartbeat_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        group = Group(monkeypatch)
        await group.assigned()
        group.coordinator.answer_after_s = SESSION_S + 0.1
        assert await group.beat()
        assert not group.reads()

    asyncio.run(story())


def test_after_a_silent_session_a_coordinator_that_loads_its_groups_proves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def story() -> None:
        group = Group(monkeypatch)
        await group.assigned()
        group.clock.now += SESSION_S + 0.1
        group.loading = True
        assert not await group.beat()
        assert not group.reads()
        assert group.coordinator.beats == 0
        group.loading = False
        assert await group.beat()
        assert group.reads()
        assert group.asked == [(None, "group", [TopicPartition("in", 0)])] * 2

    asyncio.run(story())


def test_a_new_assignment_is_a_proof_and_no_member_id_the_opposite(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        group = Group(monkeypatch)
        await group.assigned()
        group.clock.now += 10 * SESSION_S
        assert not group.reads()
        await group.assigned()
        assert group.reads()
        group.coordinator.member_id = ""
        assert not group.reads()
        assert not group.consumer.is_member()

    asyncio.run(story())


@pytest.mark.parametrize("went", [1, 2])
def test_a_broker_that_goes_while_it_is_asked_leaves_the_question_to_another_one(
    monkeypatch: pytest.MonkeyPatch, went: int
) -> None:
    asked: list[int] = []

    @asynccontextmanager
    async def first_connection(*_: Any) -> AsyncIterator[int]:
        yield len(asked) + 1

    async def check_topics(connection: int, *_: Any) -> None:
        asked.append(connection)
        if connection <= went:
            raise BrokerUnreachableError("gone", bootstrap_servers="here")

    async def check_group(*_: Any) -> None:
        pass

    monkeypatch.setattr(module, "first_connection", first_connection)
    monkeypatch.setattr(module, "check_topics", check_topics)
    monkeypatch.setattr(module, "check_group", check_group)
    monkeypatch.setattr(module, "is_embedded", lambda _: True)
    consumer = KafkaConsumer(KafkaSettings(), group_id="group", client_id="test")
    if went == 1:
        assert asyncio.run(consumer._look(["in"])) is False
    else:
        with pytest.raises(BrokerUnreachableError):
            asyncio.run(consumer._look(["in"]))
    assert asked == [1, 2]
