"""One chaos run: ``python -m tests.chaos.run --seed 7 --minutes 10``, or ``make chaos SEED=7 MINUTES=10``.

Three nodes, three replicas, load, and the faults of the seed's schedule; then the oracle. The exit code is 0 when every
promise was kept, 1 when one was broken, 2 when the run could not be done. docs/reliability.md says how to read it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import platform
import shutil
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import orjson
import uvloop
import yaml
from rich.console import Console
from rich.status import Status

from deploy.kafka.kafka import KafkaClusterError, free_ports, kafka_version
from streamproc.errors import StreamprocError
from streamproc.records import TopicPartition
from streamproc.settings_loading import load_settings
from tests.chaos.cluster import REPLICAS, Cluster
from tests.chaos.load import Load
from tests.chaos.oracle import ROUND_MS, Findings, Round, TaskOracle, describe, explain, rounds_of
from tests.chaos.records import PARTITIONS
from tests.chaos.replica import ROOT, Replica
from tests.chaos.report import FaultReport, Report, TaskReport, show_report
from tests.chaos.schedule import EXTRA_REPLICA, Fault, Kind, lines, make_schedule
from tests.chaos.topics import show

NAME = "chaos"
TASKS = {"alo": "at_least_once", "eos": "exactly_once"}
COMMIT_INTERVAL_MS = {"at_least_once": 500, "exactly_once": 100}
SESSION_TIMEOUT_MS = 6_000
MAX_IN_FLIGHT = 5_000
RECOVERY_S = 90.0
"""How long a replica may take to be ready again before that is a finding."""
CLUSTER_RECOVERY_S = 300.0
"""How long the cluster may take to be in sync: a node starts in seconds, or in a minute where the machine is busy."""
PATIENCE_S = 5.0
"""What is waited for longer is told, this often."""
CATCH_UP_S = 120.0
COMMITS_EVERY_S = 0.5
PROGRESS_EVERY_S = 10.0
POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Options:
    """What to run."""

    seed: int
    minutes: float
    rate: float
    delivery: str
    directory: Path

    @property
    def deliveries(self) -> dict[str, str]:
        """The tasks and what each promises."""
        return {task: delivery for task, delivery in TASKS.items() if self.delivery in ("both", delivery)}


def topic_of(task: str) -> str:
    """A task's input topic."""
    return f"{NAME}.{task}"


def replica_settings(options: Options, bootstrap_servers: str) -> dict[str, Any]:
    """A replica's settings: the defaults, but for what makes a run short and its bounds small."""
    return {
        "name": NAME,
        "kafka": {"bootstrap_servers": bootstrap_servers, "session_timeout_ms": SESSION_TIMEOUT_MS},
        "backend": {"path": "tests.chaos.backend:Answering", "base_dir": str(ROOT)},
        "tasks": {
            task: {
                "input": {"topics": [topic_of(task)]},
                "delivery": delivery,
                "batch": {"max_size": 256, "max_wait_ms": 20},
                "limits": {"max_in_flight_records": MAX_IN_FLIGHT},
                "commit_interval_ms": COMMIT_INTERVAL_MS[delivery],
            }
            for task, delivery in options.deliveries.items()
        },
        "rebalance_drain_s": 3,
        "logging": {"format": "json"},
    }


class ChaosRun:
    """One run, from empty topics to the report."""

    def __init__(self, options: Options, console: Console, command: str) -> None:
        self._options = options
        self._console = console
        self._status = Status("", console=console) if console.is_terminal else None
        self._findings = Findings()
        self._begun: float | None = None
        self._committed: dict[str, dict[int, int]] = {task: {} for task in options.deliveries}
        self._commits: dict[str, list[tuple[int, int, int]]] = {task: [] for task in options.deliveries}
        self._effects: list[tuple[int, FaultReport]] = []
        """When faults could cause a rebalance, in milliseconds since 1970: who goes in silence is missed later."""
        self._report = Report(
            command=command,
            seed=options.seed,
            minutes=options.minutes,
            rate=options.rate,
            versions={
                "streamproc": version("streamproc"),
                "Kafka": kafka_version(),
                "aiokafka": version("aiokafka"),
                "Python": platform.python_version(),
            },
            findings=self._findings,
        )
        self._cluster: Cluster
        self._load: Load
        self._client: httpx.AsyncClient
        self._replicas: dict[int, Replica] = {}

    # -- the story

    async def run(self) -> Report:
        """Do it. Raises StreamprocError and KafkaClusterError when it cannot be done."""
        options = self._options
        self._check_settings()
        schedule = make_schedule(options.seed, options.minutes * 60)
        (options.directory / "schedule.txt").write_text("\n".join(lines(schedule)) + "\n")
        for line in lines(schedule):
            self._say(line, when="planned")
        try:
            async with Cluster(options.directory / "kafka") as self._cluster, httpx.AsyncClient(timeout=2.0) as client:
                self._client = client
                await self._create_topics()
                self._make_replicas()
                try:
                    await self._under_load(schedule)
                    await self._stop_replicas()
                finally:
                    for replica in self._replicas.values():
                        replica.kill()
                await self._compare()
        finally:
            self._clean_up()
        return self._report

    async def _under_load(self, schedule: Sequence[Fault]) -> None:
        bootstrap_servers, topics = self._cluster.bootstrap_servers, [topic_of(task) for task in self._committed]
        self._load = Load(bootstrap_servers, topics, self._options.rate)
        async with asyncio.TaskGroup() as group:
            watching = [group.create_task(replica.poll(self._client)) for replica in self._replicas.values()]
            watching.append(group.create_task(self._watch_commits()))
            for replica in list(self._replicas.values())[: EXTRA_REPLICA - 1]:
                replica.start()
            await self._all_ready()
            self._begun = time.monotonic()
            watching.append(group.create_task(self._show_progress()))
            loading = group.create_task(self._load.run())
            await self._break_things(schedule)
            await self._all_ready()
            self._say("the load ends")
            self._load.stop()
            await loading
            await self._catch_up()
            for task in watching:
                task.cancel()
        self._report.seconds = self._load.seconds
        self._report.load_errors = len(self._load.errors)

    def _check_settings(self) -> None:
        """Let streamproc say at once what it thinks of the replicas' settings."""
        file = self._options.directory / "settings.yaml"
        file.write_text(yaml.safe_dump(replica_settings(self._options, "localhost:9092")))
        load_settings(file, {})

    async def _create_topics(self) -> None:
        tasks = [topic_of(task) for task in self._committed]
        await self._cluster.create_topics(dict.fromkeys(tasks, PARTITIONS), {})
        # The brokers' time: a dead letter keeps the time of its record, which says nothing of its writing.
        written = {f"{topic}.{output}": PARTITIONS for topic in tasks for output in ("results", "dead")}
        await self._cluster.create_topics(written, {"message.timestamp.type": "LogAppendTime"})
        await self._cluster.create_topics({f"{NAME}.metrics": 1}, {})
        await self._cluster.until_known([*tasks, *written, f"{NAME}.metrics"])

    def _make_replicas(self) -> None:
        def committed(task: str, partition: int) -> int:
            return self._committed[task].get(partition, 0)

        for index, port in zip(REPLICAS, free_ports(len(REPLICAS)), strict=True):
            settings = replica_settings(self._options, self._cluster.network.bootstrap_servers(index))
            self._replicas[index] = Replica(index, self._options.directory, port, settings, committed)

    async def _stop_replicas(self) -> None:
        for index in range(1, EXTRA_REPLICA):
            if not self._replicas[index].running:
                self._findings.add("not alive at the end", f"replica {index}")
        await asyncio.gather(*(replica.terminate() for replica in self._replicas.values()))
        for replica in self._replicas.values():
            for what in replica.unexpected:
                self._findings.add("unexpected exits", what)

    # -- faults

    async def _break_things(self, schedule: Sequence[Fault]) -> None:
        """Begin each fault at its time, or as soon as its target has recovered; each ends by itself.

        What comes after a fault that was late is as late, so that faults do not pile up.
        """
        late_s = 0.0
        async with asyncio.TaskGroup() as group:
            for fault in schedule:
                none = dict.fromkeys(self._committed, 0)
                report = FaultReport(str(fault), fault.kind, fault.at_s, {**none}, {**none}, {**none})
                self._report.faults.append(report)
                await asyncio.sleep(fault.at_s + late_s - self._now_s())
                if await self._can_begin(fault):
                    self._mark(fault, report, begins=True)
                    await self._begin(fault)
                    group.create_task(self._end(fault, report))
                late_s = max(late_s, (report.began_s or self._now_s()) - fault.at_s)
            await asyncio.sleep(self._options.minutes * 60 - self._now_s())

    async def _end(self, fault: Fault, report: FaultReport) -> None:
        await asyncio.sleep(fault.lasts_s)
        if fault.kind != Kind.KILL_WORKER:
            self._mark(fault, report, begins=False)
            await self._heal(fault)

    def _mark(self, fault: Fault, report: FaultReport, *, begins: bool) -> None:
        now_s = round(self._now_s(), 2)
        if begins:
            report.began_s = now_s
            late = f" ({now_s - fault.at_s:.1f} s late)" if now_s - fault.at_s > 0.5 else ""
            self._say(f"{fault}{late}")
        else:
            report.ended_s = now_s
            self._say(f"{fault}: over")
        silent = begins and fault.kind not in (Kind.RESTART_REPLICA, Kind.EXTRA_REPLICA)
        noticed_ms = SESSION_TIMEOUT_MS if silent else 0
        self._effects.append((int(time.time() * 1_000) + noticed_ms, report))

    async def _begin(self, fault: Fault) -> None:
        replica = self._replicas.get(fault.replica or 0)
        if fault.kind == Kind.KILL_BROKER:
            await self._cluster.kill(fault.node or 0)
        elif replica is None:
            raise AssertionError(f"{fault} has no replica")
        elif fault.kind == Kind.KILL_WORKER:
            if not replica.kill_worker(0):
                self._say(f"{fault}: there is none just now")
        elif fault.kind == Kind.KILL_REPLICA:
            await replica.look(self._client)  # once more: nobody can ask it afterwards what it held
            replica.kill()
        elif fault.kind == Kind.PAUSE_REPLICA:
            await replica.look(self._client)
            replica.pause()
        elif fault.kind == Kind.RESTART_REPLICA:
            await replica.terminate()
        elif fault.kind == Kind.EXTRA_REPLICA:
            replica.start()
        else:
            await self._cluster.network.cut(
                replica.index, fault.node, "refuse" if fault.kind == Kind.REFUSE else "black_hole"
            )

    async def _heal(self, fault: Fault) -> None:
        replica = self._replicas.get(fault.replica or 0)
        if fault.kind == Kind.KILL_BROKER:
            await self._cluster.restart(fault.node or 0)
        elif replica is None:
            raise AssertionError(f"{fault} has no replica")
        elif fault.kind in (Kind.KILL_REPLICA, Kind.RESTART_REPLICA):
            replica.start()
        elif fault.kind == Kind.PAUSE_REPLICA:
            replica.resume()
        elif fault.kind == Kind.EXTRA_REPLICA:
            await replica.terminate()
        else:
            await self._cluster.network.heal(replica.index, fault.node)

    async def _can_begin(self, fault: Fault) -> bool:
        """Wait until a fault meets a cluster, or a replica, that works; whether it does."""
        if fault.node is not None and not await self._recovered(self._why_not_in_sync, CLUSTER_RECOVERY_S):
            return False
        return fault.replica in (None, EXTRA_REPLICA) or await self._ready(fault.replica or 0)

    async def _why_not_in_sync(self) -> str | None:
        why = await self._cluster.why_not_in_sync()
        return None if why is None else f"the cluster is not whole: {why}"

    async def _ready(self, index: int) -> bool:
        return await self._recovered(lambda: self._why_not_ready(index), RECOVERY_S)

    async def _why_not_ready(self, index: int) -> str | None:
        replica = self._replicas[index]
        replica.watch()
        replica_is_gone = not replica.running and replica.unexpected
        if replica_is_gone:
            replica.start()  # as a supervisor would; the exit is a finding all the same
        return await replica.why_not_ready(self._client)

    async def _all_ready(self) -> None:
        for index in range(1, EXTRA_REPLICA):
            await self._ready(index)

    async def _recovered(self, why_not: Callable[[], Awaitable[str | None]], limit_s: float) -> bool:
        """Wait until there is no reason left; whether that was so within the limit."""
        deadline = time.monotonic() + limit_s
        tell_at = time.monotonic() + PATIENCE_S
        while (why := await why_not()) is not None:
            if time.monotonic() > tell_at:
                tell_at += PATIENCE_S
                self._say(f"waiting: {why}")
            if time.monotonic() > deadline:
                self._say(why)
                self._findings.add(f"not recovered within {limit_s:g} s", f"at {self._now_s():.1f} s: {why}")
                return False
            await asyncio.sleep(POLL_S)
        return True

    # -- what is watched meanwhile

    async def _watch_commits(self) -> None:
        while True:
            for task, committed in self._committed.items():
                partitions = [TopicPartition(topic_of(task), number) for number in range(PARTITIONS)]
                found = await self._cluster.committed(f"{NAME}.{task}", partitions)
                now_ms = int(time.time() * 1_000)
                for partition, offset in (found or {}).items():
                    if committed.get(partition.partition) != offset:
                        committed[partition.partition] = offset
                        self._commits[task].append((now_ms, partition.partition, offset))
            await asyncio.sleep(COMMITS_EVERY_S)

    async def _show_progress(self) -> None:
        next_s = PROGRESS_EVERY_S
        with self._status or contextlib.nullcontext():
            while True:
                text = ", ".join(
                    f"{task} {sum(written):,} written, {self._lag(task):,} not committed"
                    for task, written in zip(self._committed, self._load.written.values(), strict=True)
                )
                if self._status is not None:
                    self._status.update(f"{self._now_s():.0f} s: {text}")
                elif self._now_s() >= next_s:
                    next_s += PROGRESS_EVERY_S
                    self._say(text)
                await asyncio.sleep(0.5)

    def _lag(self, task: str) -> int:
        return sum(self._load.acknowledged[topic_of(task)]) - sum(self._committed[task].values())

    async def _catch_up(self) -> None:
        """Wait until everything is committed."""
        begun = time.monotonic()
        while time.monotonic() < begun + CATCH_UP_S:
            if all(self._lag(task) <= 0 for task in self._committed):
                break
            await asyncio.sleep(POLL_S)
        self._report.catch_up_s = time.monotonic() - begun
        self._say(f"caught up after {self._report.catch_up_s:.1f} s")

    # -- the oracle

    async def _compare(self) -> None:
        self._say("the oracle reads")
        records = 0
        for task, delivery in self._options.deliveries.items():
            exactly_once = delivery == "exactly_once"
            oracle, told = await self._judge(task, exactly_once=exactly_once)
            self._report.tasks[task] = told
            records += told.records
            told.rebalances = self._attribute(task, oracle)
            for what, finding in oracle.findings.items():
                self._findings[f"{task}: {what}"] = finding
        self._report.records_per_s = records / self._report.seconds
        self._report.starts = {f"replica {index}": len(it.samples) for index, it in self._replicas.items()}
        self._report.worker_restarts = sum(it.count_in_log(b"; starting another") for it in self._replicas.values())

    async def _judge(self, task: str, *, exactly_once: bool) -> tuple[TaskOracle, TaskReport]:
        topic = topic_of(task)
        oracle = TaskOracle(task, PARTITIONS)
        await show(oracle, self._cluster.bootstrap_servers, topic, PARTITIONS, "read_committed")
        oracle.check_input(self._load.acknowledged[topic])
        oracle.check_deliveries(exactly_once=exactly_once)
        partitions = [TopicPartition(topic, number) for number in range(PARTITIONS)]
        final = await self._cluster.committed(f"{NAME}.{task}", partitions)
        oracle.check_commits(
            self._commits[task], {partition.partition: offset for partition, offset in (final or {}).items()}
        )
        uncommitted = None
        if exactly_once:
            everything = TaskOracle(task, PARTITIONS)
            await show(everything, self._cluster.bootstrap_servers, topic, PARTITIONS, "read_uncommitted")
            uncommitted = len(everything.duplicates)
        stall_s, partition_stall_s = oracle.longest_stall_s()
        findings = oracle.findings
        return oracle, TaskReport(
            delivery=self._options.deliveries[task],
            records=oracle.records,
            results=oracle.results,
            dead_letters=oracle.dead_letters,
            lost=findings["lost"].count if "lost" in findings else 0,
            duplicates=len(oracle.duplicates),
            duplicates_uncommitted=uncommitted,
            out_of_order=findings["out of order"].count if "out of order" in findings else 0,
            rebalances=0,
            longest_stall_s=stall_s,
            longest_partition_stall_s=partition_stall_s,
        )

    def _attribute(self, task: str, oracle: TaskOracle) -> int:
        """Say which fault brought which duplicates, and whether they were in flight; how many rebalances there were."""
        rounds = rounds_of((at_ms, it.index) for it in self._replicas.values() for at_ms in it.assignments(task))
        processes = [process[task] for it in self._replicas.values() for process in it.samples]
        for duplicate in explain(rounds, oracle.duplicates, processes, MAX_IN_FLIGHT):
            oracle.findings.add("duplicates of what was not in flight", describe(task, duplicate))
        for it in rounds:
            if (fault := self._fault_behind(it.at_ms)) is not None:
                for counts, more in (
                    (fault.rebalances, 1),
                    (fault.duplicates, len(it.again)),
                    (fault.in_flight, it.in_flight),
                ):
                    counts[task] += more
        self._write_evidence(task, oracle, rounds)
        return len(rounds)

    def _write_evidence(self, task: str, oracle: TaskOracle, rounds: Sequence[Round]) -> None:
        """For whoever looks for a reason: what the figures were computed from."""
        with (self._options.directory / f"evidence-{task}.txt").open("w") as file:
            for it in rounds:
                file.write(
                    f"{self._since_start_s(it.at_ms):.1f} s: rebalance, partitions to replicas {sorted(it.replicas)}, "
                    f"{it.in_flight} in flight before, {len(it.again)} of them delivered again\n"
                )
            for duplicate in oracle.duplicates:
                file.write(f"{self._since_start_s(duplicate.at_ms):.2f} s: {describe(task, duplicate)}\n")
            for index, replica in self._replicas.items():
                for number, process in enumerate(replica.samples, 1):
                    for at_ms, held in process[task]:
                        file.write(f"{self._since_start_s(at_ms):.1f} s: replica {index}, process {number}: {held}\n")

    def _fault_behind(self, at_ms: int) -> FaultReport | None:
        """The fault that was the last to be able to cause a rebalance, before this one."""
        before = [(time_ms, report) for time_ms, report in self._effects if time_ms <= at_ms + ROUND_MS // 4]
        return max(before, key=lambda effect: effect[0])[1] if before else None

    # -- odds and ends

    def _clean_up(self) -> None:
        """Keep the logs where something is to be looked up, and never the data, which is gigabytes."""
        kafka = self._options.directory / "kafka"
        for data in kafka.glob("node-*/data"):
            shutil.rmtree(data)
        if self._report.ok and self._report.tasks:
            shutil.rmtree(self._options.directory)
        else:
            self._report.logs = str(self._options.directory)

    def _now_s(self) -> float:
        """Seconds since the load began."""
        return time.monotonic() - self._begun if self._begun is not None else 0.0

    def _since_start_s(self, at_ms: int) -> float:
        return self._now_s() - (time.time() - at_ms / 1_000)

    def _say(self, text: str, when: str = "") -> None:
        when = when or ("starting " if self._begun is None else f"{self._now_s():7.1f} s")
        line = f"{when}  {text}"
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)
        with (self._options.directory / "chaos.log").open("a") as log:
            log.write(line + "\n")


async def run_chaos(options: Options, console: Console, command: str) -> Report:
    """One run; SIGTERM ends it in order, as Ctrl-C does."""
    task = asyncio.ensure_future(ChaosRun(options, console, command).run())
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await task


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos.run", description="Break things, and see that it holds."
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=2.0, help="of load and faults (2)")
    parser.add_argument("--rate", type=float, default=2_000.0, help="records a second, for each task (2,000)")
    parser.add_argument("--delivery", choices=("both", *TASKS.values()), default="both", help="which tasks (both)")
    parser.add_argument("--directory", type=Path, help="logs and data (build/chaos/…); kept when a promise was broken")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run once, and answer the exit code."""
    given = _options(argv)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    directory = given.directory or ROOT / "build" / "chaos" / f"seed-{given.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    options = Options(given.seed, given.minutes, given.rate, given.delivery, directory.absolute())
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        console.print(f"{directory} is no folder: give another --directory", markup=False, soft_wrap=True)
        return 2
    # The load's client and the oracle's say much while a node is away.
    logging.basicConfig(filename=directory / "clients.log", format="%(asctime)s %(levelname)s %(name)s %(message)s")
    command = " ".join(["python -m tests.chaos.run", *(sys.argv[1:] if argv is None else argv)])
    try:
        report = uvloop.run(run_chaos(options, console, command))
    except (StreamprocError, KafkaClusterError) as error:
        console.print(str(error), markup=False)
        return 2
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 130
    show_report(report, console)
    if given.json:
        given.json.write_bytes(orjson.dumps(report.to_json(), option=orjson.OPT_INDENT_2))
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
