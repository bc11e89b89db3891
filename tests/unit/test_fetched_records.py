"""Records are handed out once each and in order, whatever their header names are, and in whatever pieces."""

from __future__ import annotations

import gc
import itertools
import weakref
from typing import Any

import pytest
from aiokafka.consumer import fetcher
from aiokafka.record.default_records import _DefaultRecordBatchBuilderPy
from aiokafka.record.memory_records import MemoryRecords
from aiokafka.structs import TopicPartition as KafkaTopicPartition
from hypothesis import given, settings
from hypothesis import strategies as st

from streamproc.broker import fetched_records
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


def opened(
    data: bytes,
    *,
    first: int = 0,
    untouched: bool = False,
    aborted: list[tuple[int, int]] | None = None,
    isolation_level: int = 0,
) -> Any:
    fetched_records.install()
    key = fetched_records.UNTOUCHED if untouched else None
    options = {"key_deserializer": key, "value_deserializer": None, "check_crcs": not aborted}
    records = fetcher.MemoryRecords(data)
    of = KafkaTopicPartition("in", 0)
    return fetcher.PartitionRecords(of, records, aborted or [], first, **options, isolation_level=isolation_level)


def in_pieces(records: Any, pieces: list[int]) -> list[Any]:
    """Take everything, in pieces of these sizes over and over."""
    found: list[Any] = []
    sizes = itertools.cycle(pieces)
    more = True
    while more:
        size = next(sizes)
        taken, more = records.take(size)
        assert len(taken) == size if more else len(taken) <= size
        found += taken
        if more:
            assert records.next_fetch_offset == taken[-1].offset + 1
    return found


@given(
    batches=st.lists(
        st.lists(st.lists(st.sampled_from(NAMES), max_size=2), min_size=1, max_size=4), min_size=1, max_size=3
    ),
    first=st.integers(0, 3),
    compression=st.sampled_from([0, 1, 3]),
    pieces=st.lists(st.integers(1, 5), min_size=1, max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_every_record_comes_once_in_order_whatever_its_headers_are_called(
    batches: list[list[list[bytes]]], first: int, compression: int, pieces: list[int]
) -> None:
    names = [it for records in batches for it in records]
    first %= len(batches[0])  # Kafka begins with the batch that holds the offset
    data = fetched(batches, compression=compression)
    untouched = opened(data, first=first, untouched=True)
    for found in (list(opened(data, first=first)), in_pieces(untouched, pieces)):
        assert [record.offset for record in found] == list(range(first, len(names)))
        assert [record.value for record in found] == [b"%d" % offset for offset in range(first, len(names))]
        for record in found:
            expected = [(name.decode(errors="backslashreplace"), b"1") for name in names[record.offset]]
            assert list(record.headers) == expected
    assert untouched.next_fetch_offset == len(names)


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
    pieces=st.lists(st.integers(1, 3), min_size=1, max_size=3),
)
@settings(max_examples=100, deadline=None)
def test_what_was_aborted_is_passed_over_whatever_its_headers_are_called(
    before: list[tuple[int, bytes]], after: list[tuple[int, bytes]], pieces: list[int]
) -> None:
    """Producer 5 aborts its first transaction; 6, and 5 later on, commit."""
    batches = [*before, (5, None), *after]
    data = b"".join(of_transaction(producer, offset, name) for offset, (producer, name) in enumerate(batches))
    aborted = [(5, offset) for offset, (producer, _) in enumerate(before) if producer == 5][:1]
    given: dict[str, Any] = {"aborted": [*aborted, (7, 0)], "isolation_level": 1}
    committed = [
        (offset, name.decode(errors="backslashreplace"))
        for offset, (producer, name) in enumerate(batches)
        if name is not None and (producer == 6 or offset > len(before))
    ]
    for found in (list(opened(data, **given)), in_pieces(opened(data, untouched=True, **given), pieces)):
        assert [(record.offset, record.headers[0][0]) for record in found] == committed


def test_a_fetch_that_was_read_leaves_memory_at_once() -> None:
    """In a cycle its megabyte would stay until Python looks for cycles, which is seldom."""
    gc.disable()
    try:
        records = opened(fetched([[[], []], [[]]]), untouched=True)
        gone = weakref.ref(records)
        in_pieces(records, [2])
        del records
        assert gone() is None
    finally:
        gc.enable()


def test_without_it_aiokafka_stops_at_such_a_record() -> None:
    """Once this fails, nothing needs to be read with escapes any more."""
    batch = MemoryRecords(fetched([[[b"\xff"]]])).next_batch()
    with pytest.raises(UnicodeDecodeError):
        next(iter(batch))
