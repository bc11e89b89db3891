"""Watches the topics of a client: whether they are there, are still the same ones, and how many partitions they have.

aiokafka knows a topic by its name alone. One that was deleted and created anew is the old one to it, so that it would
go on reading at the old one's offset, past records that nobody has seen. Kafka gives every topic an id (2.8 and newer;
with older ones nothing is watched).

What follows from it is different for the two sides. An input topic that has gone, or is another one, ends the reading:
there is no telling what of it was lost. An output topic that has gone is waited for, since what is to be written to it
is still here: for ``kafka.request_timeout_ms``, or not at all where what is written can be lost.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from io import BytesIO
from typing import Any, NamedTuple

from aiokafka import errors as kafka
from aiokafka.protocol.abstract import AbstractType
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import Boolean, CompactArray, CompactString, Int16, Int32, Schema, TaggedFields

from streamproc.broker.connection import ask_any_broker
from streamproc.broker.translation import missing
from streamproc.errors import BrokerError, TopicMissingError
from streamproc.settings import KafkaSettings

WATCH_EVERY_S = 3.0
LOOKS = 2
"""So often a topic has to be missing, one time after the other: a broker may hear of a new topic late."""
_METADATA = 3
_UNKNOWN_TOPIC_OR_PARTITION = 3
_NO_ID = bytes(16)

log = logging.getLogger(__name__)


class TopicState(NamedTuple):
    """A topic as it is now."""

    topic_id: bytes
    partitions: int


Found = Mapping[str, TopicState | None]
"""Topics by name; None for one that does not exist. One that could not be looked at is left out."""


class _Uuid(AbstractType[bytes]):  # type: ignore[misc] # aiokafka ships no types
    @classmethod
    def encode(cls, value: bytes) -> bytes:
        return value

    @classmethod
    def decode(cls, data: BytesIO) -> bytes:
        return data.read(len(_NO_ID))


class TopicIdsResponse(Response):  # type: ignore[misc]
    """Metadata, version 10."""

    API_KEY = _METADATA
    API_VERSION = 10
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "brokers",
            CompactArray(
                ("node_id", Int32),
                ("host", CompactString("utf-8")),
                ("port", Int32),
                ("rack", CompactString("utf-8")),
                ("tags", TaggedFields),
            ),
        ),
        ("cluster_id", CompactString("utf-8")),
        ("controller_id", Int32),
        (
            "topics",
            CompactArray(
                ("error_code", Int16),
                ("name", CompactString("utf-8")),
                ("topic_id", _Uuid),
                ("is_internal", Boolean),
                (
                    "partitions",
                    CompactArray(
                        ("error_code", Int16),
                        ("partition", Int32),
                        ("leader", Int32),
                        ("leader_epoch", Int32),
                        ("replicas", CompactArray(Int32)),
                        ("isr", CompactArray(Int32)),
                        ("offline", CompactArray(Int32)),
                        ("tags", TaggedFields),
                    ),
                ),
                ("authorized_operations", Int32),
                ("tags", TaggedFields),
            ),
        ),
        ("cluster_authorized_operations", Int32),
        ("tags", TaggedFields),
    )


class TopicIdsRequestV10(RequestStruct):  # type: ignore[misc]
    """Metadata, version 10."""

    FLEXIBLE_VERSION = True
    API_KEY = _METADATA
    API_VERSION = 10
    RESPONSE_TYPE = TopicIdsResponse
    SCHEMA = Schema(
        ("topics", CompactArray(("topic_id", _Uuid), ("name", CompactString("utf-8")), ("tags", TaggedFields))),
        ("allow_auto_topic_creation", Boolean),
        ("include_cluster_authorized_operations", Boolean),
        ("include_topic_authorized_operations", Boolean),
        ("tags", TaggedFields),
    )


class TopicIdsRequest(Request[TopicIdsRequestV10]):  # type: ignore[misc]
    """Asks for topics by name, with their ids, and creates none."""

    API_KEY = _METADATA

    def __init__(self, topics: Iterable[str]) -> None:
        self._topics = list(topics)

    def build(self, request_struct_class: type[TopicIdsRequestV10]) -> Any:
        """The request in the version that the broker understands."""
        return request_struct_class([(_NO_ID, topic, {}) for topic in self._topics], False, False, False, {})


async def look_at_topics(client: Any, topics: Collection[str]) -> Found:
    """The topics as a broker has them now. Raises aiokafka's errors; NotImplementedError for a broker without ids."""
    response = await ask_any_broker(client, TopicIdsRequest(topics))
    found: dict[str, TopicState | None] = {}
    for code, name, topic_id, _, partitions, *_ in response.topics:
        if code == _UNKNOWN_TOPIC_OR_PARTITION:
            found[name] = None
        elif kafka.for_code(code) is kafka.NoError:
            found[name] = TopicState(topic_id, len(partitions))
    return found


async def watch_topics(
    client: Callable[[], Any], topics: Callable[[], Collection[str]], seen: Callable[[Found], None]
) -> None:
    """Look at the topics every few seconds; while the cluster does not answer, nothing is seen."""
    while True:
        if wanted := topics():
            try:
                seen(await look_at_topics(client(), wanted))
            except NotImplementedError:
                return
            except (kafka.KafkaError, OSError) as error:
                log.debug("the topics cannot be looked at: %r", error)
        await asyncio.sleep(WATCH_EVERY_S)


class InputTopics:
    """What becomes of the topics that a consumer reads. Passive."""

    def __init__(self, settings: KafkaSettings) -> None:
        self._settings = settings
        self._known: dict[str, TopicState] = {}
        self._misses: Counter[str] = Counter()

    def seen(self, found: Found) -> set[str]:
        """Take a look; the topics that have more partitions than before. Raises TopicMissingError."""
        grown = set()
        for topic, state in found.items():
            if state is None:
                self._misses[topic] += 1
                if self._misses[topic] >= LOOKS:
                    raise self._gone(topic, "does not exist any more")
                continue
            del self._misses[topic]
            known = self._known.setdefault(topic, state)
            if known.topic_id != state.topic_id:
                raise self._gone(topic, "was deleted and created anew while it was read")
            if state.partitions > known.partitions:
                grown.add(topic)
                self._known[topic] = state
                log.info("topic %s has %d partitions now, and had %d", topic, state.partitions, known.partitions)
        return grown

    def _gone(self, topic: str, what: str) -> TopicMissingError:
        where = self._settings.bootstrap_servers
        return TopicMissingError(
            f"topic {topic} {what}, at {where}; nothing more is committed: see that it is the right one, or create it "
            f"with `streamproc topics apply`, and start again",
            topics=[topic],
            bootstrap_servers=where,
        )


class OutputTopics:
    """What becomes of the topics that a producer writes to. Passive; ``clock`` does not go back."""

    def __init__(self, settings: KafkaSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self._known: dict[str, TopicState] = {}
        self._missing: dict[str, tuple[float, int]] = {}
        """Since when topics are missing, or have fewer partitions than before; and how many they have now."""

    def seen(self, found: Found) -> None:
        """Take a look."""
        limit_ms = self._settings.request_timeout_ms
        for topic, state in found.items():
            known = self._known.get(topic)
            if state is None or (known is not None and state.partitions < known.partitions):
                if topic not in self._missing:
                    self._missing[topic] = (self._clock(), 0)
                    log.warning(
                        "topic %s %s; what is to be written to it waits for it, at most kafka.request_timeout_ms "
                        "(%d ms)",
                        *(topic, "does not exist any more" if state is None else "has fewer partitions than before"),
                        limit_ms,
                    )
                since, _ = self._missing[topic]
                self._missing[topic] = (since, 0 if state is None else state.partitions)
                continue
            self._known[topic] = state
            if self._missing.pop(topic, None) is not None:
                log.warning("topic %s is there again", topic)
            elif known is not None and known.topic_id != state.topic_id:
                log.warning("topic %s was deleted and created anew; what was written to it before is gone", topic)
            if known is not None and state.partitions > known.partitions:
                log.info(
                    "topic %s has %d partitions now, and had %d; the first %d are written to until the next start, so "
                    "that keys keep their partitions",
                    *(topic, state.partitions, known.partitions, known.partitions),
                )

    def is_missing(self, topic: str) -> bool:
        """Whether it was not there at the last look."""
        return topic in self._missing

    def is_hopeless(self, topic: str, *, patient: bool) -> bool:
        """Whether it is not to be waited for any longer."""
        if topic not in self._missing:
            return False
        since, _ = self._missing[topic]
        return not patient or self._clock() - since >= self._settings.request_timeout_ms / 1_000

    def error(self, topic: str) -> BrokerError:
        """Why nothing can be written to a missing topic."""
        _, partitions = self._missing[topic]
        if partitions == 0:
            return missing([topic], self._settings)
        count = self._known[topic].partitions
        return BrokerError(
            f"topic {topic} has {partitions} partition{'' if partitions == 1 else 's'} and had {count}; add partitions "
            f"with `streamproc topics apply`, or start again",
            bootstrap_servers=self._settings.bootstrap_servers,
        )
