"""Other batchers' published rules, to be compared with ours by ``benchmarks.batching``.

Each is written from its project's sources or documentation, named at its class, as its rule and no more: what a rule
decides, with the same limits as ours. The simulated device holds no more than the padded limit, so that where a rule
knows none its batch is cut there. Nothing is shed, although some of them would cancel what waits too long.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from streamproc.records import Batch, Span
from streamproc.settings import BatchSettings

TICK_S = 0.001


@dataclass(frozen=True, slots=True)
class Item:
    """A waiting record: a span of its own."""

    span: Span
    length: int
    arrived_at: float


class Peer:
    """What the rules have in common: the limits, and records one by one."""

    def __init__(self, settings: BatchSettings) -> None:
        assert settings.max_padded is not None
        self.max_size, self.max_padded = settings.max_size, settings.max_padded
        self.max_wait_s = settings.max_wait_ms / 1_000
        self._ids = itertools.count(1)

    def add(self, span: Span) -> None:
        """Take records in."""
        lengths = span.lengths or ()
        self.arrived([Item(it, length, it.arrived_at) for it, length in zip(span.singles(), lengths, strict=True)])

    def arrived(self, items: list[Item]) -> None:
        """Records came."""
        raise NotImplementedError

    def full(self) -> str | None:
        """None of them gives a busy worker a batch."""
        return None

    def overtaken(self) -> str | None:
        """Results never pile up here."""
        return None

    def ran(self, batch: Batch, seen_ms: float) -> None:
        """Most of them do not care."""

    def fits(self, size: int, longest: int) -> bool:
        """Whether a batch is within the limits; one record always is."""
        return size == 1 or (size <= self.max_size and size * longest <= self.max_padded)

    def batch(self, items: Sequence[Item], now: float, rule: str) -> Batch:
        """These records as a batch."""
        opened_at = min(it.arrived_at for it in items)
        return Batch(next(self._ids), "peer", [it.span for it in items], opened_at, now, rule, 0.0)


class Fifo(Peer):
    """A queue in order of arrival."""

    def __init__(self, settings: BatchSettings) -> None:
        super().__init__(settings)
        self.queue: deque[Item] = deque()

    def arrived(self, items: list[Item]) -> None:
        """Behind the others."""
        self.queue.extend(items)

    @property
    def opened_at(self) -> float | None:
        """When the oldest arrived."""
        return self.queue[0].arrived_at if self.queue else None

    @property
    def deadline(self) -> float | None:
        """At once."""
        return self.opened_at

    def due(self, now: float, *, backlog: bool) -> str | None:  # noqa: ARG002 - the same for all
        """Whatever is there goes to a free worker."""
        return "free" if self.queue else None

    def take(self, now: float, rule: str) -> Batch:
        """The oldest, as many as fit."""
        taken: list[Item] = []
        longest = 0
        while self.queue and self.fits(len(taken) + 1, max(longest, self.queue[0].length)):
            item = self.queue.popleft()
            longest = max(longest, item.length)
            taken.append(item)
        return self.batch(taken, now, rule)


class Tei(Fifo):
    """text-embeddings-inference, ``core/src/queue.rs``, a padded model.

    First in, first out, while max(longest, length) × (n + 1) is within ``max_batch_tokens`` and n is below
    ``max_batch_requests``; the next batch is asked for when the backend is free, and nothing waits for company.
    """


class Infinity(Peer):
    """Infinity (infinity_emb), ``inference/queue.py`` and ``batch_handler.py``: up to 8 batches at once, sorted.

    It pops n = min(8, max(1, waiting // size)) batches' worth in order of arrival, sorts them by length where n > 1,
    and cuts them into runs of ``size``, which go one after the other before anything else is looked at.
    """

    BATCHES = 8

    def __init__(self, settings: BatchSettings) -> None:
        super().__init__(settings)
        self.queue: deque[Item] = deque()
        self.ready: deque[list[Item]] = deque()

    def arrived(self, items: list[Item]) -> None:
        """Behind the others."""
        self.queue.extend(items)

    @property
    def opened_at(self) -> float | None:
        """When the oldest arrived."""
        first = self.ready[0] if self.ready else self.queue
        return min(it.arrived_at for it in itertools.islice(first, 1)) if first else None

    @property
    def deadline(self) -> float | None:
        """At once."""
        return self.opened_at

    def due(self, now: float, *, backlog: bool) -> str | None:  # noqa: ARG002 - the same for all
        """Whatever is there goes to a free worker."""
        return "free" if self.ready or self.queue else None

    def take(self, now: float, rule: str) -> Batch:
        """The next of the sorted batches."""
        if not self.ready:
            count = min(self.BATCHES, max(1, len(self.queue) // self.max_size))
            popped = [self.queue.popleft() for _ in range(min(len(self.queue), count * self.max_size))]
            if count > 1:
                popped.sort(key=lambda it: it.length)
            for start in range(0, len(popped), self.max_size):
                self.ready.extend(self._cut(popped[start : start + self.max_size]))
        return self.batch(self.ready.popleft(), now, rule)

    def _cut(self, items: list[Item]) -> list[list[Item]]:
        parts: list[list[Item]] = [[]]
        for it in items:
            if parts[-1] and not self.fits(len(parts[-1]) + 1, max(one.length for one in (*parts[-1], it))):
                parts.append([])
            parts[-1].append(it)
        return parts


class Beam(Peer):
    """Apache Beam, ``BatchElements`` (apache_beam.transforms.util) with ``length_fn``: buckets with their own timers.

    A bucket a power of two (16 and below, to 512, and the rest), each a batch of its own that goes when it holds the
    maximum, or when ``max_batch_duration_secs`` have passed since its first record.
    """

    BOUNDS = (16, 32, 64, 128, 256, 512)

    def __init__(self, settings: BatchSettings) -> None:
        super().__init__(settings)
        self.buckets: list[deque[Item]] = [deque() for _ in range(len(self.BOUNDS) + 1)]
        self.longest = [0] * len(self.buckets)

    def arrived(self, items: list[Item]) -> None:
        """Each into its bucket."""
        for it in items:
            at = bisect_left(self.BOUNDS, it.length)
            self.buckets[at].append(it)
            self.longest[at] = max(self.longest[at], it.length)

    @property
    def opened_at(self) -> float | None:
        """When the oldest arrived."""
        return min((bucket[0].arrived_at for bucket in self.buckets if bucket), default=None)

    @property
    def deadline(self) -> float | None:
        """When the first timer ends."""
        opened_at = self.opened_at
        return None if opened_at is None else opened_at + self.max_wait_s

    def due(self, now: float, *, backlog: bool) -> str | None:  # noqa: ARG002 - timers know nothing of it
        """Whether a bucket is full or its timer has ended."""
        return None if self._chosen(now) is None else "bucket"

    def take(self, now: float, rule: str) -> Batch:
        """The bucket that is due first."""
        at = self._chosen(now)
        assert at is not None
        bucket, taken, longest = self.buckets[at], list[Item](), 0
        while bucket and self.fits(len(taken) + 1, max(longest, bucket[0].length)):
            longest = max(longest, bucket[0].length)
            taken.append(bucket.popleft())
        if not bucket:
            self.longest[at] = 0
        return self.batch(taken, now, rule)

    def _chosen(self, now: float) -> int | None:
        due = [
            at
            for at, bucket in enumerate(self.buckets)
            if bucket
            and (now >= bucket[0].arrived_at + self.max_wait_s or not self.fits(len(bucket) + 1, self.longest[at]))
        ]
        return min(due, key=lambda at: self.buckets[at][0].arrived_at, default=None)


class BentoMl(Fifo):
    """BentoML, adaptive batching (``CorkDispatcher``): waits for company while that is expected to pay.

    A batch takes a·n + b; a and b are fitted to the last 50 batches, and so is the mean wait. With n waiting, the last
    of them for w_n, it waits on while n < max and n·(w_n + tick + a) ≤ 0.95·(mean wait), and looks again each tick of
    1 ms.
    (Its sources take the newest first. Here it is the oldest, which can only be better for p99.)
    """

    KEPT = 50
    DECAY = 0.95

    def __init__(self, settings: BatchSettings) -> None:
        super().__init__(settings)
        self.kept: deque[tuple[int, float, float]] = deque(maxlen=self.KEPT)
        self.per_record_s = self.max_wait_s * 2 / 30
        self.mean_wait_s = 0.01
        self.asked_at = 0.0

    @property
    def deadline(self) -> float | None:
        """The next tick."""
        return self.asked_at + TICK_S if self.queue else None

    def due(self, now: float, *, backlog: bool) -> str | None:  # noqa: ARG002 - it knows nothing of it
        """Whether waiting on pays no more."""
        if not self.queue:
            return None
        self.asked_at = now
        n, newest_s = len(self.queue), now - self.queue[-1].arrived_at
        waits = n < self.max_size and n * (newest_s + TICK_S + self.per_record_s) <= self.mean_wait_s * self.DECAY
        return None if waits else "cork"

    def ran(self, batch: Batch, seen_ms: float) -> None:
        """Fit again."""
        self.kept.append((batch.size, seen_ms / 1_000, batch.closed_at - batch.opened_at))
        sizes = np.array([[size, 1.0] for size, _, _ in self.kept])
        (per_record_s, _), *_ = np.linalg.lstsq(sizes, np.array([took for _, took, _ in self.kept]), rcond=None)
        self.per_record_s = max(1e-6, float(per_record_s))
        self.mean_wait_s = sum(wait for *_, wait in self.kept) / len(self.kept)
