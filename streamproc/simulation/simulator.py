"""A processor in simulated time: streams of records, the real batchers, and workers that a cost model stands for.

Discrete events: arrivals, deadlines and the ends of batches; nothing else moves time. What happens between is what the
processor does: records come in polls while there is room in flight, a free worker gets the batch that is due, a worker
that is busy gets another one behind it where that is full, and begins it without a pause. Same input, same result; the
noise on times is seeded.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

from streamproc.records import Batch, Lease, Record, Span, TopicPartition
from streamproc.runtime.cost import CostModel
from streamproc.runtime.fairness import Fairness, candidates
from streamproc.simulation.streams import Stream

MAX_POLL_RECORDS = 500
BATCHES_PER_WORKER = 2
"""As in the pool: one that runs, and one that waits for it."""


class Batching(Protocol):
    """What the simulator drives: a ``Batcher``, or another rule to compare it with."""

    @property
    def opened_at(self) -> float | None:
        """When the oldest waiting record arrived; None without records."""

    @property
    def deadline(self) -> float | None:
        """When to ask again though nothing happens; None without records."""

    def add(self, span: Span) -> None:
        """Take records in."""

    def full(self) -> str | None:
        """The rule by which a batch could go even to a busy worker."""

    def due(self, now: float, *, backlog: bool) -> str | None:
        """The rule by which a free worker should get a batch now."""

    def overtaken(self) -> str | None:
        """The rule by which records should go although results pile up; here they never do."""

    def take(self, now: float, rule: str) -> Batch:
        """Hand out a batch."""

    def ran(self, batch: Batch, seen_ms: float) -> None:
        """A batch took so long."""


@dataclass(frozen=True, slots=True)
class Workers:
    """The workers: how many, what a batch costs them, and how much times vary.

    ``noise`` is the standard deviation of the logarithm of a batch's time, drawn with ``seed``. ``handover_ms`` is how
    long a batch is on its way to a worker that has none queued, and stands still meanwhile.
    """

    cost: CostModel
    count: int = 1
    noise: float = 0.0
    seed: int = 0
    handover_ms: float = 0.0


@dataclass(slots=True)
class Run:
    """What became of one task's stream. Latencies are from arrival to the end of a record's batch."""

    records: int
    seconds: float = 0.0
    """From the first arrival to the end of the last batch."""
    worker_ms: float = 0.0
    """Time that workers computed."""
    batches: int = 0
    padded: int = 0
    """Padded length of all batches."""
    length: int = 0
    """Length of all records."""
    latencies_s: list[float] = field(default_factory=list)
    closed_by: dict[str, int] = field(default_factory=dict)
    most_late_s: float = 0.0
    """The longest that a record waited while a worker was free."""

    @property
    def per_s(self) -> float:
        """Records a second."""
        return self.records / self.seconds if self.seconds else math.inf

    @property
    def padding_ratio(self) -> float:
        """Padded length over length: 1 is none."""
        return self.padded / self.length

    def latency_ms(self, quantile: float) -> float:
        """A quantile of the latencies: the least that is not exceeded by that share of the records."""
        ordered = sorted(self.latencies_s)
        return ordered[min(max(math.ceil(quantile * len(ordered)) - 1, 0), len(ordered) - 1)] * 1_000

    def within(self, latency_ms: float) -> float:
        """The share of the records that took no longer than this."""
        return sum(it * 1_000 <= latency_ms for it in self.latencies_s) / len(self.latencies_s)


@dataclass(slots=True)
class _Task:
    """A task while it is simulated."""

    name: str
    stream: Stream
    batcher: Batching
    run: Run
    lease: Lease
    next: int = 0
    """The record that arrives next."""
    kafka: deque[int] = field(default_factory=deque)
    """Records that have arrived and wait for room."""
    in_flight: int = 0
    crowded: bool = False
    """Results are written at once."""

    @property
    def backlog(self) -> bool:
        """Whether more records wait in Kafka."""
        return bool(self.kafka)

    def arrive(self, until: float) -> None:
        """Records that have arrived by now are in Kafka."""
        arrivals = self.stream.arrivals_s
        while self.next < len(arrivals) and arrivals[self.next] <= until:
            self.kafka.append(self.next)
            self.next += 1

    def poll(self, now: float, max_in_flight: int) -> None:
        """Take in what there is room for, in polls."""
        while self.kafka and self.in_flight < max_in_flight:
            first = self.kafka[0]
            count = min(len(self.kafka), max_in_flight - self.in_flight, MAX_POLL_RECORDS)
            for _ in range(count):
                self.kafka.popleft()
            self.in_flight += count
            lengths = self.stream.lengths[first : first + count]
            # Nobody looks at the records themselves: their numbers stand for them.
            records = cast("Sequence[Record]", range(first, first + count))
            self.batcher.add(Span(self.lease, first, records, lengths, now, lengths))


def simulate(
    tasks: Mapping[str, tuple[Stream, Batching]],
    workers: Workers,
    *,
    max_in_flight: int = 20_000,
    fairness: Fairness | None = None,
) -> dict[str, Run]:
    """Run streams through their batchers to their ends.

    Args:
        tasks: Each task's stream, and how its records are batched.
        workers: Who runs the batches.
        max_in_flight: As ``limits.max_in_flight_records``: what is beyond waits in Kafka, and is backlog.
        fairness: Who of several tasks gets a free worker; without, the one whose oldest record arrived first.
    """
    return _Simulation(tasks, workers, max_in_flight, fairness).run()


class _Simulation:
    def __init__(
        self,
        tasks: Mapping[str, tuple[Stream, Batching]],
        workers: Workers,
        max_in_flight: int,
        fairness: Fairness | None,
    ) -> None:
        self._tasks = {
            name: _Task(name, stream, batching, Run(len(stream.lengths)), Lease(TopicPartition(name, 0), 1))
            for name, (stream, batching) in tasks.items()
        }
        self._workers = workers
        self._rng = random.Random(workers.seed)  # noqa: S311 - noise, no secret
        self._max_in_flight = max_in_flight
        self._ids = itertools.count(1)
        self._fairness = fairness
        self._queues: list[deque[tuple[str, Batch]]] = [deque() for _ in range(workers.count)]
        self._ends: list[tuple[float, int, float]] = []
        """When a worker is done: time, worker, and how long its batch took, in milliseconds."""

    def run(self) -> dict[str, Run]:
        now = 0.0
        while True:
            for task in self._tasks.values():
                task.arrive(now)
                task.poll(now, self._max_in_flight)
            self._dispatch(now)
            following = self._next_event(now)
            if following is None:
                return {name: task.run for name, task in self._tasks.items()}
            now = following
            while self._ends and self._ends[0][0] <= now:
                self._end(*heapq.heappop(self._ends))

    def _next_event(self, now: float) -> float | None:
        times = [task.stream.arrivals_s[task.next] for task in self._tasks.values() if task.next < task.run.records]
        if self._ends:
            times.append(self._ends[0][0])
        if self._idle():
            # A deadline that has passed without anything being due would be asked for again for ever.
            deadlines = [task.batcher.deadline for task in self._tasks.values()]
            times += [max(it, math.nextafter(now, math.inf)) for it in deadlines if it is not None]
        return min(times) if times else None

    def _idle(self) -> bool:
        return any(not queue for queue in self._queues)

    def _dispatch(self, now: float) -> None:
        while any(len(queue) < BATCHES_PER_WORKER for queue in self._queues):
            chosen = self._choose(now)
            if chosen is None:
                return
            name, rule = chosen
            task = self._tasks[name]
            batch = task.batcher.take(now, rule)
            # Their batchers do not know of each other.
            batch.id, batch.task, batch.account = next(self._ids), name, name
            if self._fairness is not None:
                self._fairness.dispatched(batch)
            task.run.closed_by[rule] = task.run.closed_by.get(rule, 0) + 1
            worker = min(range(len(self._queues)), key=lambda index: len(self._queues[index]))
            self._queues[worker].append((name, batch))
            if len(self._queues[worker]) == 1:
                self._begin(worker, now + self._workers.handover_ms / 1_000)

    def _choose(self, now: float) -> tuple[str, str] | None:
        waiting = candidates(self._tasks.values(), now, idle=self._idle())
        if not waiting:
            return None
        if self._fairness is not None:
            chosen = self._fairness.choose(waiting)
        else:
            chosen = min(waiting, key=lambda it: it.opened_at)
        return chosen.task, chosen.rule

    def _begin(self, worker: int, now: float) -> None:
        _, batch = self._queues[worker][0]
        took_ms = self._workers.cost.time_ms(batch.size, batch.longest or 0)
        if self._workers.noise:
            took_ms *= math.exp(self._rng.gauss(0.0, self._workers.noise))
        heapq.heappush(self._ends, (now + took_ms / 1_000, worker, took_ms))

    def _end(self, now: float, worker: int, took_ms: float) -> None:
        name, batch = self._queues[worker].popleft()
        task = self._tasks[name]
        run, arrivals = task.run, task.stream.arrivals_s
        run.batches += 1
        run.worker_ms += took_ms
        run.seconds = max(run.seconds, now - arrivals[0])
        run.padded += batch.size * (batch.longest or 0)
        for span in batch.spans:
            run.length += sum(span.lengths or ())
            run.latencies_s += [now - arrivals[index] for index in range(span.first, span.stop)]
        task.in_flight -= batch.size
        task.batcher.ran(batch, took_ms)
        if self._fairness is not None:
            self._fairness.ended(batch, took_ms)
        if self._queues[worker]:
            self._begin(worker, now)
