"""Which records fit no batch, not even alone, and what to say of each: for tasks that had rather not run those.

Pure; O(1) for records of which the longest and the largest fit.
"""

from __future__ import annotations

from streamproc.records import Cause, Failure, Span
from streamproc.runtime.limits import Limits
from streamproc.runtime.online_cost import OnlineCost


class Refusal:
    """Refuses the records of one task that exceed its limits alone."""

    def __init__(self, limits: Limits, cost: OnlineCost | None) -> None:
        self._limits = limits
        self._cost = cost

    def of(self, span: Span) -> list[tuple[int, Failure]]:
        """The records that are refused, by their place in the span, in order."""
        lengths = span.lengths or [1] * len(span.records)
        if self._limits.fits_alone(max(lengths), max(span.sizes)):
            return []
        return [
            (index, self._failure(length, size))
            for index, (length, size) in enumerate(zip(lengths, span.sizes, strict=True))
            if not self._limits.fits_alone(length, size)
        ]

    def _failure(self, length: int, size_bytes: int) -> Failure:
        limits, cost = self._limits, self._cost
        if size_bytes > limits.max_bytes:
            why = f"its value has {size_bytes} bytes, and batch.max_bytes is {limits.max_bytes}"
        elif limits.max_padded is not None and length > limits.max_padded:
            why = f"its length is {length}, and batch.max_padded is {limits.max_padded}"
        else:
            predicted = 0.0 if cost is None else cost.floor * cost.model.memory_bytes(1, length)
            why = (
                f"by itself it is predicted to need {predicted:.0f} bytes of memory, its length being {length}, and a "
                f"worker may hold {limits.budget_bytes or 0:.0f}"
            )
        message = f"the record fits no batch: {why}; shorten it, raise the limit, or set batch.oversized to alone"
        return Failure(Cause.TOO_LARGE, "batch", "Oversized", message)
