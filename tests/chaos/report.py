"""What a chaos run has to say: as tables for people, as JSON for scripts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.chaos.oracle import Findings


@dataclass(slots=True)
class FaultReport:
    """One fault as it happened; seconds since the load began. The counts are by task."""

    fault: str
    kind: str
    planned_s: float
    rebalances: dict[str, int]
    duplicates: dict[str, int]
    in_flight: dict[str, int]
    """Read and not committed on all replicas before each of its rebalances, added up: the duplicates' bound."""
    began_s: float | None = None
    ended_s: float | None = None


@dataclass(slots=True)
class TaskReport:
    """One task's topics, counted and compared."""

    delivery: str
    records: int
    results: int
    dead_letters: int
    lost: int
    duplicates: int
    duplicates_uncommitted: int | None
    """Under ``read_uncommitted``, for information: what aborted transactions had written."""
    out_of_order: int
    rebalances: int
    longest_stall_s: float
    longest_partition_stall_s: float


@dataclass(slots=True)
class Report:
    """The whole run."""

    command: str
    seed: int
    minutes: float
    rate: float
    versions: dict[str, str]
    seconds: float = 0.0
    records_per_s: float = 0.0
    catch_up_s: float = 0.0
    tasks: dict[str, TaskReport] = field(default_factory=dict)
    faults: list[FaultReport] = field(default_factory=list)
    starts: dict[str, int] = field(default_factory=dict)
    """Processes started, by replica."""
    worker_restarts: int = 0
    load_errors: int = 0
    findings: Findings = field(default_factory=Findings)
    logs: str | None = None

    @property
    def ok(self) -> bool:
        """Whether every promise was kept."""
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        """Everything, for scripts."""
        return {**asdict(self), "ok": self.ok}


def show_report(report: Report, console: Console) -> None:
    """Print it."""
    faults = Table("fault", "began", "ended", "late", "rebalances", "duplicates", "in flight", title="Faults")
    for it in report.faults:
        late = None if it.began_s is None else it.began_s - it.planned_s
        faults.add_row(
            it.fault,
            *(_seconds(it.began_s), _seconds(it.ended_s), _seconds(late)),
            *(_by_task(counts) for counts in (it.rebalances, it.duplicates, it.in_flight)),
        )
    console.print(faults)
    tasks = Table("", *report.tasks, title=f"Seed {report.seed}, {report.seconds:.0f} s of load")
    for what, values in _task_rows(list(report.tasks.values())):
        tasks.add_row(what, *values)
    console.print(tasks)
    kinds = ", ".join(f"{kind} {count}" for kind, count in Counter(it.kind for it in report.faults).items())
    for line in (
        f"command: {report.command}",
        f"versions: {', '.join(f'{name} {version}' for name, version in report.versions.items())}",
        f"load: {report.records_per_s:.0f} records/s over all tasks; caught up {report.catch_up_s:.1f} s after its end",
        f"faults: {len(report.faults)} ({kinds})",
        f"processes started: {_counts(report.starts)}; workers replaced: {report.worker_restarts}",
    ):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for what, finding in report.findings.items():
        console.print(f"[red]{what}: {finding.count}[/red]", highlight=False)
        for example in finding.examples:
            console.print(f"    {example}", highlight=False, markup=False, soft_wrap=True)
    if report.logs is not None:
        console.print(f"logs: {report.logs}", highlight=False, markup=False, soft_wrap=True)
    console.print("[green]every promise was kept[/green]" if report.ok else "[red]promises were broken[/red]")


def _task_rows(tasks: Sequence[TaskReport]) -> list[tuple[str, list[str]]]:
    return [
        ("delivery", [it.delivery for it in tasks]),
        ("records", [f"{it.records:,}" for it in tasks]),
        ("results", [f"{it.results:,}" for it in tasks]),
        ("dead letters", [f"{it.dead_letters:,}" for it in tasks]),
        ("lost", [f"{it.lost:,}" for it in tasks]),
        ("duplicates", [f"{it.duplicates:,}" for it in tasks]),
        (
            "duplicates, read_uncommitted",
            ["" if it.duplicates_uncommitted is None else f"{it.duplicates_uncommitted:,}" for it in tasks],
        ),
        ("first deliveries out of order", [f"{it.out_of_order:,}" for it in tasks]),
        ("rebalances", [f"{it.rebalances:,}" for it in tasks]),
        ("longest stall of results, s", [f"{it.longest_stall_s:.1f}" for it in tasks]),
        ("longest stall of a partition, s", [f"{it.longest_partition_stall_s:.1f}" for it in tasks]),
    ]


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _by_task(counts: Mapping[str, int]) -> str:
    return " / ".join(f"{count:,}" for count in counts.values())


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
