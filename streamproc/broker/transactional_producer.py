"""A producer of transactions: batches that become visible together, with the offsets they were made from.

One transaction after the other, under one transactional id. Where one cannot go on (it took too long, its coordinator
went away, a batch was lost), everything of it is thrown away, connections and sequence numbers too, and a new epoch is
begun: by its InitProducerId the broker ends what was open, whatever state that was in. So there is one way out of every
trouble, and after it the committed offsets say what was done.

Invariants:

- A batch is sent after its partition was announced to the coordinator, and only within the epoch it was made for.
- A batch that was refused for itself (too large, not allowed) leaves the transaction as it is; after any other failure
  of a batch the transaction is given up.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from aiokafka import errors as kafka

from streamproc.broker.connection import can_be_idempotent, client_options, first_connection, is_embedded
from streamproc.broker.interface import BatchBuilder, Compression, Membership
from streamproc.broker.producer import KafkaProducer, Sequences
from streamproc.broker.transactions import TransactionProtocol, aborted
from streamproc.broker.translation import translate
from streamproc.errors import BrokerAuthorizationError, BrokerError, SettingsError
from streamproc.records import TopicPartition
from streamproc.settings import KafkaSettings

FIRST_PAUSE_S = 0.2
MAX_PAUSE_S = 5.0
SAY_EVERY_S = 10.0
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
        self._announced: set[TopicPartition] = set()
        self._to_announce: set[TopicPartition] = set()
        self._announcing: asyncio.Task[None] | None = None
        self._lost: BaseException | None = None
        """Why the transaction cannot go on, if it cannot."""
        self._uncommitted = False
        self._reopening: asyncio.Task[None] | None = None
        self._discarding: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Connect and begin an epoch. Raises SettingsError where the broker has no transactions, BrokerError."""
        settings = self._settings
        async with first_connection(settings, self._client_id) as connection:
            if is_embedded(connection) or not await can_be_idempotent(connection, settings):
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
        """Close the connections; a transaction that is not committed is left to its time-out."""
        if self._stopped:
            return
        if self._reopening is not None:
            self._reopening.cancel()
            await asyncio.gather(self._reopening, return_exceptions=True)
        if self._announcing is not None:
            self._announcing.cancel()
            await asyncio.gather(self._announcing, return_exceptions=True)
        if self._lost is None:
            await super().stop()
        self._stopped = True
        if self._discarding:
            await asyncio.wait(self._discarding, timeout=self._settings.connect_timeout_s)

    @property
    def in_transaction(self) -> bool:
        """Whether something was sent since the last commit that can still be committed."""
        return self._uncommitted and self._lost is None

    async def send_batch(
        self, batch: BatchBuilder, topic: str, partition: int, *, patient: bool = True
    ) -> asyncio.Future[object]:
        """Queue a batch, announcing its partition first; see ``interface.TransactionalProducer``."""
        self._check()
        await self._check_partition(topic, partition, patient=patient)
        to = TopicPartition(topic, partition)
        if to not in self._announced:
            await self._announce(to)
        self._check()
        self._uncommitted = True
        return await super().send_batch(batch, topic, partition, patient=patient)

    async def commit_transaction(self, offsets: Mapping[TopicPartition, int], member: Membership) -> None:
        """Commit what was sent, and these offsets; see ``interface.TransactionalProducer``."""
        self._check()
        if self._protocol is None:
            raise AssertionError("the producer has not been started")
        try:
            await self._protocol.commit(offsets, member)
        except BaseException as error:
            self._lose(error)
            raise
        self._announced.clear()
        self._uncommitted = False

    def abort(self) -> Awaitable[None]:
        """Begin a new epoch, which ends the transaction; see ``interface.TransactionalProducer``."""
        self._lose(kafka.KafkaError("given up"))
        if self._reopening is None or self._reopening.done():
            self._reopening = asyncio.get_running_loop().create_task(self._reopen())
        return asyncio.shield(self._reopening)

    # -- epochs

    def _check(self) -> None:
        if self._lost is not None:
            raise aborted("go on with a transaction", self._settings, self._lost) from self._lost

    def _lose(self, error: BaseException) -> None:
        """The transaction cannot go on: nothing more of it is sent."""
        if self._lost is not None or self._stopped:
            return
        self._lost = error
        discarding = asyncio.get_running_loop().create_task(self._discard(self._inner))
        self._discarding.add(discarding)
        discarding.add_done_callback(self._discarding.discard)

    async def _discard(self, inner: Any) -> None:
        inner._closed = True  # noqa: SLF001 - or its finalizer complains
        inner._message_accumulator.fail_all(kafka.KafkaError("the transaction is given up"))  # noqa: SLF001
        await inner.client.close()
        with contextlib.suppress(kafka.KafkaError, OSError):
            await inner._sender.close()  # noqa: SLF001

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
        manager = inner._txn_manager  # noqa: SLF001
        try:
            async with asyncio.timeout(settings.connect_timeout_s + settings.request_timeout_ms / 1_000):
                await inner.client.bootstrap()
                protocol = TransactionProtocol(inner.client, settings, self._transactional_id)
                # aiokafka's own transactions are never begun; of its manager only the sequence numbers are used.
                manager.set_pid_and_epoch(*await protocol.begin_epoch())
                await inner._sender.start()  # noqa: SLF001
        except BaseException as error:
            inner._closed = True  # noqa: SLF001
            await inner.client.close()
            if isinstance(error, kafka.KafkaError | OSError):
                raise translate(error, settings, doing="begin transactions") from error
            raise
        self._inner, self._protocol = inner, protocol
        self._sequences = _TransactionSequences(manager, self._lose)
        self._announced, self._to_announce, self._announcing = set(), set(), None
        self._uncommitted = False
        self._lost = None

    # -- partitions

    async def _announce(self, partition: TopicPartition) -> None:
        """Add a partition to the transaction; those that are asked for in the same turn go in one request."""
        while partition not in self._announced:
            self._to_announce.add(partition)
            if self._announcing is None:
                self._announcing = asyncio.get_running_loop().create_task(self._announce_all())
            await asyncio.shield(self._announcing)

    async def _announce_all(self) -> None:
        if self._protocol is None:
            raise AssertionError("the producer has not been started")
        wanted, self._to_announce = self._to_announce, set()
        try:
            await self._protocol.add_partitions(wanted)
        except BaseException as error:
            if not isinstance(error, BrokerAuthorizationError):
                self._lose(error)
            raise
        else:
            self._announced |= wanted
        finally:
            self._announcing = None

    def _translated(self, error: BaseException, topic: str) -> BrokerError:
        if self._lost is not None:
            return aborted(f"write to topic {topic} in a transaction", self._settings, self._lost)
        return super()._translated(error, topic)


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
