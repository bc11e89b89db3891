"""Latencies to keep: how many records keep their target at which load, and a light task beside a heavy one.

    python -m benchmarks.slo [--seeds N] [--records N] [--seconds S] [--json FILE]

Costs, limits and lengths are those of ``benchmarks.batching``: a batch of n records padded to L takes 5 ms +
n·(20 µs + 2 µs·L + 2 ns·L²); at most 64 records and 16,384 of padded length; one worker. Arrivals are Poisson.
*Saturated load* is what the same strategy does of the same lengths in a backlog, in records a second. The *target* is a
multiple of the time of the largest batch that the limits allow of these lengths, from a record's arrival to the answer
of its batch. A record that arrives as such a batch begins, with another one queued behind it, cannot be answered in
less than three.

1. *Simulated*: at 0.05, 0.3 and 0.8 of saturated load, with a ``max_wait_ms`` of 10 and without end, so that only the
   target closes windows at low load; for costs that are known, and for those that the batcher learns. The share within
   the target is the least of the seeds.
2. *Real*: the processor, a worker process that sleeps for a batch's time, and the in-memory broker; 0.8 of its own
   saturated load, nothing known of costs. The share is what the processor counts itself, and what is seen from outside:
   from the time that a record was due to be written, to its result in the topic.
3. *Two tasks*, real as well: a light one and one with ten times its load, together 0.7 of what first in, first out does
   in a backlog. The light one's p99 over its p99 alone, in turns.

Every record has to have one result. Ends with exit code 1 where less than 99% are within five times the largest batch
at 0.8 of saturated load, or where the light task's p99 is more than twice that alone.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.batching import DISTRIBUTIONS, LONGEST, MAX_PADDED, MAX_SIZE, Strategy, one, ours, settings
from benchmarks.in_memory import check_results, running, settings_for
from benchmarks.quantiles import quantile
from benchmarks.timed import COST
from streamproc.broker.memory import MemoryBroker
from streamproc.records import TopicPartition
from streamproc.runtime.batcher import Batcher
from streamproc.runtime.limits import Limits
from streamproc.runtime.online_cost import OnlineCost
from streamproc.runtime.processor import Processor
from streamproc.simulation.streams import Stream, at_once, poisson, synthetic_lengths

LOADS, LOAD = (0.05, 0.3, 0.8), 0.8
MULTIPLES, MULTIPLE = (3, 4, 5), 5
WAITS_MS = (10.0, 60_000.0)
TARGET_SHARE, TARGET_LIGHT = 0.99, 2.0
FEED_EVERY_S = 0.001
BACKLOG_RECORDS = 6_000
LIGHT_SHARE = 1 / 11
LOAD_OF_FIFO = 0.7


def largest_ms(lengths: Sequence[int]) -> float:
    """The time of the largest batch that the limits allow of these lengths."""
    limits = Limits(MAX_SIZE, 2**40, max_padded=MAX_PADDED)
    return max(COST.time_ms(max(limits.n_max(length), 1), length) for length in set(lengths))


# -- simulated


def batcher(strategy: Strategy, max_wait_ms: float, target_ms: float, *, known: bool) -> Batcher:
    """One with a target."""
    changes = {"max_wait_ms": max_wait_ms, "target_latency_ms": target_ms, "target_margin_ms": 0.0}
    cost = OnlineCost(COST, calibrated=True) if known else OnlineCost()
    return Batcher("task", settings(strategy).model_copy(update=changes), itertools.count(1).__next__, cost=cost)


def simulated(records: int, seeds: int) -> list[dict[str, Any]]:
    """A row for each case: the least share within the target, and the median of the p99, of the seeds."""
    rows = []
    strategies: tuple[Strategy, ...] = ("bucketed", "exact")
    for distribution, strategy in itertools.product(DISTRIBUTIONS, strategies):
        streams = {
            seed: synthetic_lengths(distribution, records, seed, longest=LONGEST) for seed in range(1, seeds + 1)
        }
        saturated = {seed: one(it, None, partial(ours, strategy), seed).per_s for seed, it in streams.items()}
        largest = max(map(largest_ms, streams.values()))
        for load, wait_ms, known, multiple in itertools.product(LOADS, WAITS_MS, (True, False), MULTIPLES):
            runs = [
                one(
                    it,
                    load * saturated[seed],
                    partial(batcher, strategy, wait_ms, multiple * largest, known=known),
                    seed,
                )
                for seed, it in streams.items()
            ]
            rows.append({
                "lengths": distribution,
                "strategy": strategy,
                "load": load,
                "max_wait_ms": wait_ms,
                "costs": "known" if known else "learned",
                "multiple": multiple,
                "target_ms": multiple * largest,
                "within": min(it.within(multiple * largest) for it in runs),
                "p99_ms": statistics.median(it.latency_ms(0.99) for it in runs),
            })  # fmt: skip
        print(f"{distribution}, {strategy}: done", file=sys.stderr)
    return rows


# -- real


def value(number: int, length: int) -> bytes:
    """A record that says its length."""
    return b'{"id":%d,"length":%d}' % (number, length)


def application(tasks: Mapping[str, float | None], *, strategy: Strategy) -> Any:
    """Tasks with the limits of all, and a target in milliseconds each."""
    batch = {
        "strategy": strategy,
        "length": {"field": "length", "unit": "value"},
        "max_size": MAX_SIZE,
        "max_padded": MAX_PADDED,
        "max_wait_ms": 10,
    }
    # Unordered: else a result waits for those before it, and the latency that is seen is another's.
    each = {
        name: {"batch": {**batch, "target_latency_ms": target_ms}, "ordering": "unordered"}
        for name, target_ms in tasks.items()
    }
    return settings_for("benchmarks.timed:Backend", each)


async def feed(processor: Processor, broker: MemoryBroker, streams: Mapping[str, Stream]) -> dict[str, list[float]]:
    """Write each task's records when they are due; each one's latency in milliseconds, from then to its result."""
    clock = processor.clock
    begun = clock() + 0.05
    sent = dict.fromkeys(streams, 0)
    seen = dict.fromkeys(streams, 0)
    latencies: dict[str, list[float]] = {name: [] for name in streams}
    while any(len(latencies[name]) < len(stream.lengths) for name, stream in streams.items()):
        now = clock() - begun
        for name, stream in streams.items():
            while sent[name] < len(stream.lengths) and stream.arrivals_s[sent[name]] <= now:
                broker.append(name, value(sent[name], stream.lengths[sent[name]]))
                sent[name] += 1
            results = broker.log(TopicPartition(f"{name}.results", 0)).records
            for record in results[seen[name] :]:
                number = json.loads(record.value or b"")["result"]["id"]
                latencies[name].append((now - stream.arrivals_s[number]) * 1_000)
            seen[name] = len(results)
        await asyncio.sleep(FEED_EVERY_S)
    for name, stream in streams.items():
        check_results(broker, name, len(stream.lengths))
    return latencies


async def saturated_per_s(strategy: Strategy, lengths: Sequence[int]) -> float:
    """Records a second of a backlog, from the first result to the last."""
    async with running(application({"main": None}, strategy=strategy)) as (processor, broker):
        begun = processor.clock()
        await feed(processor, broker, {"main": at_once(lengths)})
        return len(lengths) / (processor.clock() - begun)


async def kept(lengths: Sequence[int], saturated: float, seconds: float, seed: int) -> dict[str, Any]:
    """The share of the records that keep the target at 0.8 of saturated load."""
    target_ms = MULTIPLE * largest_ms(lengths)
    stream = poisson(lengths[: int(LOAD * saturated * seconds)], LOAD * saturated, seed)
    async with running(application({"main": target_ms}, strategy="bucketed")) as (processor, broker):
        latencies = (await feed(processor, broker, {"main": stream}))["main"]
        counts = processor.tasks["main"].counts
        assert counts.within + counts.beyond == len(latencies), "not every record was counted"
        return {
            "records": len(latencies),
            "saturated_per_s": saturated,
            "target_ms": target_ms,
            "within": counts.within / len(latencies),
            "within_seen": sum(it <= target_ms for it in latencies) / len(latencies),
            "p99_seen_ms": quantile(sorted(latencies), 0.99),
        }


async def beside(lengths: Sequence[int], per_s: float, seconds: float, seed: int, *, alone: bool) -> float:
    """The light task's p99 in milliseconds, beside a heavy one or alone."""
    light, heavy = per_s * LIGHT_SHARE, per_s * (1 - LIGHT_SHARE)
    streams = {"light": poisson(lengths[: int(light * seconds)], light, seed)}
    if not alone:
        streams["heavy"] = poisson(lengths[: int(heavy * seconds)], heavy, seed + 1)
    async with running(application(dict.fromkeys(streams), strategy="bucketed")) as (processor, broker):
        return quantile(sorted((await feed(processor, broker, streams))["light"]), 0.99)


def real(seconds: float) -> dict[str, Any]:
    """The figures of the real processor, on lognormal lengths."""
    lengths = synthetic_lengths("lognormal", 100_000, 1, longest=LONGEST)
    saturated = uvloop.run(saturated_per_s("bucketed", lengths[:BACKLOG_RECORDS]))
    fifo = uvloop.run(saturated_per_s("fifo", lengths[: BACKLOG_RECORDS // 4]))
    found = {"target": uvloop.run(kept(lengths, saturated, seconds, 1))}
    print("real, target: done", file=sys.stderr)
    per_s = LOAD_OF_FIFO * fifo
    alone, both = (uvloop.run(beside(lengths, per_s, seconds, 1, alone=it)) for it in (True, False))
    found["two_tasks"] = {"fifo_per_s": fifo, "alone_p99_ms": alone, "beside_p99_ms": both, "ratio": both / alone}
    return found


# -- all of it


def missed(figures: dict[str, Any]) -> list[str]:
    """The targets that are not met, in words."""
    found = [
        f"{it['lengths']}, {it['strategy']}, {it['max_wait_ms']:g} ms, costs {it['costs']}: {it['within']:.2%} within"
        for it in figures["simulated"]
        if (it["load"], it["multiple"]) == (LOAD, MULTIPLE) and it["within"] < TARGET_SHARE
    ]
    if figures["real"]["target"]["within"] < TARGET_SHARE:
        found.append(f"real: {figures['real']['target']['within']:.2%} within")
    if figures["real"]["two_tasks"]["ratio"] > TARGET_LIGHT:
        found.append(f"two tasks: the light one's p99 is {figures['real']['two_tasks']['ratio']:.2f} times that alone")
    return found


def show(figures: dict[str, Any]) -> None:
    """Tables for people: the share within three, four and five times the largest batch."""
    print(f"{'lengths':12}{'strategy':10}{'load':>6}{'max_wait_ms':>13}{'costs':>9}" + "".join(
        f"{f'{it} ×':>9}" for it in MULTIPLES
    ))  # fmt: skip
    names = ("lengths", "strategy", "load", "max_wait_ms", "costs")
    for case, rows in itertools.groupby(figures["simulated"], key=lambda it: tuple(it[name] for name in names)):
        lengths, strategy, load, wait_ms, costs = case
        shares = "".join(f"{it['within']:>9.2%}" for it in rows)
        print(f"{lengths:12}{strategy:10}{load:>6}{wait_ms:>13,g}{costs:>9}{shares}")
    for name, row in figures["real"].items():
        print(f"\nreal, {name}: " + ", ".join(f"{key} {it:,.4g}" for key, it in row.items()))


def main() -> None:
    """Measure, show, and check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=6_000, help="records of each simulated stream")
    parser.add_argument("--seeds", type=int, default=2, help="streams of each distribution")
    parser.add_argument("--seconds", type=float, default=40.0, help="of each real run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    options = parser.parse_args()
    figures = {"real": real(options.seconds), "simulated": simulated(options.records, options.seeds)}
    show(figures)
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    found = missed(figures)
    print(*(f"missed: {it}" for it in found), sep="\n", file=sys.stderr)
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
