"""How long ``streamproc run`` takes until it is ready, and ``streamproc --help`` until it has ended.

    python -m benchmarks.startup [--rounds N] [--bootstrap HOST:PORT] [--json FILE]

Every round is a process of its own. Ready is the first 200 of ``/readyz``, asked every 3 ms: the group is joined, the
partitions are assigned, the worker has loaded the backend. The backend is the identity, the topics (6 partitions) are
there, and the group is a new one each time, so that the broker's ``group.initial.rebalance.delay.ms`` counts: it is 0
with the Kafka of ``deploy/kafka``, as for every member but the first of a group, and 3,000 by Kafka's own default.
Beside the medians: when each step of the start was done, by the log, and what the imports take, by package
(``python -X importtime``, which itself makes them slower).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.replica import Replica, settings_of
from deploy.kafka.kafka import KafkaCluster
from streamproc.broker.admin import KafkaAdmin
from streamproc.broker.interface import NewTopic
from streamproc.settings import KafkaSettings

PARTITIONS = 6
TOPIC = "startup"
READY_S, HELP_S = 1.5, 0.3
"""The targets."""
STEPS = {
    "the sidecar answers": "^the sidecar answers",
    "the worker is initialized": "initialized in",
    "Kafka is reached, joining the group": "joining group",
    "partitions are assigned": "assigned in group",
    "ready, says the log": "^ready$",
}
"""Steps of the start, and which message in the log says that each is done."""
IMPORTS = {
    "streamproc --help": ["-m", "streamproc", "--help"],
    "streamproc run": ["-c", "import streamproc.cli.run, streamproc.settings_loading, streamproc.runtime.app"],
    "a worker": ["-c", "import streamproc.runtime.worker"],
}
SHOWN = 8
_IMPORTED = re.compile(r"import time:\s*(\d+) \|\s*\d+ \|\s*(\S+)")


def steps_of(log: Iterable[tuple[float, str]]) -> dict[str, float]:
    """When each step was done first, of those that the log tells, in their order."""
    found: dict[str, float] = {}
    for seconds, message in log:
        for step, pattern in STEPS.items():
            if step not in found and re.search(pattern, message):
                found[step] = seconds
    return dict(sorted(found.items(), key=lambda it: it[1]))


def imports_of(report: str) -> dict[str, float]:
    """Milliseconds of its modules' own code by package, most first, from what ``-X importtime`` wrote."""
    totals: dict[str, float] = {}
    for own_us, module in _IMPORTED.findall(report):
        package = module.partition(".")[0]
        package = package if package not in sys.stdlib_module_names else "the standard library"
        totals[package] = totals.get(package, 0.0) + int(own_us) / 1_000
    return dict(sorted(totals.items(), key=lambda it: -it[1]))


def time_help(rounds: int) -> list[float]:
    """Seconds of each ``streamproc --help``."""
    found = []
    for _ in range(rounds):
        begun = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "streamproc", "--help"], capture_output=True, check=True)
        found.append(time.perf_counter() - begun)
        assert b"Usage: streamproc" in done.stdout
    return found


def time_run(bootstrap: str, directory: Path, rounds: int, stamp: int) -> tuple[list[float], list[dict[str, float]]]:
    """Seconds of each start until ready, and of its steps."""
    found, steps = [], []
    for number in range(rounds):
        task = {
            "input": {"topics": [TOPIC]},
            "output": {"topic": f"{TOPIC}.results"},
            "dead_letters": {"topic": f"{TOPIC}.dead"},
            "metrics": {"topic": f"{TOPIC}.metrics"},
        }
        name = f"startup-{stamp}-{number}"
        with Replica(settings_of(name, bootstrap, {"main": task}), directory, name) as replica:
            found.append(replica.until_ready())
            # The line of the log comes with the same turn of the loop or the next.
            while "ready" not in [message for _, message in replica.log()]:
                time.sleep(0.003)
            steps.append(steps_of(replica.log()))
    return found, steps


def time_imports() -> dict[str, dict[str, float]]:
    """What the imports of each process take, by package."""
    found = {}
    for name, arguments in IMPORTS.items():
        command = [sys.executable, "-X", "importtime", *arguments]
        subprocess.run(command, capture_output=True, check=True)  # once for the page cache
        found[name] = imports_of(subprocess.run(command, capture_output=True, check=True, text=True).stderr)
    return found


async def make_topics(bootstrap: str) -> None:
    """The topics, where they are not there yet."""
    async with KafkaAdmin(KafkaSettings(bootstrap_servers=bootstrap)) as admin:
        there = await admin.topics()
        names = [TOPIC, *(f"{TOPIC}.{it}" for it in ("results", "dead", "metrics"))]
        await admin.create_topics([NewTopic(name, PARTITIONS, 1) for name in names if name not in there])


def measure(bootstrap: str, directory: Path, rounds: int) -> dict[str, Any]:
    """All of it. The first round of each warms the page cache, and is not counted."""
    asyncio.run(make_topics(bootstrap))
    helped = time_help(rounds + 1)[1:]
    ready, steps = time_run(bootstrap, directory, rounds + 1, int(time.time()))
    names = list(steps[-1])
    return {
        "rounds": rounds,
        "help_s": helped,
        "ready_s": ready[1:],
        "steps_s": {name: statistics.median([it[name] for it in steps[1:] if name in it]) for name in names},
        "imports_ms": time_imports(),
    }


def _line(name: str, seconds: Sequence[float], target_s: float) -> str:
    median = statistics.median(seconds)
    verdict = "met" if median <= target_s else "MISSED"
    return f"{name:<28} {median:6.3f} s ({min(seconds):.3f} to {max(seconds):.3f}), target {target_s:g} s: {verdict}"


def report(found: dict[str, Any]) -> None:
    """Print the tables."""
    print(f"medians of {found['rounds']} fresh processes (least to most)")
    print(_line("streamproc --help", found["help_s"], HELP_S))
    print(_line("streamproc run to ready", found["ready_s"], READY_S))
    before = 0.0
    for name, seconds in found["steps_s"].items():
        print(f"  {name:<38} at {seconds:6.3f} s  (+{(seconds - before) * 1_000:4.0f} ms)")
        before = seconds
    for name, packages in found["imports_ms"].items():
        named = list(packages.items())
        rest = sum(its for _, its in named[SHOWN:])
        listed = ", ".join(f"{package} {its:.0f}" for package, its in named[:SHOWN])
        print(f"imports of {name}: {sum(packages.values()):.0f} ms: {listed}, others {rest:.0f}")


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--bootstrap", help="a running Kafka; one is started from its jars without this")
    parser.add_argument("--json", type=Path, help="where the figures go")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        if given.bootstrap:
            found = measure(given.bootstrap, directory, given.rounds)
        else:
            with KafkaCluster(directory / "kafka") as cluster:
                found = measure(cluster.bootstrap_servers, directory, given.rounds)
    report(found)
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
