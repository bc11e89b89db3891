r"""How records leave aiokafka's fetches: as its extension made them, and whatever their header names are.

For consumers that ask for it (``UNTOUCHED`` as their ``key_deserializer``) records are handed out as aiokafka's parser
in C makes them, one of Kafka's batches after the other. aiokafka itself makes another object of each, with topic and
partition in it, and passes each through a generator, which is two thirds of what its reading costs.

aiokafka cannot read header names that are no UTF-8, which any producer may write: it raises in the middle of a fetch,
at every attempt, so that one such record would stop every consumer of its partition for good. Here what is left of the
fetch is read again by aiokafka's own parser in Python, with escapes (``\xff``) in place of the bytes that are no text.
Fetches without such records are read as ever.

Invariant: no record is left out and none comes twice; reading goes on after the last one that was handed out.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple, SupportsIndex

from aiokafka.consumer import fetcher
from aiokafka.record.default_records import _DefaultRecordBatchPy
from aiokafka.record.legacy_records import LegacyRecordBatch
from aiokafka.record.memory_records import MemoryRecords, _MemoryRecordsPy
from aiokafka.record.util import decode_varint_py

log = logging.getLogger(__name__)
_said: set[Any] = set()
"""Partitions that were warned of, once each."""


def UNTOUCHED(key: bytes | None) -> bytes | None:  # noqa: N802 - a mark, which aiokafka wants to be callable
    """The ``key_deserializer`` of a consumer that wants records as they are, without their topic and partition."""
    return key


def install() -> None:
    """Let aiokafka's consumers of this process read such records."""
    fetcher.MemoryRecords = _Records
    fetcher.PartitionRecords = _partition_records
    fetcher.FetchResult = _FetchResult


def _partition_records(
    tp: Any, records: _Records, aborted: Any, fetch_offset: int, key_deserializer: Any, *others: Any, **named: Any
) -> Any:
    kind = _UntouchedRecords if key_deserializer is UNTOUCHED else _PartitionRecords
    return kind(tp, records, aborted, fetch_offset, key_deserializer, *others, **named)


class _Records:
    """aiokafka's batches of a fetch, and the bytes that they are made of."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        inner = MemoryRecords(data)
        self.has_next = inner.has_next
        self.next_batch = inner.next_batch
        self.size_in_bytes = inner.size_in_bytes


_AiokafkasPartitionRecords: Any = fetcher.PartitionRecords
_AiokafkasFetchResult: Any = fetcher.FetchResult


class _PartitionRecords(_AiokafkasPartitionRecords):  # type: ignore[misc] # aiokafka ships no types
    """aiokafka's records of one partition's fetch."""

    def __init__(self, tp: Any, records: _Records, *others: Any, **named: Any) -> None:
        self._data = records.data
        super().__init__(tp, records, *others, **named)

    def __next__(self) -> Any:
        try:
            return super().__next__()
        except UnicodeDecodeError:
            if self._tp not in _said:
                _said.add(self._tp)
                log.warning(
                    "topic %s, partition %d, from offset %d: header names that are no UTF-8 are read with escapes",
                    *(self._tp.topic, self._tp.partition, self.next_fetch_offset),
                )
            # From this batch on, since what is known of transactions holds for it; within it aiokafka passes over what
            # was handed out.
            self._records = self._as_read(_EscapingRecords(self._data, self.next_fetch_offset))
            self._records_iterator = self._unpack_records()
            return super().__next__()

    def _as_read(self, batches: Any) -> Any:
        """Kafka's batches as aiokafka is to see them."""
        return batches


class _Run(NamedTuple):
    """Records of one of Kafka's batches, in the place of one record."""

    offset: int
    """That of the last one."""
    records: list[Any]


class _WholeBatches:
    """Kafka's batches of a fetch, each of which gives its records in one piece."""

    def __init__(self, batches: Any, wanted: int) -> None:
        self._batches = batches
        self._wanted = wanted
        self.has_next = batches.has_next

    def next_batch(self) -> _WholeBatch:
        """The next one."""
        return _WholeBatch(self._batches.next_batch(), self._wanted)


class _WholeBatch:
    """One of Kafka's batches, which gives its records in one piece."""

    def __init__(self, batch: Any, wanted: int) -> None:
        self._batch = batch
        self._wanted = wanted

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)

    def __next__(self) -> Any:
        return next(self._batch)

    def __iter__(self) -> Iterator[_Run]:
        records = list(self._batch)
        if records and records[0].offset < self._wanted:
            # A fetch begins with the batch that holds the offset that was asked for.
            records = [record for record in records if record.offset >= self._wanted]
        if records:
            yield _Run(records[-1].offset, records)


class _UntouchedRecords(_PartitionRecords):
    """The records of one partition's fetch as aiokafka's parser made them.

    Which batches count (transactions, control batches, checksums) is left to aiokafka, for which each is one record.
    """

    next_fetch_offset: int

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._records = self._as_read(self._records)
        self._left: list[Any] = []
        """What was not taken yet of the current batch."""
        self._behind = self.next_fetch_offset
        """The offset behind the current batch's last record."""

    def take(self, most: int | None) -> tuple[list[Any], bool]:
        """At most so many records, and whether there may be more."""
        taken: list[Any] = []
        while most is None or len(taken) < most:
            if not self._left:
                # What was taken of a batch is all of it now: aiokafka goes on behind its end.
                self.next_fetch_offset = self._behind
                run = next(self, None)
                if run is None:
                    return taken, False
                self._left, self._behind = run.records, self.next_fetch_offset
            room = len(self._left) if most is None else most - len(taken)
            taken += self._left[:room]
            self._left = self._left[room:]
        self.next_fetch_offset = taken[-1].offset + 1
        return taken, True

    def _consumer_record(self, tp: Any, record: Any) -> Any:  # noqa: ARG002 - aiokafka's signature
        return record

    def _as_read(self, batches: Any) -> _WholeBatches:
        # No reference to this object: a cycle would keep a megabyte until Python looks for cycles, which is seldom.
        return _WholeBatches(batches, self.next_fetch_offset)


class _FetchResult(_AiokafkasFetchResult):  # type: ignore[misc] # as above
    """aiokafka's fetch of one partition, from which records can be taken in one piece."""

    _partition_records: Any

    def getall(self, max_records: int | None = None) -> list[Any]:
        """At most so many records."""
        records = self._partition_records
        if not isinstance(records, _UntouchedRecords):
            found: list[Any] = super().getall(max_records)
            return found
        if not self.check_assignment(self._topic_partition):
            return []
        taken, more = records.take(max_records)
        self._update_position()
        if not more:
            self._partition_records = None
        return taken


class _EscapingRecords(_MemoryRecordsPy):  # type: ignore[misc] # as above
    def __init__(self, data: bytes, offset: int) -> None:
        super().__init__(data)
        while self.has_next() and self._peek().next_offset <= offset:
            self._cache_next()

    def next_batch(self) -> Any:
        batch = self._peek()
        self._cache_next()
        return batch

    def _peek(self) -> Any:
        content = self._next_slice
        magic = content[self.MAGIC_OFFSET]
        return _EscapingBatch(content) if magic >= 2 else LegacyRecordBatch(content, magic)


class _EscapingBatch(_DefaultRecordBatchPy):  # type: ignore[misc] # as above
    _buffer: Any

    def _maybe_uncompress(self) -> None:
        super()._maybe_uncompress()
        self._buffer = _Escaping(self._buffer)

    def _read_msg(self) -> Any:
        return super()._read_msg(decode_varint_py)  # the one in C takes plain bytes only


class _Escaping(bytearray):
    """Bytes whose parts are text in any case."""

    def __getitem__(self, key: SupportsIndex | slice) -> Any:
        found = super().__getitem__(key)
        return _Escaping(found) if isinstance(found, bytearray) else found

    def decode(self, encoding: str = "utf-8", errors: str = "backslashreplace") -> str:
        """The text."""
        return super().decode(encoding, errors)
