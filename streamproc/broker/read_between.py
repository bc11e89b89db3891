"""Reads partitions between offsets, to an end that stands before it begins."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence

from streamproc.broker.interface import Reader
from streamproc.records import TopicPartition, TopicRecord

_POLL_MS = 200


async def read_between(
    reader: Reader,
    positions: Mapping[TopicPartition, int],
    ends: Mapping[TopicPartition, int],
    max_records: int | None = None,
) -> AsyncIterator[Mapping[TopicPartition, Sequence[TopicRecord]]]:
    """The records from these positions on and before these ends, at most ``max_records`` at a time. Raises BrokerError.

    It comes to its end also where the last offsets are of no records (transaction markers, compaction).
    """
    unread = {it for it, offset in positions.items() if offset < ends[it]}
    reader.assign({it: positions[it] for it in unread})
    while unread:
        found = await reader.getmany(timeout_ms=_POLL_MS, max_records=max_records)
        done = [it for it in unread if await reader.position(it) >= ends[it]]
        reader.drop(*done)
        unread.difference_update(done)
        if found:
            yield {
                TopicPartition(*it): records
                if records[-1].offset < ends[TopicPartition(*it)]
                else [record for record in records if record.offset < ends[TopicPartition(*it)]]
                for it, records in found.items()
            }
