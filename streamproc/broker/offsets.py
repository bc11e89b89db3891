"""Questions about offsets that aiokafka does not ask, or that the embedded broker answers wrongly."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from aiokafka import errors as kafka
from aiokafka.client import CoordinationType
from aiokafka.protocol.commit import OffsetFetchRequest
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.structs import TopicPartition as KafkaTopicPartition

from streamproc.records import TopicPartition

_WAIT_MS = 10
_MAX_BYTES = 1


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
