"""Streams to simulate: when records arrive, and how long they are. Seeded; the same arguments give the same stream."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

LONGEST = 8_192
"""Synthetic lengths are cut here."""


@dataclass(frozen=True, slots=True)
class Stream:
    """Records by the time of their arrival, in seconds from the first; lengths are at least 1."""

    arrivals_s: Sequence[float]
    lengths: Sequence[int]

    def __post_init__(self) -> None:
        if len(self.arrivals_s) != len(self.lengths) or not self.lengths:
            raise ValueError("a stream has one arrival for each length, and a record at least")


def lognormal(rng: random.Random) -> float:
    """Median 64, mean about 105: texts of one kind."""
    return rng.lognormvariate(math.log(64), 1.0)


def bimodal(rng: random.Random) -> float:
    """Queries of about 16 and, one in five, passages of about 256."""
    return rng.gauss(256, 48) if rng.random() < 0.2 else rng.gauss(16, 4)


def pareto(rng: random.Random) -> float:
    """From 16 on with a heavy tail (exponent 1.2): most are short, the longest hundreds of times as long."""
    return 16 * rng.paretovariate(1.2)


def uniform(rng: random.Random) -> float:
    """Anything from 1 to 512."""
    return rng.uniform(1, 512)


DISTRIBUTIONS: dict[str, Callable[[random.Random], float]] = {
    "lognormal": lognormal,
    "bimodal": bimodal,
    "pareto": pareto,
    "uniform": uniform,
}


def synthetic_lengths(distribution: str, count: int, seed: int, *, longest: int = LONGEST) -> list[int]:
    """So many lengths of a distribution by name, cut to between 1 and ``longest``."""
    draw, rng = DISTRIBUTIONS[distribution], random.Random(seed)  # noqa: S311 - a simulation, no secret
    return [min(max(round(draw(rng)), 1), longest) for _ in range(count)]


def at_once(lengths: Sequence[int]) -> Stream:
    """A backlog: everything is there from the start."""
    return Stream([0.0] * len(lengths), lengths)


def poisson(lengths: Sequence[int], rate_per_s: float, seed: int) -> Stream:
    """Records that arrive independently of each other, so many a second on average."""
    rng = random.Random(seed)  # noqa: S311 - as above
    arrivals, now = [], 0.0
    for _ in lengths:
        arrivals.append(now)
        now += rng.expovariate(rate_per_s)
    return Stream(arrivals, lengths)
