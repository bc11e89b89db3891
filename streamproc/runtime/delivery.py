"""How settled offsets reach Kafka: by commits of their own, or with the results in one transaction.

    at_least_once   offsets are committed after the results were acknowledged; what is redone after a fault comes twice
    exactly_once    results, dead letters, metrics records and offsets become visible together, or not at all

Neither decides an offset: the ledger does. ``commit`` is called by one caller at a time; it waits for the broker, and
does not retry. A transaction that cannot be committed is given up, and its records are read again from the committed
offsets, which Kafka tells once the transaction has ended: they say what was done, also where an answer was lost.

Invariants of exactly_once:

- All rows of a span are in one transaction, and it is the one that commits their offset. So the sink holds back new
  outcomes while a transaction is committed, and outcomes come in reading order.
- A transaction is never committed without the offsets of the rows in it: when leases end, what is open is given up.
- Offsets are committed for a member in its generation of the group; one that has lost its partitions commits nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from typing import Any, Protocol

from streamproc.broker.interface import Consumer, TransactionalProducer
from streamproc.errors import BrokerAuthorizationError, BrokerError, CommitRejectedError
from streamproc.records import TopicPartition

FIRST_PAUSE_S = 0.1
MAX_DOUBLINGS = 6

Offsets = Mapping[TopicPartition, int]

log = logging.getLogger(__name__)


class Gate(Protocol):
    """What a transaction needs of the sink."""

    async def hold(self) -> None:
        """Keep back what is written from now on, and wait until everything before is acknowledged.

        Raises TransactionAbortedError where that cannot be.
        """

    def release(self) -> None:
        """Let it go on."""

    def reset(self) -> None:
        """Forget everything."""


class Assignment(Protocol):
    """What a transaction that was given up needs of the task: its leases."""

    def abandon(self) -> dict[TopicPartition, int]:
        """End the leases of the partitions that were read from; the offset at which each was begun."""

    def resume(self, partitions: Iterable[TopicPartition]) -> None:
        """Begin new leases of these."""


class Delivery(Protocol):
    """What the two have in common."""

    async def commit(self, committable: Callable[[], Offsets]) -> Offsets:
        """Commit, and say which offsets; none if there was nothing to. Raises BrokerError."""

    def aborted(self, error: BaseException) -> None:
        """The sink was told that the transaction is given up."""

    def reassigned(self) -> None:
        """The partitions are given up, or new ones assigned; the last ``commit`` before that was tried."""

    async def close(self) -> None:
        """End what is under way."""

    @property
    def recovering(self) -> bool:
        """Whether nothing can be written, since a transaction was given up and Kafka has not let go of it yet."""


class AtLeastOnce:
    """Commits offsets through the consumer."""

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer

    async def commit(self, committable: Callable[[], Offsets]) -> Offsets:
        """Commit what is settled."""
        offsets = committable()
        if offsets:
            await self._consumer.commit(offsets)
        return offsets

    def aborted(self, error: BaseException) -> None:
        """There are no transactions."""
        raise AssertionError("a transaction was given up where there is none") from error

    def reassigned(self) -> None:
        """Nothing is open."""

    async def close(self) -> None:
        """Nothing is under way."""

    @property
    def recovering(self) -> bool:
        """There are no transactions."""
        return False


class ExactlyOnce:
    """Commits the transaction that the sink's batches are part of, and the offsets with it.

    Args:
        consumer: Reads the records.
        producer: Writes the results.
        gate: The sink.
        assignment: The task's leases.
        guard: Runs a coroutine and reports what it raises to whoever can stop the task.
        session_timeout_s: By then a member that was taken out of its group knows of it.
        on_aborted: Told of every transaction that was given up.
    """

    def __init__(
        self,
        consumer: Consumer,
        producer: TransactionalProducer,
        gate: Gate,
        assignment: Assignment,
        *,
        guard: Callable[[Coroutine[Any, Any, None]], Coroutine[Any, Any, None]],
        session_timeout_s: float,
        on_aborted: Callable[[str], None],
    ) -> None:
        self._consumer = consumer
        self._producer = producer
        self._gate = gate
        self._assignment = assignment
        self._guard = guard
        self._session_timeout_s = session_timeout_s
        self._on_aborted = on_aborted
        self._rewinding: dict[TopicPartition, int] = {}
        """Partitions to be read again from their committed offsets, or from these where they have none."""
        self._reassigned = asyncio.Event()
        self._recovery: asyncio.Task[None] | None = None
        self._given_up = False
        """Whether the transaction that ``commit`` is about was given up meanwhile."""
        self._in_a_row = 0
        """How many transactions were given up since the last one that was committed."""
        self._closed = False

    async def commit(self, committable: Callable[[], Offsets]) -> Offsets:
        """End the transaction with what is settled by now."""
        if not self._producer.in_transaction and not committable():
            return {}
        self._given_up = False
        try:
            await self._gate.hold()
            offsets = committable()
            if offsets or self._producer.in_transaction:
                await self._producer.commit_transaction(offsets, self._consumer.membership())
                self._in_a_row = 0
        except BaseException as error:
            if not self._given_up:
                self.aborted(error)
            raise
        finally:
            self._gate.release()
        return offsets

    def aborted(self, error: BaseException) -> None:
        """Nothing of the transaction counts: its records are read again, once the broker has ended it."""
        self._on_aborted(str(error) if isinstance(error, BrokerError) else "a transaction was not committed in time")
        self._given_up = True
        self._in_a_row += 1
        ended = self._producer.abort()
        self._gate.reset()
        self._rewinding |= self._assignment.abandon()
        if self._recovery is not None:
            self._recovery.cancel()
        if self._closed:
            return
        self._reassigned.clear()
        self._recovery = asyncio.get_running_loop().create_task(self._guard(self._recover(ended, error)))

    def reassigned(self) -> None:
        """What is open now would be committed by one who has no say any more."""
        if self._producer.in_transaction:
            self.aborted(TimeoutError())
        self._rewinding.clear()
        self._reassigned.set()

    async def close(self) -> None:
        """Read nothing again any more; a transaction that is being given up is the producer's to end."""
        self._closed = True
        if self._recovery is not None:
            self._recovery.cancel()
            await asyncio.gather(self._recovery, return_exceptions=True)

    @property
    def recovering(self) -> bool:
        """Whether a transaction was given up, and no other one can be begun yet."""
        return self._recovery is not None and not self._recovery.done()

    async def _recover(self, ended: Awaitable[None], error: BaseException) -> None:
        if isinstance(error, BrokerAuthorizationError):
            raise error
        await ended
        if isinstance(error, CommitRejectedError):
            # The partitions are another's, or are about to be handed out anew, which the group will tell.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._session_timeout_s):
                    await self._reassigned.wait()
        if self._rewinding and self._in_a_row > 1:
            # Whatever it is (a second process with our transactional id?), it is not to go on as fast as it can.
            await asyncio.sleep(FIRST_PAUSE_S * 2 ** min(self._in_a_row - 2, MAX_DOUBLINGS))
        if self._rewinding:
            await self._consumer.rewind(dict(self._rewinding))
        partitions, self._rewinding = sorted(self._rewinding), {}
        if partitions:
            self._assignment.resume(partitions)
