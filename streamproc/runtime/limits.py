"""What a batch may hold: records, bytes, padded length, and memory by a cost model.

``n_max(L)`` is the most records that a batch padded to length L may have. It never grows with L, since no coefficient
of a cost model is negative. So whether a record of length ℓ may join n others is answered at once:

    n + 1 ≤ n_max(max(L, ℓ))

A record that does not fit alone (``n_max`` is 0, or its bytes are too many) still runs, alone, unless its task refuses
it before; no batch is ever empty.

Where a batch of n records of length L ran out of memory, what records add, n·m(L), counts a quarter more than in that
one from then on: batches have at most four fifths of it, whatever was predicted, and a little more with each batch that
runs. That needs no estimate: where none says what a record adds, m(L) is its length, or 1. What the model itself holds
is no part of it: were a factor on the whole raised, a model that is most of the budget would leave room for none.
"""

from __future__ import annotations

from math import inf

from streamproc.runtime.online_cost import OnlineCost

OUT_OF_MEMORY_FACTOR = 1.25
RECOVERY = 1.0001
"""What is allowed after an out-of-memory grows by this with each batch that runs: by a quarter in 2,200."""


class Limits:
    """The limits of one task's batches.

    Args:
        max_size: Most records.
        max_bytes: Most bytes of values.
        max_padded: Most padded length: records times the longest.
        cost: Predicts memory, where there is a budget.
        memory_budget_bytes: Most memory of a batch, as ``cost`` predicts it with its factor κ.
    """

    def __init__(
        self,
        max_size: int,
        max_bytes: int,
        *,
        max_padded: int | None = None,
        cost: OnlineCost | None = None,
        memory_budget_bytes: float | None = None,
    ) -> None:
        if memory_budget_bytes is not None and cost is None:
            raise ValueError("a memory budget needs a cost model that predicts memory")
        self.max_size = max_size
        self.max_bytes = max_bytes
        self.max_padded = max_padded
        self._cost = cost
        self.budget_bytes = memory_budget_bytes
        model = None if cost is None else cost.model
        self._by_model = model is not None and (model.b_bytes or model.c_bytes or model.d_bytes) > 0
        self.load_limit = inf
        """The most n·m(L), since a batch ran out of memory."""

    @property
    def by_length(self) -> bool:
        """Whether lengths limit anything."""
        return self.max_padded is not None or self.budget_bytes is not None or self.load_limit < inf

    def n_max(self, length: int) -> int:
        """The most records that a batch padded to this length may have; 0 where a record does not fit alone."""
        most = self.max_size
        # Not by min: it is asked for every record.
        if self.max_padded is not None and length * most > self.max_padded:
            most = self.max_padded // length
        if self.budget_bytes is not None and self._cost is not None:
            most = min(most, self._by_memory(self._cost, self.budget_bytes, self._cost.kappa, length))
        if self.load_limit < inf and (load := self._load(length)) > 0:
            most = min(most, max(int(self.load_limit / load), 1))
        return most

    def rule(self, length: int) -> str:
        """Which limit it is that ``n_max`` comes from: ``size``, ``padding`` or ``memory``."""
        most = self.n_max(length)
        if most == self.max_size:
            return "size"
        return "padding" if self.max_padded is not None and length and most == self.max_padded // length else "memory"

    def fits_alone(self, length: int, size_bytes: int) -> bool:
        """Whether a record by itself is within the limits; by the calibration's κ, so that no batch changes it."""
        if size_bytes > self.max_bytes or (self.max_padded is not None and length > self.max_padded):
            return False
        if self.budget_bytes is None or self._cost is None:
            return True
        return self._by_memory(self._cost, self.budget_bytes, self._cost.floor, length) > 0

    def ran(self) -> None:
        """A batch ran."""
        self.load_limit *= RECOVERY

    def out_of_memory(self, size: int, length: int) -> None:
        """A batch of this shape ran out of memory: from now on at most four fifths of it."""
        if (load := size * self._load(length)) > 0:
            self.load_limit = min(self.load_limit, load / OUT_OF_MEMORY_FACTOR)

    def forgive(self) -> None:
        """It did for one record that does so alone: take ``out_of_memory`` back."""
        self.load_limit *= OUT_OF_MEMORY_FACTOR

    def _load(self, length: int) -> float:
        """m(L)."""
        if self._by_model and self._cost is not None:
            return self._cost.model.record_bytes(length)
        return max(length, 1)

    def _by_memory(self, cost: OnlineCost, budget_bytes: float, kappa: float, length: int) -> int:
        model = cost.model
        room = budget_bytes / kappa - model.a_bytes
        if room < 0:
            return 0
        each = model.record_bytes(length)
        return int(min(room / each, self.max_size)) if each > 0 else self.max_size
