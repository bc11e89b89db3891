"""A producer of transactions: batches that become visible together, with the offsets they were made from.

One transaction after the other, under one transactional id. Where one cannot go on (it took too long, its coordinator
went away, a batch was lost), everything of it is thrown away, connections and sequence numbers too, and a new epoch is
begun: by its InitProducerId the broker ends what was open, whatever state that was in. So there is one way out of every
trouble, and after it the committed offsets say what was done.

Invariants:

- A batch is sent after its partition was announced to the coordinator, and only within the epoch it was made for.
- A batch that was refused for itself (too large, not allowed) leaves the transaction as it is; after any other failure
  of a batch the transaction is given up.
- Once it is given up every batch of it has failed, nothing of it is sent or asked any more, and whoever waits for the
  coordinators is told; and nothing that comes late of an earlier epoch does anything to the current one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping
from functools import partial
from typing import Any

from aiokafka import errors as kafka

from streamproc.broker.connection import can_be_idempotent, client_options, first_connection, is_embedded
from streamproc.broker.interface import BatchBuilder, Compression, Membership
from streamproc.broker.producer import KafkaProducer, Sequences
from streamproc.broker.transaction_requests import are_known
from streamproc.broker.transactions import TransactionProtocol, aborted
from streamproc.broker.translation import translate
from streamproc.errors import BrokerAuthorizationError, BrokerError, BrokerUnreachableError, SettingsError
from streamproc.records import TopicPartition
from streamproc.settings import KafkaSettings

FIRST_PAUSE_S = 0.2
MAX_PAUSE_S = 5.0
SAY_EVERY_S = 10.0
LAST_ABORT_S = 1.0
_REFUSED = (
    kafka.MessageSizeTooLargeError,
    kafka.RecordListTooLargeError,
    kafka.TopicAuthorizationFailedError,
    kafka.InvalidTopicError,
)

log = logging.getLogger(__name__)


class KafkaTransactionalProducer(KafkaProducer):
    """Implements ``interface.TransactionalProducer``.

    Args:
        settings: How to reach Kafka.
        client_id: Shown in the brokers' logs.
        transactional_id: Of the producers with one id, the one that was started last fences the others.
        compression: Of every batch.
    """

    _transactional = 1

    def __init__(
        self, settings: KafkaSettings, *, client_id: str, transactional_id: str, compression: Compression = "none"
    ) -> None:
        super().__init__(settings, client_id=client_id, compression=compression)
        self._transactional_id = transactional_id
        self._protocol: TransactionProtocol | None = None
        """That of the current epoch, which it stands for: there is a new one with each."""
        self._announced: set[TopicPartition] = set()
        self._to_announce: set[TopicPartition] = set()
        self._announcing: asyncio.Task[None] | None = None
        self._lost: BaseException | None = kafka.ProducerClosed("not started")
        """Why the transaction cannot go on, if it cannot."""
        self._uncommitted = False
        self._working: set[asyncio.Task[Any]] = set()
        """What sends and asks for the current epoch."""
        self._reopening: asyncio.Task[None] | None = None
        self._discarding: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Connect and begin an epoch. Raises SettingsError where the broker has no transactions, BrokerError."""
        settings = self._settings
        async with first_connection(settings, self._client_id) as connection:
            if not await _allows_transactions(connection, settings):
                raise SettingsError(
                    f"exactly_once needs transactions, and the broker at {settings.bootstrap_servers} has none",
                    setting="delivery",
                    hint="use Apache Kafka 2.5 or newer, or at_least_once",
                )
        try:
            await self._open()
        except BaseException:
            await self.stop()
            raise
        self._watch()

    async def stop(self) -> None:
        """Close the connections; what is not committed is given up, and left to its time-out where nobody answers."""
        if self._stopped:
            return
        if self.in_transaction:
            self.abort()
        self._stopped = True
        await self._stop_watching()
        if self._reopening is not None:
            try:
                await asyncio.wait({self._reopening}, timeout=LAST_ABORT_S)
            finally:
                self._reopening.cancel()
            await asyncio.gather(self._reopening, return_exceptions=True)
        self._lose(self._protocol, kafka.ProducerClosed("the producer is stopped"))
        if self._discarding:
            await asyncio.wait(self._discarding, timeout=self._settings.connect_timeout_s)

    @property
    def in_transaction(self) -> bool:
        """Whether there is anything since the last commit, or on its way, that can still be committed."""
        return self._uncommitted and self._lost is None

    async def send_batch(
        self, batch: BatchBuilder, topic: str, partition: int, *, patient: bool = True
    ) -> asyncio.Future[object]:
        """Queue a batch, announcing its partition first; see ``interface.TransactionalProducer``."""
        epoch = self._check()
        # From here on, since whoever sends it may not be asked again whether it still wants to.
        self._uncommitted = True
        try:
            await self._check_partition(topic, partition, patient=patient)
        except BrokerUnreachableError as error:
            # A new epoch's client knows no topics yet, and that nobody answers is no reason to stop for good.
            self._lose(epoch, error)
            raise aborted(f"look at topic {topic}", self._settings, error) from error
        await self._announce(TopicPartition(topic, partition), epoch)
        return await super().send_batch(batch, topic, partition, patient=patient)

    async def commit_transaction(self, offsets: Mapping[TopicPartition, int], member: Membership) -> None:
        """Commit what was sent, and these offsets; see ``interface.TransactionalProducer``."""
        protocol = self._check()
        self._uncommitted = True
        try:
            if offsets or self._announced:
                await self._ask(protocol.commit(offsets, member))
        except BaseException as error:
            self._lose(protocol, error)
            raise
        self._announced.clear()
        self._uncommitted = False

    def abort(self) -> Awaitable[None]:
        """Begin a new epoch, which ends the transaction; see ``interface.TransactionalProducer``."""
        self._lose(self._protocol, kafka.KafkaError("given up"))
        loop = asyncio.get_running_loop()
        if not self._stopped and (self._reopening is None or self._reopening.done()):
            self._reopening = loop.create_task(self._reopen())
        if self._reopening is None:
            ended = loop.create_future()
            ended.set_result(None)
        else:
            ended = asyncio.shield(self._reopening)
            ended.add_done_callback(_seen)
        return ended

    # -- epochs

    def _check(self, epoch: TransactionProtocol | None = None) -> TransactionProtocol:
        """The current epoch's protocol, of this epoch if one is named. Raises TransactionAbortedError if it is over."""
        protocol = self._protocol
        if self._lost is not None or protocol is None or protocol is not (epoch or protocol):
            error = self._lost or kafka.KafkaError("given up")
            raise aborted("go on with a transaction", self._settings, error) from error
        return protocol

    def _lose(self, epoch: TransactionProtocol | None, error: BaseException) -> None:
        """The transaction of this epoch cannot go on: nothing more of it is sent or asked."""
        if epoch is not self._protocol or self._lost is not None:
            return
        self._lost = error
        for task in self._working:
            task.cancel()
        self._inner._message_accumulator.fail_all(kafka.KafkaError("the transaction is given up"))  # noqa: SLF001
        discarding = asyncio.get_running_loop().create_task(_discard(self._inner, self._working))
        self._discarding.add(discarding)
        discarding.add_done_callback(self._discarding.discard)

    async def _ask(self, question: Coroutine[Any, Any, None]) -> None:
        """Ask the coordinators something. Raises TransactionAbortedError as soon as the transaction is given up."""
        asking = asyncio.get_running_loop().create_task(question)
        self._work(asking)
        try:
            await asyncio.wait({asking})
        finally:
            asking.cancel()
        if asking.cancelled():
            raise aborted("commit a transaction", self._settings, self._lost or kafka.KafkaError("given up"))
        asking.result()

    def _work(self, task: asyncio.Task[Any]) -> None:
        """End this task with the epoch."""
        self._working.add(task)
        task.add_done_callback(self._working.discard)
        task.add_done_callback(_seen)  # whoever waits for it may be gone by then

    async def _reopen(self) -> None:
        loop = asyncio.get_running_loop()
        pause_s, say_at = FIRST_PAUSE_S, loop.time() + SAY_EVERY_S
        while True:
            try:
                await self._open()
            except (BrokerAuthorizationError, SettingsError):
                raise
            except BrokerError as error:
                if loop.time() >= say_at:
                    log.warning("transactions of %s cannot go on yet: %s", self._transactional_id, error)
                    say_at = loop.time() + SAY_EVERY_S
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, MAX_PAUSE_S)
            else:
                return

    async def _open(self) -> None:
        """Connect anew and begin an epoch. Raises BrokerError."""
        settings = self._settings
        inner = self._make(client_options(settings, self._client_id), transactional_id=self._transactional_id)
        manager, working = inner._txn_manager, _requests_of(inner._sender)  # noqa: SLF001
        try:
            async with asyncio.timeout(settings.connect_timeout_s + settings.request_timeout_ms / 1_000):
                await inner.client.bootstrap()
                protocol = TransactionProtocol(inner.client, settings, self._transactional_id)
                # aiokafka's own transactions are never begun; of its manager only the sequence numbers are used.
                manager.set_pid_and_epoch(*await protocol.begin_epoch())
                await inner._sender.start()  # noqa: SLF001
        except BaseException as error:
            await _discard(inner, working)
            if isinstance(error, kafka.KafkaError | OSError):
                raise translate(error, settings, doing="begin transactions") from error
            raise
        working.add(inner._sender.sender_task)  # noqa: SLF001
        self._inner, self._protocol, self._working = inner, protocol, working
        self._sequences = _TransactionSequences(manager, partial(self._lose, protocol))
        self._announced, self._to_announce, self._announcing = set(), set(), None
        self._uncommitted = False
        self._lost = None

    # -- partitions

    async def _announce(self, partition: TopicPartition, epoch: TransactionProtocol) -> None:
        """Add a partition to the transaction; those that are asked for in the same turn go in one request."""
        while self._check(epoch) and partition not in self._announced:
            self._to_announce.add(partition)
            if self._announcing is None or self._announcing.done():
                self._announcing = asyncio.get_running_loop().create_task(self._announce_all(epoch))
                self._work(self._announcing)
            announcing = self._announcing
            await asyncio.wait({announcing})
            if not announcing.cancelled():
                announcing.result()

    async def _announce_all(self, protocol: TransactionProtocol) -> None:
        wanted, self._to_announce = self._to_announce, set()
        try:
            await self._add(protocol, wanted)
        except BaseException as error:
            if not isinstance(error, BrokerAuthorizationError):
                self._lose(protocol, error)
            raise

    async def _add(self, protocol: TransactionProtocol, wanted: set[TopicPartition]) -> None:
        try:
            await protocol.add_partitions(wanted)
        except BrokerAuthorizationError:
            topics, before = {it.topic for it in wanted}, len(self._announced)
            if len(topics) > 1:
                # Kafka adds all or none. The refused one's batches are told when they ask again, without the others.
                for topic in topics:
                    with contextlib.suppress(BrokerAuthorizationError):
                        await self._add(protocol, {it for it in wanted if it.topic == topic})
            if len(self._announced) == before:
                raise
        else:
            self._announced |= wanted

    def _translated(self, error: BaseException, topic: str) -> BrokerError:
        if self._lost is not None:
            return aborted(f"write to topic {topic} in a transaction", self._settings, self._lost)
        return super()._translated(error, topic)


async def has_transactions(settings: KafkaSettings, client_id: str) -> bool:
    """Whether a transactional producer can be used there. Raises BrokerError."""
    async with first_connection(settings, client_id) as connection:
        return await _allows_transactions(connection, settings)


async def _allows_transactions(connection: Any, settings: KafkaSettings) -> bool:
    known = not is_embedded(connection) and are_known(connection)
    with contextlib.suppress(BrokerAuthorizationError):  # a transactional id is another matter
        return known and await can_be_idempotent(connection, settings)
    return known


def _requests_of(sender: Any) -> set[asyncio.Task[Any]]:
    """The tasks in which aiokafka's sender will send its batches; it keeps them to itself, and never ends one."""
    tasks: set[asyncio.Task[Any]] = set()
    send = sender._send_produce_req  # noqa: SLF001

    async def noted(node: int, batches: Any) -> None:
        task = asyncio.current_task()
        if task is None:
            raise AssertionError("aiokafka sends in tasks")
        tasks.add(task)
        try:
            await send(node, batches)
        finally:
            tasks.discard(task)

    sender._send_produce_req = noted  # noqa: SLF001
    return tasks


async def _discard(inner: Any, working: Collection[asyncio.Task[Any]]) -> None:
    """End what an epoch had of tasks and connections, whether or not the broker is there."""
    inner._closed = True  # noqa: SLF001 - or its finalizer complains
    # aiokafka's own way waits for requests, whose batches it would send again, for metadata that nobody fetches.
    ending = list(working)
    for task in ending:
        task.cancel()
    await asyncio.gather(*ending, return_exceptions=True)
    for connection in inner.client._conns.values():  # noqa: SLF001
        if connection._writer is not None:  # noqa: SLF001
            # A connection that is only closed flushes first, to a broker that may be gone.
            connection._writer.transport.abort()  # noqa: SLF001
    await inner.client.close()


def _seen(future: asyncio.Future[Any]) -> None:
    """Mark what came of it as noticed, also where nobody waited."""
    if not future.cancelled():
        future.exception()


class _TransactionSequences(Sequences):
    """The sequence numbers of one epoch."""

    def __init__(self, manager: Any, lose: Callable[[BaseException], None]) -> None:
        super().__init__(manager)
        self._lose = lose

    def after_failure(self, batch: Any, error: BaseException) -> None:
        """Go on where the broker has certainly not written the batch, else give the transaction up."""
        if batch.retry_count == 1 and isinstance(error, _REFUSED):
            self.give_back(batch)
        elif batch.retry_count:
            self._lose(error)
