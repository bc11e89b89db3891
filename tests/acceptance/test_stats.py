"""``streamproc stats``: three replicas write, it is killed in the midst, and its windows still hold every batch."""

from __future__ import annotations

import json
import math
import signal
import socket
import subprocess
import sys
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import pytest

from streamproc.broker.admin import KafkaAdmin
from streamproc.broker.interface import NewTopic, Row
from streamproc.broker.producer import KafkaProducer
from streamproc.broker.reader import KafkaReader
from streamproc.records import TopicPartition
from streamproc.settings import KafkaSettings
from streamproc.stats.histogram import RELATIVE_ERROR, SMALLEST
from tests.conftest import Run
from tests.support.asyncs import wait_until
from tests.support.commands import clean_environment, run_command

PARTITIONS = 3
RECORDS = 600
BACKEND = """
from streamproc import InferenceBackend


class Backend(InferenceBackend):
    def execute(self, inputs):
        if any(it["number"] % 97 == 0 for it in inputs):
            raise ValueError("not this one")
        return [{"number": it["number"]} for it in inputs]
"""


@pytest.fixture
def project(tmp_path: Path, kafka: str, topic_name: Callable[..., str], run: Run) -> tuple[Path, str]:
    name = topic_name("stats")
    settings = {
        "name": name,
        "kafka": {"bootstrap_servers": kafka, "session_timeout_ms": 6_000},
        "backend": {"path": "inference:Backend"},
        "tasks": {
            "text": {
                "input": {"topics": [f"{name}.in"]},
                "batch": {"max_size": 8, "max_wait_ms": 5},
                "on_error": {"retries": 0},
                "commit_interval_ms": 50,
            }
        },
        "http": {"port": 0},
        "stats": {"port": 0, "grace_s": 5},
    }
    (tmp_path / "streamproc.yaml").write_text(json.dumps(settings))
    (tmp_path / "inference.py").write_text(BACKEND)

    async def make() -> None:
        async with KafkaAdmin(KafkaSettings(bootstrap_servers=kafka)) as admin:
            await admin.create_topics(
                [
                    NewTopic(f"{name}.in", PARTITIONS),
                    *(NewTopic(f"{name}.in.{it}", PARTITIONS) for it in ("results", "dead")),
                    NewTopic(f"{name}.metrics", 2),
                ]
            )

    run(make())
    return tmp_path, name


class Process:
    """A command that runs on; its log is lines of JSON."""

    def __init__(self, folder: Path, *arguments: str, log: str, **environ: str) -> None:
        self.log = folder / log
        self._file = self.log.open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "streamproc", *arguments],
            cwd=folder,
            env={**clean_environment(), **environ},
            stdout=subprocess.DEVNULL,
            stderr=self._file,
        )

    def messages(self) -> list[str]:
        assert self.process.poll() is None or self.process.returncode <= 0, self.log.read_text()
        return [orjson.loads(line)["message"] for line in self.log.read_text().splitlines() if line.endswith("}")]

    @property
    def url(self) -> str:
        said = "the sidecar answers at "
        wait_until(lambda: any(it.startswith(said) for it in self.messages()), f"{self.log} says where it answers")
        return next(it.removeprefix(said) for it in self.messages() if it.startswith(said))

    def end(self, number: signal.Signals) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(30)
        self._file.close()
        return code


@contextmanager
def running(folder: Path, *arguments: str, log: str, **environ: str) -> Iterator[Process]:
    process = Process(folder, *arguments, log=log, **environ)
    try:
        yield process
    finally:
        process.end(signal.SIGKILL)


def is_ready(replica: Process) -> bool:
    return "ready" in replica.messages()


def ask(url: str, path: str) -> Any:
    with urllib.request.urlopen(f"{url}{path}", timeout=10) as answer:  # noqa: S310 - our own, on this machine
        return orjson.loads(answer.read())


def everything(kafka: str, topic: str, run: Run) -> list[Any]:
    """Every record of a topic, as it is committed."""
    settings = KafkaSettings(bootstrap_servers=kafka)

    async def read() -> list[Any]:
        found: list[Any] = []
        async with KafkaAdmin(settings) as admin, KafkaReader(settings, client_id="test") as reader:
            count = (await admin.topics())[topic].partitions
            partitions = [TopicPartition(topic, number) for number in range(count)]
            ends = await admin.end_offsets(partitions)
            positions = dict.fromkeys(partitions, 0)
            reader.assign({it: 0 for it in partitions if ends[it]})
            while any(positions[it] < ends[it] for it in partitions):
                for at, records in (await reader.getmany(timeout_ms=200)).items():
                    found += records
                    positions[TopicPartition(*at)] = records[-1].offset + 1
        return found

    return run(read())


def send(kafka: str, topic: str, numbers: range, run: Run) -> None:
    settings = KafkaSettings(bootstrap_servers=kafka)

    async def write() -> None:
        producer = KafkaProducer(settings, client_id="test")
        await producer.start()
        try:
            for partition in range(PARTITIONS):
                batch = producer.create_batch(1_000_000)
                rows: list[Row] = [
                    (None, None, b'{"number": %d}' % it, []) for it in numbers if it % PARTITIONS == partition
                ]
                assert batch.extend(rows, 0) == len(rows)
                await (await producer.send_batch(batch, topic, partition))
        finally:
            await producer.stop()

    run(write())


def test_three_replicas_and_a_kill_9_of_stats_its_window_totals_equal_the_sums_of_the_metrics_topic(
    project: tuple[Path, str], kafka: str, run: Run
) -> None:
    folder, name = project
    with ExitStack() as stack:
        replicas = [
            stack.enter_context(
                running(folder, "run", log=f"replica-{it}.log", STREAMPROC_KAFKA__GROUP_INSTANCE_ID=f"replica-{it}")
            )
            for it in range(3)
        ]
        first = stack.enter_context(running(folder, "stats", log="stats-1.log"))
        for replica in replicas:
            wait_until(partial(is_ready, replica), "the replica is ready")
        url = first.url

        def counted(at: str) -> int:
            windows = ask(at, "/stats?window=1h&last=5")["windows"]
            return sum(it["fleet"]["records"] for it in windows)

        sent = 0
        while sent < RECORDS // 2 or counted(url) < RECORDS // 6:
            send(kafka, f"{name}.in", range(sent, sent + 60), run)
            sent += 60
        # More comes while it is killed: what it has applied, written and committed by then is of different ages.
        send(kafka, f"{name}.in", range(sent, sent + 300), run)
        sent += 300
        first.end(signal.SIGKILL)
        send(kafka, f"{name}.in", range(sent, sent + 300), run)
        sent += 300

        second = stack.enter_context(running(folder, "stats", log="stats-2.log"))
        url = second.url

        def processed() -> int:
            return sum(orjson.loads(it.value)["records"] for it in everything(kafka, f"{name}.metrics", run))

        wait_until(lambda: processed() >= sent, "every record is in the metrics topic")
        for replica in replicas:
            assert replica.end(signal.SIGTERM) == 0
        batches = [orjson.loads(it.value) for it in everything(kafka, f"{name}.metrics", run)]
        assert sum(it["records"] for it in batches) == sent
        wait_until(lambda: counted(url) >= sent, "everything is counted again after the kill", deadline_s=60)
        assert counted(url) == sent, "a batch is counted twice"
        assert {it["replica"] for it in batches} == {"replica-0", "replica-1", "replica-2"}

        for window, width_ms in (("10s", 10_000), ("1m", 60_000), ("1h", 3_600_000)):
            answer = ask(url, f"/stats?window={window}&last=1000")
            assert sum(sum(it["late"].values()) + it["early"] + it["malformed"] for it in answer["partitions"]) == 0
            by_hand: defaultdict[tuple[int, str], list[Any]] = defaultdict(list)
            for it in batches:
                by_hand[it["timestamp"] // width_ms * width_ms, it["replica"]].append(it)
            found = {
                (it["start"], replica): totals
                for it in answer["windows"]
                for replica, totals in it["tasks"]["text"]["replicas"].items()
            }
            assert found.keys() == by_hand.keys()
            for key, own in by_hand.items():
                check(found[key], own)
            for it in answer["windows"]:
                check(it["fleet"], [one for key, own in by_hand.items() if key[0] == it["start"] for one in own])

        # The windows close by themselves once nothing comes any more, and each is published with the same totals.
        def rows() -> dict[bytes, Any]:
            return {it.key: orjson.loads(it.value) for it in everything(kafka, f"{name}.stats", run)}

        tens = len({(it["timestamp"] // 10_000, it["replica"]) for it in batches})
        tens += len({it["timestamp"] // 10_000 for it in batches})
        wait_until(
            lambda: sum(it["window_s"] == 10 for it in rows().values()) >= tens, "all 10 s windows are published"
        )
        for replica_of in ("replica-0", "replica-1", "replica-2", None):
            own = [it for it in batches if replica_of in (None, it["replica"])]
            of = [it for it in rows().values() if it["window_s"] == 10 and it["replica"] == replica_of]
            assert sum(it["batches"] for it in of) == len(own)
            assert sum(it["failed"] for it in of) == sum(it["failed"] for it in own)
            assert sum(sum(it["wall_time"]["buckets"].values()) for it in of) == len(own)
        assert second.end(signal.SIGINT) == 0
        assert "Traceback" not in second.log.read_text()


def check(totals: Any, batches: list[Any]) -> None:
    """A window against the records that belong to it: sums to the last digit, quantiles within their bound."""
    assert totals["batches"] == len(batches)
    for count in ("records", "results", "failed", "attempts", "requested"):
        assert totals[count] == sum(it[count] for it in batches)
    causes: Counter[str] = Counter()
    for it in batches:
        causes.update(it["causes"])
    assert totals["causes"] == causes
    assert totals["closed_by"] == Counter(it["closed_by"] for it in batches)
    waits = [it["wall_time"] for it in batches]
    executes = [it["execution_times"]["execute"] for it in batches if "execution_times" in it]
    # A step that a backend has not is null, and no step of the window.
    for told, values in ((totals["wall_time"], waits), (totals["execution_times"].get("execute"), executes)):
        if not values:
            assert told is None
            continue
        assert round(told["sum"] * 1e5) == sum(round(it * 1e5) for it in values)
        assert (told["count"], told["min"], told["max"]) == (len(values), min(values), max(values))
        for quantile, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
            true = sorted(values)[max(1, math.ceil(share * len(values))) - 1]
            assert abs(told[quantile] - true) <= max(true * RELATIVE_ERROR * 1.000001, SMALLEST)


def test_a_missing_topic_a_broker_that_is_away_and_a_port_that_is_taken_end_it_with_one_sentence(
    project: tuple[Path, str],
) -> None:
    folder, name = project
    settings = json.loads((folder / "streamproc.yaml").read_text())
    told = {**settings, "tasks": {"text": {"input": {"topics": [f"{name}.in"]}, "metrics": {"topic": f"{name}.no"}}}}
    (folder / "streamproc.yaml").write_text(json.dumps(told))
    done = run_command(folder, "stats", code=1, timeout_s=30)
    assert f"metrics topic {name}.no does not exist; create it with `streamproc topics apply`" in done.stderr
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (folder / "streamproc.yaml").write_text(json.dumps({**settings, "stats": {"port": port}}))
        done = run_command(folder, "stats", code=1, timeout_s=30)
    assert f"stats.port {port} is in use at 127.0.0.1" in done.stderr
    away = {**settings, "kafka": {"bootstrap_servers": f"127.0.0.1:{port}", "connect_timeout_s": 0.5}}
    (folder / "streamproc.yaml").write_text(json.dumps(away))
    done = run_command(folder, "stats", code=1, timeout_s=30)
    assert f"no Kafka broker answers at 127.0.0.1:{port}" in done.stderr
