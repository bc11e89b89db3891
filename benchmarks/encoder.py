"""A real encoder through Kafka: batches by length against batches in order of arrival, and against the best there are.

    python -m benchmarks.encoder [--records N] [--rounds N] [--max-size N] [--bootstrap HOST:PORT] [--json FILE]

The sentence encoder of ``examples/sentences``, one process with one thread, works through a topic of texts whose
lengths spread as texts' do (lognormal, `examples/sentences/texts.py`). All contestants have the same limits, a size and
a padded length, and take turns:

- *fifo*, *bucketed*: the processor, everything on, with that ``batch.strategy``. Lengths are the values' bytes, or the
  tokens that the backend tells (``length: backend``). Nothing was estimated before: it learns what batches cost.
- *sort 8N*: Infinity's published rule (see ``benchmarks/batching_peers.py``) in a loop over aiokafka's clients, with
  the model in a process beside it; by tokens, which it is told beforehand.
- *offline optimum*: all texts at once, sorted by tokens, in the cheapest batches that the limits allow; one process
  calls the backend, and there is no Kafka. What batches cost was measured before.

Each has a process of its own and measures itself from its first record to its last commit. After each run the results
are read back: every record once, and its vector that of the text encoded alone. The backend writes down which texts
each batch had and when it ran. So the table can tell the padding in tokens, whatever a contestant goes by, and the
share of the time in which the model ran.

What is quoted is the ratio of records a second within a round, its median and quartiles: the machine may be shared and
noisy. Target: *bucketed* by tokens does at least 85 % of the *offline optimum*; ends with exit code 1 where it does
not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from benchmarks.encoder_contestants import DIARY, MAX_PADDED_TOKENS, VARIANTS, Reference, values
from benchmarks.kafka_run import (
    ContestantError,
    fill,
    kafka,
    output_topics,
    run_process,
    verify,
    verify_committed,
)
from benchmarks.peers.work import Task
from benchmarks.sentences import EXAMPLE, environment
from benchmarks.turns import Spread, ratio, spread
from benchmarks.workloads import Workload

TOPIC = "encoder"
TOLERANCE = 1e-4
"""Of each number of a vector. They are rounded to five digits, and what pads a text changes the last of them."""
LIMIT_S = 300.0
FIFO, BYTES, TOKENS, OPTIMUM = "fifo", "bucketed, bytes", "bucketed, tokens", "offline optimum"
SORTED = "sort 8N"
CONTESTANTS = (FIFO, SORTED, BYTES, TOKENS, OPTIMUM)
RATIOS = (
    (BYTES, FIFO),
    (TOKENS, FIFO),
    (BYTES, SORTED),
    (TOKENS, SORTED),
    (BYTES, OPTIMUM),
    (TOKENS, OPTIMUM),
)
TARGET = 0.85


@dataclass(frozen=True)
class Encoded(Workload):
    """Texts, and the vectors that have to come out."""

    vectors: tuple[Any, ...] = ()

    def check(self, value: bytes, *, is_wrapped: bool) -> int:
        """The number of a result whose vector is near enough to that of its text alone.

        Raises:
            AssertionError: it is not.
        """
        content = orjson.loads(value)
        return check(content["result"] if is_wrapped else content, self.vectors)


def check(result: Any, vectors: Any) -> int:
    """The number of a result. Raises AssertionError where its vector is another."""
    number = int(result["id"])
    off = float(np.abs(np.array(result["vector"]) - vectors[number]).max())
    assert off <= TOLERANCE, f"the vector of record {number} is off by {off}"
    return number


@dataclass(frozen=True, slots=True)
class Run:
    """One contestant's turn."""

    wall_s: float
    model_s: float
    """In which the model ran."""
    batches: int
    padded_tokens: int


class Bench:
    """The contestants on one topic.

    Args:
        bootstrap: Kafka.
        folder: Where the files of a run go.
        records: Texts in the topic.
        max_size: Most records in a batch.
    """

    def __init__(self, bootstrap: str, folder: Path, records: int, max_size: int) -> None:
        self._bootstrap, self._folder = bootstrap, folder
        self._records, self._max_size = records, max_size
        self._environ = environment()
        paths = [str(EXAMPLE), self._environ["PYTHONPATH"]]
        self._environ |= {
            "PYTHONPATH": ":".join(paths),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self._process("reference", "reference")
        self.reference = Reference.read(folder)
        self._vectors = np.array(self.reference.vectors)
        made = values(records)
        self._workload = Encoded(
            name="encoder",
            title="texts",
            work="encoder",
            value=made.__getitem__,
            number=int,
            result=int,
            is_json=True,
            sizes=(records,),
            vectors=tuple(self._vectors),
        )
        asyncio.run(fill(bootstrap, TOPIC, self._workload, records))

    def run(self, variant: str, output: str) -> Run:
        """One contestant's turn, its results verified.

        Raises:
            ContestantError: it failed.
        """
        diary = self._folder / DIARY
        diary.unlink(missing_ok=True)
        wall_s = self._offline(output) if variant == OPTIMUM else asyncio.run(self._through_kafka(variant, output))
        batches = [orjson.loads(line) for line in diary.read_bytes().splitlines()]
        tokens = self.reference.tokens
        if sorted(it for batch in batches for it in batch["ids"]) != list(range(self._records)):
            raise ContestantError(f"{variant} did not run each text once")
        return Run(
            wall_s,
            sum(it["ended_s"] - it["begun_s"] for it in batches),
            len(batches),
            sum(len(it["ids"]) * max(tokens[one] for one in it["ids"]) for it in batches),
        )

    def _offline(self, output: str) -> float:
        wall_s = self._process(OPTIMUM, output)
        results = orjson.loads((self._folder / "offline.json").read_bytes())
        if sorted(check(it, self._vectors) for it in results) != list(range(self._records)):
            raise ContestantError(f"{OPTIMUM} did not encode each text once")
        return wall_s

    async def _through_kafka(self, variant: str, output: str) -> float:
        async with output_topics(self._bootstrap, output):
            wall_s = await asyncio.to_thread(self._process, variant, output)
            is_wrapped = variant in (FIFO, BYTES, TOKENS)
            await verify(self._bootstrap, output, self._workload, self._records, is_wrapped=is_wrapped)
            group = f"{output}.main" if is_wrapped else output
            await verify_committed(self._bootstrap, group, TOPIC)
        return wall_s

    def _process(self, variant: str, output: str) -> float:
        task = Task(self._bootstrap, TOPIC, output, output, self._records, "encoder", self._max_size, variant)
        command = [sys.executable, "-m", "benchmarks.encoder_contestants", str(self._folder)]
        return run_process(command, task, limit_s=LIMIT_S, environ=self._environ).wall_s


def compare(bench: Bench, rounds: int) -> dict[str, list[Run]]:
    """All rounds; in every other one the last contestant begins."""
    runs: dict[str, list[Run]] = {name: [] for name in CONTESTANTS}
    for number in range(rounds):
        for name in CONTESTANTS[:: -1 if number % 2 else 1]:
            run = bench.run(name, f"encoder-{list(VARIANTS).index(name)}-{number}")
            runs[name].append(run)
            print(f"round {number + 1}, {name}: {run.wall_s:.2f} s", file=sys.stderr, flush=True)
    return runs


def summary(runs: Mapping[str, list[Run]], reference: Reference, max_size: int) -> dict[str, Any]:
    """The figures."""
    records, total = len(reference.tokens), sum(reference.tokens)
    return {
        "records": records,
        "tokens": total,
        "limits": {"size": max_size, "tokens": MAX_PADDED_TOKENS, "bytes": reference.max_padded_bytes},
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "cost_ms": reference.cost,
        "contestants": {
            name: {
                "records_s": spread([records / it.wall_s for it in its]).as_json(),
                "padding": statistics.median(it.padded_tokens / total for it in its),
                "batches": statistics.median(it.batches for it in its),
                "model_share": statistics.median(it.model_s / it.wall_s for it in its),
                "runs": [asdict(it) for it in its],
            }
            for name, its in runs.items()
        },
        "ratios": {
            f"{one} / {other}": ratio([it.wall_s for it in runs[other]], [it.wall_s for it in runs[one]]).as_json()
            for one, other in RATIOS
        },
    }


def table(figures: Mapping[str, Any]) -> list[str]:
    """The figures as a table of Markdown, and the ratios."""
    best = figures["contestants"][OPTIMUM]["records_s"]["median"]
    lines = [
        "| | records/s (quartiles) | of the optimum | padding | batches | model runs |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, it in figures["contestants"].items():
        rate = it["records_s"]
        share = figures["ratios"].get(f"{name} / {OPTIMUM}", {"median": rate["median"] / best})["median"]
        lines.append(
            f"| {name} | {rate['median']:.0f} ({rate['low']:.0f} to {rate['high']:.0f}) | {share:.0%} "
            f"| {it['padding']:.2f} | {it['batches']:.0f} | {it['model_share']:.0%} |"
        )
    return [*lines, "", *(f"{name}: {Spread(**it)}" for name, it in figures["ratios"].items())]


def main() -> None:
    """Measure, show, and check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=800)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-size", type=int, default=16)
    parser.add_argument("--bootstrap", help="a running Kafka; one is started from its jars without this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured there too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, kafka(options.bootstrap) as bootstrap:
        try:
            bench = Bench(bootstrap, Path(folder), options.records, options.max_size)
            runs = compare(bench, options.rounds)
        except ContestantError as error:
            raise SystemExit(f"a contestant {error}") from error
    figures = summary(runs, bench.reference, options.max_size)
    print(*table(figures), sep="\n")
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    reached = figures["ratios"][f"{TOKENS} / {OPTIMUM}"]["median"]
    if reached < TARGET:
        raise SystemExit(f"MISSED: {TOKENS} does {reached:.0%} of the optimum, not {TARGET:.0%}")


if __name__ == "__main__":
    main()
