"""How throughput and memory grow with whatever can grow: flat or linear, as it should be.

    python -m benchmarks.growth [--sweep NAME ...] [--quick | --full] [--rounds N] [--bootstrap HOST:PORT] [--out DIR]

Each sweep changes one thing and leaves the others as they are: 223-byte JSON, 6 partitions, one task, batches of 512,
one worker, one replica, the identity backend, 300,000 records in all (1,500,000 for tasks). Each point is a fresh
``streamproc run`` with topics of its own. The rate is that of the results becoming visible in the broker, the first
third aside; memory is the peak of the parent's resident memory (``VmHWM``). At each point there have to be as many
results as records and no dead letter, samples of every topic's results are read and compared, and the processor has to
end in order.

    backlog     10⁴ to 10⁶ records (``--full``: 10⁷, which takes 7 GB of disk)   rate and memory flat
    partitions  1 to 128                                                          flat
    tasks       1 to 16, which share the records                                  flat
    size        values of 100 B to 1 MB                                           more bytes a second, memory flat
    batch       batches of 1 to 4096                                              grows, then flat
    workers     1 to 4, a backend that waits 20 ms for each batch of 64           linear
    replicas    1 to 4, as above, on 12 partitions                                linear

``--out`` takes the directory of ``growth.json`` and of a plot for each sweep; of sweeps that are not run it keeps what
is there. The exit code is 1 where a curve is not as it should be.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import orjson
import uvloop

from benchmarks.chart import Line, line_chart
from benchmarks.replica import Replica, settings_of
from deploy.kafka.kafka import KafkaCluster
from streamproc.broker.admin import KafkaAdmin
from streamproc.broker.interface import NewTopic, Row
from streamproc.broker.producer import KafkaProducer
from streamproc.broker.reader import KafkaReader
from streamproc.records import TopicPartition
from streamproc.settings import KafkaSettings

MIB = 1_048_576
LARGEST_BATCH_BYTES = 4 * MIB
POLL_S = 0.01
LEAST_S = 1e-7
"""Of a record's time: a short run is looked at more often."""
SAMPLE = 100
STALLED_AFTER_S = 60.0
ENOUGH = 0.7
"""The least share of the best rate at which a curve is still flat, and of n times the first at which it is linear."""
MORE_MEMORY = 1.25
"""The most memory, over that of the point before, at which the memory of a sweep is still flat."""


@dataclass(frozen=True, slots=True)
class Point:
    """What is measured once."""

    records: int = 300_000
    partitions: int = 6
    tasks: int = 1
    value_bytes: int = 223
    batch: int = 512
    workers: int = 1
    replicas: int = 1
    backend: str = "identity:Backend"


@dataclass(frozen=True, slots=True)
class Measured:
    """What was found: the rate, the peak memory of a parent and of its workers, the CPU a record."""

    records_per_s: float
    mib_per_s: float
    parent_peak_mib: float
    worker_peak_mib: float
    parent_us: float
    workers_us: float


@dataclass(frozen=True, slots=True)
class Sweep:
    """One curve: the field that changes, its values, the rest of each point, and how the curve should be.

    ``judge`` answers what is wrong with the values and what was found for each.
    """

    field: str
    values: Sequence[int]
    unit: str
    judge: Callable[[Sequence[int], Sequence[Measured]], list[str]]
    base: Point = Point()
    records: Callable[[int], int] | None = None
    """How many records a value takes, where it is not as many as for the others."""

    def points(self) -> list[Point]:
        """The points in their order."""
        made = []
        for it in self.values:
            changed: dict[str, Any] = {self.field: it} | ({"records": self.records(it)} if self.records else {})
            made.append(replace(self.base, **changed))
        return made


# ------------------------------------------------------------------------------------ how a curve should be


def flat(values: Sequence[int], found: Sequence[Measured]) -> list[str]:
    """The rate does not depend on it."""
    best = max(it.records_per_s for it in found)
    slow = [v for v, it in zip(values, found, strict=True) if it.records_per_s < ENOUGH * best]
    return [f"the rate at {v:,} is below {ENOUGH:.0%} of the best" for v in slow]


def flat_memory(values: Sequence[int], found: Sequence[Measured]) -> list[str]:
    """The memory does not grow from the second point on; at the first there may be less than it takes."""
    peaks = [it.parent_peak_mib for it in found[1:]]
    if len(peaks) > 1 and peaks[-1] > MORE_MEMORY * peaks[0]:
        return [f"the memory at {values[-1]:,} is {peaks[-1] / peaks[0]:.2f} times that at {values[1]:,}"]
    return []


def flat_in_both(values: Sequence[int], found: Sequence[Measured]) -> list[str]:
    """Rate and memory do not depend on it."""
    return [*flat(values[1:], found[1:]), *flat_memory(values, found)]


def more_bytes(values: Sequence[int], found: Sequence[Measured]) -> list[str]:
    """Larger records are more bytes a second, until the machine's memory is the limit."""
    best = 0.0
    wrong = []
    for value, it in zip(values, found, strict=True):
        if it.mib_per_s < ENOUGH * best:
            wrong.append(f"at {value:,} there are {it.mib_per_s:.0f} MiB/s, and there were {best:.0f}")
        best = max(best, it.mib_per_s)
    return wrong


def grows_then_flat(values: Sequence[int], found: Sequence[Measured]) -> list[str]:
    """More of it never costs much."""
    best = 0.0
    wrong = []
    for value, it in zip(values, found, strict=True):
        if it.records_per_s < ENOUGH * best:
            wrong.append(f"the rate at {value:,} is below {ENOUGH:.0%} of that of less")
        best = max(best, it.records_per_s)
    return wrong


def linear(values: Sequence[int], found: Sequence[Measured]) -> list[str]:
    """N times as many are N times as fast."""
    each = found[0].records_per_s / values[0]
    shares = [(v, it.records_per_s / (v * each)) for v, it in zip(values, found, strict=True)]
    return [f"{v} are {share * v:.1f} times as fast as one" for v, share in shares if share < ENOUGH]


_WAITING = Point(batch=64, backend="waiting:Backend", records=20_000)
SWEEPS = {
    "backlog": Sweep("records", (10**4, 10**5, 10**6), "records", flat_in_both),
    "partitions": Sweep("partitions", (1, 2, 4, 8, 16, 32, 64, 128), "partitions", flat),
    # A broker makes files for six partitions of each task, so that what follows has to be long.
    "tasks": Sweep("tasks", (1, 2, 4, 8, 16), "tasks", flat, records=lambda _: 1_500_000),
    "size": Sweep(
        "value_bytes",
        (100, 1_000, 10_000, 100_000, 1_000_000),
        "bytes a value",
        more_bytes,
        records=lambda size: min(300_000, 400_000_000 // size),
    ),
    "batch": Sweep(
        "batch",
        (1, 4, 16, 64, 256, 1_024, 4_096),
        "records a batch",
        grows_then_flat,
        records=lambda batch: min(300_000, 15_000 * batch),
    ),
    "workers": Sweep("workers", (1, 2, 3, 4), "workers", linear, _WAITING, lambda n: 15_000 * n),
    "replicas": Sweep(
        "replicas", (1, 2, 3, 4), "replicas", linear, replace(_WAITING, partitions=12), lambda n: 15_000 * n
    ),
}


def quick(sweep: Sweep) -> Sweep:
    """First and last value and one between, and a third of the records; of the backlogs those that are quick."""
    chosen = sorted({sweep.values[0], sweep.values[len(sweep.values) // 2], sweep.values[-1]})
    if sweep.field == "records":
        return replace(sweep, values=sweep.values[:2])
    its = sweep.records
    fewer = (lambda it: max(its(it) // 3, 100)) if its else (lambda _: sweep.base.records // 3)
    return replace(sweep, values=chosen, records=fewer)


# ------------------------------------------------------------------------------------ one point


def value(number: int, size: int) -> bytes:
    """A JSON object of ``size`` bytes."""
    head = b'{"id":%d,"pad":"' % number
    return head + b"x" * (size - len(head) - 2) + b'"}'


class Topics:
    """The topics of one point: inputs with the records, outputs with what became of them."""

    def __init__(self, bootstrap: str, name: str, point: Point) -> None:
        self._point = point
        self._settings = KafkaSettings(bootstrap_servers=bootstrap)
        self.inputs = [f"{name}.{task}" for task in range(point.tasks)]
        self._results = self._partitions("results")
        self._dead = self._partitions("dead")

    def _partitions(self, kind: str) -> list[TopicPartition]:
        its = range(self._point.partitions)
        return [TopicPartition(f"{topic}.{kind}", partition) for topic in self.inputs for partition in its]

    def tasks(self) -> dict[str, Any]:
        """The tasks' settings."""
        return {
            f"task{number}": {
                "input": {"topics": [topic], "max_value_bytes": LARGEST_BATCH_BYTES},
                "output": {"topic": f"{topic}.results"},
                "dead_letters": {"topic": f"{topic}.dead"},
                "metrics": {"topic": f"{topic}.metrics"},
                "batch": {"max_size": self._point.batch},
            }
            for number, topic in enumerate(self.inputs)
        }

    async def make(self) -> None:
        """Create them; for values of a megabyte they take more than that."""
        config = {"max.message.bytes": str(LARGEST_BATCH_BYTES)}
        kinds = {"": self._point.partitions, ".results": self._point.partitions, ".dead": self._point.partitions}
        async with KafkaAdmin(self._settings) as admin:
            for topic in self.inputs:
                made = [NewTopic(topic + kind, count, 1, config) for kind, count in {**kinds, ".metrics": 1}.items()]
                await admin.create_topics(made)

    async def remove(self) -> None:
        """Delete them, for the disk's sake."""
        async with KafkaAdmin(self._settings) as admin:
            names = [topic + kind for topic in self.inputs for kind in ("", ".results", ".dead", ".metrics")]
            await admin.delete_topics(names)

    async def fill(self) -> None:
        """Write the records, an equal share to each partition of each task; their number is their id."""
        point = self._point
        producer = KafkaProducer(self._settings, client_id="fill", max_batch_bytes=max(900_000, 2 * point.value_bytes))
        await producer.start()
        pending: set[asyncio.Future[object]] = set()
        targets = [(topic, partition) for partition in range(point.partitions) for topic in self.inputs]
        chunk = max(min(3_000, 800_000 // point.value_bytes, point.records // len(targets)), 1)
        for turn, first in enumerate(range(0, point.records, chunk)):
            numbers = range(first, min(first + chunk, point.records))
            rows: list[Row] = [(None, None, value(number, point.value_bytes), []) for number in numbers]
            begin = 0
            while begin < len(rows):
                batch = producer.create_batch()
                begin += batch.extend(rows, begin)
                pending.add(asyncio.ensure_future(await producer.send_batch(batch, *targets[turn % len(targets)])))
            done = {future for future in pending if future.done()}
            for future in done:
                future.result()
            pending -= done
        await asyncio.gather(*pending)
        await producer.stop()

    async def until_done(self, replicas: Sequence[Replica]) -> tuple[float, float, float]:
        """Wait until there is a result for every record.

        A broker makes a partition's files at its first records, milliseconds each: the first third is not counted.

        Returns:
            The results a second from then on; and microseconds of CPU for each, of parents and workers.
        """
        records, partitions = self._point.records, self._results
        begun: tuple[float, int, tuple[float, float]] | None = None
        async with KafkaAdmin(self._settings) as admin:
            moved, last = time.perf_counter(), 0
            while True:
                count, now = sum((await admin.end_offsets(partitions)).values()), time.perf_counter()
                if count >= records / 3 and begun is None:
                    begun = (now, count, cpu_s(replicas))
                if count > last:
                    moved, last = now, count
                if count >= records and begun is not None:
                    break
                for it in replicas:
                    it.check()
                if now - moved > STALLED_AFTER_S:
                    raise SystemExit(f"no result for {STALLED_AFTER_S:g} s, after {count} of {records}")
                await asyncio.sleep(min(POLL_S, records * LEAST_S))
        timed = records - begun[1]
        if timed < records / 3:
            raise SystemExit(f"{records} records are too few to be timed: {begun[1]} of them came at once")
        parents, workers = [(it - then) / timed * 1e6 for it, then in zip(cpu_s(replicas), begun[2], strict=True)]
        return timed / (now - begun[0]), parents, workers

    async def verify(self) -> None:
        """As many results as records, no dead letter, and samples of each topic as they were sent."""
        async with KafkaAdmin(self._settings) as admin:
            ends = await admin.end_offsets(self._results)
            dead = sum((await admin.end_offsets(self._dead)).values())
        if sum(ends.values()) != self._point.records or dead:
            raise SystemExit(f"{sum(ends.values())} results and {dead} dead letters of {self._point.records} records")
        # Of each partition the last ones, of the first of each topic the first ones too.
        starts = [{it: max(end - SAMPLE, 0) for it, end in ends.items() if end}]
        starts.append({it: 0 for it, end in ends.items() if end and it.partition == 0})
        async with KafkaReader(self._settings) as reader:
            for positions in starts:
                reader.assign(positions)
                missing = set(positions)
                while missing:
                    polled = await reader.getmany(timeout_ms=5_000, max_records=10 * SAMPLE)
                    assert polled, f"nothing can be read of {sorted(missing)}"
                    for partition, some in polled.items():
                        missing.discard(TopicPartition(*partition))
                        check_contents([it.value or b"" for it in some[:SAMPLE]], self._point.value_bytes)


def check_contents(results: Sequence[bytes], size: int) -> None:
    """Raise where a result does not hold the record of its number."""
    for result in results:
        content = orjson.loads(result)["result"]
        if content != orjson.loads(value(content["id"], size)):
            raise SystemExit(f"the result of record {content['id']} has another content")


def peak_mib(pid: int) -> float:
    """The most resident memory that a process has had."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1_024
    raise SystemExit(f"process {pid} has no VmHWM: is this Linux?")


def cpu_s(replicas: Sequence[Replica]) -> tuple[float, float]:
    """Seconds of CPU so far, of the parents and of their workers."""
    times = [(it.process.cpu_times(), [child.cpu_times() for child in it.process.children()]) for it in replicas]
    parents = sum(its.user + its.system for its, _ in times)
    return parents, sum(it.user + it.system for _, workers in times for it in workers)


def measure(bootstrap: str, directory: Path, point: Point) -> Measured:
    """One point: fill, run, verify, clean up."""
    name = f"growth-{time.time_ns()}"
    topics = Topics(bootstrap, name, point)
    uvloop.run(topics.make())
    # Replicas share the partitions out while they start, so they get their work afterwards.
    late = point.replicas > 1
    if not late:
        uvloop.run(topics.fill())
    with contextlib.ExitStack() as stack:
        replicas = []
        for number in range(point.replicas):
            settings = settings_of(name, bootstrap, topics.tasks(), workers=point.workers, backend=point.backend)
            replicas.append(stack.enter_context(Replica(settings, directory, f"{name}-{number}")))
        if late:
            for it in replicas:
                it.until_ready()
            uvloop.run(topics.fill())
        rate, parent_us, workers_us = uvloop.run(topics.until_done(replicas))
        peaks = [peak_mib(it.process.pid) for it in replicas]
        workers = [peak_mib(child.pid) for it in replicas for child in it.process.children()]
    uvloop.run(topics.verify())
    uvloop.run(topics.remove())
    return Measured(
        records_per_s=round(rate),
        mib_per_s=round(rate * point.value_bytes / MIB, 1),
        parent_peak_mib=round(max(peaks), 1),
        worker_peak_mib=round(max(workers), 1),
        parent_us=round(parent_us, 2),
        workers_us=round(workers_us, 2),
    )


def median(found: Sequence[Measured]) -> Measured:
    """The median of each figure."""
    return Measured(**{name: statistics.median([asdict(it)[name] for it in found]) for name in asdict(found[0])})


# ------------------------------------------------------------------------------------ all of it


def run_sweep(bootstrap: str, directory: Path, name: str, sweep: Sweep, rounds: int) -> dict[str, Any]:
    """Measure each point of a sweep, and print its table."""
    print(f"\n{name}: {sweep.judge.__doc__}")
    print(f"{sweep.unit:>16} {'records/s':>10} {'MiB/s':>8} {'parent MiB':>11} {'worker MiB':>11} {'parent µs':>10}")
    found = []
    for it, point in zip(sweep.values, sweep.points(), strict=True):
        its = median([measure(bootstrap, directory, point) for _ in range(rounds)])
        found.append(its)
        print(
            f"{it:>16,} {its.records_per_s:>10,.0f} {its.mib_per_s:>8.1f} {its.parent_peak_mib:>11.1f} "
            f"{its.worker_peak_mib:>11.1f} {its.parent_us:>10.2f}",
            flush=True,
        )
    wrong = sweep.judge(sweep.values, found)
    print("as it should be" if not wrong else "\n".join(f"NOT AS IT SHOULD BE: {it}" for it in wrong))
    return {
        "unit": sweep.unit,
        "values": list(sweep.values),
        "points": [asdict(it) for it in sweep.points()],
        "found": [asdict(it) for it in found],
        "wrong": wrong,
    }


def plots(name: str, its: dict[str, Any]) -> dict[str, str]:
    """The charts of a sweep, by the name of the file."""
    values, found = its["values"], its["found"]
    log_x = values[-1] / values[0] > 4
    rates = [(v, it["records_per_s"] / 1_000) for v, it in zip(values, found, strict=True)]
    memory = {who: [(v, it[f"{who}_peak_mib"]) for v, it in zip(values, found, strict=True)] for who in MEMORY}
    return {
        f"growth-{name}.svg": line_chart(
            f"Throughput against {its['unit']}", its["unit"], "1,000/s", [Line("records a second", rates)], log_x=log_x
        ),
        f"growth-{name}-memory.svg": line_chart(
            f"Peak of resident memory against {its['unit']}",
            its["unit"],
            "MiB",
            [Line(who, points) for who, points in memory.items()],
            log_x=log_x,
        ),
    }


MEMORY = ("parent", "worker")


def main() -> int:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", nargs="+", choices=SWEEPS, default=list(SWEEPS), metavar="NAME")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="three points a sweep, a third of the records")
    size.add_argument("--full", action="store_true", help="a backlog of 10 million records too")
    parser.add_argument("--rounds", type=int, default=1, help="medians of so many")
    parser.add_argument("--bootstrap", help="a running Kafka; one is started from its jars without this")
    parser.add_argument("--out", type=Path, help="the directory of the figures and the plots")
    given = parser.parse_args()
    # A producer that finds a new topic's leader not elected yet says so for each partition, and tries again.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    sweeps = {name: quick(SWEEPS[name]) if given.quick else SWEEPS[name] for name in given.sweep}
    if given.full and "backlog" in sweeps:
        sweeps["backlog"] = replace(sweeps["backlog"], values=(*sweeps["backlog"].values, 10**7))
    found = {}
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        bootstrap = given.bootstrap
        if not bootstrap:
            bootstrap = stack.enter_context(KafkaCluster(Path(directory) / "kafka")).bootstrap_servers
        for name, sweep in sweeps.items():
            found[name] = run_sweep(bootstrap, Path(directory), name, sweep, given.rounds)
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        figures = given.out / "growth.json"
        kept = json.loads(figures.read_text(encoding="utf-8")) if figures.exists() else {}
        all_of_them = {name: it for name in SWEEPS if (it := found.get(name, kept.get(name))) is not None}
        figures.write_text(json.dumps(all_of_them, indent=1) + "\n", encoding="utf-8")
        for name, its in found.items():
            for file, chart in plots(name, its).items():
                (given.out / file).write_text(chart, encoding="utf-8")
    return 1 if any(its["wrong"] for its in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
