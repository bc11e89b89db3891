"""How fast a capture is made and replayed, and how well its pace is kept, by the broker's own clock.

    python -m benchmarks.replay [--records N] [--seconds S] [--rate N] [--bootstrap HOST:PORT]

Captures a topic (223-byte JSON, 6 partitions), replays the capture as fast as possible, and then one whose records come
at random, ``rate`` a second for ``seconds``, at its original pace. Both are the commands as a user calls them. The pace
is measured by what the broker wrote: the target topic has LogAppendTime, in whole milliseconds, and each record says in
its headers which one of the capture it is.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.kafka_run import PARTITIONS, fill
from benchmarks.workloads import WORKLOADS
from deploy.kafka.kafka import KafkaCluster
from streamproc.broker.admin import KafkaAdmin
from streamproc.broker.interface import NewTopic
from streamproc.broker.reader import KafkaReader
from streamproc.record_lines import PlacedRecord
from streamproc.records import Record, TopicPartition
from streamproc.replay.capture_file import write_capture
from streamproc.replay.marks import Source, source_of
from streamproc.settings import KafkaSettings

SOURCE, FAST, PACED = "replay-source", "replay-fast", "replay-paced"
WORKLOAD = WORKLOADS["json-223"]
_FIRST_MS = 1_700_000_000_000


def call(*arguments: str | Path) -> dict[str, Any]:
    """Run a command of streamproc with --json; what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "streamproc", *map(str, arguments), "--json", "-q"],
        check=True,
        stdout=subprocess.PIPE,
    )
    return dict(json.loads(done.stdout))


def write_random(path: Path, seconds: float, rate: float) -> list[PlacedRecord]:
    """A capture whose records come at random."""
    chance, now_ms = random.Random(1), 0.0
    records: list[PlacedRecord] = []
    while now_ms < seconds * 1_000:
        number = len(records)
        value = WORKLOAD.value(number)
        records.append(PlacedRecord("random", number % PARTITIONS, number, _FIRST_MS + int(now_ms), None, value, []))
        now_ms += chance.expovariate(rate) * 1_000
    with write_capture(path) as writer:
        writer.write(records)
    return records


async def read(settings: KafkaSettings, topic: str, count: int) -> list[Record]:
    """All records of a topic."""
    found: list[Record] = []
    async with KafkaReader(settings) as reader:
        reader.assign({TopicPartition(topic, number): 0 for number in range(PARTITIONS)})
        while len(found) < count:
            some = await reader.getmany(timeout_ms=5_000)
            assert some, f"{topic} has {len(found)} records, not {count}"
            found += [record for records in some.values() for record in records]
    return found


def deviations_ms(records: list[PlacedRecord], appended: list[Record]) -> list[int]:
    """By how many milliseconds the time between neighbours is off, in order of size."""
    at: dict[Source | None, int] = {source_of(record.headers): record.timestamp for record in appended}
    times = [at[Source(record.topic, record.partition, record.offset)] for record in records]
    between = [second - first for first, second in pairwise(times)]
    due = [second.timestamp - first.timestamp for first, second in pairwise(records)]
    return sorted(abs(one - other) for one, other in zip(between, due, strict=True))


def measure(bootstrap: str, records: int, seconds: float, rate: float, directory: Path) -> dict[str, Any]:
    """The figures."""
    settings = KafkaSettings(bootstrap_servers=bootstrap)

    async def prepare() -> None:
        await fill(bootstrap, SOURCE, WORKLOAD, records)
        async with KafkaAdmin(settings) as admin:
            await admin.create_topics(
                [
                    NewTopic(FAST, PARTITIONS, 1),
                    NewTopic(PACED, PARTITIONS, 1, {"message.timestamp.type": "LogAppendTime"}),
                ]
            )

    asyncio.run(prepare())
    capture, paced = directory / "capture.jsonl", directory / "paced.jsonl"
    captured = call("replay", "capture", SOURCE, "-b", bootstrap, "-o", capture)
    fast = call("replay", "run", capture, "-b", bootstrap, "--to", FAST, "--max")
    assert len(asyncio.run(read(settings, FAST, records))) == records
    expected = write_random(paced, seconds, rate)
    told = call("replay", "run", paced, "-b", bootstrap, "--to", PACED)
    off = deviations_ms(expected, asyncio.run(read(settings, PACED, len(expected))))
    return {
        "captured_records_per_s": captured["captured_now"]["records_per_s"],
        "replayed_records_per_s": fast["records_per_s"],
        "paced_records": len(expected),
        "inter_arrival_error_ms_by_broker": {f"p{share}": off[len(off) * share // 100] for share in (50, 99)}
        | {"max": off[-1]},
        "inter_arrival_error_ms_told": told["pace"]["inter_arrival_error_ms"],
    }


def main() -> None:
    """Measure once and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--rate", type=float, default=500)
    parser.add_argument("--bootstrap", help="a Kafka that runs; else one is started")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bootstrap = arguments.bootstrap or stack.enter_context(KafkaCluster(directory / "kafka")).bootstrap_servers
        found = measure(bootstrap, arguments.records, arguments.seconds, arguments.rate, directory)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
