"""The strategies side by side on one stream: each one's run, against the offline optimum of the same records."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from streamproc.runtime.batcher import Batcher
from streamproc.runtime.limits import Limits
from streamproc.runtime.online_cost import OnlineCost
from streamproc.settings import BatchSettings
from streamproc.simulation.optimum import Optimum, offline_optimum
from streamproc.simulation.simulator import Run, Workers, simulate
from streamproc.simulation.streams import Stream, poisson

Strategy = Literal["none", "fifo", "bucketed", "exact"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
LOADS = tuple(number / 20 for number in range(1, 20))


@dataclass(frozen=True, slots=True)
class Batching:
    """What all strategies have: limits and target as ``batch`` in the settings, and a memory budget."""

    max_size: int
    max_wait_ms: float
    max_padded: int | None = None
    memory_budget_bytes: float | None = None
    kappa: float = 1.0
    target_latency_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Each strategy's run, and what no strategy could do better."""

    runs: dict[Strategy, Run]
    optimum: Optimum
    workers: Workers
    target_latency_ms: float | None = None

    def within(self, strategy: Strategy) -> float | None:
        """The share of the records that this strategy answered within the target; None where there is none."""
        return None if self.target_latency_ms is None else self.runs[strategy].within(self.target_latency_ms)

    def share(self, strategy: Strategy) -> float:
        """The time that the optimum's batches take over that of this strategy's."""
        return self.optimum.worker_ms / self.runs[strategy].worker_ms

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        best = self.optimum
        return {
            "records": best.records,
            "optimum": {
                "batches": best.batches,
                "worker_ms": best.worker_ms,
                "padding_ratio": best.padding_ratio,
                "records_per_s": best.per_s(self.workers.count),
            },
            "strategies": {
                name: {
                    "records_per_s": run.per_s,
                    "share_of_optimum": self.share(name),
                    "padding_ratio": run.padding_ratio,
                    "p50_ms": run.latency_ms(0.5),
                    "p99_ms": run.latency_ms(0.99),
                    "within_target": self.within(name),
                    "worker_ms": run.worker_ms,
                    "batches": run.batches,
                    "closed_by": run.closed_by,
                }
                for name, run in self.runs.items()
            },
        }


def compare(stream: Stream, batching: Batching, workers: Workers, strategies: Sequence[Strategy]) -> Comparison:
    """Run a stream by each strategy."""
    limits = Limits(
        batching.max_size,
        2**63,
        max_padded=batching.max_padded,
        cost=OnlineCost(workers.cost, kappa=batching.kappa),
        memory_budget_bytes=batching.memory_budget_bytes,
    )
    runs = {strategy: run_of(stream, strategy, batching, workers) for strategy in strategies}
    optimum = offline_optimum(stream.lengths, workers.cost, limits)
    return Comparison(runs, optimum, workers, batching.target_latency_ms)


def run_of(stream: Stream, strategy: Strategy, batching: Batching, workers: Workers) -> Run:
    """Run a stream by one strategy, which knows the costs."""
    batcher = Batcher(
        "task",
        BatchSettings(
            strategy=strategy,
            length="bytes",
            max_size=batching.max_size,
            max_wait_ms=batching.max_wait_ms,
            max_bytes=2**63,
            max_padded=batching.max_padded,
            target_latency_ms=batching.target_latency_ms,
            target_margin_ms=workers.handover_ms,  # nothing else is on its way here
        ),
        itertools.count(1).__next__,
        cost=OnlineCost(workers.cost, calibrated=True, kappa=batching.kappa),
        memory_budget_bytes=batching.memory_budget_bytes,
    )
    return simulate({"task": (stream, batcher)}, workers)["task"]


def by_load(
    lengths: Sequence[int], comparison: Comparison, batching: Batching, seed: int
) -> dict[Strategy, list[tuple[float, float]]]:
    """The 99th percentile of the latency, in milliseconds, of Poisson arrivals at shares of the optimum's throughput.

    A line ends where its strategy cannot keep up.
    """
    most_per_s = comparison.optimum.per_s(comparison.workers.count)
    lines: dict[Strategy, list[tuple[float, float]]] = {}
    for strategy in comparison.runs:
        points = lines.setdefault(strategy, [])
        for load in LOADS:
            stream = poisson(lengths, load * most_per_s, seed)
            run = run_of(stream, strategy, batching, comparison.workers)
            # The end of the run over that of the arrivals: what piles up takes longer at the end.
            if run.seconds - stream.arrivals_s[-1] > 0.02 * stream.arrivals_s[-1] + 0.5:
                break
            points.append((load, run.latency_ms(0.99)))
    return lines
