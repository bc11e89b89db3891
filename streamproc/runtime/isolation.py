"""Decides what becomes of a batch that failed: again, in parts, or given up.

Passive: no clock, no I/O. It goes by the failure's cause: a failed batch is executed again as a whole as often as the
cause's ``retries`` say, with exponential back-off and jitter. Then it is split in halves, those that fail again too,
and four records or fewer one by one, until the records at fault stand alone.

A record that stands alone is not always at fault. Its worker may have been killed by somebody else, so it is executed
once more when a worker died with it alone for the first time of that cause; and so is one that failed at its very first
execution for the lack of time or memory.

Invariants: besides the retries that the settings ask for, a record at fault is in at most ⌈log₂ n⌉ + 1 further
executions, so that one in 64 ends at most seven workers; every other record of the batch is delivered; a record is
retried at most ``retries`` times for one cause, whatever batches it is in.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from streamproc.records import Batch, Cause, Failure, Span
from streamproc.settings import ErrorSettings

MAX_BACKOFF_S = 30.0


@dataclass(frozen=True, slots=True)
class Retry:
    """Execute the batch again after ``delay_s``."""

    batch: Batch
    delay_s: float


@dataclass(frozen=True, slots=True)
class Split:
    """Execute the parts."""

    parts: list[Batch]


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The batch is one record, and it is at fault."""


class Isolation:
    """The policy of one task."""

    def __init__(self, settings: ErrorSettings, next_id: Callable[[], int], rng: random.Random) -> None:
        self._policies = {cause: settings.policy(cause) for cause in Cause}
        self._next_id = next_id
        self._rng = rng

    def decide(self, batch: Batch, failure: Failure) -> Retry | Split | GiveUp:
        """What to do with a batch whose execution failed."""
        alone = batch.size == 1
        retries = self._policies[failure.cause].retries
        if batch.retried.count(failure.cause) < retries or (alone and _may_be_innocent(batch, failure)):
            again = self._again(batch, batch.spans, batch.closed_by)
            again.retried = (*batch.retried, failure.cause)
            again.died_alone = (*batch.died_alone, failure.cause) if alone and failure.killed else batch.died_alone
            return Retry(again, self._delay_s(len(batch.retried), failure.cause))
        if not alone:
            return Split([self._again(batch, spans, "split") for spans in batch.parts()])
        return GiveUp()

    def _delay_s(self, retries: int, cause: Cause) -> float:
        pause_s = min(self._policies[cause].backoff_ms / 1_000 * 2.0**retries, MAX_BACKOFF_S)
        return pause_s * self._rng.uniform(0.5, 1.0)

    def _again(self, batch: Batch, spans: Sequence[Span], closed_by: str) -> Batch:
        return Batch(
            id=self._next_id(),
            task=batch.task,
            spans=spans,
            opened_at=batch.opened_at,
            closed_at=batch.closed_at,
            closed_by=closed_by,
            fill=batch.fill,
            attempt=batch.attempt + 1,
            retried=batch.retried,
            account=batch.account,
        )


def _may_be_innocent(batch: Batch, failure: Failure) -> bool:
    """Whether a record that failed alone is executed once more although no retry is left."""
    if failure.killed:
        return failure.cause not in batch.died_alone
    return batch.attempt == 1 and failure.cause in (Cause.TIMEOUT, Cause.OOM)
