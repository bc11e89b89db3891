"""Where the processor's own CPU time goes, stage by stage, with the share of the Kafka client.

    python -m benchmarks.stages [--records N] [--bootstrap HOST:PORT] [--json FILE]

A sampling profiler (py-spy, in an environment of its own as the peers') looks at the process that talks to Kafka
while it does what `benchmarks.passthrough` measures: 223-byte JSON, identity, one worker, batches of 512, everything
on. A sample counts for the innermost frame that belongs to a file of streamproc's or of aiokafka's; what is below it
(asyncio's streams, orjson, the kernel) counts with whoever called it. What nobody called is the event loop's: receiving
from sockets and sending what did not fit them at once.

Only samples on the processor count, not its start and end. The shares are taken of the CPU time that the same process
measured of itself.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.environments import environment
from benchmarks.kafka_run import fill, kafka, output_topics, run_process, verify
from benchmarks.peers.work import Task
from benchmarks.workloads import WORKLOADS

RATE_HZ = 250
LOOP = "event loop, sockets"
OTHER = "start and end"
STAGES = {
    "aiokafka/consumer/": "Kafka client, reading",
    "aiokafka/producer/": "Kafka client, writing",
    "aiokafka/": "Kafka client, connections",
    "streamproc/broker/fetched_records.py": "Kafka client, reading",
    "streamproc/broker/consumer.py": "Kafka client, reading",
    "streamproc/broker/produce_requests.py": "Kafka client, writing",
    "streamproc/broker/producer.py": "Kafka client, writing",
    "streamproc/broker/": "Kafka client, connections",
    "streamproc/runtime/source.py": "source",
    "streamproc/runtime/batcher.py": "batcher",
    "streamproc/runtime/pool.py": "pool",
    "streamproc/runtime/worker_process.py": "pool",
    "streamproc/runtime/wire.py": "wire",
    "streamproc/runtime/circuit.py": "circuit",
    "streamproc/runtime/sequencer.py": "sequencer",
    "streamproc/runtime/sink.py": "sink",
    "streamproc/runtime/envelopes.py": "sink",
    "streamproc/runtime/ledger.py": "ledger",
    "streamproc/runtime/delivery.py": "ledger",
    "streamproc/records.py": "spans",
    "streamproc/runtime/task_stream.py": "wiring",
    "streamproc/runtime/executions.py": "wiring",
    "streamproc/runtime/processor.py": "wiring",
    "streamproc/observe/": "metrics, sidecar",
}
"""Which stage a file belongs to; the first that fits."""


def stage_of(frames: list[str]) -> str:
    """The stage of a sample: of its frames, ``name (file:line)`` from the outermost, the last one that has a stage.

    Before and after its run the processor has no event loop, so that frames of imports belong to no stage.
    """
    if not any("uvloop" in frame for frame in frames) or any("importlib" in frame for frame in frames):
        return OTHER
    for frame in reversed(frames):
        for file, stage in STAGES.items():
            if file in frame:
                return stage
    return LOOP


def shares(raw: str) -> dict[str, float]:
    """The share of each stage, most first, from the profiler's lines: frames between semicolons, and a count."""
    counts: Counter[str] = Counter()
    for line in raw.splitlines():
        stack, _, count = line.rpartition(" ")
        counts[stage_of(stack.split(";"))] += int(count)
    counts.pop(OTHER, None)
    total = counts.total()
    return {stage: count / total for stage, count in counts.most_common()}


async def measure(bootstrap: str, records: int) -> tuple[dict[str, float], float]:
    """The shares, and the CPU time a record in microseconds."""
    workload, source, output = WORKLOADS["json-223"], "stages", "stages.results"
    await fill(bootstrap, source, workload, records)
    task = Task(bootstrap, source, output, "stages", records, workload.work, batch=512, variant="1")
    async with output_topics(bootstrap, output):
        with tempfile.NamedTemporaryFile("r") as found:
            options = ["--rate", str(RATE_HZ), "--format", "raw", "--output", found.name]
            py_spy = str(environment("py-spy").with_name("py-spy"))
            command = [py_spy, "record", *options, "--", sys.executable, "-m", "benchmarks.contestants"]
            measured = await asyncio.to_thread(run_process, command, task, limit_s=300)
            raw = found.read()
        await verify(bootstrap, output, workload, records, is_wrapped=True)
    return shares(raw), measured.own_us


def main() -> None:
    """Parse the arguments, run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=2_000_000)
    parser.add_argument("--bootstrap", help="a running Kafka; one is started from its jars without this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the shares there")
    arguments = parser.parse_args()
    with kafka(arguments.bootstrap) as bootstrap:
        found, own_us = asyncio.run(measure(bootstrap, arguments.records))
    table = Table("stage", "share", "µs a record", title=f"{own_us:.2f} µs of CPU a record, by stage")
    for stage, share in found.items():
        table.add_row(stage, f"{share:.1%}", f"{share * own_us:.2f}")
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"own_us": own_us, "shares": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
