"""The parent's CPU per record against a bare aiokafka loop, in one run, in turns, on the same records.

    python -m benchmarks.passthrough [--records N] [--rounds N] [--bootstrap HOST:PORT]

Both read the same topic (223-byte JSON, 6 partitions) and write as many records: the bare loop with ``getmany`` and
``send_batch`` and nothing else, streamproc with an identity backend in one worker and batches of 512, everything on
(sequencer, ledger, metrics, envelope). Each contestant runs in a process of its own that measures its own CPU time
between its first and its last record; workers' time is not the parent's. Every round's outputs are read back and
verified, for count and for content. What is quoted is the ratio of the medians: the machine may be shared and noisy.

streamproc takes part twice, with at_least_once and with exactly_once, both committing every 100 ms; from the first
record read to the last offset committed, so that the waiting of transactions counts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import orjson
import uvloop
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from deploy.kafka.kafka import KafkaCluster
from streamproc.broker.admin import KafkaAdmin
from streamproc.broker.interface import NewTopic
from streamproc.broker.producer import KafkaProducer
from streamproc.broker.reader import KafkaReader
from streamproc.records import TopicPartition
from streamproc.runtime.app import Application
from streamproc.runtime.cycles import look_for_cycles_seldom
from streamproc.runtime.heap import keep_freed_memory
from streamproc.settings import KafkaSettings, Settings

PARTITIONS = 6
VALUE_BYTES = 223
TOPIC = "passthrough"
BARE, OURS, EXACTLY_ONCE = "bare aiokafka loop", "streamproc, parent", "… exactly once"
COMMIT_INTERVAL_MS = 100


def value(index: int) -> bytes:
    """A JSON object of 223 bytes."""
    text = orjson.dumps({"id": index, "name": "record", "score": index % 1000 / 8, "pad": ""})
    return orjson.dumps(
        {"id": index, "name": "record", "score": index % 1000 / 8, "pad": "x" * (VALUE_BYTES - len(text))}
    )


async def fill(bootstrap: str, records: int) -> None:
    """Write the input once."""
    settings = KafkaSettings(bootstrap_servers=bootstrap)
    async with KafkaAdmin(settings) as admin:
        await admin.create_topics([NewTopic(TOPIC, PARTITIONS, 1)])
    producer = KafkaProducer(settings, client_id="fill", max_batch_bytes=900_000)
    await producer.start()
    pending = []
    for partition in range(PARTITIONS):
        batch = producer.create_batch()
        for index in range(partition, records, PARTITIONS):
            row: dict[str, Any] = {"timestamp": None, "key": None, "value": value(index), "headers": []}
            if batch.append(**row) is None:
                pending.append(await producer.send_batch(batch, TOPIC, partition))
                batch = producer.create_batch()
                batch.append(**row)
        pending.append(await producer.send_batch(batch, TOPIC, partition))
    await asyncio.gather(*pending)
    await producer.stop()


async def verify(bootstrap: str, topic: str, records: int, *, wrapped: bool) -> None:
    """Read the outputs back: every record once, its content unharmed."""
    seen = bytearray(records)
    async with KafkaReader(KafkaSettings(bootstrap_servers=bootstrap)) as reader:
        reader.assign({TopicPartition(topic, partition): 0 for partition in range(PARTITIONS)})
        count = 0
        while count < records:
            polled = await reader.getmany(timeout_ms=5_000)
            assert polled, f"{topic} holds {count} of {records} records"
            for some in polled.values():
                for record in some:
                    content = orjson.loads(record.value or b"")
                    content = content["result"] if wrapped else content
                    assert content == orjson.loads(value(content["id"])), f"{topic}: another content"
                    seen[content["id"]] += 1
                    count += 1
        assert seen == bytearray([1]) * records, f"{topic} holds some records twice"
        assert not await reader.getmany(timeout_ms=200), f"{topic} holds more than {records} records"


def cpu_s() -> float:
    """This process's own CPU time, without its children's."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


async def bare(bootstrap: str, output: str, records: int) -> dict[str, float]:
    """The least that a Python process can do with this client."""
    consumer = AIOKafkaConsumer(
        TOPIC, bootstrap_servers=bootstrap, group_id=output, auto_offset_reset="earliest", enable_auto_commit=False
    )
    producer = AIOKafkaProducer(
        bootstrap_servers=bootstrap, acks="all", enable_idempotence=True, max_batch_size=900_000
    )
    await producer.start()
    await consumer.start()
    while not consumer.assignment():
        await asyncio.sleep(0.01)
    begun, begun_cpu, count = time.perf_counter(), cpu_s(), 0
    pending: set[asyncio.Future[Any]] = set()
    while count < records:
        for partition, some in (await consumer.getmany(timeout_ms=200, max_records=5_000)).items():
            batch = producer.create_batch()
            for record in some:
                if batch.append(timestamp=None, key=record.key, value=record.value, headers=[]) is None:
                    pending.add(await producer.send_batch(batch, output, partition=partition.partition))
                    batch = producer.create_batch()
                    batch.append(timestamp=None, key=record.key, value=record.value, headers=[])
            pending.add(await producer.send_batch(batch, output, partition=partition.partition))
            count += len(some)
        pending = {future for future in pending if not future.done()}
    await asyncio.gather(*pending)
    await consumer.commit()
    measured = {"cpu_s": cpu_s() - begun_cpu, "wall_s": time.perf_counter() - begun}
    await consumer.stop()
    await producer.stop()
    return measured


async def ours(bootstrap: str, output: str, records: int, delivery: str) -> dict[str, float]:
    """The processor with an identity backend."""
    settings = Settings.model_validate(
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
                    "batch": {"max_size": 512},
                    "delivery": delivery,
                    "commit_interval_ms": COMMIT_INTERVAL_MS,
                }
            },
            "http": {"port": 0},
        }
    )
    look_for_cycles_seldom()
    keep_freed_memory()
    application = Application(settings)
    task = application.processor.tasks["main"]

    def committed() -> int:
        return sum([books.committed or 0 for books in task.ledger.partitions()])

    async with application:
        while task.counts.taken == 0:
            await asyncio.sleep(0.001)
        skipped, begun, begun_cpu = committed(), time.perf_counter(), cpu_s()
        while committed() < records:
            await asyncio.sleep(0.005)
        measured = {"cpu_s": cpu_s() - begun_cpu, "wall_s": time.perf_counter() - begun}
    share = records / (records - skipped)
    return {name: seconds * share for name, seconds in measured.items()}


def contestant(name: str, bootstrap: str, output: str, records: int) -> dict[str, float]:
    """Run one contestant in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.passthrough", "--contestant", name, "--bootstrap", bootstrap]
    command += ["--output", output, "--records", str(records)]
    done = subprocess.run(command, capture_output=True, check=False, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr}")
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


async def new_topics(bootstrap: str, output: str) -> None:
    """The topics of one round."""
    async with KafkaAdmin(KafkaSettings(bootstrap_servers=bootstrap)) as admin:
        names = [(output, PARTITIONS), (f"{output}.dead", PARTITIONS), (f"{output}.metrics", 1)]
        await admin.create_topics([NewTopic(name, partitions, 1) for name, partitions in names])


def compare(bootstrap: str, records: int, rounds: int) -> None:
    """All rounds, and the table."""
    asyncio.run(fill(bootstrap, records))
    contestants = {BARE: "bare", OURS: "ours", EXACTLY_ONCE: "exactly-once"}
    costs: dict[str, list[float]] = {name: [] for name in contestants}
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, short in contestants.items():
            output = f"{short}-{number}"
            asyncio.run(new_topics(bootstrap, output))
            measured = contestant(name, bootstrap, output, records)
            asyncio.run(verify(bootstrap, output, records, wrapped=name != BARE))
            # The first round warms the broker and the page cache, and is not counted.
            if number:
                costs[name].append(measured["cpu_s"] / records * 1e6)
                rates[name].append(records / measured["wall_s"])
    print(f"{records} records of {VALUE_BYTES} bytes, {rounds} rounds, medians (least to most); outputs verified")
    for name, its in costs.items():
        low, high = min(its), max(its)
        print(
            f"{name:<22} {statistics.median(its):6.2f} µs of CPU a record ({low:.2f} to {high:.2f}), "
            f"{statistics.median(rates[name]):>9,.0f} records/s"
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
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contestant:
        told = (arguments.bootstrap, arguments.output, arguments.records)
        delivery = "exactly_once" if arguments.contestant == EXACTLY_ONCE else "at_least_once"
        run = bare(*told) if arguments.contestant == BARE else ours(*told, delivery)
        print(json.dumps(uvloop.run(run)))
    elif arguments.bootstrap:
        compare(arguments.bootstrap, arguments.records, arguments.rounds)
    else:
        with tempfile.TemporaryDirectory() as directory, KafkaCluster(Path(directory)) as cluster:
            compare(cluster.bootstrap_servers, arguments.records, arguments.rounds)


if __name__ == "__main__":
    main()
