"""An estimate as one HTML page: no script, no other file, light and dark, legible on a telephone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from streamproc.estimate.measure import Measured
from streamproc.estimate.words import counted_by, explained, length_column
from streamproc.replay.charts import Curve, curves, number_text, scatter

POINTS = 24
"""Of a line."""
MIB = 1 << 20

_STYLE = """
:root{color-scheme:light dark;--page:#fff;--ink:#1f2328;--soft:#59636e;--line:#d1d9e0;--card:#f6f8fa;--deep:42%}
@media(prefers-color-scheme:dark){:root{--page:#0d1117;--ink:#e6edf3;--soft:#9198a1;--line:#3d444d;--card:#151b23;
--deep:62%}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1080px;padding:16px;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
h1{font-size:1.5em;margin:.2em 0}h2{font-size:1.2em;margin:1.8em 0 .4em}
p{margin:.4em 0}.soft{color:var(--soft)}.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.93em}
th,td{text-align:right;padding:5px 12px 5px 0;border-bottom:1px solid var(--line);font-variant-numeric:tabular-nums}
th{font-weight:600;color:var(--soft)}td:first-child,th:first-child,.l{text-align:left}
code,pre{font:12.5px/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
pre{background:var(--card);padding:8px}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,420px),1fr));gap:14px;margin:8px 0}
.chart{width:100%;height:auto;background:var(--card);border-radius:6px}
.chart text{fill:var(--soft);font:11px system-ui,sans-serif}.chart .chart-title{fill:var(--ink);font-weight:600}
.grid{stroke:var(--line);fill:none;stroke-width:.7}.zero{stroke:var(--soft);fill:none;stroke-dasharray:4 3}
path.line{fill:none;stroke-width:1.4}.dot{fill:var(--ink);fill-opacity:.55}
""" + "".join(
    f"circle.c{index}{{fill:hsl({hue} 75% var(--deep))}}path.c{index}{{stroke:hsl({hue} 75% var(--deep))}}\n"
    for index, hue in enumerate(range(210, 210 + 9 * 34, 34))
)


def html_page(measured: Measured) -> str:
    """The page."""
    it = measured.estimate
    how = measured.how
    title = f"{how.application}, task {how.task}"
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}: streamproc estimate</title><style>{_STYLE}</style></head><body>",
        '<p class="soft">streamproc estimate</p>',
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{how.at:%Y-%m-%d %H:%M %Z}, {how.samples:,} sample records</p>',
        *(f"<p>{escape(sentence)}</p>" for sentence in explained(measured)),
        "<h2>Measured, and the model</h2>",
        '<p class="soft">Dots are medians of what was measured, lines what the model says.</p>',
        '<div class="charts">',
        *_charts(measured),
        "</div>",
        "<h2>By length</h2>",
        _table(
            (length_column(it.length), "best size", "records/s at it", "largest measured", "ended by"),
            [
                (f"{at.length:,}", f"{at.best_size:,}", number_text(at.per_s), f"{at.largest:,}", at.ended_by)
                for at in how.at_lengths
            ],
        ),
        "<h2>What it holds for</h2>",
        _table(("", ""), list(it.fingerprint.items())),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _charts(measured: Measured) -> Iterable[str]:
    it = measured.estimate
    model = it.cost
    times, memories, rates = [], [], []
    for index, explored in enumerate(measured.explored):
        if not explored.seen:
            continue
        sizes = _between(1, explored.largest)
        seen = sorted(explored.seen, key=lambda it: it.size)
        name, style, length = f"{explored.length:,}", f"c{index}", explored.length
        modelled = [(size, model.time_ms(size, length)) for size in sizes]
        times.append(Curve(name, style, [(one.size, one.time_ms) for one in seen], modelled))
        held = [(size, model.memory_bytes(size, length) / MIB) for size in sizes]
        memories.append(Curve(name, style, [(one.size, one.peak_bytes / MIB) for one in seen], held))
        per_s = [(size, size / time_ms * 1_000) for size, time_ms in modelled]
        rates.append(Curve(name, style, [(one.size, one.per_s) for one in seen], per_s))
    of_length = f" by length ({counted_by(it.length)})" if it.length else ""
    yield curves(f"Time of a batch, ms{of_length}", "records", "", times)
    yield curves(f"Memory, MiB{of_length}", "records", "", memories)
    yield curves(f"Records a second{of_length}", "records", "", rates)
    held_out = [one for one in measured.held_out if one.time_ms == one.time_ms]
    if held_out:
        pairs = [(model.time_ms(one.size, one.length), one.time_ms) for one in held_out]
        yield scatter("Held out: time of a batch, ms, seen (up) and predicted", pairs, "predicted")
        pairs = [(model.memory_bytes(one.size, one.length) / MIB, one.peak_bytes / MIB) for one in held_out]
        yield scatter("Held out: memory, MiB, seen (up) and predicted", pairs, "predicted")


def _between(least: int, most: int) -> list[int]:
    if least == most:
        return [least]
    return sorted({round(least * (most / least) ** (index / (POINTS - 1))) for index in range(POINTS)})


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(it)}</th>" for it in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>\n{body}</table></div>'
