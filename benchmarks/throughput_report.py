"""What `benchmarks.throughput` measured, as a table for a terminal, for a document, and as a plot.

    python -m benchmarks.throughput_report docs/performance/throughput.json [--document FILE]

shows a kept run again. Every figure is computed here from the runs: a median, its spread, a ratio of two medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

from rich.console import Console
from rich.table import Table

from benchmarks.kafka_run import Measured
from benchmarks.workloads import WORKLOADS

BEGIN, END = "<!-- throughput: written by benchmarks.throughput -->", "<!-- throughput: end -->"
BATCH = 512
"""Most records in a call of a model that takes time."""
HEADINGS = ("contestant", "× bare loop", "records/s", "least to most", "CPU µs, parent", "CPU µs, all")


@dataclass(frozen=True, slots=True)
class Contestant:
    """Who takes part, and how it is started."""

    name: str
    title: str
    module: str
    variant: str = ""
    peer: str | None = None
    """Its environment under build/peers; this project's own where there is none."""
    is_ours: bool = False
    is_default: bool = True
    largest_batch: int = BATCH
    """Most records in a batch where the work itself takes no time."""
    is_wrapped: bool = False
    """Whether its JSON results are in an envelope."""

    @property
    def group_suffix(self) -> str:
        """The groups of streamproc end with their task."""
        return ".main" if self.is_ours else ""


OURS = "benchmarks.contestants"
CONTESTANTS = (
    Contestant("bare", "bare aiokafka loop", OURS, "bare"),
    Contestant("confluent", "bare confluent-kafka loop", "benchmarks.peers.confluent", peer="confluent"),
    Contestant("streamproc-1", "streamproc, 1 worker", OURS, "1", is_ours=True, is_wrapped=True),
    # As for the peers, the fastest that was tried; the parent's CPU is quoted with one worker, at the common 512.
    Contestant("streamproc-2", "streamproc, 2 workers", OURS, "2", is_ours=True, largest_batch=2_048, is_wrapped=True),
    # What its peers write: the result and nothing around it.
    Contestant("streamproc-none", "streamproc, 2, no envelope", OURS, "2-none", is_ours=True, largest_batch=2_048),
    Contestant("quixstreams", "quixstreams", "benchmarks.peers.quix", peer="quix"),
    Contestant("faststream", "FastStream, aiokafka", "benchmarks.peers.faststream", "aiokafka", "faststream"),
    Contestant(
        "faststream-confluent",
        "FastStream, confluent",
        "benchmarks.peers.faststream",
        "confluent",
        "faststream",
        is_default=False,
    ),
    Contestant("arroyo", "arroyo, RunTask", "benchmarks.peers.arroyo", "one", "arroyo"),
    Contestant("arroyo-processes", "arroyo, multiprocessing", "benchmarks.peers.arroyo", "processes", "arroyo"),
    Contestant("faust", "Faust, take", "benchmarks.peers.faust", peer="faust"),
)


class Spread(NamedTuple):
    """A median, and the least and the most of what it is the median of."""

    median: float
    least: float
    most: float


def spread(numbers: Sequence[float]) -> Spread:
    """The median of some numbers, at least one, with their ends."""
    return Spread(statistics.median(numbers), min(numbers), max(numbers))


@dataclass
class Results:
    """The runs of every workload and contestant, in the order in which they came, and what failed."""

    conditions: Mapping[str, object]
    runs: dict[str, dict[str, list[Measured]]] = field(default_factory=dict)
    failures: dict[str, dict[str, list[str]]] = field(default_factory=dict)

    def add(self, workload: str, contestant: str, measured: Measured) -> None:
        """One more run."""
        self.runs.setdefault(workload, {}).setdefault(contestant, []).append(measured)

    def fail(self, workload: str, contestant: str, error: str) -> None:
        """One that failed."""
        self.failures.setdefault(workload, {}).setdefault(contestant, []).append(error)

    def of(self, workload: str, contestant: str) -> list[Measured]:
        """The runs of one contestant that came to their end."""
        return self.runs.get(workload, {}).get(contestant, [])

    def errors(self, workload: str, contestant: str) -> list[str]:
        """Why others did not."""
        return self.failures.get(workload, {}).get(contestant, [])

    def rate(self, workload: str, contestant: str) -> float | None:
        """Median of records a second; None where no run came to its end."""
        runs = self.of(workload, contestant)
        return spread([run.rate for run in runs]).median if runs else None

    def own_us(self, workload: str, contestant: str) -> float | None:
        """Median of the CPU a record of the first process."""
        runs = self.of(workload, contestant)
        return spread([run.own_us for run in runs]).median if runs else None

    def workloads(self) -> list[str]:
        """Those that were run, in their order."""
        return [name for name in WORKLOADS if name in self.runs or name in self.failures]

    def contestants(self, workload: str) -> list[Contestant]:
        """Those that took part in one, in their order."""
        took_part = self.runs.get(workload, {}).keys() | self.failures.get(workload, {}).keys()
        return [it for it in CONTESTANTS if it.name in took_part]

    def as_json(self) -> dict[str, Any]:
        """To be kept."""
        runs = {
            workload: {name: [asdict(run) for run in its] for name, its in by_name.items()}
            for workload, by_name in self.runs.items()
        }
        return {"conditions": self.conditions, "runs": runs, "failures": self.failures}

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> Results:
        """As it was kept."""
        runs = {
            workload: {name: [Measured(**run) for run in its] for name, its in by_name.items()}
            for workload, by_name in kept["runs"].items()
        }
        return cls(kept["conditions"], runs, kept["failures"])


class Row(NamedTuple):
    """A line of the table: its cells, or what went wrong beside them."""

    cells: Sequence[str]
    remark: str = ""


def rows(results: Results, workload: str) -> Iterator[Row]:
    """One line for each contestant of a workload."""
    bare = results.rate(workload, CONTESTANTS[0].name)
    for contestant in results.contestants(workload):
        runs, errors = results.of(workload, contestant.name), results.errors(workload, contestant.name)
        if not runs:
            yield Row([contestant.title, "failed", "", "", "", ""], errors[0])
            continue
        rate = spread([run.rate for run in runs])
        ratio = "" if bare is None else ratio_text(rate.median / bare)
        remark = f"{len(errors)} of {len(errors) + len(runs)} runs failed: {errors[0]}" if errors else ""
        cells = [contestant.title, ratio, _rate(rate.median), f"{_rate(rate.least)} to {_rate(rate.most)}"]
        cells += [
            _microseconds(spread(its).median) for its in ([it.own_us for it in runs], [it.tree_us for it in runs])
        ]
        yield Row(cells, remark)


def ratio_text(ratio: float) -> str:
    """A ratio with two figures at least."""
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}"


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"


def _microseconds(microseconds: float) -> str:
    return f"{microseconds:,.0f}" if microseconds >= 100 else f"{microseconds:.1f}"


class Target(NamedTuple):
    """What was to be reached, and what was seen; None where a contestant has no figure."""

    what: str
    limit: float
    is_least: bool
    seen: float | None

    @property
    def verdict(self) -> str:
        """In words."""
        if self.seen is None:
            return "not measured"
        return "met" if (self.seen >= self.limit if self.is_least else self.seen <= self.limit) else "missed"

    @property
    def wanted(self) -> str:
        """The limit with its direction."""
        return f"{'≥' if self.is_least else '≤'} {self.limit:g}"


def targets(results: Results) -> list[Target]:
    """The limits for the main workload: ratios of medians of one run; none where it was not run."""
    workload = next(iter(WORKLOADS))
    if workload not in results.workloads():
        return []
    goals = (
        ("bare aiokafka loop", 0.65, ("bare",)),
        ("arroyo, the faster way", 10, ("arroyo", "arroyo-processes")),
        ("FastStream", 10, ("faststream",)),
        ("Faust", 10, ("faust",)),
        ("quixstreams", 2.5, ("quixstreams",)),
    )

    def against(ours: str, theirs: Sequence[str]) -> float | None:
        own_rate = results.rate(workload, ours)
        rates = [rate for name in theirs if (rate := results.rate(workload, name)) is not None]
        return own_rate / max(rates) if own_rate is not None and rates else None

    own, bare = results.own_us(workload, "streamproc-1"), results.own_us(workload, "bare")
    return [
        *(
            Target(f"{what} ÷ {title}", least, True, against(ours, theirs))
            for ours, what in (
                ("streamproc-2", "records/s of streamproc, 2 workers"),
                ("streamproc-none", "records/s without the envelope, as the others write"),
            )
            for title, least, theirs in goals
        ),
        Target(
            "CPU of streamproc's parent, 1 worker ÷ bare aiokafka loop",
            1.3,
            False,
            own / bare if own is not None and bare is not None else None,
        ),
    ]


def _seen(target: Target) -> str:
    return "—" if target.seen is None else f"{target.seen:.2f}"


def show(results: Results) -> None:
    """The one table, at the end: with lines and colours on a terminal, as Markdown elsewhere."""
    console = Console()
    if not console.is_terminal:
        print(markdown(results))
        return
    table = Table(title=title(results), title_justify="left")
    table.add_column(HEADINGS[0])
    for heading in HEADINGS[1:]:
        table.add_column(heading, justify="right")
    for workload in results.workloads():
        table.add_row(f"[bold]{WORKLOADS[workload].title}[/bold]")
        for row in rows(results, workload):
            table.add_row(*row.cells, style="red" if row.remark else None)
            if row.remark:
                table.add_row(f"  [red]{row.remark}[/red]")
        table.add_section()
    if reached := targets(results):
        table.add_row("[bold]targets[/bold]", "seen", "wanted")
    for target in reached:
        colour = {"met": "green", "missed": "red"}.get(target.verdict, "yellow")
        table.add_row(target.what, _seen(target), target.wanted, f"[{colour}]{target.verdict}[/{colour}]")
    console.print(table)


def title(results: Results) -> str:
    """Under which conditions it was taken, in a sentence."""
    it = results.conditions
    return (
        f"Medians of at most {it['rounds']} rounds, taken {it['taken']} at {it['commit']} on {it['cores']} cores of "
        f"{it['cpu']}, Kafka {it['kafka']} beside them, Python {it['python']}, batches of {it['batch']}."
    )


def markdown(results: Results) -> str:
    """The one table for a document."""
    lines = [title(results), "", _line(HEADINGS), _line(["---"] + ["---:"] * (len(HEADINGS) - 1))]
    remarks: list[str] = []
    for workload in results.workloads():
        lines.append(_line([f"**{WORKLOADS[workload].title}**", *[""] * (len(HEADINGS) - 1)]))
        for row in rows(results, workload):
            lines.append(_line(row.cells))
            if row.remark:
                remarks.append(f"- {WORKLOADS[workload].title}, {row.cells[0]}: {row.remark}")
    if reached := targets(results):
        lines.append(_line(["**targets**", "**seen**", "**wanted**", "", "", ""]))
        lines += [_line([it.what, _seen(it), it.wanted, it.verdict, "", ""]) for it in reached]
    if remarks:
        lines += ["", "What failed:", "", *remarks]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def replace_table(document: str, table: str) -> str:
    """The document with this table between its two marks.

    Raises:
        ValueError: it has no such marks.
    """
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document has no place for the table: put {BEGIN} and {END} where it is to stand")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


BAR_HEIGHT, GAP, BLOCK_GAP = 18, 4, 34
LEFT, WIDTH, RIGHT, TOP = 190, 420, 170, 56
OURS_COLOUR, THEIRS_COLOUR, LIMIT_COLOUR = "#1f6feb", "#8c959f", "#d29922"


def plot(results: Results) -> str:
    """Bars: for each workload every contestant's rate as a ratio to the bare aiokafka loop, with its spread."""
    parts: list[str] = []
    y = float(TOP)
    for workload in results.workloads():
        bare = results.rate(workload, CONTESTANTS[0].name)
        if bare is None:
            continue
        contestants = results.contestants(workload)
        ratios = {
            it.name: spread([run.rate / bare for run in runs])
            for it in contestants
            if (runs := results.of(workload, it.name))
        }
        scale = WIDTH / max(it.most for it in ratios.values())
        parts.append(_text(16, y, WORKLOADS[workload].title, weight="bold"))
        y += 10
        for it in contestants:
            middle = y + BAR_HEIGHT / 2
            parts.append(_text(LEFT - 8, middle + 4, it.title, anchor="end"))
            if it.name not in ratios:
                parts.append(_text(LEFT + 6, middle + 4, "failed"))
            else:
                ratio = ratios[it.name]
                colour = OURS_COLOUR if it.is_ours else LIMIT_COLOUR if it is CONTESTANTS[0] else THEIRS_COLOUR
                width = ratio.median * scale
                parts.append(
                    f'<rect x="{LEFT}" y="{y:.1f}" width="{width:.1f}" height="{BAR_HEIGHT}" fill="{colour}"/>'
                )
                start, end = LEFT + ratio.least * scale, LEFT + ratio.most * scale
                parts.append(f'<path d="M{start:.1f} {middle:.1f}H{end:.1f}" stroke="#1f2328"/>')
                label = f"{ratio_text(ratio.median)} × · {_rate(ratio.median * bare)}/s"
                parts.append(_text(max(LEFT + width, end) + 6, middle + 4, label))
            y += BAR_HEIGHT + GAP
        y += BLOCK_GAP
    heading = "Records a second, as a ratio to the bare aiokafka loop; longer is better"
    height = y - BLOCK_GAP + 16
    place = f'viewBox="0 0 {LEFT + WIDTH + RIGHT} {height:.0f}"'
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {place} font-family="sans-serif" role="img">',
        f"<title>{escape(heading)}</title>",
        f'<rect width="{LEFT + WIDTH + RIGHT}" height="{height:.0f}" fill="#ffffff"/>',
        _text(16, 26, heading, size=14),
    ]
    return "\n".join([*head, *parts, "</svg>"]) + "\n"


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12, weight: str = "normal") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}"'
    return f'<text {place} fill="#1f2328">{escape(text)}</text>'


def main() -> None:
    """Show a kept run again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kept", type=Path)
    parser.add_argument("--document", type=Path, help="Markdown file whose table is replaced by this run's")
    arguments = parser.parse_args()
    results = Results.from_json(json.loads(arguments.kept.read_text(encoding="utf-8")))
    if arguments.document:
        text = arguments.document.read_text(encoding="utf-8")
        arguments.document.write_text(replace_table(text, markdown(results)), encoding="utf-8")
    show(results)


if __name__ == "__main__":
    main()
