"""How late a window closes that only its time closes, with an idle worker: in the real processor's event loop.

    python -m benchmarks.lateness [--windows N] [--max-wait-ms 1 2.5 5] [--json FILE]

The processor of ``streamproc run``, on uvloop, with a worker process and the in-memory broker. A record is written, and
nothing else until its result is there, so that each window is closed by the wait of its one record while the worker is
idle. Its lateness is the time at which its batch has been written to the worker's socket, less the time at which it was
due: arrival and ``max_wait_ms``. Negative is early. Every record has to have one result, and every batch to be closed
by ``wait``.

Two ways to wake at a deadline, in turns:

- *alarm*: what the processor does (``runtime.alarm``): a timer of the kernel's.
- *loop*: what it does where there are none: the event loop's, which count whole milliseconds.

Ends with exit code 1 where the processor's own way is later than a millisecond at the 99th percentile.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import uvloop

from benchmarks.in_memory import check_results, running, settings_for
from benchmarks.quantiles import quantile
from streamproc.broker.memory import MemoryBroker
from streamproc.records import Batch
from streamproc.runtime.processor import Processor

TARGET_MS = 1.0
WAYS = ("alarm", "loop")
TURNS = 4
WARMUP = 50


@contextlib.contextmanager
def waking(way: str) -> Iterator[None]:
    """What begins within the block wakes in this way."""
    if way == "alarm":
        yield
        return
    with mock.patch("streamproc.runtime.alarm.sys", SimpleNamespace(platform="one without timerfd")):
        yield


class Windows:
    """Notes when each batch went to the worker."""

    def __init__(self, processor: Processor, max_wait_s: float) -> None:
        self.late_ms: list[float] = []
        self.rules: set[str] = set()
        submit = processor.pool.submit

        def submitted(batch: Batch) -> None:
            submit(batch)
            self.late_ms.append((processor.clock() - batch.opened_at - max_wait_s) * 1_000)
            self.rules.add(batch.closed_by)

        processor.pool.submit = submitted  # type: ignore[method-assign]  # to look on


async def one_by_one(processor: Processor, broker: MemoryBroker, first: int, count: int) -> None:
    """Write records, each once the result of the one before is written."""
    done = processor.tasks["main"].counts
    for number in range(first, first + count):
        broker.append("main", b'{"id":%d}' % number)
        while done.results <= number:
            await broker.next_change()


async def of_wait(max_wait_ms: float, windows: int) -> tuple[list[float], float]:
    """The lateness of windows with this wait, in milliseconds, and the processor's CPU time in seconds."""
    settings = settings_for("tests.support.backends:Identity", {"main": {"batch": {"max_wait_ms": max_wait_ms}}})
    async with running(settings) as (processor, broker):
        seen = Windows(processor, max_wait_ms / 1_000)
        await one_by_one(processor, broker, 0, WARMUP)
        seen.late_ms.clear()
        begun = time.thread_time()
        await one_by_one(processor, broker, WARMUP, windows)
        cpu_s = time.thread_time() - begun
    assert len(seen.late_ms) == windows, "a window had more than its record"
    assert seen.rules == {"wait"}, seen.rules
    check_results(broker, "main", WARMUP + windows)
    return seen.late_ms, cpu_s


def summary(late_ms: Sequence[float], cpu_s: float) -> dict[str, float]:
    """Of some windows."""
    ordered = sorted(late_ms)
    quantiles = {f"p{share:g}_ms": quantile(ordered, share / 100) for share in (50, 90, 99, 99.9)}
    ends = {"windows": len(ordered), "earliest_ms": ordered[0], **quantiles, "latest_ms": ordered[-1]}
    return {name: round(it, 3) for name, it in {**ends, "cpu_us_a_window": cpu_s / len(ordered) * 1e6}.items()}


def measure(waits_ms: Sequence[float], windows: int) -> dict[str, Any]:
    """All figures: by way, each wait and all together."""
    late: dict[str, dict[float, list[float]]] = {way: {wait: [] for wait in waits_ms} for way in WAYS}
    cpu_s = {way: dict.fromkeys(waits_ms, 0.0) for way in WAYS}
    for turn, wait, way in itertools.product(range(TURNS), waits_ms, WAYS):
        share = windows // len(waits_ms)
        with waking(way):
            found_ms, found_s = uvloop.run(of_wait(wait, share // TURNS + (turn < share % TURNS)))
        late[way][wait] += found_ms
        cpu_s[way][wait] += found_s
    return {
        way: {
            **{f"{wait:g}": summary(late[way][wait], cpu_s[way][wait]) for wait in waits_ms},
            "all": summary(list(itertools.chain(*late[way].values())), sum(cpu_s[way].values())),
        }
        for way in WAYS
    }


def show(figures: dict[str, Any]) -> None:
    """A table for people."""
    for way, rows in figures.items():
        print(f"\n{way}\n{'max_wait_ms':>12}" + "".join(f"{name:>16}" for name in rows["all"]))
        for wait, row in rows.items():
            print(f"{wait:>12}" + "".join(f"{value:>16,.10g}" for value in row.values()))


def main() -> None:
    """Measure, show, and check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=10_000, help="windows of each way")
    parser.add_argument("--max-wait-ms", type=float, nargs="+", default=[1.0, 2.5, 5.0], metavar="MS")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    options = parser.parse_args()
    figures = measure(options.max_wait_ms, options.windows)
    show(figures)
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    late_ms = figures["alarm"]["all"]["p99_ms"]
    if late_ms > TARGET_MS:
        print(f"\nmissed: {late_ms} ms late at the 99th percentile, not at most {TARGET_MS}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
