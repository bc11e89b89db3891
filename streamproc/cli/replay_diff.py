"""``streamproc replay diff``: what a model, or a setting, changes; exit code 1 beyond a limit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from streamproc.cli.kafka_options import BootstrapOption, connected, find_settings, run_async
from streamproc.cli.positions import Where, offsets_of, partitions_of
from streamproc.cli.terminal import (
    ConfigOption,
    JsonOption,
    Progress,
    UsageError,
    count_of,
    print_json,
    print_table,
    say,
    stdout,
)
from streamproc.errors import StreamprocError

if TYPE_CHECKING:
    from streamproc.records import TopicRecord
    from streamproc.replay.diff import Comparison, Limit
    from streamproc.replay.values import Rules
    from streamproc.settings import KafkaSettings

T = TypeVar("T")

app = typer.Typer()

BEGINNING = Where()
BEYOND = 1
_SUFFIXES = (".jsonl", ".json", ".ndjson", ".gz", ".parquet")
_CHUNK = 500
_POLL_MS = 200
_MAX_ROWS = 20
_MAX_VALUE_CHARS = 60
DEFAULT_ABS, DEFAULT_REL = 1e-9, 1e-6


class NothingToCompareError(StreamprocError):
    """A side has no results: what is equal to nothing would pass every limit."""


AbsTolOption = Annotated[
    float, typer.Option("--abs-tol", metavar="N", min=0, help="Floats that differ by at most so much are close.")
]
RelTolOption = Annotated[
    float, typer.Option("--rel-tol", metavar="N", min=0, help="The same, as a share of the larger of the two.")
]
ToleranceOption = Annotated[
    list[str] | None,
    typer.Option("--tolerance", metavar="FIELD=N|N%", help="The tolerance of a field (score, a.b[*].c); repeatable."),
]
IgnoreOption = Annotated[
    list[str] | None, typer.Option("--ignore", metavar="FIELD", help="Pass over a field; repeatable.")
]
LimitOption = Annotated[
    str,
    typer.Option("--max-changed", metavar="N|N%", help="How many records may differ, or which share; beyond: exit 1."),
]
ExamplesOption = Annotated[
    int, typer.Option("--examples", metavar="N", min=0, help="How many records of each verdict to show in full.")
]
HtmlOption = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Also write a report, one HTML page.")]


@dataclass(frozen=True, slots=True)
class ComparisonOptions:
    """How to compare, and how to tell."""

    rules: Rules
    limit: Limit
    examples: int
    html: Path | None
    as_json: bool
    notes: Sequence[str]


@dataclass(frozen=True, slots=True)
class Input:
    """Where a side's results are: a capture file, or a topic, of one run or (``run`` is None) of all."""

    text: str
    path: Path | None = None
    topic: str = ""
    run: str | None = None

    @classmethod
    def parse(cls, text: str) -> Input:
        """A file where there is one of that name, or it looks like one's; else ``TOPIC`` or ``TOPIC@RUN``."""
        path = Path(text)
        if path.is_file() or "/" in text or text.endswith(_SUFFIXES):
            return cls(text, path)
        topic, at, run = text.partition("@")
        return cls(text, None, topic, run if at else None)


@app.command(
    epilog="Example: streamproc replay diff golden.jsonl digits.results@my-run --html report.html\n\n"
    "Example: streamproc replay diff a.jsonl b.jsonl --tolerance score=0.01 --ignore seen_at --max-changed 0.5%"
)
def diff(
    baseline: Annotated[str, typer.Argument(metavar="BASELINE", help="A capture file, TOPIC or TOPIC@RUN.")],
    candidate: Annotated[str, typer.Argument(metavar="CANDIDATE", help="The same, of what is to be judged.")],
    *,
    baseline_dead: Annotated[
        list[str] | None,
        typer.Option(
            "--baseline-dead", metavar="INPUT", help="Dead letters of the baseline: a file, TOPIC, TOPIC@RUN."
        ),
    ] = None,
    candidate_dead: Annotated[
        list[str] | None, typer.Option("--candidate-dead", metavar="INPUT", help="Those of the candidate.")
    ] = None,
    abs_tol: AbsTolOption = DEFAULT_ABS,
    rel_tol: RelTolOption = DEFAULT_REL,
    tolerance: ToleranceOption = None,
    ignore: IgnoreOption = None,
    ignore_task: Annotated[
        bool, typer.Option("--ignore-task", help="Match results of tasks with different names too.")
    ] = False,
    max_changed: LimitOption = "0",
    examples: ExamplesOption = 3,
    html: HtmlOption = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    bootstrap_servers: BootstrapOption = None,
) -> None:
    """Compare two sets of results, record by record, matched by the source record that they are of.

    A side is a capture file of a results topic, or the topic itself: all of it, or with @RUN what a replay brought.
    Exit code 1 where more records differ than --max-changed allows. Metrics are shown, and are no differences.
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
    compare(
        [baseline, *(baseline_dead or ())],
        [candidate, *(candidate_dead or ())],
        options,
        lambda: find_settings(config, bootstrap_servers)[1],
        ignore_task=ignore_task,
    )


def compare(
    baseline: Sequence[str],
    candidate: Sequence[str],
    options: ComparisonOptions,
    kafka: Callable[[], KafkaSettings],
    *,
    ignore_task: bool = False,
    begin: Where = BEGINNING,
) -> None:
    """Read both sides, compare, and tell.

    Args:
        baseline: Its inputs as text: the results first, then dead letters.
        candidate: The same.
        options: How to compare, and how to tell.
        kafka: Where the topics are, if there are any.
        ignore_task: Match results of tasks with different names too.
        begin: Where to begin in topics.

    Raises:
        NothingToCompareError: a side has no results.
        typer.Exit: more differs than may.
    """
    from streamproc.replay.diff import Comparison  # noqa: PLC0415 - --help needs none of it

    inputs = ([Input.parse(it) for it in baseline], [Input.parse(it) for it in candidate])
    names = (baseline[0], candidate[0])
    with Comparison(options.rules, names=names, examples=options.examples, ignore_task=ignore_task) as comparison:
        progress = Progress("read")
        _read_all(comparison, inputs, kafka, progress, begin)
        progress.finish()
        comparison.finish()
        tell(comparison, options)


def comparison_options(
    *,
    abs_tol: float,
    rel_tol: float,
    tolerance: Sequence[str] | None,
    ignore: Sequence[str] | None,
    max_changed: str,
    examples: int,
    html: Path | None,
    as_json: bool,
) -> ComparisonOptions:
    """What the options say. Raises UsageError."""
    from streamproc.replay.diff import Limit  # noqa: PLC0415 - --help needs none of it
    from streamproc.replay.values import Pattern, Rules, Tolerance  # noqa: PLC0415 - as above

    fields: dict[Pattern, Tolerance] = {}
    for text in tolerance or ():
        field, equals, number = text.rpartition("=")
        if not equals:
            raise UsageError(f"--tolerance {text} names no tolerance: write FIELD=0.01, or FIELD=1%")
        fields[_parsed("--tolerance", Pattern.parse, field)] = _parsed("--tolerance", Tolerance.parse, number)
    ignored = [_parsed("--ignore", Pattern.parse, text) for text in ignore or ()]
    limit = _parsed("--max-changed", Limit.parse, max_changed)
    if html is not None and not html.parent.is_dir():
        raise UsageError(f"--html {html}: there is no folder {html.parent}")
    own = "; ".join(tolerance or ())
    notes = [f"Floats are close within {abs_tol:g}, or {rel_tol:g} of the larger{f'; by field: {own}' if own else ''}."]
    if ignore:
        notes.append(f"Ignored: {', '.join(ignore)}.")
    return ComparisonOptions(Rules(Tolerance(abs_tol, rel_tol), fields, ignored), limit, examples, html, as_json, notes)


def _parsed(option: str, parse: Callable[[str], T], text: str) -> T:
    try:
        return parse(text)
    except ValueError as error:
        raise UsageError(f"{option}: {error}") from None


# -- reading the two sides


def _read_all(
    comparison: Comparison,
    inputs: Sequence[Sequence[Input]],
    kafka: Callable[[], KafkaSettings],
    progress: Progress,
    begin: Where,
) -> None:
    """Give both sides' records to the comparison, the baseline's first."""
    for side, some in enumerate(inputs):
        for it in some:
            if it.path is not None:
                for chunk in file_chunks(it.path):
                    comparison.add_all(side, chunk)
                    progress.add(len(chunk))
        if topics := [it for it in some if it.path is None]:
            settings = kafka()
            run_async(lambda: _read_topics(comparison, side, topics, settings, progress, begin=begin))  # noqa: B023 - run at once


def file_chunks(path: Path) -> Iterator[list[TopicRecord]]:
    """The records of a capture file, some at a time. Raises CaptureFileError."""
    from streamproc.replay.capture_file import read_capture  # noqa: PLC0415 - --help needs none of it

    records: Iterator[TopicRecord] = read_capture(path)
    while chunk := list(islice(records, _CHUNK)):
        yield chunk


async def _read_topics(
    comparison: Comparison,
    side: int,
    inputs: Sequence[Input],
    kafka: KafkaSettings,
    progress: Progress,
    *,
    begin: Where,
) -> None:
    """Read topics from there on, to where their ends are now."""
    from streamproc.broker.admin import KafkaAdmin  # noqa: PLC0415 - as above
    from streamproc.broker.reader import KafkaReader  # noqa: PLC0415 - as above
    from streamproc.replay.capture import in_order  # noqa: PLC0415 - as above
    from streamproc.replay.marks import run_of  # noqa: PLC0415 - as above

    wanted: dict[str, set[str | None]] = {}
    for it in inputs:
        wanted.setdefault(it.topic, set()).add(it.run)
    async with connected(KafkaAdmin(kafka), kafka) as admin:
        partitions = await partitions_of(admin, list(wanted))
        ends = await admin.end_offsets(partitions)
        begins = await offsets_of(begin, admin, partitions, ends)
    seen: set[str] = set()
    found = 0
    async with KafkaReader(kafka, client_id="streamproc-replay-diff") as reader:
        async for records in in_order(reader, begins, ends):
            for record in records:
                run = run_of(record.headers)
                if wanted[record.topic] & {None, run or ""}:
                    comparison.add(side, record)
                    found += 1
                elif run is not None and len(seen) < _MAX_ROWS:
                    seen.add(run)
            progress.add(len(records))
    if not found and seen:
        texts = ", ".join(it.text for it in inputs)
        raise NothingToCompareError(f"{texts} has no record of that run; there are {', '.join(sorted(seen))}")


# -- telling


def tell(comparison: Comparison, options: ComparisonOptions) -> None:
    """Show what was found, write the report, and end with exit code 1 where too much differs.

    Raises:
        NothingToCompareError: a side has no results.
        typer.Exit: more differs than may.
    """
    for side in comparison.sides:
        if not side.results + side.dead_letters:
            strangers = f": none of its {count_of(side.without_source, 'record')} says what it is the result of"
            raise NothingToCompareError(f"{side.name} holds no results{strangers if side.without_source else ''}")
    if options.html is not None:
        _write_report(comparison, options, options.html)
    if options.as_json:
        print_json(comparison.as_json(options.limit))
    else:
        _show(comparison, options)
    if not options.limit.allows(comparison.differing, comparison.records):
        raise typer.Exit(BEYOND)


def _write_report(comparison: Comparison, options: ComparisonOptions, path: Path) -> None:
    from streamproc.replay.report import html_report  # noqa: PLC0415 - only for this

    page = html_report(comparison, options.limit, now=datetime.now(UTC), notes=options.notes)
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise StreamprocError(f"{path}: cannot be written ({error.strerror})") from error
    say(f"report in {path}")


def _show(comparison: Comparison, options: ComparisonOptions) -> None:
    from streamproc.replay.diff import DIFFERENCES, Verdict  # noqa: PLC0415 - as above
    from streamproc.replay.report import MEANINGS, sentence  # noqa: PLC0415 - as above

    before, after = comparison.sides
    _line(f"{before.name} against {after.name}")
    rows = [
        (it.value, f"{comparison.verdicts[it]:,}", MEANINGS[it])
        for it in Verdict
        if comparison.verdicts[it] or it not in DIFFERENCES
    ]
    print_table(("verdict", "records", ""), rows, right=("records",), spare=("",))
    for side in comparison.sides:
        for count, what in (
            (side.repeated, "came twice"),
            (side.without_source, "do not say of which record they are"),
        ):
            if count:
                _line(f"{side.name}: {count:,} results {what}; they are not compared")
    _show_fields(comparison)
    _show_examples(comparison)
    _show_metrics(comparison)
    _line("")
    _line(sentence(comparison, options.limit))


def _show_fields(comparison: Comparison) -> None:
    fields = comparison.worst_fields()
    if not fields:
        return
    rows = []
    for it in fields[:_MAX_ROWS]:
        most = it.transitions.most_common(1)
        often = f"{most[0][0][0]} → {most[0][0][1]} ({most[0][1]:,})" if most else ""
        rows.append((it.path, f"{it.changed:,}", f"{it.close:,}", _number(it.mean_size), _number(it.max_size), often))
    _line("")
    columns = ("field", "changed", "close", "mean |diff|", "max |diff|", "most often")
    print_table(columns, rows, right=columns[1:5], spare=columns[:2:-1])
    if len(fields) > _MAX_ROWS:
        _line(f"and {count_of(len(fields) - _MAX_ROWS, 'further field')}; --json has all")


def _show_examples(comparison: Comparison) -> None:
    from streamproc.replay.diff import text_of  # noqa: PLC0415 - as above

    for it in comparison.examples:
        key = "" if it.key is None else f", key {text_of(it.key.decode(errors='replace'), _MAX_VALUE_CHARS)}"
        _line("")
        _line(f"{it.verdict.value}: {it.place}{key}")
        for change in it.changes[:_MAX_ROWS]:
            before, after = (text_of(value, _MAX_VALUE_CHARS) for value in (change.baseline, change.candidate))
            _line(f"  {change.worst}: {before} → {after}")
        if not it.changes:
            for name, held in (("baseline", it.baseline), ("candidate", it.candidate)):
                if held is not None:
                    dead = "dead letter " if held.is_dead else ""
                    _line(f"  {name}: {dead}{text_of(held.value, _MAX_VALUE_CHARS * 2)}")


def _show_metrics(comparison: Comparison) -> None:
    from streamproc.replay.diff import QUANTILES, metrics_of  # noqa: PLC0415 - as above

    rows: dict[str, dict[str, str]] = {}
    for it in metrics_of(comparison.sides):
        if it.baseline is not None or it.candidate is not None:
            ratio = "" if it.ratio is None else f" ×{it.ratio:.2f}"
            cell = f"{_number(it.baseline)} → {_number(it.candidate)}{ratio}"
            rows.setdefault(f"{it.name}, {it.unit}", {})[it.quantile or next(iter(QUANTILES))] = cell
    if rows:
        _line("")
        listed = [[name, *(cells.get(it, "") for it in QUANTILES)] for name, cells in rows.items()]
        print_table(("metric", *QUANTILES), listed, right=QUANTILES, whole=("metric",), spare=("p95",))


def _line(text: str) -> None:
    stdout.print(text, markup=False, highlight=False, soft_wrap=True)


def _number(number: float | None) -> str:
    from streamproc.replay.charts import number_text  # noqa: PLC0415 - as above

    return "-" if number is None else number_text(number)
