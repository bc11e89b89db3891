"""streamproc against every peer and against the limit: one run, in turns, the same topics of one Kafka.

    python -m benchmarks.throughput [--workload NAME ...] [--only NAME ...] [--rounds N] [--quick]
                                    [--bootstrap HOST:PORT] [--out DIR] [--document FILE]

Contestants: the bare aiokafka loop (``getmany``, ``send_batch``; for identity it passes bytes on unread), a bare
confluent-kafka loop, streamproc with one worker and with two, with two also without its envelope, and its peers in the
fastest fair configuration that their documents give: ``benchmarks/peers`` says which, one file each. Everybody
consumes, decodes, does the work, encodes, produces and commits, with the same JSON library and the same array code.

How it is measured:

- Each contestant runs in a process and an environment of its own, one after another in turns, so that what is slow for
  a minute is slow for all. A first turn warms broker and page cache; it is not counted, and says how many records a
  contestant is given, so that each run takes about four seconds: the rate is per second, and slow peers read a topic
  with fewer of the same records.
- Time and CPU count from the first record in hand to the last offset committed. CPU is that of the contestant's first
  process, and that of all its processes.
- Results are read back and compared, each one, and so are the committed offsets. A contestant that fails, or takes
  longer than two minutes, is in the table with its error, and the others go on.
- What is quoted is the ratio of medians to the bare aiokafka loop's of the same run: the machine may be shared, slow
  and noisy, and the broker has its part of the same cores.

``--quick`` takes one round of small topics, to see that all of it works; its figures say nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.environments import EnvironmentFailedError, environment
from benchmarks.kafka_run import (
    ContestantError,
    Measured,
    fill,
    kafka,
    output_topics,
    run_process,
    verify,
    verify_committed,
)
from benchmarks.peers.work import Task
from benchmarks.throughput_report import BATCH, CONTESTANTS, Contestant, Results, markdown, plot, replace_table, show
from benchmarks.workloads import WORKLOADS, Workload
from deploy.kafka.kafka import kafka_version

MAIN = "json-223"
LIMIT_S = 120.0
RUN_S = 4.0
"""How long a run should take."""
HERE = Path(__file__).parent


@dataclass
class Bench:
    """One run of everything, and what came of it."""

    bootstrap: str
    results: Results
    quick: bool
    filled: dict[str, None] = field(default_factory=dict)
    number: int = 0

    def workload(self, workload: Workload, contestants: Sequence[Contestant], rounds: int) -> None:
        """All turns of one workload."""
        sizes: dict[str, int] = {}
        for contestant in contestants:
            if measured := self.turn(workload, contestant, workload.sizes[0], "warm-up", counts=self.quick):
                sizes[contestant.name] = nearest_size(workload.sizes, measured.rate)
        for number in range(0 if self.quick else rounds):
            for contestant in contestants:
                if size := sizes.get(contestant.name):
                    measured = self.turn(workload, contestant, size, f"{number + 1}/{rounds}", counts=True)
                    if measured:
                        sizes[contestant.name] = nearest_size(workload.sizes, measured.rate)

    def turn(
        self, workload: Workload, contestant: Contestant, records: int, what: str, *, counts: bool
    ) -> Measured | None:
        """One contestant's turn; None, with its error among the results, where it failed."""
        begun = time.perf_counter()
        try:
            measured = self.run(workload, contestant, records)
        except (ContestantError, EnvironmentFailedError) as error:
            self.results.fail(workload.name, contestant.name, str(error))
            say(f"{workload.name:<12} {what:<8} {contestant.title:<28} failed: {error}")
            return None
        if counts:
            self.results.add(workload.name, contestant.name, measured)
        seconds = time.perf_counter() - begun
        rate = f"{measured.rate:>9,.0f} records/s"
        say(f"{workload.name:<12} {what:<8} {contestant.title:<28} {rate} of {records:>7,}, {seconds:.0f} s in all")
        return measured

    def run(self, workload: Workload, contestant: Contestant, records: int) -> Measured:
        """One contestant through one topic, its results verified."""
        python = Path(sys.executable) if contestant.peer is None else environment(contestant.peer)
        source = f"{workload.name}-{records}"
        if source not in self.filled:
            asyncio.run(fill(self.bootstrap, source, workload, records))
            self.filled[source] = None
        self.number += 1
        output = f"results-{self.number}"
        task = Task(
            bootstrap=self.bootstrap,
            source=source,
            output=output,
            group=output,
            records=records,
            work=workload.work,
            batch=BATCH if workload.work == "model" else contestant.largest_batch,
            variant=contestant.variant,
        )

        async def within_topics() -> Measured:
            async with output_topics(self.bootstrap, output):
                measured = await asyncio.to_thread(
                    run_process, [str(python), "-m", contestant.module], task, limit_s=LIMIT_S
                )
                await verify_committed(self.bootstrap, output + contestant.group_suffix, source)
                is_wrapped = contestant.is_wrapped and workload.is_json
                await verify(self.bootstrap, output, workload, records, is_wrapped=is_wrapped)
            return measured

        return asyncio.run(within_topics())


def nearest_size(sizes: Sequence[int], rate: float) -> int:
    """Of these numbers of records the one that takes a time nearest to what a run should take, as a ratio."""
    return min(sizes, key=lambda size: abs(math.log(size / rate / RUN_S)))


def say(line: str) -> None:
    """How it goes, beside the results."""
    print(line, file=sys.stderr, flush=True)


def conditions(rounds: int) -> dict[str, object]:
    """What a reader has to know of where this was taken."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],  # noqa: S607 - whichever git is on the path
        capture_output=True,
        text=True,
        check=False,
        cwd=HERE,
    )
    return {
        "taken": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "commit": commit.stdout.strip(),
        "cpu": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "kafka": kafka_version(),
        "rounds": rounds,
        "batch": BATCH,
    }


def chosen(names: Sequence[str] | None) -> list[Contestant]:
    """The contestants asked for, the bare loop among them: there is no ratio without."""
    if not names:
        return [it for it in CONTESTANTS if it.is_default]
    return [it for it in CONTESTANTS if it.name in names or it is CONTESTANTS[0]]


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=list(WORKLOADS), help="all by default")
    parser.add_argument("--only", nargs="+", choices=[it.name for it in CONTESTANTS], help="beside the bare loop")
    parser.add_argument("--rounds", type=int, help=f"5 of {MAIN} and 3 of the others by default")
    parser.add_argument("--quick", action="store_true", help="one round of small topics")
    parser.add_argument("--bootstrap", help="a running Kafka; one is started from its jars without this")
    parser.add_argument("--out", type=Path, help="folder for throughput.json and throughput.svg")
    parser.add_argument("--document", type=Path, help="Markdown file whose table is replaced by this run's")
    arguments = parser.parse_args()
    contestants = chosen(arguments.only)
    rounds = arguments.rounds or 5
    results = Results(conditions(rounds))
    try:
        with kafka(arguments.bootstrap) as bootstrap:
            bench = Bench(bootstrap, results, arguments.quick)
            for name in arguments.workload or WORKLOADS:
                bench.workload(WORKLOADS[name], contestants, arguments.rounds or (5 if name == MAIN else 3))
    finally:
        # Whatever ends the run, what was measured until then is not lost.
        keep(results, arguments.out, arguments.document)
        show(results)


def keep(results: Results, out: Path | None, document: Path | None) -> None:
    """Write what is asked for."""
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / "throughput.json").write_text(json.dumps(results.as_json(), indent=1) + "\n", encoding="utf-8")
        (out / "throughput.svg").write_text(plot(results), encoding="utf-8")
    if document:
        text = document.read_text(encoding="utf-8")
        document.write_text(replace_table(text, markdown(results)), encoding="utf-8")


if __name__ == "__main__":
    main()
