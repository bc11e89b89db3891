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
from rich.console import Console, JustifyMethod, RenderableType
from rich.markup import escape
from rich.table import Table

from streamproc.errors import StreamprocError

_UNBOUNDED = 1_000
_BETWEEN = 2
_WHOLE_SHARE = 0.7


class UsageError(StreamprocError):
    """A command cannot be carried out as it was called."""

    exit_code = 2


def _console(*, stderr: bool = False) -> Console:
    # https://no-color.org asks for no colours; Rich would go on printing bold and dim.
    console = Console(stderr=stderr, color_system=None if os.environ.get("NO_COLOR") else "auto")
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


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    right: Iterable[str] = (),
    whole: Sequence[str] = (),
    spare: Sequence[str] = (),
) -> None:
    """A table for people on standard output, numbers (the columns in ``right``) to the right.

    Where it is too wide for the terminal, the columns in ``spare`` go, one after the other, and of the others those in
    ``whole`` are folded last.
    """
    listed = [[str(cell) for cell in row] for row in rows]
    shown = list(columns)
    for dropped in spare:
        if sum(_widths(shown, listed).values()) - _BETWEEN <= stdout.width:
            break
        at = shown.index(dropped)
        shown.pop(at)
        listed = [[*row[:at], *row[at + 1 :]] for row in listed]
    widths, room = _widths(shown, listed), stdout.width * _WHOLE_SHARE
    not_folded = []
    for column in whole:
        if column in widths and widths[column] <= room:
            room -= widths[column]
            not_folded.append(column)
    show(table(shown, listed, right=right, whole=not_folded))


def show(what: RenderableType) -> None:
    """Print to standard output; elsewhere than on a terminal without the blanks that fill columns."""
    if stdout.is_terminal:
        stdout.print(what)
        return
    with stdout.capture() as captured:
        stdout.print(what)
    sys.stdout.writelines(f"{line.rstrip()}\n" for line in captured.get().splitlines())


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    right: Iterable[str] = (),
    whole: Iterable[str] = (),
) -> Table:
    """A table in the style of all the commands: columns in ``right`` to the right, those in ``whole`` never folded."""
    to_the_right, not_folded = set(right), set(whole)
    built = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        justify: JustifyMethod = "right" if column in to_the_right else "left"
        # Folding keeps names whole when the output is no terminal, or a narrow one.
        built.add_column(escape(column), justify=justify, overflow="fold", no_wrap=column in not_folded)
    for row in rows:
        built.add_row(*[escape(str(cell)) for cell in row])
    return built


def _widths(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> dict[str, int]:
    cells = zip(columns, *rows, strict=True)
    return {column: max(map(len, [column, *inside])) + _BETWEEN for column, *inside in cells}


def count_of(number: int, what: str) -> str:
    """``1 partition``, ``2,000 partitions``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def can_ask() -> bool:
    """Whether somebody is there who sees a question and can answer it."""
    return sys.stdin.isatty() and stderr.is_terminal


def ask(question: str, otherwise: str) -> None:
    """Go on only after a yes; ``otherwise`` says what came of it. Raises UsageError where nobody can be asked."""
    if not can_ask():
        raise UsageError(f"{otherwise}: there is nobody to ask; give --yes")
    if not typer.confirm(question, err=True):
        raise StreamprocError(otherwise)


def no_such_partition(topic: str, count: int) -> str:
    """The sentence for a ``--partition`` that a topic does not have."""
    there = "partition 0 only" if count == 1 else f"partitions 0 to {count - 1}; choose --partition among them"
    return f"topic {topic} has {there}"


class Progress:
    """Counts records; on a terminal one line that is rewritten, elsewhere a plain line every few seconds."""

    def __init__(self, verb: str, *, quiet: bool = False, total: int | None = None) -> None:
        """With ``total``, how many there will be is shown too; where it is a guess, the count may end elsewhere."""
        self._verb = verb
        self._total = total
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

    def as_json(self) -> dict[str, float]:
        """The total, for scripts."""
        elapsed = self._elapsed_s
        return {
            "records": self.count,
            "seconds": round(elapsed, 3),
            "records_per_s": round(self.count / elapsed, 1),
        }

    @property
    def _elapsed_s(self) -> float:
        return max(time.monotonic() - self._begun, 1e-9)

    def _write(self, *, end: str) -> None:
        elapsed = self._elapsed_s
        share = f" of {self._total:,}" if self._total is not None and end == "\r" else ""
        line = (
            f"{self._verb} {count_of(self.count, 'record')}{share} in {elapsed:.1f} s "
            f"({self.count / elapsed:,.0f} records/s)"
        )
        stderr.print(line, end=end, highlight=False, soft_wrap=True)
