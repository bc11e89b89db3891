"""``streamproc replay shadow``: two processors on the live stream at once, beside the running application."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from streamproc.cli.kafka_options import BootstrapOption, connected, run_async, with_address
from streamproc.cli.positions import WHERE_HELP, Where, duration_s, offsets_of, parse_where, partitions_of
from streamproc.cli.replay_diff import (
    DEFAULT_ABS,
    DEFAULT_REL,
    AbsTolOption,
    ExamplesOption,
    HtmlOption,
    IgnoreOption,
    LimitOption,
    NothingToCompareError,
    RelTolOption,
    ToleranceOption,
    comparison_options,
    file_chunks,
    tell,
)
from streamproc.cli.terminal import ConfigOption, JsonOption, UsageError, count_of, say, stderr

if TYPE_CHECKING:
    from streamproc.broker.reader import KafkaReader
    from streamproc.records import TopicRecord
    from streamproc.replay.diff import Comparison
    from streamproc.replay.shadow import Shadow
    from streamproc.settings import Settings

app = typer.Typer()

_POLL_MS = 200
_POLL_RECORDS = 2_000
_LIVE_S, _LINES_S = 0.2, 5.0


@dataclass(frozen=True, slots=True)
class _Run:
    """What is to be run: both sides, what they read, and when it ends."""

    baseline: Settings
    candidate: Settings
    capture: Path | None
    begin: Where
    count: int | None
    seconds: float | None


@app.command(
    epilog="Example: streamproc replay shadow --candidate new.yaml --for 5m --html report.html\n\n"
    "Example: streamproc replay shadow --backend inference_v2:Backend --capture yesterday.jsonl.gz"
)
def shadow(
    *,
    config: ConfigOption = None,
    candidate: Annotated[
        Path | None, typer.Option("--candidate", metavar="FILE", help="The settings of the other processor.")
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option("--backend", metavar="PATH", help="Its backend, in place of the settings': inference_v2:Backend."),
    ] = None,
    capture: Annotated[
        Path | None, typer.Option("--capture", metavar="FILE", help="Read a capture, in place of the live topics.")
    ] = None,
    begin: Annotated[
        str, typer.Option("--from", metavar="WHERE", help=f"Where to begin in the live topics: {WHERE_HELP}.")
    ] = "end",
    count: Annotated[int | None, typer.Option("--count", "-n", metavar="N", min=1, help="End after N records.")] = None,
    duration: Annotated[
        str | None, typer.Option("--for", metavar="TIME", help="End after so long: 30s, 5m, 2h.")
    ] = None,
    abs_tol: AbsTolOption = DEFAULT_ABS,
    rel_tol: RelTolOption = DEFAULT_REL,
    tolerance: ToleranceOption = None,
    ignore: IgnoreOption = None,
    max_changed: LimitOption = "0",
    examples: ExamplesOption = 3,
    html: HtmlOption = None,
    as_json: JsonOption = False,
    bootstrap_servers: BootstrapOption = None,
) -> None:
    """Run two processors on the live input topics at once, and compare what they make of each record.

    The topics are only read: no consumer group, no offset and no topic of the running application is touched, and
    nothing is written to Kafka. Ends by --count, --for, the end of a capture or Ctrl-C, and then tells what `replay
    diff` tells, with the same exit code.
    """
    options = comparison_options(
        abs_tol=abs_tol,
        rel_tol=rel_tol,
        tolerance=tolerance,
        ignore=ignore,
        max_changed=max_changed,
        examples=examples,
        html=html,
        as_json=as_json,
    )
    where = parse_where(begin, time.time(), "--from")
    seconds = None if duration is None else duration_s(duration, "--for")
    if candidate is None and backend is None:
        raise UsageError("there is nothing to compare with: name other settings with --candidate, or a --backend")
    if capture is not None and begin != "end":
        raise UsageError("--from is for the live topics; a --capture is read from its beginning")
    from streamproc.replay.diff import Comparison  # noqa: PLC0415 - --help needs none of it
    from streamproc.settings_loading import DEFAULT_PATH, load_settings  # noqa: PLC0415 - as above

    before = load_settings(config, os.environ)
    before = before.model_copy(update={"kafka": with_address(before.kafka, bootstrap_servers)})
    after = before if candidate is None else load_settings(candidate, os.environ)
    if backend is not None:
        after = after.model_copy(update={"backend": after.backend.model_copy(update={"path": backend})})
    names = (str(config or DEFAULT_PATH), str(backend or candidate))
    run = _Run(before, after, capture, where, count, seconds)
    with Comparison(options.rules, names=names, examples=examples) as comparison:
        run_async(lambda: _shadow(run, comparison))
        tell(comparison, options)


async def _shadow(run: _Run, comparison: Comparison) -> None:
    """Run both sides until it ends by itself, or by the first signal; the second exits at once."""
    from streamproc.replay.shadow import Shadow  # noqa: PLC0415 - imports the whole data path

    shadow = Shadow(run.baseline, run.candidate, comparison)
    asked = asyncio.Event()

    def on_signal(number: signal.Signals) -> None:
        if asked.is_set():
            shadow.kill()
            stderr.show_cursor()
            os._exit(128 + number)
        say("ending; once more to exit at once")
        asked.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal, number)
    begun = time.monotonic()
    async with AsyncExitStack() as stack:
        chunks = await _chunks(stack, run, shadow.topics)
        if not await _unless(asked, stack.enter_async_context(shadow)):
            raise NothingToCompareError("ended before both processors were ready")
        ready = time.monotonic()
        say(f"both ready after {ready - begun:.1f} s; {_what(run, shadow.topics)}")
        progress = loop.create_task(_progress(shadow, comparison, ready))
        try:
            await _unless(asked, shadow.feed(chunks, run.count), run.seconds)
            whole = await shadow.drain(run.baseline.shutdown_timeout_s)
        finally:
            progress.cancel()
            await asyncio.gather(progress, return_exceptions=True)
        _say_progress(shadow, comparison, ready, end="\n")
        if shadow.skipped:
            say(f"{count_of(shadow.skipped, 'record')} of topics that no task reads, or twice in the file, left out")
        if not whole:
            say(
                f"{count_of(shadow.in_flight, 'record')} not finished by both within shutdown_timeout_s "
                f"({run.baseline.shutdown_timeout_s:g} s), left out"
            )
    if not comparison.records:
        raise NothingToCompareError("no record was compared, since none came; --from 15m begins further back")


async def _unless(asked: asyncio.Event, work: Coroutine[Any, Any, object], timeout_s: float | None = None) -> bool:
    """Do the work, unless it is asked to end, or so much time passes; whether it came to its end."""
    working, waiting = asyncio.ensure_future(work), asyncio.ensure_future(asked.wait())
    try:
        await asyncio.wait({working, waiting}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
            return True
        return False
    finally:
        for it in (working, waiting):
            it.cancel()
        await asyncio.gather(working, waiting, return_exceptions=True)


async def _chunks(stack: AsyncExitStack, run: _Run, topics: Sequence[str]) -> AsyncIterator[Sequence[TopicRecord]]:
    """What both sides read; of the live topics, from where they are now."""
    if run.capture is not None:
        return await stack.enter_async_context(aclosing(_captured(run.capture)))
    from streamproc.broker.admin import KafkaAdmin  # noqa: PLC0415 - --help needs no Kafka client
    from streamproc.broker.reader import KafkaReader  # noqa: PLC0415 - as above

    kafka = run.baseline.kafka
    async with connected(KafkaAdmin(kafka), kafka) as admin:
        partitions = await partitions_of(admin, topics)
        offsets = await offsets_of(run.begin, admin, partitions, await admin.end_offsets(partitions))
    reader = await stack.enter_async_context(KafkaReader(kafka, client_id="streamproc-replay-shadow"))
    reader.assign(offsets)

    return await stack.enter_async_context(aclosing(_live(reader)))


async def _live(reader: KafkaReader) -> AsyncGenerator[Sequence[TopicRecord], None]:
    while True:
        found = await reader.getmany(timeout_ms=_POLL_MS, max_records=_POLL_RECORDS)
        for records in found.values():
            yield records


async def _captured(path: Path) -> AsyncGenerator[Sequence[TopicRecord], None]:
    for chunk in file_chunks(path):
        yield chunk


def _what(run: _Run, topics: Sequence[str]) -> str:
    if run.capture is not None:
        return f"reading {run.capture}"
    limited = run.count is not None or run.seconds is not None
    return f"reading {', '.join(topics)}{'' if limited else '; Ctrl-C ends it and tells what was found'}"


async def _progress(shadow: Shadow, comparison: Comparison, begun: float) -> None:
    while True:
        await asyncio.sleep(_LIVE_S if stderr.is_terminal else _LINES_S)
        _say_progress(shadow, comparison, begun, end="\r" if stderr.is_terminal else "\n")


def _say_progress(shadow: Shadow, comparison: Comparison, begun: float, *, end: str) -> None:
    rate = comparison.records / max(time.monotonic() - begun, 1e-3)
    stderr.print(
        f"compared {count_of(comparison.records, 'record')} ({rate:,.0f}/s): {comparison.differing:,} differ, "
        f"{shadow.in_flight:,} in flight   ",
        end=end,
        highlight=False,
        soft_wrap=True,
    )
