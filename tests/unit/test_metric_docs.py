"""The metrics' page and the metric table are the same thing."""

from __future__ import annotations

from pathlib import Path

from streamproc.observe.metric_table import TABLE, render_markdown

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def test_the_metrics_page_is_the_metric_table() -> None:
    assert PAGE.read_text() == render_markdown(), "run: python -m streamproc.observe.metric_table > docs/metrics.md"


def test_every_metric_is_on_the_page_with_its_meaning() -> None:
    lines = render_markdown().splitlines()
    for spec in TABLE:
        (row,) = [line for line in lines if line.startswith(f"| `{spec.name}` |")]
        assert spec.kind in row
        assert spec.help in row
        assert row.count("|") == 6, "a bar in a cell would end it"
