"""What the benchmarks against Kafka share: topics filled and read back, contestants run in processes of their own.

A run is: new topics, a process that works through the input and measures itself, its results read back and compared
record by record, its committed offsets compared with the input's ends, its topics deleted. A contestant that fails,
in whichever of these, raises ``ContestantError``; what it was doing is in its message.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.work import MAX_BATCH_BYTES, Task
from benchmarks.workloads import Workload
from deploy.kafka.kafka import KafkaCluster
from streamproc.broker.admin import KafkaAdmin
from streamproc.broker.interface import NewTopic
from streamproc.broker.producer import KafkaProducer
from streamproc.broker.reader import KafkaReader
from streamproc.records import TopicPartition
from streamproc.settings import KafkaSettings

PARTITIONS = 6
READ_TIMEOUT_MS = 5_000
EXCESS_TIMEOUT_MS = 200
ROOT = Path(__file__).parent.parent
BRIEF = {"file.delete.delay.ms": "1000"}
"""Topics that are deleted make room at once."""


class ContestantError(Exception):
    """A contestant failed, took too long, or its results are not what they have to be; one sentence."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What one run took, in seconds, for this many records."""

    records: int
    wall_s: float
    own_cpu_s: float
    tree_cpu_s: float

    @property
    def rate(self) -> float:
        """Records a second, from the first record in hand to the last commit."""
        return self.records / self.wall_s

    @property
    def own_us(self) -> float:
        """Microseconds of CPU a record of the contestant's first process, which talks to Kafka."""
        return self.own_cpu_s / self.records * 1e6

    @property
    def tree_us(self) -> float:
        """The same with its workers and whatever else it started."""
        return self.tree_cpu_s / self.records * 1e6


@contextlib.contextmanager
def kafka(bootstrap: str | None) -> Iterator[str]:
    """The Kafka at this address, or one that is started from its jars and stopped again."""
    if bootstrap:
        yield bootstrap
    else:
        with tempfile.TemporaryDirectory() as directory, KafkaCluster(Path(directory)) as cluster:
            yield cluster.bootstrap_servers


async def fill(bootstrap: str, topic: str, workload: Workload, records: int) -> None:
    """Write an input topic."""
    settings = KafkaSettings(bootstrap_servers=bootstrap)
    async with KafkaAdmin(settings) as admin:
        await admin.create_topics([NewTopic(topic, PARTITIONS, 1, BRIEF)])
    producer = KafkaProducer(settings, client_id="fill", max_batch_bytes=MAX_BATCH_BYTES)
    await producer.start()
    pending = []
    for partition in range(PARTITIONS):
        batch = producer.create_batch()
        for number in range(partition, records, PARTITIONS):
            value = workload.value(number)
            if batch.append(timestamp=None, key=None, value=value, headers=[]) is None:
                pending.append(await producer.send_batch(batch, topic, partition))
                batch = producer.create_batch()
                batch.append(timestamp=None, key=None, value=value, headers=[])
        pending.append(await producer.send_batch(batch, topic, partition))
    await asyncio.gather(*pending)
    await producer.stop()


@contextlib.asynccontextmanager
async def output_topics(bootstrap: str, output: str) -> AsyncIterator[None]:
    """The topics of one run, deleted after it; dead letters and metrics are streamproc's."""
    dead, metrics = f"{output}.dead", f"{output}.metrics"
    async with KafkaAdmin(KafkaSettings(bootstrap_servers=bootstrap)) as admin:
        counts = {output: PARTITIONS, dead: PARTITIONS, metrics: 1}
        await admin.create_topics([NewTopic(name, count, 1, BRIEF) for name, count in counts.items()])
    try:
        yield
    finally:
        async with KafkaAdmin(KafkaSettings(bootstrap_servers=bootstrap)) as admin:
            await admin.delete_topics(list(counts))


async def verify(bootstrap: str, topic: str, workload: Workload, records: int, *, is_wrapped: bool) -> None:
    """Read the results back: every record once, and each what it has to be.

    Raises:
        ContestantError: they are not.
    """
    seen = bytearray(records)
    async with KafkaReader(KafkaSettings(bootstrap_servers=bootstrap)) as reader:
        reader.assign({TopicPartition(topic, partition): 0 for partition in range(PARTITIONS)})
        count = 0
        while count < records:
            polled = await reader.getmany(timeout_ms=READ_TIMEOUT_MS)
            if not polled:
                raise ContestantError(f"wrote {count} of {records} results")
            for some in polled.values():
                count += len(some)
                tick([record.value for record in some], seen, workload, is_wrapped=is_wrapped)
        if await reader.getmany(timeout_ms=EXCESS_TIMEOUT_MS):
            raise ContestantError(f"wrote more than {records} results")
    if seen != bytearray([1]) * records:
        raise ContestantError(f"did not write each of {records} results once")


def tick(values: Sequence[bytes | None], seen: bytearray, workload: Workload, *, is_wrapped: bool) -> None:
    """Mark the numbers of these results as seen once more.

    Raises:
        ContestantError: a result is not what it has to be, or of no record that there is.
    """
    for value in values:
        try:
            number = workload.check(value or b"", is_wrapped=is_wrapped)
        except (AssertionError, ValueError, KeyError, TypeError) as error:
            raise ContestantError(f"wrote a result that is not what it has to be: {error}") from error
        if not 0 <= number < len(seen) or seen[number]:
            raise ContestantError(f"wrote a result of record {number}, which is one too many")
        seen[number] += 1


async def verify_committed(bootstrap: str, group: str, source: str) -> None:
    """Whether the group has committed everything.

    Raises:
        ContestantError: it has not.
    """
    partitions = [TopicPartition(source, partition) for partition in range(PARTITIONS)]
    async with KafkaAdmin(KafkaSettings(bootstrap_servers=bootstrap)) as admin:
        ends, committed = await admin.end_offsets(partitions), await admin.committed(group, partitions)
    if lacking := [it.partition for it in partitions if committed.get(it) != ends[it]]:
        raise ContestantError(f"ended without committing all of the partitions {lacking}")


def run_process(
    command: Sequence[str], task: Task, *, limit_s: float, environ: Mapping[str, str] | None = None
) -> Measured:
    """Run one contestant in a process of its own, and end whatever it leaves.

    ``environ`` is its environment; ours, with this project to import from, by default.

    Raises:
        ContestantError: it failed, or took longer than ``limit_s``.
    """
    process = subprocess.Popen(
        [*command, task.argument()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)} if environ is None else environ,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise ContestantError(f"was not done after {limit_s:.0f} s") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    return read_report(out, err, process.returncode, task.records)


def read_report(out: str, err: str, code: int, records: int) -> Measured:
    """What a contestant measured, from what it wrote.

    Raises:
        ContestantError: it wrote nothing of the kind, or failed.
    """
    lines = [line for line in out.splitlines() if line.startswith("{")]
    if code or not lines:
        last = (err.strip() or out.strip() or "nothing was said").splitlines()[-1]
        raise ContestantError(f"ended with exit code {code}: {last}")
    report: Mapping[str, float] = json.loads(lines[-1])
    return Measured(records, report["wall_s"], report["own_cpu_s"], report["tree_cpu_s"])
