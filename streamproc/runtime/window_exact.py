"""The exact plan of what waits: the cheapest division of up to 512 records into batches, of which one is taken.

The records that arrived first, up to ``WINDOW``, are kept in order of length; those behind them follow as room comes.
For a batch all of them are divided by ``grouping.cheapest_division``, and the batch with the oldest record is taken.
The plan is made when a batch is taken, and never because a record came.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from itertools import accumulate

from streamproc.records import Lease, Span
from streamproc.runtime.grouping import cheapest_division, reach
from streamproc.runtime.limits import Limits
from streamproc.runtime.online_cost import OnlineCost
from streamproc.runtime.window import Arrivals, Entry, Held, Shape, first_batch, lengths_of

WINDOW = 512

_Planned = tuple[int, int, Held]
"""A record in order of length: its length, its number in the order of arrival, negated, and the span it came in.

Of equal lengths the oldest stands last: a batch that is not full is at the short end of them, and can wait best."""


class ExactWindow:
    """The waiting records of one task, planned together."""

    def __init__(self, limits: Limits, cost: OnlineCost, *, window: int = WINDOW) -> None:
        self._limits = limits
        self._cost = cost
        self._window = max(window, limits.max_size)
        self._arrivals = Arrivals()
        self._sorted: list[_Planned] = []
        self._behind: deque[Entry] = deque()
        self._plan: slice | None = None
        self._planned_ms = 0.0
        """The time of all batches of the plan."""
        self._planned_with = (cost.model, cost.kappa, limits.load_limit)

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
        """The greatest length that is planned for."""
        return self._sorted[-1][0] if self._sorted else 0

    def add(self, span: Span) -> None:
        """Take records in."""
        held = self._arrivals.add(span)
        room = self._window - len(self._sorted)
        for number, length in enumerate(lengths_of(span)[: max(room, 0)], held.first):
            insort(self._sorted, (length, -number, held))
            self._plan = None
        taken = min(max(room, 0), len(span.records))
        self._behind.extend((held.first + index, held) for index in range(taken, len(span.records)))

    def full(self) -> str | None:
        """``size`` once as many wait as are planned together: the plan cannot get any better."""
        return "size" if len(self._sorted) >= self._window else None

    def ripe(self) -> str | None:
        """``size`` or ``bytes`` once as much waits as a batch may hold."""
        if self.size >= self._limits.max_size:
            return "size"
        return "bytes" if self.size_bytes >= self._limits.max_bytes else None

    def shape(self) -> Shape:
        """Of the batch with the oldest record."""
        plan = self._planned()
        shape = Shape(plan.stop - plan.start, self._sorted[plan.stop - 1][0])
        return shape._replace(rest_ms=max(self._planned_ms - self._planned_with[0].time_ms(*shape[:2]), 0.0))

    def take(self, *, oldest: bool) -> list[Span]:  # noqa: ARG002 - of a plan, the oldest record's batch is first
        """The batch of the plan that has the oldest record."""
        plan = self._planned()
        entries = [(-negated, held) for _, negated, held in self._sorted[plan]]
        del self._sorted[plan]
        self._move_up()
        return self._arrivals.take(entries)

    def is_overtaken(self) -> bool:
        """Whether records wait that came before one that was taken."""
        return any(-negated < self._arrivals.reached for _, negated, _ in self._sorted)

    def take_overtaken(self) -> list[Span]:
        """The oldest of them; those that are not planned for yet came after all that were taken."""
        reached = self._arrivals.reached
        overtaken = [(-negated, held) for _, negated, held in self._sorted if -negated < reached]
        batch = first_batch(overtaken, self._limits)
        gone = {number for number, _ in batch}
        self._sorted = [it for it in self._sorted if -it[1] not in gone]
        self._move_up()
        return self._arrivals.take(batch)

    def overtake(self) -> None:
        """All that waits is overtaken."""
        self._arrivals.overtake()

    def discard(self, leases: set[Lease] | None) -> list[Span]:
        """Give back the records of these leases, or all of them."""
        waiting: list[Entry] = [(-negated, held) for _, negated, held in self._sorted]
        gone = [it for it in (*waiting, *self._behind) if leases is None or it[1].span.lease in leases]
        if gone:
            self._sorted = [it for it in self._sorted if leases is not None and it[2].span.lease not in leases]
            self._behind = deque(it for it in self._behind if leases is not None and it[1].span.lease not in leases)
            self._move_up()
        return self._arrivals.release(gone)

    def _move_up(self) -> None:
        self._plan = None
        while self._behind and len(self._sorted) < self._window:
            number, held = self._behind.popleft()
            insort(self._sorted, (lengths_of(held.span)[number - held.first], -number, held))

    def _planned(self) -> slice:
        model = self._cost.model
        planned_with = (model, self._cost.kappa, self._limits.load_limit)
        if self._plan is None or self._planned_with != planned_with:
            self._planned_with = planned_with
            waiting = self._sorted
            lengths = [it[0] for it in waiting]
            totals = list(range(len(waiting) + 1))
            byte_totals = None
            if self.size_bytes > self._limits.max_bytes:
                sizes = [max(held.span.sizes[-negated - held.first], 0) for _, negated, held in waiting]
                byte_totals = list(accumulate(sizes, initial=0))
            beta, gamma, delta = model.beta_ms, model.gamma_ms, model.delta_ms
            costs = [beta + length * (gamma + length * delta) for length in lengths]
            lows = reach(lengths, totals, self._limits, byte_totals=byte_totals)
            ends, self._planned_ms = cheapest_division(costs, totals, model.alpha_ms, lows)
            numbers = [it[1] for it in waiting]
            oldest = numbers.index(max(numbers))
            start = 0
            for end in ends:
                if end > oldest:
                    self._plan = slice(start, end)
                    break
                start = end
        if self._plan is None:
            raise AssertionError("a plan needs records")
        return self._plan
