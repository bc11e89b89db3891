"""What the commands share of a terminal: colours and live progress on one, plain lines elsewhere.

Results go to standard output, everything else to standard error, so that a pipe carries results only.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

_UNBOUNDED = 1_000


def _console(*, stderr: bool = False) -> Console:
    console = Console(stderr=stderr)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _UNBOUNDED  # who reads a file or a pipe wants a row in one line
    return console


stdout = _console()
stderr = _console(stderr=True)

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", metavar="FILE", help="The settings file.", show_default="streamproc.yaml"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def say(text: str) -> None:
    """A line for the person at the terminal."""
    stderr.print(text, markup=False, highlight=False, soft_wrap=True)


def say_error(text: str) -> None:
    """What went wrong: red on a terminal."""
    stderr.print(f"[red]{escape(text)}[/red]", highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """A result for scripts: one JSON document on standard output."""
    sys.stdout.write(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode() + "\n")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Iterable[str] = ()) -> None:
    """A result for people: a table on standard output, numbers (the columns in ``right``) to the right."""
    stdout.print(table(columns, rows, right=right))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Iterable[str] = ()) -> Table:
    """A table in the style of all the commands."""
    to_the_right = set(right)
    built = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        # Folding keeps names whole when the output is no terminal, or a narrow one.
        built.add_column(column, justify="right" if column in to_the_right else "left", overflow="fold")
    for row in rows:
        built.add_row(*[escape(str(cell)) for cell in row])
    return built


def ask(question: str) -> bool:
    """Ask yes or no on a terminal; where nobody can answer, no."""
    return sys.stdin.isatty() and stderr.is_terminal and typer.confirm(question, err=True)


class Progress:
    """Counts records; on a terminal one line that is rewritten, elsewhere a plain line every few seconds."""

    def __init__(self, verb: str, *, quiet: bool = False) -> None:
        self._verb = verb
        self._quiet = quiet
        self._live = stderr.is_terminal
        self._interval_s = 0.2 if self._live else 10.0
        self._begun = self._last = time.monotonic()
        self.count = 0

    def add(self, count: int) -> None:
        """So many more."""
        self.count += count
        now = time.monotonic()
        if not self._quiet and now - self._last >= self._interval_s:
            self._last = now
            self._write(end="\r" if self._live else "\n")

    def finish(self) -> None:
        """Say the total."""
        if not self._quiet:
            self._write(end="\n")

    def _write(self, *, end: str) -> None:
        elapsed = max(time.monotonic() - self._begun, 1e-9)
        line = f"{self._verb} {self.count:,} records in {elapsed:.1f} s ({self.count / elapsed:,.0f} records/s)"
        stderr.print(line, end=end, highlight=False, soft_wrap=True)
