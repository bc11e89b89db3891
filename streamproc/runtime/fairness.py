"""Which task gets the free worker, of several whose windows are due: weighted shares first, deadlines within them.

Earliest eligible virtual deadline first. Each task has a virtual time, the time that workers gave it over its weight.
A task is *eligible* while it has had no more than its share, that is, while its virtual time is not ahead of the
weighted mean of those that want a worker. Of these the one whose oldest record's deadline is earliest goes first; there
is always one, since not all can be ahead of their mean.

Deadlines alone would let a task that is behind its load take everything: its deadlines are always the older ones.
Shares alone would let a task that is due in a moment wait for one that is not. So a slow or crowded task cannot starve
a light one, nor the other way round: while it wants a worker, a task of weight w gets w / (sum of weights) of their
time, less a batch.

A task's requests over HTTP, where they batch apart, are a task of their own here: of the same weight, and with a name
that no task has.

Passive: no clock. A task that wanted nothing for a while comes back with no claim on what it did not use.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from streamproc.records import Batch


class Window(Protocol):
    """What is asked of a task's batcher."""

    @property
    def opened_at(self) -> float | None:
        """When the oldest waiting record arrived; None without records."""

    @property
    def deadline(self) -> float | None:
        """When it is due; None without records."""

    def full(self) -> str | None:
        """The rule by which a batch could go even behind another."""

    def due(self, now: float, *, backlog: bool) -> str | None:
        """The rule by which a free worker should get a batch now."""

    def overtaken(self) -> str | None:
        """The rule by which records should go although results pile up."""


class Task(Protocol):
    """What is asked of a task."""

    @property
    def name(self) -> str:
        """What weights are given by."""

    @property
    def batcher(self) -> Window:
        """Its waiting records."""

    @property
    def backlog(self) -> bool:
        """Whether more of them are known to wait in Kafka."""

    @property
    def crowded(self) -> bool:
        """Whether so many results pile up that no window is to go."""


class Candidate(NamedTuple):
    """A task with a window that may go to a worker: by which rule, and when its oldest record came and is due."""

    task: str
    rule: str
    opened_at: float
    deadline: float


def candidates(tasks: Iterable[Task], now: float, *, idle: bool) -> list[Candidate]:
    """The windows that may go now: to a free worker those that are due, behind a running batch only full ones.

    A batch that would only queue behind another had better go on growing. But where one queues, every window whose
    deadline has passed may have that place: of two tasks the one with full windows would otherwise keep all workers
    busy, and the other, never full, would wait for ever for a free one.

    While a task's results pile up, only records go that others have overtaken, at once: those results wait for them.
    """
    found: list[Candidate] = []
    late: list[Candidate] = []
    for task in tasks:
        batcher = task.batcher
        opened_at, deadline = batcher.opened_at, batcher.deadline
        if opened_at is None or deadline is None:
            continue
        rule = batcher.overtaken() if task.crowded else batcher.full()
        if rule is not None:
            found.append(Candidate(task.name, rule, opened_at, deadline))
        elif task.crowded:
            continue
        elif (idle or now >= deadline) and (rule := batcher.due(now, backlog=idle and task.backlog)) is not None:
            (found if idle else late).append(Candidate(task.name, rule, opened_at, deadline))
    return [*found, *late] if found else []


class Fairness:
    """The accounts of all tasks.

    Args:
        weights: Of each task, above 0: as ``weight`` in its settings.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        for task, weight in weights.items():
            if not weight > 0:
                raise ValueError(f"the weight of task {task} is {weight}: it has to be above 0")
        self._weights = dict(weights)
        self._times = dict.fromkeys(weights, 0.0)
        self._running = dict.fromkeys(weights, 0)
        self._last_ms = dict.fromkeys(weights, 1.0)
        self._charged_ms: dict[int, float] = {}
        self._mean = 0.0
        self._wanting: set[str] = set()

    def choose(self, candidates: Sequence[Candidate]) -> Candidate:
        """The task whose batch goes next; there is one candidate at least."""
        wanting = {it.task for it in candidates}
        for task in wanting - self._wanting:
            if not self._running[task]:
                self._times[task] = max(self._times[task], self._mean)
        self._wanting = wanting
        total = sum(self._weights[task] for task in wanting)
        # Not below what it was: who comes back is let in at this time.
        mean = sum(self._times[task] * self._weights[task] for task in wanting) / total
        self._mean = max(self._mean, mean)
        eligible = [it for it in candidates if self._times[it.task] <= mean * (1 + 1e-12)]
        return min(eligible, key=lambda it: (it.deadline, it.opened_at))

    def dispatched(self, batch: Batch) -> None:
        """A batch goes to a worker: charge its task what is predicted, or what the last one took."""
        task = batch.account
        cost_ms = self._last_ms[task] if batch.predicted_ms is None else batch.predicted_ms
        self._charged_ms[batch.id] = cost_ms
        self._running[task] += 1
        self._times[task] += cost_ms / self._weights[task]

    def ended(self, batch: Batch, seen_ms: float | None) -> None:
        """It took so long in fact; None where nobody knows."""
        task = batch.account
        charged_ms = self._charged_ms.pop(batch.id)
        self._running[task] -= 1
        if seen_ms is not None:
            self._last_ms[task] = seen_ms
            self._times[task] += (seen_ms - charged_ms) / self._weights[task]
