"""A broker that goes away under load: ``python -m tests.chaos.outage --seconds 60``.

One replica with a task for each delivery, a steady load, and every node of the cluster in turn killed (kill -9), left
away for a time and started again. With one node nothing works meanwhile; with three, partitions get other leaders, and
groups and transactions other coordinators. Then the oracle of the chaos suite compares, and the lag that ``/metrics``
showed is held against what was in the topics at that time: their records bear the brokers' time. The exit code is 0
when every promise was kept, 1 when one was broken.

A lag is *true* when it is that of a moment of the last ``LATE_S`` seconds: while reading pauses the processor asks for
the log end every five. While a node is away nobody knows more of its partitions than was known before.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import re
import shutil
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import orjson
import uvloop
from rich.console import Console
from rich.table import Table

from deploy.kafka.kafka import KafkaCluster, free_ports
from streamproc.broker.admin import KafkaAdmin
from streamproc.broker.interface import NewTopic
from streamproc.errors import BrokerError
from streamproc.records import TopicPartition
from streamproc.settings import KafkaSettings
from tests.chaos.load import Load
from tests.chaos.oracle import Findings, TaskOracle
from tests.chaos.records import PARTITIONS
from tests.chaos.replica import ROOT, Replica
from tests.chaos.topics import read_whole, show

T = TypeVar("T")
NAME = "outage"
TASKS = {"alo": "at_least_once", "eos": "exactly_once"}
GROUPS = {task: f"{NAME}.{task}" for task in TASKS}
SAMPLE_S = 0.25
LATE_S = 6.0
TICK_S = 2.0
"""The gauges are brought up to date every second, and what is asked for takes its time to come."""
RECOVERY_S = 90.0
CATCH_UP_S = 180.0
BEFORE_S = 4.0
"""How long the load runs before the first node goes, and after the last one has come back."""
ASK_TIMEOUT_S = 5.0


@dataclass(slots=True)
class Sample:
    """The lag that was shown at a time, in milliseconds since 1970, by task."""

    at_ms: int
    shown: dict[str, int]
    committed: dict[str, int]
    away_since_ms: int | None
    """Since when a node was away, if one was; it is until the replica works again."""


@dataclass(slots=True)
class Away:
    """A node that was away, in seconds of the run."""

    node: int
    killed_s: float
    killed_ms: int
    answers_s: float = 0.0
    ready_s: float = 0.0
    shown: dict[str, list[int]] = field(default_factory=dict)
    """The least and the most lag that was shown meanwhile."""
    said: dict[str, str] = field(default_factory=dict)
    """What ``/readyz`` said meanwhile; of texts that differ in their numbers the first."""


@dataclass(slots=True)
class Report:
    """The whole run."""

    command: str
    records: dict[str, int] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=dict)
    duplicates: dict[str, int] = field(default_factory=dict)
    aways: list[Away] = field(default_factory=list)
    samples: int = 0
    catch_up_s: float = 0.0
    log_lines: int = 0
    findings: Findings = field(default_factory=Findings)

    @property
    def ok(self) -> bool:
        """Whether every promise was kept."""
        return not self.findings


def settings_of(bootstrap_servers: str) -> dict[str, Any]:
    """The replica's settings: the defaults, but for small batches."""
    return {
        "name": NAME,
        "kafka": {"bootstrap_servers": bootstrap_servers},
        "backend": {"path": "tests.chaos.backend:Answering", "base_dir": str(ROOT)},
        "tasks": {
            task: {
                "input": {"topics": [GROUPS[task]]},
                "delivery": delivery,
                "batch": {"max_size": 256, "max_wait_ms": 20},
                "commit_interval_ms": 200,
            }
            for task, delivery in TASKS.items()
        },
        "logging": {"format": "json"},
    }


class Outage:
    """One run."""

    def __init__(self, options: argparse.Namespace, directory: Path, console: Console, command: str) -> None:
        self._options = options
        self._directory = directory
        self._console = console
        self.report = Report(command)
        self._kafka = KafkaCluster(directory / "kafka", nodes=options.nodes, heap_mb=384)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kafka")  # the nodes end with the thread they began in
        self._settings = KafkaSettings(bootstrap_servers=self._kafka.bootstrap_servers)
        self._load = Load(self._kafka.bootstrap_servers, list(GROUPS.values()), options.rate)
        self._replica = Replica(
            1, directory, free_ports(1)[0], settings_of(self._kafka.bootstrap_servers), lambda *_: 0
        )
        self._samples: list[Sample] = []
        self._committed = dict.fromkeys(TASKS, 0)
        self._away: Away | None = None
        self._begun = time.monotonic()

    async def run(self) -> Report:
        """Do it."""
        try:
            await self._in_thread(self._kafka.start)
            await self._create_topics()
            async with httpx.AsyncClient(timeout=2.0) as self._client:
                self._replica.start()
                try:
                    await self._under_load()
                    await self._replica.terminate()
                finally:
                    self._replica.kill()
            for what in self._replica.unexpected:
                self.report.findings.add("unexpected exits", what)
            self.report.log_lines = self._replica.count_in_log(b"")
            if tracebacks := self._replica.count_in_log(b'"exception":'):
                self.report.findings.add("tracebacks in the log", str(self._replica.log_file), tracebacks)
            await self._compare()
        finally:
            await self._in_thread(lambda: self._kafka.stop(keep=True, timeout_s=2.0))
            self._thread.shutdown()
            for data in self._directory.glob("kafka/node-*/data"):
                shutil.rmtree(data)
        return self.report

    # -- the story

    async def _create_topics(self) -> None:
        replicas = min(self._options.nodes, 3)
        by_broker = {"message.timestamp.type": "LogAppendTime"}
        async with KafkaAdmin(self._settings) as admin:
            await admin.create_topics(
                [
                    NewTopic(f"{topic}{suffix}", PARTITIONS, replicas, by_broker)
                    for topic in GROUPS.values()
                    for suffix in ("", ".results", ".dead")
                ]
            )
            await admin.create_topics([NewTopic(f"{NAME}.metrics", 1, replicas, {})])

    async def _under_load(self) -> None:
        await self._ready()
        pid = self._replica.pid
        async with asyncio.TaskGroup() as group:
            loading = group.create_task(self._load.run())
            watching = group.create_task(self._watch())
            await asyncio.sleep(BEFORE_S)
            for node in range(1, self._options.nodes + 1):
                await self._go_away(node)
                await asyncio.sleep(BEFORE_S)
            self._load.stop()
            await loading
            ended = time.monotonic()
            await self._until(lambda: self._true_lag() == 0, "everything is committed", CATCH_UP_S)
            self.report.catch_up_s = time.monotonic() - ended
            self._say(f"caught up {self.report.catch_up_s:.1f} s after the load's end")
            await self._until(lambda: self._shown_lag() == 0, "the lag that is shown is 0", CATCH_UP_S)
            watching.cancel()
        if self._replica.pid != pid:
            self.report.findings.add("restarts", "the processor has been started anew")

    async def _go_away(self, node: int) -> None:
        await self._until(lambda: all(self._committed.values()), "it works", RECOVERY_S)
        self._away = away = Away(node, self._now_s(), _now_ms())
        self.report.aways.append(away)
        await self._in_thread(lambda: self._kafka.kill(node))
        self._say(f"node {node} is killed")
        await asyncio.sleep(self._options.seconds - (self._now_s() - away.killed_s))
        for task in TASKS:
            shown = [it.shown[task] for it in self._samples if it.away_since_ms == away.killed_ms]
            away.shown[task] = [min(shown), max(shown)] if shown else []
        await self._in_thread(lambda: self._kafka.restart(node))
        away.answers_s = self._now_s()
        self._say(
            f"node {node} answers again; the lag shown meanwhile: {away.shown}; /readyz: {list(away.said.values())}"
        )
        before = dict(self._committed)
        await self._until(lambda: all(self._committed[it] > before[it] for it in TASKS), "it commits", RECOVERY_S)
        await self._ready()
        away.ready_s = self._now_s()
        self._away = None
        self._say(f"ready, and both tasks commit, {away.ready_s - away.answers_s:.1f} s later")

    async def _ready(self) -> None:
        async def is_ready() -> bool:
            return await self._replica.why_not_ready(self._client) is None

        deadline = time.monotonic() + RECOVERY_S
        while not await is_ready():
            self._replica.watch()
            if time.monotonic() > deadline or self._replica.unexpected:
                raise AssertionError(f"not ready: {self._replica.unexpected or 'in time'}")
            await asyncio.sleep(SAMPLE_S)

    async def _until(self, condition: Callable[[], object], what: str, within_s: float) -> None:
        deadline = time.monotonic() + within_s
        while not condition():
            self._replica.watch()
            if time.monotonic() > deadline or self._replica.unexpected:
                self.report.findings.add("did not come", what)
                return
            await asyncio.sleep(SAMPLE_S / 5)

    # -- what is seen meanwhile

    async def _watch(self) -> None:
        asking = asyncio.ensure_future(self._ask_committed())
        try:
            while True:
                await self._look()
                await asyncio.sleep(SAMPLE_S)
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    async def _look(self) -> None:
        shown, at_ms = dict.fromkeys(TASKS, 0), _now_ms()  # nothing is shown before the first fetch
        try:
            text = (await self._client.get(f"{self._replica.url}/metrics")).text
            why = await self._replica.why_not_ready(self._client)
        except httpx.HTTPError as error:
            self.report.findings.add("the sidecar does not answer", repr(error))
            return
        if self._away is not None and why is not None:
            self._away.said.setdefault(re.sub(r"[0-9]+", "", why), why)
        for line in text.splitlines():
            name, _, value = line.rpartition(" ")
            for task in TASKS:
                if name.startswith("streamproc_lag_records{") and f'task="{task}"' in name:
                    shown[task] += int(float(value))
        away_since_ms = self._away.killed_ms if self._away is not None else None
        self._samples.append(Sample(at_ms, shown, dict(self._committed), away_since_ms))

    async def _ask_committed(self) -> None:
        while True:
            try:
                async with asyncio.timeout(ASK_TIMEOUT_S), KafkaAdmin(self._settings) as admin:
                    while True:
                        for task, group in GROUPS.items():
                            partitions = [TopicPartition(group, number) for number in range(PARTITIONS)]
                            async with asyncio.timeout(ASK_TIMEOUT_S):
                                found = await admin.committed(group, partitions)
                            self._committed[task] = max(self._committed[task], sum(found.values()))
                        await asyncio.sleep(SAMPLE_S / 2)
            except (BrokerError, OSError, TimeoutError):
                await asyncio.sleep(SAMPLE_S)

    def _true_lag(self) -> int:
        return sum(sum(self._load.acknowledged[GROUPS[task]]) - self._committed[task] for task in TASKS)

    def _shown_lag(self) -> int:
        return sum(self._samples[-1].shown.values())

    # -- the verdict

    async def _compare(self) -> None:
        for task, topic in GROUPS.items():
            oracle, everything = TaskOracle(task, PARTITIONS), TaskOracle(task, PARTITIONS)
            await show(oracle, self._kafka.bootstrap_servers, topic, PARTITIONS, "read_committed")
            await show(everything, self._kafka.bootstrap_servers, topic, PARTITIONS, "read_uncommitted")
            oracle.check_input(self._load.acknowledged[topic])
            # Nobody else is in the group, so that nothing that was read has to be read again.
            oracle.check_deliveries(exactly_once=True)
            partitions = [TopicPartition(topic, number) for number in range(PARTITIONS)]
            async with KafkaAdmin(self._settings) as admin:
                final = await admin.committed(topic, partitions)
            oracle.check_commits([], {it.partition: offset for it, offset in final.items()})
            self.report.records[task] = oracle.records
            lost = oracle.findings.get("lost")
            self.report.lost[task] = lost.count if lost is not None else 0
            self.report.duplicates[task] = len(oracle.duplicates)
            for what, finding in oracle.findings.items():
                self.report.findings[f"{task}: {what}"] = finding
            written = await self._written(topic)
            for line in false_lags(task, self._samples, written, everything.delivery_times()):
                self.report.findings.add(f"{task}: lag that was not true", line)
        self.report.samples = len(self._samples)

    async def _written(self, topic: str) -> list[int]:
        times: list[int] = []
        async for records in read_whole(self._kafka.bootstrap_servers, topic, PARTITIONS, "read_uncommitted"):
            times.extend(it.timestamp for it in records)
        return sorted(times)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _now_s(self) -> float:
        return time.monotonic() - self._begun

    def _say(self, text: str) -> None:
        self._console.print(f"{self._now_s():7.1f} s  {text}", highlight=False, markup=False, soft_wrap=True)


def _now_ms() -> int:
    return int(time.time() * 1_000)


def false_lags(task: str, samples: Sequence[Sample], written: Sequence[int], delivered: Sequence[int]) -> list[str]:
    """The samples whose lag was that of no moment near theirs.

    A record counts until it is acknowledged to the processor, which is after it was delivered and before it is
    committed. ``written`` and ``delivered`` are the times at which records came into the input topic, and at which what
    became of them came into theirs, in order; with exactly_once also what is not committed yet.
    """
    found, late_ms, tick_ms = [], int(LATE_S * 1_000), int(TICK_S * 1_000)
    for sample in samples:
        shown, at_ms = sample.shown[task], sample.at_ms
        heard_ms = min(at_ms, sample.away_since_ms or at_ms) - late_ms
        before = next(it for it in samples if it.at_ms >= at_ms - tick_ms)
        least = bisect_right(written, heard_ms) - bisect_right(delivered, at_ms + tick_ms)
        most = bisect_right(written, at_ms + tick_ms) - before.committed[task]
        if not least <= shown <= most:
            found.append(f"at {at_ms} ms: {shown} shown, and it was between {max(least, 0)} and {most}")
    return found


def show_report(report: Report, console: Console) -> None:
    """Print it."""
    tasks = Table("task", "delivery", "records", "lost", "duplicates")
    for task, records in report.records.items():
        tasks.add_row(task, TASKS[task], f"{records:,}", str(report.lost[task]), str(report.duplicates[task]))
    console.print(tasks)
    aways = Table("node", "killed at, s", "answers at, s", "works at, s", "lag shown meanwhile", "/readyz said")
    for it in report.aways:
        lags = "\n".join(f"{task}: {' to '.join(f'{lag:,}' for lag in lags)}" for task, lags in it.shown.items())
        times = (f"{seconds:.1f}" for seconds in (it.killed_s, it.answers_s, it.ready_s))
        aways.add_row(str(it.node), *times, lags, "\n".join(it.said.values()))
    console.print(aways)
    console.print(
        f"lag looked at {report.samples} times; caught up {report.catch_up_s:.1f} s after the load's end; "
        f"{report.log_lines} lines in the processor's log"
    )
    for what, finding in report.findings.items():
        console.print(f"[red]{what}: {finding.count}[/red]", highlight=False)
        for example in finding.examples:
            console.print(f"    {example}", highlight=False, markup=False, soft_wrap=True)
    console.print("[green]every promise was kept[/green]" if report.ok else "[red]promises were broken[/red]")


def main(argv: Sequence[str] | None = None) -> int:
    """Run once, and answer the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.outage", description="Take Kafka away under load.")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long each node is away (60)")
    parser.add_argument("--nodes", type=int, default=1, choices=(1, 3), help="of the cluster; each goes in turn (1)")
    parser.add_argument("--rate", type=float, default=2_000.0, help="records a second, for each task (2,000)")
    parser.add_argument("--directory", type=Path, help="logs and data (build/outage/…); kept when a promise was broken")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON")
    given = parser.parse_args(argv)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    directory = (given.directory or ROOT / "build" / "outage" / time.strftime("%Y%m%d-%H%M%S")).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(filename=directory / "clients.log", format="%(asctime)s %(levelname)s %(name)s %(message)s")
    command = " ".join(["python -m tests.chaos.outage", *(sys.argv[1:] if argv is None else argv)])
    report = uvloop.run(Outage(given, directory, console, command).run())
    show_report(report, console)
    if given.json:
        given.json.write_bytes(orjson.dumps({**asdict(report), "ok": report.ok}, option=orjson.OPT_INDENT_2))
    if report.ok:
        shutil.rmtree(directory)
    else:
        console.print(f"logs: {directory}", markup=False, soft_wrap=True)
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
