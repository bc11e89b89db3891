"""Records of about one length together: geometric length buckets, one deadline for all of them.

Bucket 0 has the lengths up to 8, each next one reaches 1.0625 times as far, so that a batch from one bucket has a
sixteenth of padding at most. (With 1.125 a backlog goes 2 % slower, and a plan takes three quarters of the time.) A
batch begins with the bucket of the oldest record. Where that bucket fills it, it is taken from there alone. Where it
does not, neighbours come in, longer and shorter ones, while the padding costs less than the batches saved. With c_b
records in bucket b, the longest ℓ_b, the buckets are divided into runs so that

    sum over the runs of   α + (sum of c_b in the run) · h(ℓ of its longest bucket)

is least, where no run has more records than n_max of its longest (a bucket that has more stands alone), and the run
with the oldest record is the batch. That is the exact planner (``grouping``) over buckets in the place of records: a
bucket joins a run where the padding that this costs is less than the α of a batch that it saves, all others considered.
It takes O(B log B) for B buckets with records in them, a few dozen, however many records wait.

A greedy rule, the nearest neighbour first as long as it pays, is no simpler and was worse: p99 of 40 ms where this
has 26, in the simulation of docs/batching.md. Without longer neighbours worker time at low load was up to a third
above first in, first out.

A record costs a bisection as it comes and a ``popleft`` as it goes; nothing is sorted.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Callable
from itertools import accumulate

from streamproc.records import Lease, Span
from streamproc.runtime.cost import CostModel
from streamproc.runtime.grouping import cheapest_division, reach
from streamproc.runtime.limits import Limits
from streamproc.runtime.online_cost import OnlineCost
from streamproc.runtime.window import Arrivals, Entry, Shape, first_batch, lengths_of

RATIO = 1.0625
FIRST_BOUND = 8


def _bounds() -> list[int]:
    bounds, bound = [FIRST_BOUND], float(FIRST_BOUND)
    while bound < 2**40:
        bound *= RATIO
        if int(bound) > bounds[-1]:
            bounds.append(int(bound))
    return bounds


BOUNDS = _bounds()
"""The greatest length in each bucket; what is longer is in one more."""


class _Bucket:
    """Waiting records of about one length, in order of arrival."""

    __slots__ = ("entries", "longest", "most", "size_bytes")

    def __init__(self) -> None:
        self.entries: deque[Entry] = deque()
        self.longest = 0
        """At least the greatest length in it; exact until records leave."""
        self.most = 0
        """The most records of that length in a batch, as it was when the bucket was last looked at."""
        self.size_bytes = 0


class BucketedWindow:
    """The waiting records of one task by length."""

    def __init__(self, limits: Limits, cost: OnlineCost) -> None:
        self._limits = limits
        self._cost = cost
        self._arrivals = Arrivals()
        self._buckets = [_Bucket() for _ in range(len(BOUNDS) + 1)]
        self._occupied: list[int] = []
        """The buckets with records, by length."""
        self._full: dict[int, str] = {}
        """The buckets that fill a batch alone, and the limit that they reach."""
        self._planned: tuple[int, CostModel, float, tuple[list[int], float]] | None = None
        """The last plan, for which bucket and with which costs, until something comes or goes: who asks for the shape
        of a batch mostly takes it next."""

    @property
    def size(self) -> int:
        """Records that wait."""
        return self._arrivals.size

    @property
    def size_bytes(self) -> int:
        """Bytes of their values."""
        return self._arrivals.size_bytes

    @property
    def opened_at(self) -> float | None:
        """When the oldest waiting record arrived; None without records."""
        return self._arrivals.opened_at

    @property
    def longest(self) -> int:
        """At least the greatest length that waits."""
        return self._buckets[self._occupied[-1]].longest if self._occupied else 0

    def add(self, span: Span) -> None:
        """Take records in."""
        held = self._arrivals.add(span)
        buckets, limits = self._buckets, self._limits
        self._planned = None
        for number, (length, size) in enumerate(zip(lengths_of(span), span.sizes, strict=True), held.first):
            at = bisect_left(BOUNDS, length)
            bucket = buckets[at]
            entries = bucket.entries
            if not entries:
                insort(self._occupied, at)
            entries.append((number, held))
            if size > 0:
                bucket.size_bytes += size
            if length > bucket.longest or len(entries) == 1:
                bucket.longest = length
                bucket.most = limits.n_max(length)
            if len(entries) >= bucket.most or bucket.size_bytes >= limits.max_bytes:
                self._full[at] = "bytes" if len(entries) < bucket.most else limits.rule(bucket.longest)

    def full(self) -> str | None:
        """The limit that a bucket reaches by itself."""
        return next(iter(self._full.values())) if self._full else None

    def ripe(self) -> str | None:
        """As ``full``, and ``size`` or ``bytes`` once as much waits in all as a batch may hold."""
        if self._full:
            return self.full()
        arrivals, limits = self._arrivals, self._limits
        if arrivals.size >= limits.max_size:
            return "size"
        return "bytes" if arrivals.size_bytes >= limits.max_bytes else None

    def shape(self) -> Shape:
        """Of the batch with the oldest record: its length is at least what it will be."""
        plan, total_ms = self._plan(self._oldest())
        longest = max(self._buckets[at].longest for at in plan)
        waiting = sum(len(self._buckets[at].entries) for at in plan)
        size = max(min(waiting, self._limits.n_max(longest)), 1)
        return Shape(size, longest, max(total_ms - self._cost.model.time_ms(size, longest), 0.0))

    def take(self, *, oldest: bool) -> list[Span]:
        """The batch with the oldest record, or else one of a bucket that is full."""
        first = self._oldest()
        if not oldest and self._full and first not in self._full:
            first = min(self._full, key=lambda at: self._buckets[at].entries[0][0])
        taken: list[Entry] = []
        room_bytes = self._limits.max_bytes
        longest, most = -1, 0
        for at in self._plan(first)[0]:
            bucket = self._buckets[at]
            entries = bucket.entries
            padded = max(longest, bucket.longest)
            allowed = most if padded == longest else self._limits.n_max(padded)
            if len(taken) + len(entries) <= allowed and bucket.size_bytes <= room_bytes:
                # All of it, as mostly: record by record takes twice as long.
                taken += entries
                entries.clear()
                room_bytes -= bucket.size_bytes
                longest, most = padded, allowed
            while entries:
                number, held = entries[0]
                index = number - held.first
                length, size = lengths_of(held.span)[index], max(held.span.sizes[index], 0)
                allowed = most if length <= longest else self._limits.n_max(length)
                if taken and (size > room_bytes or len(taken) >= allowed):
                    break
                taken.append(entries.popleft())
                bucket.size_bytes -= size
                room_bytes -= size
                if length > longest:
                    longest, most = length, allowed
            self._look_at(at)
        return self._arrivals.take(taken)

    def is_overtaken(self) -> bool:
        """Whether records wait that came before one that was taken."""
        reached = self._arrivals.reached
        return any(self._buckets[at].entries[0][0] < reached for at in self._occupied)

    def take_overtaken(self) -> list[Span]:
        """The oldest of them."""
        reached = self._arrivals.reached
        overtaken = [it for at in self._occupied for it in self._buckets[at].entries if it[0] < reached]
        batch = first_batch(overtaken, self._limits)
        gone = {number for number, _ in batch}
        self._leave(lambda entry: entry[0] in gone)
        return self._arrivals.take(batch)

    def overtake(self) -> None:
        """All that waits is overtaken."""
        self._arrivals.overtake()

    def discard(self, leases: set[Lease] | None) -> list[Span]:
        """Give back the records of these leases, or all of them."""
        return self._arrivals.release(self._leave(lambda entry: leases is None or entry[1].span.lease in leases))

    def _leave(self, goes: Callable[[Entry], bool]) -> list[Entry]:
        """Take records out of their buckets."""
        gone: list[Entry] = []
        for at in list(self._occupied):
            bucket = self._buckets[at]
            leaving = [it for it in bucket.entries if goes(it)]
            if leaving:
                gone += leaving
                bucket.entries = deque(it for it in bucket.entries if not goes(it))
                bucket.size_bytes -= sum(max(held.span.sizes[number - held.first], 0) for number, held in leaving)
                self._look_at(at)
        return gone

    def _look_at(self, at: int) -> None:
        """Keep up with a bucket that records have left."""
        self._planned = None
        bucket = self._buckets[at]
        if not bucket.entries:
            bucket.longest = bucket.size_bytes = 0
            del self._occupied[bisect_left(self._occupied, at)]
            self._full.pop(at, None)
            return
        bucket.most = self._limits.n_max(bucket.longest)
        if len(bucket.entries) >= bucket.most:
            self._full[at] = self._limits.rule(bucket.longest)
        elif bucket.size_bytes >= self._limits.max_bytes:
            self._full[at] = "bytes"
        else:
            self._full.pop(at, None)

    def _oldest(self) -> int:
        return min(self._occupied, key=lambda at: self._buckets[at].entries[0][0])

    def _plan(self, first: int) -> tuple[list[int], float]:
        """The buckets of the batch that begins with this one, which comes first; and the time of all that was planned.

        A bucket that is alone, or full, needs no plan, and no time is told.
        """
        model = self._cost.model
        if len(self._occupied) == 1 or first in self._full:
            return [first], 0.0
        if self._planned is None or self._planned[:3] != (first, model, self._cost.kappa):
            self._planned = (first, model, self._cost.kappa, self._divide(first))
        return self._planned[3]

    def _divide(self, first: int) -> tuple[list[int], float]:
        limits, model, occupied = self._limits, self._cost.model, self._occupied
        buckets = [self._buckets[at] for at in occupied]
        lengths = [it.longest for it in buckets]
        totals = list(accumulate([len(it.entries) for it in buckets], initial=0))
        byte_totals = None
        if self.size_bytes > limits.max_bytes:
            byte_totals = list(accumulate([it.size_bytes for it in buckets], initial=0))
        lows = reach(lengths, totals, limits, byte_totals=byte_totals)
        ends, total_ms = cheapest_division([model.record_ms(it) for it in lengths], totals, model.alpha_ms, lows)
        at = bisect_left(occupied, first)
        last = bisect_right(ends, at)
        run = range(ends[last - 1] if last else 0, ends[last])
        return [first, *(occupied[it] for it in run if it != at)], total_ms
