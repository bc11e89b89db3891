"""The parent's CPU per record against a bare aiokafka loop, in one run, in turns, on the same records.

    python -m benchmarks.passthrough [--records N] [--rounds N] [--bootstrap HOST:PORT]

The two contestants of `benchmarks.throughput` that need no library of others, for a quick look at what a change does:
both read the same topic (223-byte JSON, 6 partitions) and write as many records, the bare loop with ``getmany`` and
``send_batch`` and nothing else, streamproc with an identity backend in one worker and batches of 512, everything on
(sequencer, ledger, metrics, envelope). Workers' time is not the parent's. Every round's outputs are read back and
verified, for count and for content. What is quoted is the ratio of the medians: the machine may be shared and noisy.

streamproc takes part twice, with at_least_once and with exactly_once, both committing every 100 ms; from the first
record read to the last offset committed, so that the waiting of transactions counts.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys

from benchmarks.contestants import BARE, COMMIT_INTERVAL_MS, EXACTLY_ONCE
from benchmarks.kafka_run import ContestantError, Measured, fill, kafka, output_topics, run_process, verify
from benchmarks.peers.work import Task
from benchmarks.workloads import SMALL_BYTES, WORKLOADS

TOPIC = "passthrough"
BATCH = 512
OURS = "1"
TITLES = {BARE: "bare aiokafka loop", OURS: "streamproc, parent", EXACTLY_ONCE: "… exactly once"}
LIMIT_S = 600.0


async def run(bootstrap: str, variant: str, output: str, records: int) -> Measured:
    """One contestant's turn, its results verified."""
    workload = WORKLOADS["json-223"]
    task = Task(bootstrap, TOPIC, output, output, records, workload.work, BATCH, variant)
    command = [sys.executable, "-m", "benchmarks.contestants"]
    async with output_topics(bootstrap, output):
        measured = await asyncio.to_thread(run_process, command, task, limit_s=LIMIT_S)
        await verify(bootstrap, output, workload, records, is_wrapped=variant != BARE)
    return measured


def compare(bootstrap: str, records: int, rounds: int) -> None:
    """All rounds, and the table."""
    asyncio.run(fill(bootstrap, TOPIC, WORKLOADS["json-223"], records))
    costs: dict[str, list[float]] = {variant: [] for variant in TITLES}
    rates: dict[str, list[float]] = {variant: [] for variant in TITLES}
    for number in range(rounds + 1):
        for variant in TITLES:
            measured = asyncio.run(run(bootstrap, variant, f"{variant}-{number}", records))
            # The first round warms the broker and the page cache, and is not counted.
            if number:
                costs[variant].append(measured.own_us)
                rates[variant].append(measured.rate)
    print(f"{records} records of {SMALL_BYTES} bytes, {rounds} rounds, medians (least to most); outputs verified")
    for variant, its in costs.items():
        low, high = min(its), max(its)
        print(
            f"{TITLES[variant]:<22} {statistics.median(its):6.2f} µs of CPU a record ({low:.2f} to {high:.2f}), "
            f"{statistics.median(rates[variant]):>9,.0f} records/s"
        )
    print(f"ratio of CPU           {statistics.median(costs[OURS]) / statistics.median(costs[BARE]):6.2f}")
    rate = statistics.median(rates[EXACTLY_ONCE]) / statistics.median(rates[OURS])
    print(f"exactly once           {rate:6.2f} of at least once's records/s, committing every {COMMIT_INTERVAL_MS} ms")


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=300_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bootstrap", help="a running Kafka; one is started from its jars without this")
    arguments = parser.parse_args()
    with kafka(arguments.bootstrap) as bootstrap:
        try:
            compare(bootstrap, arguments.records, arguments.rounds)
        except ContestantError as error:
            raise SystemExit(f"a contestant {error}") from error


if __name__ == "__main__":
    main()
