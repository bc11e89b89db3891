"""What a batcher asks of its window, the records that wait, and what all windows share.

There are three, by the order in which records leave: ``window_fifo`` (arrival), ``window_bucketed`` and
``window_exact`` (with others of about their length). They know nothing of time: when a batch is due is the batcher's
business, which records go together is theirs.

Invariants, of each window:

- What was added is given out exactly once, by ``take`` or by ``discard``.
- ``take(oldest=True)`` gives out the record that arrived first, whatever else goes with it.
- No batch exceeds a limit, except a record that does so alone.
- Records of one polled span that leave together and are neighbours leave as one span; spans are in order of arrival.
- ``take_overtaken`` overtakes nobody: what is overtaken runs out, unless ``take`` is called meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import NamedTuple, Protocol

from streamproc.records import Lease, Span
from streamproc.runtime.limits import Limits


class Shape(NamedTuple):
    """Records in a batch, the length that they are padded to, and the time of the other batches that wait."""

    size: int
    length: int
    rest_ms: float = 0.0


class Window(Protocol):
    """The waiting records of one task, and which of them go together."""

    @property
    def size(self) -> int:
        """Records that wait."""

    @property
    def size_bytes(self) -> int:
        """Bytes of their values."""

    @property
    def opened_at(self) -> float | None:
        """When the oldest waiting record arrived; None without records."""

    @property
    def longest(self) -> int:
        """At least the greatest length that waits; 1 where records have none."""

    def add(self, span: Span) -> None:
        """Take records in, behind those that came before."""

    def full(self) -> str | None:
        """The limit that a batch has reached already, so that it cannot grow any more, or None."""

    def ripe(self) -> str | None:
        """The limit for which so many records wait that a free worker should get some, or None."""

    def shape(self) -> Shape:
        """Of the batch with the oldest record, as it would be taken now; there must be records."""

    def take(self, *, oldest: bool) -> list[Span]:
        """Give out a batch: the one with the oldest record, or else one that is ``full``. There must be records."""

    def is_overtaken(self) -> bool:
        """Whether records wait that came before one that was taken: results may wait for theirs."""

    def take_overtaken(self) -> list[Span]:
        """Give out overtaken records, oldest first, as many as a batch may hold; there must be some."""

    def overtake(self) -> None:
        """Take all that waits for overtaken, where records may overtake others."""

    def discard(self, leases: set[Lease] | None) -> list[Span]:
        """Give back the records of these leases, or all of them."""


class Held:
    """A span in a window that gives its records out one by one."""

    __slots__ = ("first", "left", "span")

    def __init__(self, span: Span, first: int) -> None:
        """``first`` is the number of its first record in the order of arrival."""
        self.span = span
        self.first = first
        self.left = len(span.records)


Entry = tuple[int, Held]
"""A waiting record: its number in the order of arrival, and the span that it came in."""
NUMBER: Callable[[Entry], int] = itemgetter(0)


class Arrivals:
    """The spans of a window in the order of arrival: who is oldest, and records back into spans."""

    def __init__(self) -> None:
        self._spans: deque[Held] = deque()
        self._next = 0
        self.size = 0
        self.size_bytes = 0
        self.reached = 0
        """The number after the last one that was taken: what waits with a lower one is overtaken."""

    def add(self, span: Span) -> Held:
        """A span that arrived."""
        held = Held(span, self._next)
        self._spans.append(held)
        self._next += held.left
        self.size += held.left
        self.size_bytes += span.size_bytes
        return held

    def overtake(self) -> None:
        """Take all that waits for overtaken."""
        self.reached = self._next

    @property
    def opened_at(self) -> float | None:
        """When the oldest waiting record arrived."""
        spans = self._spans
        while spans and not spans[0].left:
            spans.popleft()
        return spans[0].span.arrived_at if spans else None

    def take(self, entries: Sequence[Entry]) -> list[Span]:
        """Records leave for a batch."""
        self.reached = max(self.reached, max([it[0] for it in entries]) + 1)
        return self.release(entries)

    def release(self, entries: Iterable[Entry]) -> list[Span]:
        """Records leave, as spans in the order of arrival; neighbours within a span that came are one."""
        spans: list[Span] = []
        held: Held | None = None
        start = stop = 0
        for number, of in sorted(entries, key=NUMBER):
            if of is held and number == stop:
                stop += 1
                continue
            if held is not None:
                spans.append(self._part(held, start, stop))
            held, start, stop = of, number, number + 1
        if held is not None:
            spans.append(self._part(held, start, stop))
        return spans

    def _part(self, held: Held, start: int, stop: int) -> Span:
        count = stop - start
        held.left -= count
        self.size -= count
        whole = count == len(held.span.records)
        span = held.span if whole else held.span.part(start - held.first, stop - held.first)
        self.size_bytes -= span.size_bytes
        return span


def first_batch(entries: Iterable[Entry], limits: Limits) -> list[Entry]:
    """The first of these records in order of arrival, as many as the limits allow, one at least."""
    batch: list[Entry] = []
    longest, room_bytes = 0, limits.max_bytes
    for number, held in sorted(entries, key=NUMBER):
        index = number - held.first
        longest = max(longest, lengths_of(held.span)[index])
        room_bytes -= max(held.span.sizes[index], 0)
        if batch and (room_bytes < 0 or len(batch) >= limits.n_max(longest)):
            break
        batch.append((number, held))
    return batch


def lengths_of(span: Span) -> Sequence[int]:
    """The lengths of a span whose task measures them. Raises AssertionError where it has none."""
    if span.lengths is None:
        raise AssertionError(f"records of {span.lease} came without lengths to a window that goes by them")
    return span.lengths
