"""An estimate from beginning to end: explore, fit, check against what was held out, and say what came of it.

The cost model is fitted where batches will run: up to the size, and the padded length, from which on more records do no
more a second. κ is the least factor with which nothing that was seen needed more memory than predicted: no shape by
itself, and no process that ran all of them in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from math import isfinite

from streamproc.estimate.fit import Fit, Seen, best_size, fit, kappa, mean_error
from streamproc.estimate.prober import Loaded
from streamproc.estimate.samples import Samples
from streamproc.estimate.search import Explored, Search
from streamproc.runtime.estimate_file import (
    AtLength,
    Estimate,
    HeldOut,
    Measurement,
    MemoryCoefficients,
    TimeCoefficients,
)
from streamproc.runtime.estimates import fingerprint_of
from streamproc.runtime.memory_budget import Budget
from streamproc.settings import Settings

LEAST_MAX_SIZE = 4
"""To fit time there have to be a few sizes, even where one record at a time does best."""
HELD_OUT_BUDGET = 0.95
MIXED_BUDGET = 0.85
"""Of the budget, by prediction: what is run shuffled in one process."""
LEAST_GROWTH_BYTES = 4 << 20
"""What a batch adds to the idle process is told from noise from here on."""


def by_time(it: Seen) -> float:
    """A shape's time."""
    return it.time_ms


def by_memory(it: Seen) -> float:
    """A shape's memory."""
    return it.peak_bytes


@dataclass(frozen=True, slots=True)
class Region:
    """Where batches run: up to this size, and this padded length."""

    max_size: int
    max_padded: int | None

    def has(self, size: int, length: int) -> bool:
        """Whether a batch of this shape is within; a record alone always is."""
        return size == 1 or (size <= self.max_size and (self.max_padded is None or size * length <= self.max_padded))

    def largest(self, length: int) -> int:
        """The largest size at a length."""
        return self.max_size if self.max_padded is None else max(1, min(self.max_size, self.max_padded // length))


@dataclass(frozen=True, slots=True)
class Measured:
    """An estimate, and what it was made of."""

    estimate: Estimate
    how: Measurement
    """The estimate's own."""
    explored: Sequence[Explored]
    held_out: Sequence[Seen]
    time: Fit
    memory: Fit
    failed: int
    """Of the records that ran, those that failed by themselves."""
    ran: int


def region_of(explored: Sequence[Explored], *, has_length: bool) -> Region:
    """The region from whose edges on more records do no more a second."""
    best = {it.length: best_size(it.seen) for it in explored if it.seen}
    most = max(it.largest for it in explored)
    max_size = max(*best.values(), min(LEAST_MAX_SIZE, most))
    padded = max(max(size, min(LEAST_MAX_SIZE, max_size)) * length for length, size in best.items())
    return Region(max_size, padded if has_length else None)


def measure(
    settings: Settings,
    task: str,
    search: Search,
    samples: Samples,
    loaded: Loaded,
    *,
    budget: Budget,
    environ: dict[str, str],
    now: Callable[[], datetime],
) -> Measured:
    """Estimate the cost of a task's batches.

    Args:
        settings: The application's.
        task: Its task.
        search: Measures shapes.
        samples: What they are made of.
        loaded: What the probe said of the backend.
        budget: What a worker may hold.
        environ: A worker's environment.
        now: The time of day.

    Raises:
        EstimateError: it cannot be estimated.
        BackendError: the backend failed.
    """
    length = settings.tasks[task].batch.length_text
    explored = search.explore()
    every = [seen for it in explored for seen in it.seen]
    region = region_of(explored, has_length=length is not None)
    inside = [it for it in every if region.has(it.size, it.length)]
    time, memory = fit(inside, by_time), fit(every, by_memory)
    factor = kappa(memory, every)

    def largest(wanted: int) -> int:
        explored_to = min(
            (it for it in explored if it.length >= wanted), key=lambda it: it.length, default=explored[-1]
        )
        most = max(1, min(region.largest(wanted), explored_to.largest))
        while most > 1 and memory.predict(most, wanted) * factor > HELD_OUT_BUDGET * budget.size_bytes:
            most -= max(1, most // 50)
        return most

    held_out = search.held_out(largest, memory.predict)
    factor = max(factor, kappa(memory, held_out)) if held_out else factor
    edges = [(largest(it.length), it.length) for it in explored if it.seen]
    shapes = [
        (size, wanted)
        for size, wanted in (*((it.size, it.length) for it in held_out), *edges)
        if memory.predict(size, wanted) * factor <= MIXED_BUDGET * budget.size_bytes
    ]
    if shapes:
        factor = max(factor, search.mixed(shapes) / max(memory.predict(*it) for it in shapes))
    how = Measurement(
        application=settings.name,
        task=task,
        at=now(),
        memory="cuda" if loaded.memory == "cuda" else "host",
        idle_bytes=loaded.idle_bytes,
        budget_bytes=budget.size_bytes,
        budget_source=budget.source,
        samples=samples.count,
        lengths=(min(it.length for it in every), max(it.length for it in every)),
        held_out=errors_of(time, memory, held_out, loaded.idle_bytes),
        at_lengths=[_at_length(it) for it in explored if it.seen],
    )
    alpha, beta, gamma, delta = time.coefficients
    a, b, c, d = memory.coefficients
    estimate = Estimate(
        length=length,
        fingerprint=fingerprint_of(settings, environ, loaded.libraries),
        time=TimeCoefficients(alpha_ms=alpha, beta_ms=beta, gamma_ms=gamma, delta_ms=delta),
        memory=MemoryCoefficients(a_bytes=a, b_bytes=b, c_bytes=c, d_bytes=d),
        kappa=factor,
        max_size=region.max_size,
        max_padded=region.max_padded,
        measured=how,
    )
    return Measured(estimate, how, explored, held_out, time, memory, search.failed, search.ran)


def errors_of(time: Fit, memory: Fit, held_out: Sequence[Seen], idle_bytes: float) -> HeldOut:
    """How far predictions are from what was held out."""
    timed = [it for it in held_out if isfinite(it.time_ms)]
    grown = [it for it in held_out if it.peak_bytes - idle_bytes >= LEAST_GROWTH_BYTES]
    of_batch = [abs(memory.predict(it.size, it.length) - it.peak_bytes) / (it.peak_bytes - idle_bytes) for it in grown]
    return HeldOut(
        time=mean_error(time, timed, by_time) if timed else None,
        memory=mean_error(memory, held_out, by_memory) if held_out else None,
        memory_of_batch=sum(of_batch) / len(of_batch) if of_batch else None,
        shapes=len(held_out),
    )


def _at_length(it: Explored) -> AtLength:
    size = best_size(it.seen)
    return AtLength(
        length=it.length,
        best_size=size,
        per_s=next(seen.per_s for seen in it.seen if seen.size == size),
        largest=it.largest,
        ended_by=it.ended_by,
        cut=it.cut,
    )
