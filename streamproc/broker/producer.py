"""A producer of whole batches, over aiokafka.

aiokafka's ``send_batch`` waits until the partition's previous batch was taken, which serializes batches that could be
queued, and lets callers overtake each other; its idempotent producer stops working for a partition after one batch
that the broker refuses. So batches are queued in aiokafka's accumulator directly, in the order of their submission,
and a refused batch gives its sequence numbers back.

Invariants:

- Batches for one partition arrive in the order of their submission: aiokafka has at most one request in flight for a
  partition, retries it in place, and nothing can be queued before what was submitted earlier.
- Sequence numbers are given back only where the broker has certainly not written the batch: it refused the first and
  only attempt. In every other case the producer takes a new identity, for which Kafka expects no sequence.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any, cast

from aiokafka import AIOKafkaProducer
from aiokafka import errors as kafka
from aiokafka.producer.message_accumulator import BatchBuilder as KafkaBatchBuilder
from aiokafka.producer.message_accumulator import MessageBatch
from aiokafka.producer.transaction_manager import NO_PRODUCER_EPOCH, NO_PRODUCER_ID, PidAndEpoch
from aiokafka.structs import TopicPartition as KafkaTopicPartition

from streamproc.broker.configs import describe_configs
from streamproc.broker.connection import (
    all_topics,
    ask_any_broker,
    can_be_idempotent,
    client_options,
    ended,
    first_connection,
    is_embedded,
    pace_metadata,
    read_topics,
    why_absent,
)
from streamproc.broker.interface import BatchBuilder, Compression, Headers, Row
from streamproc.broker.privileges import AclOperation, Privilege
from streamproc.broker.produce_requests import send_in_one_piece
from streamproc.broker.topic_watch import OutputTopics, watch_topics
from streamproc.broker.translation import not_allowed, translate
from streamproc.errors import BrokerAuthorizationError, BrokerError, SettingsError
from streamproc.settings import KafkaSettings

log = logging.getLogger(__name__)

DEFAULT_BATCH_BYTES = 1_048_576 - 1_024
"""Below Kafka's default ``max.message.bytes`` (1 MiB and 12 bytes), with room for the batch's header."""
_MAX_QUEUED_BATCHES = 128
_MAX_QUEUED_BYTES = 33_554_432
"""As in Kafka's own client. aiokafka puts one batch of every partition of a broker into one request, and a broker hangs
up on a request of more than 100 MiB (``socket.request.max.bytes``)."""
_SEQUENCE_RANGE = 2**31


class KafkaProducer:
    """Implements ``interface.Producer``; idempotent where the broker can, with ``acks=all`` always.

    Args:
        settings: How to reach Kafka.
        client_id: Shown in the brokers' logs.
        compression: Of every batch.
        max_batch_bytes: The size of a batch, before compression, at which it takes no further record.
        max_queued_batches: How many batches may wait for their acknowledgement before ``send_batch`` waits.
        max_queued_bytes: How many bytes of batches may do so; a larger batch waits until it is alone.
    """

    _transactional = 0
    """How aiokafka's batches say whether they belong to a transaction."""

    def __init__(
        self,
        settings: KafkaSettings,
        *,
        client_id: str,
        compression: Compression = "none",
        max_batch_bytes: int = DEFAULT_BATCH_BYTES,
        max_queued_batches: int = _MAX_QUEUED_BATCHES,
        max_queued_bytes: int = _MAX_QUEUED_BYTES,
    ) -> None:
        self._settings = settings
        self._client_id = client_id
        self._compression = compression
        self._max_batch_bytes = max_batch_bytes
        self._places = asyncio.Semaphore(max_queued_batches)
        self._max_queued_bytes = max_queued_bytes
        self._queued_bytes = 0
        self._fewer_bytes = asyncio.Event()
        self._order = asyncio.Lock()
        self._inner: Any = None
        self._sequences: Sequences | None = None
        self._stopped = False
        self._looked_up: set[str] = set()
        """The topics that were there when they were asked for."""
        self._topics = OutputTopics(settings)
        self._watching: asyncio.Task[None] | None = None
        self._embedded = False
        self._may_not_write: BrokerAuthorizationError | None = None

    async def start(self) -> None:
        """Connect, and find out whether the broker supports idempotent producers; if not, say so once in the log."""
        settings = self._settings
        options = client_options(settings, self._client_id)
        async with first_connection(settings, self._client_id) as connection:
            try:
                idempotent = await can_be_idempotent(connection, settings)
            except BrokerAuthorizationError as error:
                # We may write to no topic; that is told once it is known which one is meant.
                idempotent, self._may_not_write = True, error
            self._embedded = is_embedded(connection)
        if not idempotent:
            log.info(
                "the broker at %s supports no idempotent producers: results may arrive twice after a lost connection",
                settings.bootstrap_servers,
            )
        self._inner = self._make(options, enable_idempotence=idempotent and self._may_not_write is None)
        if idempotent and self._may_not_write is None:
            self._sequences = Sequences(self._inner._txn_manager)  # noqa: SLF001
            self._sequences.renew_before_sending(self._inner._sender)  # noqa: SLF001
        try:
            async with asyncio.timeout(settings.connect_timeout_s):
                await self._inner.start()
        except BaseException as error:
            await self.stop()
            if isinstance(error, kafka.KafkaError | OSError):
                raise translate(error, settings, doing="start a producer") from error
            raise
        if not self._embedded:
            self._watch()

    def _make(self, options: dict[str, Any], **more: Any) -> Any:
        """An aiokafka producer, not started. Raises SettingsError where the compression is not installed."""
        try:
            inner = AIOKafkaProducer(
                **options,
                **more,
                acks="all",
                compression_type=None if self._compression == "none" else self._compression,
                max_batch_size=self._max_batch_bytes,
                linger_ms=0,
            )
        except RuntimeError as error:
            raise SettingsError(
                f"compression {self._compression} is not installed",
                setting="output.compression",
                hint="pip install cramjam, or use gzip or none",
            ) from error
        inner._message_accumulator._pending_batches = _Pending()  # noqa: SLF001
        inner._sender._send_produce_req = send_in_one_piece(inner._sender)  # noqa: SLF001
        pace_metadata(inner.client)
        return inner

    def _watch(self) -> None:
        """Begin to look at the topics that are written to."""
        watching = watch_topics(lambda: self._inner.client, lambda: self._looked_up, self._topics.seen)
        self._watching = asyncio.get_running_loop().create_task(watching)

    async def _stop_watching(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)

    async def stop(self) -> None:
        """Flush what was submitted, for as long as a request may take, and close the connections."""
        if self._inner is None or self._stopped:
            return
        self._stopped = True
        await self._stop_watching()
        inner = self._inner
        accumulator = inner._message_accumulator  # noqa: SLF001
        # An idempotent producer never gives up a batch, so a broker that is gone would keep us here for ever.
        flushing = asyncio.ensure_future(accumulator.close())
        sender = inner._sender.sender_task  # noqa: SLF001
        if sender is not None:
            await asyncio.wait(
                {flushing, sender},
                timeout=self._settings.request_timeout_ms / 1000,
                return_when=asyncio.FIRST_COMPLETED,
            )
        if not flushing.done():
            accumulator.fail_all(kafka.KafkaTimeoutError("not written before the end"))
        await flushing
        try:
            (await ended(inner.stop(), inner.client)).result()
        except Exception as error:  # noqa: BLE001 - the batches' futures have told what matters
            log.debug("the producer stopped with %r", error)
            await inner.client.close()

    def create_batch(self, max_bytes: int | None = None) -> BatchBuilder:
        """An empty batch of at most ``max_bytes``, or the producer's own limit where that is lower.

        The first record always fits, whatever its size; the broker decides about it.
        """
        limit = self._max_batch_bytes if max_bytes is None else min(max_bytes, self._max_batch_bytes)
        compression = self._inner._message_accumulator._compression_type  # noqa: SLF001
        return _Builder(limit, compression, is_transactional=self._transactional)

    async def send_batch(
        self, batch: BatchBuilder, topic: str, partition: int, *, patient: bool = True
    ) -> asyncio.Future[object]:
        """Queue a batch, waiting for a place; the future resolves when the broker acknowledged it.

        A topic that has gone since it was first written to is waited for, for ``kafka.request_timeout_ms``; not so
        where the caller is not ``patient``.

        Raises:
            TopicMissingError: there is no such topic.
            BrokerError: there is no such partition, or the producer has failed or is stopped.
        """
        async with self._order:  # first come, first served, also where one has to wait
            await self._check_partition(topic, partition, patient=patient)
            size: int = batch.size()  # type: ignore[attr-defined] # our own builder's, which is aiokafka's
            while self._queued_bytes and self._queued_bytes + size > self._max_queued_bytes:
                self._fewer_bytes.clear()
                await self._fewer_bytes.wait()
            await self._places.acquire()
            accumulator = self._inner._message_accumulator  # noqa: SLF001
            failed = accumulator._exception  # noqa: SLF001
            if failed is not None or self._stopped:
                self._places.release()
                error = failed or kafka.ProducerClosed("the producer is stopped")
                raise self._translated(error, topic) from failed
            return self._queue(accumulator, batch, size, KafkaTopicPartition(topic, partition), patient=patient)

    def _queue(
        self, accumulator: Any, batch: BatchBuilder, size: int, to: Any, *, patient: bool
    ) -> asyncio.Future[object]:
        submitted = _SubmittedBatch(
            to,
            batch,
            accumulator._batch_ttl,  # noqa: SLF001
            explain=self._explain(to.topic),
            sequences=self._sequences,
            is_hopeless=partial(self._topics.is_hopeless, to.topic, patient=patient),
        )
        accumulator._batches[to].append(submitted)  # noqa: SLF001 - what its own add_batch does, but for the waiting
        waiter = accumulator.waiter()
        if not waiter.done():
            waiter.set_result(None)
        self._queued_bytes += size
        submitted.future.add_done_callback(partial(self._leave, size))
        # Shielded: aiokafka's sender would fail over a batch whose future somebody cancelled.
        return cast("asyncio.Future[object]", asyncio.shield(submitted.future))

    async def partition_count(self, topic: str, *, operation: AclOperation = "Write") -> int:
        """How many partitions the topic has; see ``interface.Producer``."""
        known = self._inner.client.cluster.partitions_for_topic(topic)
        return len(known) if known is not None else await self._look_up(topic, operation)

    async def max_message_bytes(self, topic: str) -> int | None:
        """The size in bytes of the largest batch that the topic takes, or None where we may not know."""
        try:
            entries = await describe_configs(self._inner.client, topic)
        except kafka.TopicAuthorizationFailedError as error:
            needs = [Privilege("DescribeConfigs", "Topic", topic)]
            refused = not_allowed(self._settings, f"see what topic {topic} takes", needs, type(error).__name__)
            log.warning("%s; Kafka's default max.message.bytes is taken for it", refused)
            return None
        except (kafka.KafkaError, OSError, NotImplementedError):
            return None
        entry = entries.get("max.message.bytes")
        return int(entry.value) if entry is not None and entry.value else None

    async def _check_partition(self, topic: str, partition: int, *, patient: bool) -> None:
        cluster = self._inner.client.cluster
        known = cluster.partitions_for_topic(topic)
        if known is not None and partition in known:
            return
        if self._topics.is_hopeless(topic, patient=patient):
            raise self._topics.error(topic)
        watched = self._watching is not None and not self._watching.done()
        if known is None and watched and topic in self._inner.client._topics:  # noqa: SLF001
            return  # it was there: aiokafka holds the batch until it has come back, or is hopeless
        count = await self._look_up(topic)
        if not 0 <= partition < count:
            raise BrokerError(
                f"topic {topic} has {count} partition{'' if count == 1 else 's'} and none with number {partition}; add "
                f"partitions with `streamproc topics apply`",
                bootstrap_servers=self._settings.bootstrap_servers,
            )

    async def _look_up(self, topic: str, operation: AclOperation = "Write") -> int:
        client = self._inner.client
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._settings.connect_timeout_s
        try:
            while True:
                topics = await read_topics(ask_any_broker(client, all_topics()), self._settings)
                if topic not in topics:
                    ask = partial(ask_any_broker, client)
                    raise await why_absent(
                        ask, [topic], topics, self._settings, operation=operation, embedded=self._embedded
                    )
                if operation == "Write" and self._may_not_write is not None:
                    raise self._may_not_write
                count = topics[topic].partitions
                # From here on aiokafka watches the topic by itself.
                client.add_topic(topic)
                self._looked_up.add(topic)
                await client.force_metadata_update()
                known = client.cluster.partitions_for_topic(topic)
                if (known is not None and len(known) >= count) or loop.time() > deadline:
                    return count
        except (kafka.KafkaError, OSError) as error:
            raise translate(error, self._settings, doing=f"look at topic {topic}", topic=topic) from error

    def _explain(self, topic: str) -> Callable[[BaseException], BrokerError]:
        return lambda error: self._translated(error, topic)

    def _translated(self, error: BaseException, topic: str) -> BrokerError:
        if self._topics.is_missing(topic):
            return self._topics.error(topic)
        needs = [Privilege("Write", "Topic", topic)]
        return translate(error, self._settings, doing=f"write to topic {topic}", topic=topic, needs=needs)

    def _leave(self, size: int, _: object) -> None:
        self._places.release()
        self._queued_bytes -= size
        self._fewer_bytes.set()


class _Pending(set[Any]):
    """aiokafka's batches on their way.

    It takes a batch out twice that fails while it is about to be sent again, and its sender would end over that.
    """

    def remove(self, batch: Any) -> None:
        """Take a batch out, if it is still there."""
        self.discard(batch)


class _Builder(KafkaBatchBuilder):  # type: ignore[misc] # aiokafka ships no types
    """aiokafka's builder without its serializers, which cost more than the append itself."""

    _relative_offset: int

    def append(
        self, *, timestamp: int | None, key: bytes | None, value: bytes | memoryview | None, headers: Headers = ()
    ) -> object | None:
        """Add a record; None when it does not fit any more, and the batch takes no further ones."""
        if self.closed():
            return None
        listed = headers if type(headers) is list else list(headers)  # the extension takes nothing else
        added: object | None = self._builder.append(self._relative_offset, timestamp, key, value, listed)
        if added is None:
            self.close()
            return None
        self._relative_offset += 1
        return added

    def extend(self, rows: Sequence[Row], start: int) -> int:
        """Add ``rows[start:]`` as far as they fit; the hot path, so nothing is looked up per record."""
        if self.closed():
            return 0
        append, first = self._builder.append, self.record_count()
        offset = first
        for timestamp, key, value, headers in islice(rows, start, None):
            if append(offset, timestamp, key, value, headers) is None:
                self.close()
                break
            offset += 1
        self._relative_offset = offset
        return offset - first

    def record_count(self) -> int:
        """How many records it holds."""
        return int(self._relative_offset)


class Sequences:
    """The sequence numbers of an idempotent producer, kept right where aiokafka lets them go wrong."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self._outdated = False
        """Whether the producer needs another identity before it sends anything further."""
        # aiokafka wraps to negative numbers, which Kafka refuses, after 2³¹ records.
        manager.increment_sequence_number = self._increment

    def _increment(self, partition: Any, increment: int) -> None:
        numbers = self._manager._sequence_numbers  # noqa: SLF001
        numbers[partition] = (numbers[partition] + increment) % _SEQUENCE_RANGE

    def give_back(self, batch: Any) -> None:
        """Use a batch's numbers again: the broker has certainly not written it."""
        self._increment(batch.tp, -batch.record_count)

    def after_failure(self, batch: Any, error: BaseException) -> None:
        """Make the partition usable again after a batch that will not be sent again."""
        confused = isinstance(error, kafka.OutOfOrderSequenceNumber | kafka.UnknownProducerId | kafka.ProducerFenced)
        if batch.retry_count == 1 and not confused:
            self.give_back(batch)
        elif batch.retry_count:
            log.warning("taking a new producer id after %r for %s", error, batch.tp)
            # Not at once: batches fail while aiokafka takes others from its queue, which it does with an identity only.
            self._outdated = True

    def renew_before_sending(self, sender: Any) -> None:
        """Give up the identity, where that is due, when aiokafka's sender next looks whether it has one."""
        wait = sender._maybe_wait_for_pid  # noqa: SLF001

        async def renewed() -> None:
            if self._outdated:
                self._outdated = False
                self._manager._pid_and_epoch = PidAndEpoch(NO_PRODUCER_ID, NO_PRODUCER_EPOCH)  # noqa: SLF001
                self._manager._pid_waiter = asyncio.get_running_loop().create_future()  # noqa: SLF001
                self._manager._sequence_numbers.clear()  # noqa: SLF001
            await wait()

        sender._maybe_wait_for_pid = renewed  # noqa: SLF001


class _SubmittedBatch(MessageBatch):  # type: ignore[misc] # aiokafka ships no types
    """A batch in aiokafka's queue, whose future carries errors of our own tree."""

    def __init__(
        self,
        to: Any,
        builder: Any,
        ttl_s: float,
        *,
        explain: Callable[[BaseException], BrokerError],
        sequences: Sequences | None,
        is_hopeless: Callable[[], bool],
    ) -> None:
        super().__init__(to, builder, ttl_s, 0)
        self._is_hopeless = is_hopeless
        self._explain = explain
        self._sequences = sequences

    def expired(self) -> bool:
        """Whether to give up, asked while there is no leader.

        An idempotent batch may have been written and leaves no gap: it waits for as long as its topic is there.
        """
        return self._is_hopeless() or (self._sequences is None and bool(super().expired()))

    def failure(self, exception: BaseException) -> None:
        """Called by aiokafka, under this name, when the batch will not be sent again."""
        if self._sequences is not None:
            self._sequences.after_failure(self, exception)
        error = self._explain(exception)
        error.__cause__ = exception
        super().failure(error)
        if self._drain_waiter.done():
            self._drain_waiter.exception()  # nobody waits for it; mark it as seen
