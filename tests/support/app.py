"""``streamproc run`` as a user runs it, in a process of its own, and Kafka's topics as a user sees them."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import yaml

from streamproc.broker.admin import KafkaAdmin
from streamproc.broker.interface import NewTopic
from streamproc.broker.producer import KafkaProducer
from streamproc.broker.reader import KafkaReader
from streamproc.records import TopicPartition, TopicRecord
from streamproc.settings import KafkaSettings
from tests.support.asyncs import wait_until

ROOT = Path(__file__).parents[2]
Row = tuple[bytes | None, bytes | None]


class App:
    """A running processor; stopped hard at the end of the ``with`` block if it still runs."""

    def __init__(self, directory: Path, settings: dict[str, Any], environ: Mapping[str, str] | None = None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.file = directory / "streamproc.yaml"
        self.file.write_text(yaml.safe_dump({"http": {"port": 0}, **settings}))
        self.log_file = directory / "log"
        self._environ = environ
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "streamproc", "run", "-c", str(self.file)],
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env=self._environ,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if error is not None:
            error.add_note("the processor's log:\n" + self.log()[-4_000:])

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    @property
    def url(self) -> str:
        self._until(lambda: "answers at http" in self.log(), "the sidecar answers")
        found = re.search(r"answers at (http://[0-9.:]+)", self.log())
        assert found
        return found.group(1)

    def get(self, path: str, timeout_s: float = 5.0) -> httpx.Response:
        return httpx.get(self.url + path, timeout=timeout_s)

    def until_ready(self, deadline_s: float = 30.0) -> Self:
        url = self.url
        self._until(lambda: httpx.get(f"{url}/readyz").status_code == 200, "ready", deadline_s)
        return self

    def until(self, condition: Callable[[dict[str, Any]], bool], what: str, deadline_s: float = 60.0) -> dict[str, Any]:
        """Wait until the status fulfils the condition; the status."""
        seen: dict[str, Any] = {}

        def check() -> bool:
            seen.update(self.get("/status").json())
            return condition(seen)

        self._until(check, what, deadline_s)
        return seen

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples of a metric with these labels."""
        total = 0.0
        for line in self.get("/metrics").text.splitlines():
            sample, _, value = line.rpartition(" ")
            if sample.partition("{")[0] == name and all(f'{key}="{it}"' in sample for key, it in labels.items()):
                total += float(value)
        return total

    def worker_pids(self) -> list[int]:
        return [it["pid"] for it in self.get("/status").json()["workers"]]

    def terminate(self, deadline_s: float = 40.0) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(deadline_s)

    def _until(self, condition: Callable[[], object], what: str, deadline_s: float = 30.0) -> None:
        def alive_and_so() -> object:
            if self.process.poll() is not None:
                raise AssertionError(
                    f"the processor ended with {self.process.returncode}, before: {what}\n{self.log()}"
                )
            return condition()

        wait_until(alive_and_so, what, deadline_s=deadline_s)


def kafka_settings(bootstrap_servers: str) -> KafkaSettings:
    return KafkaSettings(bootstrap_servers=bootstrap_servers)


def create(bootstrap_servers: str, topics: Mapping[str, int], **configs: str) -> None:
    async def go() -> None:
        async with KafkaAdmin(kafka_settings(bootstrap_servers)) as admin:
            # On as many nodes as the cluster has it by default: with one node on one.
            await admin.create_topics([NewTopic(name, partitions, -1, configs) for name, partitions in topics.items()])

    asyncio.run(go())


def produce(
    bootstrap_servers: str, topic: str, rows: Mapping[int, Sequence[Row]], *, timestamp: int | None = None
) -> None:
    """Write keys and values to partitions, in their order."""

    async def go() -> None:
        producer = KafkaProducer(kafka_settings(bootstrap_servers), client_id="test", max_batch_bytes=900_000)
        await producer.start()
        acknowledgements = []
        for partition, some in rows.items():
            batch = producer.create_batch()
            for key, value in some:
                if batch.append(timestamp=timestamp, key=key, value=value, headers=[]) is None:
                    acknowledgements.append(await producer.send_batch(batch, topic, partition))
                    batch = producer.create_batch()
                    assert batch.append(timestamp=timestamp, key=key, value=value, headers=[]) is not None
            if batch.record_count():
                acknowledgements.append(await producer.send_batch(batch, topic, partition))
        await asyncio.gather(*acknowledgements)
        await producer.stop()

    asyncio.run(go())


def read_to_end(bootstrap_servers: str, topic: str, partitions: int, *, uncommitted: bool = False) -> list[TopicRecord]:
    """Every record of a topic, by partition in the order of offsets."""

    async def go() -> list[TopicRecord]:
        settings = kafka_settings(bootstrap_servers)
        everything = [TopicPartition(topic, index) for index in range(partitions)]
        async with KafkaAdmin(settings, uncommitted=uncommitted) as admin:
            ends = await admin.end_offsets(everything)
        found: list[TopicRecord] = []
        async with KafkaReader(settings, uncommitted=uncommitted) as reader:
            reader.assign(dict.fromkeys(everything, 0))
            deadline = time.monotonic() + 60
            while sum(ends.values()) and any(
                [await reader.position(partition) < end for partition, end in ends.items()]
            ):
                assert time.monotonic() < deadline, f"{topic} cannot be read to its end"
                for some in (await reader.getmany(timeout_ms=200)).values():
                    found.extend(some)
        return sorted(found, key=lambda record: (record.partition, record.offset))

    return asyncio.run(go())


def ends(bootstrap_servers: str, topic: str, partitions: int) -> dict[int, int]:
    async def go() -> dict[int, int]:
        async with KafkaAdmin(kafka_settings(bootstrap_servers)) as admin:
            found = await admin.end_offsets([TopicPartition(topic, index) for index in range(partitions)])
        return {partition.partition: offset for partition, offset in found.items()}

    return asyncio.run(go())


def committed(bootstrap_servers: str, group: str, topic: str, partitions: int) -> dict[int, int]:
    async def go() -> dict[int, int]:
        async with KafkaAdmin(kafka_settings(bootstrap_servers)) as admin:
            found = await admin.committed(group, [TopicPartition(topic, index) for index in range(partitions)])
        return {partition.partition: offset for partition, offset in found.items()}

    return asyncio.run(go())


def headers(record: TopicRecord) -> dict[str, str]:
    return {name: (value or b"").decode() for name, value in record.headers}


def source(record: TopicRecord) -> tuple[int, int]:
    """Partition and offset that a result says it comes from."""
    told = json.loads(record.value or b"")["source"]
    return told["partition"], told["offset"]
