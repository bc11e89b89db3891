"""First in, first out: a batch is the records that have waited longest, as many as the limits allow.

Without limits on lengths the cost is per span, never per record. With them, how far the next batch reaches is kept up
to date as records come, so that each record is looked at once as it arrives and once as it leaves.
"""

from __future__ import annotations

from collections import deque

from streamproc.records import Lease, Span
from streamproc.runtime.limits import Limits
from streamproc.runtime.window import Shape, lengths_of


class FifoWindow:
    """The waiting records of one task in the order of their arrival."""

    def __init__(self, limits: Limits, *, measured: bool = False) -> None:
        """``measured``: whether the spans have lengths."""
        self._limits = limits
        self._measured = measured
        self._spans: deque[Span] = deque()
        self.size = 0
        self.size_bytes = 0
        self._head = _Head(limits)

    @property
    def opened_at(self) -> float | None:
        """When the oldest waiting record arrived; None without records."""
        return self._spans[0].arrived_at if self._spans else None

    @property
    def longest(self) -> int:
        """The greatest length in the next batch; 1 where records have none."""
        return self._head.longest if self._measured else 1

    def add(self, span: Span) -> None:
        """Take records in."""
        self._spans.append(span)
        self.size += len(span.records)
        self.size_bytes += span.size_bytes
        if self._measured:
            self._head.extend(span)

    def full(self) -> str | None:
        """The rule by which the next batch can grow no more: ``size``, ``bytes``, ``padding`` or ``memory``."""
        if self.size >= self._most():
            return "size" if self._measured else self._limits.rule(1)
        if self.size_bytes >= self._limits.max_bytes:
            return "bytes"
        return self._head.closed_by

    def ripe(self) -> str | None:
        """As ``full``: in order of arrival nothing else can come of waiting."""
        return self.full()

    def shape(self) -> Shape:
        """Of the next batch."""
        if not self._measured:
            return Shape(min(self.size, self._most()), 1)
        if self._limits.by_length:
            self._look_again()  # what a batch may hold changes with the cost model
        return Shape(self._head.size, self._head.longest)

    def take(self, *, oldest: bool) -> list[Span]:  # noqa: ARG002 - the only batch there is has the oldest record
        """The oldest records, as many as the limits allow, one at least."""
        taken: list[Span] = []
        room, room_bytes = self._most(), self._limits.max_bytes
        if self._measured and self._limits.by_length:
            self._look_again()  # as above
            room = self._head.size
        while self._spans and room > 0:
            span = self._spans[0]
            count = min(room, len(span.records))
            if span.size_bytes > room_bytes:
                count = _fitting(span, count, room_bytes)
                if count == 0:
                    if taken:
                        break
                    count = 1
            self._spans.popleft()
            if count < len(span.records):
                span, rest = span.split(count)
                self._spans.appendleft(rest)
            taken.append(span)
            room -= count
            room_bytes -= span.size_bytes
        self.size -= sum([len(span.records) for span in taken])
        self.size_bytes -= sum([span.size_bytes for span in taken])
        self._look_again()
        return taken

    def is_overtaken(self) -> bool:
        """Never: nobody is."""
        return False

    def take_overtaken(self) -> list[Span]:
        """Never to be called."""
        raise AssertionError("in order of arrival nobody is overtaken")

    def overtake(self) -> None:
        """Nobody is overtaken here, nor was before."""

    def discard(self, leases: set[Lease] | None) -> list[Span]:
        """Give back the waiting spans of these leases, or all of them."""
        gone = [span for span in self._spans if leases is None or span.lease in leases]
        if gone:
            self._spans = deque(span for span in self._spans if leases is not None and span.lease not in leases)
            self.size -= sum(len(span.records) for span in gone)
            self.size_bytes -= sum(span.size_bytes for span in gone)
            self._look_again()
        return gone

    def _most(self) -> int:
        """Records that a batch may hold, lengths left aside: where there are none, each counts as 1 long."""
        return self._limits.max_size if self._measured else max(self._limits.n_max(1), 1)

    def _look_again(self) -> None:
        if self._measured:
            self._head = _Head(self._limits)
            for span in self._spans:
                if not self._head.extend(span):
                    break


class _Head:
    """How far the next batch reaches, as far as lengths and bytes are known to limit it."""

    __slots__ = ("_limits", "_room_bytes", "closed_by", "longest", "size")

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._room_bytes = limits.max_bytes
        self.size = 0
        self.longest = 0
        self.closed_by: str | None = None

    def extend(self, span: Span) -> bool:
        """Go on into a span; False once the batch can reach no further."""
        if self.closed_by is not None:
            return False
        limits = self._limits
        most = limits.n_max(self.longest)
        for length, size in zip(lengths_of(span), span.sizes, strict=True):
            longer = length > self.longest
            if longer:
                most = limits.n_max(length)
            self._room_bytes -= max(size, 0)
            if self.size and (self.size >= most or self._room_bytes < 0):
                self.closed_by = limits.rule(max(length, self.longest)) if self.size >= most else "bytes"
                return False
            if longer:
                self.longest = length
            self.size += 1
        return True


def _fitting(span: Span, count: int, room_bytes: int) -> int:
    for index, size in enumerate(span.sizes[:count]):
        room_bytes -= max(size, 0)
        if room_bytes < 0:
            return index
    return count
