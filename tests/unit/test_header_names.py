"""Records whose header names are no UTF-8 are read, each once and in order, among others."""

from __future__ import annotations

from typing import Any

import pytest
from aiokafka.consumer import fetcher
from aiokafka.record.default_records import _DefaultRecordBatchBuilderPy
from aiokafka.record.memory_records import MemoryRecords
from aiokafka.structs import TopicPartition as KafkaTopicPartition
from hypothesis import given, settings
from hypothesis import strategies as st

from streamproc.broker import header_names
from tests.support.header_names import RawName

NAMES = [b"good", b"\xff\xfe", b"", b"ok\xc3", "naïve".encode()]


def fetched(batches: list[list[list[bytes]]], *, compression: int = 0) -> bytes:
    data, offset = b"", 0
    for records in batches:
        builder = _DefaultRecordBatchBuilderPy(2, compression, 0, -1, -1, 0, 100_000)
        for index, names in enumerate(records):
            headers = [(RawName(name), b"1") for name in names]
            builder.append(index, 1, b"key", b"%d" % (offset + index), headers)
        builder.set_producer_state(-1, -1, -1)
        batch = bytearray(builder.build())
        batch[:8] = offset.to_bytes(8, "big")
        data += bytes(batch)
        offset += len(records)
    return data


def read(data: bytes, *, first: int = 0) -> list[Any]:
    header_names.install()
    options = {"key_deserializer": None, "value_deserializer": None, "check_crcs": True, "isolation_level": 0}
    records = fetcher.MemoryRecords(data)
    return list(fetcher.PartitionRecords(KafkaTopicPartition("in", 0), records, [], first, **options))


@given(
    batches=st.lists(
        st.lists(st.lists(st.sampled_from(NAMES), max_size=2), min_size=1, max_size=4), min_size=1, max_size=3
    ),
    first=st.integers(0, 3),
    compression=st.sampled_from([0, 1, 3]),
)
@settings(max_examples=60, deadline=None)
def test_every_record_comes_once_in_order_whatever_its_headers_are_called(
    batches: list[list[list[bytes]]], first: int, compression: int
) -> None:
    names = [it for records in batches for it in records]
    first %= len(batches[0])  # Kafka begins with the batch that holds the offset
    found = read(fetched(batches, compression=compression), first=first)
    assert [record.offset for record in found] == list(range(first, len(names)))
    assert [record.value for record in found] == [b"%d" % offset for offset in range(first, len(names))]
    for record in found:
        expected = tuple((name.decode(errors="backslashreplace"), b"1") for name in names[record.offset])
        assert record.headers == expected


def of_transaction(producer: int, offset: int, name: bytes | None) -> bytes:
    """A record with a header of this name, or the mark that the producer's transaction is aborted."""
    builder = _DefaultRecordBatchBuilderPy(2, 0, 1, producer, 0, 0, 100_000)
    if name is None:
        builder.append(0, 1, b"\0\0\0\0", b"\0" * 6, [])
    else:
        builder.append(0, 1, None, b"%d" % offset, [(RawName(name), b"1")])
    builder.set_producer_state(producer, 0, 0)
    batch = bytearray(builder.build())
    batch[:8] = offset.to_bytes(8, "big")
    batch[22] |= 0x20 if name is None else 0
    return bytes(batch)


@given(
    before=st.lists(st.tuples(st.sampled_from([5, 6]), st.sampled_from(NAMES)), max_size=4),
    after=st.lists(st.tuples(st.sampled_from([5, 6]), st.sampled_from(NAMES)), max_size=4),
)
@settings(max_examples=100, deadline=None)
def test_what_was_aborted_is_passed_over_whatever_its_headers_are_called(
    before: list[tuple[int, bytes]], after: list[tuple[int, bytes]]
) -> None:
    """Producer 5 aborts its first transaction; 6, and 5 later on, commit."""
    header_names.install()
    batches = [*before, (5, None), *after]
    data = b"".join(of_transaction(producer, offset, name) for offset, (producer, name) in enumerate(batches))
    aborted = [(5, offset) for offset, (producer, _) in enumerate(before) if producer == 5][:1]
    options = {"key_deserializer": None, "value_deserializer": None, "check_crcs": False, "isolation_level": 1}
    records = fetcher.MemoryRecords(data)
    found = list(fetcher.PartitionRecords(KafkaTopicPartition("in", 0), records, aborted, 0, **options))
    committed = [
        (offset, name.decode(errors="backslashreplace"))
        for offset, (producer, name) in enumerate(batches)
        if name is not None and (producer == 6 or offset > len(before))
    ]
    assert [(record.offset, record.headers[0][0]) for record in found] == committed


def test_without_it_aiokafka_stops_at_such_a_record() -> None:
    """Once this fails, ``header_names`` can go."""
    batch = MemoryRecords(fetched([[[b"\xff"]]])).next_batch()
    with pytest.raises(UnicodeDecodeError):
        next(iter(batch))
