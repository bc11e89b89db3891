"""Where to begin reading the partitions of a topic, and reading them from there up to an end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass

from streamproc.broker.interface import Admin, Reader
from streamproc.records import Record, TopicPartition

_POLL_MS = 200


@dataclass(frozen=True, slots=True)
class Begin:
    """Where to begin in each partition: an offset (from the end where negative) or a time; neither: the beginning."""

    offset: int | None = None
    time_ms: int | None = None
    at_end: bool = False


async def positions_of(admin: Admin, ends: Mapping[TopicPartition, int], where: Begin) -> dict[TopicPartition, int]:
    """The offsets to begin at in the partitions whose ends are given, within their logs. Raises BrokerError."""
    partitions = list(ends)
    if where.at_end:
        return dict(ends)
    begins = await admin.begin_offsets(partitions)
    if where.time_ms is not None:
        found = await admin.offsets_for_times(dict.fromkeys(partitions, where.time_ms))
        return {it: ends[it] if (offset := found.get(it)) is None else offset for it in partitions}
    if where.offset is None:
        return dict(begins)
    wanted = {it: where.offset if where.offset >= 0 else ends[it] + where.offset for it in partitions}
    return {it: max(begins[it], min(offset, ends[it])) for it, offset in wanted.items()}


async def read_between(
    reader: Reader,
    positions: Mapping[TopicPartition, int],
    ends: Mapping[TopicPartition, int],
    max_records: int | None = None,
) -> AsyncIterator[Mapping[TopicPartition, Sequence[Record]]]:
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
