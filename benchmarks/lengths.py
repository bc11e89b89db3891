"""What the lengths of records cost the parent: a field's or the backend's against the value's bytes and none at all.

    python -m benchmarks.lengths [--records N] [--rounds N] [--bootstrap HOST:PORT] [--json FILE]

Twice, on the records of ``benchmarks.passthrough`` (JSON of 223 bytes):

- *Through Kafka*: the processor with an identity backend in one worker and batches of 512, from the first record read
  to the last offset committed, as in ``benchmarks.passthrough``. The contestants differ in ``batch.length`` and
  ``batch.strategy`` alone. Each runs in a process of its own that measures its own CPU time, in turns. Outputs are read
  back and verified, for count and content; and the metrics records must tell a padding ratio where there is a length.
- *Alone*: records through ``Measuring`` and a real measuring process, and nothing else. Every length is verified.

What is quoted is the ratio of the medians: the machine may be shared and noisy. The workers' time, and the measuring
process's, are not the parent's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import orjson
import uvloop

from benchmarks.kafka_run import fill, kafka, output_topics, verify
from benchmarks.peers.work import usage
from benchmarks.workloads import SMALL_BYTES, WORKLOADS
from streamproc.broker.memory_log import MemoryRecord
from streamproc.broker.reader import KafkaReader
from streamproc.records import Lease, Span, TopicPartition, value_sizes
from streamproc.runtime.app import Application
from streamproc.runtime.cycles import look_for_cycles_seldom
from streamproc.runtime.measuring import Measuring, MeasuringEvents
from streamproc.runtime.startup import backend_setup, measurer_setup
from streamproc.settings import KafkaSettings, Settings

TOPIC = "passthrough"
WORKLOAD = WORKLOADS["json-223"]
FIELD = {"field": "pad"}
CONTESTANTS: dict[str, dict[str, Any]] = {
    "none, fifo": {"strategy": "fifo"},
    "bytes, fifo": {"strategy": "fifo", "length": "bytes"},
    "field, fifo": {"strategy": "fifo", "length": FIELD},
    "backend, fifo": {"strategy": "fifo", "length": "backend"},
    "bytes, bucketed": {"strategy": "bucketed", "length": "bytes"},
    "field, bucketed": {"strategy": "bucketed", "length": FIELD},
}
PAIRS = (
    ("bytes, fifo", "none, fifo"),
    ("field, fifo", "bytes, fifo"),
    ("field, fifo", "none, fifo"),
    ("backend, fifo", "field, fifo"),
    ("field, bucketed", "bytes, bucketed"),
)
SPAN_RECORDS = 500
IN_FLIGHT_RECORDS = 10_000


def settings_for(name: str, output: str, bootstrap: str) -> Settings:
    """The settings of a contestant."""
    return Settings.model_validate(
        {
            "name": output,
            "kafka": {"bootstrap_servers": bootstrap},
            "backend": {"path": "identity:Backend", "base_dir": str(Path(__file__).parent)},
            "tasks": {
                "main": {
                    "input": {"topics": [TOPIC]},
                    "output": {"topic": output},
                    "metrics": {"topic": f"{output}.metrics"},
                    "dead_letters": {"topic": f"{output}.dead"},
                    "batch": {"max_size": 512, **CONTESTANTS[name]},
                    "commit_interval_ms": 100,
                }
            },
            "http": {"port": 0},
        }
    )


async def through_kafka(name: str, bootstrap: str, output: str, records: int) -> dict[str, float]:
    """CPU and wall seconds of one contestant, in this process."""
    look_for_cycles_seldom()
    application = Application(settings_for(name, output, bootstrap))
    task = application.processor.tasks["main"]

    def committed() -> int:
        return sum([books.committed or 0 for books in task.ledger.partitions()])

    async with application:
        while task.counts.taken == 0:
            await asyncio.sleep(0.001)
        skipped, begun, begun_cpu = committed(), time.perf_counter(), usage().own_s
        while committed() < records:
            await asyncio.sleep(0.005)
        measured = {"cpu_s": usage().own_s - begun_cpu, "wall_s": time.perf_counter() - begun}
    share = records / (records - skipped)
    return {name: seconds * share for name, seconds in measured.items()}


async def verify_metrics(bootstrap: str, output: str, records: int, *, padded: bool) -> None:
    """The metrics topic tells of every record, and of padding where there are lengths."""
    told = 0
    async with KafkaReader(KafkaSettings(bootstrap_servers=bootstrap)) as reader:
        reader.assign({TopicPartition(f"{output}.metrics", 0): 0})
        while told < records:
            polled = await reader.getmany(timeout_ms=5_000)
            assert polled, f"{output}.metrics tells of {told} of {records} records"
            for some in polled.values():
                for record in some:
                    batch = orjson.loads(record.value or b"")
                    assert (batch["padding_ratio"] is not None) == padded, f"{output}: {batch}"
                    told += batch["records"]
    assert told == records, f"{output}.metrics tells of {told} records, and there are {records}"


async def alone(of: Any, records: int) -> dict[str, float]:
    """CPU of the parent and wall seconds of measuring, without anything else; ``of`` is ``batch.length``."""
    settings = Settings.model_validate(
        {
            "name": "alone",
            "backend": {"path": "identity:Backend", "base_dir": str(Path(__file__).parent)},
            "tasks": {"main": {"input": {"topics": ["in"]}, "batch": {"length": of}}},
        }
    )
    workers = {"backend": backend_setup(settings), "logging": settings.logging.model_dump(), "registry": None}
    setup = measurer_setup(settings, workers)
    assert setup is not None
    rows = [MemoryRecord("in", 0, index, 0, None, WORKLOAD.value(index)) for index in range(records)]
    lease = Lease(TopicPartition("in", 0), 1)
    starts = iter(range(0, records, SPAN_RECORDS))
    expected = [len(orjson.loads(row.value or b"")["pad"]) for row in rows]
    seen: list[int] = []
    done = asyncio.Event()
    out = 0

    def measured(_: str, spans: list[Span]) -> None:
        nonlocal out
        for span in spans:
            out -= len(span.records)
            seen.extend(span.lengths or ())
        if len(seen) == records:
            done.set()

    def more() -> None:
        nonlocal out
        while out < IN_FLIGHT_RECORDS and (start := next(starts, None)) is not None:
            some = rows[start : start + SPAN_RECORDS]
            out += len(some)
            measuring.add("main", Span(lease, start, some, value_sizes(some), 0.0))
        measuring.send()

    failed: list[Any] = []
    events = MeasuringEvents(measured, lambda *it: failed.append(it), more, failed.append, failed.append)
    measuring = Measuring(settings.pool, setup, events, time.monotonic)
    await measuring.start()
    await measuring.initialized.wait()
    begun, begun_cpu = time.perf_counter(), usage().own_s
    more()
    await done.wait()
    result = {"cpu_s": usage().own_s - begun_cpu, "wall_s": time.perf_counter() - begun}
    await measuring.stop()
    assert not failed, failed
    assert seen == expected, "lengths that are others', or are wrong"
    return result


def in_a_process(*arguments: str) -> dict[str, float]:
    """What a run of this module with these arguments measured."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.lengths", *arguments], capture_output=True, check=False, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr}")
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


async def verified_run(bootstrap: str, name: str, output: str, records: int) -> dict[str, float]:
    """One contestant's turn, its results and its metrics verified."""
    told = ["--contestant", name, "--bootstrap", bootstrap, "--output", output, "--records", str(records)]
    async with output_topics(bootstrap, output):
        measured = await asyncio.to_thread(in_a_process, *told)
        await verify(bootstrap, output, WORKLOAD, records, is_wrapped=True)
        await verify_metrics(bootstrap, output, records, padded="length" in CONTESTANTS[name])
    return measured


def compare(bootstrap: str, records: int, rounds: int) -> dict[str, Any]:
    """All rounds: microseconds of the parent's CPU a record, and records a second."""
    asyncio.run(fill(bootstrap, TOPIC, WORKLOAD, records))
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in (*CONTESTANTS, "alone: field", "alone: backend")}
    for number in range(rounds + 1):
        for at, name in enumerate(CONTESTANTS):
            measured = asyncio.run(verified_run(bootstrap, name, f"lengths-{at}-{number}", records))
            # The first round warms the broker and the page cache, and is not counted.
            if number:
                runs[name].append(measured)
        for name in ("alone: field", "alone: backend"):
            measured = in_a_process("--contestant", name, "--records", str(records))
            if number:
                runs[name].append(measured)
    return {
        name: {
            "cpu_us": [it["cpu_s"] / records * 1e6 for it in its],
            "records_s": [records / it["wall_s"] for it in its],
        }
        for name, its in runs.items()
    }


def show(found: dict[str, Any], records: int) -> None:
    """The table and the ratios."""
    print(f"{records} records of {SMALL_BYTES} bytes, medians (least to most); outputs and lengths verified")
    for name, it in found.items():
        costs = it["cpu_us"]
        print(
            f"{name:<16} {statistics.median(costs):6.2f} µs of the parent's CPU a record ({min(costs):.2f} to "
            f"{max(costs):.2f}), {statistics.median(it['records_s']):>9,.0f} records/s"
        )
    for one, other in PAIRS:
        ratio = statistics.median(found[one]["cpu_us"]) / statistics.median(found[other]["cpu_us"])
        print(f"{one} over {other}: {ratio:.2f}")


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bootstrap", help="a running Kafka; one is started from its jars without this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured there too")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contestant:
        name, _, of = arguments.contestant.partition(": ")
        if of:
            work = alone(FIELD if of == "field" else of, arguments.records)
        else:
            work = through_kafka(name, arguments.bootstrap, arguments.output, arguments.records)
        print(json.dumps(uvloop.run(work)))
        return
    with kafka(arguments.bootstrap) as bootstrap:
        found = compare(bootstrap, arguments.records, arguments.rounds)
    show(found, arguments.records)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"records": arguments.records, "found": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
