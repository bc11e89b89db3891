"""Decides when a window closes; which records go together is the window's business.

Passive: no thread, no clock, no I/O. It does not block and does not retry. A window opens at its first record. A free
worker gets a batch at the first of these rules, which are all here:

    size, bytes, padding, memory   a limit is reached
    wait                           the oldest record has waited for ``max_wait_ms``: one deadline for all records
    slo                            the oldest record's target is nearer than what its batch takes at worst, and a margin
    knee                           more records would hardly make the batch cheaper by record
    backlog                        more records are known to wait in Kafka, so that holding these back buys nothing

While every worker is busy only ``full`` counts, and the window goes on growing until a batch cannot, or some others
wait behind it. While results pile up that wait for earlier records of their partition, only records go that others have
overtaken (rule ``overtaken``): theirs are the results that are waited for, and nothing else would let the pile go. At
shutdown and on revocation ``discard`` gives back what was not dispatched; Kafka still has it.

Invariants: a batch is never empty; a record that alone exceeds a limit runs alone; a batch holds records of one task
only, of any number of partitions; once the oldest record's wait is over it is in the very next batch, so that a record
is passed by no more batches than there are records before it.
"""

from __future__ import annotations

from collections.abc import Callable

from streamproc.records import Batch, Failure, Lease, Span
from streamproc.runtime.limits import Limits
from streamproc.runtime.online_cost import OnlineCost
from streamproc.runtime.refusal import Refusal
from streamproc.runtime.window import Shape, Window
from streamproc.runtime.window_bucketed import BucketedWindow
from streamproc.runtime.window_exact import ExactWindow
from streamproc.runtime.window_fifo import FifoWindow
from streamproc.settings import BatchSettings

OVERTAKEN = "overtaken"
LEAST_MS = 1e-9
UNKNOWN = 0.5
"""The part of the target that a record may wait while nobody knows what batches take."""
AHEAD = 4
"""Batches of the greatest size that wait, from which on one may be queued behind a busy worker."""
SHAPE_AHEAD = 8
"""For a target the oldest record's batch is made out again once the window has grown by one part in so many."""


class Batcher:
    """The waiting records of one task.

    Args:
        task: Its name.
        settings: Strategy and limits.
        next_id: Numbers batches.
        cost: Predicts times and memory; needed where records have lengths, and for a target. Records without count as 1
            long.
        memory_budget_bytes: Most memory of a batch, by ``cost``.
        account: Whose share of the workers' time its batches take; the task's by default.
    """

    def __init__(
        self,
        task: str,
        settings: BatchSettings,
        next_id: Callable[[], int],
        *,
        cost: OnlineCost | None = None,
        memory_budget_bytes: float | None = None,
        account: str = "",
    ) -> None:
        self._task = task
        self._account = account
        self._max_wait_s = settings.max_wait_ms / 1_000
        self._next_id = next_id
        self._cost = cost
        target_ms = settings.target_latency_ms
        self._target_s = None if target_ms is None else (target_ms - settings.target_margin_ms) / 1_000
        self._max_size = 1 if settings.strategy == "none" else settings.max_size
        self._limits = Limits(
            self._max_size,
            settings.max_bytes,
            max_padded=settings.max_padded,
            cost=cost,
            memory_budget_bytes=memory_budget_bytes,
        )
        self._refusal = Refusal(self._limits, cost) if settings.oversized == "dead_letter" else None
        self._window = _window(settings, self._limits, cost)
        self._look_from = 0
        """Records from which on the knee may have been reached, while none is longer than ``_look_longest``."""
        self._look_longest = 0
        self._shape = Shape(0, 0)
        self._shape_until = 0
        """Records from which on the oldest record's batch is made out anew, for the target."""

    @property
    def size(self) -> int:
        """Records that wait."""
        return self._window.size

    @property
    def size_bytes(self) -> int:
        """Bytes of their values."""
        return self._window.size_bytes

    def refused(self, span: Span) -> list[tuple[int, Failure]]:
        """The records that fit no batch and are not to run alone, by their place in the span; not to be added."""
        return [] if self._refusal is None else self._refusal.of(span)

    def add(self, span: Span) -> None:
        """Take records in; their window opened at ``span.arrived_at``."""
        self._window.add(span)

    @property
    def opened_at(self) -> float | None:
        """When the oldest waiting record arrived; None without records."""
        return self._window.opened_at

    @property
    def deadline(self) -> float | None:
        """When the oldest record's wait is over, or its target is near; None without records."""
        opened_at = self._window.opened_at
        if opened_at is None:
            return None
        deadline = opened_at + self._max_wait_s
        return min(deadline, self._latest(opened_at)) if self._target_s is not None else deadline

    def full(self) -> str | None:
        """The rule by which a batch may go although no worker is free: it can grow no more, or enough waits besides.

        A worker that has nothing queued stands still from its answer until the next batch is there, some 1.5 ms with
        much else to do. Once some others wait behind it, a batch gains less by waiting than that.
        """
        rule = self._window.full()
        if rule is None and self._window.size >= AHEAD * self._max_size:
            rule = self._window.ripe()
        return rule

    def due(self, now: float, *, backlog: bool) -> str | None:
        """The rule by which a free worker should get a batch now, or None."""
        opened_at = self._window.opened_at
        if opened_at is None:
            return None
        rule = self._window.ripe()
        if rule is not None:
            return rule
        if now >= opened_at + self._max_wait_s:
            return "wait"
        if self._target_s is not None and now >= self._latest(opened_at):
            return "slo"
        if self._at_knee():
            return "knee"
        return "backlog" if backlog else None

    def overtaken(self) -> str | None:
        """The rule by which records should go although results pile up: others that came later have gone before."""
        return OVERTAKEN if self._window.is_overtaken() else None

    def take(self, now: float, rule: str) -> Batch:
        """Close the window by ``rule`` and hand out a batch; there must be records.

        It has the oldest record, unless another batch is full and the oldest record's wait is not over yet.
        """
        opened_at = self._window.opened_at
        if opened_at is None:
            raise AssertionError("there is nothing to take")
        overdue = self.deadline is not None and now >= self.deadline
        self._look_from = self._shape_until = 0
        if rule == OVERTAKEN:
            spans = self._window.take_overtaken()
        else:
            spans = self._window.take(oldest=overdue or rule not in ("size", "bytes", "padding", "memory"))
        batch = Batch(
            id=self._next_id(),
            task=self._task,
            spans=spans,
            opened_at=min([span.arrived_at for span in spans]),
            closed_at=now,
            closed_by=rule,
            fill=0.0,
            account=self._account,
        )
        batch.fill = batch.size / self._max_size
        self.predict(batch)
        return batch

    def predict(self, batch: Batch) -> None:
        """Note what is expected of a batch, as far as there is a model."""
        if self._cost is not None:
            shape = batch.size, _length(batch)
            batch.predicted_ms = self._cost.model.time_ms(*shape)
            batch.model_bytes = self._cost.model.memory_bytes(*shape)
            batch.predicted_bytes = self._cost.memory_bytes(*shape) or None

    def ran(self, batch: Batch, seen_ms: float) -> None:
        """A batch took so long in its worker: better predictions from now on."""
        self._limits.ran()
        if self._cost is not None:
            self._cost.observe_time(batch.size, _length(batch), seen_ms)

    def held(self, model_bytes: float, seen_bytes: float) -> None:
        """A worker held so much memory at its peak; the largest batch that its process ran has ``model_bytes``."""
        if self._cost is not None:
            self._cost.observe_memory(model_bytes, seen_bytes)

    def out_of_memory(self, batch: Batch) -> int | None:
        """A batch ran out of memory: make those to come smaller.

        Returns: How many records of its length a batch may have now; None where it says nothing new. Parts of a batch
        say nothing new, nor does a record alone, nor what was made before the limits were lowered to what they are.
        """
        length = _length(batch)
        if batch.attempt > 1 or batch.size == 1 or batch.size > max(self._limits.n_max(length), 1):
            return None
        self._limits.out_of_memory(batch.size, length)
        return max(self._limits.n_max(length), 1)

    def forgive(self, batch: Batch) -> None:
        """This one record of a batch that ran out of memory does so alone: the batch was not too large."""
        if batch.attempt > 1:
            self._limits.forgive()

    @property
    def cost(self) -> OnlineCost | None:
        """What predicts times and memory."""
        return self._cost

    @property
    def limits(self) -> Limits:
        """What a batch may hold."""
        return self._limits

    def take_over(self, before: Batcher) -> None:
        """The waiting records of a batcher whose settings, or costs, hold no more; strategy and lengths are the same.

        Whoever was overtaken there is still: results may pile up that wait for it.
        """
        for span in before.discard():
            self._window.add(span)
        self._window.overtake()

    def discard(self, leases: set[Lease] | None = None) -> list[Span]:
        """Give back the waiting records of these leases, or all of them."""
        self._look_from = self._shape_until = 0
        return self._window.discard(leases)

    def _latest(self, opened_at: float) -> float:
        """When the oldest record's batch has to begin to be done within the target.

        Once it runs, others that wait may become due too: they are allowed for, as if they had to run before.
        """
        if self._target_s is None or self._cost is None:
            return float("inf")
        if not self._cost.trusted:
            return opened_at + self._target_s * UNKNOWN
        size = self._window.size
        if size >= self._shape_until:
            # To make it out may take a plan. One for each record would be too many: it is made for what is to come too.
            shape, growth = self._window.shape(), size // SHAPE_AHEAD
            self._shape = shape._replace(size=min(shape.size + growth, self._max_size))
            self._shape_until = size + growth + 1
        late_ms = self._cost.late_ms(self._shape.size, self._shape.length) + self._shape.rest_ms
        return opened_at + self._target_s - late_ms / 1_000

    def _at_knee(self) -> bool:
        cost, size, longest = self._cost, self._window.size, self._window.longest
        if cost is None or not cost.trusted or (size < self._look_from and longest <= self._look_longest):
            return False
        model = cost.model
        # At most what waits, or fits, padded to the longest: full batches of shorter ones hardly take longer than that.
        short_ms = model.short_of_knee_ms(min(size, self._limits.n_max(longest)), longest)
        if short_ms <= 0:
            short_ms = model.short_of_knee_ms(*self._window.shape()[:2])
            if short_ms <= 0:
                return True
        # To make out the batch with the oldest record may take a plan, and one for each record would be too many: it is
        # made again once what came since could make up for what was short.
        self._look_from = size + 1 + int(min(short_ms / max(model.record_ms(longest), LEAST_MS), self._max_size))
        self._look_longest = longest
        return False


def _length(batch: Batch) -> int:
    return 1 if batch.longest is None else batch.longest


def _window(settings: BatchSettings, limits: Limits, cost: OnlineCost | None) -> Window:
    if settings.strategy in ("bucketed", "exact"):
        if cost is None:
            raise ValueError(f"strategy {settings.strategy} needs a cost model, if only a guessed one")
        return BucketedWindow(limits, cost) if settings.strategy == "bucketed" else ExactWindow(limits, cost)
    return FifoWindow(limits, measured=settings.length is not None)
