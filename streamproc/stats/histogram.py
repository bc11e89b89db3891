"""A distribution that can be merged: exact count, sum, least and greatest value, and counts in log-spaced buckets.

The buckets are fixed, bucket ``i`` holding the values above ``GAMMA ** (i - 1)`` and up to ``GAMMA ** i``, so that to
merge is to add counts: what comes out does not depend on what was merged first. Values up to ``SMALLEST`` share one
bucket, those from ``LARGEST`` on another. Only buckets in use are kept, at most 1,040 of them.

Invariants: a quantile between ``SMALLEST`` and ``LARGEST`` is off by at most ``RELATIVE_ERROR`` of the true one, which
is that of nearest rank; one below, by ``SMALLEST``. Sums are whole numbers of ``UNIT``: they are exact, and the same in
any order, as those of floats are not.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, Self

RELATIVE_ERROR = 0.02
GAMMA = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR)
SMALLEST = 1e-3
LARGEST = 1e15
UNIT = 1e-5
"""What the metrics record is rounded to."""

_LOG_GAMMA = math.log(GAMMA)
_LEAST = math.ceil(math.log(SMALLEST) / _LOG_GAMMA)
_MOST = math.ceil(math.log(LARGEST) / _LOG_GAMMA)


class Distribution:
    """Values of one kind, such as the milliseconds of a step, one for each batch that has it."""

    __slots__ = ("buckets", "count", "greatest", "least", "units")

    def __init__(self) -> None:
        self.count = 0
        self.units = 0
        """The sum, in ``UNIT``."""
        self.least = math.inf
        self.greatest = -math.inf
        self.buckets: Counter[int] = Counter()

    def add(self, value: float) -> None:
        """Count a value; a negative one is as 0, one beyond ``LARGEST`` as that."""
        value = min(max(value, 0.0), LARGEST)
        self.count += 1
        self.units += round(value / UNIT)
        self.least = min(self.least, value)
        self.greatest = max(self.greatest, value)
        self.buckets[_bucket(value)] += 1

    def merge(self, other: Distribution) -> None:
        """Count all that the other has counted."""
        self.count += other.count
        self.units += other.units
        self.least = min(self.least, other.least)
        self.greatest = max(self.greatest, other.greatest)
        self.buckets.update(other.buckets)

    @property
    def sum(self) -> float:
        """The values together."""
        return self.units * UNIT

    def quantile(self, q: float) -> float | None:
        """About the least value that is not below the share ``q`` of all, 0 to 1; None where there is no value."""
        if not self.count:
            return None
        wanted = max(1, math.ceil(q * self.count))
        seen = 0
        for bucket, count in sorted(self.buckets.items()):
            seen += count
            if seen >= wanted:
                # In the middle by ratio: as far from the bucket's lower end as from its upper one.
                middle = 0.0 if bucket == _LEAST else 2 * GAMMA**bucket / (GAMMA + 1)
                return min(max(middle, self.least), self.greatest)
        raise AssertionError("the buckets hold fewer values than were counted")

    def state(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return {
            "count": self.count,
            "units": str(self.units),  # bytes of memory, in this unit, soon need more than the 64 bits of JSON
            "least": self.least if self.count else None,
            "greatest": self.greatest if self.count else None,
            "buckets": {str(bucket): count for bucket, count in sorted(self.buckets.items())},
        }

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Self:
        """The distribution that a state was made of."""
        it = cls()
        it.count, it.units = state["count"], int(state["units"])
        if it.count:
            it.least, it.greatest = state["least"], state["greatest"]
        it.buckets = Counter({int(bucket): count for bucket, count in state["buckets"].items()})
        return it


def _bucket(value: float) -> int:
    if value <= SMALLEST:
        return _LEAST
    # One that is just above SMALLEST is counted there too where its own bucket would be the same.
    return min(max(math.ceil(math.log(value) / _LOG_GAMMA), _LEAST + 1), _MOST)
