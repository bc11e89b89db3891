"""A comparison as one HTML page: no script, no other file, light and dark, legible on a telephone.

Everything that comes from a topic is escaped, shown as JSON with escapes for what cannot be seen, and kept from
reordering the text around it. A page's policy forbids whatever it should not need: it loads nothing and runs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from html import escape
from typing import Any

import orjson

from streamproc.replay.charts import Part, bar, differences, distributions, drawable, number_text, scatter
from streamproc.replay.diff import (
    SIDES,
    Comparison,
    Example,
    FieldChanges,
    Held,
    Limit,
    Verdict,
    distributions_of,
    metrics_of,
    text_of,
    visible,
)
from streamproc.replay.values import ROOT, Change

MAX_FIELDS = 100
MAX_CHARTED_FIELDS = 12
MAX_TRANSITIONS = 15
MAX_VALUE_CHARS = 300
MAX_DOCUMENT_CHARS = 20_000

MEANINGS = {
    Verdict.EQUAL: "the same on both sides",
    Verdict.CLOSE: "numbers differ, within their tolerances",
    Verdict.CHANGED: "something differs by more than that",
    Verdict.FAILED: "a result before, a dead letter now",
    Verdict.MENDED: "a dead letter before, a result now",
    Verdict.MISSING: "in the baseline only",
    Verdict.EXTRA: "in the candidate only",
}

_STYLE = """
:root{color-scheme:light dark;--page:#fff;--ink:#1f2328;--soft:#59636e;--line:#d1d9e0;--card:#f6f8fa;
--a:#0969da;--b:#bc4c00;--equal:#1a7f37;--close:#54aeff;--changed:#bc4c00;--failed:#cf222e;--mended:#8250df;
--missing:#6e7781;--extra:#bf8700;--mark:#fff1c9}
@media(prefers-color-scheme:dark){:root{--page:#0d1117;--ink:#e6edf3;--soft:#9198a1;--line:#3d444d;--card:#151b23;
--a:#58a6ff;--b:#f0883e;--equal:#3fb950;--close:#79c0ff;--changed:#f0883e;--failed:#f85149;--mended:#bc8cff;
--missing:#9198a1;--extra:#d29922;--mark:#4b3a0d}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1080px;padding:16px;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
h1{font-size:1.5em;margin:.2em 0}h2{font-size:1.2em;margin:1.8em 0 .4em}h3{font-size:1em;margin:1.4em 0 .2em}
p{margin:.4em 0}.soft{color:var(--soft)}
.answer{font-size:1.1em;border-left:6px solid var(--equal);background:var(--card);padding:10px 14px;margin:12px 0}
.answer.beyond{border-color:var(--failed)}
h1 code,h3 code{font-size:1em}
.bar{display:block;width:100%;height:26px;margin:10px 0}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.93em}
th,td{text-align:left;padding:5px 12px 5px 0;border-bottom:1px solid var(--line);vertical-align:top}
th{font-weight:600;color:var(--soft)}.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
code,pre{font:12.5px/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;unicode-bidi:isolate;direction:ltr;
overflow-wrap:anywhere}
pre{white-space:pre-wrap;background:var(--card);padding:8px;margin:4px 0}
td:first-child{white-space:nowrap}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr));gap:14px;margin:8px 0}
.chart{width:100%;height:auto;background:var(--card);border-radius:6px}
.chart text{fill:var(--soft);font:11px system-ui,sans-serif}.chart .chart-title{fill:var(--ink);font-weight:600}
.grid{stroke:var(--line);fill:none;stroke-width:.7}.zero{stroke:var(--soft);fill:none;stroke-dasharray:4 3}
.area-a{fill:var(--a);fill-opacity:.35;stroke:var(--a)}.area-b{fill:var(--b);fill-opacity:.35;stroke:var(--b)}
.line-b{fill:none;stroke:var(--b);stroke-width:1.8}.dot{fill:var(--b);fill-opacity:.55}
.key-a,.key-b,.dab{display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:6px}
.key-a{background:var(--a)}.key-b{background:var(--b)}
.example{border:1px solid var(--line);border-radius:6px;padding:8px 12px;margin:10px 0}
.badge{display:inline-block;border-radius:10px;padding:0 9px;margin-right:8px;color:var(--page);font-weight:600}
td.differs{background:var(--mark)}details{margin-top:6px}summary{cursor:pointer;color:var(--soft)}
.both{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:10px}
""" + "".join(
    f".fill-{it.value}{{fill:var(--{it.value})}}.badge.{it.value},.dab.{it.value}{{background:var(--{it.value})}}\n"
    for it in Verdict
)


def html_report(comparison: Comparison, limit: Limit, *, now: datetime, notes: Sequence[str] = ()) -> str:
    """The page.

    Args:
        comparison: What was found; finished.
        limit: How many records may differ.
        now: When it was found.
        notes: Sentences on how it was compared, such as the tolerances.
    """
    before, after = comparison.sides
    title = f"{before.name} against {after.name}"
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}: streamproc replay diff</title><style>{_STYLE}</style></head><body>",
        '<p class="soft">streamproc replay diff</p>',
        f"<h1><span class='key-a'></span><code>{escape(before.name)}</code> against ",
        f"<span class='key-b'></span><code>{escape(after.name)}</code></h1>",
        f'<p class="soft">{now:%Y-%m-%d %H:%M %Z}</p>',
        *_answer(comparison, limit),
        *_verdicts(comparison),
        *(f'<p class="soft">{escape(it)}</p>' for it in notes),
        *_fields(comparison),
        *_examples(comparison),
        *_metrics(comparison),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def sentence(comparison: Comparison, limit: Limit) -> str:
    """The answer: how many records differ, and whether so many may."""
    differing, records = comparison.differing, comparison.records
    share = f" ({differing / records:.3%})" if differing else ""
    allowed = "within" if limit.allows(differing, records) else "beyond"
    return f"{differing:,} of {records:,} records differ{share}, {allowed} the limit of {limit}"


def _shorten(text: str, chars: int) -> str:
    return text if len(text) <= chars else f"{text[: chars - 1]}…"


def _answer(comparison: Comparison, limit: Limit) -> Iterable[str]:
    beyond = "" if limit.allows(comparison.differing, comparison.records) else " beyond"
    yield f'<p class="answer{beyond}">{escape(sentence(comparison, limit))}.</p>'


def _verdicts(comparison: Comparison) -> Iterable[str]:
    parts = [Part(it.value, comparison.verdicts[it], it.value) for it in Verdict]
    if any(it.count for it in parts):
        yield bar(parts)
    rows = [
        (f'<span class="dab {it.value}"></span>{it.value}', f"{comparison.verdicts[it]:,}", MEANINGS[it])
        for it in Verdict
    ]
    yield _table(("verdict", "records", ""), rows, right=(1,))
    sides = [
        (
            f"<code>{escape(it.name)}</code>",
            f"{it.results:,}",
            f"{it.dead_letters:,}",
            f"{it.repeated:,}",
            f"{it.without_source:,}",
        )
        for it in comparison.sides
    ]
    yield _table(("side", "results", "dead letters", "repeated", "without a source"), sides, right=(1, 2, 3, 4))


def _fields(comparison: Comparison) -> Iterable[str]:
    fields = comparison.worst_fields()
    if not fields:
        return
    yield "<h2>Fields that differ</h2>"
    rows = [
        (
            f"<code>{escape(it.path)}</code>",
            f"{it.changed:,}",
            f"{it.close:,}",
            "" if it.mean_size is None else number_text(it.mean_size),
            "" if it.max_size is None else number_text(it.max_size),
        )
        for it in fields[:MAX_FIELDS]
    ]
    columns = ("field", "changed (records)", "close (records)", "mean |difference|", "max |difference|")
    yield _table(columns, rows, right=(1, 2, 3, 4))
    if len(fields) > MAX_FIELDS:
        yield f'<p class="soft">and {len(fields) - MAX_FIELDS:,} further fields</p>'
    for it in fields[:MAX_CHARTED_FIELDS]:
        yield from _field(it)


def _field(it: FieldChanges) -> Iterable[str]:
    pairs = drawable(it.pairs)
    if not pairs and not it.transitions:
        return
    yield f"<h3><code>{escape(it.path)}</code></h3>"
    if pairs:
        what = "changed" if it.changed else "close"
        sample = f"{len(pairs):,} of {it.sampled:,} {what}" if it.sampled > len(pairs) else what
        name = _shorten(it.path, 24)
        yield '<div class="charts">'
        yield differences(f"{name}: differences ({sample})", pairs)
        yield scatter(f"{name}: both sides ({sample})", pairs)
        yield "</div>"
    if it.transitions:
        found = it.transitions.most_common(MAX_TRANSITIONS)
        rows = [(f"<code>{escape(a)}</code>", f"<code>{escape(b)}</code>", f"{count:,}") for (a, b), count in found]
        yield _table(("baseline", "candidate", "records"), rows, right=(2,))
        if len(it.transitions) > MAX_TRANSITIONS:
            yield '<p class="soft">and further ones</p>'


def _examples(comparison: Comparison) -> Iterable[str]:
    if not comparison.examples:
        return
    yield "<h2>Examples</h2>"
    order = list(Verdict)
    for it in sorted(comparison.examples, key=lambda it: order.index(it.verdict)):
        yield from _example(it)


def _example(it: Example) -> Iterable[str]:
    key = "" if it.key is None else f", key {_value(it.key.decode(errors='replace'))}"
    task = f", task {escape(visible(it.task))}" if it.task else ""
    badge = f'<span class="badge {it.verdict.value}">{it.verdict.value}</span>'
    yield f'<div class="example">{badge}<code>{escape(it.place)}</code>{key}{task}'
    rows = [_change(change) for change in it.changes[:MAX_FIELDS]]
    yield _table(("field", *SIDES), rows or [(escape(ROOT), _short(it.baseline), _short(it.candidate))], marked=(1, 2))
    yield "<details><summary>in full</summary><div class='both'>"
    for name, held in zip(SIDES, (it.baseline, it.candidate), strict=True):
        yield f"<div>{name}<pre>{_held(held)}</pre></div>"
    yield "</div></details></div>"


def _change(it: Change) -> tuple[str, str, str]:
    close = ' <span class="soft">(close)</span>' if it.is_close else ""
    return (f"<code>{escape(it.worst)}</code>{close}", _value(it.baseline), _value(it.candidate))


def _value(value: Any) -> str:
    return f"<code>{escape(text_of(value, MAX_VALUE_CHARS))}</code>"


def _short(held: Held | None) -> str:
    """What a side says, where there are no fields to compare."""
    if held is None:
        return '<span class="soft">nothing</span>'
    return f"{'dead letter ' if held.is_dead else ''}{_value(held.value)}"


def _held(held: Held | None) -> str:
    if held is None:
        return "nothing"
    text = _shorten(orjson.dumps(held.value, option=orjson.OPT_INDENT_2).decode(), MAX_DOCUMENT_CHARS)
    lines = "\n".join([visible(line) for line in text.split("\n")])
    return f"{'dead letter: ' if held.is_dead else ''}{escape(lines)}"


def _metrics(comparison: Comparison) -> Iterable[str]:
    rows = [
        (escape(f"{it.name} {it.quantile} ({it.unit})"), _number(it.baseline), _number(it.candidate), _number(it.ratio))
        for it in metrics_of(comparison.sides)
        if it.baseline is not None or it.candidate is not None
    ]
    if not rows:
        return
    yield "<h2>Metrics</h2>"
    yield '<p class="soft">Not counted as differences. Step times and batch sizes are per batch, within 1 %.</p>'
    yield '<div class="charts">'
    for name, unit, before, after in distributions_of(comparison.sides):
        yield distributions(_shorten(name, 40), unit, before, after)
    yield "</div>"
    yield "<p><span class='key-a'></span>baseline <span class='key-b'></span>candidate</p>"
    yield _table(("metric", "baseline", "candidate", "ratio"), rows, right=(1, 2, 3))


def _number(number: float | None) -> str:
    return "" if number is None else number_text(number)


def _table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[int] = (), marked: Sequence[int] = ()
) -> str:
    """A table of cells that are HTML already."""
    style = dict.fromkeys(right, ' class="n"') | dict.fromkeys(marked, ' class="differs"')
    head = "".join(f"<th{style.get(at, '')}>{escape(it)}</th>" for at, it in enumerate(columns))
    body = ""
    for row in rows:
        cells = "".join(f"<td{style.get(at, '')}>{cell}</td>" for at, cell in enumerate(row))
        body += f"<tr>{cells}</tr>\n"
    return f'<div class="wide"><table><tr>{head}</tr>\n{body}</table></div>'
