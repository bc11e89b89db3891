"""Resident memory of ``streamproc run`` while millions of records pass through it.

    python -m benchmarks.soak [--records N] [--workers N] [--kill-every-s S] [--bootstrap HOST:PORT] [--out docs/soak]

A producer keeps a steady distance ahead of the processor, so that there is always a backlog and never much of one; a
reader takes each result as it comes and ticks its id off; once a second the resident memory of the parent and of its
workers is sampled. With ``--kill-every-s`` a worker gets ``kill -9`` that often. At the end every record has to have
come out once, and the median of the parent's memory over the last tenth of the samples may be at most 5% above that of
the first tenth after the warm-up (the first tenth of the records); the same for the workers where none was killed.
Exit code 1 otherwise. ``--out`` takes the path, without its ending, of the graph (SVG) and of the figures (JSON).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import psutil
import uvloop
import yaml

from benchmarks.chart import Line, line_chart
from deploy.kafka.kafka import KafkaCluster
from streamproc.broker.admin import KafkaAdmin
from streamproc.broker.interface import NewTopic, Row
from streamproc.broker.producer import KafkaProducer
from streamproc.broker.reader import KafkaReader
from streamproc.records import TopicPartition
from streamproc.settings import KafkaSettings

PARTITIONS = 6
VALUE_BYTES = 223
TOPIC = "soak"
AHEAD = 200_000
"""Records that the producer is ahead of the results."""
CHUNK = 3_000
MIB = 1_048_576
MAX_GROWTH = 0.05
STALLED_AFTER_S = 60.0
# What is kept has to be more than what is ahead: 200,000 results are about 120 MiB.
RETENTION = {"retention.bytes": str(128 * MIB), "segment.bytes": str(32 * MIB)}


@dataclass(slots=True)
class Sample:
    """One second of the run."""

    seconds: float
    results: int
    parent_mib: float
    workers_mib: float
    memfds: int


class Results:
    """Which results came."""

    def __init__(self, records: int) -> None:
        self.seen = bytearray(records)
        self.count = 0
        self.twice = 0
        self.started = False

    async def read(self, bootstrap: str) -> None:
        """Take the results as they come, until each has come once, and a moment longer."""
        async with KafkaReader(KafkaSettings(bootstrap_servers=bootstrap)) as reader:
            reader.assign({TopicPartition(f"{TOPIC}.results", partition): 0 for partition in range(PARTITIONS)})
            last = time.monotonic()
            while (polled := await reader.getmany(timeout_ms=1_000)) or self.count < len(self.seen):
                if polled:
                    last = time.monotonic()
                elif self.started and time.monotonic() - last > STALLED_AFTER_S:
                    raise SystemExit(f"no result for {STALLED_AFTER_S:g} s, after {self.count}")
                for some in polled.values():
                    self._tick_off([it.value or b"" for it in some])

    def _tick_off(self, values: Sequence[bytes]) -> None:
        begin = len(b'{"result":{"id":')
        for value in values:
            number = int(value[begin : value.index(b",", begin)])
            if self.seen[number]:
                self.twice += 1
            else:
                self.seen[number] = 1
                self.count += 1


def values(first: int, count: int) -> list[Row]:
    """Records of 223 bytes of JSON."""
    rows: list[Row] = []
    for number in range(first, first + count):
        head = b'{"id":%d,"name":"record","score":%d.5,"pad":"' % (number, number % 1_000)
        rows.append((None, None, head + b"x" * (VALUE_BYTES - len(head) - 2) + b'"}', []))
    return rows


async def feed(bootstrap: str, records: int, results: Results) -> None:
    """Write all records, and keep as far ahead of the results as ``AHEAD`` says."""
    producer = KafkaProducer(KafkaSettings(bootstrap_servers=bootstrap), client_id="feed")
    await producer.start()
    pending: set[asyncio.Future[object]] = set()
    for chunk, first in enumerate(range(0, records, CHUNK)):
        while first - results.count > AHEAD:
            await asyncio.sleep(0.01)
        rows = values(first, min(CHUNK, records - first))
        batch = producer.create_batch()
        if batch.extend(rows, 0) < len(rows):
            raise AssertionError("a chunk is meant to fit a batch")
        pending.add(asyncio.ensure_future(await producer.send_batch(batch, TOPIC, chunk % PARTITIONS)))
        done = {future for future in pending if future.done()}
        for future in done:
            future.result()
        pending -= done
    await asyncio.gather(*pending)
    await producer.stop()


def workers_of(parent: psutil.Process) -> list[psutil.Process]:
    """Its worker processes."""
    return [child for child in parent.children() if child.status() != psutil.STATUS_ZOMBIE]


def memfds_of(pid: int) -> int:
    """The descriptors of shared memory that a process holds."""
    count = 0
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            count += "memfd:streamproc" in str(link.readlink())
        except FileNotFoundError:
            continue
    return count


async def sample(parent: psutil.Process, results: Results, samples: list[Sample]) -> None:
    """Look at the memory once a second."""
    begun = time.monotonic()
    for tick in range(1, 1_000_000):
        await asyncio.sleep(max(0.0, begun + tick - time.monotonic()))
        workers = 0.0
        for worker in workers_of(parent):
            try:
                workers += worker.memory_info().rss / MIB
            except psutil.NoSuchProcess:
                continue
        now, rss = round(time.monotonic() - begun, 2), round(parent.memory_info().rss / MIB, 2)
        samples.append(Sample(now, results.count, rss, round(workers, 2), memfds_of(parent.pid)))


async def kill(parent: psutil.Process, every_s: float, killed: list[int], seed: int) -> None:
    """Kill a worker at random, again and again."""
    rng = random.Random(seed)
    while every_s:
        await asyncio.sleep(every_s)
        if found := workers_of(parent):
            pid = rng.choice(found).pid
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)


def start(bootstrap: str, directory: Path, workers: int) -> subprocess.Popen[bytes]:
    """``streamproc run`` with an identity backend."""
    settings = {
        "name": TOPIC,
        "kafka": {"bootstrap_servers": bootstrap},
        "backend": {"path": "identity:Backend", "base_dir": str(Path(__file__).parent)},
        "pool": {"workers": workers, "restart_backoff_ms": 10},
        "tasks": {"main": {"input": {"topics": [TOPIC]}, "batch": {"max_size": 512}}},
        "http": {"port": 0},
        "logging": {"level": "warning"},
    }
    file = directory / "streamproc.yaml"
    file.write_text(yaml.safe_dump(settings))
    return subprocess.Popen([sys.executable, "-m", "streamproc", "run", "-c", str(file)])


async def soak(
    bootstrap: str, directory: Path, records: int, workers: int, kill_every_s: float
) -> tuple[dict[str, Any], list[Sample]]:
    """One run; what was counted, and the samples."""
    async with KafkaAdmin(KafkaSettings(bootstrap_servers=bootstrap)) as admin:
        names = [TOPIC, f"{TOPIC}.results", f"{TOPIC}.dead", f"{TOPIC}.metrics"]
        if present := [name for name in names if name in await admin.topics()]:
            await admin.delete_topics(present)
            while set(names) & set(await admin.topics()):
                await asyncio.sleep(0.1)
        await admin.create_topics([NewTopic(name, PARTITIONS, 1, RETENTION) for name in names[:3]])
        await admin.create_topics([NewTopic(names[3], 1, 1, RETENTION)])
    results, samples, killed = Results(records), list[Sample](), list[int]()
    process = start(bootstrap, directory, workers)
    parent = psutil.Process(process.pid)
    try:
        reading = asyncio.ensure_future(results.read(bootstrap))
        feeding = asyncio.ensure_future(feed(bootstrap, records, results))
        while not results.count:
            await asyncio.sleep(0.05)
            if reading.done() or process.poll() is not None:
                raise SystemExit("the processor did not start")
        results.started = True
        begun = time.monotonic()
        sampling = asyncio.ensure_future(sample(parent, results, samples))
        killing = asyncio.ensure_future(kill(parent, kill_every_s, killed, seed=1))
        while results.count < records and not reading.done():
            await asyncio.wait({reading, sampling}, timeout=0.1, return_when=asyncio.FIRST_COMPLETED)
            if sampling.done():
                raise SystemExit(f"the processor ended: {sampling.exception()}")
        wall_s = time.monotonic() - begun
        sampling.cancel()
        killing.cancel()
        await asyncio.gather(reading, feeding)
        async with KafkaAdmin(KafkaSettings(bootstrap_servers=bootstrap)) as admin:
            dead = await admin.end_offsets([TopicPartition(f"{TOPIC}.dead", it) for it in range(PARTITIONS)])
        process.terminate()
        code = process.wait(60)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    counted = {
        "records": records,
        "results": results.count,
        "duplicates": results.twice,
        "dead_letters": sum(dead.values()),
        "exit_code": code,
        "seconds": round(wall_s, 1),
        "records_per_second": round(records / wall_s),
        "workers": workers,
        "kill_every_s": kill_every_s,
        "workers_killed": len(killed),
    }
    return counted, samples


def medians(samples: Sequence[Sample], records: int, what: str) -> tuple[float, float]:
    """The median over the first tenth of the samples after the warm-up, and over the last."""
    warm = [getattr(it, what) for it in samples if it.results >= records / 10]
    tenth = max(len(warm) // 10, 1)
    return statistics.median(warm[:tenth]), statistics.median(warm[-tenth:])


def judge(counted: dict[str, Any], samples: Sequence[Sample]) -> list[str]:
    """Put the medians beside the counts, and say what is wrong."""
    records = counted["records"]
    wrong = []
    for name, field in {"parent": "parent_mib", "workers": "workers_mib"}.items():
        first, last = medians(samples, records, field)
        growth = last / first - 1
        counted[f"{name}_first_tenth_mib"], counted[f"{name}_last_tenth_mib"] = first, last
        counted[f"{name}_growth_percent"] = round(100 * growth, 2)
        # Workers that are killed are young or old by chance.
        if growth > MAX_GROWTH and not (name == "workers" and counted["kill_every_s"]):
            wrong.append(f"the memory of the {name} grew by {growth:.1%}, from {first:.1f} to {last:.1f} MiB")
    counted["most_memfds"] = max(it.memfds for it in samples)
    if counted["results"] != records or counted["dead_letters"]:
        wrong.append(f"{counted['results']} results and {counted['dead_letters']} dead letters of {records} records")
    if counted["duplicates"]:
        wrong.append(f"{counted['duplicates']} results came twice")
    if counted["exit_code"]:
        wrong.append(f"the processor exited with {counted['exit_code']}")
    return wrong


def graph(counted: dict[str, Any], samples: Sequence[Sample]) -> str:
    """The memory over the records, as SVG."""
    title = f"Resident memory over {counted['records']:,} records, {counted['records_per_second']:,} a second"
    if counted["kill_every_s"]:
        title += f", a worker killed every {counted['kill_every_s']:g} s"
    return line_chart(
        title,
        "records out (millions)",
        "MiB",
        [
            Line("parent", [(it.results / 1e6, it.parent_mib) for it in samples]),
            Line(f"workers ({counted['workers']})", [(it.results / 1e6, it.workers_mib) for it in samples]),
        ],
    )


def main() -> int:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=5_000_000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--kill-every-s", type=float, default=0.0, help="kill -9 a worker this often; never by default")
    parser.add_argument("--bootstrap", help="a running Kafka; one is started from its jars without this")
    parser.add_argument("--out", type=Path, help="where the graph and the figures go, without an ending")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)

        def run(bootstrap: str) -> tuple[dict[str, Any], list[Sample]]:
            return uvloop.run(soak(bootstrap, directory, given.records, given.workers, given.kill_every_s))

        if given.bootstrap:
            counted, samples = run(given.bootstrap)
        else:
            # What retention lets go is looked for every five minutes by default, which is the whole run.
            often = {"log.retention.check.interval.ms": "10000"}
            with KafkaCluster(directory / "kafka", properties=often) as cluster:
                counted, samples = run(cluster.bootstrap_servers)
    wrong = judge(counted, samples)
    for key, value in counted.items():
        print(f"{key:<26} {value}")
    if given.out is not None:
        given.out.with_suffix(".svg").write_text(graph(counted, samples))
        columns = {it.name: [getattr(one, it.name) for one in samples] for it in fields(Sample)}
        lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in (counted | columns).items()]
        given.out.with_suffix(".json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    for sentence in wrong:
        print(f"FAILED: {sentence}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
