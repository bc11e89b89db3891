"""Topics and records of the in-memory broker: plain data, no I/O, nothing asynchronous."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from streamproc.broker.interface import Headers

DEFAULT_MAX_MESSAGE_BYTES = 1_048_588
"""Kafka's own default."""
BATCH_OVERHEAD = 61
"""Bytes of the header of a batch, as Kafka counts them."""
_RECORD_OVERHEAD = 8
_HEADER_OVERHEAD = 2

DEFAULT_CONFIGS = {
    "cleanup.policy": "delete",
    "max.message.bytes": str(DEFAULT_MAX_MESSAGE_BYTES),
    "message.timestamp.type": "CreateTime",
    "retention.ms": "604800000",
}


@dataclass(frozen=True, slots=True)
class MemoryRecord:
    """A record as the in-memory broker keeps it and hands it out."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...] = ()


def size_of(key: bytes | None, value: bytes | memoryview | None, headers: Headers) -> int:
    """About what a record takes in a batch; Kafka's own numbers vary by a few bytes with the lengths of numbers."""
    named = sum([len(name.encode()) + len(content or b"") + _HEADER_OVERHEAD for name, content in headers])
    return len(key or b"") + len(value or b"") + named + _RECORD_OVERHEAD


@dataclass(slots=True)
class PartitionLog:
    """The records of one partition in offset order; offsets may have gaps, as after compaction."""

    begin: int = 0
    end: int = 0
    records: list[MemoryRecord] = field(default_factory=list)

    def append(self, record: MemoryRecord) -> None:
        """Add the record with the next offset."""
        self.records.append(record)
        self.end = record.offset + 1

    def read(self, offset: int, count: int) -> Sequence[MemoryRecord]:
        """Up to ``count`` records from ``offset`` on."""
        start = self._index(offset)
        return self.records[start : start + count]

    def remove(self, offset: int) -> None:
        """Take one record out and leave a gap, as compaction does."""
        index = self._index(offset)
        if index < len(self.records) and self.records[index].offset == offset:
            del self.records[index]

    def truncate(self, offset: int) -> None:
        """Take everything before ``offset`` out, as retention does."""
        del self.records[: self._index(offset)]
        self.begin = max(self.begin, offset)

    def at_time(self, time_ms: int) -> int | None:
        """The offset of the first record at or after a time."""
        return next((record.offset for record in self.records if record.timestamp >= time_ms), None)

    def _index(self, offset: int) -> int:
        return bisect_left(self.records, offset, key=lambda record: record.offset)


@dataclass(slots=True)
class MemoryTopic:
    """A topic: its partitions, and the configurations that it sets itself."""

    partitions: list[PartitionLog]
    configs: dict[str, str] = field(default_factory=dict)

    @property
    def max_message_bytes(self) -> int:
        """The largest batch that it takes."""
        return int(self.configs.get("max.message.bytes", DEFAULT_MAX_MESSAGE_BYTES))
