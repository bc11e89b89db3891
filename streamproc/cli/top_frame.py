"""What a frame of ``streamproc top`` looks like: figures as lines of text, for a width and a height.

No line is wider than the terminal. Where there is too little room, columns go, the least important first, then the ends
of names, then the lines at the bottom. Whatever a processor says is printed as text: an escape sequence in the reason
of a circuit reaches no terminal.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.text import Text

from streamproc.cli.top_history import Figures, ReplicaFigures, TaskFigures
from streamproc.errors import printable

_GAP = 2
_LEAST_NAME = 6
_MAX_TREND = 60
_BARS, _PLAIN_BARS = "▁▂▃▄▅▆▇█", "_.-=+*%#"
_STYLES = {
    **dict.fromkeys(("running", "ready", "busy", "idle", "closed"), "green"),
    **dict.fromkeys(("starting", "stopping", "draining", "paused", "reloading", "not ready"), "yellow"),
    **dict.fromkeys(("stopped", "lost", "not alive", "open"), "red"),
}


@dataclass(frozen=True, slots=True)
class _Column:
    title: str
    right: bool = True
    spare: int = 0
    """Where there is too little room, the highest goes first; 0 stays."""


def frame(
    seen: Figures, width: int, height: int | None = None, *, hint: str = "", ascii_only: bool = False
) -> list[Text]:
    """The lines of a frame: at most ``height``, each at most ``width`` cells wide. ``hint`` is the last one."""
    lines = [*_heads(seen.replicas, width), Text(), *_now(seen, width, _PLAIN_BARS if ascii_only else _BARS)]
    if seen.tasks:
        lines += [Text(), *_flow(seen.tasks, width), Text(), *_batches(seen.tasks, width)]
        lines += [line for name, task in seen.tasks.items() for line in _notes(name, task, width)]
    workers = list(_workers(seen.replicas, width))
    if workers:
        lines += [Text(), *workers]
    last = [_cut(Text(hint, "dim"), width)] if hint else []
    if height is not None and len(lines) + len(last) > height:
        kept = max(height - len(last) - 1, 0)
        lines = [*lines[:kept], _cut(Text(f"… {len(lines) - kept} more lines in a higher window", "dim"), width)]
    return [*lines, *last][:height]


# -- the parts of a frame


def _heads(replicas: Sequence[ReplicaFigures], width: int) -> Iterable[Text]:
    if len(replicas) == 1:
        yield from _head(replicas[0], width)
        return
    columns = (
        _Column("replica", right=False),
        _Column("state", right=False),
        _Column("up", spare=3),
        _Column("generation", spare=4),
        _Column("backend", right=False, spare=5),
        _Column("results/s"),
        _Column("lag", spare=1),
        _Column("busy", spare=2),
    )
    rows = []
    for number, it in enumerate(replicas, 1):
        lags = [task.lag_records for task in it.tasks.values() if task.lag_records is not None]
        rates = [task.results_per_s for task in it.tasks.values() if task.results_per_s is not None]
        busy = sum(worker.state == "busy" for worker in it.workers)
        rows.append(
            (
                _text(f"{number} {it.url}"),
                _state(_standing(it)),
                _text("" if it.uptime_s is None else _time(it.uptime_s)),
                _text("" if it.generation is None else str(it.generation)),
                _text(it.backend_version or ""),
                _text(_rate(sum(rates) if rates else None)),
                _text(_count(sum(lags) if lags else None) if it.answers else ""),
                _text(f"{busy} of {len(it.workers)}" if it.workers else ""),
            )
        )
    yield from _table(columns, rows, width)
    for number, it in enumerate(replicas, 1):
        for reason in _troubles(it):
            yield from _said(f"{number}: {reason}", width, "yellow" if it.answers else "red")


def _head(it: ReplicaFigures, width: int) -> Iterable[Text]:
    parts = [
        f"up {_time(it.uptime_s)}" if it.uptime_s is not None else "",
        f"generation {it.generation}" if it.generation is not None else "",
        f"backend {it.backend_version}" if it.backend_version else "",
        it.url,
    ]
    line = Text.assemble(_text(it.name or "", "bold"), "  " if it.name else "", _state(_standing(it)))
    for part in filter(None, parts):
        if line.cell_len + _GAP + cell_len(printable(part)) <= width:
            line.append("  ").append_text(_text(part))
    yield _cut(line, width)
    for reason in _troubles(it):
        yield from _said(reason, width, "yellow" if it.answers else "red")


def _standing(it: ReplicaFigures) -> str:
    if not it.answers:
        return "lost"
    if it.not_live:
        return "not alive"
    if it.not_ready:
        return "not ready"
    return "reloading" if it.reloading else "ready"


def _troubles(it: ReplicaFigures) -> Iterable[str]:
    if not it.answers:
        yield f"lost for {_time(it.lost_s or 0.0)}: {it.error or 'no answer yet'}"
    yield from it.not_live
    yield from it.not_ready
    if it.restarts:
        yield f"started anew {'once' if it.restarts == 1 else f'{it.restarts} times'} meanwhile"


def _now(seen: Figures, width: int, bars: str) -> Iterable[Text]:
    said = f"results {_rate(seen.results_per_s)}/s "
    room = min(width - cell_len(said), _MAX_TREND)
    yield _cut(Text.assemble((said, "bold"), (_trend(seen.trend[-room:] if room > 0 else [], bars), "cyan")), width)
    parts = [
        f"read {_rate(seen.read_per_s)}/s",
        f"lag {_count(seen.lag_records)} records",
        f"{_time(seen.lag_seconds)} behind",
        f"{_count(seen.in_flight_records)} in flight",
    ]
    line = parts[0]
    for part in parts[1:]:
        if cell_len(line) + _GAP + cell_len(part) <= width:
            line += f"  {part}"
    yield _cut(Text(line), width)


def _flow(tasks: dict[str, TaskFigures], width: int) -> Iterable[Text]:
    columns = (
        _Column("task", right=False),
        _Column("state", right=False),
        _Column("circuit", right=False, spare=1),
        _Column("read/s", spare=4),
        _Column("results/s"),
        _Column("lag"),
        _Column("behind", spare=2),
        _Column("p50", spare=5),
        _Column("p99", spare=3),
        _Column("in flight", spare=4),
    )
    rows = [
        (
            _text(name),
            _state(it.state),
            _state(it.circuit, "green" if it.circuit == "closed" else "red"),
            _text(_rate(it.read_per_s)),
            _text(_rate(it.results_per_s)),
            _text(_count(it.lag_records)),
            _text(_time(it.lag_seconds)),
            _text(_milliseconds(it.latency_p50_ms)),
            _text(_milliseconds(it.latency_p99_ms)),
            _text(_count(it.in_flight_records)),
        )
        for name, it in tasks.items()
    ]
    return _table(columns, rows, width)


def _batches(tasks: dict[str, TaskFigures], width: int) -> Iterable[Text]:
    columns = (
        _Column("batches", right=False),
        _Column("per s", spare=4),
        _Column("records", spare=5),
        _Column("fill"),
        _Column("padding", spare=3),
        _Column("waited", spare=6),
        _Column("took"),
        _Column("retried", spare=2),
        _Column("dead", spare=1),
    )
    rows = [
        (
            _text(name),
            _text(_rate(it.batches_per_s)),
            _text(_rate(it.batch_records)),
            _text("-" if it.fill is None else f"{it.fill:.0%}"),
            _text("-" if it.padding is None else f"{it.padding:.2f}x"),
            _text(_milliseconds(it.wait_ms)),
            _text(_milliseconds(it.wall_ms)),
            _text(_count(it.retried)),
            _text(_count(it.dead), "red" if it.dead else ""),
        )
        for name, it in tasks.items()
    ]
    return _table(columns, rows, width)


def _notes(name: str, it: TaskFigures, width: int) -> Iterable[Text]:
    """What there is to say of a task in words."""
    if it.circuit_reason is not None:
        yield from _said(f"{name}: the circuit is {it.circuit}: {it.circuit_reason}", width, "red")
    if it.reason is not None:
        yield from _said(f"{name}: {it.reason}", width, "yellow")
    if it.given_up_by_cause:
        causes = ", ".join(f"{_count(many)} {cause}" for cause, many in it.given_up_by_cause.items())
        dropped = f", of which {_count(it.dropped)} dropped" if it.dropped else ""
        yield from _said(f"{name}: given up: {causes}{dropped}", width)
    if it.steps_ms:
        steps = ", ".join(f"{step.replace('_', ' ')} {_milliseconds(mean)}" for step, mean in it.steps_ms.items())
        yield from _said(f"{name}: {steps}", width, "dim")


def _workers(replicas: Sequence[ReplicaFigures], width: int) -> Iterable[Text]:
    columns = (
        _Column("worker", right=False),
        _Column("pid", spare=2),
        _Column("state", right=False),
        _Column("at work on", right=False, spare=1),
        _Column("for", spare=1),
        _Column("batches", spare=4),
        _Column("memory", spare=3),
        _Column("restarts", spare=5),
    )
    rows = []
    for number, replica in enumerate(replicas, 1):
        for it in replica.workers:
            busy = it.running_task is not None and it.running_batch_ms is not None
            rows.append(
                (
                    _text(str(it.index) if len(replicas) == 1 else f"{number}.{it.index}"),
                    _text("" if it.pid is None else str(it.pid)),
                    _state("idle" if it.state == "ready" else it.state),
                    _text(f"{_count(it.running_records)} of {it.running_task}" if busy else ""),
                    _text(_milliseconds(it.running_batch_ms) if busy else ""),
                    _text(_count(it.batches)),
                    _text("" if it.rss_mb is None else f"{it.rss_mb:,.0f} MiB"),
                    _text(_count(it.restarts), "yellow" if it.restarts else ""),
                )
            )
    return _table(columns, rows, width) if rows else ()


# -- lines


def _table(columns: Sequence[_Column], rows: Sequence[Sequence[Text]], width: int) -> Iterable[Text]:
    cells = [[Text(it.title, "bold"), *(row[at] for row in rows)] for at, it in enumerate(columns)]
    widths = [max(cell.cell_len for cell in column) for column in cells]
    shown = list(range(len(columns)))

    def needed() -> int:
        return sum(widths[at] for at in shown) + _GAP * (len(shown) - 1)

    # The first column is of names, whose ends may go before a column does.
    whole, widths[0] = widths[0], min(widths[0], _LEAST_NAME)
    while needed() > width and (droppable := [at for at in shown if columns[at].spare]):
        shown.remove(max(droppable, key=lambda at: columns[at].spare))
    widths[0] = min(whole, max(width - needed() + widths[0], 1))
    for line in range(len(rows) + 1):
        text = Text()
        for at in shown:
            cell = _cut(cells[at][line], widths[at])
            blanks = " " * (widths[at] - cell.cell_len)
            text.append(" " * _GAP if at else "")
            text.append(blanks if columns[at].right else "")
            text.append_text(cell)
            text.append("" if columns[at].right or at == shown[-1] else blanks)
        yield _cut(text, width)


def _text(text: str, style: str = "") -> Text:
    return Text(printable(text), style)


def _said(text: str, width: int, style: str = "") -> Iterable[Text]:
    """A sentence, in as many lines as it needs."""
    for line in textwrap.wrap(printable(text), max(width, 8), subsequent_indent="  "):
        yield _cut(Text(line, style), width)


def _state(text: str, style: str | None = None) -> Text:
    return _text(text, _STYLES.get(text, "") if style is None else style)


def _cut(text: Text, width: int) -> Text:
    """The text, in at most so many cells."""
    if text.cell_len <= width:
        return text
    text = text.copy()
    text.truncate(max(width, 0), overflow="ellipsis")
    return text


def _trend(values: Sequence[float | None], bars: str) -> str:
    highest = max((it for it in values if it is not None), default=0.0)
    if highest <= 0:
        return "".join(" " if it is None else bars[0] for it in values)
    return "".join(" " if it is None else bars[min(int(it / highest * len(bars)), len(bars) - 1)] for it in values)


# -- numbers with their units


def _count(value: float | None) -> str:
    if value is None:
        return "?"
    if abs(value) < 10_000:
        return f"{value:,.0f}"
    for unit in "kMG":
        value /= 1_000
        if abs(value) < 999.5:
            return f"{value:.3g}{unit}"
    return f"{value:,.0f}G"


def _rate(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2g}" if 0 < abs(value) < 9.95 else _count(value)


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else _time(value / 1_000)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds == 0:
        return "0 s"
    if seconds < 0.9995:
        return f"{seconds * 1_000:.3g} ms"
    if seconds < 99.5:
        return f"{seconds:.3g} s"
    for size, unit in ((60, "min"), (3_600, "h")):
        if seconds < 99.5 * size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds / 86_400:,.0f} d"
