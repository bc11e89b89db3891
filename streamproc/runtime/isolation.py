"""Decides what becomes of a batch that failed: again, in halves, or given up.

Passive: no clock, no I/O. A failed batch is executed again up to ``retries`` times, with exponential back-off and
jitter, where the failure may pass. Then it is split in halves, and each half that fails again, until the records at
fault stand alone: at most ⌈log₂ n⌉ further executions hold a culprit, and every other record of the batch is
delivered. A failure that would come again the same way is split at once.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from streamproc.records import Batch, Failure, Span
from streamproc.settings import ErrorSettings

MAX_BACKOFF_S = 30.0


@dataclass(frozen=True, slots=True)
class Retry:
    """Execute the batch again after ``delay_s``."""

    batch: Batch
    delay_s: float


@dataclass(frozen=True, slots=True)
class Split:
    """Execute the halves."""

    halves: tuple[Batch, Batch]


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The batch is one record, and it is at fault."""


class Isolation:
    """The policy of one task."""

    def __init__(self, settings: ErrorSettings, next_id: Callable[[], int], rng: random.Random) -> None:
        self._retries = settings.retries
        self._backoff_s = settings.backoff_ms / 1_000
        self._next_id = next_id
        self._rng = rng

    def decide(self, batch: Batch, failure: Failure) -> Retry | Split | GiveUp:
        """What to do with a batch whose execution failed."""
        if failure.retriable and batch.closed_by != "split" and batch.attempt <= self._retries:
            delay = min(self._backoff_s * 2 ** (batch.attempt - 1), MAX_BACKOFF_S) * self._rng.uniform(0.5, 1.0)
            return Retry(self._again(batch, batch.spans, batch.closed_by), delay)
        if batch.size > 1:
            left, right = batch.halves()
            return Split((self._again(batch, left, "split"), self._again(batch, right, "split")))
        return GiveUp()

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
        )
