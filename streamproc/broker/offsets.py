"""Questions about offsets that aiokafka does not ask, or that the embedded broker answers wrongly."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from aiokafka import errors as kafka
from aiokafka.client import CoordinationType
from aiokafka.protocol.commit import OffsetCommitRequest, OffsetFetchRequest
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.structs import OffsetAndMetadata
from aiokafka.structs import TopicPartition as KafkaTopicPartition

from streamproc.broker.transaction_requests import StableOffsetFetchRequest
from streamproc.records import TopicPartition

_WAIT_MS = 10
_MAX_BYTES = 1
_UNSTABLE_OFFSET_COMMIT = 88


async def corrected_ends(client: Any, ends: Mapping[Any, int]) -> dict[Any, int]:
    """The true log ends, given what the embedded broker says: the first offset of the last batch, and one.

    The high watermark that comes with a fetch is right, so a fetch of next to nothing is made at each end.
    """
    wanted: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    for (topic, partition), offset in ends.items():
        wanted[topic].append((partition, offset, _MAX_BYTES))
    if not wanted:
        return {}
    request = FetchRequest(_WAIT_MS, 1, _MAX_BYTES, 0, list(wanted.items()), rack_id="")
    response = await client.send(client.get_random_node(), request)
    corrected = dict(ends)
    for topic, partitions in response.topics:
        for partition, code, highwater, *_ in partitions:
            if kafka.for_code(code) is kafka.NoError:
                it = KafkaTopicPartition(topic, partition)
                corrected[it] = max(highwater, corrected[it])
    return corrected


async def stable_offsets(coordinator: Any, group_id: str, partitions: Iterable[Any]) -> dict[Any, Any]:
    """The committed offsets of a group as aiokafka's coordinator of it wants them, once no transaction changes them.

    A partition without a committed offset is left out. Raises aiokafka's errors; a retriable one while a transaction
    that would change an offset is not ended yet, which Kafka sees to within its time-out.
    """
    response = await coordinator._send_req(StableOffsetFetchRequest(group_id, partitions))  # noqa: SLF001
    try:
        return _read_stable(response, group_id)
    except kafka.NotCoordinatorForGroupError:
        coordinator.coordinator_dead()
        raise


async def committed_stable_offsets(
    client: Any, group_id: str, partitions: Sequence[TopicPartition]
) -> dict[TopicPartition, int]:
    """As ``committed_offsets``, refused with a retriable error while a transaction that would change one is open."""
    coordinator = await client.coordinator_lookup(CoordinationType.GROUP, group_id)
    response = await client.send(coordinator, StableOffsetFetchRequest(group_id, partitions))
    return {TopicPartition(*it): found.offset for it, found in _read_stable(response, group_id).items()}


def _read_stable(response: Any, group_id: str) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    entries = [(topic, *entry) for topic, entries, _ in response.topics for entry in entries]
    for topic, partition, offset, _, metadata, code, _ in [*entries, ("", -1, -1, -1, "", response.error_code, {})]:
        error = kafka.for_code(code)
        if code == _UNSTABLE_OFFSET_COMMIT:
            raise kafka.GroupLoadInProgressError("a transaction that would change the offsets is not ended yet")
        if error is kafka.GroupAuthorizationFailedError:
            raise error(group_id)
        if error is not kafka.NoError and error is not kafka.UnknownTopicOrPartitionError:
            raise error()
        if offset >= 0:
            found[KafkaTopicPartition(topic, partition)] = OffsetAndMetadata(offset, metadata or "")
    return found


async def committed_offsets(
    client: Any, group_id: str, partitions: Sequence[TopicPartition]
) -> dict[TopicPartition, int]:
    """The committed offsets of a group, asked of its coordinator; raises aiokafka's errors.

    Always for partitions by name: the embedded broker cannot answer for all that a group has.
    """
    wanted: dict[str, list[int]] = defaultdict(list)
    for topic, partition in partitions:
        wanted[topic].append(partition)
    coordinator = await client.coordinator_lookup(CoordinationType.GROUP, group_id)
    response = await client.send(coordinator, OffsetFetchRequest(group_id, list(wanted.items())))
    codes = [getattr(response, "error_code", 0)]
    codes += [code for _, entries in response.topics for _, _, _, code in entries]
    for code in codes:
        error = kafka.for_code(code)
        if error is not kafka.NoError and error is not kafka.UnknownTopicOrPartitionError:
            raise error()
    return {
        TopicPartition(topic, partition): offset
        for topic, entries in response.topics
        for partition, offset, _, _ in entries
        if offset >= 0
    }


async def commit_offsets(client: Any, group_id: str, offsets: Mapping[TopicPartition, int]) -> None:
    """Commit offsets of a group without being a member of it; raises aiokafka's errors, and where it has members."""
    topics: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for (topic, partition), offset in offsets.items():
        topics[topic].append((partition, offset, ""))
    coordinator = await client.coordinator_lookup(CoordinationType.GROUP, group_id)
    request = OffsetCommitRequest(
        group_id,
        OffsetCommitRequest.DEFAULT_GENERATION_ID,
        "",
        OffsetCommitRequest.DEFAULT_RETENTION_TIME,
        list(topics.items()),
    )
    response = await client.send(coordinator, request)
    for _, entries in response.topics:
        for _, code in entries:
            error = kafka.for_code(code)
            if error is not kafka.NoError:
                raise error(group_id) if error is kafka.GroupAuthorizationFailedError else error()
