"""Where a command begins, or ends, in the partitions of topics: what ``--from`` and ``--to`` say."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import typer

from streamproc.cli.terminal import UsageError, no_such_partition
from streamproc.records import TopicPartition

if TYPE_CHECKING:
    from streamproc.broker.interface import Admin

WHERE_HELP = "beginning, end, an offset (negative: from the end), a time (2026-01-31T12:00), an age (15m, 2h, 1d)"

_AGO = re.compile(r"^(\d+(?:\.\d+)?)(ms|s|m|h|d)$")
_UNIT_S = {"ms": 0.001, "s": 1, "m": 60, "h": 3_600, "d": 86_400}


@dataclass(frozen=True, slots=True)
class Where:
    """A place in each partition: an offset (from the end where negative) or a time; neither: the beginning."""

    offset: int | None = None
    time_ms: int | None = None
    at_end: bool = False


def parse_where(text: str, now: float, option: str) -> Where:
    """What an option says; ``now`` in seconds since 1970. Raises a usage error."""
    if text == "beginning":
        return Where()
    if text == "end":
        return Where(at_end=True)
    if re.fullmatch(r"-?\d+", text):
        return Where(offset=int(text))
    if ago := _AGO.match(text):
        return Where(time_ms=int((now - float(ago[1]) * _UNIT_S[ago[2]]) * 1_000))
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(
            f"{option} {text} is neither beginning, end, an offset, a time (2026-01-31T12:00) nor an age (15m)"
        ) from None
    return Where(time_ms=int(moment.astimezone(UTC).timestamp() * 1_000))


def duration_s(text: str, option: str) -> float:
    """How long an option says, in seconds: 30s, 5m, 2h. Raises a usage error."""
    found = _AGO.match(text)
    if found is None:
        raise typer.BadParameter(f"{option} {text} is no time with its unit, such as 30s, 5m or 2h")
    return float(found[1]) * _UNIT_S[found[2]]


async def partitions_of(admin: Admin, topics: Sequence[str], partition: int | None = None) -> list[TopicPartition]:
    """All partitions of topics to read, or the one with a number.

    Raises TopicMissingError, BrokerAuthorizationError and UsageError.
    """
    there = await admin.topics()
    if any(topic not in there for topic in topics):
        await admin.check_topics(topics, "Read")
    found = []
    for topic in topics:
        count = there[topic].partitions
        if partition is not None and partition >= count:
            raise UsageError(no_such_partition(topic, count))
        found += [TopicPartition(topic, number) for number in (range(count) if partition is None else [partition])]
    return found


async def offsets_of(
    where: Where, admin: Admin, partitions: Sequence[TopicPartition], ends: Mapping[TopicPartition, int]
) -> dict[TopicPartition, int]:
    """The offset of a place in each partition, between its first record and its end."""
    if where.at_end:
        return dict(ends)
    begins = await admin.begin_offsets(partitions)
    if where.time_ms is not None:
        found = await admin.offsets_for_times(dict.fromkeys(partitions, where.time_ms))
        wanted = {it: ends[it] if (offset := found.get(it)) is None else offset for it in partitions}
        # Read committed, the end is before what an open transaction has written.
        return {it: min(offset, ends[it]) for it, offset in wanted.items()}
    if where.offset is None:
        return dict(begins)
    wanted = {it: where.offset if where.offset >= 0 else ends[it] + where.offset for it in partitions}
    return {it: max(begins[it], min(offset, ends[it])) for it, offset in wanted.items()}
