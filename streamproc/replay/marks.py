"""The headers by which replayed records, and their results, are known. Pure functions; the names are public.

streamproc-replay-run      the id of the run
streamproc-replay-source   the record that was captured: topic/partition/offset
streamproc-replay-count    how often a dead letter was sent back to its input topic
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from streamproc.broker.interface import Headers

RUN = "streamproc-replay-run"
SOURCE = "streamproc-replay-source"
COUNT = "streamproc-replay-count"


class Source(NamedTuple):
    """Where a record was, when it was captured."""

    topic: str
    partition: int
    offset: int


def mark(headers: Headers, run: str, source: Source) -> list[tuple[str, bytes | None]]:
    """A record's headers with the marks of a run, in place of those of an earlier one."""
    ours: list[tuple[str, bytes | None]] = [
        (RUN, run.encode()),
        (SOURCE, b"%s/%d/%d" % (source.topic.encode(), source.partition, source.offset)),
    ]
    return [*without(headers, (RUN, SOURCE)), *ours]


def run_of(headers: Headers) -> str | None:
    """The id of the run that a record, or its result, belongs to."""
    value = last(headers, RUN)
    return None if value is None else value.decode(errors="replace")


def source_of(headers: Headers) -> Source | None:
    """The captured record that a replayed one, or its result, comes from; None without the header, or an odd one."""
    parts = (last(headers, SOURCE) or b"").decode(errors="replace").split("/")
    if len(parts) != 3 or not (parts[1].isdecimal() and parts[2].isdecimal()):
        return None
    return Source(parts[0], int(parts[1]), int(parts[2]))


def count_of(headers: Headers) -> int:
    """How often a record was sent back to its input topic; what is no number counts as none."""
    text = (last(headers, COUNT) or b"").decode(errors="replace")
    return int(text) if text.isdecimal() else 0


def counted(headers: Headers, count: int) -> list[tuple[str, bytes | None]]:
    """A record's headers with this count in place of what was there."""
    return [*without(headers, (COUNT,)), (COUNT, b"%d" % count)]


def last(headers: Headers, name: str) -> bytes | None:
    """The value of the last header with a name, which is the one that counts."""
    return next((value for found, value in reversed(headers) if found == name), None)


def without(headers: Headers, names: Collection[str]) -> list[tuple[str, bytes | None]]:
    """The headers with other names."""
    return [(name, value) for name, value in headers if name not in names]
