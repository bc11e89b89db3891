"""CPU of a worker process per record: decode, identity and encode of 223-byte JSON, in batches of 512.

    python -m benchmarks.worker [--rounds N] [--batches N] [--json FILE]

A real worker process, started and fed by the pool over its socket, with the default envelope and with ``envelope:
result``, in turns. Its CPU time, all of it, kernel's included, is read from outside by the clock of its process. In
another run, which is not counted, the worker times its own steps; the shares come from there. Every output of every
batch is verified. The limit is what the two calls of orjson take in a bare loop here, in the same turns: nothing that
reads and writes JSON in Python can do with less.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import orjson
import uvloop

from benchmarks.feeding import TASK, TOPIC, Feeder, one_worker, spans_of
from benchmarks.turns import ratio, spread
from benchmarks.workloads import small_value
from streamproc.records import Span
from streamproc.runtime.pool import Reply

BATCH = 512
DISTINCT_BATCHES = 8
WARMUP_BATCHES = 50
ENVELOPES = {"envelope: full": "full", "envelope: result": "result"}
LIMIT = "orjson alone"
BUDGET_US = 3.5


def batches() -> list[list[Span]]:
    """Some batches that differ."""
    return [
        spans_of([small_value(number * BATCH + index) for index in range(BATCH)], 1_000_000 + number * BATCH)
        for number in range(DISTINCT_BATCHES)
    ]


def verify(reply: Reply, envelope: str) -> None:
    """Every record's output, and what stands around it."""
    assert not any(reply.statuses), "a record failed"
    records = [(span, record) for span in reply.batch.spans for record in span.records]
    for (span, record), written in zip(records, reply.values, strict=True):
        content = orjson.loads(written)
        if envelope == "full":
            topic, partition = span.lease.partition
            source = {"topic": topic, "partition": partition, "offset": record.offset, "timestamp": record.timestamp}
            assert content["source"] == source, f"another source: {content['source']}"
            assert content["task"] == TASK, f"another task: {content['task']}"
            assert content["metrics"]["batch_size"] == len(records), "metrics of another batch"
            content = content["result"]
        assert content == orjson.loads(record.value or b""), f"another content at {TOPIC} {record.offset}"


async def measure(feeder: Feeder, envelope: str, some: Sequence[Sequence[Span]], count: int) -> float:
    """CPU seconds of the worker for a record."""
    cost = await feeder.feed(some, count, lambda reply: verify(reply, envelope))
    return cost.worker_cpu_s / (count * BATCH)


def bare(some: Sequence[Sequence[Span]], count: int) -> float:
    """CPU seconds of decoding and encoding a record, and nothing else."""
    values = [[record.value or b"" for span in spans for record in span.records] for spans in some]
    begun = time.process_time()
    for number in range(count):
        _ = [orjson.dumps(record) for record in [orjson.loads(it) for it in values[number % len(values)]]]
    return (time.process_time() - begun) / (count * BATCH)


async def compare(rounds: int, count: int) -> dict[str, list[float]]:
    """Seconds of CPU a record, by contestant and round."""
    some = batches()
    taken: dict[str, list[float]] = {name: [] for name in (*ENVELOPES, LIMIT)}
    for number in range(rounds + 1):
        for name, envelope in list(ENVELOPES.items())[:: -1 if number % 2 else 1]:
            async with one_worker("identity:Backend", envelope=envelope) as feeder:
                await measure(feeder, envelope, some, WARMUP_BATCHES)
                taken[name].append(await measure(feeder, envelope, some, count))
        taken[LIMIT].append(bare(some, count))
    # The first round warms caches, the file system's too.
    return {name: seconds[1:] for name, seconds in taken.items()}


async def steps(envelope: str, count: int) -> dict[str, float]:
    """Microseconds of each step for a record, as the worker times them itself."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "steps.json"
        config: dict[str, object] = {"steps_path": str(path), "skipped_batches": WARMUP_BATCHES}
        async with one_worker("timed_identity:Backend", envelope=envelope, config=config) as feeder:
            await measure(feeder, envelope, batches(), WARMUP_BATCHES + count)
        told = orjson.loads(path.read_bytes())
    assert told["batches"] == count, f"{told['batches']} batches were timed, and {count} sent"
    records = count * BATCH
    measured = {name: seconds / records * 1e6 for name, seconds in told["steps_s"].items()}
    return {**measured, "between them": told["total_s"] / records * 1e6 - sum(measured.values())}


def report(taken: dict[str, list[float]], shares: dict[str, dict[str, float]], show: Callable[[str], None]) -> None:
    """The tables."""
    for name, seconds in taken.items():
        cost = spread([second * 1e6 for second in seconds])
        limit = "" if name == LIMIT else f", {ratio(seconds, taken[LIMIT])} times {LIMIT}"
        verdict = "" if name == LIMIT else f"  ≤ {BUDGET_US} {'met' if cost.median <= BUDGET_US else 'ABOVE'}"
        show(f"{name:<17} {cost} µs of CPU a record{limit}{verdict}")
    for name, measured in shares.items():
        show(f"\n{name}, step by step (µs a record, timed inside)")
        for step, us in measured.items():
            show(f"  {step:<20} {us:5.2f}")


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=600)
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    taken = uvloop.run(compare(arguments.rounds, arguments.batches))
    shares = {name: uvloop.run(steps(envelope, arguments.batches)) for name, envelope in ENVELOPES.items()}
    report(taken, shares, print)
    if arguments.json:
        about: dict[str, Any] = {"python": platform.python_version(), "orjson": orjson.__version__, "batch": BATCH}
        costs = {name: spread([second * 1e6 for second in seconds]).as_json() for name, seconds in taken.items()}
        ratios = {name: ratio(taken[name], taken[LIMIT]).as_json() for name in ENVELOPES}
        results = {"us_a_record": costs, "times_the_limit": ratios, "steps_us_a_record": shares}
        arguments.json.write_text(json.dumps({**about, "batches": arguments.batches, **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
