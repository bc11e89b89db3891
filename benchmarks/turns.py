"""Contestants in turns on one machine: how long each took in each round, and what the ratios are.

A machine that is shared is faster in one second than in the next; two contestants that take turns of milliseconds see
the same machine. So what is quoted is a ratio: the median over the rounds of one contestant's time over the other's in
the same round, and the quartiles of it. Times are CPU seconds of this process unless another clock is given.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Spread:
    """A median, and the quartiles around it."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"

    def as_json(self) -> dict[str, float]:
        """For a file of results: four digits are more than the machine tells."""
        return {name: float(f"{value:.4g}") for name, value in asdict(self).items()}


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of at least two values."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def ratio(slower: Sequence[float], faster: Sequence[float]) -> Spread:
    """How many times as long the first one took, round by round."""
    return spread([theirs / ours for theirs, ours in zip(slower, faster, strict=True)])


def take_turns(
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    turn_s: float,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, list[float]]:
    """Seconds a call of each contestant, in each round; in every other round the last one begins.

    A turn is as many calls as take about ``turn_s``. The search for cycles stays on, as it is where a backend runs, but
    begins with nothing to look at.
    """
    calls = {name: _calls_for(contestant, turn_s, clock) for name, contestant in contestants.items()}
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    gc.collect()
    gc.freeze()
    try:
        for number in range(rounds):
            for name in list(contestants)[:: -1 if number % 2 else 1]:
                contestant, count = contestants[name], calls[name]
                begun = clock()
                for _ in range(count):
                    contestant()
                taken[name].append((clock() - begun) / count)
    finally:
        gc.unfreeze()
    return taken


def _calls_for(contestant: Callable[[], object], turn_s: float, clock: Callable[[], float]) -> int:
    """How many calls take about so long; the first one, which may load and learn something, is not counted."""
    contestant()
    count, lasted = 1, 0.0
    while True:
        begun = clock()
        for _ in range(count):
            contestant()
        lasted = clock() - begun
        if lasted >= turn_s / 4:
            return max(1, round(count * turn_s / lasted))
        count *= 2
