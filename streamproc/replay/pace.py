"""When captured records are due again, and how well that was kept. Pure: time is an argument."""

from __future__ import annotations

from collections import Counter
from typing import Protocol


class Pace(Protocol):
    """When records are due, asked once for each in their order."""

    def due(self, timestamp_ms: int) -> float:
        """Seconds after the start at which the next record is due; never before the one before it."""


class OriginalPace:
    """As in the capture: as far from the first record as then, over ``speed``.

    A record whose timestamp is before one that came earlier is due at once, as it was then.
    """

    def __init__(self, speed: float = 1.0) -> None:
        self._ms_in_second = 1_000 * speed
        self._first: int | None = None
        self._last = 0.0

    def due(self, timestamp_ms: int) -> float:
        """Seconds after the start at which the next record is due."""
        if self._first is None:
            self._first = timestamp_ms
        self._last = max(self._last, (timestamp_ms - self._first) / self._ms_in_second)
        return self._last


class FixedRate:
    """So many records a second, whatever their timestamps."""

    def __init__(self, records_per_s: float) -> None:
        self._rate = records_per_s
        self._count = 0

    def due(self, timestamp_ms: int) -> float:  # noqa: ARG002 - the protocol's
        """Seconds after the start at which the next record is due."""
        due = self._count / self._rate
        self._count += 1
        return due


class Unpaced:
    """As fast as possible: everything is due at once."""

    def due(self, timestamp_ms: int) -> float:  # noqa: ARG002 - the protocol's
        """Seconds after the start at which the next record is due."""
        return 0.0


class Deviation:
    """How far records came from when they were due: late, and in the time between neighbours.

    Keeps counts, not records; a quantile is at most 1/32 above the true one.
    """

    def __init__(self) -> None:
        self._between: Counter[int] = Counter()
        self._late: Counter[int] = Counter()

    def observe(self, dues: list[float], before: tuple[float, float] | None, now: float) -> tuple[float, float]:
        """Records with these dues went out at ``now``, behind one with the due and the time in ``before``.

        All in seconds after the start. Returns what is ``before`` for those that follow.
        """
        last_due, last_at = (dues[0], now) if before is None else before
        for due in dues:
            self._between[_bucket(abs((now - last_at) - (due - last_due)))] += 1
            self._late[_bucket(max(0.0, now - due))] += 1
            last_due, last_at = due, now
        return last_due, last_at

    def between_ms(self, share: float) -> float | None:
        """The error of the time between neighbours, in milliseconds, that ``share`` of them is not above."""
        return _quantile_ms(self._between, share)

    def late_ms(self, share: float) -> float | None:
        """How late, in milliseconds, ``share`` of the records was at most."""
        return _quantile_ms(self._late, share)


def _bucket(seconds: float) -> int:
    """The upper bound, in microseconds, of the bucket that a time is in."""
    exact = int(seconds * 1_000_000)
    shift = max(0, exact.bit_length() - 6)
    return exact if not shift else ((exact >> shift) + 1 << shift) - 1


def _quantile_ms(counts: Counter[int], share: float) -> float | None:
    wanted = share * counts.total()
    seen = 0
    for bucket in sorted(counts):
        seen += counts[bucket]
        if seen >= wanted:
            return bucket / 1_000
    return None
