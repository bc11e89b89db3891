"""Opens when too many records fail, so that a broken model does not turn a whole stream into dead letters.

Passive: no clock, no I/O; ``now`` is in seconds of a clock that does not go back. It is told what became of each span,
and opens by either of two rules:

    rate   of the records decided within ``window_s``, at least ``min_records``, a share of ``max_rate`` or more was bad
    run    ``max_run`` records were bad in a row, in the order in which outcomes were decided

A bad record is one that was given up: a dead letter, or a drop that the settings ask for, which is as lost to the
results. What an open circuit means for the stream is its owner's business; this decides when it opens and closes.

Invariants: the rate is looked at after each span that had a bad record, the run within spans too. The window moves in
``BUCKETS`` steps, so that memory is bounded: it covers ``window_s`` less up to a step. While the circuit is open
nothing is counted, and a circuit that closes begins at zero.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

from streamproc.records import Failure, Outcome, Status
from streamproc.runtime.failures import decode_failure
from streamproc.settings import CircuitSettings

BUCKETS = 30
MAX_REASONS = 20
"""Reasons that a bucket tells apart: they are type names that a user's backend chooses."""
BY_HAND = "opened by hand"
_GOOD = bytes([Status.RESULT])


@dataclass(slots=True)
class _Bucket:
    """What was decided in one step of the window."""

    number: int
    decided: int = 0
    bad: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    """Bad records by stage and kind; the last one of a span stands for all of that span."""


class Circuit:
    """The circuit of one task.

    ``reason`` says why it is open, and ``summary`` does for the log: without what an exception said, which may quote a
    record. ``closes_at`` says when it closes by itself, if it does.
    """

    def __init__(self, settings: CircuitSettings) -> None:
        self._settings = settings
        self._buckets: deque[_Bucket] = deque()
        self._decided = 0
        self._bad = 0
        self._run = 0
        self.opened_at: float | None = None
        self.closes_at: float | None = None
        self.reason = self.summary = ""
        self.openings = 0
        self.by_hand = False
        """Whether somebody opened it, or keeps it open."""

    @property
    def is_open(self) -> bool:
        """Whether the task is to take nothing more."""
        return self.opened_at is not None

    def take(self, outcome: Outcome, now: float) -> bool:
        """Count the records of a span that was decided; True when that opens the circuit."""
        if self.is_open or not self._settings.enabled:
            return False
        statuses = outcome.statuses
        bad = len(statuses) - statuses.count(_GOOD)
        bucket = self._bucket(now)
        bucket.decided += len(statuses)
        self._decided += len(statuses)
        if not bad:
            self._run = 0
            return False
        value = outcome.values[len(statuses.rstrip(_GOOD)) - 1]
        failure = value if isinstance(value, Failure) else decode_failure(value)
        self._count_bad(bucket, bad, failure)
        return self._judge(self._longest_run(statuses), failure, now)

    def turned_bad(self, failure: Failure, now: float) -> bool:
        """Count a record as bad that ``take`` has counted as good; True when that opens the circuit.

        That is a result which turns out not to fit its topic. It is late for the run, and counts for the rate alone.
        """
        if self.is_open or not self._settings.enabled:
            return False
        self._count_bad(self._bucket(now), 1, failure)
        return self._judge(0, failure, now)

    def open_by_hand(self, now: float) -> None:
        """Open it until ``close``; one that is open already does not close by itself any more."""
        self.by_hand = True
        if not self.is_open:
            self._open(BY_HAND, now, closes_at=None)
        elif self.closes_at is not None:
            self.closes_at = None
            self.reason += "; kept open by hand"
            self.summary += "; kept open by hand"

    def due(self, now: float) -> bool:
        """Whether it is open and its time is over."""
        return self.closes_at is not None and now >= self.closes_at

    def close(self) -> None:
        """Begin again, with all counts at zero."""
        self.opened_at = self.closes_at = None
        self.reason = self.summary = ""
        self.by_hand = False
        self._forget()

    def reload(self, settings: CircuitSettings) -> None:
        """Go by other limits. What was counted is gone, since it tells of another model."""
        self._settings = settings
        if not self.is_open:
            self._forget()

    def _forget(self) -> None:
        self._buckets.clear()
        self._decided = self._bad = self._run = 0

    def counts(self, now: float) -> tuple[int, int]:
        """Bad and decided records of the window; of an open circuit those at its opening."""
        if not self.is_open:
            self._expire(self._number(now))
        return min(self._bad, self._decided), self._decided

    # -- the window

    def _number(self, now: float) -> int:
        return int(now * BUCKETS // self._settings.window_s)

    def _bucket(self, now: float) -> _Bucket:
        """The bucket of this moment, those that have left the window gone."""
        number = self._number(now)
        if not self._buckets or self._buckets[-1].number != number:
            self._expire(number)
            self._buckets.append(_Bucket(number))
        return self._buckets[-1]

    def _expire(self, number: int) -> None:
        oldest = number - BUCKETS + 1
        while self._buckets and self._buckets[0].number < oldest:
            gone = self._buckets.popleft()
            self._decided -= gone.decided
            self._bad -= gone.bad

    def _count_bad(self, bucket: _Bucket, count: int, failure: Failure) -> None:
        bucket.bad += count
        self._bad += count
        reason = f"{failure.stage} {failure.kind}"
        if reason in bucket.reasons or len(bucket.reasons) < MAX_REASONS:
            bucket.reasons[reason] += count

    # -- the rules

    def _longest_run(self, statuses: bytes) -> int:
        """The longest run of bad records that has its end, so far, in this span."""
        first, last = statuses.find(_GOOD), statuses.rfind(_GOOD)
        if first < 0:
            self._run += len(statuses)
            return self._run
        longest = max(self._run + first, len(statuses) - 1 - last)
        self._run = len(statuses) - 1 - last
        if self._settings.max_run is not None and last - first > self._settings.max_run:
            longest = max(longest, *map(len, statuses[first:last].split(_GOOD)))
        return longest

    def _judge(self, run: int, failure: Failure, now: float) -> bool:
        settings = self._settings
        bad, decided = self.counts(now)
        if settings.max_run is not None and run >= settings.max_run:
            what = f"{run:,} records in a row failed"
        elif settings.max_rate is not None and decided >= settings.min_records and bad >= settings.max_rate * decided:
            what = f"{bad:,} of the last {decided:,} records failed"
        else:
            return False
        reasons = sum((bucket.reasons for bucket in self._buckets), Counter[str]())
        (commonest, _), *_ = reasons.most_common(1)
        closes_at = None if settings.close_after_s is None else now + settings.close_after_s
        self._open(f"{what}, most often with {commonest}", now, closes_at=closes_at)
        self.reason += f"; the last: {failure.stage} {failure.kind}: {failure.message}"
        return True

    def _open(self, reason: str, now: float, *, closes_at: float | None) -> None:
        self.reason = self.summary = reason
        self.opened_at = now
        self.closes_at = closes_at
        self.openings += 1
