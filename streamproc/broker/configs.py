"""Topic configurations over the wire: describing them, and changing single ones.

aiokafka has no IncrementalAlterConfigs, and its AlterConfigs replaces everything that it does not name. The embedded
broker understands the former only.
"""

from __future__ import annotations

from typing import Any

from aiokafka import errors as kafka
from aiokafka.protocol.admin import DescribeConfigsRequest
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import Array, Boolean, Int8, Int16, Int32, Schema, String

from streamproc.broker.connection import ask_any_broker
from streamproc.broker.interface import ConfigEntry

TOPIC = 2
"""The number of topics among Kafka's kinds of resources."""
_SET = 0
_DYNAMIC_TOPIC_CONFIG = 1


async def describe_configs(client: Any, topic: str) -> dict[str, ConfigEntry]:
    """The configurations of a topic by name; raises aiokafka's errors."""
    response = await ask_any_broker(client, DescribeConfigsRequest([(TOPIC, topic, None)]))
    entries: dict[str, ConfigEntry] = {}
    for code, message, _, _, configs in response.resources:
        error = kafka.for_code(code)
        if error is not kafka.NoError:
            raise error(message or "")
        for name, value, _, source, *_ in configs or []:
            # Version 0 says "is default" where the later ones name the source.
            own = not source if response.API_VERSION == 0 else source == _DYNAMIC_TOPIC_CONFIG
            entries[name] = ConfigEntry(value, own)
    return entries


async def set_configs(client: Any, topic: str, changes: dict[str, str]) -> None:
    """Change single configurations of a topic; raises aiokafka's errors."""
    entries = [(name, _SET, value) for name, value in changes.items()]
    request = IncrementalAlterConfigsRequest([(TOPIC, topic, entries)])
    response = await ask_any_broker(client, request)
    for code, message, _, _ in response.resources:
        error = kafka.for_code(code)
        if error is not kafka.NoError:
            raise error(message or "")


class IncrementalAlterConfigsResponse(Response):  # type: ignore[misc] # aiokafka ships no types
    """KIP-339, version 0."""

    API_KEY = 44
    API_VERSION = 0
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "resources",
            Array(
                ("error_code", Int16),
                ("error_message", String("utf-8")),
                ("resource_type", Int8),
                ("resource_name", String("utf-8")),
            ),
        ),
    )


class IncrementalAlterConfigsRequestV0(RequestStruct):  # type: ignore[misc]
    """KIP-339, version 0: resources with (name, operation, value) triples."""

    API_KEY = 44
    API_VERSION = 0
    RESPONSE_TYPE = IncrementalAlterConfigsResponse
    SCHEMA = Schema(
        (
            "resources",
            Array(
                ("resource_type", Int8),
                ("resource_name", String("utf-8")),
                (
                    "configs",
                    Array(("name", String("utf-8")), ("config_operation", Int8), ("value", String("utf-8"))),
                ),
            ),
        ),
        ("validate_only", Boolean),
    )


class IncrementalAlterConfigsRequest(Request[IncrementalAlterConfigsRequestV0]):  # type: ignore[misc]
    """Sets or deletes single configurations."""

    API_KEY = 44

    def __init__(self, resources: list[Any]) -> None:
        self._resources = resources

    def build(self, request_struct_class: type[IncrementalAlterConfigsRequestV0]) -> Any:
        """The request in the version that the broker understands."""
        return request_struct_class(self._resources, False)
