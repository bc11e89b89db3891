"""The batcher in simulated time: ours against others' rules and the offline optimum, and what a decision costs.

    python -m benchmarks.batching [--seeds N] [--records N] [--json FILE] [--svg FILE]

A batch of n records padded to L takes 5 ms + n·(20 µs + 2 µs·L + 2 ns·L²); at most 64 records and 16,384 of padded
length; one worker; a wait of 10 ms. Lengths are lognormal, bimodal or Pareto (``streamproc.simulation.streams``), cut
at 1,024. Our batchers are the processor's own classes, others' rules are those of ``benchmarks.batching_peers``. The
figures are medians over the seeds, of:

- *backlog*: everything waits from the start. Records a second over those of the offline sorted optimum, and padding.
- *p99 at 0.7 load*: Poisson arrivals at 0.7 of what first in, first out with the same limits does in a backlog, so
  that no rule with these limits is overloaded. In ``--json`` also at 0.3, 0.5 and 0.7 of the optimum.
- *low load*: Poisson arrivals at 0.05 of the same; the workers' time over that of first in, first out.
- *two tasks*: a light one and one with ten times its load, together 0.7 of the same; p99 of the light one over its p99
  alone, shared fairly (``runtime.fairness``) and by the oldest record only.
- *cost*: wall-clock time of our classes on this machine: a record from ``add`` to ``take``, in polls of one and of 500,
  with ``full`` and ``due`` asked at each poll; and one decision with 512 records waiting.

Ends with exit code 1 where a target of the figures in simulated time is missed. They do not depend on the machine.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from benchmarks.batching_peers import Beam, BentoMl, Infinity, Tei
from benchmarks.chart import Line, line_chart
from streamproc.records import Lease, Span, TopicPartition
from streamproc.runtime.batcher import Batcher
from streamproc.runtime.cost import CostModel
from streamproc.runtime.fairness import Fairness
from streamproc.runtime.limits import Limits
from streamproc.runtime.online_cost import OnlineCost
from streamproc.settings import BatchSettings
from streamproc.simulation.optimum import offline_optimum
from streamproc.simulation.simulator import Batching, Run, Workers, simulate
from streamproc.simulation.streams import at_once, poisson, synthetic_lengths

COST = CostModel(alpha_ms=5.0, beta_ms=0.02, gamma_ms=0.002, delta_ms=0.000_002)
MAX_SIZE, MAX_PADDED, MAX_WAIT_MS, LONGEST = 64, 16_384, 10.0, 1_024
DISTRIBUTIONS = ("lognormal", "bimodal", "pareto")
Strategy = Literal["fifo", "bucketed", "exact"]

LOAD, LOW_LOAD = 0.7, 0.05
LOADS_OF_OPTIMUM = (0.3, 0.5, 0.7)
TARGET_THROUGHPUT, TARGET_PADDING, TARGET_P99_MS, TARGET_LOW_LOAD, TARGET_LIGHT = 0.93, 1.10, 3 * MAX_WAIT_MS, 1.02, 2.0
DECISIONS, WAITING, RECORDS_TIMED = 300, 512, 20_000


def settings(strategy: Strategy, *, capped: bool = True) -> BatchSettings:
    """Ours, with the limits of all."""
    return BatchSettings(
        strategy=strategy,
        length="bytes",
        max_size=MAX_SIZE,
        max_wait_ms=MAX_WAIT_MS,
        max_bytes=2**40,
        max_padded=MAX_PADDED if capped else None,
    )


def ours(strategy: Strategy, *, capped: bool = True) -> Batcher:
    """One of our batchers, which knows the costs."""
    cost = OnlineCost(COST, calibrated=True)
    return Batcher(strategy, settings(strategy, capped=capped), itertools.count(1).__next__, cost=cost)


RULES: dict[str, Callable[[], Batching]] = {
    "fifo, 64 records": lambda: ours("fifo", capped=False),
    "fifo": lambda: ours("fifo"),
    "bucketed": lambda: ours("bucketed"),
    "exact": lambda: ours("exact"),
    "TEI": lambda: Tei(settings("fifo")),
    "Infinity": lambda: Infinity(settings("fifo")),
    "Beam": lambda: Beam(settings("fifo")),
    "BentoML": lambda: BentoMl(settings("fifo")),
}
OURS = ("fifo", "bucketed", "exact")
UNSTABLE = 0.98
"""Of the arrivals' rate: who ends this much later than the last arrival has not kept up."""


def one(lengths: Sequence[int], rate_per_s: float | None, rule: Callable[[], Batching], seed: int) -> Run:
    """A run of one task: a backlog, or so many records a second."""
    stream = at_once(lengths) if rate_per_s is None else poisson(lengths, rate_per_s, seed + 1_000)
    run = simulate({"task": (stream, rule())}, Workers(COST))["task"]
    assert len(run.latencies_s) == run.records == len(lengths), "a record was lost or came twice"
    assert run.length == sum(lengths), "other records came out than went in"
    return run


def of_seed(distribution: str, records: int, seed: int) -> dict[str, dict[str, float | None]]:
    """Each rule's figures on one stream."""
    lengths = synthetic_lengths(distribution, records, seed, longest=LONGEST)
    best = offline_optimum(lengths, COST, Limits(MAX_SIZE, 2**40, max_padded=MAX_PADDED))
    backlog = {name: one(lengths, None, rule, seed) for name, rule in RULES.items()}
    base_per_s = backlog["fifo"].per_s
    fifo_ms = one(lengths, LOW_LOAD * base_per_s, RULES["fifo"], seed).worker_ms
    found: dict[str, dict[str, float | None]] = {"optimum": {"per_s": best.per_s(1), "padding": best.padding_ratio}}
    for name, rule in RULES.items():
        run = backlog[name]
        found[name] = {
            "throughput": run.per_s / best.per_s(1),
            "padding": run.padding_ratio,
            "p99_ms": p99_ms(lengths, LOAD * base_per_s, rule, seed),
            "low_load": one(lengths, LOW_LOAD * base_per_s, rule, seed).worker_ms / fifo_ms,
        }
        if name in OURS[1:]:
            for load in LOADS_OF_OPTIMUM:
                found[name][f"p99_ms_at_{load}_of_optimum"] = p99_ms(lengths, load * best.per_s(1), rule, seed)
    return found


def p99_ms(lengths: Sequence[int], rate_per_s: float, rule: Callable[[], Batching], seed: int) -> float | None:
    """The 99th percentile of the latency; None where the rule cannot keep up."""
    run = one(lengths, rate_per_s, rule, seed)
    return run.latency_ms(0.99) if run.per_s >= UNSTABLE * rate_per_s else None


def two_tasks(records: int, seed: int) -> dict[str, float]:
    """The light task's p99 beside a heavy one, over its p99 alone."""
    lengths = synthetic_lengths("lognormal", records, seed, longest=LONGEST)
    rate = LOAD * one(lengths, None, RULES["fifo"], seed).per_s
    light = poisson(lengths[: records // 10], rate / 11, seed)
    heavy = poisson(lengths, rate * 10 / 11, seed + 1)
    alone = simulate({"light": (light, ours("bucketed"))}, Workers(COST))["light"].latency_ms(0.99)
    found = {"alone_p99_ms": alone}
    for name, fairness in (("fair", Fairness({"light": 1, "heavy": 1})), ("oldest first", None)):
        runs = simulate(
            {"light": (light, ours("bucketed")), "heavy": (heavy, ours("bucketed"))}, Workers(COST), fairness=fairness
        )
        found[f"light, {name}"] = runs["light"].latency_ms(0.99) / alone
        found[f"heavy p99 ms, {name}"] = runs["heavy"].latency_ms(0.99)
    return found


def overloaded(records: int, seed: int) -> dict[str, float]:
    """As ``two_tasks``, where the heavy task alone is more than the worker can do."""
    lengths = synthetic_lengths("lognormal", records, seed, longest=LONGEST)
    rate = one(lengths, None, RULES["bucketed"], seed).per_s
    light = poisson(lengths[: records // 15], rate * 0.1, seed)
    heavy = poisson(lengths, rate * 1.5, seed + 1)
    alone = simulate({"light": (light, ours("bucketed"))}, Workers(COST))["light"].latency_ms(0.99)
    found = {}
    for name, fairness in (("fair", Fairness({"light": 1, "heavy": 1})), ("oldest first", None)):
        runs = simulate(
            {"light": (light, ours("bucketed")), "heavy": (heavy, ours("bucketed"))}, Workers(COST), fairness=fairness
        )
        found[f"light, {name}"] = runs["light"].latency_ms(0.99) / alone
    return found


# -- what our classes cost, in wall-clock time


def per_record_us(strategy: Strategy, poll: int) -> dict[str, float]:
    """A record from ``add`` to ``take``: quantiles over records, each of which has its share of its batch's time."""
    lengths = synthetic_lengths("lognormal", RECORDS_TIMED, 1, longest=LONGEST)
    lease = Lease(TopicPartition("in", 0), 1)
    spans = [
        Span(lease, at, range(at, at + poll), lengths[at : at + poll], 0.0, lengths[at : at + poll])  # type: ignore[arg-type] # nobody looks at the records
        for at in range(0, RECORDS_TIMED - poll + 1, poll)
    ]
    batcher = ours(strategy)
    clock, times, since, took = time.perf_counter, list[float](), 0, 0.0
    for span in spans:
        begun = clock()
        batcher.add(span)
        batch = None
        while (rule := batcher.full() or batcher.due(0.001, backlog=False)) is not None:
            batch = batcher.take(0.001, rule)
            since += batch.size
        took += clock() - begun
        if since:
            times += [took / since * 1e6] * since
            since, took = 0, 0.0
    return {"median": statistics.median(times), "p99": statistics.quantiles(times, n=100)[98]}


def decision_us(strategy: Strategy) -> dict[str, float]:
    """One ``take`` with 512 records waiting."""
    lease = Lease(TopicPartition("in", 0), 1)
    times = []
    for seed in range(DECISIONS):
        lengths = synthetic_lengths("lognormal", WAITING, seed, longest=LONGEST)
        batcher = ours(strategy)
        batcher.add(Span(lease, 0, range(WAITING), lengths, 0.0, lengths))  # type: ignore[arg-type] # as above
        begun = time.perf_counter()
        batcher.take(1.0, "wait")
        times.append((time.perf_counter() - begun) * 1e6)
    return {"median": statistics.median(times), "p99": statistics.quantiles(times, n=100)[98]}


def costs() -> dict[str, Any]:
    """Of each strategy."""
    gc.collect()
    gc.disable()
    found: dict[str, Any] = {}
    strategies: tuple[Strategy, ...] = ("fifo", "bucketed", "exact")
    for strategy in strategies:
        found[strategy] = {
            "record_us_polls_of_1": per_record_us(strategy, 1),
            "record_us_polls_of_500": per_record_us(strategy, 500),
            "decision_us_512_waiting": decision_us(strategy),
        }
    gc.enable()
    return found


# -- all of it


def median(values: Sequence[float | None]) -> float | None:
    """The median; None where most of the runs have no figure."""
    known = [it for it in values if it is not None]
    return statistics.median(known) if len(known) * 2 > len(values) else None


def measure(records: int, seeds: int) -> dict[str, Any]:
    """All figures."""
    simulated: dict[str, Any] = {}
    for distribution in DISTRIBUTIONS:
        runs = [of_seed(distribution, records, seed) for seed in range(1, seeds + 1)]
        simulated[distribution] = {
            name: {figure: median([run[name][figure] for run in runs]) for figure in runs[0][name]} for name in runs[0]
        }
        print(f"{distribution}: done", file=sys.stderr)
    tasks = [two_tasks(records, seed) for seed in range(1, seeds + 1)]
    crowded = [overloaded(records, seed) for seed in range(1, seeds + 1)]
    return {
        "records": records,
        "seeds": seeds,
        "simulated": simulated,
        "two_tasks": {name: median([it[name] for it in tasks]) for name in tasks[0]},
        "two_tasks_heavy_overloaded": {name: median([it[name] for it in crowded]) for name in crowded[0]},
        "cost": costs(),
    }


def missed(figures: dict[str, Any]) -> list[str]:
    """The targets of simulated time that are not met, in words."""
    found = []
    for distribution, rules in figures["simulated"].items():
        it = rules["bucketed"]
        checks = (
            ("throughput", it["throughput"] >= TARGET_THROUGHPUT, f"at least {TARGET_THROUGHPUT}"),
            ("padding", it["padding"] <= TARGET_PADDING, f"at most {TARGET_PADDING}"),
            ("p99_ms", it["p99_ms"] is not None and it["p99_ms"] <= TARGET_P99_MS, f"at most {TARGET_P99_MS}"),
            ("low_load", it["low_load"] <= TARGET_LOW_LOAD, f"at most {TARGET_LOW_LOAD}"),
        )
        found += [f"{distribution}, {name}: {it[name]} is not {what}" for name, good, what in checks if not good]
    light = figures["two_tasks"]["light, fair"]
    if light > TARGET_LIGHT:
        found.append(f"two tasks: the light one's p99 is {light:.2f} times that alone, not at most {TARGET_LIGHT}")
    return found


def show(figures: dict[str, Any]) -> None:
    """Tables for people."""
    for distribution, rules in figures["simulated"].items():
        best = rules["optimum"]
        print(f"\n{distribution}: optimum {best['per_s']:,.0f}/s in a backlog, padding {best['padding']:.3f}")
        print(f"{'':18}{'% of optimum':>14}{'padding':>10}{'p99 ms':>10}{'low load':>10}")
        for name in RULES:
            it = rules[name]
            p99 = "unstable" if it["p99_ms"] is None else f"{it['p99_ms']:.1f}"
            print(f"{name:18}{it['throughput']:>14.1%}{it['padding']:>10.3f}{p99:>10}{it['low_load']:>10.3f}")
    for name in ("two_tasks", "two_tasks_heavy_overloaded"):
        print(f"\n{name}: " + ", ".join(f"{key} {value:.2f}" for key, value in figures[name].items()))
    print(f"\n{'µs, median (p99)':18}{'record, by 1':>18}{'record, by 500':>18}{'decision at 512':>20}")
    for name, it in figures["cost"].items():
        cells = [f"{figures['median']:.1f} ({figures['p99']:.1f})" for figures in it.values()]
        print(f"{name:18}" + "".join(f"{cell:>18}" for cell in cells))


def chart(records: int) -> str:
    """p99 against load, of four rules."""
    lengths = synthetic_lengths("lognormal", records, 1, longest=LONGEST)
    base = one(lengths, None, RULES["fifo"], 1).per_s
    loads = [it / 20 for it in range(1, 20)]
    lines = []
    for name in ("TEI", "Infinity", "Beam", "bucketed"):
        points = [(load, p99_ms(lengths, load * base, RULES[name], 1)) for load in loads]
        lines.append(Line(name, [(load, min(p99, 250.0)) for load, p99 in points if p99 is not None]))
    return line_chart(
        "99th percentile of the latency, lognormal lengths", "load, of first in, first out's backlog", "ms", lines
    )


def main() -> None:
    """Measure, show, and check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=20_000, help="records of each stream")
    parser.add_argument("--seeds", type=int, default=5, help="streams of each distribution")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw p99 against load")
    options = parser.parse_args()
    figures = measure(options.records, options.seeds)
    show(figures)
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    if options.svg is not None:
        options.svg.write_text(chart(options.records))
    failures = missed(figures)
    for failure in failures:
        print(f"MISSED {failure}", file=sys.stderr)
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
