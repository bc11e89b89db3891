"""Two requests of transactions that aiokafka has in older versions only, which know nothing of a group's generation.

TxnOffsetCommit, version 3 (KIP-447), commits offsets with the member's id and generation, so that a member that has
lost its partitions cannot commit them. OffsetFetch, version 7, can wait for offsets that a transaction has left open.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import Boolean, CompactArray, CompactString, Int16, Int32, Int64, Schema, TaggedFields

from streamproc.broker.interface import Membership
from streamproc.records import TopicPartition

_TXN_OFFSET_COMMIT = 28
_OFFSET_FETCH = 9
_NO_LEADER_EPOCH = -1


class TxnOffsetCommitResponse(Response):  # type: ignore[misc] # aiokafka ships no types
    """Version 3."""

    API_KEY = _TXN_OFFSET_COMMIT
    API_VERSION = 3
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "topics",
            CompactArray(
                ("name", CompactString("utf-8")),
                (
                    "partitions",
                    CompactArray(("partition", Int32), ("error_code", Int16), ("tags", TaggedFields)),
                ),
                ("tags", TaggedFields),
            ),
        ),
        ("tags", TaggedFields),
    )


class TxnOffsetCommitRequestV3(RequestStruct):  # type: ignore[misc]
    """Version 3."""

    FLEXIBLE_VERSION = True
    API_KEY = _TXN_OFFSET_COMMIT
    API_VERSION = 3
    RESPONSE_TYPE = TxnOffsetCommitResponse
    SCHEMA = Schema(
        ("transactional_id", CompactString("utf-8")),
        ("group_id", CompactString("utf-8")),
        ("producer_id", Int64),
        ("producer_epoch", Int16),
        ("generation_id", Int32),
        ("member_id", CompactString("utf-8")),
        ("group_instance_id", CompactString("utf-8")),
        (
            "topics",
            CompactArray(
                ("name", CompactString("utf-8")),
                (
                    "partitions",
                    CompactArray(
                        ("partition", Int32),
                        ("offset", Int64),
                        ("leader_epoch", Int32),
                        ("metadata", CompactString("utf-8")),
                        ("tags", TaggedFields),
                    ),
                ),
                ("tags", TaggedFields),
            ),
        ),
        ("tags", TaggedFields),
    )


class TxnOffsetCommitRequest(Request[TxnOffsetCommitRequestV3]):  # type: ignore[misc]
    """Commits offsets as a part of a transaction, for a member of a group in its generation."""

    API_KEY = _TXN_OFFSET_COMMIT

    def __init__(
        self,
        transactional_id: str,
        producer: tuple[int, int],
        member: Membership,
        offsets: Mapping[TopicPartition, int],
    ) -> None:
        self._transactional_id = transactional_id
        self._producer = producer
        self._member = member
        self._offsets = offsets

    def build(self, request_struct_class: type[TxnOffsetCommitRequestV3]) -> Any:
        """The request in the version that the broker understands."""
        topics: defaultdict[str, list[Any]] = defaultdict(list)
        for (topic, partition), offset in self._offsets.items():
            topics[topic].append((partition, offset, _NO_LEADER_EPOCH, "", {}))
        member = self._member
        return request_struct_class(
            self._transactional_id,
            member.group_id,
            *self._producer,
            member.generation,
            member.member_id,
            member.instance_id,
            [(topic, partitions, {}) for topic, partitions in topics.items()],
            {},
        )


class StableOffsetFetchResponse(Response):  # type: ignore[misc]
    """Version 7."""

    API_KEY = _OFFSET_FETCH
    API_VERSION = 7
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "topics",
            CompactArray(
                ("name", CompactString("utf-8")),
                (
                    "partitions",
                    CompactArray(
                        ("partition", Int32),
                        ("offset", Int64),
                        ("leader_epoch", Int32),
                        ("metadata", CompactString("utf-8")),
                        ("error_code", Int16),
                        ("tags", TaggedFields),
                    ),
                ),
                ("tags", TaggedFields),
            ),
        ),
        ("error_code", Int16),
        ("tags", TaggedFields),
    )


class StableOffsetFetchRequestV7(RequestStruct):  # type: ignore[misc]
    """Version 7."""

    FLEXIBLE_VERSION = True
    API_KEY = _OFFSET_FETCH
    API_VERSION = 7
    RESPONSE_TYPE = StableOffsetFetchResponse
    SCHEMA = Schema(
        ("group_id", CompactString("utf-8")),
        (
            "topics",
            CompactArray(("name", CompactString("utf-8")), ("partitions", CompactArray(Int32)), ("tags", TaggedFields)),
        ),
        ("require_stable", Boolean),
        ("tags", TaggedFields),
    )


class StableOffsetFetchRequest(Request[StableOffsetFetchRequestV7]):  # type: ignore[misc]
    """The committed offsets of a group, refused while a transaction that is not ended yet would change them."""

    API_KEY = _OFFSET_FETCH

    def __init__(self, group_id: str, partitions: Iterable[tuple[str, int]]) -> None:
        self._group_id = group_id
        self._partitions = list(partitions)

    def build(self, request_struct_class: type[StableOffsetFetchRequestV7]) -> Any:
        """The request in the version that the broker understands."""
        topics: defaultdict[str, list[int]] = defaultdict(list)
        for topic, partition in self._partitions:
            topics[topic].append(partition)
        return request_struct_class(
            self._group_id, [(topic, partitions, {}) for topic, partitions in topics.items()], True, {}
        )


def are_known(connection: Any) -> bool:
    """Whether the broker at the other end knows these requests, as Kafka does since 2.5."""
    versions = connection._versions  # noqa: SLF001 - aiokafka keeps what it was told there
    ranges = [(it, *versions.get(it.API_KEY, (0, -1))) for it in (TxnOffsetCommitRequestV3, StableOffsetFetchRequestV7)]
    return all(first <= it.API_VERSION <= last for it, first, last in ranges)
