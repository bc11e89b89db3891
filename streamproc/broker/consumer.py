"""A member of a consumer group, over aiokafka.

Records come out as aiokafka made them: nothing here is done per record. What is done here, and why:

- ``getmany`` never waits longer than it was told to. aiokafka's own waits out a whole rebalance, during which the other
  members may drain for seconds; the data path has outcomes to deliver meanwhile.
- No record of a partition comes before ``on_assigned`` returned, nor after ``on_revoked`` was called. aiokafka holds
  neither promise by itself.
- A commit is sent with the generation in which it was begun or not at all. aiokafka retries a commit with whatever
  generation is current by then, which would let a commit of a revoked partition pass; and a consumer that was taken
  out of its group commits as if there were no groups.
- Pausing keeps what is already fetched. aiokafka's ``pause`` throws it away and fetches it again, so here a paused
  partition is passed over instead: aiokafka fetches at most one answer ahead for it.
- Committed offsets are asked for as stable ones: those that a transaction of the partition's last owner has left open
  are waited for. Otherwise its records would be read again, and then its transaction committed after all.
- Nothing is read that another member may be reading: once no heartbeat was answered for a session, or the group has
  said that we are no member of it, no record comes until a heartbeat is answered or partitions are assigned anew.
  aiokafka goes on fetching, so that a replica that comes back would process what is not its own for seconds.
- A topic that is deleted, or is another one by the same name, is an error. aiokafka reads on as if nothing were, and
  would commit offsets of the old one for the new one.
- Every ``getmany`` counts as a poll for ``kafka.max_poll_interval_ms``, also with everything paused.

Partitions are assigned round robin. aiokafka's sticky assignor keeps its state in class attributes, which the consumers
of several tasks in one process would share; and since aiokafka's rebalances take all partitions from all members
anyway, stickiness would save nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener
from aiokafka import errors as kafka
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor
from aiokafka.structs import TopicPartition as KafkaTopicPartition

from streamproc.broker import fetched_records
from streamproc.broker.connection import (
    check_group,
    check_topics,
    client_options,
    ended,
    first_connection,
    is_embedded,
    isolation_level,
    pace_metadata,
)
from streamproc.broker.interface import Membership, OffsetReset, Rebalanced
from streamproc.broker.offsets import committed_offsets, corrected_ends, stable_offsets
from streamproc.broker.privileges import Privilege
from streamproc.broker.static_members import name_member
from streamproc.broker.topic_watch import Found, InputTopics, watch_topics
from streamproc.broker.transaction_requests import are_known
from streamproc.broker.translation import rejected, translate
from streamproc.errors import (
    BrokerError,
    BrokerUnreachableError,
    CommitRejectedError,
    InstanceFencedError,
    StreamprocError,
    TopicMissingError,
)
from streamproc.records import Record, TopicPartition
from streamproc.settings import KafkaSettings

fetched_records.install()

log = logging.getLogger(__name__)

_HEARTBEAT_MS = 1_000
_EMBEDDED_SESSION_MS = 6_000
_STOP_TIMEOUT_S = 10.0
_NOTHING = (KafkaTopicPartition("", -1),)
"""Asks aiokafka for a partition that nobody has: a poll that returns no record."""


class KafkaConsumer:
    """Implements ``interface.Consumer``.

    Args:
        settings: How to reach Kafka.
        group_id: The consumer group to be a member of.
        client_id: Shown in the brokers' logs.
        auto_offset_reset: Where to begin in a partition without a committed offset.
    """

    def __init__(
        self,
        settings: KafkaSettings,
        *,
        group_id: str,
        client_id: str,
        auto_offset_reset: OffsetReset = "earliest",
    ) -> None:
        self._settings = settings
        self._group_id = group_id
        self._client_id = client_id
        self._auto_offset_reset = auto_offset_reset
        self._inner: Any = None
        self._assigned: set[TopicPartition] = set()
        self._paused: set[TopicPartition] = set()
        self._wanted: tuple[Any, ...] = ()
        self._rebalancing = True
        self._may_commit = False
        self._stopped = False
        self._embedded = False
        self._session_s = 0.0
        self._heard_at: float | None = None
        """When the last heartbeat that was answered was sent; None before the first assignment."""
        self._silent = False
        self._callback_error: BaseException | None = None
        self._wake: asyncio.Future[None] | None = None
        self._commits: set[asyncio.Future[None]] = set()
        self._topics = InputTopics(settings)
        self._needs = [Privilege("Read", "Group", group_id)]
        self._watching: asyncio.Task[None] | None = None

    async def start(self, topics: Sequence[str], on_revoked: Rebalanced, on_assigned: Rebalanced) -> None:
        """Connect and join; ``on_assigned`` may still be running when this returns."""
        settings = self._settings
        self._needs += [Privilege("Read", "Topic", topic) for topic in topics]
        options = client_options(settings, self._client_id)
        stable = await self._look(topics)
        # The embedded broker lets the first member of a group wait for others for half of the session timeout.
        session_ms = min(settings.session_timeout_ms, _EMBEDDED_SESSION_MS if self._embedded else 2**31)
        self._session_s = session_ms / 1_000
        self._inner = AIOKafkaConsumer(
            **options,
            group_id=self._group_id,
            group_instance_id=settings.group_instance_id,
            auto_offset_reset=self._auto_offset_reset,
            isolation_level=isolation_level(uncommitted=self._embedded),
            key_deserializer=fetched_records.UNTOUCHED,
            enable_auto_commit=False,
            session_timeout_ms=session_ms,
            heartbeat_interval_ms=min(_HEARTBEAT_MS, session_ms // 3),
            max_poll_interval_ms=settings.max_poll_interval_ms,
            # As in Kafka's own client: the others wait this long for a member that drains. aiokafka's default, the
            # session timeout, would throw out members whose drain is longer than that.
            rebalance_timeout_ms=settings.max_poll_interval_ms,
            fetch_max_bytes=settings.fetch_max_bytes,
            partition_assignment_strategy=(RoundRobinPartitionAssignor,),
        )
        pace_metadata(self._inner._client)  # noqa: SLF001
        try:
            await self._inner.start()
            if stable:
                coordinator = self._inner._coordinator  # noqa: SLF001
                coordinator._do_fetch_commit_offsets = partial(stable_offsets, coordinator, self._group_id)  # noqa: SLF001
                if settings.group_instance_id is not None:
                    name_member(coordinator, settings.group_instance_id, self._on_fenced)
                watching = watch_topics(lambda: self._inner._client, lambda: topics, self._on_topics)  # noqa: SLF001
                self._watching = asyncio.get_running_loop().create_task(watching)
            self._inner.subscribe(list(topics), listener=_Listener(self, on_revoked, on_assigned))
            await self._inner._subscription.wait_for_assignment()  # noqa: SLF001
        except BaseException as error:
            await self.stop()
            if isinstance(error, kafka.KafkaError | OSError):
                doing = f"join consumer group {self._group_id}"
                topic = topics[0] if len(topics) == 1 else ""
                raise translate(error, settings, doing=doing, topic=topic, needs=self._needs) from error
            raise

    async def _look(self, topics: Sequence[str]) -> bool:
        """Raise where the group cannot read these; tell whether it can be asked for stable offsets."""
        for is_last in (False, True):
            async with first_connection(self._settings, self._client_id) as connection:
                try:
                    await check_topics(connection, topics, self._settings)
                    await check_group(connection, self._group_id, self._settings)
                    break
                except BrokerUnreachableError:
                    if is_last:
                        raise
                    # It went between two questions. Others may be there: the next connection is to one of them.
        self._embedded = is_embedded(connection)
        return not self._embedded and are_known(connection)

    async def stop(self) -> None:
        """Leave the group (a static member stays) and close the connections, within about ten seconds."""
        if self._inner is None or self._stopped:
            return
        self._stopped = True
        self._may_commit = False
        self._drop_commits()
        self._notify()
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        inner = self._inner
        stopping = asyncio.ensure_future(_stop(inner))
        await asyncio.wait({stopping}, timeout=_STOP_TIMEOUT_S)
        if not stopping.done():  # the broker holds back the answer to a join, or is gone: leave without its consent
            stopping.cancel()
            await asyncio.wait({stopping})
        if stopping.cancelled() or stopping.exception() is not None:
            # Cancelled also where it was not by us: aiokafka lets the cancellation of its fetches out.
            await self._abandon()

    async def _abandon(self) -> None:
        """Close what aiokafka's own ``stop`` has left open."""
        fetcher, client = self._inner._fetcher, self._inner._client  # noqa: SLF001
        if fetcher is not None:
            tasks = {fetcher._fetch_task, *fetcher._pending_tasks}  # noqa: SLF001
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        with contextlib.suppress(kafka.KafkaError, OSError):
            await client.close()

    async def getmany(self, *, timeout_ms: int, max_records: int) -> Mapping[TopicPartition, Sequence[Record]]:
        """Records by partition, in offset order, as soon as there are any; empty after ``timeout_ms``.

        Raises:
            BrokerError: the membership or fetching failed for good, or a rebalance callback raised a BrokerError.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_ms / 1000
        subscription = self._inner._subscription  # noqa: SLF001
        calls = subscription._fetch_count  # noqa: SLF001
        try:
            # This is a poll also where aiokafka's own getmany is not called, and while it is being waited here.
            subscription._fetch_count = calls + 1  # noqa: SLF001
            while not self._stopped:
                self._check()
                if not self._rebalancing and self._in_session():
                    found = await self._inner.getmany(*self._wanted, max_records=max_records)
                    if found:
                        return cast("Mapping[TopicPartition, Sequence[Record]]", found)
                remaining = deadline - loop.time()
                if remaining <= 0:
                    return {}
                await self._wait(remaining)
        except (kafka.KafkaError, OSError) as error:
            doing = f"read as consumer group {self._group_id}"
            raise translate(error, self._settings, doing=doing, needs=self._needs) from error
        finally:
            subscription._fetch_count = calls  # noqa: SLF001 - aiokafka does not count back after an error
            subscription._last_fetch_ended = time.monotonic()  # noqa: SLF001
        await asyncio.sleep(0)  # a loop around this would let nobody else run
        return {}

    def pause(self, *partitions: TopicPartition) -> None:
        """Return nothing of these until ``resume``; a partition that is revoked is not paused any more."""
        self._paused.update(partitions)
        self._choose()

    def resume(self, *partitions: TopicPartition) -> None:
        """Return records of these again."""
        self._paused.difference_update(partitions)
        self._choose()
        self._notify()

    async def commit(self, offsets: Mapping[TopicPartition, int]) -> None:
        """Commit the next offset to read of each partition; see ``interface.Consumer.commit``."""
        if not offsets:
            return
        # An empty member id is what aiokafka has once the group threw it out; Kafka would take such a commit for that
        # of a client without a group.
        if not self._may_commit or not self._inner._coordinator.member_id:  # noqa: SLF001
            raise self._rejected()
        told = {KafkaTopicPartition(*partition): offset for partition, offset in offsets.items()}
        commit: asyncio.Future[None] = asyncio.ensure_future(self._inner.commit(told))
        self._commits.add(commit)
        try:
            await asyncio.wait({commit}, timeout=self._settings.request_timeout_ms / 1000)
        finally:
            self._commits.discard(commit)
            unanswered = not commit.done()
            if unanswered:
                commit.cancel()
        if unanswered:
            raise BrokerUnreachableError(
                f"could not commit offsets of group {self._group_id}: no answer within kafka.request_timeout_ms "
                f"({self._settings.request_timeout_ms} ms); see whether the brokers at "
                f"{self._settings.bootstrap_servers} are up",
                bootstrap_servers=self._settings.bootstrap_servers,
            )
        if commit.cancelled():
            raise self._rejected()
        error = commit.exception()
        if isinstance(error, kafka.IllegalStateError):  # a partition that is not ours any more
            raise self._rejected() from error
        if isinstance(error, kafka.KafkaError | OSError):
            doing = f"commit offsets of group {self._group_id}"
            raise translate(error, self._settings, doing=doing, needs=self._needs) from error
        if error is not None:
            raise error

    def connected(self) -> bool:
        """Whether there is a connection to any broker at this moment."""
        connections = self._inner._client._conns.values() if self._inner is not None else ()  # noqa: SLF001
        return any(connection.connected() for connection in connections)

    def is_member(self) -> bool:
        """Whether the group has not gone on without us, as far as we were told."""
        return bool(self._inner is not None and self._inner._coordinator.member_id)  # noqa: SLF001

    def position(self, partition: TopicPartition) -> int | None:
        """The next offset to fetch of an assigned partition, or None before it is known.

        It is past what is no record: transaction markers, and aborted transactions where only committed ones are read.
        """
        inner = self._inner
        known = KafkaTopicPartition(*partition)
        if inner is None or known not in inner.assignment():
            return None
        state = inner._subscription.subscription.assignment.state_value(known)  # noqa: SLF001 - position() may wait
        return cast("int", state.position) if state.has_valid_position else None

    def highwater(self, partition: TopicPartition) -> int | None:
        """The log end of an assigned partition as of its last fetch, or None where nothing was fetched yet.

        It ends before the first transaction that is still open: what comes after cannot be read yet.
        """
        known = KafkaTopicPartition(*partition)
        if self._inner is None or known not in self._inner.assignment():
            return None
        end = self._inner.highwater(known) if self._embedded else self._inner.last_stable_offset(known)
        return cast("int | None", end)

    async def end_offsets(self, partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, int]:
        """The log end of each partition, asked now."""
        asked = [KafkaTopicPartition(*partition) for partition in partitions]
        try:
            ends = await self._inner.end_offsets(asked)
            if self._embedded:
                ends = await corrected_ends(self._inner._client, ends)  # noqa: SLF001
            return cast("Mapping[TopicPartition, int]", ends)
        except (kafka.KafkaError, OSError) as error:
            topic = partitions[0].topic if partitions else ""
            doing = "ask for the log end"
            raise translate(error, self._settings, doing=doing, topic=topic, needs=self._needs) from error

    async def committed(self, partition: TopicPartition) -> int | None:
        """The group's committed offset of an assigned partition."""
        try:
            return cast("int | None", await self._inner.committed(KafkaTopicPartition(*partition)))
        except (kafka.KafkaError, OSError) as error:
            raise translate(
                error,
                self._settings,
                doing=f"ask for offsets of group {self._group_id}",
                topic=partition.topic,
                needs=self._needs,
            ) from error

    async def rewind(self, starts: Mapping[TopicPartition, int]) -> None:
        """Read these partitions from their committed offsets on, or from ``starts``; see ``interface.Consumer``."""
        asked = [KafkaTopicPartition(*partition) for partition in starts]
        assignment = self._inner._subscription.subscription.assignment  # noqa: SLF001 - an object for each rebalance
        try:
            committed = await self._inner._coordinator.fetch_committed_offsets(asked)  # noqa: SLF001
        except (kafka.KafkaError, OSError) as error:
            doing = f"ask for offsets of group {self._group_id}"
            raise translate(error, self._settings, doing=doing, needs=self._needs) from error
        if self._inner._subscription.subscription.assignment is not assignment:  # noqa: SLF001
            return
        for partition in asked:
            if partition in self._inner.assignment():
                known = committed.get(partition)
                self._inner.seek(partition, starts[partition] if known is None else known.offset)

    def membership(self) -> Membership:
        """Who we are in the group. Raises CommitRejectedError once it has moved on."""
        coordinator = self._inner._coordinator  # noqa: SLF001
        if not self._may_commit or not coordinator.member_id:
            raise self._rejected()
        return Membership(
            self._group_id, coordinator.generation, coordinator.member_id, self._settings.group_instance_id
        )

    def _on_fenced(self) -> None:
        """Somebody else has joined under our name: the group knows that one now."""
        self._end(
            InstanceFencedError(
                f"another replica has taken over the name {self._settings.group_instance_id} in consumer group "
                f"{self._group_id}, and this one stops; give each replica a kafka.group_instance_id of its own",
                bootstrap_servers=self._settings.bootstrap_servers,
            )
        )

    def _on_topics(self, found: Found) -> None:
        try:
            if self._topics.seen(found):
                # aiokafka notices the partitions by it, and has the group share them out.
                self._inner._client.force_metadata_update()  # noqa: SLF001
        except TopicMissingError as error:
            self._end(error)

    def _end(self, error: BrokerError) -> None:
        """Commit nothing more, and say why."""
        self._may_commit = False
        self._drop_commits()
        self._callback_error = error
        self._notify()

    def _rejected(self) -> CommitRejectedError:
        return rejected(f"commit offsets of group {self._group_id}", self._settings)

    def _check(self) -> None:
        """Raise what went wrong in the background."""
        if self._callback_error is not None:
            error, self._callback_error = self._callback_error, None
            raise error
        inner = self._inner
        inner._coordinator.check_errors()  # noqa: SLF001 - getmany() would, but it is not called while rebalancing
        fetching = inner._fetcher.error_future  # noqa: SLF001 - aiokafka itself never looks at it
        if fetching.done() and not fetching.cancelled():
            fetching.result()

    async def _wait(self, timeout_s: float) -> None:
        """Until something was fetched, a partition is resumed, a rebalance ends, or the time is up."""
        # aiokafka's own way of waiting. It also hands on the errors of the coordinator.
        waiter = self._inner._fetcher._create_fetch_waiter()  # noqa: SLF001
        self._wake = waiter
        try:
            await asyncio.wait([waiter], timeout=timeout_s)
        finally:
            self._wake = None
            if not waiter.done():
                waiter.cancel()
        if not waiter.cancelled():
            waiter.result()

    def _silent_for_s(self) -> float:
        """How long the group has not said that we are a member."""
        return time.monotonic() - (self._heard_at or 0.0)

    def _in_session(self) -> bool:
        """Whether nobody else can have our partitions yet."""
        silent_s = self._silent_for_s()
        if (silent_s > self._session_s) != self._silent:
            self._silent = not self._silent
            if self._silent:
                log.warning(
                    "group %s has answered no heartbeat for %.1f s (kafka.session_timeout_ms is %g); reading pauses "
                    "until it does, since others may read our partitions by now",
                    *(self._group_id, silent_s, self._session_s * 1_000),
                )
            else:
                log.info("group %s answers again; reading goes on", self._group_id)
        return not self._silent and self.is_member()

    def _listen_for_heartbeats(self) -> None:
        """Note when the group last said that we are a member: aiokafka keeps that to itself."""
        if self._heard_at is None:
            coordinator = self._inner._coordinator  # noqa: SLF001
            beat = coordinator._do_heartbeat  # noqa: SLF001

            async def noted() -> bool:
                if self._silent_for_s() > self._session_s and not await self._coordinator_knows():
                    return False
                sent_at = time.monotonic()
                answered = bool(await beat())
                if answered:
                    self._heard_at = sent_at
                    self._notify()
                return answered

            coordinator._do_heartbeat = noted  # noqa: SLF001
        self._heard_at = time.monotonic()

    async def _coordinator_knows(self) -> bool:
        """Whether the coordinator has loaded its groups: until then it answers every heartbeat well, in Kafka."""
        try:
            await committed_offsets(self._inner._client, self._group_id, list(self._assigned)[:1])  # noqa: SLF001
        except (kafka.KafkaError, OSError) as error:
            log.debug("the coordinator of group %s does not answer yet: %r", self._group_id, error)
            return False
        return True

    def _notify(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def _choose(self) -> None:
        """Compute the partitions to ask for; none means all of them."""
        if self._paused:
            self._wanted = tuple(KafkaTopicPartition(*it) for it in self._assigned - self._paused) or _NOTHING
        else:
            self._wanted = ()

    def _drop_commits(self) -> None:
        for commit in self._commits:
            commit.cancel()

    async def _revoke(self, callback: Rebalanced) -> None:
        self._rebalancing = True
        revoked, self._assigned = self._assigned, set()
        if revoked:
            await self._call(callback, revoked)
        self._may_commit = False
        self._drop_commits()
        self._paused.clear()
        self._choose()

    async def _assign(self, partitions: set[TopicPartition], callback: Rebalanced) -> None:
        self._assigned = partitions
        self._may_commit = True
        self._listen_for_heartbeats()
        await self._call(callback, set(partitions))
        self._choose()
        self._rebalancing = False
        self._notify()

    async def _call(self, callback: Rebalanced, partitions: set[TopicPartition]) -> None:
        """Await a callback. aiokafka would log what it raises and go on; here ``getmany`` raises it."""
        if self._stopped:
            return
        try:
            await callback(partitions)
        except StreamprocError as error:
            self._callback_error = error
        except Exception as error:  # noqa: BLE001 - it is raised again, in the task that reads
            self._callback_error = error


async def _stop(inner: Any) -> None:
    (await ended(inner.stop(), inner._client)).result()  # noqa: SLF001 - what it has to wait for


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc] # aiokafka ships no types
    """Hands aiokafka's rebalance callbacks to the consumer."""

    def __init__(self, consumer: KafkaConsumer, on_revoked: Rebalanced, on_assigned: Rebalanced) -> None:
        self._consumer = consumer
        self._on_revoked = on_revoked
        self._on_assigned = on_assigned

    async def on_partitions_revoked(self, revoked: set[Any]) -> None:  # noqa: ARG002 - the consumer knows its own
        await self._consumer._revoke(self._on_revoked)  # noqa: SLF001 - the two are one thing

    async def on_partitions_assigned(self, assigned: set[Any]) -> None:
        partitions = {TopicPartition(*partition) for partition in assigned}
        await self._consumer._assign(partitions, self._on_assigned)  # noqa: SLF001
