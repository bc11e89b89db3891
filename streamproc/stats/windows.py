"""The windows of metrics partitions: which there are, what is in them, when they close and when they are forgotten.

Passive: no clock, no I/O. All state is in a mapping, ``table``, of which each write is one record of a changelog; in
the application it is a Faust table. A partition's keys begin with its number, so a partition has a part of its own.

Time is that of the events: a partition's *watermark* is the greatest timestamp read from it. A window takes what comes
until the watermark is ``grace_ms`` past its end; then it closes, and what comes later is dropped and counted. It stays
in the table, to be looked at, for another ``KEPT`` widths.

Every batch counts exactly once, however often its record is read. An entry of the table holds the offset of the last
record in it, so whichever prefix of the writes has survived a kill, reading again from any offset before leads to the
state that there would be without it:

- the entries of some records are written before the partition's own, which holds the offset up to which all are;
- whether a record is late depends on the records before it alone, never on how many were read at a time;
- rows are published before it is written that they are, and entries forgotten after; a row that is published again is
  the same row.

A timestamp more than ``grace_ms`` ahead of the clock is a wrong clock's: it is counted as early and otherwise ignored,
since a single one would make all others late.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from streamproc.stats.totals import BatchMetrics, Totals, read_metrics

WIDTHS_S = (10, 60, 3_600)
KEPT = 6
"""For so many of its widths a window stays in the table once it is closed."""
_STEP_MS = 1_000 * WIDTHS_S[0]
"""All windows end at a multiple of it."""

Table = MutableMapping[str, dict[str, Any]]


class WindowKey(NamedTuple):
    """One window of one replica's task, and the partition that tells of it."""

    partition: int
    width_s: int
    start_ms: int
    task: str
    replica: str

    @property
    def end_ms(self) -> int:
        """The first moment after it."""
        return self.start_ms + 1_000 * self.width_s

    @property
    def text(self) -> str:
        """The key of its entry."""
        return f"{self.partition}/{self.width_s}/{self.start_ms}/{self.task}/{self.replica}"

    @classmethod
    def of_text(cls, text: str) -> WindowKey | None:
        """The key of an entry; None where it is that of a partition's progress."""
        if "/" not in text:
            return None
        partition, width_s, start_ms, task, replica = text.split("/", 4)
        return cls(int(partition), int(width_s), int(start_ms), task, replica)


@dataclass(slots=True)
class Progress:
    """How far a partition is read. Records that are in no window are counted: late ones by the width of theirs."""

    applied: int = -1
    """The offset of the last record that is in all its windows."""
    watermark_ms: int = 0
    closed_ms: int = 0
    """The watermark up to which windows are closed, and published."""
    late: Counter[str] = field(default_factory=Counter)
    early: int = 0
    malformed: int = 0

    def state(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return {
            "applied": self.applied,
            "watermark_ms": self.watermark_ms,
            "closed_ms": self.closed_ms,
            "late": dict(self.late),
            "early": self.early,
            "malformed": self.malformed,
        }


@dataclass(slots=True)
class _Entry:
    applied: int
    totals: Totals


class Windows:
    """The windows of all partitions of one metrics topic, over their table."""

    def __init__(self, table: Table, *, grace_ms: int) -> None:
        self._table = table
        self._grace_ms = grace_ms

    def progress(self, partition: int) -> Progress:
        """How far a partition is."""
        state = self._table.get(str(partition))
        return Progress() if state is None else Progress(**{**state, "late": Counter(state["late"])})

    def apply(self, partition: int, records: Iterable[tuple[int, bytes | None]], now_ms: int) -> None:
        """Count records of a partition, offsets and values in their order; those that are counted already are not."""
        progress = self.progress(partition)
        changed: dict[str, _Entry] = {}
        before = progress.applied
        for offset, value in records:
            if offset <= progress.applied:
                continue
            progress.applied = offset
            batch = read_metrics(value)
            if batch is None:
                progress.malformed += 1
            elif batch.timestamp_ms > now_ms + self._grace_ms:
                progress.early += 1
            else:
                self._count(partition, offset, batch, progress, changed)
        if progress.applied == before:
            return
        for key, entry in changed.items():
            self._table[key] = {"applied": entry.applied, **entry.totals.state()}
        self._table[str(partition)] = progress.state()

    def _count(
        self, partition: int, offset: int, batch: BatchMetrics, progress: Progress, changed: dict[str, _Entry]
    ) -> None:
        for width_s in WIDTHS_S:
            start_ms = batch.timestamp_ms - batch.timestamp_ms % (1_000 * width_s)
            key = WindowKey(partition, width_s, start_ms, batch.task, batch.replica)
            if key.end_ms + self._grace_ms <= progress.watermark_ms:
                progress.late[str(width_s)] += 1
                continue
            entry = changed.get(key.text) or self._entry(key.text)
            if entry.applied < offset:
                entry.applied = offset
                entry.totals.add(batch)
                changed[key.text] = entry
        progress.watermark_ms = max(progress.watermark_ms, batch.timestamp_ms)

    def _entry(self, key: str) -> _Entry:
        state = self._table.get(key)
        return _Entry(-1, Totals()) if state is None else _Entry(state["applied"], Totals.of_state(state))

    def advance(self, partition: int, watermark_ms: int) -> None:
        """Let a partition's time go on, where nothing has come that would: what is older from now on is late."""
        progress = self.progress(partition)
        if progress.watermark_ms < watermark_ms and progress.applied >= 0:
            progress.watermark_ms = watermark_ms
            self._table[str(partition)] = progress.state()

    def is_behind(self, partition: int, now_ms: int) -> bool:
        """Whether, by the clock, some window is to be closed that by the partition's records is not."""
        watermark_ms = self.progress(partition).watermark_ms
        return any(watermark_ms < key.end_ms + self._grace_ms <= now_ms for key in self.keys({partition}))

    def has_due(self, partition: int) -> bool:
        """Whether some window may have to be closed; cheap."""
        progress = self.progress(partition)
        return self._steps(progress.watermark_ms) > self._steps(progress.closed_ms)

    def _steps(self, watermark_ms: int) -> int:
        return (watermark_ms - self._grace_ms) // _STEP_MS

    def due(self, partition: int) -> Iterator[tuple[WindowKey, Totals]]:
        """The windows of a partition that are to be published: to be called until ``closed`` is."""
        progress = self.progress(partition)
        for key in self.keys({partition}):
            if progress.closed_ms < key.end_ms + self._grace_ms <= progress.watermark_ms:
                yield key, self.totals(key)

    def closed(self, partition: int) -> None:
        """Note that what was due is published, and forget what is old."""
        progress = self.progress(partition)
        progress.closed_ms = progress.watermark_ms
        self._table[str(partition)] = progress.state()
        for key in self.keys({partition}):
            if key.end_ms + self._grace_ms + KEPT * 1_000 * key.width_s <= progress.closed_ms:
                del self._table[key.text]

    def is_closed(self, key: WindowKey) -> bool:
        """Whether a window takes no more."""
        return key.end_ms + self._grace_ms <= self.progress(key.partition).watermark_ms

    def keys(self, partitions: set[int]) -> Sequence[WindowKey]:
        """All windows of these partitions, in no order."""
        found = [WindowKey.of_text(text) for text in list(self._table)]
        return [key for key in found if key is not None and key.partition in partitions]

    def totals(self, key: WindowKey) -> Totals:
        """What is in a window."""
        return Totals.of_state(self._table[key.text])
