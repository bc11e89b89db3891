"""How a transaction ends, whoever ends it: what is committed, given up and read again, over stand-ins of its parts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from typing import Any

import pytest

from streamproc.broker.interface import Membership
from streamproc.errors import BrokerAuthorizationError, CommitRejectedError, TransactionAbortedError
from streamproc.records import TopicPartition
from streamproc.runtime.delivery import ExactlyOnce
from tests.support.asyncs import until

ZERO = TopicPartition("in", 0)
GONE = TransactionAbortedError("gone")


class Parts:
    """The consumer, the producer, the sink and the task's leases, as far as a transaction is concerned."""

    def __init__(self) -> None:
        self.in_transaction = True
        self.begun = {ZERO: 3}
        """Where the leases that were read from were begun."""
        self.log: list[Any] = []
        self.told: list[str] = []
        self.fatal: list[BaseException] = []
        self.refusal: BaseException | None = None
        self.asked = asyncio.Event()
        self.answered = asyncio.Event()
        self.answered.set()
        self.written = asyncio.Event()
        self.written.set()
        self.opened = asyncio.Event()
        self.opened.set()
        self.lost = asyncio.Event()
        self.delivery = ExactlyOnce(
            self,  # type: ignore[arg-type] # both clients in one
            self,  # type: ignore[arg-type]
            self,
            self,
            guard=self._guard,
            session_timeout_s=60.0,
            on_aborted=self.told.append,
        )

    async def _guard(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except BrokerAuthorizationError as error:
            self.fatal.append(error)

    def committable(self) -> dict[TopicPartition, int]:
        return {it: offset + 7 for it, offset in self.begun.items()}

    # the consumer

    def membership(self) -> Membership:
        return Membership("group", 5, "member", None)

    async def rewind(self, starts: Mapping[TopicPartition, int]) -> None:
        await asyncio.sleep(0)
        self.log.append(("rewind", dict(starts)))

    # the producer

    async def commit_transaction(self, offsets: Mapping[TopicPartition, int], member: Membership) -> None:
        assert member == self.membership()
        self.asked.set()
        answered, lost = (asyncio.ensure_future(it.wait()) for it in (self.answered, self.lost))
        done, _pending = await asyncio.wait({answered, lost}, return_when=asyncio.FIRST_COMPLETED)
        answered.cancel()
        lost.cancel()
        if lost in done:
            raise GONE
        if self.refusal is not None:
            raise self.refusal
        self.in_transaction = False
        self.log.append(("commit", dict(offsets)))

    def abort(self) -> Awaitable[None]:
        self.in_transaction = False
        self.lost.set()
        return asyncio.ensure_future(self._open())

    async def _open(self) -> None:
        await self.opened.wait()
        self.lost.clear()

    # the gate

    async def hold(self) -> None:
        await self.written.wait()

    def release(self) -> None: ...

    def reset(self) -> None:
        self.written.set()

    # the assignment

    def abandon(self) -> dict[TopicPartition, int]:
        begun, self.begun = self.begun, {}
        return begun

    def resume(self, partitions: Iterable[TopicPartition]) -> None:
        self.log.append(("resume", list(partitions)))

    def committing(self) -> asyncio.Task[Any]:
        return asyncio.get_running_loop().create_task(self.delivery.commit(self.committable))


def story(test: Callable[[Parts], Coroutine[Any, Any, None]]) -> None:
    async def whole() -> None:
        parts = Parts()
        await test(parts)
        await parts.delivery.close()
        parts.opened.set()

    asyncio.run(whole())


def test_what_is_committed_is_said_and_nothing_is_read_again() -> None:
    async def test(parts: Parts) -> None:
        assert await parts.committing() == {ZERO: 10}
        parts.begun.clear()
        assert await parts.committing() == {}
        assert parts.log == [("commit", {ZERO: 10})]

    story(test)


def test_a_lost_transaction_is_read_again_once_the_broker_has_ended_it() -> None:
    async def test(parts: Parts) -> None:
        parts.opened.clear()
        parts.delivery.aborted(GONE)
        for _ in range(5):
            await asyncio.sleep(0)
        assert parts.log == []
        assert parts.delivery.recovering
        parts.opened.set()
        await until(lambda: not parts.delivery.recovering, "it goes on")
        assert parts.log == [("rewind", {ZERO: 3}), ("resume", [ZERO])]
        assert parts.told == ["gone"]

    story(test)


def test_a_rebalance_that_ends_a_commit_under_way_counts_as_one_transaction_given_up() -> None:
    async def test(parts: Parts) -> None:
        parts.answered.clear()
        committing = parts.committing()
        await parts.asked.wait()
        parts.delivery.reassigned()
        with pytest.raises(TransactionAbortedError):
            await committing
        assert len(parts.told) == 1
        await parts.delivery.close()
        assert parts.log == [], "the partitions are another's"

    story(test)


def test_a_lane_that_loses_the_transaction_while_a_commit_waits_for_it_leaves_nothing_to_commit() -> None:
    async def test(parts: Parts) -> None:
        parts.written.clear()
        committing = parts.committing()
        await asyncio.sleep(0)
        parts.delivery.aborted(GONE)
        assert await committing == {}
        await until(lambda: len(parts.log) == 2, "it goes on")
        assert not parts.asked.is_set()
        assert parts.told == ["gone"]

    story(test)


def test_a_second_abort_during_a_recovery_loses_none_of_the_partitions() -> None:
    async def test(parts: Parts) -> None:
        one = TopicPartition("in", 1)
        parts.opened.clear()
        parts.delivery.aborted(GONE)
        await asyncio.sleep(0)
        parts.begun = {one: 8}
        parts.delivery.aborted(GONE)
        parts.opened.set()
        await until(lambda: len(parts.log) == 2, "it goes on")
        assert parts.log == [("rewind", {ZERO: 3, one: 8}), ("resume", [ZERO, one])]

    story(test)


def test_after_a_rejected_commit_the_group_is_waited_for_and_takes_the_partitions_over() -> None:
    async def test(parts: Parts) -> None:
        parts.refusal = CommitRejectedError("moved on")
        with pytest.raises(CommitRejectedError):
            await parts.committing()
        for _ in range(10):
            await asyncio.sleep(0)
        assert parts.log == []
        parts.delivery.reassigned()
        for _ in range(10):
            await asyncio.sleep(0)
        assert parts.log == []

    story(test)


def test_transactions_that_are_given_up_one_after_the_other_are_given_up_ever_more_slowly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test(parts: Parts) -> None:
        pauses: list[float] = []

        async def pause(seconds: float) -> None:
            if seconds:
                pauses.append(seconds)
            await asyncio.wait({asyncio.get_running_loop().create_future()}, timeout=0.0)

        monkeypatch.setattr("streamproc.runtime.delivery.asyncio.sleep", pause)
        for turn in range(1, 2_000):
            parts.begun, parts.in_transaction = {ZERO: 3}, True
            parts.delivery.aborted(GONE)
            while len(parts.log) < 2 * turn:
                await asyncio.wait({asyncio.get_running_loop().create_future()}, timeout=0.0)
        assert pauses[:4] == [0.1, 0.2, 0.4, 0.8]
        assert max(pauses) == pauses[-1] < 10
        parts.begun, parts.in_transaction = {ZERO: 3}, True
        await parts.committing()
        pauses.clear()
        parts.begun = {ZERO: 3}
        parts.delivery.aborted(GONE)
        while len(parts.log) < 2 * 2_000 + 1:
            await asyncio.wait({asyncio.get_running_loop().create_future()}, timeout=0.0)
        assert pauses == []

    story(test)


def test_after_the_end_nothing_is_begun_any_more() -> None:
    async def test(parts: Parts) -> None:
        await parts.delivery.close()
        parts.delivery.aborted(GONE)
        for _ in range(10):
            await asyncio.sleep(0)
        assert parts.log == []
        assert asyncio.all_tasks() == {asyncio.current_task()}

    story(test)


def test_what_is_not_allowed_is_told_to_who_can_stop_the_task() -> None:
    async def test(parts: Parts) -> None:
        parts.refusal = BrokerAuthorizationError("not allowed")
        with pytest.raises(BrokerAuthorizationError):
            await parts.committing()
        await until(lambda: parts.fatal, "it is told")
        assert parts.log == []

    story(test)
