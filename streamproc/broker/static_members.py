"""Static members of a group: two requests that say who asks, so that of two replicas with one name one learns of it.

aiokafka sends heartbeats and commits without the member's ``group.instance.id``. A broker answers those of a member
whose name was taken over as it does those of any unknown member, and aiokafka joins anew, which takes the name back:
the two would go on like that without end. Asked with the name it answers that the member is fenced (KIP-345).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.commit import OffsetCommitRequest
from aiokafka.protocol.group import HeartbeatRequest
from aiokafka.protocol.types import Array, Int16, Int32, Int64, Schema, String

FENCED_INSTANCE_ID = 82
_HEARTBEAT = 12
_OFFSET_COMMIT = 8
_NO_LEADER_EPOCH = -1


class StaticHeartbeatResponse(Response):  # type: ignore[misc] # aiokafka ships no types
    """Version 3."""

    API_KEY = _HEARTBEAT
    API_VERSION = 3
    SCHEMA = Schema(("throttle_time_ms", Int32), ("error_code", Int16))


class StaticHeartbeatRequestV3(RequestStruct):  # type: ignore[misc]
    """Version 3."""

    API_KEY = _HEARTBEAT
    API_VERSION = 3
    RESPONSE_TYPE = StaticHeartbeatResponse
    SCHEMA = Schema(
        ("group", String("utf-8")),
        ("generation_id", Int32),
        ("member_id", String("utf-8")),
        ("group_instance_id", String("utf-8")),
    )


class StaticHeartbeatRequest(Request[StaticHeartbeatRequestV3]):  # type: ignore[misc]
    """A heartbeat with the member's name."""

    API_KEY = _HEARTBEAT

    def __init__(self, plain: HeartbeatRequest, instance_id: str) -> None:
        self._plain = plain
        self._instance_id = instance_id

    def build(self, request_struct_class: type[StaticHeartbeatRequestV3]) -> Any:
        """The request in the version that the broker understands."""
        it = self._plain
        return request_struct_class(it._group, it._generation_id, it._member_id, self._instance_id)  # noqa: SLF001


class StaticOffsetCommitResponse(Response):  # type: ignore[misc]
    """Version 7."""

    API_KEY = _OFFSET_COMMIT
    API_VERSION = 7
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "topics",
            Array(("topic", String("utf-8")), ("partitions", Array(("partition", Int32), ("error_code", Int16)))),
        ),
    )


class StaticOffsetCommitRequestV7(RequestStruct):  # type: ignore[misc]
    """Version 7."""

    API_KEY = _OFFSET_COMMIT
    API_VERSION = 7
    RESPONSE_TYPE = StaticOffsetCommitResponse
    SCHEMA = Schema(
        ("group", String("utf-8")),
        ("generation_id", Int32),
        ("member_id", String("utf-8")),
        ("group_instance_id", String("utf-8")),
        (
            "topics",
            Array(
                ("topic", String("utf-8")),
                (
                    "partitions",
                    Array(
                        ("partition", Int32),
                        ("offset", Int64),
                        ("leader_epoch", Int32),
                        ("metadata", String("utf-8")),
                    ),
                ),
            ),
        ),
    )


class StaticOffsetCommitRequest(Request[StaticOffsetCommitRequestV7]):  # type: ignore[misc]
    """A commit with the member's name."""

    API_KEY = _OFFSET_COMMIT

    def __init__(self, plain: OffsetCommitRequest, instance_id: str) -> None:
        self._plain = plain
        self._instance_id = instance_id

    def build(self, request_struct_class: type[StaticOffsetCommitRequestV7]) -> Any:
        """The request in the version that the broker understands."""
        it = self._plain
        return request_struct_class(
            it._consumer_group,  # noqa: SLF001 - aiokafka's, which has no other way in
            it._consumer_group_generation_id,  # noqa: SLF001
            it._consumer_id,  # noqa: SLF001
            self._instance_id,
            [
                (topic, [(partition, offset, _NO_LEADER_EPOCH, text) for partition, offset, text in partitions])
                for topic, partitions in it._topics  # noqa: SLF001
            ],
        )


def name_member(coordinator: Any, instance_id: str, on_fenced: Callable[[], None]) -> None:
    """Let aiokafka's coordinator of a group say who asks; ``on_fenced`` once another member has the name."""
    send: Callable[[Any], Awaitable[Any]] = coordinator._send_req  # noqa: SLF001

    async def send_named(request: Any) -> Any:
        if isinstance(request, HeartbeatRequest):
            request = StaticHeartbeatRequest(request, instance_id)
        elif isinstance(request, OffsetCommitRequest):
            request = StaticOffsetCommitRequest(request, instance_id)
        response = await send(request)
        if FENCED_INSTANCE_ID in _codes(response):
            on_fenced()
        return response

    coordinator._send_req = send_named  # noqa: SLF001


def _codes(response: Any) -> Iterator[int]:
    """The error codes of an answer to one of a member's requests."""
    if isinstance(response, StaticOffsetCommitResponse):
        yield from (code for _, partitions in response.topics for _, code in partitions)
    else:
        yield getattr(response, "error_code", 0)
