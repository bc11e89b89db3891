"""Looking at and changing a cluster: topics, configurations and offsets.

Nothing here creates a topic by asking for it, and nothing joins a consumer group.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Self, cast

from aiokafka import AIOKafkaConsumer
from aiokafka import errors as kafka
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin import NewTopic as KafkaNewTopic
from aiokafka.admin.new_partitions import NewPartitions
from aiokafka.structs import TopicPartition as KafkaTopicPartition

from streamproc.broker.configs import describe_configs, set_configs
from streamproc.broker.connection import (
    all_topics,
    ask_any_broker,
    client_options,
    ended,
    first_connection,
    is_embedded,
    isolation_level,
    read_topics,
    why_absent,
)
from streamproc.broker.interface import ConfigEntry, NewTopic, TopicInfo
from streamproc.broker.offsets import (
    commit_offsets,
    committed_offsets,
    committed_stable_offsets,
    corrected_ends,
)
from streamproc.broker.privileges import AclOperation, Privilege
from streamproc.broker.transaction_requests import are_known
from streamproc.broker.translation import translate
from streamproc.errors import BrokerError
from streamproc.records import TopicPartition
from streamproc.settings import KafkaSettings

_POLL_S = 0.05


class KafkaAdmin:
    """Implements ``interface.Admin``; an asynchronous context manager.

    Args:
        settings: How to reach Kafka.
        client_id: Shown in the brokers' logs.
        uncommitted: Whether logs end behind transactions that are not committed, or before them.
    """

    def __init__(
        self, settings: KafkaSettings, *, client_id: str = "streamproc-admin", uncommitted: bool = False
    ) -> None:
        self._settings = settings
        self._uncommitted = uncommitted
        self._client_id = client_id
        self._embedded = False
        self._transactions = False
        self._inner: Any = None
        self._reader: Any = None

    async def __aenter__(self) -> Self:
        options = client_options(self._settings, self._client_id)
        async with first_connection(self._settings, self._client_id) as connection:
            self._embedded = is_embedded(connection)
            self._transactions = not self._embedded and are_known(connection)
        # The admin client changes things; a consumer without a group is what aiokafka asks for offsets with.
        self._inner = AIOKafkaAdminClient(**options)
        self._reader = AIOKafkaConsumer(
            **options, enable_auto_commit=False, isolation_level=isolation_level(self._uncommitted or self._embedded)
        )
        try:
            async with asyncio.timeout(self._settings.connect_timeout_s):
                await self._inner.start()
                await self._reader.start()
        except BaseException as error:
            await self.__aexit__()
            if isinstance(error, kafka.KafkaError | OSError):
                raise translate(error, self._settings, doing="look at the cluster") from error
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        for stopping, client in (
            (self._reader.stop(), self._reader._client),  # noqa: SLF001 - as below
            (self._inner.close(), self._client),
        ):
            closed = await ended(stopping, client)
            if not closed.cancelled():  # as a reader that is closed at once is, by aiokafka itself
                closed.result()

    async def topics(self) -> Mapping[str, TopicInfo]:
        """All topics, Kafka's internal ones included and marked."""
        return cast("dict[str, TopicInfo]", await self._try(self._read_topics(), "list the topics"))

    async def create_topics(self, topics: Sequence[NewTopic]) -> None:
        """Create topics, and return when clients can see them; existing ones are an error."""
        if not topics:
            return
        # With replica assignments that are empty, rather than None, aiokafka lets the default replication pass.
        new = [
            KafkaNewTopic(
                it.name,
                it.partitions,
                1 if it.replication == -1 and self._embedded else it.replication,
                replica_assignments={} if it.replication == -1 and not self._embedded else None,
                topic_configs=dict(it.configs),
            )
            for it in topics
        ]
        named = ", ".join(it.name for it in topics)
        await self._controlled(f"create topics {named}")
        response = await self._try(self._inner.create_topics(new), f"create topics {named}")
        self._raise_first(response.topic_errors, "create", "Create")
        await self._seen(lambda found: all(it.name in found for it in topics))

    async def delete_topics(self, names: Sequence[str]) -> None:
        """Delete topics with all their records."""
        if not names:
            return
        await self.check_topics(names, "Delete")
        await self._controlled(f"delete topics {', '.join(names)}")
        response = await self._try(self._inner.delete_topics(list(names)), f"delete topics {', '.join(names)}")
        self._raise_first(response.topic_error_codes, "delete", "Delete")
        await self._seen(lambda found: not any(name in found for name in names))

    async def describe_configs(self, topic: str) -> Mapping[str, ConfigEntry]:
        """The configurations of a topic, inherited ones included. Raises TopicMissingError."""
        await self.check_topics([topic], "DescribeConfigs")
        asking = describe_configs(self._client, topic)
        found = await self._try(asking, f"look at the configuration of topic {topic}", "DescribeConfigs", topic)
        if self._embedded:  # it shows what a topic sets itself and nothing else, and calls that defaults
            return {name: ConfigEntry(entry.value, own=True) for name, entry in found.items()}
        return cast("dict[str, ConfigEntry]", found)

    async def set_configs(self, topic: str, changes: Mapping[str, str]) -> None:
        """Change some configurations of a topic and leave the others alone."""
        await self.check_topics([topic], "AlterConfigs")
        setting = set_configs(self._client, topic, dict(changes))
        await self._try(setting, f"configure topic {topic}", "AlterConfigs", topic)

    async def add_partitions(self, topic: str, total: int) -> None:
        """Give a topic more partitions, ``total`` altogether."""
        await self.check_topics([topic], "Alter")
        if self._embedded:
            raise BrokerError(
                f"could not add partitions to topic {topic}: the embedded broker cannot; restart it, which empties it, "
                f"and create the topic with {total} partitions",
                bootstrap_servers=self._settings.bootstrap_servers,
            )
        await self._controlled(f"add partitions to topic {topic}")
        request = self._inner.create_partitions({topic: NewPartitions(total)})
        await self._try(request, f"add partitions to topic {topic}", "Alter", topic)
        await self._seen(lambda found: topic in found and found[topic].partitions >= total)

    async def end_offsets(self, partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, int]:
        """The offset after the last record of each partition."""
        await self.check_topics([partition.topic for partition in partitions], "Read")
        asked = [KafkaTopicPartition(*partition) for partition in partitions]
        ends = await self._try(self._reader.end_offsets(asked), "ask for log ends")
        if self._embedded:
            ends = await self._try(corrected_ends(self._client, ends), "ask for log ends")
        return {TopicPartition(*partition): offset for partition, offset in ends.items()}

    async def begin_offsets(self, partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, int]:
        """The offset of the first record that each partition still has."""
        await self.check_topics([partition.topic for partition in partitions], "Read")
        asked = [KafkaTopicPartition(*partition) for partition in partitions]
        begins = await self._try(self._reader.beginning_offsets(asked), "ask for log starts")
        return {TopicPartition(*partition): offset for partition, offset in begins.items()}

    async def offsets_for_times(self, times_ms: Mapping[TopicPartition, int]) -> Mapping[TopicPartition, int | None]:
        """The first offset at or after a time; None where all records are older.

        The embedded broker goes by the time at which a batch arrived.
        """
        await self.check_topics([partition.topic for partition in times_ms], "Read")
        asked = {KafkaTopicPartition(*partition): time_ms for partition, time_ms in times_ms.items()}
        found = await self._try(self._reader.offsets_for_times(asked), "look up offsets by time")
        # A timestamp of -1 is how the embedded broker says that there is none.
        return {
            TopicPartition(*partition): None if it is None or it.timestamp == -1 else it.offset
            for partition, it in found.items()
        }

    async def committed(
        self, group_id: str, partitions: Sequence[TopicPartition], *, stable: bool = False
    ) -> Mapping[TopicPartition, int]:
        """The committed offsets of a group, without joining it; partitions without one are left out.

        With ``stable``, a transaction that is about to change them is waited for.
        """
        if not partitions:
            return {}
        ask = committed_stable_offsets if stable and self._transactions else committed_offsets
        needs = [Privilege("Describe", "Group", group_id), *_each("Describe", partitions)]
        asked: dict[TopicPartition, int] = await self._ask_coordinator(
            lambda: ask(self._client, group_id, partitions), f"ask for offsets of group {group_id}", needs
        )
        return asked

    async def commit(self, group_id: str, offsets: Mapping[TopicPartition, int]) -> None:
        """Commit offsets of a group that has no members. Raises CommitRejectedError where it has some."""
        if offsets:
            needs = [Privilege("Read", "Group", group_id), *_each("Read", offsets)]
            await self._ask_coordinator(
                lambda: commit_offsets(self._client, group_id, offsets), f"commit offsets of group {group_id}", needs
            )

    async def _ask_coordinator(self, ask: Callable[[], Awaitable[Any]], doing: str, needs: Sequence[Privilege]) -> Any:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._settings.connect_timeout_s
        while True:
            try:
                return await ask()
            except (kafka.KafkaError, OSError) as error:
                # A cluster that never had a group appoints a coordinator first.
                if not getattr(error, "retriable", False) or loop.time() > deadline:
                    raise translate(error, self._settings, doing=doing, needs=needs) from error
            await asyncio.sleep(_POLL_S)

    async def max_message_bytes(self, topic: str) -> int | None:
        """The largest batch in bytes that a topic takes; None where that is not known. Raises TopicMissingError."""
        entry = (await self.describe_configs(topic)).get("max.message.bytes")
        return int(entry.value) if entry is not None and entry.value else None

    @property
    def _client(self) -> Any:
        return self._inner._client  # noqa: SLF001 - requests that aiokafka's admin client does not know

    async def _read_topics(self) -> dict[str, TopicInfo]:
        return await read_topics(ask_any_broker(self._client, all_topics()), self._settings)

    async def check_topics(self, names: Sequence[str], operation: AclOperation) -> None:
        """See ``interface.Admin``. aiokafka would ask for topics by name, again and again, and thereby create them."""
        found = await self.topics()
        absent = sorted({name for name in names if name not in found})
        if absent:
            ask = partial(ask_any_broker, self._client)
            reason = why_absent(ask, absent, found, self._settings, operation=operation, embedded=self._embedded)
            raise await self._try(reason, f"look at topic {', '.join(absent)}")

    async def _controlled(self, doing: str) -> None:
        """Wait for a controller, without which aiokafka fails: a broker that has just come back may know of none."""
        try:
            async with asyncio.timeout(self._settings.connect_timeout_s):
                while self._client.cluster.controller is None:
                    await asyncio.sleep(_POLL_S)
                    await self._client.force_metadata_update()
        except (TimeoutError, kafka.KafkaError, OSError) as error:
            raise translate(error, self._settings, doing=doing) from error

    async def _seen(self, condition: Callable[[Mapping[str, TopicInfo]], bool]) -> None:
        """Wait until a change has got round to the brokers that answer clients."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._settings.connect_timeout_s
        while True:
            if condition(await self.topics()) or loop.time() > deadline:
                return
            await asyncio.sleep(_POLL_S)

    def _raise_first(self, errors: Any, verb: str, operation: AclOperation) -> None:
        for topic, code, *message in errors:
            error = kafka.for_code(code)
            if error is not kafka.NoError:
                told = error(message[0]) if message and message[0] else error()
                needs = [Privilege(operation, "Topic", topic)]
                raise translate(told, self._settings, doing=f"{verb} topic {topic}", topic=topic, needs=needs)

    async def _try(self, request: Any, doing: str, operation: AclOperation = "Describe", topic: str = "") -> Any:
        try:
            return await request
        except (kafka.KafkaError, OSError) as error:
            needs = [Privilege(operation, "Topic", topic)] if topic else []
            raise translate(error, self._settings, doing=doing, topic=topic, needs=needs) from error


def _each(operation: AclOperation, partitions: Iterable[TopicPartition]) -> list[Privilege]:
    return [Privilege(operation, "Topic", topic) for topic in sorted({it.topic for it in partitions})]


def partitions_of(topics: Mapping[str, TopicInfo], name: str) -> list[TopicPartition]:
    """All partitions of a topic; none where it does not exist."""
    return [TopicPartition(name, number) for number in range(topics[name].partitions)] if name in topics else []
