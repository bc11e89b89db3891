r"""Reads records with header names that are no UTF-8, which any producer may write and aiokafka cannot read.

aiokafka raises in the middle of a fetch, at every attempt: one such record would stop every consumer of its partition
for good. Here what is left of the fetch is read again by aiokafka's own parser in Python, with escapes (``\xff``) in
place of the bytes that are no text. Fetches without such records are read as ever.

Invariant: no record is left out and none comes twice; reading goes on after the last one that was handed out.
"""

from __future__ import annotations

import logging
from typing import Any, SupportsIndex

from aiokafka.consumer import fetcher
from aiokafka.record.default_records import _DefaultRecordBatchPy
from aiokafka.record.legacy_records import LegacyRecordBatch
from aiokafka.record.memory_records import MemoryRecords, _MemoryRecordsPy
from aiokafka.record.util import decode_varint_py

log = logging.getLogger(__name__)
_said: set[Any] = set()
"""Partitions that were warned of, once each."""


def install() -> None:
    """Let aiokafka's consumers of this process read such records."""
    fetcher.MemoryRecords = _Records
    fetcher.PartitionRecords = _PartitionRecords


class _Records:
    """aiokafka's batches of a fetch, and the bytes that they are made of."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        inner = MemoryRecords(data)
        self.has_next = inner.has_next
        self.next_batch = inner.next_batch
        self.size_in_bytes = inner.size_in_bytes


_AiokafkasPartitionRecords: Any = fetcher.PartitionRecords


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
            self._records = _EscapingRecords(self._data, self.next_fetch_offset)
            self._records_iterator = self._unpack_records()
            return super().__next__()


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
